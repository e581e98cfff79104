/* Any bytes as what a host says to the agent in a guest, and as the guest's /etc/hosts. */
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "fuzz/fuzz.h"
#include "guest/agent.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	CLEANUP_FREE char *text = xcalloc(1, size + 1);
	struct agent_identity identity = {0};
	struct err err = ERR_INIT;
	char *rest = text, *line;
	int rc = 0;

	memcpy(text, data, size);
	CLEANUP_FREE char *hosts = agent_rename_in_hosts(text, "web", "another-name");
	/* It is as long as the names make it, and no word is lost. */
	if (strlen(hosts) < strlen(text))
		abort();
	while (rc == 0 && (line = strsep(&rest, "\n")) != NULL)
		rc = agent_take_line(&identity, line, &err);
	if (rc == 1 && (!identity.uuid[0] || !identity.name[0] || identity.seed_bytes > AGENT_SEED_BYTES))
		abort();
	return 0;
}
