#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checkpoint/store/transfer_test.h"

void test_stream_begin(struct test_stream *s)
{
	uint8_t start[TRANSFER_START_BYTES];

	*s = (struct test_stream){.packer = transfer_make_packer()};
	s->slot.content = malloc(TRANSFER_MAX_CONTENT);
	s->slot.packed = malloc(transfer_packed_bound());
	transfer_put_start(start);
	if (!s->packer || !s->slot.content || !s->slot.packed || transfer_ledger_init(&s->ledger, NULL) ||
	    buf_append(&s->bytes, start, sizeof(start), NULL))
		abort();
}

void test_stream_chunk(struct test_stream *s, uint32_t kind, const void *content, size_t length)
{
	uint8_t header[TRANSFER_HEADER_BYTES];

	length = min_u64(length, TRANSFER_MAX_CONTENT);
	s->slot.header = (struct transfer_header){.kind = kind, .number = s->ledger.chunks, .content_bytes = (uint32_t)length};
	if (length)
		memcpy(s->slot.content, content, length);
	if (transfer_pack(&s->slot, s->packer, NULL))
		abort();
	transfer_put_header(header, &s->slot.header);
	if (buf_append(&s->bytes, header, sizeof(header), NULL) || buf_append(&s->bytes, s->slot.packed, s->slot.header.packed_bytes, NULL) ||
	    transfer_ledger_add(&s->ledger, &s->slot.header, NULL))
		abort();
}

void test_stream_end(struct test_stream *s)
{
	uint8_t end[TRANSFER_END_BYTES];

	transfer_ledger_end(&s->ledger, end);
	test_stream_chunk(s, TRANSFER_END, end, sizeof(end));
	if (transfer_ledger_table(&s->ledger, &s->bytes, NULL))
		abort();
}

void test_stream_free(struct test_stream *s)
{
	transfer_free_packer(s->packer);
	transfer_ledger_free(&s->ledger);
	free(s->slot.content);
	free(s->slot.packed);
	buf_free(&s->bytes);
}

void test_stream_machine(struct test_stream *s, void (*change)(struct transfer_head *head, struct store_checkpoint *checkpoint))
{
	static const char state[] = "the state", config[] = "[vm]\nname = web\nmemory = 256K\ncpus = 1\nkernel = /etc/shadow\n"
							    "[disk data]\npath = /dev/sda\n[disk seed]\npath = /etc/passwd\nreadonly = yes\n";
	struct transfer_head head = {.id = TEST_STREAM_ID, .tag = "kept", .disk_count = 2};
	struct store_disk_layer disk = {.disk = "data", .layer = TEST_STREAM_ID, .format = "raw", .size_bytes = 1 << 20};
	struct store_checkpoint c = {.id = TEST_STREAM_ID,
				     .vm = "web",
				     .vm_uuid = "11111111-2222-4333-8444-555555555555",
				     .created_wall_ns = 1700000000000000000,
				     .memory_bytes = TEST_STREAM_PAGES * PAGE_BYTES,
				     .cpus = 1,
				     .memory_layer = TEST_STREAM_ID,
				     .disk_count = 1,
				     .disks = &disk,
				     .config_text = (char *)(uintptr_t)config,
				     .state_bytes = sizeof(state),
				     .state_xxh3 = XXH3_64bits(state, sizeof(state))};
	struct buf text = BUF_INIT, manifest = BUF_INIT;

	head.disks[0] = (struct transfer_head_disk){.name = "data", .size_bytes = 1 << 20};
	head.disks[1] = (struct transfer_head_disk){.name = "seed", .size_bytes = 65536, .readonly = true};
	if (change)
		change(&head, &c);
	if (transfer_head_encode(&head, &text, NULL) || manifest_encode(&c, &manifest, NULL))
		abort();
	test_stream_chunk(s, TRANSFER_HEAD, text.data, text.length);
	test_stream_chunk(s, TRANSFER_MANIFEST, manifest.data, manifest.length);
	test_stream_chunk(s, TRANSFER_STATE, state, sizeof(state));
	buf_free(&text);
	buf_free(&manifest);
}

void test_stream_runs(struct test_stream *s, uint32_t kind, uint32_t object, uint32_t count, const uint64_t (*runs)[3], size_t data_bytes)
{
	size_t head = TRANSFER_RUNS_BYTES + (size_t)count * TRANSFER_RUN_BYTES;
	uint8_t *content = calloc(1, head + data_bytes + 1);

	if (!content)
		abort();
	put_le32(content, count);
	put_le32(content + 4, object);
	for (uint32_t i = 0; i < count; i++) {
		uint8_t *entry = content + TRANSFER_RUNS_BYTES + (size_t)i * TRANSFER_RUN_BYTES;

		put_le64(entry, runs[i][0]);
		put_le64(entry + 8, runs[i][1]);
		put_le32(entry + 16, (uint32_t)runs[i][2]);
	}
	for (size_t i = 0; i < data_bytes; i++)
		content[head + i] = (uint8_t)(i / 512 + 1);
	test_stream_chunk(s, kind, content, head + data_bytes);
	free(content);
}

int test_stream_open(const void *data, size_t length)
{
	int fd = memfd_create("stream", MFD_CLOEXEC);

	if (fd < 0 || (length && write(fd, data, length) != (ssize_t)length) || lseek(fd, 0, SEEK_SET) != 0)
		abort();
	return fd;
}
