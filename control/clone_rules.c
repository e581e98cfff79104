#include "control/clone_rules.h"

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "control/identity.h"

#define MAX_RULES     256u
#define DEFAULT_PORTS "20000-29999"

enum type { TYPE_PORT, TYPE_MAC, TYPE_TAP, TYPE_BRIDGE, TYPE_CID, TYPE_DISK, TYPE_MEMORY, TYPES };
enum access { ACCESS_ANY, ACCESS_RO, ACCESS_RW };
enum action {
	ACTION_SHARE,
	ACTION_COPY,
	ACTION_VIRTUALIZE,
	ACTION_NEW,
	ACTION_ALLOCATE,
	ACTION_SET,
	ACTION_DROP,
	ACTIONS
};

static const char *const action_names[ACTIONS] = {"share", "copy", "virtualize", "new", "allocate", "set", "drop"};
static const char *const access_names[] = {"any", "ro", "rw"};

#define BIT(action) (1u << ACTION_##action)

static const struct {
	const char *name;
	unsigned actions; /* that are possible, of what is read only and of what is written */
	const char *hint;
} types[TYPES] = {
	[TYPE_PORT] = {"port", BIT(ALLOCATE) | BIT(SET) | BIT(DROP),
		       "allocate FROM-TO, set PORT or drop: a port of the host has one user"},
	[TYPE_MAC] = {"mac", BIT(NEW) | BIT(SHARE) | BIT(SET), "new, share or set MAC"},
	[TYPE_TAP] = {"tap", BIT(SET) | BIT(ALLOCATE),
		      "set DEVICE or allocate PREFIX:FROM-TO: a tap device has one user"},
	[TYPE_BRIDGE] = {"bridge", BIT(SHARE) | BIT(SET), "share or set BRIDGE"},
	[TYPE_CID] = {"cid", BIT(VIRTUALIZE), "virtualize: each VM has a socket of its own"},
	[TYPE_DISK] = {"disk", BIT(SHARE) | BIT(COPY), "ro share, or rw copy [PATH]: two VMs cannot write one disk"},
	[TYPE_MEMORY] = {"memory", BIT(COPY), "copy: what a clone does not write is shared"},
};

struct rule {
	unsigned line;
	enum type type;
	char *name; /* "": all of the type */
	enum access access;
	enum action action;
	char *value;  /* "" if none; variables are in it as they were written */
	char *prefix; /* of `allocate`, with the next two */
	uint32_t from, to;
};

struct clone_rules {
	char *what;
	struct rule list[MAX_RULES + 1]; /* the last is the default of ports */
	unsigned count;
};

/* --- reading --- */

static int fail(const struct clone_rules *rules, unsigned line, struct err *err, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
static int fail(const struct clone_rules *rules, unsigned line, struct err *err, const char *format, ...)
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

static int find_type(const char *word)
{
	for (unsigned i = 0; i < TYPES; i++)
		if (!strcmp(types[i].name, word))
			return (int)i;
	return -1;
}

/* "20000-29999" */
static bool parse_range(const char *text, uint32_t most, uint32_t *from, uint32_t *to)
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

static int check_variables(const struct clone_rules *rules, const struct rule *rule, struct err *err)
{
	static const char *const known[] = {"<VM>", "<N>", "<UUID>", "<STORE>"};

	for (const char *at = rule->value; (at = strchr(at, '<')); at++) {
		unsigned i = 0;

		while (i < ARRAY_LENGTH(known) && strncmp(at, known[i], strlen(known[i])))
			i++;
		if (i == ARRAY_LENGTH(known)) {
			fail(rules, rule->line, err, "'%.20s' is no variable", at);
			return err_hint(err, "<VM>, <N>, <UUID> and <STORE> are");
		}
	}
	return 0;
}

static int read_pool(const struct clone_rules *rules, struct rule *rule, struct err *err)
{
	const char *colon = strrchr(rule->value, ':'), *range = colon ? colon + 1 : rule->value;
	bool good = parse_range(range, rule->type == TYPE_PORT ? 65535 : 1000000, &rule->from, &rule->to);

	if (!good || (rule->type == TYPE_PORT) != (colon == NULL) || strchr(rule->value, '<')) {
		fail(rules, rule->line, err, "'%s' is no pool", rule->value);
		return err_hint(err, rule->type == TYPE_PORT ? "FROM-TO, for example 20000-20999"
							     : "PREFIX:FROM-TO, for example vmtap:0-99");
	}
	rule->prefix = colon ? xasprintf("%.*s", (int)(colon - rule->value), rule->value) : xstrdup("");
	return 0;
}

/* What the words of a rule mean together. */
static int check_rule(const struct clone_rules *rules, struct rule *rule, struct err *err)
{
	bool allowed = types[rule->type].actions & 1u << rule->action;
	bool wants = rule->action == ACTION_SET || rule->action == ACTION_ALLOCATE;
	bool may = wants || (rule->type == TYPE_DISK && rule->action == ACTION_COPY);

	if (rule->type == TYPE_DISK)
		allowed &= rule->access == (rule->action == ACTION_SHARE ? ACCESS_RO : ACCESS_RW);
	else
		allowed &= rule->access != ACCESS_RO;
	if (!allowed) {
		fail(rules, rule->line, err, "%s %s %s is not possible", types[rule->type].name,
		     access_names[rule->access], action_names[rule->action]);
		return err_hint(err, "%s", types[rule->type].hint);
	}
	if (wants != (rule->value[0] != '\0') && (wants || !may)) {
		fail(rules, rule->line, err, wants ? "%s %s: the value is missing" : "%s %s: takes no value",
		     types[rule->type].name, action_names[rule->action]);
		return err_hint(err, "%s", types[rule->type].hint);
	}
	if (rule->type == TYPE_DISK && rule->value[0] && rule->value[0] != '/' &&
	    strncmp(rule->value, "<STORE>", 7) != 0) {
		fail(rules, rule->line, err, "'%s' is no absolute path", rule->value);
		return err_hint(err, "for example <STORE>/vms/<VM>/root.qcow2");
	}
	int rc = check_variables(rules, rule, err);
	return rc || rule->action != ACTION_ALLOCATE ? rc : read_pool(rules, rule, err);
}

static int check_contradiction(const struct clone_rules *rules, const struct rule *rule, struct err *err)
{
	for (unsigned i = 0; i < rules->count; i++) {
		const struct rule *other = &rules->list[i];

		if (other->type != rule->type || strcmp(other->name, rule->name) ||
		    (other->access != rule->access && other->access != ACCESS_ANY && rule->access != ACCESS_ANY))
			continue;
		fail(rules, rule->line, err, "contradicts line %u: both are about %s%s%s", other->line,
		     types[rule->type].name, *rule->name ? ":" : "", rule->name);
		return err_hint(err, "leave one of them out");
	}
	return 0;
}

static int read_words(struct clone_rules *rules, struct rule *rule, char *line, struct err *err)
{
	char *save, *what = strtok_r(line, " \t\r", &save), *access = strtok_r(NULL, " \t\r", &save),
		    *action = strtok_r(NULL, " \t\r", &save);
	char *value = strtok_r(NULL, " \t\r", &save), *more = strtok_r(NULL, " \t\r", &save);
	char *name = strchr(what, ':');

	if (name)
		*name++ = '\0';
	rule->name = xstrdup(name ? name : "");
	rule->value = xstrdup(value ? value : "");
	int type = find_type(what);
	if (type < 0) {
		fail(rules, rule->line, err, "'%s' is no type of resource", what);
		return err_hint(err,
				"port, mac, tap, bridge, cid, disk or memory; uuid and generation id are always new");
	}
	int mode = access ? find_name(access_names, ARRAY_LENGTH(access_names), access) : -1;
	int does = action ? find_name(action_names, ACTIONS, action) : -1;
	if (mode < 0 || does < 0 || more || (name && !*name)) {
		fail(rules, rule->line, err,
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
	rule->type = (enum type)type;
	rule->access = (enum access)mode;
	rule->action = (enum action)does;
	int rc = check_rule(rules, rule, err);
	return rc ? rc : check_contradiction(rules, rule, err);
}

static bool is_blank(const char *line) { return line[strspn(line, " \t\r")] == '\0'; }

static int read_line(struct clone_rules *rules, unsigned number, char *line, struct err *err)
{
	struct rule *rule = &rules->list[rules->count];

	line[strcspn(line, "#")] = '\0';
	if (is_blank(line))
		return 0;
	if (rules->count == MAX_RULES)
		return fail(rules, number, err, "more than %u rules", MAX_RULES);
	*rule = (struct rule){.line = number};
	int rc = read_words(rules, rule, line, err);
	rules->count++; /* also a bad one, to be freed */
	return rc;
}

/* Where no other rule says more. */
static void add_default(struct clone_rules *rules)
{
	struct rule *rule = &rules->list[rules->count++];

	for (unsigned i = 0; i + 1 < rules->count; i++)
		if (rules->list[i].type == TYPE_PORT && !*rules->list[i].name) {
			rules->count--;
			return;
		}
	*rule = (struct rule){.type = TYPE_PORT,
			      .action = ACTION_ALLOCATE,
			      .name = xstrdup(""),
			      .value = xstrdup(DEFAULT_PORTS),
			      .prefix = xstrdup("")};
	parse_range(rule->value, 65535, &rule->from, &rule->to);
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

/* --- which rule is whose --- */

/* "lan" is the card of "lan/tcp/80", and that the port of "lan/tcp/80#2". */
static bool names(const struct rule *rule, enum type type, const char *name)
{
	size_t length = strlen(rule->name);

	return rule->type == type && strncmp(name, rule->name, length) == 0 &&
	       (length == 0 || strchr("/#", name[length]));
}

static const struct rule *find_rule(const struct clone_rules *rules, enum type type, const char *name, bool readonly)
{
	const struct rule *best = NULL;

	for (unsigned i = 0; i < rules->count; i++) {
		const struct rule *rule = &rules->list[i];

		if (!names(rule, type, name) || rule->access == (readonly ? ACCESS_RW : ACCESS_RO))
			continue;
		if (!best || strlen(rule->name) > strlen(best->name))
			best = rule;
	}
	return best;
}

static bool is_readonly(const struct machine_config *config, const char *disk)
{
	for (unsigned i = 0; i < config->disk_count; i++)
		if (!strcmp(config->disks[i].name, disk))
			return config->disks[i].readonly;
	return false;
}

static const struct rule *rule_of(const struct clone_rules *rules, const struct machine_config *config,
				  const struct store_resource *resource)
{
	int type = find_type(resource->type);

	return type < 0 ? NULL
			: find_rule(rules, (enum type)type, resource->name,
				    type == TYPE_DISK && config && is_readonly(config, resource->name));
}

int clone_rules_blame(const struct clone_rules *rules, const struct store_resource *resource, struct err *err)
{
	const struct rule *rule = rule_of(rules, NULL, resource);

	if (rule && rule->line)
		return err_prefix(err, "%s:%u", rules->what, rule->line);
	err_prefix(err, "%s %s", resource->type, resource->name);
	return err_hint(err, "another rule for it helps: `--rules FILE`");
}

/* --- checking --- */

static bool differs(const char *value)
{
	return strstr(value, "<VM>") || strstr(value, "<N>") || strstr(value, "<UUID>");
}

static int check_resource(const struct clone_rules *rules, const struct rule *rule,
			  const struct store_resource *resource, unsigned count, struct err *err)
{
	if (!rule && !strcmp(resource->type, "tap")) {
		err_set(err, ERR_USAGE, EINVAL, "%s %s: %s can be neither shared nor virtualised: it has one user",
			resource->type, resource->name, resource->host);
		return err_hint(err, "say which the clones get: a rule such as `tap:%s rw set vmtap<N>`",
				resource->name);
	}
	bool same = rule && count > 1 && rule->value[0] && !differs(rule->value) &&
		    ((rule->action == ACTION_SET && resource->exclusive) || rule->action == ACTION_COPY);
	if (!same)
		return 0;
	fail(rules, rule->line, err, "%s %s: all %u clones would get '%s'", resource->type, resource->name, count,
	     rule->value);
	return err_hint(err, "<N> or <VM> in it makes it another one in each");
}

/* Each rule's pool against all that is to come out of it. */
static int check_pools(const struct clone_rules *rules, const struct machine_config *config,
		       const struct store_resource *list, size_t resources, unsigned count, struct err *err)
{
	for (unsigned i = 0; i < rules->count; i++) {
		const struct rule *rule = &rules->list[i];
		uint64_t needed = 0, room = (uint64_t)rule->to - rule->from + 1;

		for (size_t k = 0; rule->action == ACTION_ALLOCATE && k < resources; k++)
			needed += rule_of(rules, config, &list[k]) == rule ? count : 0;
		if (needed <= room)
			continue;
		fail(rules, rule->line, err, "the pool %s has %llu numbers, %llu are needed", rule->value,
		     (unsigned long long)room, (unsigned long long)needed);
		return err_hint(err, "name a larger range, or fewer clones");
	}
	return 0;
}

/* A rule about something that is not there is a mistake. */
static int check_names(const struct clone_rules *rules, const struct store_resource *list, size_t resources,
		       struct err *err)
{
	for (unsigned i = 0; i < rules->count; i++) {
		const struct rule *rule = &rules->list[i];
		bool found = !*rule->name;

		for (size_t k = 0; k < resources; k++)
			found |= find_type(list[k].type) == (int)rule->type && names(rule, rule->type, list[k].name);
		if (found)
			continue;
		fail(rules, rule->line, err, "the VM has no %s %s", types[rule->type].name, rule->name);
		return err_hint(err, "`vmcp show VM --resources` lists what a running VM has");
	}
	return 0;
}

int clone_rules_check(const struct clone_rules *rules, const struct machine_config *config, unsigned count,
		      struct err *err)
{
	struct machine_config copy = *config; /* the list gives addresses to cards that have none */
	struct store_resource *list = NULL;
	size_t resources = 0;

	identity_list(&copy, "", "", &list, &resources);
	int rc = check_names(rules, list, resources, err);
	for (size_t i = 0; !rc && i < resources; i++)
		rc = check_resource(rules, rule_of(rules, config, &list[i]), &list[i], count, err);
	if (!rc)
		rc = check_pools(rules, config, list, resources, count, err);
	store_resources_free_list(list, resources);
	return rc;
}

/* --- applying --- */

static char *expand(const char *value, const struct clone_variables *variables)
{
	char number[16];
	const char *const pairs[][2] = {
		{"<VM>", variables->vm}, {"<N>", number}, {"<UUID>", variables->uuid}, {"<STORE>", variables->store}};
	char *out = xstrdup("");

	snprintf(number, sizeof(number), "%u", variables->number);
	while (*value) {
		size_t plain = strcspn(value, "<"), i = 0;
		char *longer = xasprintf("%s%.*s", out, (int)plain, value);

		free(out);
		out = longer;
		value += plain;
		while (*value && i < ARRAY_LENGTH(pairs) && strncmp(value, pairs[i][0], strlen(pairs[i][0])))
			i++;
		if (!*value || i == ARRAY_LENGTH(pairs))
			break; /* all variables are known since the rules were read */
		longer = xasprintf("%s%s", out, pairs[i][1]);
		free(out);
		out = longer;
		value += strlen(pairs[i][0]);
	}
	return out;
}

/* As if it stood in guest.cfg. */
static int set_card(const struct clone_rules *rules, const struct rule *rule, struct machine_config *config,
		    const char *card, const char *key, const struct clone_variables *variables, struct err *err)
{
	CLEANUP_FREE char *value = expand(rule->value, variables);
	CLEANUP_FREE char *setting = xasprintf("%s:%s=%s", card, key, value);
	int rc = strchr(value, ',') ? err_set(err, ERR_USAGE, EINVAL, "'%s' holds a comma", value)
				    : config_set_nets(config, setting, err);

	return rc ? err_prefix(err, "%s:%u", rules->what, rule->line) : 0;
}

static int set_port(const struct clone_rules *rules, const struct rule *rule, struct net_forward *forward,
		    const struct clone_variables *variables, struct err *err)
{
	CLEANUP_FREE char *value = expand(rule->value, variables);
	uint32_t from, to;

	if (!parse_range(value, 65535, &from, &to) || from != to)
		return fail(rules, rule->line, err, "'%s' is no port", value);
	forward->host_port = (uint16_t)from;
	return 0;
}

static int apply_ports(const struct clone_rules *rules, struct config_net *net, const struct clone_variables *variables,
		       struct err *err)
{
	unsigned kept = 0;
	int rc = 0;

	for (unsigned i = 0; !rc && i < net->forward_count; i++) {
		struct net_forward forward = net->forwards[i];
		char name[CONFIG_NAME_BYTES + 32];

		snprintf(name, sizeof(name), "%s/%s/%u", net->name, forward.udp ? "udp" : "tcp", forward.guest_port);
		const struct rule *rule = find_rule(rules, TYPE_PORT, name, false);
		if (rule->action == ACTION_DROP)
			continue;
		if (rule->action == ACTION_SET)
			rc = set_port(rules, rule, &forward, variables, err);
		else
			forward.host_port = 0; /* until it is allocated */
		net->forwards[kept++] = forward;
	}
	net->forward_count = rc ? net->forward_count : kept;
	return rc;
}

static int apply_card(const struct clone_rules *rules, struct machine_config *config, struct config_net *net,
		      const struct clone_variables *variables, struct err *err)
{
	const struct rule *mac = find_rule(rules, TYPE_MAC, net->name, false),
			  *tap = find_rule(rules, TYPE_TAP, net->name, false),
			  *bridge = find_rule(rules, TYPE_BRIDGE, net->name, false);
	int rc = 0;

	if (net->mode == NET_NONE)
		return 0;
	if (!mac || mac->action == ACTION_NEW)
		net->mac_given = false;
	else if (mac->action == ACTION_SET)
		rc = set_card(rules, mac, config, net->name, "mac", variables, err);
	if (!rc && net->mode == NET_TAP && tap && tap->action == ACTION_SET)
		rc = set_card(rules, tap, config, net->name, "tap", variables, err);
	if (!rc && net->mode == NET_BRIDGE && bridge && bridge->action == ACTION_SET)
		rc = set_card(rules, bridge, config, net->name, "bridge", variables, err);
	return rc;
}

static void apply_disk(const struct clone_rules *rules, struct config_disk *disk,
		       const struct clone_variables *variables)
{
	const struct rule *rule = find_rule(rules, TYPE_DISK, disk->name, disk->readonly);

	if (disk->readonly || !rule || !rule->value[0])
		return;
	free(disk->path);
	disk->path = expand(rule->value, variables);
}

int clone_rules_apply(const struct clone_rules *rules, struct machine_config *config,
		      const struct clone_variables *variables, struct store_resource **list, size_t *count,
		      struct err *err)
{
	size_t first = *count;
	int rc = 0;

	for (unsigned i = 0; !rc && i < config->net_count; i++)
		rc = apply_card(rules, config, &config->nets[i], variables, err);
	/* Behind all that looks whether ports of two cards are the same. */
	for (unsigned i = 0; !rc && i < config->net_count; i++)
		rc = apply_ports(rules, &config->nets[i], variables, err);
	if (rc)
		return rc;
	identity_own_disks(config, variables->store, variables->vm);
	for (unsigned i = 0; i < config->disk_count; i++)
		apply_disk(rules, &config->disks[i], variables);
	identity_list(config, variables->store, variables->uuid, list, count);
	for (size_t i = first; i < *count; i++) {
		struct store_resource *one = &(*list)[i];
		const struct rule *rule = rule_of(rules, config, one);

		if (!rule || rule->action != ACTION_ALLOCATE)
			continue;
		one->pool_from = rule->from;
		one->pool_to = rule->to;
		if (rule->type == TYPE_TAP) {
			free(one->host);
			one->host = xstrdup(rule->prefix);
		}
	}
	return 0;
}

int clone_rules_settle(struct machine_config *config, const struct store_resource *list, size_t count, struct err *err)
{
	size_t at = 0;

	for (unsigned i = 0; i < config->net_count; i++) {
		struct config_net *net = &config->nets[i];

		for (; at < count && strcmp(list[at].type, "mac") && strcmp(list[at].type, "tap") &&
		       strcmp(list[at].type, "port");)
			at++;
		if (net->mode == NET_NONE)
			continue;
		at++; /* its address */
		if (net->mode == NET_TAP && at < count && !strcmp(list[at].type, "tap")) {
			if (strlen(list[at].host) >= sizeof(net->tap))
				return err_set(err, ERR_USAGE, EINVAL,
					       "tap %s: '%s' is no interface name: it is too long", net->name,
					       list[at].host);
			snprintf(net->tap, sizeof(net->tap), "%s", list[at++].host);
		}
		at += net->mode == NET_BRIDGE || net->mode == NET_LIBVIRT;
		for (unsigned k = 0; k < net->forward_count && at < count; k++, at++)
			net->forwards[k].host_port = (uint16_t)strtoul(strrchr(list[at].host, ':') + 1, NULL, 10);
	}
	return 0;
}
