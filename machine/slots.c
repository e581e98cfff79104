#include "machine/slots.h"

static void add(struct slot *out, unsigned *count, enum slot_kind kind, unsigned index)
{
	out[*count] = (struct slot){.kind = kind, .index = index, .number = *count + 1};
	++*count;
}

unsigned slots_list(const struct machine_config *config, struct slot out[SLOTS_MAX])
{
	unsigned count = 0;

	for (unsigned i = 0; i < config->disk_count; i++)
		add(out, &count, SLOT_DISK, i);
	if (config->rng)
		add(out, &count, SLOT_RNG, 0);
	if (config->balloon)
		add(out, &count, SLOT_BALLOON, 0);
	for (unsigned i = 0; i < config->net_count; i++)
		if (config->nets[i].mode != NET_NONE)
			add(out, &count, SLOT_NET, i);
	if (config->vsock_cid)
		add(out, &count, SLOT_VSOCK, 0);
	return count;
}
