#!/bin/bash
# clean_machine.sh - vmcp on a Debian 12 that has nothing but itself
#
#   tests/clean_machine.sh [--build] [--keep] [VMCP.DEB]
#
# Makes a minimal Debian 12 (mmdebstrap), installs the package there with what it depends on and nothing that it recommends, and does what a new user
# does: doctor, manual pages, completions; the tiny guest is run, checkpointed, reverted and checked; then the package is removed again. Without VMCP.DEB
# cpack makes one of build/release. The guest is build/release's in any case.
#
# --build  then builds the last commit there from nothing, as README says, and does the same with what was built
# --keep   leaves the root, and says where it is
#
# Needs root, the network, and mmdebstrap (scripts/setup.sh test). Not part of tests/run.sh, as it takes minutes. VMCP_DEBIAN_MIRROR names another mirror.
# Exit status: 0 done; 1 it failed; 2 wrong usage.

set -euo pipefail
cd "$(dirname "$0")/.."

readonly SUITE=bookworm
build='' keep='' deb=''
for arg in "$@"; do
    case $arg in
        --build) build=1 ;;
        --keep) keep=1 ;;
        --help | -h) sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        -*) echo "clean_machine.sh: unknown argument '$arg'" >&2; exit 2 ;;
        *) deb=$(realpath "$arg") ;;
    esac
done
[ "$(id -u)" -eq 0 ] || { echo "clean_machine.sh: a root of its own needs root" >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/vmcp-clean.XXXXXX")
root=$work/root
if [ -n "$keep" ]; then echo "the root is $root"; else trap 'rm -rf --one-file-system "$work"' EXIT; fi
started=$SECONDS
step() { printf '\n=== %s (after %d s)\n' "$1" $((SECONDS - started)); }

# What both ways of installing must bring. Runs in the new root with the folder of the installation as its argument.
cat >"$work/smoke" <<'SMOKE'
set -eu
prefix=$1
vmcp version
test "$(command -v vmcp)" = "$prefix/bin/vmcp"
echo "doctor:"
vmcp doctor
man=$prefix/share/man
for page in man1/vmcp.1 man1/vmcp-checkpoint.1 man5/guest.cfg.5 man5/vmcp-store.5 man7/vmcp-tutorial.7; do
    ls $man/$page* >/dev/null
done
completed=$(bash -c ". $prefix/share/bash-completion/completions/vmcp; COMP_LINE='vmcp chec'; COMP_POINT=9; COMP_WORDS=(vmcp chec); COMP_CWORD=1; _vmcp; echo \${COMPREPLY[0]}")
test "$completed" = checkpoint
ls "$prefix"/share/zsh/*/_vmcp "$prefix"/share/fish/vendor_completions.d/vmcp.fish >/dev/null
if [ ! -e /dev/kvm ]; then
    echo "SKIP: no /dev/kvm: the guest is not run"
    exit 0
fi
rm -rf /vm && mkdir /vm && cd /vm
export VMCP_STORE=/vm/store
truncate -s 16M disk.raw
vmcp config init --name web --memory 64M --kernel /pkg/tiny.elf --disk disk.raw
sed -i 's/^initrd/# initrd/; s/^cmdline = .*/cmdline = set=16M rate=2000 disk=1 disk_blocks=256 report=0/' guest.cfg
vmcp run --dry-run guest.cfg >/dev/null
vmcp run --detach guest.cfg
mkfifo keys
vmcp console web <keys >said &
exec 3>keys
# Waits for what the guest says to a command.
guest_says() {
    echo "$1" >&3
    for i in $(seq 600); do
        if grep -q "$2" said; then return 0; fi
        sleep 0.1
    done
    cat said
    return 1
}
guest_says status 'tiny: status'
id=$(vmcp checkpoint --live --tag good)
vmcp checkpoint web -m 'it stands still meanwhile'
vmcp log --graph
vmcp revert good
guest_says check 'tiny: check ok'
vmcp verify
vmcp export good good.vmcp
vmcp ps
exec 3>&-
vmcp kill web
vmcp revert "$id"
vmcp kill web
cd / && rm -rf /vm
SMOKE

# In the new root, with the host's devices; a command that fails ends the script.
inside() {
    unshare --mount --propagation private --pid --fork sh -euc '
        mount --rbind /dev "$1/dev"
        mount -t proc proc "$1/proc"
        mount -t sysfs sysfs "$1/sys"
        mount -t tmpfs none "$1/run"
        exec chroot "$@"' sh "$root" env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"
}

if [ -z "$deb" ]; then
    step "the package"
    (cd build/release && cpack -B "$work/pkg" >"$work/log" 2>&1) || { cat "$work/log"; exit 1; }
    deb=$(echo "$work"/pkg/*.deb)
fi

step "a minimal Debian $SUITE"
# How the host reaches its mirror holds for the new root too.
apt-config dump 2>/dev/null | grep -E '^Acquire::(http|https|ftp|Check-Valid|Check-Date|Retries|Max-)' >"$work/apt.conf" || true
mmdebstrap --quiet --variant=minbase --aptopt="$work/apt.conf" --dpkgopt=force-unsafe-io "$SUITE" "$root" "${VMCP_DEBIAN_MIRROR:-http://deb.debian.org/debian}"
cp "$work/apt.conf" "$root/etc/apt/apt.conf.d/50host"
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
mkdir "$root/pkg"
cp "$deb" "$root/pkg/vmcp.deb"
cp build/release/examples/tiny/tiny.elf "$work/smoke" "$root/pkg/"

step "installing the package"
inside sh -euc 'apt-get -qq update && apt-get -qq install -y --no-install-recommends /pkg/vmcp.deb >/dev/null'
step "using it"
inside sh /pkg/smoke /usr
step "removing it"
inside sh -euc 'dpkg -L vmcp >/pkg/files; apt-get -qq purge -y vmcp >/dev/null
    while read -r file; do test -d "$file" || ! test -e "$file" || { echo "left: $file"; exit 1; }; done </pkg/files'

if [ -n "$build" ]; then
    step "building from nothing"
    mkdir "$root/src"
    git archive HEAD | tar -x -C "$root/src"
    inside sh -euc 'cd /src && scripts/setup.sh build && cmake --preset release -DVMCP_TESTS=OFF && cmake --build --preset release && cmake --install build/release >/dev/null && ldconfig'
    step "using what was built"
    inside sh /pkg/smoke /usr/local
fi
printf '\n=== %d s: passed\n' $((SECONDS - started))
