/* What virtio.c (status, queues, interrupts, state) and virtio_pci.c (registers) share. */
#ifndef VMCP_DEVICES_VIRTIO_INTERNAL_H
#define VMCP_DEVICES_VIRTIO_INTERNAL_H

#include <pthread.h>

#include "devices/virtio.h"

enum { VIRTIO_ISR_QUEUE = 1, VIRTIO_ISR_CONFIG = 2 };

struct virtio_slot {
	struct virtio_device *vdev; /* immutable, as the next three */
	unsigned index;
	int kick_fd; /* signalled by ioeventfd, register write or virtio_kick */
	struct loop_source *source;
	struct virtqueue q; /* under lock */
	bool hot;	    /* under lock, as the next: looked at, the driver does not notify */
	bool stalled;	    /* not to be looked at before the next kick */
};

struct virtio_device {
	char name[64]; /* immutable, as all down to the lock */
	struct pci_device *pci;
	struct mem *mem;
	struct loop *loop;
	struct virtio_config about;
	uint64_t features;
	struct loop_poller *poller; /* NULL: the device is told of everything */
	unsigned window; /* offset of the capability that is a window into the BAR */

	uint64_t notify_at; /* where ioeventfds are registered, PCI_UNMAPPED: none; under the bus's config_lock */
	bool warned_ioeventfd;

	pthread_mutex_t lock; /* order: see devices/pci.h */
	pthread_cond_t changed;
	/* under lock */
	struct virtio_slot slots[VIRTIO_MAX_QUEUES];
	uint64_t driver_features;
	uint32_t device_feature_select, driver_feature_select;
	uint16_t config_vector, queue_select;
	uint8_t status, isr, generation;
	bool resetting; /* status was written 0 while requests were in flight */
	bool dormant;	/* from virtio_drain or virtio_apply to virtio_activate */
	unsigned inflight;
	unsigned breaks; /* how often the driver broke the rules: for the log */
};

/* virtio_pci.c: the PCI function with its capabilities and BARs. */
int virtio_pci_create(struct virtio_device *vdev, struct pci_bus *bus, struct err *err);

/* virtio.c, with the lock held */
void virtio_set_status(struct virtio_device *vdev, uint8_t status);
uint8_t virtio_read_isr(struct virtio_device *vdev);
struct virtio_slot *virtio_selected(struct virtio_device *vdev); /* NULL if there is no such queue */

#endif
