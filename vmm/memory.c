#include "vmm/memory.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"

#define MEM_ALIGN (2ull << 20)

struct mem {
	uint64_t size;
	int fd;
	uint8_t *base;		 /* size bytes, 2 MiB aligned so that huge pages are possible */
	_Atomic uint64_t *dirty; /* one bit per ram page; mapped, so that untouched parts cost nothing */
	size_t dirty_bytes;
	unsigned region_count;
	struct mem_region region[2];
};

static int check_size(uint64_t size_bytes, struct err *err)
{
	if (size_bytes < MEM_MIN_BYTES || size_bytes > MEM_MAX_BYTES || size_bytes % MEM_ALIGN != 0) {
		err_set(err, ERR_USAGE, EINVAL,
			"guest memory of %llu bytes: not a multiple of 2 MiB from %llu MiB to %llu GiB",
			(unsigned long long)size_bytes, MEM_MIN_BYTES >> 20, MEM_MAX_BYTES >> 30);
		return err_hint(err, "for example memory = 512M");
	}
	return 0;
}

/* Reserves more than needed, places the mapping at the aligned address within, and gives the rest back. */
static int map_aligned(struct mem *mem, struct err *err)
{
	size_t reserved = mem->size + MEM_ALIGN;
	uint8_t *space = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (space == MAP_FAILED)
		return err_sys(err, errno, "guest memory: reserve %zu bytes of address space", reserved);
	uint8_t *base = (uint8_t *)round_up((uintptr_t)space, MEM_ALIGN);
	if (mmap(base, mem->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, mem->fd, 0) ==
	    MAP_FAILED) {
		int number = errno;
		munmap(space, reserved);
		return err_sys(err, number, "guest memory: map %llu bytes", (unsigned long long)mem->size);
	}
	size_t before = (size_t)(base - space), after = reserved - before - mem->size;
	if (before)
		munmap(space, before);
	if (after)
		munmap(base + mem->size, after);
	mem->base = base;
	/* Guest memory has no place in a core file of the VMM. */
	madvise(base, mem->size, MADV_DONTDUMP);
	return 0;
}

static void lay_out(struct mem *mem)
{
	uint64_t low = min_u64(mem->size, MEM_HOLE_START);
	mem->region[0] = (struct mem_region){.gpa = 0, .ram_offset = 0, .bytes = low};
	mem->region_count = 1;
	if (mem->size > low)
		mem->region[mem->region_count++] =
			(struct mem_region){.gpa = MEM_HOLE_END, .ram_offset = low, .bytes = mem->size - low};
}

int mem_create(uint64_t size_bytes, struct mem **out, struct err *err)
{
	int r = check_size(size_bytes, err);
	if (r < 0)
		return r;
	struct mem *mem = xcalloc(1, sizeof(*mem));
	mem->size = size_bytes;
	mem->dirty_bytes = BITMAP_WORDS(size_bytes >> PAGE_SHIFT) * sizeof(uint64_t);
	lay_out(mem);
	mem->fd = memfd_create("guest-memory", MFD_CLOEXEC);
	if (mem->fd < 0) {
		r = err_sys(err, errno, "guest memory: memfd_create");
		goto fail;
	}
	if (ftruncate(mem->fd, (off_t)size_bytes) < 0) {
		r = err_sys(err, errno, "guest memory: size it to %llu bytes", (unsigned long long)size_bytes);
		goto fail;
	}
	r = map_aligned(mem, err);
	if (r < 0)
		goto fail;
	void *dirty = mmap(NULL, mem->dirty_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			   -1, 0);
	if (dirty == MAP_FAILED) {
		r = err_sys(err, errno, "guest memory: map the dirty bitmap");
		goto fail;
	}
	mem->dirty = dirty;
	*out = mem;
	return 0;
fail:
	mem_destroy(mem);
	return r;
}

void mem_destroy(struct mem *mem)
{
	if (!mem)
		return;
	if (mem->dirty)
		munmap(mem->dirty, mem->dirty_bytes);
	if (mem->base)
		munmap(mem->base, mem->size);
	if (mem->fd >= 0)
		close(mem->fd);
	free(mem);
}

uint64_t mem_size(const struct mem *mem) { return mem->size; }
uint64_t mem_pages(const struct mem *mem) { return mem->size >> PAGE_SHIFT; }
int mem_fd(const struct mem *mem) { return mem->fd; }
uint8_t *mem_base(const struct mem *mem) { return mem->base; }

unsigned mem_regions(const struct mem *mem, struct mem_region out[2])
{
	memcpy(out, mem->region, mem->region_count * sizeof(*out));
	return mem->region_count;
}

/* The ram offset of [gpa, gpa + length), which must lie in one region. */
static bool find_range(const struct mem *mem, uint64_t gpa, uint64_t length, uint64_t *ram_offset)
{
	for (unsigned i = 0; i < mem->region_count; i++) {
		const struct mem_region *region = &mem->region[i];
		if (gpa < region->gpa || gpa - region->gpa >= region->bytes)
			continue;
		if (!range_within(gpa - region->gpa, length, region->bytes))
			return false;
		*ram_offset = region->ram_offset + (gpa - region->gpa);
		return true;
	}
	return false;
}

bool mem_ram_offset(const struct mem *mem, uint64_t gpa, uint64_t *ram_offset)
{
	return find_range(mem, gpa, 1, ram_offset);
}

static void mark_pages(struct mem *mem, uint64_t ram_offset, uint64_t length)
{
	if (length == 0)
		return;
	uint64_t last = (ram_offset + length - 1) >> PAGE_SHIFT;
	for (uint64_t page = ram_offset >> PAGE_SHIFT; page <= last; page++)
		/* Rings are written over and over: a look is cheaper than a locked instruction. */
		if (!bitmap_test(mem->dirty, page))
			bitmap_claim(mem->dirty, page);
}

void *mem_at(struct mem *mem, uint64_t gpa, uint64_t length, bool write)
{
	uint64_t offset;
	if (!find_range(mem, gpa, length, &offset))
		return NULL;
	if (write)
		mark_pages(mem, offset, length);
	return mem->base + offset;
}

static int copy_error(const char *what, uint64_t gpa, uint64_t length, struct err *err)
{
	return err_set(err, ERR_FAILED, EFAULT, "guest memory: %s %llu bytes at 0x%llx: not RAM", what,
		       (unsigned long long)length, (unsigned long long)gpa);
}

int mem_read(struct mem *mem, uint64_t gpa, void *data, uint64_t length, struct err *err)
{
	const void *from = mem_at(mem, gpa, length, false);
	if (!from)
		return copy_error("read", gpa, length, err);
	memcpy(data, from, length);
	return 0;
}

int mem_write(struct mem *mem, uint64_t gpa, const void *data, uint64_t length, struct err *err)
{
	void *to = mem_at(mem, gpa, length, true);
	if (!to)
		return copy_error("write", gpa, length, err);
	memcpy(to, data, length);
	return 0;
}

void mem_mark_dirty(struct mem *mem, uint64_t gpa, uint64_t length)
{
	uint64_t offset;
	if (find_range(mem, gpa, length, &offset))
		mark_pages(mem, offset, length);
}

void mem_take_dirty(struct mem *mem, uint64_t *words)
{
	for (uint64_t w = 0; w < BITMAP_WORDS(mem_pages(mem)); w++) {
		if (atomic_load_explicit(&mem->dirty[w], memory_order_acquire))
			words[w] |= atomic_exchange_explicit(&mem->dirty[w], 0, memory_order_acq_rel);
	}
}
