#!/bin/sh
# headers_test.sh CC ROOT: every header compiles alone, twice included.
set -u

cc=$1
cd "$2" || exit 1
checked=0
failed=0
for header in $(find base vmm cowdisk net devices checkpoint machine guest control cli libvmcp tests/lib \
	-name '*.h' 2>/dev/null | sort); do
	checked=$((checked + 1))
	# -Wno-unused-*: a header's static functions and macros have no user here.
	if ! printf '#include "%s"\n#include "%s"\n' "$header" "$header" |
		"$cc" -std=gnu11 -D_GNU_SOURCE -I. -Wall -Wextra -Wstrict-prototypes -Wno-unused-function -Werror \
			-fsyntax-only -x c -; then
		echo "headers: $header does not compile alone" >&2
		failed=$((failed + 1))
	fi
done
[ "$checked" -gt 0 ] || {
	echo "headers: found no header" >&2
	exit 1
}
echo "headers: $checked checked, $failed failed"
[ "$failed" -eq 0 ]
