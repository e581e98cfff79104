#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

#include "base/err.h"

Test(err, set_gives_class_number_message)
{
	struct err err = ERR_INIT;

	cr_assert_eq(err_set(&err, ERR_DAMAGED, EINVAL, "disk %s: %d", "a", 7), -EINVAL);
	cr_assert_eq(err.number, EINVAL);
	cr_assert_eq(err.class, ERR_DAMAGED);
	cr_assert_str_eq(err.message, "disk a: 7");
	cr_assert_str_eq(err.hint, "");
}

Test(err, set_forgets_the_old_hint)
{
	struct err err = ERR_INIT;

	err_set(&err, ERR_FAILED, EIO, "first");
	err_hint(&err, "old");
	err_set(&err, ERR_FAILED, EIO, "second");
	cr_assert_str_eq(err.hint, "");
}

Test(err, sys_takes_both_signs_and_adds_the_text)
{
	struct err err = ERR_INIT;

	cr_assert_eq(err_sys(&err, ENOENT, "kernel %s", "k"), -ENOENT);
	cr_assert_str_eq(err.message, "kernel k: No such file or directory");
	cr_assert_eq(err.class, ERR_NOT_FOUND);
	cr_assert_eq(err_sys(&err, -EBUSY, "disk"), -EBUSY);
	cr_assert_eq(err.number, EBUSY);
	cr_assert_eq(err.class, ERR_STATE);
	cr_assert_eq(err_sys(&err, EACCES, "disk"), -EACCES);
	cr_assert_eq(err.class, ERR_FAILED);
}

Test(err, a_number_that_is_none_is_still_a_failure)
{
	struct err err = ERR_INIT;

	cr_assert_eq(err_set(&err, ERR_FAILED, 0, "x"), -EIO);
	cr_assert_eq(err.number, EIO);
	cr_assert_eq(err_sys(&err, 0, "x"), -EIO);
	cr_assert_eq(err_set(NULL, ERR_FAILED, -5, "x"), -EIO);
}

Test(err, prefixes_stack_outermost_first)
{
	struct err err = ERR_INIT;

	err_set(&err, ERR_DAMAGED, EINVAL, "cluster 3 points outside");
	cr_assert_eq(err_prefix(&err, "disk %s", "root"), -EINVAL);
	cr_assert_eq(err_prefix(&err, "vm %s", "web"), -EINVAL);
	cr_assert_str_eq(err.message, "vm web: disk root: cluster 3 points outside");
	cr_assert_eq(err.class, ERR_DAMAGED);
}

Test(err, arguments_may_be_the_error_itself)
{
	struct err err = ERR_INIT;

	err_set(&err, ERR_FAILED, EIO, "inner");
	err_set(&err, ERR_STATE, EBUSY, "outer (%s)", err.message);
	cr_assert_str_eq(err.message, "outer (inner)");
	err_prefix(&err, "%s", err.message);
	cr_assert_str_eq(err.message, "outer (inner): outer (inner)");
	err_sys(&err, EIO, "%s", err.message);
	cr_assert_str_eq(err.message, "outer (inner): outer (inner): Input/output error");
}

Test(err, the_first_hint_stays)
{
	struct err err = ERR_INIT;

	err_set(&err, ERR_HOST, ENODEV, "no KVM");
	cr_assert_eq(err_hint(&err, "load %s", "kvm_amd"), -ENODEV);
	cr_assert_eq(err_hint(&err, "ask someone"), -ENODEV);
	cr_assert_str_eq(err.hint, "load kvm_amd");
}

Test(err, null_is_accepted_everywhere)
{
	cr_assert_eq(err_set(NULL, ERR_FAILED, EPERM, "x"), -EPERM);
	cr_assert_eq(err_sys(NULL, EPERM, "x"), -EPERM);
	cr_assert_eq(err_prefix(NULL, "x"), -EIO);
	cr_assert_eq(err_hint(NULL, "x"), -EIO);
}

Test(err, long_texts_are_cut_and_end)
{
	struct err err = ERR_INIT;
	char longer[2000];

	memset(longer, 'a', sizeof(longer) - 1);
	longer[sizeof(longer) - 1] = '\0';
	err_set(&err, ERR_FAILED, EIO, "%s", longer);
	cr_assert_eq(strlen(err.message), sizeof(err.message) - 1);
	err_prefix(&err, "disk");
	cr_assert_eq(strlen(err.message), sizeof(err.message) - 1);
	cr_assert_eq(strncmp(err.message, "disk: aaa", 9), 0);
	err_prefix(&err, "%s", longer);
	cr_assert_eq(strlen(err.message), sizeof(err.message) - 1);
	err_hint(&err, "%s", longer);
	cr_assert_eq(strlen(err.hint), sizeof(err.hint) - 1);
}

Test(err, control_characters_do_not_reach_the_line)
{
	struct err err = ERR_INIT;

	err_set(&err, ERR_FAILED, EIO, "a\nb\033[2Jc");
	cr_assert_str_eq(err.message, "a?b?[2Jc");
}

Test(err, a_cut_leaves_whole_utf8)
{
	struct err err = ERR_INIT;
	char text[600];

	/* For each position of the cut within a 3-byte character. */
	for (size_t lead = 0; lead < 3; lead++) {
		memset(text, 'x', lead);
		for (size_t i = lead; i + 3 < sizeof(text); i += 3)
			memcpy(text + i, "\xe2\x82\xac", 4);
		err_set(&err, ERR_FAILED, EIO, "%s", text);
		size_t length = strlen(err.message);
		cr_assert_gt(length, sizeof(err.message) - 4);
		cr_assert_eq((length - lead) % 3, 0, "lead %zu: %zu bytes", lead, length);
	}
}

Test(err, class_names_go_both_ways)
{
	for (int class = ERR_FAILED; class <= ERR_HOST; class ++)
		cr_assert_eq(err_class_from_name(err_class_name((enum err_class) class)), (enum err_class) class);
	cr_assert_str_eq(err_class_name(ERR_NOT_FOUND), "not-found");
	cr_assert_eq(err_class_from_name("nonsense"), ERR_FAILED);
	cr_assert_eq(err_class_from_name(NULL), ERR_FAILED);
}
