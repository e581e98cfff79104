#!/bin/bash
# run.sh - build vmcp and measure it on this host's KVM
#
#   bench/run.sh [OPTIONS OF bench/pause_gap.py]
#
# docs/benchmarking.md explains the figures. VMCP_TMP: a folder on the filesystem to be measured (default: /var/tmp).
# VMCP_BIN and VMCP_TINY, if both are set, are measured as they are; else a release build is made.

set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
    --help | -h) sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; exec python3 bench/pause_gap.py --help ;;
esac
if [ -z "${VMCP_BIN:-}" ] || [ -z "${VMCP_TINY:-}" ]; then
    scripts/setup.sh build
    mkdir -p build
    { cmake --preset release && cmake --build --preset release; } >build/bench.log 2>&1 || { cat build/bench.log; exit 1; }
    export VMCP_BIN=$PWD/build/release/cli/vmcp VMCP_TINY=$PWD/build/release/examples/tiny/tiny.elf
fi
[ -w /dev/kvm ] || { echo "run.sh: no usable /dev/kvm on this host" >&2; exit 1; }
exec python3 bench/pause_gap.py "$@"
