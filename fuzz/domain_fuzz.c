/* Any bytes as domain XML: what it becomes is a guest.cfg that reads as such. */
#include <stdlib.h>

#include "base/log.h"
#include "fuzz/fuzz.h"
#include "machine/domain.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct buf text = BUF_INIT;
	struct err err = ERR_INIT;

	log_set_level(LOG_LEVEL_ERROR);
	int rc = domain_to_text("domain", (const char *)data, size, "", &text, &err);
	if (rc && (rc != -err.number || !err.message[0]))
		abort();
	buf_free(&text);
	return 0;
}
