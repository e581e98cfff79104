#include "vmm/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
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
	int fd;			 /* -1: private */
	uint64_t *mapped;	 /* private: one bit per ram page at which a file is mapped. As `dirty` */
	uint8_t *base;		 /* size bytes, 2 MiB aligned so that huge pages are possible */
	_Atomic uint64_t *dirty; /* one bit per ram page; mapped, so that untouched parts cost nothing */
	_Atomic uint64_t *dirty_summary; /* one bit per word of `dirty` that may hold one; behind it in the same mapping */
	size_t bitmap_bytes;		 /* of each mapping */
	unsigned region_count;
	struct mem_region region[2];

	pthread_mutex_t discard_lock; /* a leaf; all below */
	unsigned holds;
	void (*released)(void *opaque);
	void *released_opaque;
	_Atomic uint64_t given_back; /* changed under the lock */
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
	int flags = mem->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	if (mmap(base, mem->size, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE | MAP_FIXED, mem->fd, 0) == MAP_FAILED) {
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

static int make_memfd(struct mem *mem, struct err *err)
{
	mem->fd = memfd_create("guest-memory", MFD_CLOEXEC);
	if (mem->fd < 0)
		return err_sys(err, errno, "guest memory: memfd_create");
	if (ftruncate(mem->fd, (off_t)mem->size) < 0)
		return err_sys(err, errno, "guest memory: size it to %llu bytes", (unsigned long long)mem->size);
	return 0;
}

/* One bit a page. */
static int map_bitmap(struct mem *mem, void *out, struct err *err)
{
	void *words = mmap(NULL, mem->bitmap_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (words == MAP_FAILED)
		return err_sys(err, errno, "guest memory: map a bitmap of its pages");
	memcpy(out, &words, sizeof(words));
	return 0;
}

static int create(uint64_t size_bytes, bool private, struct mem **out, struct err *err)
{
	int r = check_size(size_bytes, err);
	if (r < 0)
		return r;
	struct mem *mem = xcalloc(1, sizeof(*mem));
	mem->size = size_bytes;
	mem->fd = -1;
	uint64_t words = BITMAP_WORDS(size_bytes >> PAGE_SHIFT);
	mem->bitmap_bytes = (words + BITMAP_WORDS(words)) * sizeof(uint64_t);
	lay_out(mem);
	pthread_mutex_init(&mem->discard_lock, NULL);
	if (!private)
		r = make_memfd(mem, err);
	if (r == 0)
		r = map_aligned(mem, err);
	if (r == 0)
		r = map_bitmap(mem, &mem->dirty, err);
	if (r == 0 && private)
		r = map_bitmap(mem, &mem->mapped, err);
	if (r < 0) {
		mem_destroy(mem);
		return r;
	}
	mem->dirty_summary = mem->dirty + words;
	*out = mem;
	return 0;
}

int mem_create(uint64_t size_bytes, struct mem **out, struct err *err) { return create(size_bytes, false, out, err); }

int mem_create_private(uint64_t size_bytes, struct mem **out, struct err *err)
{
	return create(size_bytes, true, out, err);
}

void mem_destroy(struct mem *mem)
{
	if (!mem)
		return;
	if (mem->dirty)
		munmap(mem->dirty, mem->bitmap_bytes);
	if (mem->mapped)
		munmap(mem->mapped, mem->bitmap_bytes);
	if (mem->base)
		munmap(mem->base, mem->size);
	if (mem->fd >= 0)
		close(mem->fd);
	pthread_mutex_destroy(&mem->discard_lock);
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
		if (!bitmap_test(mem->dirty, page) && bitmap_claim(mem->dirty, page))
			/* Second: who takes marks clears the summary first, so it sees the word's bit or leaves this one. */
			bitmap_claim(mem->dirty_summary, page / 64);
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

bool mem_take_dirty(struct mem *mem, uint64_t *words)
{
	uint64_t summaries = BITMAP_WORDS(BITMAP_WORDS(mem_pages(mem)));
	bool any = false;
	for (uint64_t s = 0; s < summaries; s++) {
		if (atomic_load_explicit(&mem->dirty_summary[s], memory_order_acquire) == 0)
			continue;
		uint64_t bits = atomic_exchange_explicit(&mem->dirty_summary[s], 0, memory_order_acq_rel);
		for (; bits; bits &= bits - 1) {
			uint64_t w = s * 64 + (unsigned)__builtin_ctzll(bits);
			words[w] |= atomic_exchange_explicit(&mem->dirty[w], 0, memory_order_acq_rel);
			any = true;
		}
	}
	return any;
}

/* --- private memory --- */

int mem_map_file(struct mem *mem, uint64_t first_page, uint64_t count, int fd, struct err *err)
{
	uint64_t offset = first_page << PAGE_SHIFT, bytes = count << PAGE_SHIFT;
	if (mem->fd >= 0 || !range_within(offset, bytes, mem->size))
		return err_set(err, ERR_FAILED, EINVAL, "guest memory: no place for a file at page %llu",
			       (unsigned long long)first_page);
	if (mmap(mem->base + offset, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, fd, (off_t)offset) ==
	    MAP_FAILED)
		return err_sys(err, errno, "guest memory: map %llu pages of a file", (unsigned long long)count);
	madvise(mem->base + offset, bytes, MADV_DONTDUMP);
	bitmap_fill(mem->mapped, first_page, count);
	return 0;
}

/* Up to `end`, the pages from `page` on that are alike: a file is mapped at all of them, or at none. */
static uint64_t run_end(const struct mem *mem, uint64_t page, uint64_t end, bool *mapped)
{
	*mapped = mem->mapped[page / 64] >> (page % 64) & 1;
	while (page < end && (mem->mapped[page / 64] >> (page % 64) & 1) == *mapped)
		page++;
	return page;
}

static int discard_private(struct mem *mem, uint64_t first, uint64_t end, struct err *err)
{
	while (first < end) {
		bool mapped;
		uint64_t next = run_end(mem, first, end, &mapped);
		uint8_t *at = mem->base + (first << PAGE_SHIFT);
		size_t bytes = (next - first) << PAGE_SHIFT;
		/* Over a file: its old content must never come back. */
		if (mapped && mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
				      MAP_FAILED) {
			if (errno != ENOMEM)
				return err_sys(err, errno, "guest memory: give %zu bytes back", bytes);
			memset(at, 0, bytes); /* too many mappings: nothing is given back */
		} else if (mapped) {
			madvise(at, bytes, MADV_DONTDUMP);
			for (uint64_t page = first; page < next; page++)
				mem->mapped[page / 64] &= ~((uint64_t)1 << (page % 64));
		} else if (madvise(at, bytes, MADV_DONTNEED) != 0) {
			return err_sys(err, errno, "guest memory: give %zu bytes back", bytes);
		}
		first = next;
	}
	return 0;
}

/* --- giving memory back --- */

int mem_discard(struct mem *mem, uint64_t ram_offset, uint64_t bytes, struct err *err)
{
	if (!range_within(ram_offset, bytes, mem->size) || (ram_offset | bytes) % PAGE_BYTES != 0)
		return err_set(err, ERR_FAILED, EINVAL, "guest memory: %llu bytes at %llu are not whole pages of it",
			       (unsigned long long)bytes, (unsigned long long)ram_offset);
	if (mem->fd < 0)
		return discard_private(mem, ram_offset >> PAGE_SHIFT, (ram_offset + bytes) >> PAGE_SHIFT, err);
	if (bytes > 0 && fallocate(mem->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)ram_offset, (off_t)bytes) != 0)
		return err_sys(err, errno, "guest memory: give %llu bytes back", (unsigned long long)bytes);
	return 0;
}

/* Under the lock, so that a hold waits for what is under way. */
int mem_give_back(struct mem *mem, uint64_t ram_offset, uint64_t bytes, struct err *err)
{
	int r = -EBUSY;
	pthread_mutex_lock(&mem->discard_lock);
	if (mem->holds == 0) {
		if (range_within(ram_offset, bytes, mem->size))
			mark_pages(mem, ram_offset, bytes);
		atomic_fetch_add_explicit(&mem->given_back, 1, memory_order_relaxed);
		r = mem_discard(mem, ram_offset, bytes, err);
	} else {
		err_set(err, ERR_STATE, EBUSY, "guest memory: held by a checkpoint, nothing is given back");
	}
	pthread_mutex_unlock(&mem->discard_lock);
	return r;
}

uint64_t mem_given_back(const struct mem *mem) { return atomic_load_explicit(&mem->given_back, memory_order_relaxed); }

void mem_hold_discards(struct mem *mem)
{
	pthread_mutex_lock(&mem->discard_lock);
	mem->holds++;
	pthread_mutex_unlock(&mem->discard_lock);
}

void mem_release_discards(struct mem *mem)
{
	pthread_mutex_lock(&mem->discard_lock);
	if (--mem->holds == 0 && mem->released)
		mem->released(mem->released_opaque);
	pthread_mutex_unlock(&mem->discard_lock);
}

void mem_on_release(struct mem *mem, void (*fn)(void *opaque), void *opaque)
{
	pthread_mutex_lock(&mem->discard_lock);
	mem->released = fn;
	mem->released_opaque = opaque;
	pthread_mutex_unlock(&mem->discard_lock);
}
