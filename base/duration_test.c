#include <criterion/criterion.h>
#include <stdint.h>

#include "base/duration.h"

Test(duration, texts)
{
	static const struct {
		const char *text;
		uint64_t ns;
	} good[] = {{"0", 0},	     {"50ms", 50000000},	  {"30s", 30000000000},
		    {"30", 30000000000}, {"5m", 300000000000}, {"1h", 3600000000000}, {"0ms", 0}};
	for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		uint64_t ns = 1;
		cr_expect(duration_parse(good[i].text, &ns), "%s", good[i].text);
		cr_expect_eq(ns, good[i].ns, "%s", good[i].text);
	}
	static const char *const bad[] = {"", "s", "-1s", "1d", "1 s", "1ms ", " 1s", "1.5s", "1S", "99999999999999999999s", "9999999999999999h"};
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		uint64_t ns = 7;
		cr_expect(!duration_parse(bad[i], &ns), "%s", bad[i]);
		cr_expect_eq(ns, 7);
	}
}

Test(duration, back_and_forth)
{
	static const struct {
		uint64_t ms;
		const char *text;
	} forms[] = {{0, "0ms"}, {50, "50ms"}, {1500, "1500ms"}, {30000, "30s"}, {90000, "90s"}, {120000, "2m"}, {7200000, "2h"}};
	for (size_t i = 0; i < sizeof(forms) / sizeof(forms[0]); i++) {
		char text[32];
		uint64_t ns;
		duration_format(text, forms[i].ms * 1000000);
		cr_expect_str_eq(text, forms[i].text);
		cr_expect(duration_parse(text, &ns));
		cr_expect_eq(ns, forms[i].ms * 1000000);
	}
}
