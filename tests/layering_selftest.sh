#!/bin/sh
# layering_selftest.sh SCRIPT: layering_test.sh fails on each kind of wrong include, and where there is nothing to check.
set -u
script=$1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

expect() {
	wanted=$1
	what=$2
	if "$script" "$work/tree" >"$work/output" 2>&1; then got=pass; else got=fail; fi
	if [ "$got" != "$wanted" ]; then
		echo "layering selftest: $what: $got, expected $wanted" >&2
		cat "$work/output" >&2
		exit 1
	fi
	rm -rf "$work/tree"
}
# put FILE LINE: a tree with one good file and this one.
put() {
	mkdir -p "$work/tree/base" "$work/tree/$(dirname "$1")"
	echo '#include "base/b.h"' >"$work/tree/base/a.c"
	echo "$2" >"$work/tree/$1"
}

mkdir -p "$work/tree/base"
expect fail "an empty tree"
put vmm/a.c '#include "base/b.h"'
expect pass "vmm includes base"
put base/z.c '#include "vmm/vm.h"'
expect fail "base includes vmm"
put checkpoint/store/z.c '  #  include "devices/pci.h"'
expect fail "checkpoint includes devices"
put devices/z.c '#include "cowdisk/overlay.h"'
expect fail "devices includes the overlay"
put machine/z.c '#include "devices/virtio_internal.h"'
expect fail "an internal header leaves its folder"
put base/z.c '#include "b.h"'
expect fail "a path that is not from the root"
put devices/z.c '#include <linux/kvm.h>'
expect fail "KVM outside vmm"
echo "layering selftest: 8 cases"
