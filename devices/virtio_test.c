#include "devices/virtio_test.h"

#include <errno.h>

#include "devices/virtio_rng.h"

#define RNG_CLASS 0xff0000u
#define RINGS	  0x10000u
#define DATA	  0x100000u
#define SLOT	  1u

struct setup {
	struct rig rig;
	struct virtio_rng *rng;
	struct component component;
	struct rig_queue q;
};

static struct setup *setup_create(void)
{
	struct setup *s = xcalloc(1, sizeof(*s));
	struct err err = ERR_INIT;
	rig_create(&s->rig);
	cr_assert_eq(virtio_rng_create(s->rig.pci, s->rig.mem, s->rig.loop, &s->rng, &err), 0, "%s", err.message);
	s->component = virtio_rng_component(s->rng, 0);
	rig_run(&s->rig);
	return s;
}
static void setup_destroy(struct setup *s)
{
	rig_stop(&s->rig);
	virtio_rng_destroy(s->rng);
	rig_destroy(&s->rig);
	free(s);
}
static void start(struct setup *s, uint64_t features)
{
	cr_assert(rig_negotiate(&s->rig, SLOT, features | VIRTIO_F_VERSION_1));
	rig_queue_init(&s->rig, SLOT, 0, 8, RINGS, &s->q);
	rig_driver_ok(&s->rig, SLOT);
}
static bool all_zero(struct rig *rig, uint64_t gpa, unsigned bytes)
{
	const uint8_t *p = mem_at(rig->mem, gpa, bytes, false);
	for (unsigned i = 0; i < bytes; i++)
		if (p[i] != 0)
			return false;
	return true;
}
static void ask(struct setup *s, uint64_t gpa, uint32_t bytes)
{
	rig_add(&s->q, (struct rig_segment[]){{gpa, bytes, true}}, 1);
	rig_kick(&s->q);
	rig_settle(&s->rig);
}

Test(virtio, identity_and_capabilities)
{
	struct setup *s = setup_create();
	struct rig *rig = &s->rig;
	cr_expect_eq(rig_config_read(rig, SLOT, 0, 4), 0x10441af4);
	cr_expect_eq(rig_config_read(rig, SLOT, 8, 4), RNG_CLASS << 8 | 1);
	unsigned common = rig_capability(rig, SLOT, 9, 1), notify = rig_capability(rig, SLOT, 9, 2);
	cr_assert(common != 0 && notify != 0);
	cr_expect_neq(rig_capability(rig, SLOT, 9, 3), 0);
	cr_expect_eq(rig_capability(rig, SLOT, 9, 4), 0, "rng has no configuration");
	cr_expect_neq(rig_capability(rig, SLOT, 9, 5), 0);
	cr_expect_eq(rig_config_read(rig, SLOT, common + 2, 1), 16);
	cr_expect_eq(rig_config_read(rig, SLOT, common + 4, 1), VIRTIO_PCI_BAR);
	cr_expect_eq(rig_config_read(rig, SLOT, common + 12, 4), 56);
	cr_expect_eq(rig_config_read(rig, SLOT, notify + 2, 1), 20);
	cr_expect_eq(rig_config_read(rig, SLOT, notify + 16, 4), VIRTIO_PCI_NOTIFY_STRIDE);
	cr_expect_eq(rig->doorbell_count, 1);
	setup_destroy(s);
}

Test(virtio, feature_negotiation)
{
	struct setup *s = setup_create();
	struct rig *rig = &s->rig;
	uint64_t offered = rig_features(rig, SLOT);
	cr_expect_eq(offered, VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX);
	cr_expect(!rig_negotiate(rig, SLOT, 0), "a legacy driver");
	cr_expect(!rig_negotiate(rig, SLOT, VIRTIO_F_VERSION_1 | 1), "a feature that was not offered");
	rig_driver_ok(rig, SLOT);
	cr_expect_eq(rig_status(rig, SLOT) & VIRTIO_STATUS_DRIVER_OK, 0, "not without FEATURES_OK");
	cr_expect(rig_negotiate(rig, SLOT, offered));
	rig_set_reg(rig, SLOT, R_DRIVER_FEATURE_SELECT, 0, 4);
	rig_set_reg(rig, SLOT, R_DRIVER_FEATURE, 0, 4);
	cr_expect_eq(rig_reg(rig, SLOT, R_DRIVER_FEATURE, 4), (uint32_t)offered, "fixed since FEATURES_OK");
	rig_set_reg(rig, SLOT, R_DEVICE_FEATURE_SELECT, 2, 4);
	cr_expect_eq(rig_reg(rig, SLOT, R_DEVICE_FEATURE, 4), 0);
	setup_destroy(s);
}

Test(virtio, registers)
{
	struct setup *s = setup_create();
	struct rig *rig = &s->rig;
	cr_expect_eq(rig_reg(rig, SLOT, R_NUM_QUEUES, 2), 1);
	cr_expect_eq(rig_reg(rig, SLOT, R_QUEUE_SIZE, 2), 64);
	rig_set_reg(rig, SLOT, R_QUEUE_VECTOR, 1, 2);
	cr_expect_eq(rig_reg(rig, SLOT, R_QUEUE_VECTOR, 2), 1);
	rig_set_reg(rig, SLOT, R_QUEUE_VECTOR, 2, 2);
	cr_expect_eq(rig_reg(rig, SLOT, R_QUEUE_VECTOR, 2), VIRTQ_NO_VECTOR, "a vector that is not there");
	rig_set_reg(rig, SLOT, R_QUEUE_SELECT, 1, 2);
	cr_expect_eq(rig_reg(rig, SLOT, R_QUEUE_SIZE, 2), 0, "a queue that is not there");
	rig_set_reg(rig, SLOT, R_QUEUE_ENABLE, 1, 2);
	rig_set_reg(rig, SLOT, R_QUEUE_SELECT, 0, 2);
	rig_set_reg(rig, SLOT, R_DRIVER, 0x123456789abcdef0, 8);
	cr_expect_eq(rig_reg(rig, SLOT, R_DRIVER + 4, 4), 0x12345678);
	cr_expect_eq(rig_reg(rig, SLOT, R_DRIVER, 8), 0x123456789abcdef0);
	cr_expect_eq(rig_reg(rig, SLOT, 0x900, 4), 0);
	rig_set_reg(rig, SLOT, 0x900, 1, 4);
	setup_destroy(s);
}

Test(virtio, works_with_intx)
{
	struct setup *s = setup_create();
	start(s, 0);
	ask(s, DATA, 64);
	cr_expect_eq(rig_used_idx(&s->q), 1);
	uint32_t written;
	cr_expect_eq(rig_used_id(&s->q, 0, &written), 0);
	cr_expect_eq(written, 64);
	cr_expect(!all_zero(&s->rig, DATA, 64));
	cr_expect(all_zero(&s->rig, DATA + 64, 64));
	cr_expect(s->rig.lines[PCI_INTX_GSI(SLOT)]);
	cr_expect_eq(rig_reg(&s->rig, SLOT, VIRTIO_PCI_ISR, 1), 1);
	cr_expect(!s->rig.lines[PCI_INTX_GSI(SLOT)]);
	cr_expect_eq(rig_reg(&s->rig, SLOT, VIRTIO_PCI_ISR, 1), 0);
	setup_destroy(s);
}

Test(virtio, works_with_msix_and_event_index_and_many_requests)
{
	struct setup *s = setup_create();
	cr_assert(rig_negotiate(&s->rig, SLOT, VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC));
	rig_msix(&s->rig, SLOT, 1, 20);
	rig_queue_init(&s->rig, SLOT, 0, 64, RINGS, &s->q);
	for (unsigned i = 0; i < 64; i++) /* before DRIVER_OK: served once it is there */
		rig_add(&s->q, (struct rig_segment[]){{DATA + 16 * i, 16, true}}, 1);
	rig_kick(&s->q);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->q), 0);
	rig_driver_ok(&s->rig, SLOT);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->q), 64);
	cr_expect_eq(s->rig.msis[21], 1, "wanted for the first only");
	cr_expect(!s->rig.lines[PCI_INTX_GSI(SLOT)]);
	setup_destroy(s);
}

Test(virtio, moved_bar_keeps_its_doorbells)
{
	struct setup *s = setup_create();
	start(s, 0);
	rig_config_write(&s->rig, SLOT, 0x20, 0xd8000000, 4);
	cr_expect_eq(s->rig.doorbell_count, 1);
	cr_expect_eq(s->rig.doorbells[0].address, 0xd8003000);
	ask(s, DATA, 16);
	cr_expect_eq(rig_used_idx(&s->q), 1);
	/* And without one, by the register. */
	rig_add(&s->q, (struct rig_segment[]){{DATA, 16, true}}, 1);
	uint8_t v[2] = {0};
	bus_write(s->rig.mmio, 0xd8003000, v, 2);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->q), 2);
	setup_destroy(s);
}

Test(virtio, window_in_configuration_space)
{
	struct setup *s = setup_create();
	struct rig *rig = &s->rig;
	unsigned cap = rig_capability(rig, SLOT, 9, 5);
	rig_config_write(rig, SLOT, cap + 4, VIRTIO_PCI_BAR, 1);
	rig_config_write(rig, SLOT, cap + 8, R_NUM_QUEUES, 4);
	rig_config_write(rig, SLOT, cap + 12, 2, 4);
	cr_expect_eq(rig_config_read(rig, SLOT, cap + 16, 2), 1);
	rig_config_write(rig, SLOT, cap + 8, R_STATUS, 4);
	rig_config_write(rig, SLOT, cap + 12, 1, 4);
	rig_config_write(rig, SLOT, cap + 16, 3, 1);
	cr_expect_eq(rig_status(rig, SLOT), 3);
	for (unsigned bar = 0; bar < 256; bar += 5) { /* nonsense does nothing */
		rig_config_write(rig, SLOT, cap + 4, bar, 1);
		rig_config_write(rig, SLOT, cap + 8, 0xfffffffe, 4);
		rig_config_write(rig, SLOT, cap + 12, bar, 4);
		rig_config_read(rig, SLOT, cap + 16, 4);
		rig_config_write(rig, SLOT, cap + 16, 0xffffffff, 4);
	}
	setup_destroy(s);
}

static void expect_broken(struct setup *s)
{
	cr_expect_eq(rig_status(&s->rig, SLOT) & VIRTIO_STATUS_NEEDS_RESET, VIRTIO_STATUS_NEEDS_RESET);
	cr_expect_eq(s->rig.msis[20], 1, "configuration interrupt");
	uint16_t used = rig_used_idx(&s->q);
	rig_kick(&s->q);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->q), used);
	rig_set_reg(&s->rig, SLOT, R_STATUS, 0, 1);
	cr_expect_eq(rig_status(&s->rig, SLOT), 0);
	start(s, 0);
	ask(s, DATA, 16);
	cr_expect_eq(rig_used_idx(&s->q), 1, "works again");
}

Test(virtio, broken_ring_needs_reset_and_comes_back)
{
	struct setup *s = setup_create();
	cr_assert(rig_negotiate(&s->rig, SLOT, VIRTIO_F_VERSION_1));
	rig_msix(&s->rig, SLOT, 1, 20);
	rig_queue_init(&s->rig, SLOT, 0, 8, RINGS, &s->q);
	rig_driver_ok(&s->rig, SLOT);
	ask(s, 0xfee00000, 16);
	expect_broken(s);
	setup_destroy(s);
}

Test(virtio, ring_outside_memory_needs_reset)
{
	struct setup *s = setup_create();
	cr_assert(rig_negotiate(&s->rig, SLOT, VIRTIO_F_VERSION_1));
	rig_set_reg(&s->rig, SLOT, R_DESC, RIG_MEMORY_BYTES - 16, 8);
	rig_set_reg(&s->rig, SLOT, R_QUEUE_ENABLE, 1, 2);
	cr_expect_eq(rig_status(&s->rig, SLOT) & VIRTIO_STATUS_NEEDS_RESET, VIRTIO_STATUS_NEEDS_RESET);
	cr_expect_eq(rig_reg(&s->rig, SLOT, R_QUEUE_ENABLE, 2), 0);
	setup_destroy(s);
}

static void encode(struct setup *s, struct buf *out)
{
	void *state = xcalloc(1, s->component.table->size);
	struct err err = ERR_INIT;
	loop_park_request(s->rig.loop);
	loop_park_wait(s->rig.loop);
	cr_assert_eq(s->component.capture(s->component.opaque, state, &err), 0);
	cr_assert_eq(codec_encode(s->component.table, state, out, &err), 0, "%s", err.message);
	loop_unpark(s->rig.loop);
	free(state);
}
static int decode_and_apply(struct setup *s, const struct buf *in, struct err *err)
{
	return rig_put_back(&s->component, in, err);
}

Test(virtio, state_goes_there_and_back)
{
	struct setup *s = setup_create(), *other = setup_create();
	CLEANUP_BUF struct buf first = BUF_INIT, again = BUF_INIT, after = BUF_INIT;
	struct err err = ERR_INIT;

	cr_assert(rig_negotiate(&s->rig, SLOT, VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX));
	rig_msix(&s->rig, SLOT, 1, 20);
	rig_queue_init(&s->rig, SLOT, 0, 8, RINGS, &s->q);
	rig_driver_ok(&s->rig, SLOT);
	ask(s, DATA, 16);
	rig_config_write(&s->rig, SLOT, 0x20, 0xd8000000, 4);
	/* A chain whose notification is lost with the old machine. */
	rig_add(&s->q, (struct rig_segment[]){{DATA + 4096, 16, true}}, 1);
	encode(s, &first);
	encode(s, &again);
	cr_assert_eq(first.length, again.length);
	cr_expect_arr_eq(first.data, again.data, first.length, "captures of one instant are identical");

	memcpy(mem_base(other->rig.mem), mem_base(s->rig.mem), RIG_MEMORY_BYTES);
	other->q = s->q;
	other->q.rig = &other->rig;
	cr_assert_eq(decode_and_apply(other, &first, &err), 0, "%s", err.message);
	rig_settle(&other->rig);
	cr_expect_eq(other->rig.doorbells[0].address, 0xd8003000);
	cr_expect_eq(rig_used_idx(&other->q), 2, "queues are looked at without a notification");
	cr_expect(!all_zero(&other->rig, DATA + 4096, 16));
	cr_expect_geq(other->rig.msis[21], 1, "and what the driver may not know of is signalled");

	cr_assert_eq(decode_and_apply(s, &first, &err), 0, "%s", err.message);
	encode(s, &after);
	setup_destroy(other);
	setup_destroy(s);
}

Test(virtio, damaged_state_is_refused)
{
	struct setup *s = setup_create();
	struct virtio_state state, bad;
	struct err err = ERR_INIT;

	start(s, 0);
	memset(&state, 0, sizeof(state));
	s->component.capture(s->component.opaque, &state, NULL);
	cr_expect_eq(s->component.validate(s->component.opaque, &state, &err), 0, "%s", err.message);
#define BAD(change)                                                                                                    \
	do {                                                                                                           \
		bad = state;                                                                                           \
		change;                                                                                                \
		err = ERR_INIT;                                                                                        \
		cr_expect_lt(s->component.validate(s->component.opaque, &bad, &err), 0, #change);                      \
		cr_expect_eq(err.class, ERR_DAMAGED, #change);                                                         \
	} while (0)
	BAD(bad.driver_features |= 1ull << 40);
	BAD(bad.queue_count = 2);
	BAD(bad.status |= 0x20);
	BAD(bad.isr = 0xf0);
	BAD(bad.resetting = 2);
	BAD(bad.config_vector = 2);
	BAD(bad.queues[0].vector = 2);
	BAD(bad.queues[0].size = 65);
	BAD(bad.queues[0].desc_gpa = RIG_MEMORY_BYTES);
	BAD(bad.queues[0].used_gpa += 1);
	BAD(bad.pci.config[0] ^= 1);
#undef BAD
	setup_destroy(s);
}

Test(virtio, drained_device_is_dead_until_a_state_is_applied)
{
	struct setup *s = setup_create();
	CLEANUP_BUF struct buf state = BUF_INIT;
	struct err err = ERR_INIT;

	start(s, 0);
	encode(s, &state);
	cr_expect_eq(s->component.drain(s->component.opaque, &err), 0);
	ask(s, DATA, 16);
	cr_expect_eq(rig_used_idx(&s->q), 0);
	cr_expect_eq(decode_and_apply(s, &state, &err), 0, "%s", err.message);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->q), 1);
	setup_destroy(s);
}

/* A driver gone mad, with fixed seeds: the device neither crashes nor hangs, and works after a reset. */
Test(virtio, mad_driver)
{
	int level = (int)log_get_level();
	log_set_level(LOG_LEVEL_ERROR);
	for (unsigned seed = 1; seed <= 20; seed++) {
		struct setup *s = setup_create();
		unsigned r = seed;
		start(s, seed % 2 ? VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC : 0);
		for (unsigned i = 0; i < 3000; i++) {
			uint64_t value = (uint64_t)rand_r(&r) << 32 ^ (uint64_t)rand_r(&r) << 8 ^ (uint64_t)rand_r(&r);
			uint64_t bar = rig_bar(&s->rig, SLOT, rand_r(&r) % 8 ? VIRTIO_PCI_BAR : VIRTIO_PCI_MSIX_BAR);
			switch (rand_r(&r) % 6) {
			case 0:
				rig_mmio_write(&s->rig, bar + (unsigned)rand_r(&r) % 64, value, 1u << rand_r(&r) % 4);
				break;
			case 1:
				rig_mmio_write(&s->rig, bar + (unsigned)rand_r(&r) % VIRTIO_PCI_BAR_BYTES, value,
					       1u << rand_r(&r) % 4);
				break;
			case 2:
				rig_mmio_read(&s->rig, bar + (unsigned)rand_r(&r) % VIRTIO_PCI_BAR_BYTES,
					      1u << rand_r(&r) % 4);
				break;
			case 3:
				rig_config_write(&s->rig, SLOT, 0x30 + (unsigned)rand_r(&r) % 200, (uint32_t)value, 1);
				break;
			case 4:
				mem_write(s->rig.mem, RINGS + (unsigned)rand_r(&r) % 0x3000, &value,
					  1 + (unsigned)rand_r(&r) % 8, NULL);
				break;
			default:
				rig_kick(&s->q);
				break;
			}
		}
		rig_settle(&s->rig);
		rig_config_write(&s->rig, SLOT, 4, 2, 2);
		rig_config_write(&s->rig, SLOT, rig_capability(&s->rig, SLOT, 0x11, 0) + 2, 0, 2);
		start(s, 0);
		ask(s, DATA, 16);
		cr_expect_eq(rig_used_idx(&s->q), 1, "seed %u", seed);
		setup_destroy(s);
	}
	log_set_level((enum log_level)level);
}
