#include <criterion/criterion.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fault.h"

static int arm(const char *text, struct err *err)
{
	setenv("VMCP_FAULT", text, 1);
	return fault_init(err);
}

Test(fault, without_the_variable_nothing_happens)
{
	unsetenv("VMCP_FAULT");
	cr_assert_eq(fault_init(NULL), 0);
	cr_assert_eq(fault_check(FAULT_FILE_TEMP_WRITTEN, NULL), 0);
}

Test(fault, errors_name_the_point)
{
	struct err err = ERR_INIT;

	cr_assert_eq(arm("2:enospc", NULL), 0);
	cr_assert_eq(fault_check(FAULT_FILE_TEMP_WRITTEN, &err), 0);
	cr_assert_eq(fault_check(FAULT_FILE_BEFORE_RENAME, &err), -ENOSPC);
	cr_assert_eq(err.number, ENOSPC);
	cr_assert_not_null(strstr(err.message, "FILE_BEFORE_RENAME"));
}

Test(fault, acts_at_the_counted_passage_only)
{
	cr_assert_eq(arm("1:3:eio", NULL), 0);
	for (int passage = 1; passage <= 6; passage++)
		cr_assert_eq(fault_check(FAULT_FILE_TEMP_WRITTEN, NULL), passage == 3 ? -EIO : 0, "passage %d",
			     passage);
}

Test(fault, kill_kills)
{
	static const char *const texts[] = {"3", "3:1", "3:kill", "3:1:kill"};

	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
		pid_t pid = fork();
		if (pid == 0) {
			if (arm(texts[i], NULL) == 0)
				fault_check(FAULT_FILE_AFTER_RENAME, NULL);
			_exit(0);
		}
		int status;
		cr_assert_eq(waitpid(pid, &status, 0), pid);
		cr_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "VMCP_FAULT=%s", texts[i]);
	}
}

Test(fault, sleep_sleeps)
{
	cr_assert_eq(arm("1:sleep=30", NULL), 0);
	uint64_t before = clock_now_ns();
	cr_assert_eq(fault_check(FAULT_FILE_TEMP_WRITTEN, NULL), 0);
	cr_assert_geq(clock_now_ns() - before, 30000000u);
}

Test(fault, malformed_plans_are_refused_and_disarm)
{
	static const char *const texts[] = {
		"",
		"x",
		"0",
		"99999",
		"1:",
		"1:0",
		"1:0:eio",
		"1:eio:2",
		"1:burn",
		"1:2:eio ",
		"1:sleep",
		"1:sleep=",
		"1:sleep=1x",
		"-1",
		"1 ",
		"1::kill",
		"1:5eio",
		"99999999999999999999",
		"1:99999999999999999999",
	};

	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
		struct err err = ERR_INIT;
		cr_assert_eq(arm(texts[i], &err), -EINVAL, "VMCP_FAULT=%s", texts[i]);
		cr_assert_eq(err.class, ERR_USAGE);
		cr_assert_eq(fault_check(FAULT_FILE_TEMP_WRITTEN, NULL), 0);
	}
}

Test(fault, numbers_and_names_are_unique)
{
	unsigned number, other;
	const char *name, *name2, *meaning;
	unsigned i;

	for (i = 0; (name = fault_name(i, &number, &meaning)) != NULL; i++) {
		cr_assert_gt(number, 0);
		cr_assert_gt(strlen(meaning), 10);
		for (unsigned j = 0; j < i; j++) {
			name2 = fault_name(j, &other, NULL);
			cr_assert_neq(number, other, "%s and %s", name, name2);
			cr_assert_str_neq(name, name2);
		}
	}
	cr_assert_geq(i, 3);
}
