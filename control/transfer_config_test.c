#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

#include "control/transfer_config.h"

#define MACHINE "[vm]\nname = web\nmemory = 64M\ncpus = 2\nlibvirt = test:///theirs\nkernel = /etc/shadow\ninitrd = /root/secret\ncmdline = console=ttyS0\ncpu_model = host\n"
#define DISKS	"\n[disk data]\nbase = /dev/sda\n\n[disk seed]\npath = /etc/passwd\nreadonly = yes\n"
#define CARDS                                                                                                                                      \
	"\n[net lan]\nmode = tap\ntap = secret0\nmac = 52:54:00:12:34:56\n\n[net dmz]\nmode = bridge\nbridge = office0\n\n[net own]\nmode = user\nforward = tcp:22:22\n\n[net virt]\nmode = libvirt\nnetwork = theirs\n"

static struct transfer_disk disks[2] = {{.name = "data", .path = (char *)(uintptr_t)"/store/vms/new/data.qcow2"},
					{.name = "seed", .path = (char *)(uintptr_t)"/store/vms/new/seed@1.qcow2", .readonly = true}};

static int place(const char *text, const char *base, uint64_t memory, struct buf *out, struct err *err)
{
	const struct transfer_place where = {
		.vm = "new", .memory_bytes = memory, .cpus = 2, .disks = disks, .disk_count = 2, .base_config = base};
	return control_transfer_config.place("text", text, &where, out, err);
}

static void expect(const struct buf *text, const char *part, bool there)
{
	cr_expect_eq(strstr((const char *)text->data, part) != NULL, there, "'%s' in\n%s", part, (const char *)text->data);
}

Test(transfer_config, nothing_of_the_other_host_is_left)
{
	static const char *const gone[] = {"shadow", "secret", "/dev/sda", "passwd", "office0", "forward", "tap", "bridge", "libvirt", "theirs"};
	struct buf text = BUF_INIT;
	struct err err = ERR_INIT;

	cr_assert_eq(place(MACHINE DISKS CARDS, NULL, 64 << 20, &text, &err), 0, "%s", err.message);
	for (size_t i = 0; i < ARRAY_LENGTH(gone); i++)
		expect(&text, gone[i], false);
	expect(&text, "name = new\n", true);
	expect(&text, "path = /store/vms/new/data.qcow2\n", true);
	expect(&text, "path = /store/vms/new/seed@1.qcow2\nreadonly = yes\n", true);
	expect(&text, "52:54:00:12:34:56", true);
	expect(&text, "mode = user", true);
	buf_free(&text);
}

Test(transfer_config, what_the_parent_here_has_is_ours)
{
	static const char base[] = "[vm]\nname = old\nlibvirt = qemu:///session\nmemory = 64M\ncpus = 2\nkernel = /boot/mine\n\n[net lan]\nmode = tap\ntap = mine0\n\n[net virt]\nmode = libvirt\nnetwork = ours\n";
	struct buf text = BUF_INIT;
	struct err err = ERR_INIT;

	cr_assert_eq(place(MACHINE DISKS CARDS, base, 64 << 20, &text, &err), 0, "%s", err.message);
	expect(&text, "kernel = /boot/mine\n", true);
	expect(&text, "tap = mine0", true);
	expect(&text, "network = ours", true);
	expect(&text, "libvirt = qemu:///session", true);
	expect(&text, "theirs", false);
	expect(&text, "secret", false);
	expect(&text, "office0", false);
	buf_free(&text);
}

Test(transfer_config, what_does_not_fit_is_refused)
{
	struct buf text = BUF_INIT;
	struct err err = ERR_INIT;

	cr_expect_eq(place(MACHINE DISKS, NULL, 32 << 20, &text, &err), -EINVAL, "another size of memory");
	cr_expect_eq(err.class, ERR_DAMAGED);
	cr_expect_eq(place(MACHINE DISKS "\n[disk more]\npath = /dev/sdb\n", NULL, 64 << 20, &text, &err), -EINVAL, "another disk");
	cr_expect_eq(err.class, ERR_DAMAGED);
	cr_expect_eq(place("[vm]\nnonsense = 1\n", NULL, 64 << 20, &text, &err), -EINVAL);
	cr_expect_eq(err.class, ERR_DAMAGED);
	cr_expect_eq(text.length, 0);
}
