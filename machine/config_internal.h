/* What the reader of guest.cfg (config.c) and its keys (config_keys.c) share. */
#ifndef VMCP_MACHINE_CONFIG_INTERNAL_H
#define VMCP_MACHINE_CONFIG_INTERNAL_H

#include "machine/config.h"

#define CONFIG_MAX_SECTIONS  64
#define CONFIG_SECTION_BYTES (CONFIG_NAME_BYTES + 16)

enum config_section {
	CONFIG_SECTION_NONE,
	CONFIG_SECTION_VM,
	CONFIG_SECTION_DISK,
	CONFIG_SECTION_NET,
	CONFIG_SECTION_CHECKPOINT,
};

struct config_reading {
	struct machine_config *config;
	const char *what;   /* the file's name, for errors */
	const char *folder; /* relative paths are relative to it; NULL: paths must be absolute */
	bool look_for_files;
	bool made; /* the text was made of a domain: its lines are nobody's */
	const char *text; /* what is not yet read of the text */
	bool within_line; /* the part of `text` before it did not end a line */
	unsigned line;	  /* of the line that is being handled */
	struct err *err;  /* never NULL; set as soon as reading has failed */
	/* the section that is being read */
	enum config_section section;
	unsigned section_line;
	struct config_disk *disk;
	struct config_net *net;
	uint64_t seen_keys; /* bit per entry of the section's key table */
	/* all sections so far, "disk root" */
	unsigned section_count;
	char sections[CONFIG_MAX_SECTIONS][CONFIG_SECTION_BYTES];
	unsigned lines[CONFIG_MAX_SECTIONS];
	unsigned disk_lines[CONFIG_MAX_DISKS], net_lines[CONFIG_MAX_NETS];
	/* POOL:VOLUME of a disk, until all is read and libvirt is asked; NULL for none */
	char *volumes[CONFIG_MAX_DISKS];
	bool volume_is_base[CONFIG_MAX_DISKS];
};

typedef int config_set_fn(struct config_reading *reading, void *object, const char *key, const char *value);

struct config_key {
	const char *name;
	config_set_fn *set; /* `object` is the machine_config, or the config_disk or config_net of the section */
	bool repeats;
};

/* The keys of a section's kind. */
const struct config_key *config_keys(enum config_section section, size_t *count);
/* "FILE:LINE: KEY: WHY". Returns -EINVAL. */
int config_fail(struct config_reading *reading, const char *key, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* The same for a system call that failed, after errno. */
int config_fail_file(struct config_reading *reading, const char *key, const char *path);
int config_check_name(struct config_reading *reading, const char *key, const char *value);
/* config_libvirt.c */
/* True if `value` is POOL:VOLUME and no file of that name: it is noted for the disk. */
bool config_note_volume(struct config_reading *reading, const char *key, const char *value);
int config_find_volumes(struct config_reading *reading);
void config_forget_volumes(struct config_reading *reading);
/* The image as it is behind symbolic links: takes `path` (malloc), NULL after a failure. */
int config_place_image(struct config_reading *reading, const char *key, char **path);
/* config_net.c */
int config_begin_net(struct config_reading *reading, const char *name);
int config_check_nets(struct config_reading *reading);
int config_nets_to_text(const struct machine_config *config, struct buf *out, struct err *err);
extern const struct config_key config_net_keys[];
extern const size_t config_net_key_count;
bool config_is_local_libvirt(const char *uri);
int config_parse_size(struct config_reading *reading, const char *key, const char *value, uint64_t *out);
/* config.c */
int config_unknown_key(struct config_reading *reading, const char *name, const struct config_key *keys, size_t count);
int config_append(struct buf *out, struct err *err, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Text that domain.c made. Relative paths are relative to `folder`. */
int config_read_made(const char *what, const char *folder, const char *text, bool look_for_files, struct machine_config *out, struct err *err);
/* UTF-8 without control characters other than the tab. */
bool config_is_text(const char *text, size_t length);

#endif
