/* Domain XML to the text of a guest.cfg: what is not a disk or a network card. */
#include "machine/domain.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "machine/config_internal.h"
#include "machine/domain_internal.h"
#include "vmm/memory.h"
#include "vmm/vm.h"

#define MEMORY_STEP (2ull << 20)

/* --- telling --- */

/* "web.xml:12: devices/disk", or "web: devices/disk" of a domain that comes from libvirt. */
static void describe(const struct domain_reading *r, const struct xml_node *node, char *out, size_t size)
{
	const char *above = node->parent && node->parent->parent ? node->parent->name : NULL;

	if (r->lines)
		snprintf(out, size, "%.200s:%u: %s%s%.40s", r->what, node->line, above ? above : "", above ? "/" : "", node->name);
	else
		snprintf(out, size, "%.200s: %s%s%.40s", r->what, above ? above : "", above ? "/" : "", node->name);
}

int domain_tell(const struct domain_reading *r, const struct xml_node *node, const char *format, ...)
{
	char where[300], text[400];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	describe(r, node, where, sizeof(where));
	log_warn("%s: %s", where, text);
	return 0;
}

int domain_not_honoured(struct domain_reading *r, const struct xml_node *node)
{
	const char *type = xml_attribute(node, "type");

	if (!type)
		type = xml_attribute(node, "model");
	return domain_tell(r, node, "%s%.60s%snot honoured", type ? "'" : "", type ? type : "", type ? "' is " : "");
}

static bool is_word(const char *word, const char *words)
{
	size_t length = strlen(word);

	for (const char *at = words; (at = strstr(at, word)) != NULL; at++)
		if ((at == words || at[-1] == ' ') && (at[length] == ' ' || !at[length]))
			return true;
	return false;
}

int domain_tell_attributes(struct domain_reading *r, const struct xml_node *node, const char *known)
{
	char list[200] = "";
	size_t used = 0;

	for (const struct xml_attribute *a = node->attributes; a; a = a->next)
		if (!is_word(a->name, known) && used < sizeof(list) - 1)
			used += (size_t)snprintf(list + used, sizeof(list) - used, "%s%.40s='%.40s'", used ? " " : "", a->name, a->value);
	return used ? domain_tell(r, node, "%s: not honoured", list) : 0;
}

int domain_refuse(struct domain_reading *r, const struct xml_node *node, const char *hint, const char *format, ...)
{
	char where[300], text[200];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	describe(r, node, where, sizeof(where));
	err_set(r->err, ERR_USAGE, EINVAL, "%s: %s", where, text);
	return err_hint(r->err, "%s", hint);
}

/* --- writing --- */

int domain_put(struct domain_reading *r, struct buf *section, const char *key, const char *value)
{
	CLEANUP_FREE char *copy = xstrdup(value);

	for (char *c = copy; *c; c++)
		if (*c == '\n' || *c == '\r')
			*c = ' ';
	return config_append(section, r->err, "%s = %s\n", key, copy);
}

static int put_number(struct domain_reading *r, const char *key, uint64_t value)
{
	return config_append(&r->vm, r->err, "%s = %llu\n", key, (unsigned long long)value);
}

bool domain_make_name(const char *text, char name[CONFIG_NAME_BYTES])
{
	size_t n = 0;

	for (const char *c = text; *c && n < CONFIG_NAME_BYTES - 1; c++) {
		bool good = isalnum((unsigned char)*c) || (n && strchr("._-", *c));

		if (good)
			name[n++] = *c;
		else if (n)
			name[n++] = '-';
	}
	name[n] = '\0';
	if (!n)
		snprintf(name, CONFIG_NAME_BYTES, "domain");
	return !strcmp(text, name);
}

int domain_walk(struct domain_reading *r, const struct xml_node *node, const struct domain_rule *rules, size_t count)
{
	int rc = 0;

	for (const struct xml_node *child = node->children; !rc && child; child = child->next) {
		size_t i = 0;

		while (i < count && (child->foreign || strcmp(rules[i].name, child->name) != 0))
			i++;
		if (i == count)
			domain_not_honoured(r, child);
		else if (rules[i].read)
			rc = rules[i].read(r, child);
	}
	return rc;
}

/* --- the machine --- */

static int read_name(struct domain_reading *r, const struct xml_node *node)
{
	char name[CONFIG_NAME_BYTES];

	if (!domain_make_name(node->text, name))
		domain_tell(r, node, "'%.100s' is no name of a VM here: it is called %s (`--name` gives it another)", node->text, name);
	return domain_put(r, &r->vm, "name", name);
}

/* 32 hexadecimal digits, with dashes and blanks where one likes, as libvirt takes them. */
static int read_uuid(struct domain_reading *r, const struct xml_node *node)
{
	size_t used = 0, digits = 0;

	for (const char *c = node->text; *c; c++) {
		if (*c == '-' || isspace((unsigned char)*c))
			continue;
		if (!isxdigit((unsigned char)*c) || digits == 32) {
			digits = 0;
			break;
		}
		if (digits == 8 || digits == 12 || digits == 16 || digits == 20)
			r->uuid[used++] = '-';
		r->uuid[used++] = (char)tolower((unsigned char)*c);
		digits++;
	}
	r->uuid[digits == 32 ? used : 0] = '\0';
	return digits == 32 ? 0 : domain_tell(r, node, "'%.100s' is no UUID: vmcp chooses one", node->text);
}

/* libvirt's units: powers of 1000 with a B behind, powers of 1024 else. */
static bool parse_memory(const struct xml_node *node, uint64_t *bytes)
{
	static const struct {
		const char *name;
		uint64_t bytes;
	} units[] = {
		{"b", 1}, {"bytes", 1}, {"KB", 1000}, {"k", 1ull << 10}, {"KiB", 1ull << 10}, {"MB", 1000000}, {"M", 1ull << 20}, {"MiB", 1ull << 20},
		{"GB", 1000000000}, {"G", 1ull << 30}, {"GiB", 1ull << 30}, {"TB", 1000000000000}, {"T", 1ull << 40}, {"TiB", 1ull << 40},
	};
	const char *unit = xml_attribute(node, "unit");
	char *end;

	errno = 0;
	unsigned long long number = strtoull(node->text, &end, 10);
	if (!isdigit((unsigned char)node->text[0]) || *end || errno)
		return false;
	for (size_t i = 0; i < ARRAY_LENGTH(units); i++)
		if (!strcmp(unit ? unit : "KiB", units[i].name))
			return !mul_overflows(number, units[i].bytes, bytes) && *bytes <= MEM_MAX_BYTES;
	return false;
}

static int read_memory(struct domain_reading *r, const struct xml_node *node)
{
	uint64_t bytes, rounded;

	if (!parse_memory(node, &bytes))
		return domain_refuse(r, node, "a number, with a unit such as unit='MiB', up to 1024 GiB", "'%s' is no size of memory", node->text);
	domain_tell_attributes(r, node, "unit");
	rounded = max_u64(round_up(bytes, MEMORY_STEP), MEM_MIN_BYTES);
	if (rounded != bytes)
		domain_tell(r, node, "%llu bytes: rounded up to %llu MiB", (unsigned long long)bytes, (unsigned long long)rounded >> 20);
	return put_number(r, "memory", rounded);
}

static int read_current_memory(struct domain_reading *r, const struct xml_node *node)
{
	const struct xml_node *memory = xml_child(node->parent, "memory");
	uint64_t current, all;

	if (memory && parse_memory(node, &current) && parse_memory(memory, &all) && current < all)
		domain_tell(r, node, "the guest gets all of its memory (`vmcp balloon` takes from it)");
	return 0;
}

static int read_vcpu(struct domain_reading *r, const struct xml_node *node)
{
	char *end;
	unsigned long cpus = strtoul(node->text, &end, 10);

	if (!isdigit((unsigned char)node->text[0]) || *end || !cpus)
		return domain_refuse(r, node, "a number from 1 to 64", "'%s' is no number of CPUs", node->text);
	domain_tell_attributes(r, node, "placement");
	if (cpus > VM_MAX_CPUS) {
		domain_tell(r, node, "%lu: the guest gets %d", cpus, VM_MAX_CPUS);
		cpus = VM_MAX_CPUS;
	}
	return put_number(r, "cpus", cpus);
}

static int read_hugepages(struct domain_reading *r, const struct xml_node *node)
{
	const struct xml_node *page = xml_child(node, "page");

	r->huge = true;
	if (page)
		domain_not_honoured(r, page);
	return domain_put(r, &r->vm, "memory_backing", "hugetlb");
}

static const struct domain_rule backing_rules[] = {{"hugepages", read_hugepages}};

static int read_backing(struct domain_reading *r, const struct xml_node *node) { return domain_walk(r, node, DOMAIN_RULES(backing_rules)); }

/* --- the processor --- */

/* Levels of the x86-64 psABI that QEMU's models have. What is named nowhere gets the lowest. */
static const char *level_of(const char *model)
{
	static const char *const third[] = {"Haswell", "Broadwell", "Skylake", "Cascadelake", "Cooperlake", "Icelake", "Sapphire", "Granite", "EPYC", "Dhyana"};
	static const char *const second[] = {"Nehalem", "Westmere", "SandyBridge", "IvyBridge", "Opteron_G4", "Opteron_G5", "Snowridge"};

	for (size_t i = 0; i < ARRAY_LENGTH(third); i++)
		if (!strncmp(model, third[i], strlen(third[i])))
			return "x86-64-v3";
	for (size_t i = 0; i < ARRAY_LENGTH(second); i++)
		if (!strncmp(model, second[i], strlen(second[i])))
			return "x86-64-v2";
	return "x86-64-v1";
}

static int read_model(struct domain_reading *r, const struct xml_node *node)
{
	if (!node->text[0])
		return 0;
	const char *level = level_of(node->text);
	domain_tell(r, node, "%.60s: the guest sees %s", node->text, level);
	return domain_put(r, &r->vm, "cpu_model", level);
}

static int read_feature(struct domain_reading *r, const struct xml_node *node)
{
	const char *name = xml_attribute(node, "name"), *policy = xml_attribute(node, "policy");

	return domain_tell(r, node, "%.40s %.60s: not honoured", policy ? policy : "require", name ? name : "");
}

/* Without a `mode` a model is custom; models of the other modes say what libvirt made of them once. */
static int read_cpu(struct domain_reading *r, const struct xml_node *node)
{
	static const struct domain_rule custom[] = {{"model", read_model}, {"vendor", NULL}, {"feature", read_feature}};
	static const struct domain_rule host[] = {{"model", NULL}, {"vendor", NULL}, {"feature", read_feature}};
	const char *mode = xml_attribute(node, "mode");

	return !mode || !strcmp(mode, "custom") ? domain_walk(r, node, DOMAIN_RULES(custom)) : domain_walk(r, node, DOMAIN_RULES(host));
}

/* --- the way it starts --- */

static int read_type(struct domain_reading *r, const struct xml_node *node)
{
	const char *arch = xml_attribute(node, "arch");

	if (strcmp(node->text, "hvm") != 0)
		return domain_refuse(r, node, "domains of type hvm can be run", "'%.40s' is no machine of its own hardware", node->text);
	if (arch && strcmp(arch, "x86_64") != 0)
		return domain_refuse(r, node, "vmcp runs x86-64 guests on x86-64 hosts", "arch='%.40s' is not supported", arch);
	return 0;
}

static int read_kernel(struct domain_reading *r, const struct xml_node *node) { return domain_put(r, &r->vm, "kernel", node->text); }

static int read_initrd(struct domain_reading *r, const struct xml_node *node) { return node->text[0] ? domain_put(r, &r->vm, "initrd", node->text) : 0; }

static int read_cmdline(struct domain_reading *r, const struct xml_node *node) { return domain_put(r, &r->vm, "cmdline", node->text); }

static const struct domain_rule os_rules[] = {
	{"type", read_type}, {"kernel", read_kernel}, {"initrd", read_initrd}, {"cmdline", read_cmdline}, {"boot", NULL}, {"bootmenu", NULL},
};

static int read_os(struct domain_reading *r, const struct xml_node *node)
{
	const char *kernel = xml_child_text(node, "kernel");
	int rc = domain_walk(r, node, DOMAIN_RULES(os_rules));

	if (rc || (kernel && *kernel))
		return rc;
	return domain_refuse(r, node, "add <kernel> and <initrd> to its <os>: files of the guest's /boot, copied to the host",
			     "it starts from its disk by firmware, which vmcp has not");
}

static int read_features(struct domain_reading *r, const struct xml_node *node)
{
	/* What every machine of vmcp has. */
	static const struct domain_rule rules[] = {{"acpi", NULL}, {"apic", NULL}, {"pae", NULL}};

	return domain_walk(r, node, DOMAIN_RULES(rules));
}

static int read_clock(struct domain_reading *r, const struct xml_node *node)
{
	const char *offset = xml_attribute(node, "offset");

	if (offset && strcmp(offset, "utc") != 0)
		domain_tell(r, node, "offset='%.40s': the guest's clock is UTC", offset);
	return domain_walk(r, node, NULL, 0);
}

static int read_event(struct domain_reading *r, const struct xml_node *node)
{
	const char *done = !strcmp(node->name, "on_reboot") ? "restart" : "destroy";

	/* A guest that crashes stays for a look at it, until it is killed or reverted. */
	if (strcmp(node->text, done) != 0 && strcmp(node->name, "on_crash") != 0)
		domain_tell(r, node, "%.40s: vmcp does %s", node->text, done);
	return 0;
}

static int read_pm(struct domain_reading *r, const struct xml_node *node)
{
	for (const struct xml_node *child = node->children; child; child = child->next) {
		const char *enabled = xml_attribute(child, "enabled");

		if (!enabled || strcmp(enabled, "no") != 0)
			domain_not_honoured(r, child);
	}
	return 0;
}

static int refuse_launch_security(struct domain_reading *r, const struct xml_node *node)
{
	return domain_refuse(r, node, "let libvirt run this domain", "memory that is encrypted by the processor is not supported");
}

/* --- devices --- */

static int read_serial(struct domain_reading *r, const struct xml_node *node)
{
	const char *type = xml_attribute(node, "type"), *port = xml_child_attribute(node, "target", "port");

	if (r->serial || (port && strcmp(port, "0") != 0))
		return domain_tell(r, node, "there is one serial port: this one is left out");
	r->serial = true;
	if (type && strcmp(type, "pty") != 0 && strcmp(type, "stdio") != 0)
		domain_tell(r, node, "type='%.40s': the port is the VM's console (`vmcp console`)", type);
	return 0;
}

/* The first console of type serial is the first serial port again. */
static int read_console(struct domain_reading *r, const struct xml_node *node)
{
	const char *type = xml_child_attribute(node, "target", "type");

	if (type && strcmp(type, "serial") != 0)
		return domain_tell(r, node, "type='%.40s': there is a serial port only", type);
	return 0;
}

static int read_rng(struct domain_reading *r, const struct xml_node *node)
{
	const struct xml_node *backend = xml_child(node, "backend");
	const char *model = xml_attribute(backend, "model");

	if (r->rng)
		return domain_tell(r, node, "there is one already: this one is left out");
	if (model && !strcmp(model, "egd"))
		domain_tell(r, backend, "egd: random numbers come from the host's kernel");
	if (xml_child(node, "rate"))
		domain_not_honoured(r, xml_child(node, "rate"));
	r->rng = true;
	return domain_put(r, &r->vm, "rng", "yes");
}

static int read_balloon(struct domain_reading *r, const struct xml_node *node)
{
	const char *model = xml_attribute(node, "model");

	if (!model || strncmp(model, "virtio", 6) != 0)
		return model && strcmp(model, "none") != 0 ? domain_not_honoured(r, node) : 0;
	if (xml_child(xml_child(node->parent->parent, "memoryBacking"), "hugepages"))
		return domain_tell(r, node, "not with huge pages: it is left out");
	return domain_put(r, &r->vm, "balloon", "yes");
}

static int read_vsock(struct domain_reading *r, const struct xml_node *node)
{
	const char *address = xml_child_attribute(node, "cid", "address"), *automatic = xml_child_attribute(node, "cid", "auto");

	if (r->vsock)
		return domain_tell(r, node, "there is one already: this one is left out");
	r->vsock = true;
	/* The number is the guest's own affair here: any will do. */
	return domain_put(r, &r->vm, "vsock_cid", address && !(automatic && !strcmp(automatic, "yes")) ? address : "3");
}

/* A controller without its devices is nothing that a guest misses. */
static const struct domain_rule device_rules[] = {
	{"disk", domain_read_disk}, {"interface", domain_read_interface}, {"serial", read_serial}, {"console", read_console}, {"rng", read_rng},
	{"memballoon", read_balloon}, {"vsock", read_vsock}, {"emulator", NULL}, {"controller", NULL},
};

static int read_devices(struct domain_reading *r, const struct xml_node *node) { return domain_walk(r, node, DOMAIN_RULES(device_rules)); }

/* What has no function is libvirt's own book-keeping. */
static const struct domain_rule domain_rules[] = {
	{"name", read_name}, {"uuid", read_uuid}, {"title", NULL}, {"description", NULL}, {"metadata", NULL}, {"resource", NULL}, {"seclabel", NULL},
	{"memory", read_memory}, {"currentMemory", read_current_memory}, {"vcpu", read_vcpu}, {"memoryBacking", read_backing}, {"cpu", read_cpu},
	{"os", read_os}, {"features", read_features}, {"clock", read_clock}, {"on_poweroff", read_event}, {"on_reboot", read_event},
	{"on_crash", read_event}, {"pm", read_pm}, {"devices", read_devices}, {"launchSecurity", refuse_launch_security},
};

/* --- documents --- */

static int check_root(struct domain_reading *r, const struct xml_node *root)
{
	static const char *const needed[] = {"name", "memory", "os"};

	if (strcmp(root->name, "domain") != 0)
		return domain_refuse(r, root, "a libvirt domain is needed, as `virsh dumpxml` prints it", "is no domain");
	for (size_t i = 0; i < ARRAY_LENGTH(needed); i++)
		if (!xml_child(root, needed[i]))
			return domain_refuse(r, root, "`virsh dumpxml DOMAIN` prints whole domains", "it has no <%s>", needed[i]);
	return 0;
}

static int join(struct domain_reading *r, struct buf *text)
{
	int rc = buf_append(text, "[vm]\n", 5, r->err);

	if (!rc && r->vm.length)
		rc = buf_append(text, r->vm.data, r->vm.length, r->err);
	if (!rc && r->disks.length)
		rc = buf_append(text, r->disks.data, r->disks.length, r->err);
	if (!rc && r->nets.length)
		rc = buf_append(text, r->nets.data, r->nets.length, r->err);
	return rc;
}

int domain_translate(struct domain_reading *r, const char *xml, size_t length, const char *connect, struct buf *text)
{
	struct xml_node *root;
	int rc = xml_parse(r->what, xml, length, &root, r->err);

	if (rc)
		return rc;
	rc = check_root(r, root);
	if (!rc)
		rc = domain_walk(r, root, DOMAIN_RULES(domain_rules));
	if (!rc && connect && config_is_local_libvirt(connect))
		rc = domain_put(r, &r->vm, "libvirt", connect);
	else if (!rc && connect && *connect)
		domain_tell(r, root, "files, networks and volumes are looked for on this host");
	if (!rc)
		rc = join(r, text);
	xml_free(root);
	buf_free(&r->vm);
	buf_free(&r->disks);
	buf_free(&r->nets);
	return rc;
}
