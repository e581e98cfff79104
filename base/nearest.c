#include "base/nearest.h"

#include <ctype.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#define BEGINNING_BYTES 2u

static bool same(char a, char b) { return tolower((unsigned char)a) == tolower((unsigned char)b); }

static unsigned least(unsigned a, unsigned b) { return a < b ? a : b; }

/* Insertions, deletions, exchanges, and swaps of neighbours (optimal string alignment). Both shorter than NEAREST_BYTES. */
static unsigned distance(const char *a, const char *b)
{
	unsigned rows[3][NEAREST_BYTES + 1] = {0};
	size_t m = strlen(a), n = strlen(b);

	for (size_t j = 0; j <= n; j++)
		rows[0][j] = (unsigned)j;
	for (size_t i = 1; i <= m; i++) {
		unsigned *row = rows[i % 3];
		const unsigned *above = rows[(i + 2) % 3], *before = rows[(i + 1) % 3];

		row[0] = (unsigned)i;
		for (size_t j = 1; j <= n; j++) {
			row[j] = least(above[j - 1] + !same(a[i - 1], b[j - 1]), least(above[j], row[j - 1]) + 1);
			if (i > 1 && j > 1 && same(a[i - 1], b[j - 2]) && same(a[i - 2], b[j - 1]))
				row[j] = least(row[j], before[j - 2] + 1);
		}
	}
	return rows[m % 3][n];
}

struct nearest nearest_to(const char *wanted) { return (struct nearest){.wanted = wanted, .distance = UINT_MAX}; }

void nearest_try(struct nearest *nearest, const char *known)
{
	size_t length = strlen(known), wanted = strlen(nearest->wanted);
	unsigned d;

	if (length >= NEAREST_BYTES || wanted >= NEAREST_BYTES)
		return;
	d = distance(nearest->wanted, known);
	if (wanted >= BEGINNING_BYTES && wanted < length && !strncasecmp(known, nearest->wanted, wanted))
		d = 1;
	if (d >= nearest->distance || d > (length + 1) / 3)
		return;
	nearest->distance = d;
	snprintf(nearest->name, sizeof(nearest->name), "%s", known);
}
