/* <interface> of domain XML. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machine/config_internal.h"
#include "machine/domain_internal.h"

static int read_model(struct domain_reading *r, const struct xml_node *node)
{
	const char *type = xml_attribute(node, "type");

	if (!type || strncmp(type, "virtio", 6) != 0)
		domain_tell(r, node, "%s: the guest finds a virtio card instead", type ? type : "of no type");
	return 0;
}

/* libvirt's numbers are kilobytes a second. */
static int put_rate(struct domain_reading *r, const struct xml_node *node, const char *key)
{
	const char *average = xml_attribute(node, "average");
	unsigned long long rate = average ? strtoull(average, NULL, 10) : 0;
	char text[32];

	if (!rate || rate > (1ull << 30))
		return domain_not_honoured(r, node);
	snprintf(text, sizeof(text), "%llu", rate < 2 ? 1024 : rate * 1000);
	domain_tell_attributes(r, node, "average");
	return domain_put(r, &r->nets, key, text);
}

static int read_inbound(struct domain_reading *r, const struct xml_node *node) { return put_rate(r, node, "receive_rate"); }

static int read_outbound(struct domain_reading *r, const struct xml_node *node) { return put_rate(r, node, "send_rate"); }

static const struct domain_rule bandwidth_rules[] = {{"inbound", read_inbound}, {"outbound", read_outbound}};

static int read_bandwidth(struct domain_reading *r, const struct xml_node *node) { return domain_walk(r, node, DOMAIN_RULES(bandwidth_rules)); }

/* Which of QEMU's threads moves frames (`name`) is nothing that the guest sees. */
static int read_driver(struct domain_reading *r, const struct xml_node *node)
{
	const char *queues = xml_attribute(node, "queues");
	unsigned long number = queues ? strtoul(queues, NULL, 10) : 1;
	char text[16];

	domain_tell_attributes(r, node, "name queues");
	if (number > NET_MAX_PAIRS) {
		domain_tell(r, node, "queues='%s': the card has %u", queues, NET_MAX_PAIRS);
		number = NET_MAX_PAIRS;
	}
	if (number < 2)
		return 0;
	snprintf(text, sizeof(text), "%lu", number);
	return domain_put(r, &r->nets, "queues", text);
}

static int read_mac(struct domain_reading *r, const struct xml_node *node)
{
	const char *address = xml_attribute(node, "address");

	return address ? domain_put(r, &r->nets, "mac", address) : 0;
}

/* <portForward proto='tcp' address='127.0.0.1'><range start='2022' to='22'/></portForward> of mode user. */
static int read_forward(struct domain_reading *r, const struct xml_node *node)
{
	const char *type = xml_attribute(node->parent, "type"), *proto = xml_attribute(node, "proto"), *address = xml_attribute(node, "address");
	int rc = 0;

	if (!type || strcmp(type, "user") != 0 || !proto)
		return domain_not_honoured(r, node);
	domain_tell_attributes(r, node, "proto address");
	for (const struct xml_node *range = node->children; !rc && range; range = range->next) {
		const char *start = xml_attribute(range, "start"), *to = xml_attribute(range, "to");

		if (!start || xml_attribute(range, "end") || xml_attribute(range, "exclude")) {
			domain_tell(r, range, "only single ports are forwarded: it is left out");
			continue;
		}
		CLEANUP_FREE char *value = xasprintf("%s:%s:%s:%s", proto, address ? address : "0.0.0.0", start, to ? to : start);
		rc = domain_put(r, &r->nets, "forward", value);
	}
	return rc;
}

static const struct domain_rule interface_rules[] = {
	{"source", NULL}, {"target", NULL}, {"alias", NULL}, {"address", NULL}, {"boot", NULL}, {"rom", NULL}, {"acpi", NULL}, {"backend", NULL},
	{"mac", read_mac}, {"model", read_model}, {"driver", read_driver}, {"bandwidth", read_bandwidth}, {"portForward", read_forward},
};

/* The mode and what belongs to it; false: a card that cannot be. */
static bool choose_mode(const struct xml_node *node, const char *type, const char **mode, const char **key, const char **value)
{
	*key = *value = NULL;
	if (!strcmp(type, "user")) {
		*mode = "user";
		return true;
	}
	if (!strcmp(type, "network")) {
		*mode = "libvirt";
		*key = "network";
		*value = xml_child_attribute(node, "source", "network");
	} else if (!strcmp(type, "bridge")) {
		*mode = *key = "bridge";
		*value = xml_child_attribute(node, "source", "bridge");
	} else if (!strcmp(type, "ethernet")) {
		const char *managed = xml_child_attribute(node, "target", "managed");

		*mode = *key = "tap";
		*value = managed && !strcmp(managed, "no") ? xml_child_attribute(node, "target", "dev") : NULL;
	}
	return *value != NULL;
}

int domain_read_interface(struct domain_reading *r, const struct xml_node *node)
{
	const char *type = xml_attribute(node, "type"), *mode = NULL, *key, *value;

	if (!type)
		type = "ethernet";
	if (!choose_mode(node, type, &mode, &key, &value))
		return domain_tell(r, node, "type='%s'%s: the card is left out", type,
				   !strcmp(type, "ethernet") ? " with a tap device that is still to be made" : " is not supported");
	if (r->net_count == CONFIG_MAX_NETS)
		return domain_tell(r, node, "more than %d network cards: it is left out", CONFIG_MAX_NETS);
	int rc = config_append(&r->nets, r->err, "\n[net net%u]\n", r->net_count++);
	if (!rc)
		rc = domain_put(r, &r->nets, "mode", mode);
	if (!rc && key)
		rc = domain_put(r, &r->nets, key, value);
	if (!xml_child(node, "model"))
		domain_tell(r, node, "without <model>: the guest finds a virtio card");
	return rc ? rc : domain_walk(r, node, DOMAIN_RULES(interface_rules));
}
