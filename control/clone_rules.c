#include "control/clone_rules_internal.h"

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"

#define DEFAULT_PORTS "20000-29999"
#define MAX_POOL      1000000u

static const char *const action_names[ACTIONS] = {"share", "copy", "virtualize", "new", "allocate", "set", "drop", "multiplex"};
static const char *const access_names[] = {"any", "ro", "rw"};

#define BIT(action) (1u << ACTION_##action)

static const struct {
	const char *name;
	unsigned actions; /* that are possible, of what is read only and of what is written */
	const char *hint;
} types[TYPES] = {
	[TYPE_PORT] = {"port", BIT(ALLOCATE) | BIT(SET) | BIT(DROP) | BIT(MULTIPLEX),
		       "allocate FROM-TO, set PORT or drop: a port of the host has one user; or multiplex [ADDRESS:]PORT[:SHARING]"},
	[TYPE_MAC] = {"mac", BIT(NEW) | BIT(SHARE) | BIT(SET), "new, share or set MAC"},
	[TYPE_TAP] = {"tap", BIT(SET) | BIT(ALLOCATE),
		      "set DEVICE or allocate PREFIX:FROM-TO: a tap device has one user"},
	[TYPE_BRIDGE] = {"bridge", BIT(SHARE) | BIT(SET), "share or set BRIDGE"},
	[TYPE_CID] = {"cid", BIT(VIRTUALIZE), "virtualize: each VM has a socket of its own"},
	[TYPE_DISK] = {"disk", BIT(SHARE) | BIT(COPY), "ro share, or rw copy [PATH]: two VMs cannot write one disk"},
	[TYPE_HOSTNAME] = {"hostname", BIT(SET) | BIT(ALLOCATE) | BIT(SHARE),
			   "set NAME, allocate PREFIX:FROM-TO, or share: that of the guest stays"},
	[TYPE_IP] = {"ip", BIT(SET) | BIT(ALLOCATE) | BIT(SHARE), "set ADDRESS/LENGTH, allocate FROM-TO/LENGTH, or share: that of the guest stays"},
	[TYPE_MEMORY] = {"memory", BIT(COPY), "copy: what a clone does not write is shared"},
};

const char *clone_rules_type_name(enum clone_type type) { return types[type].name; }

/* --- reading --- */

int clone_rules_fail(const struct clone_rules *rules, unsigned line, struct err *err, const char *format, ...)
{
	char text[400];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	return err_set(err, ERR_USAGE, EINVAL, "%s:%u: %s", rules->what, line, text);
}

static int find_name(const char *const *names, unsigned count, const char *word)
{
	for (unsigned i = 0; i < count; i++)
		if (!strcmp(names[i], word))
			return (int)i;
	return -1;
}

int clone_rules_type(const char *word)
{
	for (unsigned i = 0; i < TYPES; i++)
		if (!strcmp(types[i].name, word))
			return (int)i;
	return -1;
}

bool clone_rules_range(const char *text, uint32_t most, uint32_t *from, uint32_t *to)
{
	unsigned long a, b;
	char *end;

	if (!isdigit((unsigned char)*text))
		return false;
	a = b = strtoul(text, &end, 10);
	if (*end == '-' && isdigit((unsigned char)end[1]))
		b = strtoul(end + 1, &end, 10);
	*from = (uint32_t)a;
	*to = (uint32_t)b;
	return !*end && a >= 1 && a <= b && b <= most;
}

static int check_variables(const struct clone_rules *rules, const struct clone_rule *rule, struct err *err)
{
	static const char *const known[] = {"<VM>", "<N>", "<UUID>", "<STORE>"};

	for (const char *at = rule->value; (at = strchr(at, '<')); at++) {
		unsigned i = 0;

		while (i < ARRAY_LENGTH(known) && strncmp(at, known[i], strlen(known[i])))
			i++;
		if (i == ARRAY_LENGTH(known)) {
			clone_rules_fail(rules, rule->line, err, "'%.20s' is no variable", at);
			return err_hint(err, "<VM>, <N>, <UUID> and <STORE> are");
		}
	}
	return 0;
}

/* Two addresses of one network. */
static bool read_addresses(struct clone_rule *rule)
{
	const char *dash = strchr(rule->value, '-'), *slash = strchr(rule->value, '/');
	uint8_t from[4], to[4];
	unsigned length;

	if (!dash || !slash || dash > slash)
		return false;
	CLEANUP_FREE char *first = xasprintf("%.*s%s", (int)(dash - rule->value), rule->value, slash);
	if (!config_parse_ip(first, from, &rule->length) || !config_parse_ip(dash + 1, to, &length))
		return false;
	rule->from = get_be32(from);
	rule->to = get_be32(to);
	return rule->from <= rule->to && rule->to - rule->from < MAX_POOL && (rule->from ^ rule->to) >> (32 - rule->length) == 0;
}

static int read_pool(const struct clone_rules *rules, struct clone_rule *rule, struct err *err)
{
	const char *colon = strrchr(rule->value, ':'), *range = colon ? colon + 1 : rule->value;
	bool good = clone_rules_range(range, rule->type == TYPE_PORT ? 65535 : MAX_POOL, &rule->from, &rule->to);

	if (rule->type == TYPE_IP)
		good = read_addresses(rule);
	if (!good || (rule->type == TYPE_PORT || rule->type == TYPE_IP) != (colon == NULL) || strchr(rule->value, '<')) {
		clone_rules_fail(rules, rule->line, err, "'%s' is no pool", rule->value);
		return err_hint(err, rule->type == TYPE_PORT  ? "FROM-TO, for example 20000-20999"
				     : rule->type == TYPE_IP ? "FROM-TO/LENGTH within one network, for example 10.0.0.10-10.0.0.99/24"
				     : rule->type == TYPE_TAP ? "PREFIX:FROM-TO, for example vmtap:0-99"
							      : "PREFIX:FROM-TO, for example web-:1-99");
	}
	rule->prefix = colon ? xasprintf("%.*s", (int)(colon - rule->value), rule->value) : xstrdup("");
	return 0;
}

/* What the words of a rule mean together. */
static int check_rule(const struct clone_rules *rules, struct clone_rule *rule, struct err *err)
{
	bool allowed = types[rule->type].actions & 1u << rule->action;
	bool wants = rule->action == ACTION_SET || rule->action == ACTION_ALLOCATE || rule->action == ACTION_MULTIPLEX;
	bool may = wants || (rule->type == TYPE_DISK && rule->action == ACTION_COPY);

	if (rule->type == TYPE_DISK)
		allowed &= rule->access == (rule->action == ACTION_SHARE ? ACCESS_RO : ACCESS_RW);
	else
		allowed &= rule->access != ACCESS_RO;
	if (!allowed) {
		clone_rules_fail(rules, rule->line, err, "%s %s %s is not possible", types[rule->type].name,
		     access_names[rule->access], action_names[rule->action]);
		return err_hint(err, "%s", types[rule->type].hint);
	}
	if (wants != (rule->value[0] != '\0') && (wants || !may)) {
		clone_rules_fail(rules, rule->line, err, wants ? "%s %s: the value is missing" : "%s %s: takes no value",
		     types[rule->type].name, action_names[rule->action]);
		return err_hint(err, "%s", types[rule->type].hint);
	}
	if (rule->type == TYPE_DISK && rule->value[0] && rule->value[0] != '/' &&
	    strncmp(rule->value, "<STORE>", 7) != 0) {
		clone_rules_fail(rules, rule->line, err, "'%s' is no absolute path", rule->value);
		return err_hint(err, "for example <STORE>/vms/<VM>/root.qcow2");
	}
	int rc = check_variables(rules, rule, err);
	/* A multiplexer reaches each clone by a port of its own. */
	if (!rc && rule->action == ACTION_MULTIPLEX)
		clone_rules_range(DEFAULT_PORTS, 65535, &rule->from, &rule->to);
	return rc || rule->action != ACTION_ALLOCATE ? rc : read_pool(rules, rule, err);
}

static int check_contradiction(const struct clone_rules *rules, const struct clone_rule *rule, struct err *err)
{
	for (unsigned i = 0; i < rules->count; i++) {
		const struct clone_rule *other = &rules->list[i];

		if (other->type != rule->type || strcmp(other->name, rule->name) ||
		    (other->access != rule->access && other->access != ACCESS_ANY && rule->access != ACCESS_ANY))
			continue;
		clone_rules_fail(rules, rule->line, err, "contradicts line %u: both are about %s%s%s", other->line,
		     types[rule->type].name, *rule->name ? ":" : "", rule->name);
		return err_hint(err, "leave one of them out");
	}
	return 0;
}

static int read_words(struct clone_rules *rules, struct clone_rule *rule, char *line, struct err *err)
{
	char *save, *what = strtok_r(line, " \t\r", &save), *access = strtok_r(NULL, " \t\r", &save),
		    *action = strtok_r(NULL, " \t\r", &save);
	char *value = strtok_r(NULL, " \t\r", &save), *more = strtok_r(NULL, " \t\r", &save);
	char *name = strchr(what, ':');

	if (name)
		*name++ = '\0';
	rule->name = xstrdup(name ? name : "");
	rule->value = xstrdup(value ? value : "");
	int type = clone_rules_type(what);
	if (type < 0) {
		clone_rules_fail(rules, rule->line, err, "'%s' is no type of resource", what);
		return err_hint(err,
				"port, mac, ip, tap, bridge, cid, disk, hostname or memory; uuid and generation id are always new, PCI addresses stay");
	}
	int mode = access ? find_name(access_names, ARRAY_LENGTH(access_names), access) : -1;
	int does = action ? find_name(action_names, ACTIONS, action) : -1;
	if (mode < 0 || does < 0 || more || (name && !*name)) {
		clone_rules_fail(rules, rule->line, err,
		     more		  ? "'%s' is one word too many"
		     : mode < 0 && access ? "'%s' is no access"
		     : does < 0 && action ? "'%s' is no action"
					  : "something is missing behind '%s'",
		     more		  ? more
		     : mode < 0 && access ? access
		     : does < 0 && action ? action
					  : what);
		return err_hint(err,
				"TYPE[:NAME] any|ro|rw ACTION [VALUE], for example port:lan any allocate 20000-20999");
	}
	rule->type = (enum clone_type)type;
	rule->access = (enum clone_access)mode;
	rule->action = (enum clone_action)does;
	int rc = check_rule(rules, rule, err);
	return rc ? rc : check_contradiction(rules, rule, err);
}

static bool is_blank(const char *line) { return line[strspn(line, " \t\r")] == '\0'; }

static int read_line(struct clone_rules *rules, unsigned number, char *line, struct err *err)
{
	struct clone_rule *rule = &rules->list[rules->count];

	line[strcspn(line, "#")] = '\0';
	if (is_blank(line))
		return 0;
	if (rules->count == CLONE_MAX_RULES)
		return clone_rules_fail(rules, number, err, "more than %u rules", CLONE_MAX_RULES);
	*rule = (struct clone_rule){.line = number};
	int rc = read_words(rules, rule, line, err);
	rules->count++; /* also a bad one, to be freed */
	return rc;
}

/* Where no other rule says more. */
static void add_default(struct clone_rules *rules)
{
	struct clone_rule *rule = &rules->list[rules->count++];

	for (unsigned i = 0; i + 1 < rules->count; i++)
		if (rules->list[i].type == TYPE_PORT && !*rules->list[i].name) {
			rules->count--;
			return;
		}
	*rule = (struct clone_rule){.type = TYPE_PORT,
			      .action = ACTION_ALLOCATE,
			      .name = xstrdup(""),
			      .value = xstrdup(DEFAULT_PORTS),
			      .prefix = xstrdup("")};
	clone_rules_range(rule->value, 65535, &rule->from, &rule->to);
}

int clone_rules_read(const char *what, const char *text, struct clone_rules **out, struct err *err)
{
	struct clone_rules *rules = xcalloc(1, sizeof(*rules));
	CLEANUP_FREE char *copy = xstrdup(text);
	char *rest = copy, *line;
	int rc = 0;

	rules->what = xstrdup(what);
	for (unsigned number = 1; !rc && (line = strsep(&rest, "\n")); number++)
		rc = read_line(rules, number, line, err);
	if (rc) {
		clone_rules_free(rules);
		return rc;
	}
	add_default(rules);
	*out = rules;
	return 0;
}

void clone_rules_free(struct clone_rules *rules)
{
	for (unsigned i = 0; rules && i < rules->count; i++) {
		free(rules->list[i].name);
		free(rules->list[i].value);
		free(rules->list[i].prefix);
	}
	if (rules)
		free(rules->what);
	free(rules);
}
