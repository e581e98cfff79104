/* Rules against a machine's configuration: which holds for what, whether they can be applied, and applying them. */
#include <ctype.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "control/clone_rules_internal.h"
#include "control/identity.h"

/* --- which rule is whose --- */

/* "lan" is the card of "lan/tcp/80", and that the port of "lan/tcp/80#2". */
static bool names(const struct clone_rule *rule, enum clone_type type, const char *name)
{
	size_t length = strlen(rule->name);

	return rule->type == type && strncmp(name, rule->name, length) == 0 &&
	       (length == 0 || strchr("/#", name[length]));
}

static const struct clone_rule *find_rule(const struct clone_rules *rules, enum clone_type type, const char *name, bool readonly)
{
	const struct clone_rule *best = NULL;

	for (unsigned i = 0; i < rules->count; i++) {
		const struct clone_rule *rule = &rules->list[i];

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

static const struct clone_rule *rule_of(const struct clone_rules *rules, const struct machine_config *config,
				  const struct store_resource *resource)
{
	int type = clone_rules_type(resource->type);

	return type < 0 ? NULL
			: find_rule(rules, (enum clone_type)type, resource->name,
				    type == TYPE_DISK && config && is_readonly(config, resource->name));
}

int clone_rules_blame(const struct clone_rules *rules, const struct store_resource *resource, struct err *err)
{
	const struct clone_rule *rule = rule_of(rules, NULL, resource);

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

static int check_resource(const struct clone_rules *rules, const struct clone_rule *rule,
			  const struct store_resource *resource, unsigned count, struct err *err)
{
	if (!rule && !strcmp(resource->type, "tap")) {
		err_set(err, ERR_USAGE, EINVAL, "%s %s: %s can be neither shared nor virtualised: it has one user",
			resource->type, resource->name, resource->host);
		return err_hint(err, "say which the clones get: a rule such as `tap:%s rw set vmtap<N>`",
				resource->name);
	}
	if (rule && rule->action == ACTION_MULTIPLEX && strncmp(resource->guest, "tcp:", 4) != 0) {
		clone_rules_fail(rules, rule->line, err, "%s %s: only ports of TCP can be multiplexed", resource->type, resource->name);
		return err_hint(err, "name the port: port:CARD/tcp/PORT any multiplex ...");
	}
	bool unlike = resource->exclusive || (rule && (rule->type == TYPE_HOSTNAME || rule->type == TYPE_IP));
	bool same = rule && count > 1 && rule->value[0] && !differs(rule->value) &&
		    ((rule->action == ACTION_SET && unlike) || rule->action == ACTION_COPY);
	if (!same)
		return 0;
	clone_rules_fail(rules, rule->line, err, "%s %s: all %u clones would get '%s'", resource->type, resource->name, count,
	     rule->value);
	return err_hint(err, "<N> or <VM> in it makes it another one in each");
}

/* Also what is multiplexed: behind the port that is shared each has one of its own. */
static bool allocates(const struct clone_rule *rule) { return rule->action == ACTION_ALLOCATE || rule->action == ACTION_MULTIPLEX; }

/* Each rule's pool against all that is to come out of it. */
static int check_pools(const struct clone_rules *rules, const struct machine_config *config,
		       const struct store_resource *list, size_t resources, unsigned count, struct err *err)
{
	for (unsigned i = 0; i < rules->count; i++) {
		const struct clone_rule *rule = &rules->list[i];
		uint64_t needed = 0, room = (uint64_t)rule->to - rule->from + 1;

		for (size_t k = 0; allocates(rule) && k < resources; k++)
			needed += rule_of(rules, config, &list[k]) == rule ? count : 0;
		if (rule->action == ACTION_MULTIPLEX && needed > count) {
			clone_rules_fail(rules, rule->line, err, "%llu ports of each clone cannot be one port", (unsigned long long)needed / count);
			return err_hint(err, "name one: port:CARD/tcp/PORT any multiplex ...");
		}
		if (needed <= room)
			continue;
		CLEANUP_FREE char *pool = rule->type == TYPE_IP ? xstrdup(rule->value) : xasprintf("%u-%u", rule->from, rule->to);
		clone_rules_fail(rules, rule->line, err, "the pool %s has %llu numbers, %llu are needed", pool, (unsigned long long)room, (unsigned long long)needed);
		return err_hint(err, "name a larger range, or fewer clones");
	}
	return 0;
}

/* Whom a rule gives a host name or an address to. */
static int check_agent(const struct clone_rules *rules, const struct machine_config *config, struct err *err)
{
	for (unsigned i = 0; i < rules->count && !config->vsock_cid; i++) {
		if (rules->list[i].type != TYPE_HOSTNAME && rules->list[i].type != TYPE_IP)
			continue;
		clone_rules_fail(rules, rules->list[i].line, err, "nobody would tell the guest its %s: it has no vsock_cid",
				 rules->list[i].type == TYPE_IP ? "address" : "host name");
		return err_hint(err, "the agent in the guest is told over vsock: docs/agent.md");
	}
	return 0;
}

/* The VM's name, as far as it may be a host's. */
static void default_hostname(const char *name, char out[CONFIG_HOSTNAME_BYTES])
{
	size_t length = 0;

	for (; name[length] && length + 1 < CONFIG_HOSTNAME_BYTES; length++)
		out[length] = isalnum((unsigned char)name[length]) ? name[length] : '-';
	while (length && out[length - 1] == '-')
		length--;
	out[length] = '\0';
}

static bool is_allocated(const struct clone_rule *rule) { return rule && rule->action == ACTION_ALLOCATE; }

/* Cards that may get an address; some, until a pool or a rule has given it. */
static void default_ips(struct machine_config *config)
{
	for (unsigned i = 0; i < config->net_count; i++)
		if (config_net_takes_ip(&config->nets[i]) && !config->nets[i].ip_length)
			config->nets[i].ip_length = 32;
}

/* All that VMs of this configuration may have. */
static void list_all(const struct machine_config *config, struct store_resource **list, size_t *count)
{
	struct machine_config copy = *config; /* the list gives addresses to cards that have none */

	if (copy.vsock_cid)
		default_hostname(copy.name, copy.hostname);
	default_ips(&copy);
	identity_list(&copy, "", "", list, count);
}

int clone_rules_check_names(const struct clone_rules *rules, const struct machine_config *const *configs, unsigned config_count, struct err *err)
{
	struct store_resource *list = NULL;
	size_t resources = 0;
	int rc = 0;

	for (unsigned i = 0; i < config_count; i++)
		list_all(configs[i], &list, &resources);
	for (unsigned i = 0; !rc && i < rules->count; i++) {
		const struct clone_rule *rule = &rules->list[i];
		bool found = !*rule->name;

		for (size_t k = 0; k < resources; k++)
			found |= clone_rules_type(list[k].type) == (int)rule->type && names(rule, rule->type, list[k].name);
		if (found)
			continue;
		clone_rules_fail(rules, rule->line, err, "the VM has no %s %s", clone_rules_type_name(rule->type), rule->name);
		rc = err_hint(err, "`vmcp show VM --resources` lists what a running VM has");
	}
	store_resources_free_list(list, resources);
	return rc ? -EINVAL : 0;
}

int clone_rules_check(const struct clone_rules *rules, const struct machine_config *config, unsigned count,
		      struct err *err)
{
	struct store_resource *list = NULL;
	size_t resources = 0;

	list_all(config, &list, &resources);
	int rc = check_agent(rules, config, err);
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
static int set_card(const struct clone_rules *rules, const struct clone_rule *rule, struct machine_config *config,
		    const char *card, const char *key, const struct clone_variables *variables, struct err *err)
{
	CLEANUP_FREE char *value = expand(rule->value, variables);
	CLEANUP_FREE char *setting = xasprintf("%s:%s=%s", card, key, value);
	int rc = strchr(value, ',') ? err_set(err, ERR_USAGE, EINVAL, "'%s' holds a comma", value)
				    : config_set_nets(config, setting, err);

	return rc ? err_prefix(err, "%s:%u", rules->what, rule->line) : 0;
}

static int set_port(const struct clone_rules *rules, const struct clone_rule *rule, struct net_forward *forward,
		    const struct clone_variables *variables, struct err *err)
{
	CLEANUP_FREE char *value = expand(rule->value, variables);
	uint32_t from, to;

	if (!clone_rules_range(value, 65535, &from, &to) || from != to)
		return clone_rules_fail(rules, rule->line, err, "'%s' is no port", value);
	forward->host_port = (uint16_t)from;
	return 0;
}

/* What is shared of a port that goes. */
static void drop_shared(struct config_net *net, uint16_t guest_port)
{
	unsigned kept = 0;

	for (unsigned i = 0; i < net->shared_count; i++)
		if (net->shared[i].guest_port != guest_port)
			net->shared[kept++] = net->shared[i];
	net->shared_count = kept;
}

static const struct clone_rule *rule_of_port(const struct clone_rules *rules, const struct config_net *net, const struct net_forward *forward)
{
	char name[CONFIG_NAME_BYTES + 32];

	snprintf(name, sizeof(name), "%s/%s/%u", net->name, forward->udp ? "udp" : "tcp", forward->guest_port);
	return find_rule(rules, TYPE_PORT, name, false);
}

/* [ADDRESS:]PORT[:SHARING] becomes tcp:[ADDRESS:]PORT:GUEST_PORT[:SHARING]. */
static int apply_multiplex(const struct clone_rules *rules, struct machine_config *config, const struct config_net *net,
			   const struct clone_variables *variables, struct err *err)
{
	int rc = 0;

	for (unsigned i = 0; !rc && i < net->forward_count; i++) {
		const struct clone_rule *rule = rule_of_port(rules, net, &net->forwards[i]);
		const char *colon = strrchr(rule->value, ':');
		bool named = colon && isalpha((unsigned char)colon[1]);

		if (rule->action != ACTION_MULTIPLEX)
			continue;
		struct clone_rule set = *rule;
		set.value = xasprintf("tcp:%.*s:%u%s", (int)(named ? colon - rule->value : (ptrdiff_t)strlen(rule->value)), rule->value,
				      net->forwards[i].guest_port, named ? colon : "");
		rc = set_card(rules, &set, config, net->name, "multiplex", variables, err);
		free(set.value);
	}
	return rc;
}

static int apply_ports(const struct clone_rules *rules, struct config_net *net, const struct clone_variables *variables,
		       struct err *err)
{
	unsigned kept = 0;
	int rc = 0;

	for (unsigned i = 0; !rc && i < net->forward_count; i++) {
		struct net_forward forward = net->forwards[i];
		const struct clone_rule *rule = rule_of_port(rules, net, &forward);

		if (rule->action == ACTION_DROP) {
			if (!forward.udp)
				drop_shared(net, forward.guest_port);
			continue;
		}
		if (rule->action == ACTION_SET)
			rc = set_port(rules, rule, &forward, variables, err);
		else
			forward.host_port = 0; /* until it is allocated */
		net->forwards[kept++] = forward;
	}
	net->forward_count = rc ? net->forward_count : kept;
	return rc;
}

/* "lan" and "lan@0123abcd" become "lan@4567ef89". */
static void rename_network(struct config_net *net, const char *suffix)
{
	char name[CONFIG_NAME_BYTES];
	size_t length = strcspn(net->network, "@"), room = sizeof(name) - strlen(suffix) - 2;

	snprintf(name, sizeof(name), "%.*s@%s", (int)(length < room ? length : room), net->network, suffix);
	memcpy(net->network, name, sizeof(name));
}

static int apply_card(const struct clone_rules *rules, struct machine_config *config, struct config_net *net,
		      const struct clone_variables *variables, struct err *err)
{
	const struct clone_rule *mac = find_rule(rules, TYPE_MAC, net->name, false),
			  *tap = find_rule(rules, TYPE_TAP, net->name, false),
			  *bridge = find_rule(rules, TYPE_BRIDGE, net->name, false), *ip = find_rule(rules, TYPE_IP, net->name, false);
	int rc = 0;

	if (net->mode == NET_NONE)
		return 0;
	if (net->mode == NET_GROUP && variables->network)
		rename_network(net, variables->network);
	if (mac ? mac->action == ACTION_NEW : !variables->same_addresses)
		net->mac_given = false;
	else if (mac && mac->action == ACTION_SET)
		rc = set_card(rules, mac, config, net->name, "mac", variables, err);
	if (!rc && net->mode == NET_TAP && tap && tap->action == ACTION_SET)
		rc = set_card(rules, tap, config, net->name, "tap", variables, err);
	if (!rc && net->mode == NET_BRIDGE && bridge && bridge->action == ACTION_SET)
		rc = set_card(rules, bridge, config, net->name, "bridge", variables, err);
	if (is_allocated(ip))
		net->ip_length = 0; /* until it is allocated */
	else if (!rc && ip && ip->action == ACTION_SET && config_net_takes_ip(net))
		rc = set_card(rules, ip, config, net->name, "ip", variables, err);
	return rc ? rc : apply_multiplex(rules, config, net, variables, err);
}

/* Only where there is a way to an agent. `share`: what the origin was called, if anything, stays. */
static int apply_hostname(const struct clone_rules *rules, struct machine_config *config, const struct clone_variables *variables, struct err *err)
{
	const struct clone_rule *rule = find_rule(rules, TYPE_HOSTNAME, "vm", false);

	if (!config->vsock_cid || (rule && rule->action == ACTION_SHARE))
		return 0;
	default_hostname(variables->vm, config->hostname); /* where it is allocated: until then */
	if (!rule || rule->action != ACTION_SET)
		return 0;
	CLEANUP_FREE char *value = expand(rule->value, variables);
	if (!config_is_hostname(value))
		return clone_rules_fail(rules, rule->line, err, "'%s' is no host name", value);
	snprintf(config->hostname, sizeof(config->hostname), "%s", value);
	return 0;
}

/* Those that are to be allocated are in the list, too. */
static void expect_ips(const struct clone_rules *rules, struct machine_config *config)
{
	for (unsigned i = 0; i < config->net_count; i++) {
		const struct clone_rule *rule = find_rule(rules, TYPE_IP, config->nets[i].name, false);

		if (is_allocated(rule) && config_net_takes_ip(&config->nets[i]))
			config->nets[i].ip_length = rule->length;
	}
}

/* That the list has a resource of. */
static struct config_net *find_card(struct machine_config *config, const char *name)
{
	unsigned i = 0;

	while (strcmp(config->nets[i].name, name))
		i++;
	return &config->nets[i];
}

static void apply_disk(const struct clone_rules *rules, struct config_disk *disk,
		       const struct clone_variables *variables)
{
	const struct clone_rule *rule = find_rule(rules, TYPE_DISK, disk->name, disk->readonly);

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
	if (!rc)
		rc = apply_hostname(rules, config, variables, err);
	if (rc)
		return rc;
	identity_own_disks(config, variables->store, variables->vm);
	for (unsigned i = 0; i < config->disk_count; i++)
		apply_disk(rules, &config->disks[i], variables);
	expect_ips(rules, config);
	identity_list(config, variables->store, variables->uuid, list, count);
	for (size_t i = first; i < *count; i++) {
		struct store_resource *one = &(*list)[i];
		const struct clone_rule *rule = rule_of(rules, config, one);

		if (!rule || !allocates(rule))
			continue;
		one->pool_from = rule->from;
		one->pool_to = rule->to;
		one->pool_of_ip = rule->type == TYPE_IP;
		if (rule->type == TYPE_TAP || rule->type == TYPE_HOSTNAME || rule->type == TYPE_IP) {
			free(one->host);
			one->host = rule->type == TYPE_IP ? identity_ip_network(find_card(config, one->name)) : xstrdup(rule->prefix);
			one->exclusive = true; /* a number that somebody has is not chosen again */
		}
	}
	return 0;
}

static int settle_hostname(struct machine_config *config, struct store_resource *one, struct err *err)
{
	if (!config_is_hostname(one->host))
		return err_set(err, ERR_USAGE, EINVAL, "hostname: '%s' is none", one->host);
	snprintf(config->hostname, sizeof(config->hostname), "%s", one->host);
	free(one->guest);
	one->guest = xstrdup(one->host);
	return 0;
}

/* NETWORK/ADDRESS becomes ADDRESS/LENGTH. */
static void settle_ip(struct machine_config *config, struct store_resource *one)
{
	struct config_net *net = find_card(config, one->name);
	char *ip = xasprintf("%s/%u", strrchr(one->host, '/') + 1, net->ip_length);

	config_parse_ip(ip, net->ip, &net->ip_length);
	free(one->guest);
	one->guest = ip;
}

int clone_rules_settle(struct machine_config *config, struct store_resource *list, size_t count, struct err *err)
{
	size_t at = 0;
	int rc = 0;

	for (size_t i = 0; !rc && i < count; i++) {
		if (!strcmp(list[i].type, "hostname"))
			rc = settle_hostname(config, &list[i], err);
		else if (!strcmp(list[i].type, IDENTITY_IP))
			settle_ip(config, &list[i]);
	}
	if (rc)
		return rc;
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
		at += net->mode == NET_BRIDGE || net->mode == NET_LIBVIRT || net->mode == NET_GROUP;
		for (unsigned k = 0; k < net->forward_count && at < count; k++, at++)
			net->forwards[k].host_port = (uint16_t)strtoul(strrchr(list[at].host, ':') + 1, NULL, 10);
	}
	return 0;
}
