/* Addresses of network cards, by the old requests of netdevice(7), as these need nothing but a kernel. */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/file.h"
#include "guest/agent.h"

#define MAX_ROUTES  64u
#define MAX_ADDRESSES 64u
#define WAIT_STEPS  100 /* for a driver, at boot */
#define WAIT_NS	    50000000
#define MAC_BYTES   6

struct interface {
	const char *name;
	int fd;
};

static int request(const struct interface *on, unsigned long code, struct ifreq *r)
{
	snprintf(r->ifr_name, sizeof(r->ifr_name), "%s", on->name);
	return ioctl(on->fd, code, r) ? -errno : 0;
}

static void put_address(struct sockaddr *out, uint32_t address)
{
	const struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(address)};

	memcpy(out, &in, sizeof(in));
}

/* 0 if there is none. */
static uint32_t get_address(const struct interface *on, unsigned long code)
{
	struct ifreq r = {0};
	struct sockaddr_in in;

	if (request(on, code, &r))
		return 0;
	memcpy(&in, &r.ifr_addr, sizeof(in));
	return ntohl(in.sin_addr.s_addr);
}

/* One after the other: an address of 0 takes away the first one that is there. */
static void remove_addresses(const struct interface *on)
{
	for (unsigned i = 0; i < MAX_ADDRESSES && get_address(on, SIOCGIFADDR); i++) {
		struct ifreq r = {0};

		put_address(&r.ifr_addr, 0);
		request(on, SIOCSIFADDR, &r);
	}
}

/* In the place of all that it has. */
static int set_address(const struct interface *on, uint32_t address, uint32_t mask, struct err *err)
{
	static const unsigned long codes[] = {SIOCSIFADDR, SIOCSIFNETMASK};
	struct ifreq r = {0};
	int rc = 0;

	remove_addresses(on);
	for (size_t i = 0; !rc && i < ARRAY_LENGTH(codes); i++) {
		put_address(&r.ifr_addr, i ? mask : address);
		rc = request(on, codes[i], &r);
	}
	if (!rc)
		rc = request(on, SIOCGIFFLAGS, &r);
	r.ifr_flags = (short)(r.ifr_flags | IFF_UP);
	if (!rc)
		rc = request(on, SIOCSIFFLAGS, &r);
	return rc ? err_sys(err, -rc, "%s: address", on->name) : 0;
}

/* --- routes by gateways, which go with the old address --- */

static unsigned list_routes(const struct interface *on, struct rtentry list[MAX_ROUTES])
{
	FILE *file = fopen("/proc/net/route", "re");
	char line[256], name[IFNAMSIZ + 1];
	unsigned count = 0, to, gateway, flags, metric, mask;

	while (file && count < MAX_ROUTES && fgets(line, sizeof(line), file)) {
		struct rtentry *route = &list[count];

		if (sscanf(line, "%16s %x %x %x %*s %*s %u %x", name, &to, &gateway, &flags, &metric, &mask) != 6 || strcmp(name, on->name) || !(flags & RTF_GATEWAY))
			continue;
		*route = (struct rtentry){.rt_flags = (unsigned short)flags, .rt_metric = (short)(metric + 1), .rt_dev = (char *)on->name};
		put_address(&route->rt_dst, ntohl(to));
		put_address(&route->rt_gateway, ntohl(gateway));
		put_address(&route->rt_genmask, ntohl(mask));
		count++;
	}
	if (file)
		fclose(file);
	return count;
}

static int add_routes(const struct interface *on, struct rtentry *list, unsigned count, struct err *err)
{
	for (unsigned i = 0; i < count; i++) {
		const struct sockaddr_in *gateway = (const struct sockaddr_in *)(const void *)&list[i].rt_gateway;

		if (ioctl(on->fd, SIOCADDRT, &list[i]) && errno != EEXIST)
			return err_sys(err, errno, "%s: the route by %s is gone", on->name, inet_ntoa(gateway->sin_addr));
	}
	return 0;
}

/* --- the card's own address --- */

static bool parse_mac(const char *text, uint8_t out[MAC_BYTES])
{
	return sscanf(text, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx", &out[0], &out[1], &out[2], &out[3], &out[4], &out[5]) == MAC_BYTES;
}

static bool has_mac(const struct interface *on, const uint8_t mac[MAC_BYTES])
{
	struct ifreq r = {0};

	return request(on, SIOCGIFHWADDR, &r) == 0 && memcmp(r.ifr_hwaddr.sa_data, mac, MAC_BYTES) == 0;
}

/* The kernel tells the network of it, and of the address that belongs to it, if arp_notify is on (ip-sysctl.rst). */
static int set_mac(const struct interface *on, const uint8_t mac[MAC_BYTES], struct err *err)
{
	CLEANUP_FREE char *path = xasprintf("/proc/sys/net/ipv4/conf/%s/arp_notify", on->name);
	CLEANUP_CLOSE int fd = open(path, O_RDWR | O_CLOEXEC);
	struct ifreq r = {.ifr_hwaddr.sa_family = ARPHRD_ETHER};
	char before = '0';

	memcpy(r.ifr_hwaddr.sa_data, mac, MAC_BYTES);
	if (fd >= 0 && pread(fd, &before, 1, 0) == 1)
		(void)!pwrite(fd, "1", 1, 0);
	int rc = request(on, SIOCSIFHWADDR, &r);
	if (fd >= 0)
		(void)!pwrite(fd, &before, 1, 0);
	return rc ? err_sys(err, -rc, "%s: address of the card", on->name) : 0;
}

int agent_set_card(const char *interface, const char *mac, const char *address, unsigned length, struct err *err)
{
	CLEANUP_CLOSE int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	const struct interface on = {.name = interface, .fd = fd};
	uint32_t want = ntohl(inet_addr(address)), mask = UINT32_MAX << (32 - length);
	struct rtentry routes[MAX_ROUTES];
	uint8_t own[MAC_BYTES];
	int rc = 0, routed = 0;

	if (fd < 0)
		return err_sys(err, errno, "%s", interface);
	if (!parse_mac(mac, own))
		return err_set(err, ERR_FAILED, EPROTO, "%s: '%s' is no address of a card", interface, mac);
	bool moves = get_address(&on, SIOCGIFADDR) != want || get_address(&on, SIOCGIFNETMASK) != mask;
	unsigned count = moves ? list_routes(&on, routes) : 0;
	if (moves)
		rc = set_address(&on, want, mask, err);
	if (!rc)
		routed = add_routes(&on, routes, count, err);
	if (!rc && (moves || !has_mac(&on, own)))
		rc = set_mac(&on, own, err);
	return rc ? rc : routed;
}

/* --- cards --- */

/* What begins so in a folder, or "". malloc. */
static char *find_entry(const char *folder, const char *prefix)
{
	DIR *stream = opendir(folder);
	struct dirent *entry;
	char *name = NULL;

	while (stream && !name && (entry = readdir(stream)))
		if (entry->d_name[0] != '.' && !strncmp(entry->d_name, prefix, strlen(prefix)))
			name = xstrdup(entry->d_name);
	if (stream)
		closedir(stream);
	return name ? name : xstrdup("");
}

/* The card's interface, or "". malloc. */
static char *find_interface(const struct agent_card *card)
{
	CLEANUP_FREE char *device = xasprintf("/sys/bus/pci/devices/%s", card->pci), *virtio = find_entry(device, "virtio");
	CLEANUP_FREE char *net = xasprintf("%s/%s/net", device, virtio);

	return find_entry(net, "");
}

static int set_card(const struct agent_card *card, struct err *err)
{
	const struct timespec moment = {.tv_nsec = WAIT_NS};
	char *interface = find_interface(card);

	for (int i = 0; !*interface && i < WAIT_STEPS; i++) {
		nanosleep(&moment, NULL);
		free(interface);
		interface = find_interface(card);
	}
	int rc = *interface ? agent_set_card(interface, card->mac, card->address, card->length, err)
			    : err_set(err, ERR_FAILED, ENODEV, "card %s: no driver has it, %s is not set", card->pci, card->address);
	free(interface);
	return rc;
}

int agent_apply_cards(const struct agent *agent, const struct agent_identity *identity, struct err *err)
{
	int first = 0;

	for (unsigned i = 0; !*agent->root && i < identity->card_count; i++) {
		struct err error = ERR_INIT;
		int rc = set_card(&identity->cards[i], &error);

		if (rc && !first) {
			first = rc;
			*err = error;
		}
	}
	return first;
}
