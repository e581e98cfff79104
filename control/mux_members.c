#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/buf.h"
#include "checkpoint/store/resources.h"
#include "control/identity.h"
#include "control/mux_internal.h"

/* "tcp:127.0.0.1:8080", and what stands behind it. */
static bool parse_port(const char *text, struct sockaddr_in *out, const char **rest)
{
	unsigned a, b, c, d, port;
	int end = 0;

	if (sscanf(text, "tcp:%3u.%3u.%3u.%3u:%5u%n", &a, &b, &c, &d, &port, &end) != 5 || a > 255 || b > 255 || c > 255 || d > 255 || !port ||
	    port > 65535)
		return false;
	*out = (struct sockaddr_in){
		.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(a << 24 | b << 16 | c << 8 | d)};
	*rest = text + end;
	return true;
}

bool mux_parse_place(const char *place, struct sockaddr_in *address, enum config_sharing *sharing)
{
	const char *rest;
	struct config_shared shared = {0};
	char again[IDENTITY_SHARED_BYTES];

	if (!parse_port(place, address, &rest) || *rest != ':')
		return false;
	shared.host_port = ntohs(address->sin_port);
	memcpy(shared.host_address, &address->sin_addr, 4);
	/* Only in the one way that we write it: it is a file's name, too. */
	for (int i = CONFIG_ROUND_ROBIN; i <= CONFIG_BY_NAME; i++) {
		shared.sharing = *sharing = (enum config_sharing)i;
		identity_shared(&shared, again);
		if (!strcmp(again, place))
			return true;
	}
	return false;
}

static struct mux_member *find_member(struct mux_members *members, const char *vm)
{
	for (size_t i = 0; i < members->count; i++)
		if (!strcmp(members->list[i].vm, vm))
			return &members->list[i];
	return NULL;
}

static struct mux_member *add_member(struct mux_members *members, const char *vm)
{
	/* The place of one that has gone, if there is one. */
	for (size_t i = 0; i < members->count; i++) {
		struct mux_member *old = &members->list[i];

		if (!old->present && !old->connections) {
			*old = (struct mux_member){0};
			snprintf(old->vm, sizeof(old->vm), "%s", vm);
			return old;
		}
	}
	struct mux_member *grown = xcalloc(members->count + 1, sizeof(*grown));
	if (members->count)
		memcpy(grown, members->list, members->count * sizeof(*grown));
	free(members->list);
	members->list = grown;
	snprintf(grown[members->count].vm, STORE_NAME_BYTES, "%s", vm);
	return &grown[members->count++];
}

/* The port of the host that is the VM's own, behind the one that it shares as `shared`. */
static const struct store_resource *find_port(const struct store_resource *list, size_t count, size_t shared)
{
	size_t i = shared;

	/* They are in order of VMs. */
	while (i > 0 && !strcmp(list[i - 1].vm, list[shared].vm))
		i--;
	for (; i < count && !strcmp(list[i].vm, list[shared].vm); i++)
		if (!strcmp(list[i].type, "port") && !strcmp(list[i].name, list[shared].name))
			return &list[i];
	return NULL;
}

/* Of the VM that row `shared` is of: those that are known are looked at, or (`unknown`) only others, which are added. */
static void look_at(struct mux_members *members, struct store *store, const struct store_resource *list, size_t count, size_t shared, bool unknown)
{
	const char *vm = list[shared].vm, *rest;
	struct mux_member *member = find_member(members, vm);
	const struct store_resource *port = find_port(list, count, shared);
	struct sockaddr_in at;

	if ((member != NULL) == unknown || !port || !parse_port(port->host, &at, &rest) || !store_vm_is_alive(store, vm))
		return;
	if (!member)
		member = add_member(members, vm);
	member->at = at;
	member->present = true;
}

int mux_members_look(struct mux_members *members, struct store *store, const char *place, size_t *present, struct err *err)
{
	struct store_resource *list;
	size_t count;
	int rc = store_resources_list(store, NULL, &list, &count, err);

	if (rc)
		return rc;
	for (size_t i = 0; i < members->count; i++)
		members->list[i].present = false;
	/* New ones last: by then it is known whose places are free. */
	for (int unknown = 0; unknown < 2; unknown++)
		for (size_t i = 0; i < count; i++)
			if (!strcmp(list[i].type, IDENTITY_MUX) && !strcmp(list[i].host, place))
				look_at(members, store, list, count, i, unknown);
	store_resources_free_list(list, count);
	*present = 0;
	for (size_t i = 0; i < members->count; i++)
		*present += members->list[i].present;
	return 0;
}

void mux_members_free(struct mux_members *members)
{
	free(members->list);
	*members = (struct mux_members){0};
}

static bool is_named(const struct mux_member *member, const char *name)
{
	size_t label = strcspn(name, ".");

	return !strcasecmp(member->vm, name) || (strlen(member->vm) == label && !strncasecmp(member->vm, name, label));
}

int mux_choose(const struct mux_members *members, enum config_sharing sharing, const char *name, const bool *tried)
{
	int best = -1;

	for (size_t step = 1; step <= members->count; step++) {
		size_t i = (members->last + step) % members->count;
		const struct mux_member *member = &members->list[i];

		if (!member->present || tried[i] || (sharing == CONFIG_BY_NAME && !is_named(member, name)))
			continue;
		if (best < 0 || (sharing == CONFIG_LEAST && member->connections < members->list[best].connections))
			best = (int)i;
	}
	return best;
}
