/*
 * What a VM has, as the table of resources (checkpoint/store/resources.h) holds it:
 *
 *     type     name              guest       host
 *     uuid     vm                            the uuid                                 exclusive
 *     mac      CARD              MAC         nothing: an address is the card's own affair on networks of its own
 *     port     CARD/PROTO/PORT   PROTO:PORT  PROTO:ADDRESS:PORT of the host           exclusive
 *     mux      CARD/tcp/PORT     tcp:PORT    tcp:ADDRESS:PORT:SHARING of the host, which other VMs have, too; behind it is the `port` of the same name
 *     tap      CARD                          the tap device                           exclusive
 *     bridge   CARD                          the bridge
 *     network  CARD                          the network of libvirt
 *     ip       CARD              ADDRESS/N   NETWORK/ADDRESS                          exclusive, but for tap: what is behind a tap device nobody knows
 *     hostname vm                the name    the same: so that it can be allocated
 *     cid      vsock             CID         path of the UNIX socket                  exclusive
 *     disk     DISK              serial      path of the image (which has a lock of its own)
 *     base     DISK                          path of the read-only base
 *     pci      disk/DISK, net/CARD, rng, balloon, vsock
 *                                PCI address nothing: it follows from the configuration, and stays in each clone
 *     socket   control                       path of the control socket               exclusive
 */
#ifndef VMCP_CONTROL_IDENTITY_H
#define VMCP_CONTROL_IDENTITY_H

#include "checkpoint/store/resources.h"
#include "machine/config.h"

/* The configuration of a checkpoint becomes that of another VM: its writable disks are its own, in the store. */
void identity_own_disks(struct machine_config *config, const char *store_path, const char *vm);
/* Appends all that a VM of this configuration has. Cards without an address get one, by the uuid. */
void identity_list(struct machine_config *config, const char *store_path, const char *uuid,
		   struct store_resource **list, size_t *count);
#define IDENTITY_MUX	      "mux"
#define IDENTITY_IP	      "ip"
#define IDENTITY_SHARED_BYTES 48
/* The network that the card's IP address is on, "bridge:br0", and '/'. malloc. */
char *identity_ip_network(const struct config_net *net);
/* The host's side of a shared port, "tcp:127.0.0.1:8080:least". */
void identity_shared(const struct config_shared *shared, char out[IDENTITY_SHARED_BYTES]);
/* The host's side of a forwarded port, "tcp:127.0.0.1:8080", without the number if that is 0. */
void identity_port(const struct net_forward *forward, char out[32]);

#endif
