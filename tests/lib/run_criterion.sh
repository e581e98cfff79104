#!/bin/sh
# run_criterion.sh BINARY SOURCE...: runs a Criterion test binary and believes it only if it ran what the sources hold.
#
# Criterion 2.4.1 by itself reports success when no test was found, when a test called exit(0), and when
# LeakSanitizer complained in a test's process. It leaks by itself now and then: leaks whose allocation is called
# from libcriterion directly are not ours. The count of tests in the sources is the lower bound:
# a parameterized test counts once for each of its parameters.
set -u

fail() {
	echo "run_criterion: $*" >&2
	exit 1
}

binary=$1
shift
expected=$(cat "$@" | grep -cE '^(Test|ParameterizedTest|Theory)\(') || true
[ "$expected" -gt 0 ] || fail "no test in $*"
if grep -nE '(^|[^_[:alnum:]])exit\(' "$@"; then
	fail "exit() in a test passes for success; in a child process use _exit()"
fi

output=$(mktemp) || fail "mktemp"
trap 'rm -f "$output"' EXIT
# exitcode=0: leaks are judged below.
LSAN_OPTIONS="${LSAN_OPTIONS:+$LSAN_OPTIONS:}exitcode=0" "$binary" --color=never >"$output" 2>&1
status=$?
cat "$output"

[ "$status" -eq 0 ] || fail "exit status $status"
if grep -E 'ERROR: (Address|Thread|Undefined)|WARNING: ThreadSanitizer|runtime error:' "$output" >/dev/null; then
	fail "a sanitizer reported the above"
fi
leaks=$(awk '/leak of [0-9]+ byte/ { leak = 1 }
	leak && / #1 / { leak = 0; if ($0 !~ /libcriterion/) n++ }
	END { print n + 0 }' "$output")
[ "$leaks" -eq 0 ] || fail "$leaks leaks reported above"
line=$(grep -E 'Synthesis: Tested:' "$output") || fail "no summary"
number() {
	echo "$line" | sed -nE "s/.*$1: *([0-9]+).*/\\1/p"
}
tested=$(number Tested)
passing=$(number Passing)
[ -n "$tested" ] && [ "$tested" -ge "$expected" ] || fail "the sources hold $expected tests, $tested ran"
[ "$passing" = "$tested" ] || fail "$tested tests ran, $passing passed"
