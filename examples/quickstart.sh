#!/bin/bash
# quickstart.sh - the main job of vmcp, on a real Debian guest, from nothing
#
#   examples/quickstart.sh
#
# On a fresh Debian 12, as root: installs what is needed from Debian's packages, builds vmcp, makes a small Debian guest, boots it,
# takes a live checkpoint while the guest writes files, wrecks the guest, and takes it back. Everything but the packages stays in build/.
# Where this host has a hardware KVM it is used; elsewhere the same happens in a software machine (tests/with-kvm), which is slower.

set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] && [ -z "${NO_COLOR:-}" ] || say() { printf '\n== %s\n' "$*"; }

case ${1:-} in
    '') ;;
    --help | -h) sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "quickstart: unknown argument '$1'" >&2; exit 2 ;;
esac

say "1. What is missing is installed from Debian's packages"
scripts/setup.sh build demo
started=$SECONDS

say "2. vmcp is built, and meanwhile a Debian guest is made from Debian's packages"
mkdir -p build
examples/debian-guest/build.sh build/debian-guest >build/debian-guest.log 2>&1 &
guest=$!
cmake -S . -B build/quickstart -G Ninja -DVMCP_TESTS=OFF >build/quickstart.log
cmake --build build/quickstart | tail -n 1
echo "vmcp is there: $PWD/build/quickstart/cli/vmcp"
wait "$guest" || { cat build/debian-guest.log >&2; exit 1; }
echo "the guest is there: $(ls -sh build/debian-guest | tail -n +2 | tr -s ' \n' ' ')"

say "3. Where it will run"
echo "This host: $(tests/with-kvm --explain)"
status=0
tests/with-kvm --mem 3072 --no-stdin \
    python3 examples/quickstart_demo.py build/quickstart/cli/vmcp build/debian-guest || status=$?
printf '\n(%d s since the packages were there)\n' $((SECONDS - started))
exit "$status"
