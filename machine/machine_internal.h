/* The machine's network cards: configuration, backend and device together. */
#ifndef VMCP_MACHINE_MACHINE_INTERNAL_H
#define VMCP_MACHINE_MACHINE_INTERNAL_H

#include "base/event.h"
#include "devices/pci.h"
#include "devices/virtio_net.h"
#include "machine/config.h"
#include "machine/machine.h"
#include "net/net.h"

struct machine_net {
	const struct config_net *config;
	struct net *backend;
	struct virtio_net *device;
};

struct machine_net_place {
	struct pci_bus *pci;
	struct mem *mem;
	struct loop *loop;
	const char *libvirt; /* URI, "": the default */
	const char *networks; /* where those of mode group are */
	const char *vm;	      /* its name */
	unsigned index;	      /* of the card */
	bool deaf;	      /* cards of mode group hear nothing before machine_net_hear */
};

/* Binds the host's side and makes the device, which has an address (machine_choose_macs). After a failure too machine_net_close is to be called. */
int machine_net_open(struct machine_net *net, const struct machine_net_place *place, struct config_net *config, struct err *err);
/* The loop does not run. */
void machine_net_close(struct machine_net *net);
void machine_net_hear(struct machine_net *net); /* in the loop's thread */
void machine_net_tell(struct machine_net *net, struct machine_net_stats *out);

#endif
