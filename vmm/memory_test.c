#include "vmm/memory.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

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
