#include "devices/virtio_test.h"

#include "vmm/acpi.h"

struct card {
	struct rig rig;
	struct pci_device *dev;
	uint64_t moved_to[PCI_BARS];
	uint8_t stored[64];
};

static void card_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	memcpy(data, ((struct card *)opaque)->stored + offset % 56, size);
}
static void card_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	memcpy(((struct card *)opaque)->stored + offset % 56, data, size);
}
static const struct bus_ops card_ops = {.read = card_read, .write = card_write};
static void card_moved(void *opaque, unsigned bar, uint64_t address)
{
	((struct card *)opaque)->moved_to[bar] = address;
}

static struct card *card_create(void)
{
	struct card *card = xcalloc(1, sizeof(*card));
	struct err err = ERR_INIT;
	rig_create(&card->rig);
	const struct pci_config config = {.name = "card",
					  .vendor = 0x1234,
					  .device = 0x5678,
					  .class_code = 0x010203,
					  .revision = 7,
					  .subsystem_vendor = 0xabcd,
					  .subsystem = 0xef01,
					  .intx = true,
					  .opaque = card,
					  .bar_moved = card_moved};
	cr_assert_eq(pci_device_create(card->rig.pci, &config, &card->dev, &err), 0);
	cr_assert_eq(pci_device_add_msix(card->dev, 0, 4, &err), 0);
	cr_assert_eq(pci_device_add_bar(card->dev, 1, false, 0x1000, &card_ops, card, &err), 0);
	cr_assert_eq(pci_device_add_bar(card->dev, 4, true, 0x10000, &card_ops, &card->stored, &err), 0);
	cr_assert_eq(pci_device_place(card->dev, &err), 0, "%s", err.message);
	cr_assert_eq(pci_device_slot(card->dev), 1);
	return card;
}
static void card_destroy(struct card *card)
{
	pci_device_destroy(card->dev);
	rig_destroy(&card->rig);
	free(card);
}

Test(pci, identity_and_nothing_elsewhere)
{
	struct card *card = card_create();
	struct rig *rig = &card->rig;
	cr_expect_eq(rig_config_read(rig, 0, 8, 4) >> 8, 0x060000, "slot 0 is a host bridge");
	cr_expect_eq(rig_config_read(rig, 1, 0, 4), 0x56781234);
	cr_expect_eq(rig_config_read(rig, 1, 8, 4), 0x01020307);
	cr_expect_eq(rig_config_read(rig, 1, 0x2c, 4), 0xef01abcd);
	cr_expect_eq(rig_config_read(rig, 1, 0x3c, 2), 0x0100 | 17, "INTA, line 16 + slot % 4");
	cr_expect_eq(rig_config_read(rig, 2, 0, 4), 0xffffffff);
	cr_expect_eq(rig_config_read(rig, 1, 0, 1), 0x34);
	cr_expect_eq(rig_config_read(rig, 1, 3, 1), 0x56);
	rig_config_write(rig, 1, 0, 0, 4);
	cr_expect_eq(rig_config_read(rig, 1, 0, 4), 0x56781234, "identity is read-only");
	card_destroy(card);
}

Test(pci, address_register)
{
	struct card *card = card_create();
	uint8_t v[4];
	put_le32(v, 0xffffffff);
	bus_write(card->rig.pio, 0xcf8, v, 4);
	bus_read(card->rig.pio, 0xcf8, v, 4);
	cr_expect_eq(get_le32(v), 0x80fffffc);
	put_le32(v, 0x00000800); /* not enabled */
	bus_write(card->rig.pio, 0xcf8, v, 4);
	bus_read(card->rig.pio, 0xcfc, v, 4);
	cr_expect_eq(get_le32(v), 0xffffffff);
	put_le32(v, 0x80010800); /* another bus */
	bus_write(card->rig.pio, 0xcf8, v, 4);
	bus_read(card->rig.pio, 0xcfc, v, 4);
	cr_expect_eq(get_le32(v), 0xffffffff);
	v[0] = 1;
	bus_write(card->rig.pio, 0xcfb, v, 1); /* Linux probes so; must not change the address */
	bus_read(card->rig.pio, 0xcf8, v, 4);
	cr_expect_eq(get_le32(v), 0x80010800);
	v[0] = 2;
	bus_write(card->rig.pio, ACPI_RESET_PORT, v, 1);
	cr_expect_eq(card->rig.resets, 0);
	v[0] = 6;
	bus_write(card->rig.pio, ACPI_RESET_PORT, v, 1);
	cr_expect_eq(card->rig.resets, 1);
	card_destroy(card);
}

Test(pci, bars_are_placed_sized_and_moved)
{
	struct card *card = card_create();
	struct rig *rig = &card->rig;
	uint64_t first = rig_bar(rig, 1, 1), wide = rig_bar(rig, 1, 4);

	cr_expect(first >= PCI_MMIO32_BASE && first < PCI_MMIO32_END && first % 0x1000 == 0);
	cr_expect(wide >= PCI_MMIO32_BASE && wide < PCI_MMIO32_END && wide % 0x10000 == 0);
	cr_expect_eq(card->moved_to[1], first);
	rig_mmio_write(rig, first + 8, 0x1122334455667788, 8);
	cr_expect_eq(rig_mmio_read(rig, first + 8, 8), 0x1122334455667788);

	/* Sizing as Linux does it: decoding off, all ones, read, restore, decoding on. */
	rig_config_write(rig, 1, 4, 0, 2);
	cr_expect_eq(card->moved_to[1], PCI_UNMAPPED);
	cr_expect_eq(rig_mmio_read(rig, first + 8, 8), UINT64_MAX);
	rig_config_write(rig, 1, 0x14, 0xffffffff, 4);
	cr_expect_eq(rig_config_read(rig, 1, 0x14, 4), 0xfffff000);
	rig_config_write(rig, 1, 0x20, 0xffffffff, 4);
	rig_config_write(rig, 1, 0x24, 0xffffffff, 4);
	cr_expect_eq(rig_config_read(rig, 1, 0x20, 4), 0xffff0004);
	cr_expect_eq(rig_config_read(rig, 1, 0x24, 4), 0xffffffff);
	rig_config_write(rig, 1, 0x18, 0xffffffff, 4);
	cr_expect_eq(rig_config_read(rig, 1, 0x18, 4), 0, "no BAR 2");
	rig_config_write(rig, 1, 0x14, 0xd0001000, 4);
	rig_config_write(rig, 1, 0x20, 0x00000000, 4);
	rig_config_write(rig, 1, 0x24, 0x00000008, 4);
	rig_config_write(rig, 1, 4, 2, 2);
	cr_expect_eq(card->moved_to[1], 0xd0001000);
	cr_expect_eq(rig_mmio_read(rig, 0xd0001008, 8), 0x1122334455667788);
	cr_expect_eq(rig_mmio_read(rig, first + 8, 8), UINT64_MAX);
	cr_expect_eq(rig_bar(rig, 1, 4), 0x800000000);

	/* On top of each other: one of the two answers, nothing breaks, and it comes back when there is room. */
	rig_config_write(rig, 1, 0x14, rig_config_read(rig, 1, 0x10, 4), 4);
	cr_expect_eq(card->moved_to[1], PCI_UNMAPPED);
	rig_config_write(rig, 1, 0x14, 0xd0002000, 4);
	cr_expect_eq(card->moved_to[1], 0xd0002000);
	card_destroy(card);
}

Test(pci, msix_masks_and_pending_bits)
{
	struct card *card = card_create();
	struct rig *rig = &card->rig;
	unsigned cap = rig_capability(rig, 1, 0x11, 0);
	uint64_t table = rig_bar(rig, 1, 0);

	cr_assert_neq(cap, 0);
	cr_expect_eq(rig_config_read(rig, 1, cap + 2, 2), 3, "four vectors");
	cr_expect_eq(rig_config_read(rig, 1, cap + 4, 4), 0);
	cr_expect_eq(rig_config_read(rig, 1, cap + 8, 4), 0x800);
	cr_expect_eq(rig_mmio_read(rig, table + 12, 4), 1, "masked after reset");
	rig_mmio_write(rig, table + 16, RIG_MSI_ADDRESS, 8);
	rig_mmio_write(rig, table + 24, 9, 4);
	pci_msix_trigger(card->dev, 1);
	cr_expect_eq(rig_mmio_read(rig, table + 0x800, 8), 0, "off: not even pending");

	rig_config_write(rig, 1, cap + 2, 0x8000, 2);
	pci_msix_trigger(card->dev, 1);
	pci_msix_trigger(card->dev, 1);
	cr_expect_eq(rig->msis[9], 0);
	cr_expect_eq(rig_mmio_read(rig, table + 0x800, 8), 2);
	rig_mmio_write(rig, table + 28, 0, 4);
	cr_expect_eq(rig->msis[9], 1, "sent when unmasked, once");
	cr_expect_eq(rig_mmio_read(rig, table + 0x800, 8), 0);
	pci_msix_trigger(card->dev, 1);
	cr_expect_eq(rig->msis[9], 2);
	rig_config_write(rig, 1, cap + 2, 0xc000, 2);
	pci_msix_trigger(card->dev, 1);
	cr_expect_eq(rig->msis[9], 2);
	rig_config_write(rig, 1, cap + 2, 0x8000, 2);
	cr_expect_eq(rig->msis[9], 3);
	pci_msix_trigger(card->dev, 77);
	rig_mmio_write(rig, table + 0x7f0, 1, 4);
	rig_mmio_write(rig, table + 24, 0xffffffff, 4);
	pci_msix_trigger(card->dev, 1); /* a vector that KVM refuses: logged once, no harm */
	pci_msix_trigger(card->dev, 1);
	card_destroy(card);
}

Test(pci, intx_follows_wish_disable_bit_and_msix)
{
	struct card *card = card_create();
	struct rig *rig = &card->rig;
	unsigned cap = rig_capability(rig, 1, 0x11, 0);

	pci_intx_set(card->dev, true);
	cr_expect(rig->lines[17]);
	cr_expect_eq(rig_config_read(rig, 1, 6, 2) & 8, 8);
	rig_config_write(rig, 1, 4, 0x402, 2);
	cr_expect(!rig->lines[17]);
	cr_expect_eq(rig_config_read(rig, 1, 6, 2) & 8, 8, "the status bit does not depend on the disable bit");
	rig_config_write(rig, 1, 4, 0x002, 2);
	cr_expect(rig->lines[17]);
	rig_config_write(rig, 1, cap + 2, 0x8000, 2);
	cr_expect(!rig->lines[17]);
	rig_config_write(rig, 1, cap + 2, 0, 2);
	cr_expect(rig->lines[17]);
	pci_intx_set(card->dev, false);
	cr_expect(!rig->lines[17]);
	card_destroy(card);
}

Test(pci, shared_line_is_high_while_anyone_asserts)
{
	struct rig rig;
	struct pci_device *dev[5];
	const struct pci_config config = {.name = "card", .intx = true};

	rig_create(&rig);
	for (int i = 0; i < 5; i++)
		cr_assert_eq(pci_device_create(rig.pci, &config, &dev[i], NULL), 0);
	pci_intx_set(dev[0], true); /* slots 1 and 5 share GSI 17 */
	pci_intx_set(dev[4], true);
	pci_intx_set(dev[0], false);
	cr_expect(rig.lines[17]);
	pci_intx_set(dev[4], false);
	cr_expect(!rig.lines[17]);
	for (int i = 0; i < 5; i++)
		pci_device_destroy(dev[i]);
	rig_destroy(&rig);
}

Test(pci, state_goes_there_and_back)
{
	struct card *card = card_create();
	struct rig *rig = &card->rig;
	struct component bus = pci_bus_component(rig->pci);
	static uint8_t bus_state[8192];
	struct pci_state saved, again;
	uint64_t table = rig_bar(rig, 1, 0), place = rig_bar(rig, 1, 1);
	unsigned cap = rig_capability(rig, 1, 0x11, 0);

	memset(&saved, 0, sizeof(saved));
	memset(&again, 0, sizeof(again));
	cr_assert(bus.table->size <= sizeof(bus_state));
	rig_mmio_write(rig, table + 16, RIG_MSI_ADDRESS, 8);
	rig_mmio_write(rig, table + 24, 9, 4);
	rig_config_write(rig, 1, cap + 2, 0x8000, 2);
	pci_msix_trigger(card->dev, 1);
	pci_intx_set(card->dev, true);
	rig_select(rig, 1, 0x10);
	cr_assert_eq(bus.capture(bus.opaque, bus_state, NULL), 0);
	pci_capture(card->dev, &saved);

	/* The two small BARs change places, everything else changes too. */
	rig_config_write(rig, 1, 4, 0, 2);
	rig_config_write(rig, 1, 0x10, (uint32_t)place, 4);
	rig_config_write(rig, 1, 0x14, (uint32_t)table, 4);
	rig_config_write(rig, 1, 4, 2, 2);
	cr_expect_eq(card->moved_to[1], table);
	rig_mmio_write(rig, place + 28, 0, 4);
	rig_config_write(rig, 1, cap + 2, 0, 2);
	pci_intx_set(card->dev, false);
	cr_expect_eq(rig->msis[9], 1);

	struct err err = ERR_INIT;
	cr_assert_eq(bus.validate(bus.opaque, bus_state, &err), 0, "%s", err.message);
	cr_assert_eq(pci_validate(card->dev, &saved, &err), 0, "%s", err.message);
	cr_assert_eq(bus.apply(bus.opaque, bus_state, &err), 0, "%s", err.message);
	cr_assert_eq(pci_apply(card->dev, &saved, &err), 0, "%s", err.message);
	pci_capture(card->dev, &again);
	cr_expect_arr_eq(&saved, &again, sizeof(saved));
	cr_expect_eq(card->moved_to[1], place);
	uint8_t v[4];
	bus_read(rig->pio, 0xcf8, v, 4);
	cr_expect_eq(get_le32(v), 0x80000810);
	rig_mmio_write(rig, table + 28, 0, 4);
	cr_expect_eq(rig->msis[9], 2, "pending again, and sent again");
	rig_config_write(rig, 1, cap + 2, 0, 2);
	cr_expect(rig->lines[17]);

	again = saved;
	again.config[0] ^= 1;
	cr_expect_lt(pci_validate(card->dev, &again, &err), 0);
	cr_expect_eq(err.class, ERR_DAMAGED);
	again = saved;
	again.vector_count = 3;
	cr_expect_lt(pci_validate(card->dev, &again, &err), 0);
	again = saved;
	again.pending = 0x10;
	cr_expect_lt(pci_validate(card->dev, &again, &err), 0);
	card_destroy(card);
}

/* To go back to a state in which nothing lies elsewhere moves nothing: a doorbell is dear to move. */
Test(pci, bars_that_stay_are_left_alone)
{
	struct card *card = card_create();
	struct component bus = pci_bus_component(card->rig.pci);
	CLEANUP_FREE void *bus_state = xcalloc(1, bus.table->size);
	struct pci_state saved;
	struct err err = ERR_INIT;

	memset(&saved, 0, sizeof(saved));
	cr_assert_eq(bus.capture(bus.opaque, bus_state, NULL), 0);
	pci_capture(card->dev, &saved);
	uint64_t place = card->moved_to[1];
	card->moved_to[1] = card->moved_to[4] = 42;
	cr_assert_eq(bus.apply(bus.opaque, bus_state, &err), 0, "%s", err.message);
	cr_assert_eq(pci_apply(card->dev, &saved, &err), 0, "%s", err.message);
	cr_expect_eq(card->moved_to[1], 42);
	cr_expect_eq(card->moved_to[4], 42);
	uint8_t v[4] = {7};
	bus_write(card->rig.mmio, place, v, 4);
	cr_expect_eq(card->stored[0], 7, "and they still work");
	card_destroy(card);
}

/* Where one function's BAR goes back to lies another one's now, which is put back later. */
Test(pci, bars_of_two_functions_change_places)
{
	struct card *card = card_create(), other = {0};
	struct rig *rig = &card->rig;
	struct component bus = pci_bus_component(rig->pci);
	CLEANUP_FREE void *bus_state = xcalloc(1, bus.table->size);
	struct pci_state saved[2];
	struct err err = ERR_INIT;
	const struct pci_config config = {.name = "other", .vendor = 1, .device = 2, .opaque = &other, .bar_moved = card_moved};

	cr_assert_eq(pci_device_create(rig->pci, &config, &other.dev, &err), 0);
	cr_assert_eq(pci_device_add_bar(other.dev, 1, false, 0x1000, &card_ops, &other, &err), 0);
	cr_assert_eq(pci_device_place(other.dev, &err), 0, "%s", err.message);
	uint32_t place[2] = {(uint32_t)card->moved_to[1], (uint32_t)other.moved_to[1]};
	memset(saved, 0, sizeof(saved));
	cr_assert_eq(bus.capture(bus.opaque, bus_state, NULL), 0);
	pci_capture(card->dev, &saved[0]);
	pci_capture(other.dev, &saved[1]);
	rig_config_write(rig, 1, 4, 0, 2);
	rig_config_write(rig, 2, 0x14, place[0], 4);
	rig_config_write(rig, 1, 0x14, place[1], 4);
	rig_config_write(rig, 1, 4, 2, 2);
	cr_assert_eq(card->moved_to[1], place[1]);
	cr_assert_eq(other.moved_to[1], place[0]);
	cr_assert_eq(bus.apply(bus.opaque, bus_state, &err), 0, "%s", err.message);
	cr_assert_eq(pci_apply(card->dev, &saved[0], &err), 0, "%s", err.message);
	cr_assert_eq(pci_apply(other.dev, &saved[1], &err), 0, "%s", err.message);
	cr_expect_eq(card->moved_to[1], place[0]);
	cr_expect_eq(other.moved_to[1], place[1]);
	pci_device_destroy(other.dev);
	card_destroy(card);
}

Test(pci, state_is_encoded_and_decoded)
{
	struct card *card = card_create();
	struct pci_state saved, again;
	CLEANUP_BUF struct buf buf = BUF_INIT;
	struct err err = ERR_INIT;

	memset(&saved, 0, sizeof(saved));
	pci_capture(card->dev, &saved);
	cr_assert_eq(codec_encode(&pci_state_table, &saved, &buf, &err), 0, "%s", err.message);
	cr_assert_eq(codec_decode(&pci_state_table, buf.data, buf.length, &again, &err), 0, "%s", err.message);
	cr_expect_eq(memcmp(saved.config, again.config, sizeof(saved.config)), 0);
	cr_expect_eq(again.vector_count, 4);
	card_destroy(card);
}

Test(pci, more_devices_than_slots)
{
	struct rig rig;
	struct pci_device *dev[PCI_DEVICES];
	const struct pci_config config = {.name = "card"};
	struct err err = ERR_INIT;

	rig_create(&rig);
	for (unsigned i = 0; i < PCI_DEVICES - 1; i++)
		cr_assert_eq(pci_device_create(rig.pci, &config, &dev[i], &err), 0);
	cr_expect_lt(pci_device_create(rig.pci, &config, &dev[PCI_DEVICES - 1], &err), 0);
	for (unsigned i = 0; i < PCI_DEVICES - 1; i++)
		pci_device_destroy(dev[i]);
	rig_destroy(&rig);
}
