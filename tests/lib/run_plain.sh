#!/bin/sh
# run_plain.sh BINARY SOURCE...: runs a test program that uses tests/lib/check.h; fails where it checked nothing.
set -u

fail() {
	echo "run_plain: $*" >&2
	exit 1
}

output=$(mktemp) || fail "mktemp"
trap 'rm -f "$output"' EXIT
"$(dirname "$0")/fixed_addresses.sh" "$1" >"$output" 2>&1
status=$?
cat "$output"

[ "$status" -eq 0 ] || fail "exit status $status"
if grep -E 'ERROR: (Address|Leak|Thread|Undefined)|WARNING: ThreadSanitizer|runtime error:' "$output" >/dev/null; then
	fail "a sanitizer reported the above"
fi
grep -qE '^checks: [1-9][0-9]*$' "$output" || fail "the program did not say how many checks it made"
