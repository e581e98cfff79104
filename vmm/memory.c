#include "vmm/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/host.h"
#include "base/log.h"

#define MEM_ALIGN  HUGE_BYTES
#define HUGE_BYTES (2ull << 20)
#define HUGE_PAGES (HUGE_BYTES / PAGE_BYTES)
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26)
#endif

struct mem {
	uint64_t size;
	enum mem_backing backing; /* of a memfd */
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

static void fall_back_to_small(struct mem *mem)
{
	log_warn("guest memory: this host gives no transparent huge pages to memfds: small pages are used; as root: "
		 "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled");
	mem->backing = MEM_BACKING_SMALL;
}

static int make_memfd(struct mem *mem, struct err *err)
{
	unsigned huge = mem->backing == MEM_BACKING_HUGETLB ? MFD_HUGETLB | MFD_HUGE_2MB : 0;
	mem->fd = memfd_create("guest-memory", MFD_CLOEXEC | huge);
	if (mem->fd < 0 && huge) {
		err_set(err, ERR_HOST, errno, "guest memory: this kernel has no huge pages of 2 MiB (errno %d)", errno);
		return err_hint(err, "write memory_backing = small");
	}
	if (mem->fd < 0)
		return err_sys(err, errno, "guest memory: memfd_create");
	if (ftruncate(mem->fd, (off_t)mem->size) < 0)
		return err_sys(err, errno, "guest memory: size it to %llu bytes", (unsigned long long)mem->size);
	return 0;
}

static int too_few_huge_pages(const struct mem *mem, struct err *err)
{
	struct host_huge_pages pool = host_huge_pages();
	uint64_t needed = mem->size / HUGE_BYTES, missing = needed > pool.available ? needed - pool.available : 0;
	err_set(err, ERR_HOST, ENOMEM, "guest memory: it needs %llu huge pages of 2 MiB, %llu more than are free",
		(unsigned long long)needed, (unsigned long long)missing);
	return err_hint(err, "as root: sysctl vm.nr_hugepages=%llu; or memory_backing = small or thp",
			(unsigned long long)(pool.total + missing));
}

/* Reserves more than needed, places the mapping at the aligned address within, and gives the rest back. */
static int map_aligned(struct mem *mem, struct err *err)
{
	size_t reserved = mem->size + MEM_ALIGN;
	uint8_t *space = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (space == MAP_FAILED)
		return err_sys(err, errno, "guest memory: reserve %zu bytes of address space", reserved);
	uint8_t *base = (uint8_t *)round_up((uintptr_t)space, MEM_ALIGN);
	int flags = MAP_FIXED | (mem->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
	/* Huge pages of the pool are reserved here, all of them: else the guest would end where the pool does. */
	if (mem->backing != MEM_BACKING_HUGETLB)
		flags |= MAP_NORESERVE;
	if (mmap(base, mem->size, PROT_READ | PROT_WRITE, flags, mem->fd, 0) == MAP_FAILED) {
		int number = errno;
		munmap(space, reserved);
		if (mem->backing == MEM_BACKING_HUGETLB && number == ENOMEM)
			return too_few_huge_pages(mem, err);
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
	if (mem->backing == MEM_BACKING_THP && madvise(base, mem->size, MADV_HUGEPAGE) != 0)
		fall_back_to_small(mem);
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

/* One bit a page. */
static int map_bitmap(struct mem *mem, void *out, struct err *err)
{
	void *words = mmap(NULL, mem->bitmap_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (words == MAP_FAILED)
		return err_sys(err, errno, "guest memory: map a bitmap of its pages");
	memcpy(out, &words, sizeof(words));
	return 0;
}

static int create(uint64_t size_bytes, enum mem_backing backing, bool private, struct mem **out, struct err *err)
{
	int r = check_size(size_bytes, err);
	if (r < 0)
		return r;
	struct mem *mem = xcalloc(1, sizeof(*mem));
	mem->size = size_bytes;
	mem->backing = backing;
	mem->fd = -1;
	uint64_t words = BITMAP_WORDS(size_bytes >> PAGE_SHIFT);
	mem->bitmap_bytes = (words + BITMAP_WORDS(words)) * sizeof(uint64_t);
	lay_out(mem);
	pthread_mutex_init(&mem->discard_lock, NULL);
	if (backing == MEM_BACKING_THP && !host_thp_shmem())
		fall_back_to_small(mem);
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

int mem_create(uint64_t size_bytes, struct mem **out, struct err *err)
{
	return create(size_bytes, MEM_BACKING_SMALL, false, out, err);
}

int mem_create_backed(uint64_t size_bytes, enum mem_backing backing, struct mem **out, struct err *err)
{
	return create(size_bytes, backing, false, out, err);
}

int mem_create_private(uint64_t size_bytes, struct mem **out, struct err *err)
{
	return create(size_bytes, MEM_BACKING_SMALL, true, out, err);
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
enum mem_backing mem_backing(const struct mem *mem) { return mem->backing; }

uint64_t mem_allocated_bytes(const struct mem *mem)
{
	struct stat st;
	return mem->fd >= 0 && fstat(mem->fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
}

/*
 * Of hugetlbfs SEEK_DATA calls everything data. But a page of it is populated if and only if our mapping, the only one, has it: all, KVM
 * included, populate through that, it is never swapped, and nothing is unmapped before the end.
 */
static int find_populated_huge(const struct mem *mem, uint64_t page, uint64_t *first, uint64_t *end)
{
	for (uint64_t at = round_down(page, HUGE_PAGES); at < mem_pages(mem); at += HUGE_PAGES) {
		unsigned char there;
		if (mincore(mem->base + (at << PAGE_SHIFT), PAGE_BYTES, &there) != 0)
			return -errno;
		if (!(there & 1))
			continue;
		*first = max_u64(at, page);
		*end = at + HUGE_PAGES;
		return 0;
	}
	*first = *end = mem_pages(mem);
	return 0;
}

/* Of [page, page + most), which begins with a populated one: where the first that may not be lies. A page that was swapped out looks like one. */
static uint64_t populated_end(const struct mem *mem, uint64_t page, uint64_t most)
{
	unsigned char there[MEM_FIND_PAGES];
	uint64_t count = min_u64(min_u64(most, MEM_FIND_PAGES), mem_pages(mem) - page), n = 1;
	if (count < 2 || mincore(mem->base + (page << PAGE_SHIFT), count << PAGE_SHIFT, there) != 0)
		return page + 1;
	while (n < count && (there[n] & 1))
		n++;
	return page + n;
}

/*
 * SEEK_HOLE would find the end, but walks over all of a populated range in one go, several ms per GiB, and a kernel without full
 * preemption lets nobody else have the CPU meanwhile, a vCPU that shares it included. mincore takes 0.8 us for 64 pages, SEEK_DATA 0.25 for each.
 */
int mem_find_populated(const struct mem *mem, uint64_t page, uint64_t most, uint64_t *first, uint64_t *end)
{
	if (mem->backing == MEM_BACKING_HUGETLB)
		return find_populated_huge(mem, page, first, end);
	if (mem->fd < 0) { /* to look costs little, as what is nowhere is the one page of zeroes */
		*first = page;
		*end = min_u64(page + 1, mem_pages(mem));
		return 0;
	}
	off_t data = page < mem_pages(mem) ? lseek(mem->fd, (off_t)(page << PAGE_SHIFT), SEEK_DATA) : -1;
	if (data < 0 && page < mem_pages(mem) && errno != ENXIO)
		return -errno;
	*first = data < 0 ? mem_pages(mem) : (uint64_t)data >> PAGE_SHIFT;
	*end = data < 0 ? *first : *first > page ? *first + 1 : populated_end(mem, page, most);
	return 0;
}

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

int mem_map_file(struct mem *mem, uint64_t first_page, uint64_t count, int fd, uint64_t at, struct err *err)
{
	uint64_t offset = first_page << PAGE_SHIFT, bytes = count << PAGE_SHIFT;
	if (mem->fd >= 0 || !range_within(offset, bytes, mem->size))
		return err_set(err, ERR_FAILED, EINVAL, "guest memory: no place for a file at page %llu",
			       (unsigned long long)first_page);
	if (mmap(mem->base + offset, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, fd,
		 (off_t)(at << PAGE_SHIFT)) == MAP_FAILED)
		return err_sys(err, errno, "guest memory: map %llu pages of a file", (unsigned long long)count);
	bitmap_fill(mem->mapped, first_page, count);
	return 0;
}

void mem_map_done(struct mem *mem) { madvise(mem->base, mem->size, MADV_DONTDUMP); }

/* Up to `end`, the pages from `page` on that are alike: a file is mapped at all of them, or at none. */
static uint64_t run_end(const struct mem *mem, uint64_t page, uint64_t end, bool *mapped)
{
	*mapped = bitmap_has(mem->mapped, page);
	while (page < end && bitmap_has(mem->mapped, page) == *mapped)
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
	/* Given back to the pool it could be another's when the guest wants it again, and the guest would end. */
	if (mem->backing == MEM_BACKING_HUGETLB)
		memset(mem->base + ram_offset, 0, bytes);
	else if (bytes > 0 && fallocate(mem->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)ram_offset, (off_t)bytes) != 0)
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
