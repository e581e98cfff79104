/* The rules of cow_submit, and the small parts of requests and allocation. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "cowdisk/disk_internal.h"
#include "cowdisk/request_internal.h"

struct outcome {
	bool done;
	int result;
};

static void on_done(struct cow_request *request, int result)
{
	struct outcome *o = request->opaque;
	o->done = true;
	o->result = result;
}

static int submit(struct cow_disk *disk, struct cow_request request)
{
	struct outcome o = {0};
	request.done = on_done;
	request.opaque = &o;
	cow_submit(disk, &request);
	cr_expect(!o.done, "completed from within the submitting call");
	cr_expect_eq(cow_inflight(disk), 1);
	while (!o.done)
		cow_io_drive(cow_disk_io(disk), 100);
	cr_expect_eq(cow_inflight(disk), 0);
	return o.result;
}

static char *temporary(void)
{
	char *path = xstrdup("/tmp/vmcp-request-XXXXXX");
	int fd = mkstemp(path);
	cr_assert_geq(fd, 0);
	close(fd);
	unlink(path);
	return path;
}

Test(request, bad_ranges)
{
	static uint8_t data[8192];
	struct iovec iov = {data, 4096};
	struct cow_io *io;
	struct cow_disk *disk;
	CLEANUP_FREE char *path = temporary();
	struct cow_create create = {.size_bytes = 1 << 20};
	cr_assert_eq(cow_create(path, &create, NULL), 0);
	cr_assert_eq(cow_io_create(NULL, &io, NULL), 0);
	cr_assert_eq(cow_open(io, path, 0, &disk, NULL), 0);
	struct cow_request good = {.op = COW_WRITE, .length = 4096, .iov = &iov, .iov_count = 1}, r;
	cr_expect_eq(submit(disk, good), 0);
	r = good, r.offset = 100;
	cr_expect_eq(submit(disk, r), -EINVAL, "offset that is no multiple of 512");
	r = good, r.length = 4095;
	cr_expect_eq(submit(disk, r), -EINVAL, "length that is no multiple of 512");
	r = good, r.length = 8192;
	cr_expect_eq(submit(disk, r), -EINVAL, "more than the buffers hold");
	r = good, r.offset = (1 << 20) - 512;
	cr_expect_eq(submit(disk, r), -EINVAL, "beyond the end");
	r = good, r.offset = UINT64_MAX - 511;
	cr_expect_eq(submit(disk, r), -EINVAL, "overflow");
	r = good, r.iov_count = COW_MAX_IOV + 1;
	cr_expect_eq(submit(disk, r), -EINVAL, "too many buffers");
	r = good, r.op = (enum cow_op)17;
	cr_expect_eq(submit(disk, r), -EINVAL, "no operation");
	r = good, r.length = 0, r.iov_count = 0;
	cr_expect_eq(submit(disk, r), 0, "nothing to do is done");
	cr_expect_eq(cow_close(disk, NULL), 0);
	cr_assert_eq(cow_open(io, path, COW_OPEN_READONLY, &disk, NULL), 0);
	cr_expect_eq(submit(disk, good), -EROFS);
	r = good, r.op = COW_DISCARD;
	cr_expect_eq(submit(disk, r), -EROFS);
	r = good, r.op = COW_READ;
	cr_expect_eq(submit(disk, r), 0);
	r = good, r.op = COW_FLUSH, r.length = 0;
	cr_expect_eq(submit(disk, r), 0);
	cr_expect_eq(cow_close(disk, NULL), 0);
	cow_io_destroy(io);
	unlink(path);
}

/* A guest cannot have its raw disk opened as what it likes the next time. */
Test(request, a_raw_image_stays_one)
{
	static uint8_t data[4096], back[4096];
	const struct iovec iov[2] = {{data, 3}, {data + 3, sizeof(data) - 3}};
	struct iovec all = {back, sizeof(back)};
	struct cow_io *io;
	struct cow_disk *disk;
	CLEANUP_FREE char *path = temporary();
	cr_assert_eq(cow_create_raw(path, 1 << 20, NULL), 0);
	cr_assert_eq(cow_io_create(NULL, &io, NULL), 0);
	cr_assert_eq(cow_open(io, path, 0, &disk, NULL), 0);
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 7 + i / 256);
	struct cow_request write = {.op = COW_WRITE, .length = sizeof(data), .iov = iov, .iov_count = 2}, r = write;
	struct cow_request read = {.op = COW_READ, .length = sizeof(back), .iov = &all, .iov_count = 1};
	cr_expect_eq(submit(disk, write), 0);
	put_be32(data, QCOW2_MAGIC);
	cr_expect_eq(submit(disk, write), -EPERM);
	cr_assert_eq(submit(disk, read), 0);
	cr_expect_eq(back[0], 0);
	put_be32(data, 0x00070e15);
	cr_expect_eq(memcmp(back, data, sizeof(data)), 0, "what was written before");
	put_be32(data, QCOW2_MAGIC);
	r.offset = 4096;
	cr_expect_eq(submit(disk, r), 0, "elsewhere it is data");
	cr_expect_eq(cow_close(disk, NULL), 0);
	/* Who says that it is raw need not guess the next time. */
	cr_assert_eq(cow_open_as(io, path, COW_FORMAT_RAW, 0, &disk, NULL), 0);
	cr_expect_eq(submit(disk, write), 0);
	cr_expect_eq(cow_close(disk, NULL), 0);
	cow_io_destroy(io);
	unlink(path);
}

Test(request, slices_of_buffers)
{
	uint8_t data[100];
	struct iovec iov[3] = {{data, 10}, {data + 10, 20}, {data + 30, 70}}, out[3];
	cr_expect_eq(cow_req_slice_iov(iov, 3, 0, 100, out), 3);
	cr_expect_eq(cow_req_slice_iov(iov, 3, 10, 20, out), 1);
	cr_expect_eq(out[0].iov_base, data + 10);
	cr_expect_eq(out[0].iov_len, 20);
	cr_expect_eq(cow_req_slice_iov(iov, 3, 5, 30, out), 3);
	cr_expect_eq(out[0].iov_base, data + 5);
	cr_expect_eq(out[0].iov_len, 5);
	cr_expect_eq(out[2].iov_len, 5);
	cr_expect_eq(cow_req_slice_iov(iov, 3, 99, 1, out), 1);
	cr_expect_eq(out[0].iov_base, data + 99);
	cr_expect_eq(cow_req_slice_iov(iov, 3, 0, 0, NULL), 0);
}

Test(request, cluster_set_against_a_plain_array)
{
	struct cluster_set set = {0};
	bool plain[512] = {false};
	uint64_t seed = 7;
	cr_expect(!cluster_set_has(&set, 0));
	for (int n = 0; n < 20000; n++) {
		seed = seed * 6364136223846793005ull + 1442695040888963407ull;
		uint64_t cluster = seed >> 55;
		if (seed >> 32 & 1)
			cluster_set_add(&set, cluster);
		else
			cluster_set_remove(&set, cluster);
		plain[cluster] = seed >> 32 & 1;
		if (n % 100 == 0)
			for (uint64_t c = 0; c < 512; c++)
				cr_assert_eq(cluster_set_has(&set, c), plain[c]);
	}
	free(set.slots);
}

Test(request, names_of_backing_files)
{
	static const struct {
		const char *referrer, *name, *want;
	} cases[] = {
		{"top.qcow2", "base.qcow2", "base.qcow2"},
		{"/a/b/top.qcow2", "base.qcow2", "/a/b/base.qcow2"},
		{"a/top.qcow2", "../base.qcow2", "a/../base.qcow2"},
		{"/a/top.qcow2", "/c/base.qcow2", "/c/base.qcow2"},
		{"/a/top.qcow2", "file:base.qcow2", "/a/base.qcow2"},
		{"/a/top.qcow2", "./with:colon", "/a/./with:colon"},
		{"/a/top.qcow2", "nbd://host/x", NULL},
		{"/a/top.qcow2", "json:{}", NULL},
	};
	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		char *path = NULL;
		int rc = cow_resolve_name(cases[i].referrer, cases[i].name, &path, NULL);
		cr_expect_eq(rc, cases[i].want ? 0 : -ENOTSUP);
		if (cases[i].want)
			cr_expect_str_eq(path, cases[i].want);
		free(path);
	}
}
