/* [net NAME] of guest.cfg: its keys, and what they mean together. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/size.h"
#include "machine/config_internal.h"

#define MAX_RATE (1ull << 40)

static const char *const mode_names[] = {[NET_NONE] = "none", [NET_USER] = "user", [NET_TAP] = "tap", [NET_BRIDGE] = "bridge", [NET_LIBVIRT] = "libvirt", [NET_GROUP] = "group"};

static const char *const sharing_names[] = {[CONFIG_ROUND_ROBIN] = "round-robin", [CONFIG_LEAST] = "least", [CONFIG_BY_NAME] = "name"};

const char *config_sharing_name(enum config_sharing sharing) { return sharing_names[sharing]; }

const char *config_net_mode_name(enum net_mode mode) { return mode_names[mode]; }

static int set_mode(struct config_reading *r, void *object, const char *key, const char *value)
{
	for (size_t i = 0; i < ARRAY_LENGTH(mode_names); i++)
		if (!strcmp(value, mode_names[i])) {
			((struct config_net *)object)->mode = (enum net_mode)i;
			return 0;
		}
	config_fail(r, key, "'%s' is no network mode", value);
	return err_hint(r->err, "user, tap, bridge, libvirt, group or none");
}

static int set_mac(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct config_net *net = object;
	bool good = strlen(value) == 17 && strspn(value, "0:") < 17;

	for (int i = 0; good && i < 17; i++)
		good = i % 3 == 2 ? value[i] == ':' : isxdigit((unsigned char)value[i]) != 0;
	/* The lowest bit of the first byte marks a group's address. */
	if (good && strchr("02468aceACE", value[1])) {
		for (size_t i = 0; i < sizeof(net->mac); i++)
			net->mac[i] = (uint8_t)strtoul(value + 3 * i, NULL, 16);
		net->mac_given = true;
		return 0;
	}
	config_fail(r, key, "'%s' is no MAC address of a network card", value);
	return err_hint(r->err, "six bytes in hexadecimal, the first one even, for example 52:54:00:12:34:56");
}

/* A number up to `most` at *at, and `end` behind it. */
static bool parse_number(const char **at, unsigned long most, char end, unsigned long *out)
{
	const char *start = *at;

	for (*out = 0; isdigit((unsigned char)**at) && *at - start < 5; (*at)++)
		*out = *out * 10 + (unsigned long)(**at - '0');
	return *at > start && *out <= most && *(*at)++ == end;
}

static bool parse_address(const char **at, char end, uint8_t out[4])
{
	for (int i = 0; i < 4; i++) {
		unsigned long byte;
		if (!parse_number(at, 255, i < 3 ? '.' : end, &byte))
			return false;
		out[i] = (uint8_t)byte;
	}
	return true;
}

/* PROTOCOL:[ADDRESS:]HOST_PORT:GUEST_PORT */
static bool parse_forward(const char *value, struct net_forward *out)
{
	const char *at = value + 4, *colon;
	unsigned long host, guest;

	*out = (struct net_forward){.udp = value[0] == 'u', .host_address = {127, 0, 0, 1}};
	if (strncmp(value, "tcp:", 4) && strncmp(value, "udp:", 4))
		return false;
	colon = strchr(at, ':');
	if (colon && memchr(at, '.', (size_t)(colon - at)) && !parse_address(&at, ':', out->host_address))
		return false;
	if (!parse_number(&at, 65535, ':', &host) || !parse_number(&at, 65535, '\0', &guest) || !host || !guest)
		return false;
	out->host_port = (uint16_t)host;
	out->guest_port = (uint16_t)guest;
	return true;
}

/* Neither that of a network, nor one for all in it (RFC 1122, 3.2.1.3); a prefix of 31 bits has two addresses of cards (RFC 3021). */
bool config_parse_ip(const char *text, uint8_t ip[4], unsigned *length)
{
	unsigned long bits;

	if (!parse_address(&text, '/', ip) || !parse_number(&text, 32, '\0', &bits) || !bits || ip[0] == 0 || ip[0] == 127 || ip[0] >= 224)
		return false;
	uint32_t hosts = bits < 32 ? UINT32_MAX >> bits : 0, host = get_be32(ip) & hosts;
	*length = (unsigned)bits;
	return bits >= 31 || (host != 0 && host != hosts);
}

void config_format_ip(const uint8_t ip[4], unsigned length, char out[CONFIG_IP_BYTES])
{
	snprintf(out, CONFIG_IP_BYTES, "%u.%u.%u.%u/%u", ip[0], ip[1], ip[2], ip[3], length);
}

bool config_net_takes_ip(const struct config_net *net) { return net->mode != NET_NONE && net->mode != NET_USER; }

static int set_ip(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct config_net *net = object;

	if (config_parse_ip(value, net->ip, &net->ip_length))
		return 0;
	config_fail(r, key, "'%s' is no address of a network card", value);
	return err_hint(r->err, "ADDRESS/LENGTH of IPv4, for example 10.0.0.5/24; neither the first nor the last of its network");
}

static int set_forward(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct config_net *net = object;
	struct net_forward forward;

	if (!parse_forward(value, &forward)) {
		config_fail(r, key, "'%s' is no port to forward", value);
		return err_hint(r->err, "PROTOCOL:HOST_PORT:GUEST_PORT, for example tcp:8080:80, or tcp:0.0.0.0:8080:80 for all addresses of the host");
	}
	if (net->forward_count == NET_MAX_FORWARDS) {
		config_fail(r, key, "more than %u ports of one card", NET_MAX_FORWARDS);
		return err_hint(r->err, "leave some out");
	}
	net->forwards[net->forward_count++] = forward;
	return 0;
}

/* tcp:[ADDRESS:]HOST_PORT:GUEST_PORT[:SHARING] */
static bool parse_shared(const char *value, struct config_shared *out)
{
	CLEANUP_FREE char *text = xstrdup(value);
	char *colon = strrchr(text, ':');
	struct net_forward forward;
	size_t sharing = CONFIG_ROUND_ROBIN;

	if (colon && isalpha((unsigned char)colon[1])) {
		*colon = '\0';
		while (sharing < ARRAY_LENGTH(sharing_names) && strcmp(colon + 1, sharing_names[sharing]))
			sharing++;
	}
	if (sharing == ARRAY_LENGTH(sharing_names) || !parse_forward(text, &forward) || forward.udp)
		return false;
	*out = (struct config_shared){.host_port = forward.host_port, .guest_port = forward.guest_port, .sharing = (enum config_sharing)sharing};
	memcpy(out->host_address, forward.host_address, sizeof(out->host_address));
	return true;
}

/* The guest's port is shared at one port of the host: another one takes its place. */
static int set_shared(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct config_net *net = object;
	struct config_shared shared;
	unsigned i = 0;

	if (!parse_shared(value, &shared)) {
		config_fail(r, key, "'%s' is no port to share", value);
		return err_hint(r->err, "tcp:HOST_PORT:GUEST_PORT, for example tcp:8080:80, with :least or :name behind it for another sharing than round-robin");
	}
	while (i < net->shared_count && net->shared[i].guest_port != shared.guest_port)
		i++;
	if (i == CONFIG_MAX_SHARED) {
		config_fail(r, key, "more than %d shared ports of one card", CONFIG_MAX_SHARED);
		return err_hint(r->err, "leave some out");
	}
	net->shared[i] = shared;
	net->shared_count += i == net->shared_count;
	return 0;
}

static int parse_interface(struct config_reading *r, const char *key, const char *value, char out[NET_INTERFACE_BYTES])
{
	if (*value && strlen(value) < NET_INTERFACE_BYTES && !strpbrk(value, "/ \t%") && strcmp(value, ".") && strcmp(value, "..")) {
		snprintf(out, NET_INTERFACE_BYTES, "%s", value);
		return 0;
	}
	config_fail(r, key, "'%s' is no interface name", value);
	return err_hint(r->err, "at most 15 characters, no space, no '/' and no '%%'");
}

static int set_tap(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_interface(r, key, value, ((struct config_net *)object)->tap);
}

static int set_bridge(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_interface(r, key, value, ((struct config_net *)object)->bridge);
}

static int set_network(struct config_reading *r, void *object, const char *key, const char *value)
{
	struct config_net *net = object;

	if (*value && strlen(value) < sizeof(net->network) && !strchr(value, '/')) {
		snprintf(net->network, sizeof(net->network), "%s", value);
		return 0;
	}
	config_fail(r, key, "'%s' is no name of a network", value);
	return err_hint(r->err, "`virsh net-list --all` lists them");
}

static int set_queues(struct config_reading *r, void *object, const char *key, const char *value)
{
	char *end;
	unsigned long queues = strtoul(value, &end, 10);

	if (isdigit((unsigned char)value[0]) && !*end && queues >= 1 && queues <= NET_MAX_PAIRS) {
		((struct config_net *)object)->queues = (unsigned)queues;
		return 0;
	}
	config_fail(r, key, "'%s' is no number of queues", value);
	return err_hint(r->err, "from 1 to %u; as many as the guest has CPUs are of use", NET_MAX_PAIRS);
}

static int parse_rate(struct config_reading *r, const char *key, const char *value, uint64_t *out)
{
	int rc = config_parse_size(r, key, value, out);

	if (rc || *out == 0 || (*out >= 1024 && *out <= MAX_RATE))
		return rc;
	config_fail(r, key, "%s bytes a second are not possible", value);
	return err_hint(r->err, "from 1K to 1024G, or 0 for no limit");
}

static int set_send_rate(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_rate(r, key, value, &((struct config_net *)object)->send_rate);
}

static int set_receive_rate(struct config_reading *r, void *object, const char *key, const char *value)
{
	return parse_rate(r, key, value, &((struct config_net *)object)->receive_rate);
}

/* mode is the first: end_section looks for it. */
const struct config_key config_net_keys[] = {
	{.name = "mode", .set = set_mode},
	{.name = "mac", .set = set_mac},
	{.name = "ip", .set = set_ip},
	{.name = "forward", .set = set_forward, .repeats = true},
	{.name = "multiplex", .set = set_shared, .repeats = true},
	{.name = "tap", .set = set_tap},
	{.name = "bridge", .set = set_bridge},
	{.name = "network", .set = set_network},
	{.name = "queues", .set = set_queues},
	{.name = "send_rate", .set = set_send_rate},
	{.name = "receive_rate", .set = set_receive_rate},
};
const size_t config_net_key_count = ARRAY_LENGTH(config_net_keys);

int config_begin_net(struct config_reading *r, const char *name)
{
	struct machine_config *config = r->config;

	if (config->net_count == CONFIG_MAX_NETS) {
		config_fail(r, "net", "more than %d network cards", CONFIG_MAX_NETS);
		return err_hint(r->err, "leave some out");
	}
	r->net_lines[config->net_count] = r->line;
	r->net = &config->nets[config->net_count++];
	snprintf(r->net->name, sizeof(r->net->name), "%s", name);
	return 0;
}

/* --- what the keys mean together --- */

/* Its name is a folder's. */
static int check_group(struct config_reading *r, const struct config_net *net)
{
	size_t plain = strspn(net->network, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-@");

	if (net->network[0] && !net->network[plain] && isalnum((unsigned char)net->network[0]))
		return 0;
	config_fail(r, "network", net->network[0] ? "'%s' is no name of a group's network in [net %s]" : "is missing%.0s in [net %s]", net->network, net->name);
	return err_hint(r->err, "letters, digits, '.', '_' and '-', a letter or digit first, for example network = backend");
}

static int check_mode(struct config_reading *r, const struct config_net *net)
{
	const char *stray = net->forward_count && net->mode != NET_USER ? "forward"
			    : net->shared_count && net->mode != NET_USER  ? "multiplex"
			    : net->tap[0] && net->mode != NET_TAP	    ? "tap"
			    : net->bridge[0] && net->mode != NET_BRIDGE   ? "bridge"
			    : net->network[0] && net->mode != NET_LIBVIRT && net->mode != NET_GROUP ? "network"
									    : NULL;

	if (net->mode == NET_NONE)
		return 0;
	if (net->ip_length && !config_net_takes_ip(net)) {
		config_fail(r, "ip", "has no meaning with mode = %s in [net %s]", mode_names[net->mode], net->name);
		return err_hint(r->err, "leave it out: the guest is alone in its network, which gives it an address by DHCP");
	}
	if (stray) {
		config_fail(r, stray, "has no meaning with mode = %s in [net %s]", mode_names[net->mode], net->name);
		return err_hint(r->err, "leave it out, or write mode = %s", !strcmp(stray, "forward") || !strcmp(stray, "multiplex") ? "user" : !strcmp(stray, "network") ? "libvirt" : stray);
	}
	if ((net->mode == NET_TAP && !net->tap[0]) || (net->mode == NET_BRIDGE && !net->bridge[0])) {
		config_fail(r, mode_names[net->mode], "is missing in [net %s]", net->name);
		return err_hint(r->err, "name the %s, for example %s = %s", net->mode == NET_TAP ? "tap device" : "bridge", mode_names[net->mode],
				net->mode == NET_TAP ? "vmtap0" : "br0");
	}
	if (net->mode == NET_LIBVIRT && !net->network[0]) {
		config_fail(r, "network", "is missing in [net %s]", net->name);
		return err_hint(r->err, "name libvirt's network, for example network = default");
	}
	return net->mode == NET_GROUP ? check_group(r, net) : 0;
}

/* A multiplexer reaches a VM by a port of its own. */
static int check_shared(struct config_reading *r, const struct config_net *net)
{
	for (unsigned i = 0; net->mode == NET_USER && i < net->shared_count; i++) {
		unsigned k = 0;

		while (k < net->forward_count && (net->forwards[k].udp || net->forwards[k].guest_port != net->shared[i].guest_port))
			k++;
		if (k < net->forward_count)
			continue;
		config_fail(r, "multiplex", "port %u of the guest is not forwarded in [net %s]", net->shared[i].guest_port, net->name);
		return err_hint(r->err, "add forward = tcp:PORT:%u, with a port of the host that is this VM's own", net->shared[i].guest_port);
	}
	return 0;
}

static bool same_place(const struct net_forward *a, const struct net_forward *b)
{
	static const uint8_t all[4] = {0};

	return a->udp == b->udp && a->host_port == b->host_port &&
	       (!memcmp(a->host_address, b->host_address, 4) || !memcmp(a->host_address, all, 4) || !memcmp(b->host_address, all, 4));
}

static const struct net_forward *find_place(const struct config_net *net, unsigned count, const struct net_forward *forward)
{
	for (unsigned i = 0; i < count; i++)
		if (same_place(&net->forwards[i], forward))
			return &net->forwards[i];
	return NULL;
}

/* With a card before it, or with itself. */
static int check_pair(struct config_reading *r, const struct config_net *net, const struct config_net *other)
{
	if (net->mode == NET_NONE || other->mode == NET_NONE)
		return 0;
	for (unsigned i = 0; i < net->forward_count; i++) {
		if (!find_place(other, net == other ? i : other->forward_count, &net->forwards[i]))
			continue;
		config_fail(r, "forward", "port %u of the host is forwarded twice, in [net %s] and [net %s]", net->forwards[i].host_port, other->name,
			    net->name);
		return err_hint(r->err, "choose another port of the host");
	}
	if (net == other)
		return 0;
	if (net->mode == NET_TAP && other->mode == NET_TAP && !strcmp(net->tap, other->tap)) {
		config_fail(r, "tap", "%s is already that of [net %s]", net->tap, other->name);
		return err_hint(r->err, "each card needs a tap device of its own");
	}
	if (net->mac_given && other->mac_given && !memcmp(net->mac, other->mac, sizeof(net->mac))) {
		config_fail(r, "mac", "is already that of [net %s]", other->name);
		return err_hint(r->err, "each card needs an address of its own; without `mac` one is chosen");
	}
	if (net->ip_length && other->ip_length && !memcmp(net->ip, other->ip, sizeof(net->ip))) {
		config_fail(r, "ip", "is already that of [net %s]", other->name);
		return err_hint(r->err, "each card needs an address of its own");
	}
	return 0;
}

int config_check_nets(struct config_reading *r)
{
	int rc = 0;

	for (unsigned i = 0; !rc && i < r->config->net_count; i++) {
		r->line = r->net_lines[i];
		rc = check_mode(r, &r->config->nets[i]);
		if (!rc)
			rc = check_shared(r, &r->config->nets[i]);
		for (unsigned j = 0; !rc && j <= i; j++)
			rc = check_pair(r, &r->config->nets[i], &r->config->nets[j]);
	}
	return rc;
}

/* --- beside the text --- */

static struct config_net *find_net(struct machine_config *config, const char *name, size_t length)
{
	for (unsigned i = 0; i < config->net_count; i++)
		if (strlen(config->nets[i].name) == length && !memcmp(config->nets[i].name, name, length))
			return &config->nets[i];
	return NULL;
}

static int apply_setting(struct config_reading *r, struct config_net *net, const char *key, const char *value)
{
	for (size_t i = 0; i < config_net_key_count; i++) {
		if (strcmp(config_net_keys[i].name, key))
			continue;
		/* Another mode leaves behind what belonged to the one before. */
		if (!strcmp(key, "mode")) {
			net->forward_count = net->shared_count = 0;
			net->tap[0] = net->bridge[0] = net->network[0] = '\0';
			if (!strcmp(value, "user"))
				net->ip_length = 0;
		}
		return config_net_keys[i].set(r, net, key, value);
	}
	return config_unknown_key(r, key, config_net_keys, config_net_key_count);
}

/* The first `forward` of a card replaces those that it had; `renewed`: a bit for each card whose were. */
static int set_one(struct config_reading *r, char *setting, unsigned *renewed)
{
	char *colon = strchr(setting, ':'), *equals = colon ? strchr(colon, '=') : NULL;
	struct machine_config *config = r->config;

	if (!equals) {
		err_set(r->err, ERR_USAGE, EINVAL, "%s: '%s' is no setting", r->what, setting);
		return err_hint(r->err, "NAME:KEY=VALUE, for example lan:forward=tcp:8081:80");
	}
	*colon = *equals = '\0';
	struct config_net *net = find_net(config, setting, strlen(setting));
	if (!net) {
		err_set(r->err, ERR_USAGE, EINVAL, "%s: the VM has no [net %s]", r->what, setting);
		if (!config->net_count)
			return err_hint(r->err, "it has no network card");
		return err_hint(r->err, "its first is [net %s]", config->nets[0].name);
	}
	unsigned bit = 1u << (net - config->nets);
	if (!strcmp(colon + 1, "forward") && !(*renewed & bit)) {
		net->forward_count = 0;
		*renewed |= bit;
	}
	return apply_setting(r, net, colon + 1, equals + 1);
}

int config_set_nets(struct machine_config *config, const char *settings, struct err *err)
{
	struct err local = ERR_INIT;
	CLEANUP_FREE struct config_reading *r = xcalloc(1, sizeof(*r));
	CLEANUP_FREE char *copy = xstrdup(settings);
	char *rest = copy, *setting;
	unsigned renewed = 0;
	int rc = 0;

	*r = (struct config_reading){.config = config, .what = "--net", .err = err ? err : &local};
	*r->err = ERR_INIT;
	while (!rc && (setting = strsep(&rest, ",")) != NULL)
		rc = set_one(r, setting, &renewed);
	return rc ? rc : config_check_nets(r);
}

/* --- the canonical form --- */

static int forwards_to_text(const struct config_net *net, struct buf *out, struct err *err)
{
	int rc = 0;

	for (unsigned i = 0; !rc && i < net->forward_count; i++) {
		const struct net_forward *f = &net->forwards[i];
		const uint8_t *a = f->host_address;

		rc = config_append(out, err, "forward = %s:%u.%u.%u.%u:%u:%u\n", f->udp ? "udp" : "tcp", a[0], a[1], a[2], a[3], f->host_port,
				   f->guest_port);
	}
	return rc;
}

static int shared_to_text(const struct config_net *net, struct buf *out, struct err *err)
{
	int rc = 0;

	for (unsigned i = 0; !rc && i < net->shared_count; i++) {
		const struct config_shared *s = &net->shared[i];
		const uint8_t *a = s->host_address;

		rc = config_append(out, err, "multiplex = tcp:%u.%u.%u.%u:%u:%u:%s\n", a[0], a[1], a[2], a[3], s->host_port, s->guest_port,
				   sharing_names[s->sharing]);
	}
	return rc;
}

int config_nets_to_text(const struct machine_config *config, struct buf *out, struct err *err)
{
	int rc = 0;

	for (unsigned i = 0; !rc && i < config->net_count; i++) {
		const struct config_net *net = &config->nets[i];
		const uint8_t *m = net->mac;

		if (net->mode == NET_NONE)
			continue;
		rc = config_append(out, err, "\n[net %s]\nmode = %s\n", net->name, mode_names[net->mode]);
		if (!rc && net->mac_given)
			rc = config_append(out, err, "mac = %02x:%02x:%02x:%02x:%02x:%02x\n", m[0], m[1], m[2], m[3], m[4], m[5]);
		if (!rc && net->ip_length) {
			char ip[CONFIG_IP_BYTES];

			config_format_ip(net->ip, net->ip_length, ip);
			rc = config_append(out, err, "ip = %s\n", ip);
		}
		if (!rc && net->tap[0])
			rc = config_append(out, err, "tap = %s\n", net->tap);
		if (!rc && net->bridge[0])
			rc = config_append(out, err, "bridge = %s\n", net->bridge);
		if (!rc && net->network[0])
			rc = config_append(out, err, "network = %s\n", net->network);
		if (!rc && net->queues > 1)
			rc = config_append(out, err, "queues = %u\n", net->queues);
		if (!rc && net->send_rate)
			rc = config_append(out, err, "send_rate = %llu\n", (unsigned long long)net->send_rate);
		if (!rc && net->receive_rate)
			rc = config_append(out, err, "receive_rate = %llu\n", (unsigned long long)net->receive_rate);
		if (!rc)
			rc = forwards_to_text(net, out, err);
		if (!rc)
			rc = shared_to_text(net, out, err);
	}
	return rc;
}
