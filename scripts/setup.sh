#!/bin/bash
# setup.sh - install from Debian's packages what building, testing and showing vmcp need
#
#   scripts/setup.sh [--dry-run] [build] [test] [demo] [bench]
#
#   build   compiler, build tools and libraries
#   test    build, and what the test suites run: Criterion, QEMU, the nested machine
#   demo    what the Debian guest (examples/debian-guest) and the nested machine (tests/with-kvm) need
#   bench   what the benchmarks (bench/run.sh) run beside vmcp: QEMU
#
# Without a group: the first three, which hold all that bench needs. Only missing packages are installed; where nothing is missing it
# neither needs root nor touches the network. --dry-run says what is missing and installs nothing.
#
# Exit status: 0 all there; 1 something is missing and could not be installed; 2 wrong usage.

set -euo pipefail

readonly BUILD=(gcc libc6-dev make cmake ninja-build pkg-config
    libcbor-dev libjansson-dev libinih-dev liburing-dev libsqlite3-dev libxxhash-dev libzstd-dev
    libslirp-dev libssl-dev zlib1g-dev libext2fs-dev libxml2-dev libvirt-dev)
# What tests/with-kvm uses to make and run its machine.
readonly NESTED=(qemu-system-x86 busybox-static cpio e2fsprogs xz-utils)
# What examples/debian-guest/build.sh uses.
readonly GUEST=(mmdebstrap debian-archive-keyring e2fsprogs qemu-utils)
readonly TEST=("${BUILD[@]}" "${NESTED[@]}" "${GUEST[@]}" libcriterion-dev libqcow-dev acpica-tools xfsprogs btrfs-progs gdb iproute2 zstd python3
    libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt-doc libxml2-utils
    groff-base zsh fish openssh-client)
readonly DEMO=("${NESTED[@]}" "${GUEST[@]}" python3)
readonly BENCH=(qemu-system-x86 qemu-utils python3 zstd)

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$1" >&2; [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2; exit 1; }

dry_run='' wanted=() groups=()
for arg in "$@"; do
    case $arg in
        build | test | demo | bench) groups+=("$arg") ;;
        --dry-run) dry_run=1 ;;
        --help | -h) sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *)
            printf "setup: unknown argument '%s'\nhint: the groups are build, test, demo and bench\n" "$arg" >&2
            exit 2
            ;;
    esac
done
[ ${#groups[@]} -gt 0 ] || groups=(build test demo)
lists=needless
for group in "${groups[@]}"; do
    case $group in
        build) wanted+=("${BUILD[@]}") ;;
        # The guest and the nested machine get kernels and packages through apt later on, which must know them by then.
        test) wanted+=("${TEST[@]}") lists=needed ;;
        demo) wanted+=("${DEMO[@]}") lists=needed ;;
        bench) wanted+=("${BENCH[@]}") ;;
    esac
done

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    die "this system has no apt: vmcp is built and tested on Debian 12" \
        "install the equivalents of: ${wanted[*]}"
fi

# dpkg-query fails where it never heard of a package; such a package is just missing.
installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${wanted[@]}" 2>/dev/null |
    sed -n 's/^installed //p') || true
mapfile -t missing < <(comm -23 <(printf '%s\n' "${wanted[@]}" | sort -u) <(sort -u <<<"$installed"))
if [ $lists = needed ] && compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then
    lists=present
fi

if [ ${#missing[@]} -eq 0 ] && [ $lists != needed ]; then
    say "all packages for ${groups[*]} are installed"
    exit 0
fi
[ ${#missing[@]} -eq 0 ] || say "missing packages: ${missing[*]}"
[ $lists != needed ] || say "apt has no package lists"
[ -z "$dry_run" ] || exit 1
[ "$(id -u)" -eq 0 ] || die "installing packages needs root" "run: sudo $0 ${groups[*]}"

# Another apt may be at work (unattended upgrades): wait for it instead of failing.
apt=(apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
export DEBIAN_FRONTEND=noninteractive
say "fetching the package lists"
# A broken third-party source is no reason to stop: Debian's own may have been fetched well.
"${apt[@]}" update || say "some package lists could not be fetched; trying with the others"
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null ||
        die "apt-get could not install the packages" "see its messages above"
fi
say "done"
