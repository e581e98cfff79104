/* Disks of guest.cfg that are volumes of libvirt's storage pools: path = POOL:VOLUME. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "machine/config_internal.h"
#include "machine/libvirt.h"

bool config_note_volume(struct config_reading *r, const char *key, const char *value)
{
	const char *colon = strchr(value, ':');
	unsigned index = r->config->disk_count - 1;
	struct stat st;

	/* A text of vmcp's own has absolute paths only. */
	if (!r->look_for_files || !colon || colon == value || !colon[1] || strchr(value, '/'))
		return false;
	CLEANUP_FREE char *file = xasprintf("%s/%s", r->folder, value);
	if (stat(file, &st) == 0)
		return false;
	/* Both keys in one section: let the check of disks see that. */
	if (r->volumes[index])
		*(r->volume_is_base[index] ? &r->config->disks[index].base : &r->config->disks[index].path) = r->volumes[index];
	r->volumes[index] = xstrdup(value);
	r->volume_is_base[index] = !strcmp(key, "base");
	return true;
}

/* The innermost says what libvirt says; before it stands which key asked for it. */
static int prefix(struct config_reading *r, unsigned index)
{
	const char *key = r->volume_is_base[index] ? "base" : "path", *name = r->config->disks[index].name;

	if (r->made)
		return err_prefix(r->err, "%s: disk %s", r->what, name);
	return err_prefix(r->err, "%s:%u: %s: a volume, as there is no such file", r->what, r->disk_lines[index], key);
}

static int find_volume(struct config_reading *r, struct libvirt *libvirt, unsigned index)
{
	struct config_disk *disk = &r->config->disks[index];
	char **image = r->volume_is_base[index] ? &disk->base : &disk->path, *colon = strchr(r->volumes[index], ':');
	const char *key = r->volume_is_base[index] ? "base" : "path";

	r->line = r->disk_lines[index];
	*colon = '\0';
	int rc = libvirt_volume_path(libvirt, r->volumes[index], colon + 1, image, r->err);
	if (rc)
		return prefix(r, index);
	rc = config_place_image(r, key, image);
	return rc ? err_hint(r->err, "libvirt knows a volume whose file is gone: `virsh pool-refresh`") : 0;
}

/* When all sections are read: the key that names the libvirt may stand behind the disks. */
int config_find_volumes(struct config_reading *r)
{
	struct libvirt *libvirt = NULL;
	int rc = 0;

	for (unsigned i = 0; !rc && i < r->config->disk_count; i++) {
		if (!r->volumes[i])
			continue;
		if (!libvirt) {
			rc = libvirt_open(r->config->libvirt, &libvirt, r->err);
			if (rc)
				prefix(r, i);
		}
		if (!rc)
			rc = find_volume(r, libvirt, i);
	}
	libvirt_close(libvirt);
	return rc;
}

void config_forget_volumes(struct config_reading *r)
{
	for (unsigned i = 0; i < CONFIG_MAX_DISKS; i++)
		free(r->volumes[i]);
	memset(r->volumes, 0, sizeof(r->volumes));
}
