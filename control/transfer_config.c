#include "control/transfer_config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machine/config.h"

static int list_disks(const char *what, const char *text, struct transfer_disk *disks, uint32_t *count, struct err *err)
{
	struct machine_config config;
	int rc = config_read_text(what, text, &config, err);

	*count = 0;
	if (rc)
		return rc;
	for (unsigned i = 0; i < config.disk_count && i < TRANSFER_MAX_DISKS; i++) {
		struct transfer_disk *disk = &disks[(*count)++];

		*disk = (struct transfer_disk){.readonly = config.disks[i].readonly};
		snprintf(disk->name, sizeof(disk->name), "%s", config.disks[i].name);
		disk->path = config.disks[i].path; /* NULL for one with a base: its own layer is where the store says */
		config.disks[i].path = NULL;
	}
	config_free(&config);
	return 0;
}

static int place_disks(struct machine_config *config, const struct transfer_place *place, struct err *err)
{
	for (unsigned i = 0; i < config->disk_count; i++) {
		struct config_disk *disk = &config->disks[i];
		uint32_t k = 0;

		while (k < place->disk_count && strcmp(place->disks[k].name, disk->name) != 0)
			k++;
		if (k == place->disk_count)
			return err_set(err, ERR_DAMAGED, EINVAL, "disk %s: the checkpoint does not hold it", disk->name);
		free(disk->path);
		free(disk->base);
		disk->base = NULL;
		disk->path = xstrdup(place->disks[k].path);
	}
	return 0;
}

/* What the guest would boot from if it resets is a file of the host: only one that this host's own user has named will do. */
static void place_kernel(struct machine_config *config, struct machine_config *base)
{
	free(config->kernel);
	free(config->initrd);
	config->kernel = base->kernel;
	config->initrd = base->initrd;
	base->kernel = base->initrd = NULL;
}

/* The same for what a card is bound to: as a card of that name was here, else the network inside the VM's own process, which binds nothing. What the
 * guest sees of the card is the same in all modes. */
static void place_cards(struct machine_config *config, const struct machine_config *base)
{
	for (unsigned i = 0; i < config->net_count; i++) {
		struct config_net *card = &config->nets[i];
		unsigned k = 0;

		while (k < base->net_count && strcmp(base->nets[k].name, card->name) != 0)
			k++;
		const struct config_net *known = k < base->net_count ? &base->nets[k] : NULL;
		if (card->mode != NET_NONE)
			card->mode = known && known->mode != NET_NONE ? known->mode : NET_USER;
		snprintf(card->tap, sizeof(card->tap), "%s", known ? known->tap : "");
		snprintf(card->bridge, sizeof(card->bridge), "%s", known ? known->bridge : "");
		snprintf(card->network, sizeof(card->network), "%s", known ? known->network : "");
		card->forward_count = known ? known->forward_count : 0;
		if (known)
			memcpy(card->forwards, known->forwards, sizeof(card->forwards));
	}
}

static int place_bindings(struct machine_config *config, const char *base_text, struct err *err)
{
	struct machine_config base = {0};
	int rc = base_text ? config_read_text("configuration", base_text, &base, err) : 0;

	if (rc)
		return rc;
	place_kernel(config, &base);
	place_cards(config, &base);
	free(config->libvirt);
	config->libvirt = xstrdup(base.libvirt ? base.libvirt : "");
	config_free(&base);
	return 0;
}

static int place(const char *what, const char *text, const struct transfer_place *place, struct buf *out, struct err *err)
{
	struct machine_config config;
	int rc = config_read_text(what, text, &config, err);

	if (rc)
		return rc;
	snprintf(config.name, sizeof(config.name), "%s", place->vm);
	if (config.memory_bytes != place->memory_bytes || config.cpus != place->cpus)
		rc = err_set(err, ERR_DAMAGED, EINVAL, "%s: it is of another machine than the manifest", what);
	if (!rc)
		rc = place_disks(&config, place, err);
	if (!rc)
		rc = place_bindings(&config, place->base_config, err);
	if (!rc)
		rc = config_to_text(&config, out, err);
	if (!rc)
		rc = buf_append(out, NULL, 1, err);
	config_free(&config);
	return rc;
}

const struct transfer_config control_transfer_config = {.list_disks = list_disks, .place = place};
