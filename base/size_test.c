#include "base/size.h"

#include <criterion/criterion.h>

Test(size, what_people_write)
{
	static const struct {
		const char *text;
		uint64_t bytes;
	} good[] = {{"0", 0},		{"512", 512},	      {"4K", 4096}, {"512M", 512ull << 20}, {"2g", 2ull << 30},
		    {"1T", 1ull << 40}, {"18446744073709551615", UINT64_MAX}};
	for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		uint64_t bytes = 7;
		cr_expect(size_parse(good[i].text, &bytes), "%s", good[i].text);
		cr_expect_eq(bytes, good[i].bytes, "%s", good[i].text);
	}
}

Test(size, what_is_none)
{
	static const char *const bad[] = {"", "M", "-1", "+1", " 1", "1.5G", "1MB", "1 M", "1P", "0x10", "18446744073709551616", "16777216T"};
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		uint64_t bytes = 7;
		cr_expect_not(size_parse(bad[i], &bytes), "%s", bad[i]);
		cr_expect_eq(bytes, 7);
	}
}
