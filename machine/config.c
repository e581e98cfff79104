/* Reads guest.cfg with libinih. What inih does not tell (empty sections, sections given twice, overlong lines) is looked for here. */
#include "machine/config.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <ini.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/duration.h"
#include "base/bytes.h"
#include "base/file.h"
#include "base/nearest.h"
#include "machine/config_internal.h"

#define CONFIG_MAX_BYTES (1u << 20)
#define INI_LINE_BYTES	 (1 << 16)
/* The canonical form of a line may be a little longer than the line. */
#define FILE_LINE_BYTES 60000
#define TEXT_LINE_BYTES 65000
#define NO_SYNTAX	"neither a [section], nor key = value, nor a # comment"

/* --- errors --- */

int config_fail(struct config_reading *r, const char *key, const char *format, ...)
{
	char why[400];
	va_list args;

	va_start(args, format);
	vsnprintf(why, sizeof(why), format, args);
	va_end(args);
	if (r->line == 0 || r->made) /* of no file: a setting beside it */
		return err_set(r->err, ERR_USAGE, EINVAL, "%s: %.64s: %s", r->what, key, why);
	return err_set(r->err, ERR_USAGE, EINVAL, "%s:%u: %.64s: %s", r->what, r->line, key, why);
}

int config_fail_file(struct config_reading *r, const char *key, const char *path)
{
	if (r->made)
		return err_sys(r->err, errno, "%s: %s: %s", r->what, key, path);
	return err_sys(r->err, errno, "%s:%u: %s: %s", r->what, r->line, key, path);
}

int config_unknown_key(struct config_reading *r, const char *name, const struct config_key *keys, size_t count)
{
	struct nearest nearest = nearest_to(name);
	char list[200] = "";
	size_t used = 0;

	for (size_t i = 0; i < count; i++) {
		nearest_try(&nearest, keys[i].name);
		if (used < sizeof(list))
			used += (size_t)snprintf(list + used, sizeof(list) - used, "%s%s", i ? ", " : "", keys[i].name);
	}
	config_fail(r, name, "unknown key");
	return nearest.name[0] ? err_hint(r->err, "did you mean '%s'?", nearest.name) : err_hint(r->err, "known here: %s", list);
}

/* --- text --- */

/* Length of the well-formed UTF-8 sequence at `s`, 0 if there is none. */
static size_t utf8_length(const unsigned char *s, size_t left)
{
	size_t n = s[0] < 0x80			  ? 1
		   : s[0] >= 0xc2 && s[0] <= 0xdf ? 2
		   : (s[0] & 0xf0) == 0xe0	  ? 3
		   : s[0] >= 0xf0 && s[0] <= 0xf4 ? 4
						  : 0;

	if (n == 0 || n > left)
		return 0;
	for (size_t i = 1; i < n; i++)
		if ((s[i] & 0xc0) != 0x80)
			return 0;
	/* Overlong forms, surrogates, beyond the last code point. */
	if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) || (s[0] == 0xf0 && s[1] < 0x90) ||
	    (s[0] == 0xf4 && s[1] > 0x8f))
		return 0;
	return n;
}

bool config_is_text(const char *text, size_t length)
{
	const unsigned char *s = (const unsigned char *)text;

	for (size_t i = 0, n; i < length; i += n) {
		n = utf8_length(s + i, length - i);
		if (n == 0 || (s[i] < 0x20 && s[i] != '\t') || s[i] == 0x7f)
			return false;
	}
	return true;
}

/* Every line before any is read: inih would break a long one in two, and the manifest of a checkpoint holds UTF-8 only. */
static int check_lines(struct config_reading *r)
{
	size_t limit = r->look_for_files ? FILE_LINE_BYTES : TEXT_LINE_BYTES;

	r->line = 0;
	for (const char *line = r->text; *line;) {
		size_t length = strcspn(line, "\n"), seen = length;

		r->line++;
		if (length && line[length - 1] == '\r')
			seen--;
		if (seen > limit) {
			config_fail(r, "syntax", "the line is longer than %zu bytes", limit);
			return err_hint(r->err, "is this a guest.cfg?");
		}
		if (!config_is_text(line, seen)) {
			config_fail(r, "syntax", "control characters, or no UTF-8");
			return err_hint(r->err, "is this a guest.cfg?");
		}
		line += length + (line[length] == '\n');
	}
	r->line = 0;
	return 0;
}

/* --- sections --- */

static const struct {
	const char *word;
	enum config_section section;
	bool named;
} section_kinds[] = {
	{"vm", CONFIG_SECTION_VM, false},
	{"disk", CONFIG_SECTION_DISK, true},
	{"net", CONFIG_SECTION_NET, true},
	{"checkpoint", CONFIG_SECTION_CHECKPOINT, false},
};

static int unknown_section(struct config_reading *r, const char *word, const char *name)
{
	struct nearest nearest = nearest_to(word);

	for (size_t i = 0; i < ARRAY_LENGTH(section_kinds); i++)
		nearest_try(&nearest, section_kinds[i].word);
	config_fail(r, "syntax", "unknown section [%s%s%s]", word, *name ? " " : "", name);
	if (nearest.name[0])
		return err_hint(r->err, "did you mean [%s%s]?", nearest.name, nearest.name[0] == 'd' || nearest.name[0] == 'n' ? " NAME" : "");
	return err_hint(r->err, "known: [vm], [disk NAME], [net NAME], [checkpoint]");
}

/* What a section must hold is known at its end. */
static int end_section(struct config_reading *r)
{
	if (r->section != CONFIG_SECTION_NET || r->seen_keys & 1) /* mode is the first of its keys */
		return 0;
	r->line = r->section_line;
	config_fail(r, "mode", "is missing in [%s]", r->sections[r->section_count - 1]);
	return err_hint(r->err, "write mode = user, tap, bridge, libvirt or none");
}

static int begin_disk(struct config_reading *r, const char *name)
{
	struct machine_config *config = r->config;

	if (config->disk_count == CONFIG_MAX_DISKS) {
		config_fail(r, "disk", "more than %d disks", CONFIG_MAX_DISKS);
		return err_hint(r->err, "leave some out");
	}
	r->disk_lines[config->disk_count] = r->line;
	r->disk = &config->disks[config->disk_count++];
	snprintf(r->disk->name, sizeof(r->disk->name), "%s", name);
	return 0;
}

/* `word` and `name` ("" if none) come from the header in the present line. */
static int begin_section(struct config_reading *r, const char *word, const char *name)
{
	size_t kind = 0;
	int rc = end_section(r);

	if (rc)
		return rc;
	while (kind < ARRAY_LENGTH(section_kinds) && strcmp(section_kinds[kind].word, word))
		kind++;
	if (kind == ARRAY_LENGTH(section_kinds) || (!section_kinds[kind].named && *name))
		return unknown_section(r, word, name);
	if (section_kinds[kind].named) {
		rc = config_check_name(r, word, name);
		if (rc)
			return rc;
	}
	if (r->section_count == CONFIG_MAX_SECTIONS) {
		config_fail(r, "syntax", "more than %d sections", CONFIG_MAX_SECTIONS);
		return err_hint(r->err, "is this a guest.cfg?");
	}
	char *full = r->sections[r->section_count];
	snprintf(full, CONFIG_SECTION_BYTES, "%.15s%s%.63s", word, *name ? " " : "", name);
	for (unsigned i = 0; i < r->section_count; i++)
		if (!strcmp(r->sections[i], full)) {
			config_fail(r, "syntax", "[%s] is given twice, first in line %u", full, r->lines[i]);
			return err_hint(r->err, "put its keys into one section");
		}
	r->lines[r->section_count++] = r->line;
	r->section = section_kinds[kind].section;
	r->section_line = r->line;
	r->seen_keys = 0;
	if (r->section == CONFIG_SECTION_NET)
		return config_begin_net(r, name);
	return r->section == CONFIG_SECTION_DISK ? begin_disk(r, name) : 0;
}

static char *trim(char *text)
{
	text += strspn(text, " \t\r");
	for (size_t n = strlen(text); n && isspace((unsigned char)text[n - 1]); n--)
		text[n - 1] = '\0';
	return text;
}

/* Begins a section if the line is its header. Here and not in inih's handler, which hears of a section with its first key only, and
 * of 49 bytes of its name. */
static int look_for_section(struct config_reading *r, const char *line, size_t length)
{
	size_t start = 0;

	while (start < length && isspace((unsigned char)line[start]))
		start++;
	if (start == length || line[start] != '[')
		return 0;
	CLEANUP_FREE char *copy = strndup(line + start + 1, length - start - 1);
	char *end = copy ? strchr(copy, ']') : NULL;
	if (end) {
		size_t after = strspn(end + 1, " \t\r");

		if (end[1 + after] && (after == 0 || end[1 + after] != '#'))
			end = NULL;
	}
	if (!end) {
		config_fail(r, "syntax", NO_SYNTAX);
		return err_hint(r->err, "a section stands alone in its line: [vm]");
	}
	*end = '\0';
	char *word = trim(copy), *name = word + strcspn(word, " \t");
	if (*name)
		*name++ = '\0';
	return begin_section(r, word, trim(name));
}

/* --- keys --- */

static int set_key(struct config_reading *r, const char *name, const char *value)
{
	size_t count;
	const struct config_key *keys = config_keys(r->section, &count);

	if (r->section == CONFIG_SECTION_NONE) {
		config_fail(r, name, "stands before any section");
		return err_hint(r->err, "begin with [vm]");
	}
	for (size_t i = 0; i < count; i++) {
		if (strcmp(keys[i].name, name))
			continue;
		if (!keys[i].repeats && r->seen_keys & (1ull << i)) {
			config_fail(r, name, "is given twice in [%s]", r->sections[r->section_count - 1]);
			return err_hint(r->err, "keep one of them");
		}
		r->seen_keys |= 1ull << i;
		void *object = r->config;
		if (r->section == CONFIG_SECTION_DISK)
			object = r->disk;
		else if (r->section == CONFIG_SECTION_NET)
			object = r->net;
		return keys[i].set(r, object, name, value);
	}
	return config_unknown_key(r, name, keys, count);
}

/* inih takes 1 for success. */
static int handle(void *user, const char *section, const char *name, const char *value)
{
	(void)section;
	return set_key(user, name, value) == 0;
}

/* fgets of the text in memory; counts lines, so that handlers know where they are. */
static char *next_line(char *line, int size, void *stream)
{
	struct config_reading *r = stream;
	size_t length = strcspn(r->text, "\n");

	if (!*r->text || r->err->number)
		return NULL;
	if (!r->within_line) {
		r->line++;
		if (look_for_section(r, r->text, length))
			return NULL;
	}
	if (r->text[length] == '\n')
		length++;
	if (length > (size_t)size - 1)
		length = (size_t)size - 1;
	memcpy(line, r->text, length);
	line[length] = '\0';
	r->text += length;
	r->within_line = line[length - 1] != '\n';
	return line;
}

/* --- what the keys mean together --- */

static bool is_same_file(const char *a, const char *b)
{
	struct stat one, other;

	if (!strcmp(a, b))
		return true;
	return stat(a, &one) == 0 && stat(b, &other) == 0 && one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

/* Two disks may share an image only if neither writes to it. */
static int check_shared(struct config_reading *r, const struct config_disk *disk, const struct config_disk *other)
{
	const char *image = disk->path ? disk->path : disk->base, *taken = other->path ? other->path : other->base;
	bool writes = disk->path && !disk->readonly, other_writes = other->path && !other->readonly;

	if ((!writes && !other_writes) || !(r->look_for_files ? is_same_file(image, taken) : !strcmp(image, taken)))
		return 0;
	config_fail(r, disk->path ? "path" : "base", "%s is already [disk %s]", image, other->name);
	return err_hint(r->err, "two disks share a file only as base, or with readonly = yes in both");
}

static int check_disk(struct config_reading *r, const struct config_disk *disk)
{
	if (!disk->path && !disk->base) {
		config_fail(r, "path", "[disk %s] names no image", disk->name);
		return err_hint(r->err, "add path = FILE, or base = FILE for a shared read-only base");
	}
	if (disk->path && disk->base) {
		config_fail(r, "base", "[disk %s] has both path and base", disk->name);
		return err_hint(r->err,
				"path is the VM's own disk, base a read-only one under its own layer: name one");
	}
	if (disk->base && disk->readonly) {
		config_fail(r, "readonly", "[disk %s] has base, which excludes it", disk->name);
		return err_hint(r->err, "for a read-only disk write path = FILE and readonly = yes");
	}
	return 0;
}

static int check_disks(struct config_reading *r)
{
	int rc = 0;

	for (unsigned i = 0; !rc && i < r->config->disk_count; i++) {
		r->line = r->disk_lines[i];
		rc = check_disk(r, &r->config->disks[i]);
		for (unsigned j = 0; !rc && j < i; j++)
			rc = check_shared(r, &r->config->disks[i], &r->config->disks[j]);
	}
	return rc;
}

/* Memory of the pool cannot be given back safely: it could be another's when the guest wants it again. */
static int check_vm(struct config_reading *r)
{
	if (!r->config->balloon || r->config->memory_backing != MEM_BACKING_HUGETLB)
		return 0;
	config_fail(r, "balloon", "not with memory_backing = hugetlb, whose pages are reserved for the guest");
	return err_hint(r->err, "choose one: balloon = no, or memory_backing = thp or small");
}

static int read_sections(struct config_reading *r, const char *text, struct machine_config *out)
{
	int rc;

	*r->err = ERR_INIT;
	*out = (struct machine_config){.memory_bytes = 512ull << 20, .cpus = 1, .keep = CONFIG_KEEP};
	out->source = xstrdup("");
	out->cmdline = xstrdup("");
	out->cpu_model = xstrdup("host");
	out->libvirt = xstrdup("");
	r->config = out;
	r->text = strncmp(text, "\xef\xbb\xbf", 3) ? text : text + 3;
	rc = check_lines(r);
	if (rc)
		return rc;
	ini_use_stack = false;
	ini_allow_realloc = true;
	ini_max_line = INI_LINE_BYTES;
	ini_initial_alloc = 4096;
	ini_allow_multiline = false;
	ini_stop_on_first_error = true;
	/* Canonical text has no comments, and a path in it may hold " #". */
	ini_inline_comment_prefixes = r->look_for_files && !r->made ? "#" : "";
	rc = ini_parse_stream(next_line, r, handle, r);
	if (r->err->number)
		return -r->err->number;
	if (rc < 0)
		return err_set(r->err, ERR_FAILED, ENOMEM, "%s: out of memory", r->what);
	if (rc > 0) {
		r->line = (unsigned)rc;
		config_fail(r, "syntax", NO_SYNTAX);
		return err_hint(r->err, "write key = value, for example memory = 512M");
	}
	rc = end_section(r);
	if (!rc)
		rc = check_vm(r);
	if (!rc)
		rc = config_find_volumes(r);
	if (!rc)
		rc = config_check_nets(r);
	return rc ? rc : check_disks(r);
}

static int read_text(struct config_reading *r, const char *text, struct machine_config *out)
{
	int rc = read_sections(r, text, out);

	config_forget_volumes(r);
	return rc;
}

static int need_kernel(struct config_reading *r)
{
	unsigned vm = 0;

	while (vm < r->section_count && strcmp(r->sections[vm], "vm"))
		vm++;
	if (vm == r->section_count) {
		err_set(r->err, ERR_USAGE, EINVAL, "%s: there is no [vm] section", r->what);
		return err_hint(r->err, "see `vmcp help run` for an example");
	}
	r->line = r->lines[vm];
	if (!r->config->kernel) {
		config_fail(r, "kernel", "is missing in [vm]");
		return err_hint(r->err, "add kernel = FILE: a Linux bzImage, or an ELF with a PVH entry note");
	}
	return 0;
}

/* r->line is that of [vm]. */
static int default_name(struct config_reading *r, const char *path)
{
	const char *base = strrchr(path, '/');
	char name[NAME_MAX + 1];

	snprintf(name, sizeof(name), "%s", base ? base + 1 : path);
	char *dot = strrchr(name, '.');
	if (dot && dot != name)
		*dot = '\0';
	int rc = config_check_name(r, "name", name);
	if (rc == 0) {
		memcpy(r->config->name, name, strlen(name) + 1); /* checked to fit */
		return 0;
	}
	*r->err = ERR_INIT;
	config_fail(r, "name", "is missing in [vm], and the file's name is none: '%s'", name);
	return err_hint(r->err, "add name = NAME: letters, digits, '.', '_' and '-', a letter or digit first");
}

int config_read_file(const char *path, struct machine_config *out, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	struct err local = ERR_INIT;
	struct config_reading r = {.what = path, .look_for_files = true, .err = err ? err : &local};
	char *absolute, *folder;
	int rc;

	*out = (struct machine_config){0};
	rc = file_read_all(AT_FDCWD, path, CONFIG_MAX_BYTES, &text, r.err);
	if (rc)
		return err_hint(r.err, "a readable guest.cfg is needed; `vmcp help run` shows one");
	if (text.length == 0 || memchr(text.data, '\0', text.length)) {
		err_set(r.err, ERR_USAGE, EINVAL, "%s: is no guest.cfg: %s", path,
			text.length ? "it holds binary data" : "it is empty");
		return err_hint(r.err, "vmcp run takes a configuration file; see `vmcp help run`");
	}
	absolute = realpath(path, NULL);
	if (!absolute)
		return err_sys(r.err, errno, "%s", path);
	/* Of the file itself, where `path` is a symbolic link. */
	folder = xstrdup(absolute);
	*strrchr(folder, '/') = '\0';
	r.folder = folder;
	rc = read_text(&r, (char *)text.data, out);
	if (!rc)
		rc = need_kernel(&r);
	if (!rc && !out->name[0])
		rc = default_name(&r, path);
	free(folder);
	if (rc) {
		free(absolute);
		config_free(out);
		return rc;
	}
	free(out->source);
	out->source = absolute;
	return 0;
}

int config_read_made(const char *what, const char *folder, const char *text, bool look_for_files, struct machine_config *out, struct err *err)
{
	struct err local = ERR_INIT;
	struct config_reading r = {.what = what, .folder = folder, .made = true, .look_for_files = look_for_files, .err = err ? err : &local};
	int rc = read_text(&r, text, out);

	if (rc)
		config_free(out);
	return rc;
}

int config_read_text(const char *what, const char *text, struct machine_config *out, struct err *err)
{
	struct err local = ERR_INIT;
	struct config_reading r = {.what = what, .err = err ? err : &local};
	int rc = read_text(&r, text, out);

	if (!rc && !out->name[0])
		rc = err_set(r.err, ERR_DAMAGED, EINVAL, "%s: no name", what);
	if (rc) {
		r.err->class = ERR_DAMAGED; /* nobody typed it */
		config_free(out);
	}
	return rc;
}

int config_append(struct buf *out, struct err *err, const char *format, ...)
{
	char *line = NULL;
	va_list args;
	int rc, length;

	va_start(args, format);
	length = vasprintf(&line, format, args);
	va_end(args);
	if (length < 0)
		return err_sys(err, ENOMEM, "configuration");
	rc = buf_append(out, line, (size_t)length, err);
	free(line);
	return rc;
}

int config_to_text(const struct machine_config *config, struct buf *out, struct err *err)
{
	int rc = config_append(out, err, "[vm]\nname = %s\nmemory = %llu\ncpus = %u\n", config->name,
			(unsigned long long)config->memory_bytes, config->cpus);

	if (!rc && config->kernel)
		rc = config_append(out, err, "kernel = %s\n", config->kernel);
	if (!rc && config->initrd)
		rc = config_append(out, err, "initrd = %s\n", config->initrd);
	if (!rc && config->cmdline[0])
		rc = config_append(out, err, "cmdline = %s\n", config->cmdline);
	if (!rc)
		rc = config_append(out, err, "cpu_model = %s\nmemory_backing = %s\nconsole = %s\nrng = %s\nballoon = %s\n",
			    config->cpu_model, config_backing_name(config->memory_backing), config->console == CONFIG_CONSOLE_STDIO ? "stdio" : "socket",
			    config->rng ? "yes" : "no", config->balloon ? "yes" : "no");
	if (!rc && config->vsock_cid)
		rc = config_append(out, err, "vsock_cid = %u\n", config->vsock_cid);
	if (!rc && config->hostname[0])
		rc = config_append(out, err, "hostname = %s\n", config->hostname);
	if (!rc && config->qemu)
		rc = config_append(out, err, "made_by = qemu\n");
	if (!rc && config->libvirt[0])
		rc = config_append(out, err, "libvirt = %s\n", config->libvirt);
	for (unsigned i = 0; !rc && i < config->disk_count; i++) {
		const struct config_disk *disk = &config->disks[i];

		rc = config_append(out, err, "\n[disk %s]\n%s = %s\n", disk->name, disk->base ? "base" : "path",
			    disk->base ? disk->base : disk->path);
		if (!rc && disk->readonly)
			rc = config_append(out, err, "readonly = yes\n");
		if (!rc && disk->detect_zeroes)
			rc = config_append(out, err, "detect_zeroes = yes\n");
	}
	if (!rc)
		rc = config_nets_to_text(config, out, err);
	if (!rc && config->every_ns) {
		char every[32];

		duration_format(every, config->every_ns);
		rc = config_append(out, err, "\n[checkpoint]\nevery = %s\nkeep = %llu\n", every, (unsigned long long)config->keep);
		if (!rc && config->keep_hourly)
			rc = config_append(out, err, "keep_hourly = %llu\n", (unsigned long long)config->keep_hourly);
		if (!rc && config->keep_daily)
			rc = config_append(out, err, "keep_daily = %llu\n", (unsigned long long)config->keep_daily);
	}
	return rc;
}

void config_free(struct machine_config *config)
{
	free(config->source);
	free(config->kernel);
	free(config->initrd);
	free(config->cmdline);
	free(config->cpu_model);
	free(config->libvirt);
	for (unsigned i = 0; i < config->disk_count; i++) {
		free(config->disks[i].path);
		free(config->disks[i].base);
	}
	*config = (struct machine_config){0};
}
