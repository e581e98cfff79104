/*
 * Virtio socket device (virtio 1.2, 5.10): stream connections between guest and host, on the host's side through UNIX sockets, without vhost.
 *
 *     host to guest   connect to PATH, send "CONNECT PORT\n", read "OK N\n"; then the stream. If nobody listens in the guest, it ends instead
 *     guest to host   to CID 2, port P: goes to whoever listens at PATH_P; if nobody does, the guest gets a reset
 *
 * The guest's CID is its own affair: many VMs may use the same.
 *
 * Over a checkpoint: connections are not in it. At a live checkpoint they go on; a machine that is put back ends all of them, and tells the guest
 * so (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET), whose listeners stay. New connections work at once.
 */
#ifndef VMCP_DEVICES_VIRTIO_VSOCK_H
#define VMCP_DEVICES_VIRTIO_VSOCK_H

#include <stdint.h>

#include "base/component.h"
#include "base/err.h"
#include "base/event.h"
#include "devices/pci.h"
#include "vmm/memory.h"

struct virtio_vsock;

/* Listens at `path`; a socket that is there and at which nobody listens is replaced, else
 * -EADDRINUSE, ERR_STATE. Before VM and loop run. */
int virtio_vsock_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, uint64_t guest_cid, const char *path, struct virtio_vsock **out,
			struct err *err);
/* Removes the socket. VM and loop do not run. NULL is allowed. */
void virtio_vsock_destroy(struct virtio_vsock *v);
/* After the bus's component in the machine's list. */
struct component virtio_vsock_component(struct virtio_vsock *v, uint32_t instance);

#endif
