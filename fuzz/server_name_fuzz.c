/* Any bytes as the first ones of a client of a multiplexer. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "control/server_name.h"
#include "fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char name[SERVER_NAME_BYTES], before[SERVER_NAME_BYTES];
	int rc = server_name_find(data, size, name);
	if (rc != 1 && rc != 0 && rc != -ENOENT && rc != -EPROTO)
		abort();
	if (rc == 1 && (strlen(name) == 0 || strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789._-") != strlen(name)))
		abort();
	/* What was found in the beginning is found in all of it: bytes come in any portions. */
	size_t part = size < SERVER_NAME_LOOK ? size / 2 : 0;
	int first = server_name_find(data, part, before);
	if (first != 0 && (first != rc || (rc == 1 && strcmp(before, name))))
		abort();
	return 0;
}
