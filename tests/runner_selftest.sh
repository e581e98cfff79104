#!/bin/sh
# runner_selftest.sh FOLDER: the runners in FOLDER (tests/lib) fail on every kind of false success that they are there for.
set -u
lib=$1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cases=0

# expect pass|fail WHAT RUNNER STATUS: a program that prints $work/text and ends with STATUS.
expect() {
	printf '#!/bin/sh\ncat "%s"\nexit %s\n' "$work/text" "$4" >"$work/program"
	chmod +x "$work/program"
	if "$lib/$3" "$work/program" "$work/source.c" >"$work/output" 2>&1; then got=pass; else got=fail; fi
	cases=$((cases + 1))
	if [ "$got" != "$1" ]; then
		echo "runner selftest: $2: $got, expected $1" >&2
		cat "$work/output" >&2
		exit 1
	fi
}
summary() {
	echo "[====] Synthesis: Tested: $1 | Passing: $2 | Failing: $3 | Crashing: 0 " >"$work/text"
}

printf 'Test(a, b)\n{\n\t_exit(0);\n}\nTest(a, c)\n{\n}\n' >"$work/source.c"
summary 2 2 0
expect pass "two of two" run_criterion.sh 0
expect fail "exit status" run_criterion.sh 1
summary 1 1 0
expect fail "a test that vanished" run_criterion.sh 0
summary 0 0 0
expect fail "no test" run_criterion.sh 0
summary 2 1 1
expect fail "a failing test" run_criterion.sh 0
: >"$work/text"
expect fail "no summary" run_criterion.sh 0
summary 2 2 0
echo "x.c:1:2: runtime error: signed integer overflow" >>"$work/text"
expect fail "UBSan" run_criterion.sh 0
summary 2 2 0
echo "==1==ERROR: AddressSanitizer: heap-use-after-free" >>"$work/text"
expect fail "ASan" run_criterion.sh 0
summary 2 2 0
printf 'Direct leak of 8 byte(s) in 1 object(s)\n    #0 0x1 in malloc\n    #1 0x2 in a_b_impl x.c:3\n' >>"$work/text"
expect fail "a leak of ours" run_criterion.sh 0
summary 2 2 0
printf 'Direct leak of 8 byte(s) in 1 object(s)\n    #0 0x1 in calloc\n    #1 0x2  (/lib/libcriterion.so.3+0x1)\n' >>"$work/text"
expect pass "a leak of Criterion" run_criterion.sh 0
summary 2 2 0
printf 'Test(a, b)\n{\n\texit(0);\n}\nTest(a, c)\n{\n}\n' >"$work/source.c"
expect fail "exit(0) in a test" run_criterion.sh 0
printf 'int main(void)\n' >"$work/source.c"
expect fail "a source without tests" run_criterion.sh 0

echo "checks: 3" >"$work/text"
expect pass "three checks" run_plain.sh 0
expect fail "exit status of a plain test" run_plain.sh 1
echo "checks: 0" >"$work/text"
expect fail "no check" run_plain.sh 0
: >"$work/text"
expect fail "no report" run_plain.sh 0
printf 'WARNING: ThreadSanitizer: data race\nchecks: 3\n' >"$work/text"
expect fail "TSan" run_plain.sh 0
echo "runner selftest: $cases cases"
