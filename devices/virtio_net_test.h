/* For tests of the network card: one on a backend, and its driver's side. */
#ifndef VMCP_DEVICES_VIRTIO_NET_TEST_H
#define VMCP_DEVICES_VIRTIO_NET_TEST_H

#include "devices/virtio_net.h"
#include "devices/virtio_test.h"

#define SLOT	1u
#define RINGS	0x10000u
#define RECEIVE 0x100000u /* buffers for frames to the guest */
#define SEND	0x200000u
#define CONTROL 0x300000u
#define GUEST	0x0a00020fu
#define HOST	0x0a000202u

#define F_GUEST_CSUM	(1ull << 1)
#define F_MRG_RXBUF	(1ull << 15)
#define F_STATUS	(1ull << 16)
#define F_CTRL_VQ	(1ull << 17)
#define F_CTRL_RX	(1ull << 18)
#define F_CTRL_RX_EXTRA (1ull << 20)
#define F_ANNOUNCE	(1ull << 21)
#define F_CTRL_MAC	(1ull << 23)
#define F_ALL		(F_GUEST_CSUM | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA | F_ANNOUNCE | F_CTRL_MAC)
#define CONFIG_MAC	VIRTIO_PCI_DEVICE
#define CONFIG_STATUS	(VIRTIO_PCI_DEVICE + 6)

static const uint8_t mac[6] = {0x52, 0x56, 1, 2, 3, 4};

struct setup {
	struct rig rig;
	struct net *net;
	struct virtio_net *card;
	struct component component;
	struct rig_queue receive, send, control;
	unsigned sent;
};

static inline struct setup *setup_on(const struct net_config *backend, const struct virtio_net_config *config)
{
	struct setup *s = xcalloc(1, sizeof(*s));
	struct err err = ERR_INIT;
	rig_create(&s->rig);
	cr_assert_eq(net_open(backend, s->rig.loop, &s->net, &err), 0, "%s", err.message);
	cr_assert_eq(virtio_net_create(s->rig.pci, s->rig.mem, s->rig.loop, s->net, config, &s->card, &err), 0, "%s", err.message);
	s->component = virtio_net_component(s->card, 0);
	rig_run(&s->rig);
	return s;
}
static inline struct setup *setup_with(const struct virtio_net_config *config)
{
	return setup_on(&(struct net_config){.name = "lan", .mode = NET_USER}, config);
}
static inline struct setup *setup_create(void)
{
	struct virtio_net_config config = {.name = "lan"};
	memcpy(config.mac, mac, sizeof(mac));
	return setup_with(&config);
}
static inline void setup_destroy(struct setup *s)
{
	rig_stop(&s->rig);
	virtio_net_destroy(s->card);
	net_close(s->net);
	rig_destroy(&s->rig);
	free(s);
}
static inline void start(struct setup *s, uint64_t features)
{
	cr_assert(rig_negotiate(&s->rig, SLOT, features | VIRTIO_F_VERSION_1));
	rig_queue_init(&s->rig, SLOT, 0, 64, RINGS, &s->receive);
	rig_queue_init(&s->rig, SLOT, 1, 64, RINGS + 0x10000, &s->send);
	rig_queue_init(&s->rig, SLOT, 2, 64, RINGS + 0x20000, &s->control);
	rig_driver_ok(&s->rig, SLOT);
}
static inline uint8_t *at(struct setup *s, uint64_t gpa, uint64_t bytes) { return mem_at(s->rig.mem, gpa, bytes, true); }

static inline uint8_t command(struct setup *s, uint8_t class, uint8_t cmd, const void *data, uint32_t bytes)
{
	uint8_t *c = at(s, CONTROL, 2 + bytes);
	uint16_t before = rig_used_idx(&s->control);
	c[0] = class;
	c[1] = cmd;
	if (bytes)
		memcpy(c + 2, data, bytes);
	*at(s, CONTROL + 0x1000, 1) = 0xaa;
	rig_add(&s->control, (struct rig_segment[]){{CONTROL, 2 + bytes, false}, {CONTROL + 0x1000, 1, true}}, 2);
	rig_kick(&s->control);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->control), (uint16_t)(before + 1));
	return *at(s, CONTROL + 0x1000, 1);
}
static inline struct virtio_net_stats stats(struct setup *s)
{
	struct virtio_net_stats out;
	virtio_net_get_stats(s->card, &out);
	return out;
}

static inline void save(struct setup *s, struct buf *out)
{
	void *state = xcalloc(1, s->component.table->size);
	struct err err = ERR_INIT;
	cr_assert_eq(s->component.capture(s->component.opaque, state, &err), 0);
	cr_assert_eq(codec_encode(s->component.table, state, out, &err), 0, "%s", err.message);
	free(state);
}
static inline int put_back(struct setup *s, const struct buf *in, struct err *err)
{
	return rig_put_back(&s->component, in, err);
}
static inline void park(struct setup *s)
{
	loop_park_request(s->rig.loop);
	loop_park_wait(s->rig.loop);
}

#endif
