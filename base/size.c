#include "base/size.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>

#include "base/bytes.h"

bool size_parse(const char *text, uint64_t *bytes)
{
	char *end;
	uint64_t factor = 1, size;

	errno = 0;
	unsigned long long number = strtoull(text, &end, 10);
	if (!isdigit((unsigned char)text[0]) || errno)
		return false;
	switch (toupper((unsigned char)*end)) {
	case 'T':
		factor <<= 10;
		/* fall through */
	case 'G':
		factor <<= 10;
		/* fall through */
	case 'M':
		factor <<= 10;
		/* fall through */
	case 'K':
		factor <<= 10;
		end++;
		break;
	}
	if (*end || mul_overflows(number, factor, &size))
		return false;
	*bytes = size;
	return true;
}
