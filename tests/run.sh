#!/bin/bash
# run.sh - set up, build and test vmcp
#
#   tests/run.sh [--quick]
#
# On a fresh Debian 12, as root: installs from Debian's packages what is missing, builds, and runs every test:
#
#   1. units and engine tests, in a release build and under ASan+UBSan; thread-heavy ones under TSan too
#   2. whole VMs with the tiny guest (examples/tiny), on this host's KVM, else in a software machine
#   3. a stock Debian guest: on a hardware KVM directly, else in a software machine (tests/with-kvm)
#
# --quick: the release build and its units only. Exit status: 0 if everything passed; what was skipped is said.
# VMCP_TEST_ROUNDS and VMCP_TEST_DEBIAN_ROUNDS set the rounds of the long tests (100 and 20), VMCP_TEST_DEBIAN_CHECKPOINTS the live checkpoints under
# fio (5; 50 is the whole acceptance test), VMCP_TEST_POSTGRESQL=1 adds PostgreSQL under 3 of them (a quarter of an hour and more), VMCP_TEST_LIBVIRT_ROUNDS those with QEMU's domains (3; 10 is the whole acceptance test), DISK_TEST_SCALE how much of the random tests of
# disks the release build goes through (0.3; 1 is all of docs/cowdisk.md).

set -euo pipefail
cd "$(dirname "$0")/.."

quick=''
case ${1:-} in
    '') ;;
    --quick) quick=1 ;;
    --help | -h) sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "run.sh: unknown argument '$1'" >&2; exit 2 ;;
esac

started=$SECONDS failed=() outputs=$(mktemp -d)
trap 'rm -rf "$outputs"' EXIT
step() { printf '\n=== %s (after %d s)\n' "$1" $((SECONDS - started)); }
# Runs a part to its end even if an earlier one failed: one run shows all that is broken.
part() {
    local name=$1
    shift
    step "$name"
    "$@" 2>&1 | tee "$outputs/$name" || { failed+=("$name"); printf '=== FAILED: %s\n' "$name"; }
}
build_and_test() {
    local preset=$1
    # Chained, as set -e does not hold in what stands left of ||.
    cmake --preset "$preset" >"build/$preset.log" 2>&1 || { cat "build/$preset.log"; return 1; }
    cmake --build --preset "$preset" >"build/$preset.log" 2>&1 || { tail -n 50 "build/$preset.log"; return 1; }
    # Half of them wait: for disks that are slow on purpose, and for each other.
    ctest --preset "$preset" -j $((2 * $(nproc)))
}
# What these tests look for is not to be found on a slow disk: temporary files in memory. Of the long random tests of disks as much as is said.
build_and_test_in_memory() (
    TMPDIR=$(mktemp -d /dev/shm/vmcp-test.XXXXXX 2>/dev/null || mktemp -d)
    trap 'rm -rf "$TMPDIR"' EXIT
    export TMPDIR DISK_TEST_SCALE=$1
    build_and_test "$2"
)

# One test of the stock guest in a machine of its own. QEMU's emulated SVM now and then gets its interrupt flags wrong, and the emulated host
# hangs (with-kvm exits with 124) or dies (125): then once more, aloud.
debian_test() {
    local name=$1 try status=125 file=debian_test.py
    case $name in
        fio | postgresql) file=debian_data_test.py ;;
        systemd) local -x VMCP_GUEST=$VMCP_GUEST-systemd ;;
        tutorial) local -x VMCP_TUTORIAL_GUEST=$VMCP_GUEST-systemd && file=tutorial_test.py ;;
    esac
    for try in 1 2 3; do
        status=0
        tests/with-kvm --mem 7168 --timeout 900 python3 "tests/vm/$file" "$name" || status=$?
        case $kind:$status in software*:12[45] | none*:12[45]) ;; *) break ;; esac
        echo "run.sh: the software machine itself hung or died (try $try of 3)"
    done
    return "$status"
}
# Commands that keep little more than one processor busy, two at a time: the longest first. What each prints is shown when it has ended.
together() {
    local command
    printf '\n=== two at a time: %s(after %d s)\n' "$(printf '%s; ' "$@")" $((SECONDS - started))
    for command in "$@"; do
        # wait -n may return for one that ended long ago.
        while [ "$(jobs -pr | wc -l)" -ge 2 ]; do wait -n || true; done
        { (apart "$command") >"$outputs/$command" 2>&1 </dev/null || true; flock "$outputs" cat "$outputs/$command"; } &
    done
    wait
    for command in "$@"; do
        grep -q '^=== passed' "$outputs/$command" || failed+=("$command")
    done
}
apart() {
    local begin=$SECONDS end=passed
    step "$1"
    # shellcheck disable=SC2086 # a command is words
    $1 || end=FAILED
    printf '=== %s: %s, in %d s\n' "$end" "$1" $((SECONDS - begin))
}
vm_test() { "${near_kvm[@]}" python3 "tests/vm/$1_test.py"; }
vm_test_sanitized() {
    VMCP_BIN=$PWD/build/debug/cli/vmcp VMCP_TEST_ROUNDS=10 "${near_kvm[@]}" python3 tests/vm/tiny_test.py revert gone captured raw second powers json cancel
}
libvirt_test() {
    case $1 in
        checkpoint) env -u VMCP_GUEST python3 tests/vm/libvirt_checkpoint_test.py ;; # that is still being made
        debian) python3 tests/vm/libvirt_checkpoint_test.py debian ;;
        domains) "${near_kvm[@]}" python3 tests/vm/libvirt_test.py ;;
    esac
}

step "packages"
scripts/setup.sh build test
mkdir -p build
part "release build: units and engine" build_and_test_in_memory "${DISK_TEST_SCALE:-0.3}" release
[ -z "$quick" ] || { [ ${#failed[@]} -eq 0 ]; exit; }
part "ASan+UBSan build: units and engine" build_and_test_in_memory 0.1 debug
part "TSan build: thread-heavy parts" build_and_test_in_memory 0.04 tsan

export VMCP_BIN=$PWD/build/release/cli/vmcp VMCP_TINY=$PWD/build/release/examples/tiny/tiny.elf
kind=$(tests/with-kvm --explain) || kind=none
printf '\n=== this host: %s\n' "$kind"
case $kind in
    none*) near_kvm=(tests/with-kvm --quiet) ;;
    *) near_kvm=() ;;
esac
# One tiny sample of everything that is measured: the figures mean nothing here, but the scripts must not rot.
bench_smoke() (
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
    timeout 1800 bench/run.sh --quick --smoke --out "$out" >"$out/log" 2>&1 || { cat "$out/log"; return 1; }
    tail -n 1 "$out/log"
)
VMCP_GUEST=$PWD/build/debian-guest
export VMCP_GUEST
packages=(--with fio) long=("debian_test stress_smp" "debian_test balloon" "debian_test fio")
if [ -n "${VMCP_TEST_POSTGRESQL:-}" ]; then
    packages=(--with fio,postgresql,postgresql-contrib --prepare tests/vm/debian_prepare.sh)
    long=("debian_test postgresql" "${long[@]}")
fi
if [ ${#near_kvm[@]} -eq 0 ]; then
    long+=(bench_smoke)
else
    echo "SKIP: the benchmarks need a KVM of this host's own"
fi
make_debian_guest() { examples/debian-guest/build.sh "${packages[@]}" "$VMCP_GUEST" && examples/debian-guest/build.sh --systemd "$VMCP_GUEST-systemd"; }

together make_debian_guest "vm_test fault_table" "vm_test tiny" vm_test_sanitized "vm_test bad_input" "vm_test export" "vm_test clone" "libvirt_test checkpoint" "vm_test group" \
    "vm_test keep" "vm_test golden" "libvirt_test domains" "vm_test verify" "vm_test filesystems" "vm_test terminal" "vm_test disk_layers" "vm_test tutorial" "vm_test encryption"
together "${long[@]}" "debian_test tutorial" "debian_test checkpoint_damage_revert" "debian_test network" "debian_test agent" "debian_test cpu_model" "debian_test boot_smp" "debian_test systemd" "libvirt_test debian"

# The end of what failed once more, where one looks first.
for name in "${failed[@]}"; do
    printf '\n=== %s, which failed, ended with\n' "$name"
    { grep -vE '^ *Start |Passed|^ *[0-9]+ [A-Z0-9_]+ ' "$outputs/$name" || true; } | tail -n 30 | cut -c -1500
done
printf '\n=== %d s\n' $((SECONDS - started))
if [ ${#failed[@]} -gt 0 ]; then
    printf '=== failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "=== everything passed"
