#include <criterion/criterion.h>
#include <math.h>
#include <stddef.h>

#include "base/library.h"

#define FUNCTIONS(X) X(floor) X(ceil)
struct functions {
	FUNCTIONS(LIBRARY_FIELD)
};
static const struct library libm = {"libm.so.6", LIBRARY_NAMES(FUNCTIONS)};
static const struct library gone = {"libvmcp-is-nowhere.so.1", LIBRARY_NAMES(FUNCTIONS)};
static const struct library old = {"libm.so.6", (const char *const[]){"floor", "vmcp_is_nowhere", NULL}};

Test(library, functions_of_one_that_is_there)
{
	struct functions lib = {0};

	cr_assert_null(library_load(&libm, &lib));
	cr_expect_eq(lib.floor(1.5), 1.0);
	cr_expect_eq(lib.ceil(1.5), 2.0);
}

Test(library, what_is_loaded_stays)
{
	struct functions lib = {.floor = floor, .ceil = ceil};

	cr_assert_null(library_load(&gone, &lib));
	cr_expect_eq(lib.floor, floor);
}

Test(library, missing_library_and_missing_function)
{
	struct functions lib = {0};

	cr_expect_str_eq(library_load(&gone, &lib), "is not installed");
	cr_expect_str_eq(library_load(&old, &lib), "is too old");
	cr_expect_null(lib.floor);
	cr_expect_null(lib.ceil);
}
