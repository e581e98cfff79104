/* Imports of streams that are well-formed on the outside and wrong within: sums fit, sizes, numbers, names and order do not. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/fault.h"
#include "checkpoint/store/store_test.h"
#include "checkpoint/store/transfer_test.h"

TestSuite(transfer, .init = store_test_make_work, .fini = store_test_remove_work, .timeout = 200);

/* The machine of test_stream_machine, whatever the text says. */
static int list_disks(const char *what, const char *text, struct transfer_disk *disks, uint32_t *count, struct err *err)
{
	(void)what;
	(void)text;
	(void)err;
	*count = 2;
	disks[0] = (struct transfer_disk){.name = "data", .path = xstrdup("/dev/sda")};
	disks[1] = (struct transfer_disk){.name = "seed", .path = xstrdup("/etc/passwd"), .readonly = true};
	return 0;
}

static int place(const char *what, const char *text, const struct transfer_place *place, struct buf *out, struct err *err)
{
	(void)what;
	(void)text;
	cr_expect_eq(place->disk_count, 2);
	for (uint32_t i = 0; i < place->disk_count; i++)
		cr_expect(strncmp(place->disks[i].path, store_test_folder, strlen(store_test_folder)) == 0, "%s", place->disks[i].path);
	return buf_append(out, "[vm]\n", 6, err);
}

static const struct transfer_config config = {list_disks, place};
static const struct transfer_options options = {.config = &config};

static int import_bytes(struct store *store, const struct buf *bytes, const char *name, struct transfer_result *result, struct err *err)
{
	CLEANUP_CLOSE int fd = test_stream_open(bytes->data, bytes->length);

	*err = ERR_INIT;
	return transfer_import(store, fd, "stream", name, &options, result, err);
}

/* Refused as damaged, by the check alone and by the store, which stays as it was. */
static void expect_damaged(struct test_stream *s, const char *what)
{
	CLEANUP_FREE char *before = store_test_listing();
	struct transfer_result result;
	struct err err;

	test_stream_end(s);
	for (unsigned i = 0; i < 2; i++) {
		int rc = import_bytes(i ? store_test_store : NULL, &s->bytes, NULL, &result, &err);

		cr_expect_lt(rc, 0, "%s: taken", what);
		cr_expect_eq(err.class, ERR_DAMAGED, "%s: %s", what, err.message);
		cr_expect(strncmp(err.message, "stream: ", 8) == 0, "%s: %s", what, err.message);
	}
	CLEANUP_FREE char *after = store_test_listing();
	cr_expect_str_eq(after, before, "%s", what);
	test_stream_free(s);
}

static void begin(struct test_stream *s)
{
	test_stream_begin(s);
	test_stream_machine(s, NULL);
}

static const uint64_t good_pages[][3] = {{3, 2, 1}, {10, 1, 1}}, good_sectors[][3] = {{0, 1024, 1}, {524288, 512, 1}}, good_seed[][3] = {{512, 512, 1}};

static void fill(struct test_stream *s)
{
	test_stream_runs(s, TRANSFER_MEMORY, 0, 2, good_pages, 3 * PAGE_BYTES);
	test_stream_runs(s, TRANSFER_DISK, 0, 2, good_sectors, 1536);
	test_stream_runs(s, TRANSFER_DISK, 1, 1, good_seed, 512);
}

Test(transfer, what_is_right_is_taken_once)
{
	struct test_stream s;
	struct transfer_result result;
	struct store_checkpoint c;
	struct store_vm vm;
	struct err err;
	char id[STORE_ID_BYTES];

	begin(&s);
	fill(&s);
	test_stream_end(&s);
	cr_assert_eq(import_bytes(NULL, &s.bytes, NULL, &result, &err), 0, "%s", err.message);
	cr_assert_eq(import_bytes(store_test_store, &s.bytes, NULL, &result, &err), 0, "%s", err.message);
	cr_expect_eq(result.pages, 3);
	cr_expect_eq(result.disk_bytes, 2048);
	cr_expect_str_eq(result.tag, "kept");
	cr_assert_eq(store_checkpoint_get(store_test_store, TEST_STREAM_ID, &c, &err), 0, "%s", err.message);
	cr_expect_eq(c.saved_pages, 3);
	cr_expect_eq(c.zero_pages, TEST_STREAM_PAGES - 3);
	cr_expect_str_eq(c.config_text, "[vm]\n");
	store_checkpoint_free(&c);
	cr_assert_eq(store_resolve(store_test_store, "kept", id, &err), 0);
	cr_assert_eq(store_vm_get(store_test_store, "web", &vm, &err), 0);
	cr_expect_str_eq(vm.at, TEST_STREAM_ID);
	cr_expect_str_eq(vm.state, "stopped");
	store_vm_free(&vm);
	cr_assert_eq(import_bytes(store_test_store, &s.bytes, NULL, &result, &err), 0);
	cr_expect(result.present);
	cr_expect_eq(store_test_count_in("staging", ""), 0);
	test_stream_free(&s);
}

static void other_time(struct transfer_head *head, struct store_checkpoint *c)
{
	(void)head;
	c->created_wall_ns++;
}

static void other_vm(struct transfer_head *head, struct store_checkpoint *c)
{
	strcpy(c->vm_uuid, "21111111-2222-4333-8444-555555555555");
	c->id[0] = head->id[0] = 'f';
}

static void needs_another(struct transfer_head *head, struct store_checkpoint *c)
{
	(void)c;
	memset(head->since, 'e', STORE_ID_BYTES - 1);
}

static void import_changed(void (*change)(struct transfer_head *, struct store_checkpoint *), const char *name, int want, enum err_class class)
{
	struct test_stream s;
	struct transfer_result result;
	struct err err;

	test_stream_begin(&s);
	test_stream_machine(&s, change);
	test_stream_end(&s);
	cr_expect_eq(import_bytes(store_test_store, &s.bytes, name, &result, &err), want, "%s", err.message);
	cr_expect(want == 0 || err.class == class, "%s", err.message);
	cr_expect_eq(store_test_count_in("staging", ""), 0);
	test_stream_free(&s);
}

Test(transfer, what_is_here_already_is_nobodys_to_change)
{
	char id[STORE_ID_BYTES];
	struct err err = ERR_INIT;

	import_changed(NULL, NULL, 0, 0);
	import_changed(other_time, NULL, -EEXIST, ERR_STATE);
	import_changed(needs_another, NULL, 0, 0); /* present: what it would stand on does not matter */
	import_changed(other_vm, NULL, -EEXIST, ERR_STATE);
	import_changed(other_vm, "other", 0, 0);
	cr_assert_eq(store_resolve(store_test_store, "kept", id, &err), 0);
	cr_expect_str_eq(id, TEST_STREAM_ID, "the tag stays where it was");
	cr_expect_eq(store_test_count_listed(store_test_store, "other"), 1);
	cr_assert_eq(store_checkpoint_remove(store_test_store, TEST_STREAM_ID, true, &(struct store_freed){0}, &err), 0, "%s", err.message);
	import_changed(needs_another, NULL, -ENOENT, ERR_NOT_FOUND);
	import_changed(NULL, "../escape", -EINVAL, ERR_USAGE);
}

Test(transfer, runs_that_are_none)
{
	static const struct {
		const char *what;
		uint32_t kind, object, count;
		uint64_t runs[3][3];
		size_t data;
	} bad[] = {
		{"a page past the end", TRANSFER_MEMORY, 0, 1, {{TEST_STREAM_PAGES, 1, 1}}, PAGE_BYTES},
		{"pages past the end", TRANSFER_MEMORY, 0, 1, {{TEST_STREAM_PAGES - 1, 2, 1}}, 2 * PAGE_BYTES},
		{"a count that wraps around", TRANSFER_MEMORY, 0, 1, {{1, UINT64_MAX, 0}}, 0},
		{"a size that wraps around", TRANSFER_MEMORY, 0, 1, {{0, (1ull << 52) + 1, 1}}, PAGE_BYTES},
		{"no pages", TRANSFER_MEMORY, 0, 1, {{0, 0, 0}}, 0},
		{"no runs", TRANSFER_MEMORY, 0, 0, {{0}}, 0},
		{"another kind", TRANSFER_MEMORY, 0, 1, {{0, 1, 2}}, PAGE_BYTES},
		{"backwards", TRANSFER_MEMORY, 0, 2, {{4, 1, 0}, {3, 1, 0}}, 0},
		{"overlapping", TRANSFER_MEMORY, 0, 2, {{4, 4, 0}, {7, 1, 0}}, 0},
		{"too little data", TRANSFER_MEMORY, 0, 1, {{0, 2, 1}}, PAGE_BYTES},
		{"too much data", TRANSFER_MEMORY, 0, 1, {{0, 1, 1}}, 2 * PAGE_BYTES},
		{"data of zeroes", TRANSFER_MEMORY, 0, 1, {{0, 1, 0}}, PAGE_BYTES},
		{"another memory", TRANSFER_MEMORY, 1, 1, {{0, 1, 0}}, 0},
		{"another disk", TRANSFER_DISK, 2, 1, {{0, 512, 0}}, 0},
		{"a disk of no number", TRANSFER_DISK, UINT32_MAX, 1, {{0, 512, 0}}, 0},
		{"half a sector", TRANSFER_DISK, 0, 1, {{0, 256, 1}}, 256},
		{"between sectors", TRANSFER_DISK, 0, 1, {{256, 512, 1}}, 512},
		{"past the disk's end", TRANSFER_DISK, 1, 1, {{65536, 512, 1}}, 512},
		{"no chunk", TRANSFER_END + 1, 0, 1, {{0, 512, 0}}, 0},
		{"no end", TRANSFER_END, 0, 1, {{0, 512, 0}}, 0},
	};
	struct test_stream s;

	for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) {
		begin(&s);
		test_stream_runs(&s, bad[i].kind, bad[i].object, bad[i].count, bad[i].runs, bad[i].data);
		expect_damaged(&s, bad[i].what);
	}
	begin(&s);
	test_stream_chunk(&s, TRANSFER_MEMORY, "runs", 4);
	expect_damaged(&s, "hardly anything");
	begin(&s);
	test_stream_runs(&s, TRANSFER_MEMORY, 0, 1, good_pages, 2 * PAGE_BYTES);
	test_stream_runs(&s, TRANSFER_MEMORY, 0, 1, good_pages, 2 * PAGE_BYTES);
	expect_damaged(&s, "the same pages again");
	begin(&s);
	test_stream_runs(&s, TRANSFER_DISK, 1, 1, good_seed, 512);
	test_stream_runs(&s, TRANSFER_DISK, 0, 1, good_sectors, 1024);
	expect_damaged(&s, "disks in another order");
}

Test(transfer, chunks_in_another_order)
{
	struct test_stream s;

	test_stream_begin(&s);
	expect_damaged(&s, "nothing");
	test_stream_begin(&s);
	test_stream_runs(&s, TRANSFER_MEMORY, 0, 2, good_pages, 3 * PAGE_BYTES);
	expect_damaged(&s, "memory of no machine");
	begin(&s);
	test_stream_machine(&s, NULL);
	expect_damaged(&s, "two machines");
	begin(&s);
	fill(&s);
	test_stream_runs(&s, TRANSFER_MEMORY, 0, 1, (const uint64_t[][3]){{20, 1, 1}}, PAGE_BYTES);
	expect_damaged(&s, "memory behind disks");
	begin(&s);
	fill(&s);
	test_stream_end(&s);
	expect_damaged(&s, "two ends");
	begin(&s);
	for (unsigned i = 0; i < 3; i++)
		test_stream_chunk(&s, TRANSFER_STATE, "more", 4);
	expect_damaged(&s, "too long a state");
}

/* Each makes a machine that must not be taken. */
#define CHANGE(name, statement)                                                                                                                      \
	static void name(struct transfer_head *head, struct store_checkpoint *c)                                                                     \
	{                                                                                                                                            \
		(void)head;                                                                                                                          \
		(void)c;                                                                                                                             \
		statement;                                                                                                                           \
	}
CHANGE(other_id, c->id[0] = 'a')
CHANGE(path_as_id, strcpy(head->id, "../../../../etc/cron.d/evil.....");
       strcpy(c->id, head->id))
CHANGE(itself, strcpy(head->since, head->id))
CHANGE(no_memory, c->memory_bytes = 0)
CHANGE(half_a_page, c->memory_bytes = 2048)
CHANGE(petabytes, c->memory_bytes = 1ull << 51)
CHANGE(no_cpu, c->cpus = 0)
CHANGE(other_state, c->state_xxh3++)
CHANGE(longer_state, c->state_bytes++)
CHANGE(path_as_vm, strcpy(c->vm, "../x"))
CHANGE(path_as_tag, strcpy(head->tag, "a/b"))
CHANGE(path_as_disk, strcpy(head->disks[1].name, "../x"))
CHANGE(odd_size, head->disks[0].size_bytes = c->disks[0].size_bytes = 1000)
CHANGE(other_size, head->disks[0].size_bytes += 512)
CHANGE(unknown_disk, strcpy(head->disks[1].name, "other"))
CHANGE(same_disk, strcpy(head->disks[1].name, "data"))
CHANGE(writable_seed, head->disks[1].readonly = false)
CHANGE(missing_disk, head->disk_count = 1)
CHANGE(no_disks, head->disk_count = 0)
CHANGE(kept_without_since, head->disks[1].kept = true)

Test(transfer, machines_that_are_none)
{
	static const struct {
		const char *what;
		void (*change)(struct transfer_head *head, struct store_checkpoint *c);
	} bad[] = {
		{"another id", other_id},
		{"a path as id", path_as_id},
		{"it needs itself", itself},
		{"no memory", no_memory},
		{"half a page", half_a_page},
		{"petabytes", petabytes},
		{"no processor", no_cpu},
		{"another state", other_state},
		{"a longer state", longer_state},
		{"a path as VM", path_as_vm},
		{"a path as tag", path_as_tag},
		{"a path as disk", path_as_disk},
		{"an odd size", odd_size},
		{"another size", other_size},
		{"an unknown disk", unknown_disk},
		{"a disk twice", same_disk},
		{"a read-only disk that is not", writable_seed},
		{"a missing disk", missing_disk},
		{"no disks", no_disks},
		{"kept without since", kept_without_since},
	};
	struct test_stream s;

	for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) {
		test_stream_begin(&s);
		test_stream_machine(&s, bad[i].change);
		expect_damaged(&s, bad[i].what);
	}
}

/* What unpacks to another length than the header says. */
Test(transfer, frames_that_lie)
{
	for (unsigned i = 0; i < 4; i++) {
		struct test_stream s;

		begin(&s);
		size_t at = s.bytes.length;
		fill(&s);
		uint8_t *header = s.bytes.data + at;
		uint32_t content = get_le32(header + 16), packed = get_le32(header + 20);
		if (i == 0)
			put_le32(header + 16, content - 1);
		else if (i == 1)
			put_le32(header + 16, TRANSFER_MAX_CONTENT + 1);
		else if (i == 2)
			put_le32(header + 20, packed - 1);
		else
			memcpy(header + TRANSFER_HEADER_BYTES, "\x50\x2a\x4d\x18", 4); /* a skippable frame */
		expect_damaged(&s, "a frame that lies");
	}
}

/* --- encryption: pieces --- */

#define PIECE (256u << 10)
static const struct transfer_key secret = {"a passphrase", 12, .log_n = 4};

static uint8_t byte_of(size_t at) { return (uint8_t)(at * 31 + at / 251); }

/* What is from `at` to `bytes`, in odd lengths. */
static void write_sealed(struct transfer_io *io, size_t at, size_t bytes)
{
	static uint8_t data[70001];
	struct err err = ERR_INIT;

	for (size_t n; at < bytes; at += n) {
		n = min_u64(bytes - at, sizeof(data));
		for (size_t i = 0; i < n; i++)
			data[i] = byte_of(at + i);
		cr_assert_eq(transfer_write(io, data, n, &err), 0, "%s", err.message);
	}
}

static void end_sealed(struct transfer_io *io)
{
	struct err err = ERR_INIT;

	cr_assert_eq(transfer_seal_end(io, &err), 0, "%s", err.message);
	transfer_seal_free(io);
	cr_assert_eq(lseek(io->fd, 0, SEEK_SET), 0);
}

/* A file of so many bytes. */
static int make_sealed(size_t bytes)
{
	struct err err = ERR_INIT;
	struct transfer_io io = {.fd = test_stream_open("", 0), .what = "sealed"};

	cr_assert_eq(transfer_seal_begin(&io, &secret, false, &err), 0, "%s", err.message);
	write_sealed(&io, 0, bytes);
	end_sealed(&io);
	return io.fd;
}

/* Reads to the end, in other lengths. Returns what reading returned; *got: how much was right before that. */
static int read_sealed(int fd, const struct transfer_key *key, size_t *got, struct err *err)
{
	static uint8_t data[99991];
	uint8_t start[TRANSFER_START_BYTES];
	struct transfer_io io = {.fd = fd, .what = "sealed"};
	size_t n;

	*got = 0;
	*err = ERR_INIT;
	cr_assert_eq(transfer_read(&io, start, sizeof(start), &n, err), 0);
	cr_assert(n == sizeof(start) && transfer_is_sealed(start));
	int rc = transfer_seal_open(&io, start, key, err);
	do {
		n = 0;
		if (!rc)
			rc = transfer_read(&io, data, sizeof(data), &n, err);
		for (size_t i = 0; i < n; i++)
			cr_assert_eq(data[i], byte_of(*got + i));
		*got += n;
	} while (!rc && n == sizeof(data));
	transfer_seal_free(&io);
	close(fd);
	return rc;
}

Test(transfer, encrypted_pieces_of_all_lengths)
{
	static const size_t lengths[] = {0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE};

	for (size_t i = 0; i < ARRAY_LENGTH(lengths); i++) {
		struct err err = ERR_INIT;
		size_t got;

		cr_expect_eq(read_sealed(make_sealed(lengths[i]), &secret, &got, &err), 0, "%zu bytes: %s", lengths[i], err.message);
		cr_expect_eq(got, lengths[i]);
	}
}

Test(transfer, encrypted_pieces_that_are_not_as_they_were_written)
{
	/* Start 56, then pieces of 20 and their text: two full ones and 100 bytes. */
	static const off_t ends[] = {56, 56 + 20 + PIECE, 56 + 2 * (20 + PIECE), 56 + 2 * (20 + PIECE) + 119};
	static const off_t places[] = {57, 59, 60, 100, 56 + 20 + PIECE - 1, 56 + 20 + PIECE + 3, 56 + 2 * (20 + PIECE) + 3, 56 + 2 * (20 + PIECE) + 50};
	struct err err;
	size_t got;

	for (size_t i = 0; i < ARRAY_LENGTH(ends); i++) {
		int fd = make_sealed(2 * PIECE + 100);
		cr_assert_eq(ftruncate(fd, ends[i]), 0);
		cr_expect_eq(read_sealed(fd, &secret, &got, &err), -ENODATA, "cut off at %lld", (long long)ends[i]);
	}
	for (size_t i = 0; i < ARRAY_LENGTH(places); i++) {
		int fd = make_sealed(2 * PIECE + 100);
		uint8_t byte;
		cr_assert_eq(pread(fd, &byte, 1, places[i]), 1);
		byte ^= 0x40;
		cr_assert_eq(pwrite(fd, &byte, 1, places[i]), 1);
		int rc = read_sealed(fd, &secret, &got, &err);
		cr_expect(rc == -EBADMSG || rc == -ENODATA, "changed at %lld: %d", (long long)places[i], rc);
		cr_expect_eq(err.class, ERR_DAMAGED);
	}
}

Test(transfer, a_wrong_key_is_told_as_such)
{
	static const struct transfer_key wrong = {"a passphrasf", 12, .log_n = 4};
	struct err err = ERR_INIT;
	size_t got;

	cr_expect_eq(read_sealed(make_sealed(10), &wrong, &got, &err), -EKEYREJECTED);
	cr_expect_eq(err.class, ERR_FAILED);
	cr_expect_eq(got, 0);
	cr_expect_eq(read_sealed(make_sealed(10), NULL, &got, &err), -EINVAL);
	cr_expect_eq(err.class, ERR_USAGE);
}

/* --- encryption: files that were gone on with --- */

/* One that was interrupted: it has no end, and half a piece. */
static int make_interrupted(size_t bytes)
{
	struct err err = ERR_INIT;
	struct transfer_io io = {.fd = test_stream_open("", 0), .what = "sealed"};

	cr_assert_eq(transfer_seal_begin(&io, &secret, true, &err), 0, "%s", err.message);
	write_sealed(&io, 0, bytes);
	transfer_seal_free(&io);
	cr_assert_eq(write(io.fd, "half a piece", 12), 12);
	return io.fd;
}

/* Keeps the first `keep` bytes of what is in it, as an export does, and writes the rest; *cut: how much of the file stayed. False: nothing of it can. */
static bool go_on(int fd, size_t keep, size_t bytes, bool end, off_t *cut)
{
	static uint8_t data[3 * PIECE];
	struct transfer_io in = {.fd = fd, .what = "sealed"}, out = in;
	uint8_t start[TRANSFER_START_BYTES];
	struct transfer_mark mark = {0};
	struct err err = ERR_INIT;
	size_t n;

	cr_assert(keep <= sizeof(data) && lseek(fd, 0, SEEK_SET) == 0);
	cr_assert(transfer_read(&in, start, sizeof(start), &n, &err) == 0 && n == sizeof(start));
	cr_assert_eq(transfer_seal_open(&in, start, &secret, &err), 0, "%s", err.message);
	cr_assert(transfer_seal_is_resumable(&in));
	cr_assert(transfer_read(&in, data, keep, &n, &err) == 0 && n == keep, "%s", err.message);
	transfer_mark(&in, &mark);
	n = 1;
	while (n == 1 && transfer_read(&in, data, 1, &n, NULL) == 0)
		; /* until what is no piece */
	transfer_seal_free(&in);
	*cut = (off_t)mark.bytes;
	if (mark.bytes) {
		cr_assert(ftruncate(fd, *cut) == 0 && lseek(fd, *cut, SEEK_SET) == *cut);
		cr_assert_eq(transfer_seal_go_on(&out, &secret, &mark, &err), 0, "%s", err.message);
		write_sealed(&out, keep, bytes);
		if (end)
			end_sealed(&out);
		else
			transfer_seal_free(&out);
	}
	transfer_mark_free(&mark);
	return *cut != 0;
}

Test(transfer, an_encrypted_file_is_gone_on_with)
{
	static const size_t keeps[] = {PIECE + 1, PIECE + 5000, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1, 3 * PIECE};
	static const size_t lengths[] = {3 * PIECE, 3 * PIECE + 1, 4 * PIECE + 77};
	struct err err;
	size_t got;
	off_t cut;

	for (size_t i = 0; i < ARRAY_LENGTH(keeps); i++)
		for (size_t k = 0; k < ARRAY_LENGTH(lengths); k++) {
			/* A piece is written once more follows. */
			int fd = make_interrupted(3 * PIECE + 1);
			cr_assert(go_on(fd, keeps[i], lengths[k], true, &cut));
			cr_expect_eq(cut, (off_t)(56 + (20 + PIECE) * ((keeps[i] - 1) / PIECE)), "%zu: cut at %lld", keeps[i], (long long)cut);
			cr_expect_eq(read_sealed(fd, &secret, &got, &err), 0, "%zu of %zu: %s", keeps[i], lengths[k], err.message);
			cr_expect_eq(got, lengths[k]);
		}
	/* Twice: what was written the first time is cut off in its own first piece, which begins with its start, and behind it. */
	for (size_t keep = PIECE + 100; keep <= 2 * PIECE + 100; keep += PIECE) {
		int fd = make_interrupted(2 * PIECE + 1);
		off_t first;
		cr_assert(go_on(fd, PIECE + 50, 3 * PIECE + 1, false, &first));
		cr_assert(go_on(fd, keep, 3 * PIECE + 9, true, &cut));
		cr_expect_eq(cut, keep < 2 * PIECE ? first : first + 4 + 56 + 20 + (off_t)PIECE);
		cr_expect_eq(read_sealed(fd, &secret, &got, &err), 0, "%zu: %s", keep, err.message);
		cr_expect_eq(got, 3 * PIECE + 9);
	}
	/* Of its first piece nothing can stay. */
	int fd = make_interrupted(2 * PIECE);
	cr_expect(!go_on(fd, PIECE, 0, false, &cut));
	close(fd);
}

/* What stands behind a piece is what was written there: not another file's, nor the same one's from elsewhere. */
Test(transfer, starts_in_the_middle_are_those_that_were_written)
{
	static uint8_t data[4 * (PIECE + 100)], other[4 * (PIECE + 100)];
	const size_t piece = 20 + PIECE, next = 56 + piece; /* of the second start, with the four bytes before it */
	static const size_t places[] = {0, 3, 4, 4 + 12, 4 + 20, 4 + 32, 4 + 39, 4 + 40, 4 + 55, 4 + 56, 4 + 70};
	struct err err;
	size_t got;
	off_t cut;
	int fd = make_interrupted(3 * PIECE), twin;

	cr_assert(go_on(fd, PIECE + 50, 2 * PIECE + 10, true, &cut) && cut == (off_t)next);
	ssize_t length = pread(fd, data, sizeof(data), 0);
	close(fd);
	cr_assert_eq(length, (ssize_t)(next + 4 + 56 + piece + 20 + 10));
	cr_assert_neq(memcmp(data + 16, data + next + 4 + 16, 16), 0, "a salt comes twice");
	for (size_t i = 0; i < ARRAY_LENGTH(places); i++) {
		data[next + places[i]] ^= 0x20;
		cr_expect_lt(read_sealed(test_stream_open(data, (size_t)length), &secret, &got, &err), 0, "changed at %zu", places[i]);
		cr_expect_eq(err.class, ERR_DAMAGED);
		cr_expect_leq(got, PIECE);
		data[next + places[i]] ^= 0x20;
	}
	/* The whole second part behind another file's first one, and behind none. */
	twin = make_interrupted(3 * PIECE);
	cr_assert_eq(pread(twin, other, next, 0), (ssize_t)next);
	close(twin);
	memcpy(other + next, data + next, (size_t)length - next);
	cr_expect_eq(read_sealed(test_stream_open(other, (size_t)length), &secret, &got, &err), -EBADMSG);
	memcpy(other, data, 56);
	memcpy(other + 56, data + next, (size_t)length - next);
	cr_expect_eq(read_sealed(test_stream_open(other, (size_t)length - piece), &secret, &got, &err), -EBADMSG);
	/* Cut off before it, and without it. */
	cr_expect_eq(read_sealed(test_stream_open(data, next), &secret, &got, &err), -ENODATA);
	memcpy(other, data, next);
	memcpy(other + next, data + next + 4 + 56, (size_t)length - next - 60);
	cr_expect_eq(read_sealed(test_stream_open(other, (size_t)length - 60), &secret, &got, &err), -EBADMSG);
	/* In a file of the first version there is none. */
	twin = make_sealed(2 * PIECE);
	cr_assert_eq(pread(twin, other, next, 0), (ssize_t)next);
	close(twin);
	memcpy(other + next, data + next, (size_t)length - next);
	cr_expect_eq(read_sealed(test_stream_open(other, (size_t)length), &secret, &got, &err), -EBADMSG);
	/* A later version. */
	data[12] = 3;
	cr_expect_eq(read_sealed(test_stream_open(data, (size_t)length), &secret, &got, &err), -ENOTSUP);
}
