#include "control/identity.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "machine/machine.h"
#include "machine/slots.h"

void identity_own_disks(struct machine_config *config, const char *store_path, const char *vm)
{
	for (unsigned i = 0; i < config->disk_count; i++) {
		struct config_disk *disk = &config->disks[i];

		if (disk->readonly)
			continue;
		free(disk->path);
		disk->path = store_vm_disk_path(store_path, vm, disk->name);
		free(disk->base);
		disk->base = NULL;
	}
}

void identity_port(const struct net_forward *forward, char out[32])
{
	const uint8_t *a = forward->host_address;
	int n = snprintf(out, 32, "%s:%u.%u.%u.%u:", forward->udp ? "udp" : "tcp", a[0], a[1], a[2], a[3]);

	if (forward->host_port && n > 0 && n < 32)
		snprintf(out + n, (size_t)(32 - n), "%u", forward->host_port);
}

void identity_shared(const struct config_shared *shared, char out[IDENTITY_SHARED_BYTES])
{
	const uint8_t *a = shared->host_address;

	snprintf(out, IDENTITY_SHARED_BYTES, "tcp:%u.%u.%u.%u:%u:%s", a[0], a[1], a[2], a[3], shared->host_port, config_sharing_name(shared->sharing));
}

/* Several ports of the host may lead to one of the guest. */
static unsigned times_before(const struct config_net *net, unsigned index)
{
	unsigned times = 0;

	for (unsigned i = 0; i < index; i++)
		times += net->forwards[i].udp == net->forwards[index].udp &&
			 net->forwards[i].guest_port == net->forwards[index].guest_port;
	return times;
}

static void list_forward(const struct config_net *net, unsigned index, struct store_resource **list, size_t *count)
{
	const struct net_forward *forward = &net->forwards[index];
	const char *protocol = forward->udp ? "udp" : "tcp";
	unsigned times = times_before(net, index);
	char name[CONFIG_NAME_BYTES + 32], guest[16], host[32];

	snprintf(name, sizeof(name), times ? "%s/%s/%u#%u" : "%s/%s/%u", net->name, protocol, forward->guest_port,
		 times + 1);
	snprintf(guest, sizeof(guest), "%s:%u", protocol, forward->guest_port);
	identity_port(forward, host);
	store_resources_add(list, count, "port", name, guest, host, true);
}

static void list_shared(const struct config_net *net, const struct config_shared *shared, struct store_resource **list, size_t *count)
{
	char name[CONFIG_NAME_BYTES + 32], guest[16], host[IDENTITY_SHARED_BYTES];

	snprintf(name, sizeof(name), "%s/tcp/%u", net->name, shared->guest_port);
	snprintf(guest, sizeof(guest), "tcp:%u", shared->guest_port);
	identity_shared(shared, host);
	store_resources_add(list, count, IDENTITY_MUX, name, guest, host, false);
}

static void list_card(const struct config_net *net, struct store_resource **list, size_t *count)
{
	const uint8_t *m = net->mac;
	char mac[18];

	if (net->mode == NET_NONE)
		return;
	snprintf(mac, sizeof(mac), "%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5]);
	store_resources_add(list, count, "mac", net->name, mac, "", false);
	if (net->mode == NET_TAP)
		store_resources_add(list, count, "tap", net->name, "", net->tap, true);
	if (net->mode == NET_BRIDGE)
		store_resources_add(list, count, "bridge", net->name, "", net->bridge, false);
	if (net->mode == NET_LIBVIRT)
		store_resources_add(list, count, "network", net->name, "", net->network, false);
	if (net->mode == NET_GROUP) {
		CLEANUP_FREE char *network = xasprintf("group:%s", net->network);

		store_resources_add(list, count, "network", net->name, "", network, false);
	}
	for (unsigned i = 0; i < net->forward_count; i++)
		list_forward(net, i, list, count);
	for (unsigned i = 0; i < net->shared_count; i++)
		list_shared(net, &net->shared[i], list, count);
}

char *identity_ip_network(const struct config_net *net)
{
	return net->mode == NET_BRIDGE ? xasprintf("bridge:%s/", net->bridge)
	       : net->mode == NET_TAP  ? xstrdup("tap/")
				       : xasprintf("%s:%s/", config_net_mode_name(net->mode), net->network);
}

static void list_ip(const struct config_net *net, struct store_resource **list, size_t *count)
{
	char ip[CONFIG_IP_BYTES];

	if (net->mode == NET_NONE || !net->ip_length)
		return;
	config_format_ip(net->ip, net->ip_length, ip);
	CLEANUP_FREE char *network = identity_ip_network(net), *host = xasprintf("%s%.*s", network, (int)strcspn(ip, "/"), ip);
	store_resources_add(list, count, IDENTITY_IP, net->name, ip, host, net->mode != NET_TAP);
}

static void list_disk(const struct config_disk *disk, const char *store_path, const char *vm, struct store_resource **list, size_t *count)
{
	CLEANUP_FREE char *own = disk->path ? NULL : store_vm_disk_path(store_path, vm, disk->name);

	store_resources_add(list, count, "disk", disk->name, disk->name, own ? own : disk->path, false);
	if (disk->base)
		store_resources_add(list, count, "base", disk->name, "", disk->base, false);
}

static void list_pci(const struct machine_config *config, struct store_resource **list, size_t *count)
{
	struct slot slots[SLOTS_MAX];
	unsigned slot_count = slots_list(config, slots);

	for (unsigned i = 0; i < slot_count; i++) {
		const struct slot *slot = &slots[i];
		CLEANUP_FREE char *name = slot->kind == SLOT_DISK      ? xasprintf("disk/%s", config->disks[slot->index].name)
					  : slot->kind == SLOT_NET     ? xasprintf("net/%s", config->nets[slot->index].name)
					  : slot->kind == SLOT_RNG     ? xstrdup("rng")
					  : slot->kind == SLOT_BALLOON ? xstrdup("balloon")
								       : xstrdup("vsock");
		char address[16];

		snprintf(address, sizeof(address), "0000:00:%02x.0", slot->number);
		store_resources_add(list, count, "pci", name, address, "", false);
	}
}

void identity_list(struct machine_config *config, const char *store_path, const char *uuid,
		   struct store_resource **list, size_t *count)
{
	CLEANUP_FREE char *folder = xasprintf("%s/vms/%s", store_path, config->name);
	CLEANUP_FREE char *control = xasprintf("%s/control.sock", folder), *vsock = xasprintf("%s/vsock.sock", folder);
	char cid[16];

	machine_choose_macs(config, uuid);
	store_resources_add(list, count, "uuid", "vm", "", uuid, true);
	store_resources_add(list, count, "socket", "control", "", control, true);
	for (unsigned i = 0; i < config->net_count; i++)
		list_card(&config->nets[i], list, count);
	for (unsigned i = 0; i < config->net_count; i++)
		list_ip(&config->nets[i], list, count);
	for (unsigned i = 0; i < config->disk_count; i++)
		list_disk(&config->disks[i], store_path, config->name, list, count);
	list_pci(config, list, count);
	snprintf(cid, sizeof(cid), "%u", config->vsock_cid);
	if (config->hostname[0])
		store_resources_add(list, count, "hostname", "vm", config->hostname, config->hostname, false);
	if (config->vsock_cid)
		store_resources_add(list, count, "cid", "vsock", cid, vsock, true);
}
