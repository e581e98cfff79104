#include <stdio.h>
#include <string.h>

#include "base/buf.h"
#include "machine/libvirt.h"
#include "machine/machine_internal.h"

/* FNV-1a: every bit of the text counts, and nobody needs to guess it. */
static uint64_t hash(uint64_t h, const char *text)
{
	for (; *text; text++)
		h = (h ^ (uint8_t)*text) * 0x100000001b3ull;
	return h;
}

/* Locally administered (bit 1 of the first byte), and not of the range 52:54:00 that other VMMs choose from. */
static void choose_mac(const char *uuid, const char *name, uint8_t mac[6])
{
	uint64_t h = hash(hash(hash(0xcbf29ce484222325ull, uuid), "/"), name);

	h ^= h >> 32;
	mac[0] = 0x52;
	mac[1] = 0x56;
	for (int i = 2; i < 6; i++, h >>= 8)
		mac[i] = (uint8_t)h;
}

/* At each start anew: the network's bridge may be another one by now. */
static int find_bridge(const char *uri, const char *network, char bridge[NET_INTERFACE_BYTES], struct err *err)
{
	struct libvirt *libvirt;
	int rc = libvirt_open(uri, &libvirt, err);

	if (!rc)
		rc = libvirt_network_bridge(libvirt, network, bridge, err);
	libvirt_close(libvirt);
	return rc;
}

void machine_choose_macs(struct machine_config *config, const char *uuid)
{
	for (unsigned i = 0; i < config->net_count; i++) {
		struct config_net *net = &config->nets[i];

		if (net->mode == NET_NONE || net->mac_given)
			continue;
		choose_mac(uuid, net->name, net->mac);
		net->mac_given = true;
	}
}

void machine_preload(const struct machine_config *config)
{
	for (unsigned i = 0; i < config->net_count; i++)
		net_load(config->nets[i].mode, NULL);
}

static int open_backend(struct machine_net *net, const struct machine_net_place *place, struct err *err)
{
	const struct config_net *config = net->config;
	struct net_config backend = {.name = config->name, .mode = config->mode, .pairs = config->queues, .forward_count = config->forward_count};

	memcpy(backend.forwards, config->forwards, sizeof(backend.forwards));
	memcpy(backend.interface, config->mode == NET_TAP ? config->tap : config->bridge, sizeof(backend.interface));
	CLEANUP_FREE char *port = xasprintf("%s.%u", place->vm, place->index);
	int rc = 0;
	backend.folder = place->networks;
	backend.port = port;
	backend.deaf = place->deaf;
	snprintf(backend.network, sizeof(backend.network), "%s", config->network);
	if (config->mode == NET_LIBVIRT) {
		backend.mode = NET_BRIDGE;
		rc = find_bridge(place->libvirt, config->network, backend.interface, err);
	}
	if (!rc)
		rc = net_open(&backend, place->loop, &net->backend, err);
	return rc ? err_hint(err, "change [net %s] in guest.cfg, or give it other settings: `vmcp run --net %s:KEY=VALUE`", config->name, config->name) : 0;
}

int machine_net_open(struct machine_net *net, const struct machine_net_place *place, struct config_net *config, struct err *err)
{
	struct virtio_net_config device = {.name = config->name, .pairs = config->queues, .send_rate = config->send_rate, .receive_rate = config->receive_rate};

	net->config = config;
	memcpy(device.mac, config->mac, sizeof(device.mac));
	int rc = open_backend(net, place, err);
	return rc ? rc : virtio_net_create(place->pci, place->mem, place->loop, net->backend, &device, &net->device, err);
}

void machine_net_close(struct machine_net *net)
{
	virtio_net_destroy(net->device);
	net_close(net->backend);
}

void machine_net_hear(struct machine_net *net) { net_hear(net->backend); }

void machine_net_tell(struct machine_net *net, struct machine_net_stats *out)
{
	*out = (struct machine_net_stats){
		.name = net->config->name, .mode = config_net_mode_name(net->config->mode), .interface = net_interface(net->backend)};
	memcpy(out->mac, net->config->mac, sizeof(out->mac));
	out->slot = virtio_net_slot(net->device);
	if (net->config->ip_length)
		config_format_ip(net->config->ip, net->config->ip_length, out->ip);
	virtio_net_get_stats(net->device, &out->traffic);
}
