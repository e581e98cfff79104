#include <criterion/criterion.h>
#include <string.h>

#include "base/nearest.h"

static void expect(const char *wanted, const char *const *known, const char *meant)
{
	struct nearest nearest = nearest_to(wanted);

	for (; *known; known++)
		nearest_try(&nearest, *known);
	cr_expect_str_eq(nearest.name, meant, "%s: '%s' instead of '%s'", wanted, nearest.name, meant);
}

static const char *const commands[] = {"run", "ps", "checkpoint", "cancel", "revert", "log", "show", "rm", "resume", NULL};

Test(nearest, slips)
{
	expect("chekpoint", commands, "checkpoint");
	expect("chekcpoint", commands, "checkpoint");
	expect("ckeckpiont", commands, "checkpoint");
	expect("rnu", commands, "run");
	expect("sp", commands, "ps");
	expect("Show", commands, "show");
	expect("RESUM", commands, "resume");
	expect("revertt", commands, "revert");
}

Test(nearest, beginnings)
{
	expect("check", commands, "checkpoint");
	expect("can", commands, "cancel");
	expect("c", commands, "");
	/* Two begin so: the first. */
	expect("re", commands, "revert");
}

Test(nearest, none)
{
	expect("frobnicate", commands, "");
	expect("", commands, "");
	expect("x", (const char *const[]){"a", "b", NULL}, "");
	expect("ab", (const char *const[]){NULL}, "");
	expect("zzz", (const char *const[]){"", "zz", NULL}, "zz");
}

/* What is longer than a name may be is not compared, and harms nothing. */
Test(nearest, long_names)
{
	char name[4096];

	memset(name, 'a', sizeof(name));
	name[sizeof(name) - 1] = '\0';
	expect(name, commands, "");
	expect("aaaa", (const char *const[]){name, NULL}, "");
	name[NEAREST_BYTES - 1] = '\0';
	expect(name, (const char *const[]){name, NULL}, name);
	name[NEAREST_BYTES - 1] = 'a';
	name[NEAREST_BYTES] = '\0';
	expect(name, (const char *const[]){name, NULL}, "");
}
