#include "vmm/memory.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"

#define MIB (1ull << 20)

static struct mem *create(uint64_t bytes)
{
	struct mem *mem = NULL;
	struct err err = ERR_INIT;
	cr_assert_eq(mem_create(bytes, &mem, &err), 0, "%s", err.message);
	return mem;
}

Test(memory, refuses_impossible_sizes)
{
	static const uint64_t bad[] = {0, MEM_MIN_BYTES - 2 * MIB, MEM_MIN_BYTES + 4096, MEM_MAX_BYTES + 2 * MIB,
				       UINT64_MAX};
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct mem *mem = NULL;
		struct err err = ERR_INIT;
		cr_expect_eq(mem_create(bad[i], &mem, &err), -EINVAL);
		cr_expect_eq(err.class, ERR_USAGE);
		cr_expect_null(mem);
	}
}

Test(memory, small_guest_has_one_region)
{
	struct mem *mem = create(128 * MIB);
	struct mem_region region[2];
	cr_expect_eq(mem_regions(mem, region), 1);
	cr_expect_eq(region[0].gpa, 0);
	cr_expect_eq(region[0].bytes, 128 * MIB);
	cr_expect_eq(mem_pages(mem), 128 * MIB / 4096);
	cr_expect_eq((uintptr_t)mem_base(mem) % (2 * MIB), 0);
	cr_expect_not_null(mem_at(mem, 128 * MIB - 1, 1, false));
	cr_expect_null(mem_at(mem, 128 * MIB - 1, 2, false));
	cr_expect_null(mem_at(mem, 128 * MIB, 0, false));
	mem_destroy(mem);
}

Test(memory, big_guest_goes_on_above_the_hole)
{
	struct mem *mem = create(5 * 1024 * MIB);
	struct mem_region region[2];
	uint64_t offset;
	cr_assert_eq(mem_regions(mem, region), 2);
	cr_expect_eq(region[1].gpa, MEM_HOLE_END);
	cr_expect_eq(region[1].ram_offset, MEM_HOLE_START);
	cr_expect_eq(region[1].bytes, 2 * 1024 * MIB);
	cr_expect(mem_ram_offset(mem, MEM_HOLE_END + 5, &offset) && offset == MEM_HOLE_START + 5);
	cr_expect_not(mem_ram_offset(mem, MEM_HOLE_START, &offset));
	cr_expect_not(mem_ram_offset(mem, MEM_HOLE_END - 1, &offset));
	cr_expect_null(mem_at(mem, MEM_HOLE_START - 1, 2, false), "ranges meet in RAM but not in the guest");
	cr_expect_null(mem_at(mem, MEM_HOLE_END, UINT64_MAX, false), "no overflow");
	cr_expect_null(mem_at(mem, UINT64_MAX, 2, false));
	mem_destroy(mem);
}

Test(memory, reads_what_was_written)
{
	struct mem *mem = create(4 * 1024 * MIB);
	char out[6] = "";
	struct err err = ERR_INIT;
	cr_assert_eq(mem_write(mem, MEM_HOLE_END + 4094, "hello", 6, &err), 0);
	cr_assert_eq(mem_read(mem, MEM_HOLE_END + 4094, out, 6, &err), 0);
	cr_expect_str_eq(out, "hello");
	cr_expect_eq(memcmp(mem_base(mem) + MEM_HOLE_START + 4094, "hello", 6), 0);
	cr_expect_eq(mem_write(mem, MEM_HOLE_START, "x", 1, &err), -EFAULT);
	cr_expect_eq(mem_read(mem, MEM_HOLE_START - 1, out, 2, &err), -EFAULT);
	mem_destroy(mem);
}

Test(memory, writes_mark_ram_pages_dirty)
{
	struct mem *mem = create(4 * 1024 * MIB);
	uint64_t high = MEM_HOLE_START >> PAGE_SHIFT;
	char byte;
	uint64_t *words = xcalloc(mem_pages(mem) / 64, sizeof(*words));
	mem_read(mem, 0, &byte, 1, NULL);
	cr_expect_not_null(mem_at(mem, 0, 1, false));
	mem_take_dirty(mem, words);
	cr_expect_eq(words[0], 0, "reading marks nothing");
	mem_write(mem, 3 * 4096 - 1, "ab", 2, NULL);
	cr_expect_not_null(mem_at(mem, 5 * 4096, 0, true));
	mem_take_dirty(mem, words);
	cr_expect_eq(words[0], 0xc, "both pages of a write across their border, none of an empty one");
	mem_mark_dirty(mem, MEM_HOLE_END + 63 * 4096, 2 * 4096);
	mem_mark_dirty(mem, MEM_HOLE_START, 4096);
	words[0] = 0;
	words[high / 64] = 1;
	mem_take_dirty(mem, words);
	cr_expect_eq(words[0], 0, "taken once");
	cr_expect_eq(words[high / 64], 1 | 1ull << 63, "added to what is there");
	cr_expect_eq(words[high / 64 + 1], 1);
	free(words);
	mem_destroy(mem);
}

static uint64_t occupied(struct mem *mem)
{
	struct stat st;
	cr_assert_eq(fstat(mem_fd(mem), &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

Test(memory, discarded_pages_are_zero_and_the_hosts)
{
	struct mem *mem = create(16 * MIB);
	struct err err = ERR_INIT;
	memset(mem_base(mem), 0x5a, 16 * MIB);
	uint64_t before = occupied(mem);
	cr_assert_eq(mem_discard(mem, 4096, 8 * MIB, &err), 0, "%s", err.message);
	cr_expect_eq(before - occupied(mem), 8 * MIB);
	cr_expect_eq(mem_base(mem)[4095], 0x5a);
	cr_expect_eq(mem_base(mem)[4096], 0);
	cr_expect_eq(mem_base(mem)[8 * MIB + 4095], 0);
	cr_expect_eq(mem_base(mem)[8 * MIB + 4096], 0x5a);
	cr_expect_eq(mem_discard(mem, 16 * MIB, 0, &err), 0, "nothing at all");
	static const uint64_t bad[][2] = {{16 * MIB, 4096}, {0, 16 * MIB + 4096}, {1, 4096}, {0, 1}, {UINT64_MAX - 4095, 4096}};
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		cr_expect_eq(mem_discard(mem, bad[i][0], bad[i][1], &err), -EINVAL, "%zu", i);
	mem_destroy(mem);
}

static void count(void *opaque) { ++*(unsigned *)opaque; }

Test(memory, what_the_guest_gives_back_is_marked_and_waits_for_holds)
{
	struct mem *mem = create(16 * MIB);
	struct err err = ERR_INIT;
	unsigned released = 0;
	uint64_t *words = xcalloc(mem_pages(mem) / 64, sizeof(*words));
	memset(mem_base(mem), 0x5a, 16 * MIB);
	mem_on_release(mem, count, &released);
	mem_hold_discards(mem);
	mem_hold_discards(mem);
	cr_expect_eq(mem_give_back(mem, 4096, 8192, &err), -EBUSY);
	mem_release_discards(mem);
	cr_expect_eq(mem_give_back(mem, 4096, 8192, &err), -EBUSY);
	cr_expect_eq(released, 0);
	mem_take_dirty(mem, words);
	cr_expect_eq(words[0], 0);
	cr_expect_eq(mem_base(mem)[4096], 0x5a);
	uint64_t before = mem_given_back(mem);
	mem_release_discards(mem);
	cr_expect_eq(released, 1, "once, at the last one's end");
	cr_expect_eq(mem_give_back(mem, 4096, 8192, &err), 0);
	cr_expect_neq(mem_given_back(mem), before);
	mem_take_dirty(mem, words);
	cr_expect_eq(words[0], 6);
	cr_expect_eq(mem_base(mem)[4096], 0);
	cr_expect_eq(mem_give_back(mem, 16 * MIB, 4096, &err), -EINVAL);
	mem_on_release(mem, NULL, NULL);
	mem_hold_discards(mem);
	mem_release_discards(mem);
	cr_expect_eq(released, 1);
	free(words);
	mem_destroy(mem);
}

/* --- private memory --- */

static int make_file(uint64_t pages)
{
	int fd = memfd_create("layer", 0);
	cr_assert(fd >= 0 && ftruncate(fd, (off_t)(pages * PAGE_BYTES)) == 0);
	for (uint64_t page = 0; page < pages; page++) {
		uint8_t data[PAGE_BYTES];
		memset(data, (int)(page % 251 + 1), sizeof(data));
		cr_assert_eq(pwrite(fd, data, sizeof(data), (off_t)(page * PAGE_BYTES)), (ssize_t)sizeof(data));
	}
	return fd;
}

static struct mem *create_private(void)
{
	struct mem *mem = NULL;
	struct err err = ERR_INIT;
	cr_assert_eq(mem_create_private(MEM_MIN_BYTES, &mem, &err), 0, "%s", err.message);
	return mem;
}

Test(memory, a_mapped_file_is_read_and_never_written)
{
	struct mem *mem = create_private();
	struct err err = ERR_INIT;
	int fd = make_file(64);
	uint8_t byte;
	cr_expect_eq(mem_fd(mem), -1);
	cr_assert_eq(mem_map_file(mem, 10, 20, fd, 10, &err), 0, "%s", err.message);
	cr_expect_eq(mem_base(mem)[9 * PAGE_BYTES], 0);
	cr_expect_eq(mem_base(mem)[10 * PAGE_BYTES], 11);
	cr_expect_eq(mem_base(mem)[29 * PAGE_BYTES + 4095], 30);
	cr_expect_eq(mem_base(mem)[30 * PAGE_BYTES], 0);
	cr_assert_eq(mem_write(mem, 12 * PAGE_BYTES, "x", 1, &err), 0);
	cr_expect_eq(mem_base(mem)[12 * PAGE_BYTES], 'x');
	cr_expect(pread(fd, &byte, 1, 12 * PAGE_BYTES) == 1 && byte == 13, "the file stays as it is");
	close(fd);
	cr_expect_eq(mem_base(mem)[20 * PAGE_BYTES], 21, "the mapping needs no descriptor");
	mem_destroy(mem);
}

Test(memory, no_file_beyond_the_memory_or_in_a_memfd)
{
	struct mem *private = create_private(), *shared = create(MEM_MIN_BYTES);
	int fd = make_file(1);
	cr_expect_eq(mem_map_file(private, mem_pages(private), 1, fd, mem_pages(private), NULL), -EINVAL);
	cr_expect_eq(mem_map_file(private, mem_pages(private) - 1, 2, fd, mem_pages(private) - 1, NULL), -EINVAL);
	cr_expect_eq(mem_map_file(shared, 0, 1, fd, 0, NULL), -EINVAL);
	close(fd);
	mem_destroy(private);
	mem_destroy(shared);
}

static void check_discard(struct mem *mem)
{
	struct err err = ERR_INIT;
	mem_base(mem)[39 * PAGE_BYTES] = 1;
	mem_base(mem)[40 * PAGE_BYTES] = 2;
	mem_base(mem)[55 * PAGE_BYTES] = 3;
	mem_base(mem)[56 * PAGE_BYTES] = 4;
	cr_assert_eq(mem_discard(mem, 40 * PAGE_BYTES, 16 * PAGE_BYTES, &err), 0, "%s", err.message);
	for (unsigned page = 40; page < 56; page++)
		cr_expect_eq(mem_base(mem)[page * PAGE_BYTES], 0, "page %u", page);
	cr_expect_eq(mem_base(mem)[39 * PAGE_BYTES], 1);
	cr_expect_eq(mem_base(mem)[56 * PAGE_BYTES], 4);
	cr_expect_eq(mem_discard(mem, 1, PAGE_BYTES, NULL), -EINVAL);
	cr_expect_eq(mem_discard(mem, 0, mem_size(mem) + PAGE_BYTES, NULL), -EINVAL);
}

Test(memory, what_is_discarded_is_zero)
{
	struct mem *mem = create(MEM_MIN_BYTES);
	check_discard(mem);
	mem_destroy(mem);
	mem = create_private();
	int fd = make_file(64);
	cr_assert_eq(mem_map_file(mem, 44, 8, fd, 44, NULL), 0); /* in the midst, untouched and then touched */
	check_discard(mem);
	cr_assert_eq(mem_map_file(mem, 0, 64, fd, 0, NULL), 0);
	check_discard(mem);
	cr_expect_eq(mem_base(mem)[38 * PAGE_BYTES], 39);
	close(fd);
	mem_destroy(mem);
}

Test(memory, finds_what_is_populated)
{
	struct mem *mem = create(16 * MIB);
	uint64_t first, end;
	cr_expect_eq(mem_find_populated(mem, 0, 64, &first, &end), 0);
	cr_expect_eq(first, mem_pages(mem));
	mem_base(mem)[100 * 4096] = 1;
	mem_base(mem)[4095 * 4096] = 1;
	cr_expect_eq(mem_find_populated(mem, 0, 64, &first, &end), 0);
	cr_expect(first == 100 && end == 101, "%llu", (unsigned long long)first);
	cr_expect_eq(mem_find_populated(mem, 101, 64, &first, &end), 0);
	cr_expect(first == 4095 && end == 4096);
	cr_expect_eq(mem_find_populated(mem, 4096, 64, &first, &end), 0);
	cr_expect_eq(first, mem_pages(mem));
	cr_expect_eq(mem_allocated_bytes(mem), 2 * 4096);
	/* A run, of which the last page is populated by another mapping only, and a hole behind it. */
	memset(mem_base(mem) + 1000 * 4096, 0, 20 * 4096);
	cr_expect_eq(pwrite(mem_fd(mem), "x", 1, 1020 * 4096), 1);
	mem_base(mem)[1022 * 4096] = 1;
	cr_expect(mem_find_populated(mem, 1000, 64, &first, &end) == 0 && first == 1000 && end == 1021, "%llu", (unsigned long long)end);
	cr_expect(mem_find_populated(mem, 1001, 4, &first, &end) == 0 && first == 1001 && end == 1005);
	cr_expect(mem_find_populated(mem, 1001, 1, &first, &end) == 0 && first == 1001 && end == 1002);
	cr_expect(mem_find_populated(mem, 1021, 64, &first, &end) == 0 && first == 1022 && end == 1023);
	cr_expect(mem_find_populated(mem, 4095, 64, &first, &end) == 0 && first == 4095 && end == 4096);
	cr_expect_eq(mem_allocated_bytes(mem), 24 * 4096, "looking populates nothing");
	mem_destroy(mem);
}

Test(memory, huge_pages_that_are_not_there)
{
	struct mem *mem = NULL;
	struct err err = ERR_INIT;
	cr_assert_eq(mem_create_backed(MEM_MAX_BYTES, MEM_BACKING_HUGETLB, &mem, &err), -ENOMEM, "%s", err.message);
	cr_expect_eq(err.class, ERR_HOST);
	cr_expect_not_null(strstr(err.message, "needs 524288 huge pages"), "%s", err.message);
	cr_expect_not_null(strstr(err.hint, "vm.nr_hugepages="), "%s", err.hint);
	cr_expect_null(mem);
}

static void check_backing(enum mem_backing backing)
{
	struct mem *mem = NULL;
	struct err err = ERR_INIT;
	uint64_t first, end;
	if (mem_create_backed(16 * MIB, backing, &mem, &err) != 0) {
		fprintf(stderr, "SKIP: %s\n", err.message);
		return;
	}
	if (mem_backing(mem) != backing)
		fprintf(stderr, "SKIP: no transparent huge pages here\n");
	memset(mem_base(mem) + 4 * MIB + 4096, 0x5a, 4 * MIB);
	cr_expect_eq(mem_find_populated(mem, 0, 64, &first, &end), 0);
	cr_expect(first == (mem_backing(mem) == MEM_BACKING_SMALL ? 1025u : 1024u) && end > first);
	for (uint64_t page = 1024; page < 2049; page = end)
		cr_assert(mem_find_populated(mem, page, 64, &first, &end) == 0 && first <= page + 1 && end > page);
	cr_expect_eq(mem_discard(mem, 5 * MIB, MIB, &err), 0, "%s", err.message);
	cr_expect_eq(mem_base(mem)[5 * MIB - 1], 0x5a);
	cr_expect_eq(mem_base(mem)[5 * MIB], 0);
	cr_expect_eq(mem_base(mem)[6 * MIB - 1], 0);
	cr_expect_eq(mem_base(mem)[6 * MIB], 0x5a);
	mem_destroy(mem);
}

Test(memory, transparent_huge_pages) { check_backing(MEM_BACKING_THP); }
Test(memory, huge_pages_of_the_pool) { check_backing(MEM_BACKING_HUGETLB); }
