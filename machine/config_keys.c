/* The keys of guest.cfg: one setter each, and the tables of what each kind of section knows. */
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "base/duration.h"
#include "base/size.h"
#include "machine/config_internal.h"
#include "vmm/memory.h"
#include "vmm/vm.h"

int config_parse_size(struct config_reading *r, const char *key, const char *value, uint64_t *out)
{
	if (size_parse(value, out))
		return 0;
	config_fail(r, key, "'%s' is no size", value);
	return err_hint(r->err, SIZE_HINT);
}

static int set_memory(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct machine_config *config = object;
	int rc = config_parse_size(r, key, value, &config->memory_bytes);

	if (rc)
		return rc;
	if (config->memory_bytes < MEM_MIN_BYTES || config->memory_bytes > MEM_MAX_BYTES ||
	    config->memory_bytes % (2u << 20)) {
		config_fail(r, key, "%s is not possible", value);
		return err_hint(r->err, "a multiple of 2M from %lluM to %lluG", MEM_MIN_BYTES >> 20,
				MEM_MAX_BYTES >> 30);
	}
	return 0;
}

static int set_cpus(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct machine_config *config = object;
	char *end;
	unsigned long cpus = strtoul(value, &end, 10);

	if (!isdigit((unsigned char)value[0]) || *end || cpus < 1 || cpus > VM_MAX_CPUS) {
		config_fail(r, key, "'%s' is no number of CPUs", value);
		return err_hint(r->err, "a number from 1 to %d", VM_MAX_CPUS);
	}
	config->cpus = (unsigned)cpus;
	return 0;
}

static int parse_bool(struct config_reading *r, const char *key, const char *value, bool *out)
{
	*out = !strcmp(value, "yes");
	if (*out || !strcmp(value, "no"))
		return 0;
	config_fail(r, key, "'%s' is neither yes nor no", value);
	return err_hint(r->err, "write %s = yes or %s = no", key, key);
}

int config_check_name(struct config_reading *r, const char *key, const char *value)
{
	size_t length = strlen(value);
	bool good = length > 0 && length < CONFIG_NAME_BYTES && isalnum((unsigned char)value[0]);

	for (size_t i = 0; good && i < length; i++)
		good = isalnum((unsigned char)value[i]) || strchr("._-", value[i]);
	if (good)
		return 0;
	config_fail(r, key, "'%s' is no name", value);
	return err_hint(r->err, "letters, digits, '.', '_' and '-', at most %d, a letter or digit first",
			CONFIG_NAME_BYTES - 1);
}

static int set_name(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct machine_config *config = object;
	int rc = config_check_name(r, key, value);

	if (!rc)
		snprintf(config->name, sizeof(config->name), "%s", value);
	return rc;
}

static int set_text(struct config_reading *r, void *object, const char *key, const char *value, size_t offset)
{
	char **field = (char **)(void *)((char *)object + offset);

	(void)r;
	(void)key;
	free(*field);
	*field = xstrdup(value);
	return 0;
}

static int set_cmdline(struct config_reading *r, void *object, const char *key, const char *value)
{
	return set_text(r, object, key, value, offsetof(struct machine_config, cmdline));
}

static int set_cpu_model(struct config_reading *r, void *object, const char *key, const char *value)
{
	if (!vm_knows_cpu_model(value)) {
		config_fail(r, key, "'%s' is none", value);
		return err_hint(r->err, "use " VM_CPU_MODELS);
	}
	return set_text(r, object, key, value, offsetof(struct machine_config, cpu_model));
}

static int check_file(struct config_reading *r, const char *key, const char *path)
{
	struct stat st;

	if (stat(path, &st)) {
		config_fail_file(r, key, path);
		return err_hint(r->err, "paths are relative to the folder of %s", r->what);
	}
	if (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode))
		return 0;
	config_fail(r, key, "%s is not a file", path);
	return err_hint(r->err, "name a regular file or a block device");
}

static int parse_path(struct config_reading *r, const char *key, const char *value, char **out)
{
	CLEANUP_FREE char *path = NULL;

	if (!*value) {
		config_fail(r, key, "the path is empty");
		return err_hint(r->err, "write %s = FILE, or leave the key out", key);
	}
	if (value[0] != '/' && !r->folder) {
		config_fail(r, key, "'%s' is not an absolute path", value);
		return err_hint(r->err, "this text was not written by vmcp");
	}
	path = value[0] == '/' ? xstrdup(value) : xasprintf("%s/%s", r->folder, value);
	if (strlen(path) >= PATH_MAX) {
		config_fail(r, key, "the path is longer than %d bytes", PATH_MAX - 1);
		return err_hint(r->err, "move the file to a shorter path");
	}
	/* A folder's name can hold what no line can; checkpoints keep these texts as lines of UTF-8. */
	if (!config_is_text(path, strlen(path))) {
		config_fail(r, key, "the path of the folder holds control characters or is no UTF-8: %s", path);
		return err_hint(r->err, "rename the folder");
	}
	if (r->look_for_files) {
		int rc = check_file(r, key, path);

		if (rc)
			return rc;
	}
	free(*out);
	*out = path;
	path = NULL;
	return 0;
}

static int set_kernel(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_path(r, key, value, &((struct machine_config *)object)->kernel);
}

static int set_initrd(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_path(r, key, value, &((struct machine_config *)object)->initrd);
}

static const char *const backing_names[] = {
	[MEM_BACKING_SMALL] = "small", [MEM_BACKING_THP] = "thp", [MEM_BACKING_HUGETLB] = "hugetlb"};

const char *config_backing_name(enum mem_backing backing) { return backing_names[backing]; }

static bool parse_backing(const char *name, enum mem_backing *out)
{
	for (size_t i = 0; i < ARRAY_LENGTH(backing_names); i++)
		if (!strcmp(name, backing_names[i])) {
			*out = (enum mem_backing)i;
			return true;
		}
	return false;
}

int config_choose_backing(struct machine_config *config, const char *name, struct err *err)
{
	if (!parse_backing(name, &config->memory_backing)) {
		err_set(err, ERR_USAGE, EINVAL, "--memory-backing: '%s' is no memory backing", name);
		return err_hint(err, "small, thp or hugetlb");
	}
	if (!config->balloon || config->memory_backing != MEM_BACKING_HUGETLB)
		return 0;
	err_set(err, ERR_USAGE, EINVAL, "--memory-backing: hugetlb is not possible for a VM with a balloon");
	return err_hint(err, "choose thp or small");
}

static int set_backing(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct machine_config *config = object;

	if (parse_backing(value, &config->memory_backing))
		return 0;
	config_fail(r, key, "'%s' is no memory backing", value);
	return err_hint(r->err, "small, thp or hugetlb");
}

static int set_console(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct machine_config *config = object;

	if (!strcmp(value, "stdio"))
		config->console = CONFIG_CONSOLE_STDIO;
	else if (!strcmp(value, "socket"))
		config->console = CONFIG_CONSOLE_SOCKET;
	else {
		config_fail(r, key, "'%s' is no console", value);
		return err_hint(r->err, "stdio or socket");
	}
	return 0;
}

static int set_rng(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_bool(r, key, value, &((struct machine_config *)object)->rng);
}

static int set_balloon(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_bool(r, key, value, &((struct machine_config *)object)->balloon);
}

static int set_vsock(struct config_reading *r, void *object, const char *key, const char *value)
{
	char *end;
	unsigned long cid = strtoul(value, &end, 10);

	if (!isdigit((unsigned char)value[0]) || *end || cid < 3 || cid > UINT32_MAX - 1) {
		config_fail(r, key, "'%s' is no vsock number of a guest", value);
		return err_hint(r->err, "a number from 3 to 4294967294");
	}
	((struct machine_config *)object)->vsock_cid = (uint32_t)cid;
	return 0;
}

bool config_is_hostname(const char *text)
{
	size_t length = strlen(text);

	for (size_t i = 0; i < length; i++)
		if (!isalnum((unsigned char)text[i]) && text[i] != '-')
			return false;
	return length > 0 && length < CONFIG_HOSTNAME_BYTES && text[0] != '-' && text[length - 1] != '-';
}

static int set_hostname(struct config_reading *r, void *object, const char *key, const char *value)
{
	if (config_is_hostname(value)) {
		snprintf(((struct machine_config *)object)->hostname, CONFIG_HOSTNAME_BYTES, "%s", value);
		return 0;
	}
	config_fail(r, key, "'%s' is no host name", value);
	return err_hint(r->err, "letters, digits and '-', at most 63, no '-' at either end");
}

/* Of checkpoints only. */
static int set_made_by(struct config_reading *r, void *object, const char *key, const char *value)
{
	if (!r->look_for_files && !r->made && !strcmp(value, "qemu")) {
		((struct machine_config *)object)->qemu = true;
		return 0;
	}
	config_fail(r, key, "is for checkpoints of QEMU's domains only");
	return err_hint(r->err, "leave it out");
}

/* Networks and files of another host are of no use, and libvirt's URIs can name commands to run: none comes from a configuration. */
bool config_is_local_libvirt(const char *uri)
{
	size_t scheme = strspn(uri, "abcdefghijklmnopqrstuvwxyz");

	if (!scheme || strncmp(uri + scheme, ":///", 4) != 0)
		return false;
	for (const char *c = uri + scheme; *c; c++)
		if (!isalnum((unsigned char)*c) && !strchr(":/._-", *c))
			return false;
	return true;
}

static int set_libvirt(struct config_reading *r, void *object, const char *key, const char *value)
{
	if (*value && !config_is_local_libvirt(value)) {
		config_fail(r, key, "'%s' is no libvirt of this host", value);
		return err_hint(r->err, "a URI without host and parameters, for example qemu:///system");
	}
	return set_text(r, object, key, value, offsetof(struct machine_config, libvirt));
}

/* Without links in it: a checkpoint puts a new file in the place of the image, not of a link to it. */
static int parse_image(struct config_reading *r, const char *key, const char *value, char **out)
{
	if (config_note_volume(r, key, value))
		return 0;
	int rc = parse_path(r, key, value, out);
	return rc || !r->look_for_files ? rc : config_place_image(r, key, out);
}

int config_place_image(struct config_reading *r, const char *key, char **out)
{
	char *real = realpath(*out, NULL);

	if (!real)
		return config_fail_file(r, key, *out);
	free(*out);
	*out = real;
	if (config_is_text(real, strlen(real)))
		return 0;
	config_fail(r, key, "the path of the folder holds control characters or is no UTF-8: %s", real);
	return err_hint(r->err, "rename the folder");
}

static int set_disk_path(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_image(r, key, value, &((struct config_disk *)object)->path);
}

static int set_disk_base(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_image(r, key, value, &((struct config_disk *)object)->base);
}

static int set_disk_readonly(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_bool(r, key, value, &((struct config_disk *)object)->readonly);
}

static int set_disk_detect_zeroes(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_bool(r, key, value, &((struct config_disk *)object)->detect_zeroes);
}

bool config_parse_every(const char *text, uint64_t *ns)
{
	uint64_t every;

	if (!duration_parse(text, &every) || (every && (every < CONFIG_MIN_EVERY_NS || every > CONFIG_MAX_EVERY_NS)))
		return false;
	*ns = every;
	return true;
}

bool config_parse_keep(const char *text, uint64_t *keep)
{
	char *end;
	unsigned long number = strtoul(text, &end, 10);

	if (!isdigit((unsigned char)text[0]) || *end || number < 1 || number > CONFIG_MAX_KEEP)
		return false;
	*keep = number;
	return true;
}

static int set_every(struct config_reading *r, void *object, const char *key, const char *value)
{
	if (config_parse_every(value, &((struct machine_config *)object)->every_ns))
		return 0;
	config_fail(r, key, "'%s' is no time between checkpoints", value);
	return err_hint(r->err, CONFIG_EVERY_HINT);
}

static int set_keep(struct config_reading *r, void *object, const char *key, const char *value)
{
	if (config_parse_keep(value, &((struct machine_config *)object)->keep))
		return 0;
	config_fail(r, key, "'%s' is no number of checkpoints", value);
	return err_hint(r->err, CONFIG_KEEP_HINT);
}

static int set_keep_each(struct config_reading *r, uint64_t *keep, const char *key, const char *value)
{
	if (!strcmp(value, "0"))
		*keep = 0;
	else if (!config_parse_keep(value, keep)) {
		config_fail(r, key, "'%s' is no number of checkpoints", value);
		return err_hint(r->err, CONFIG_KEEP_HINT "; 0 means none");
	}
	return 0;
}

static int set_keep_hourly(struct config_reading *r, void *object, const char *key, const char *value)
{
	return set_keep_each(r, &((struct machine_config *)object)->keep_hourly, key, value);
}

static int set_keep_daily(struct config_reading *r, void *object, const char *key, const char *value)
{
	return set_keep_each(r, &((struct machine_config *)object)->keep_daily, key, value);
}

static const struct config_key vm_keys[] = {
	{.name = "name", .set = set_name},	     {.name = "memory", .set = set_memory},
	{.name = "cpus", .set = set_cpus},	     {.name = "kernel", .set = set_kernel},
	{.name = "initrd", .set = set_initrd},	     {.name = "cmdline", .set = set_cmdline},
	{.name = "cpu_model", .set = set_cpu_model}, {.name = "memory_backing", .set = set_backing},
	{.name = "console", .set = set_console},     {.name = "rng", .set = set_rng},
	{.name = "balloon", .set = set_balloon},     {.name = "vsock_cid", .set = set_vsock},
	{.name = "libvirt", .set = set_libvirt},     {.name = "made_by", .set = set_made_by},
	{.name = "hostname", .set = set_hostname},
};
static const struct config_key disk_keys[] = {
	{.name = "path", .set = set_disk_path},
	{.name = "base", .set = set_disk_base},
	{.name = "readonly", .set = set_disk_readonly},
	{.name = "detect_zeroes", .set = set_disk_detect_zeroes},
};
static const struct config_key checkpoint_keys[] = {
	{.name = "every", .set = set_every},
	{.name = "keep", .set = set_keep},
	{.name = "keep_hourly", .set = set_keep_hourly},
	{.name = "keep_daily", .set = set_keep_daily},
};

const struct config_key *config_keys(enum config_section section, size_t *count)
{
	static const struct {
		const struct config_key *keys;
		size_t count;
	} tables[] = {
		[CONFIG_SECTION_VM] = {vm_keys, ARRAY_LENGTH(vm_keys)},
		[CONFIG_SECTION_DISK] = {disk_keys, ARRAY_LENGTH(disk_keys)},
		[CONFIG_SECTION_CHECKPOINT] = {checkpoint_keys, ARRAY_LENGTH(checkpoint_keys)},
	};

	if (section == CONFIG_SECTION_NET) {
		*count = config_net_key_count;
		return config_net_keys;
	}
	*count = tables[section].count;
	return tables[section].keys;
}
