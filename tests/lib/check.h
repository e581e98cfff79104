/*
 * Checks for plain test programs (vmcp_plain_test), which run where Criterion cannot: under ThreadSanitizer.
 * Any thread may check; main ends with `return check_report();`.
 */
#ifndef VMCP_TESTS_CHECK_H
#define VMCP_TESTS_CHECK_H

#include <stdatomic.h>
#include <stdio.h>

/* Weak: one of each, however many files of the program include this. */
__attribute__((weak)) _Atomic unsigned long check_count;
__attribute__((weak)) _Atomic unsigned long check_failures;

static inline void check_that(int holds, const char *text, const char *file, int line)
{
	atomic_fetch_add(&check_count, 1);
	if (!holds && atomic_fetch_add(&check_failures, 1) < 20)
		fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, text);
}

#define CHECK(condition) check_that((condition) ? 1 : 0, #condition, __FILE__, __LINE__)

/* The exit status. tests/lib/run_plain.sh looks for the line. */
static inline int check_report(void)
{
	printf("checks: %lu\n", atomic_load(&check_count));
	return atomic_load(&check_failures) == 0 && atomic_load(&check_count) > 0 ? 0 : 1;
}

#endif
