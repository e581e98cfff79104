#include "base/duration.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"

#define MS_NS 1000000ull

static const struct {
	const char *name;
	uint64_t ns;
} units[] = {{"h", 3600000 * MS_NS}, {"m", 60000 * MS_NS}, {"s", 1000 * MS_NS}, {"ms", MS_NS}};

bool duration_parse(const char *text, uint64_t *ns)
{
	char *end;

	errno = 0;
	unsigned long long number = strtoull(text, &end, 10);
	if (!isdigit((unsigned char)text[0]) || errno)
		return false;
	for (size_t i = 0; i < ARRAY_LENGTH(units); i++) {
		uint64_t product;

		if (strcmp(*end ? end : "s", units[i].name))
			continue;
		if (mul_overflows(number, units[i].ns, &product))
			return false;
		*ns = product;
		return true;
	}
	return false;
}

void duration_format(char out[32], uint64_t ns)
{
	size_t i = 0;

	while (i < ARRAY_LENGTH(units) - 1 && (ns % units[i].ns || ns == 0))
		i++;
	snprintf(out, 32, "%" PRIu64 "%s", ns / units[i].ns, units[i].name);
}
