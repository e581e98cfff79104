#!/bin/bash
# run.sh - build vmcp, measure it on this host's KVM side by side with QEMU, and write a report
#
#   bench/run.sh [OPTIONS OF bench/report.py]
#
#   bench/run.sh --quick                        some minutes
#   bench/run.sh --parts checkpoint,peers       parts of it
#   bench/run.sh --compare /path/to/other/vmcp  two builds, in turns
#
# docs/benchmarking.md explains the figures. VMCP_TMP: a folder on the filesystem to be measured (default: /var/tmp).
# VMCP_BIN and VMCP_TINY, if both are set, are measured as they are; else a release build is made.

set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in
    *' --help '* | *' -h '*) sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; exec python3 bench/report.py --help ;;
    *' --render '*) exec python3 bench/report.py "$@" ;;
esac
if [ -z "${VMCP_BIN:-}" ] || [ -z "${VMCP_TINY:-}" ]; then
    scripts/setup.sh build bench
    mkdir -p build
    { cmake --preset release && cmake --build --preset release; } >build/bench.log 2>&1 || { cat build/bench.log; exit 1; }
    export VMCP_BIN=$PWD/build/release/cli/vmcp VMCP_TINY=$PWD/build/release/examples/tiny/tiny.elf
fi
[ -w /dev/kvm ] || { echo "run.sh: no usable /dev/kvm on this host" >&2; exit 1; }
exec python3 bench/report.py "$@"
