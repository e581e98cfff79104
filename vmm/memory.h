/*
 * Guest memory, mapped once, shown to the guest in one or two ranges. Of a VM that boots it is one memfd; of one that starts from a
 * checkpoint it is private: files that hold its pages are mapped into it, read when they are first touched, shared with every other
 * VM that maps them, and copied where the guest writes. What no file is mapped at is zero.
 *
 * RAM is a flat array of pages, offset 0 up to size; "ram offset" and "ram page" always mean a place in it. The guest
 * sees offsets below the hole at the same guest-physical address (gpa), and the rest from 4 GiB up:
 *
 *     ram [0, MEM_HOLE_START)    gpa [0, MEM_HOLE_START)
 *     ram [MEM_HOLE_START, size) gpa [4 GiB, 4 GiB + size - MEM_HOLE_START)
 *
 * The hole holds the PCI window, IOAPIC, LAPIC, flash. Checkpoints save by ram page, so a layer file knows no holes.
 *
 * Every write of the VMM to guest memory goes through mem_write, or through a pointer from mem_at with `write`: that is
 * the one place where such pages are marked as dirty. An asynchronous writer (io_uring into guest memory) calls
 * mem_mark_dirty again when it is done. Such writes happen in an I/O thread, or while the VM stands: never in a vCPU's
 * exit, so that a parked I/O thread is enough to know that what is marked is written.
 *
 * Threads: all functions but create/destroy may be called from any thread.
 */
#ifndef VMCP_VMM_MEMORY_H
#define VMCP_VMM_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

#define MEM_HOLE_START 0xc0000000ull /* 3 GiB */
#define MEM_HOLE_END 0x100000000ull  /* 4 GiB */
#define MEM_MIN_BYTES (16ull << 20)
#define MEM_MAX_BYTES (1024ull << 30)

struct mem;

/* Pages of the host behind it. What each costs: docs/memory-cow.md. */
enum mem_backing {
	MEM_BACKING_SMALL,   /* 4 KiB */
	MEM_BACKING_THP,     /* 2 MiB where the host has them at hand, 4 KiB elsewhere */
	MEM_BACKING_HUGETLB, /* 2 MiB, reserved from the host's pool for all of it */
};

struct mem_region {
	uint64_t gpa;
	uint64_t ram_offset;
	uint64_t bytes;
};

/* size_bytes: a multiple of 2 MiB within MEM_MIN_BYTES..MEM_MAX_BYTES (else -EINVAL, ERR_USAGE). Memory is zero. */
int mem_create(uint64_t size_bytes, struct mem **out, struct err *err);
/* The same with a choice of backing. THP on a host that has it off: small pages instead, and a warning. HUGETLB without enough free huge
 * pages: -ENOMEM, ERR_HOST, and what to do. */
int mem_create_backed(uint64_t size_bytes, enum mem_backing backing, struct mem **out, struct err *err);
enum mem_backing mem_backing(const struct mem *mem); /* what is in use */
/* The same without a memfd, for mem_map_file. */
int mem_create_private(uint64_t size_bytes, struct mem **out, struct err *err);
void mem_destroy(struct mem *mem);

uint64_t mem_size(const struct mem *mem);  /* bytes of RAM */
uint64_t mem_pages(const struct mem *mem); /* mem_size / 4096 */
int mem_fd(const struct mem *mem);	   /* the memfd, -1 of private memory; stays the memory's */
uint64_t mem_allocated_bytes(const struct mem *mem); /* what a memfd takes of the host's memory now; 0: not known, private memory */
/* mem_find_populated looks at so many at once. */
#define MEM_FIND_PAGES 64u
/*
 * The first populated pages at or after `page`: [*first, *end), at least one, or *first == mem_pages if there are none. All others read as
 * zero. It may end before the populated pages do; `most`: how many the caller is about to look at, 1 if just this one. A fraction of the time to
 * copy them. What is populated stays so until it is given back or discarded. Of private memory every page counts as populated. -errno.
 */
int mem_find_populated(const struct mem *mem, uint64_t page, uint64_t most, uint64_t *first, uint64_t *end);
/* The whole RAM as the VMM maps it, by ram offset. For the checkpoint engine; it reads and restores pages by it. */
uint8_t *mem_base(const struct mem *mem);
/* The ranges in guest-physical order. Returns how many (1 or 2). */
unsigned mem_regions(const struct mem *mem, struct mem_region out[2]);

/* Host address of [gpa, gpa + length), or NULL if any of it is not RAM or lies in both ranges. length may be 0. With
 * `write`, the caller is about to write there. gpa and length are untrusted. */
void *mem_at(struct mem *mem, uint64_t gpa, uint64_t length, bool write);
/* Copies; -EFAULT, ERR_FAILED if the range is not RAM. */
int mem_read(struct mem *mem, uint64_t gpa, void *data, uint64_t length, struct err *err);
int mem_write(struct mem *mem, uint64_t gpa, const void *data, uint64_t length, struct err *err);
/* Marks pages that are (or just were) written through a pointer or by asynchronous I/O. */
void mem_mark_dirty(struct mem *mem, uint64_t gpa, uint64_t length);
/* Takes the marks of what the VMM wrote, which KVM's dirty log does not see: adds them to `words`, one bit a ram page,
 * mem_pages / 64 words, and clears them. Returns whether there were any. As a writer marks before it writes, the I/O threads stand still
 * meanwhile. Costs what was written, not what memory there is. */
bool mem_take_dirty(struct mem *mem, uint64_t *words);
/*
 * Private memory: pages [first_page, first_page + count) become those of the file from its page `at` on. Nobody may write to the file or
 * cut it off while it is mapped: a page that cannot be read any more ends the VM (vmm/memory_guard.h). The descriptor stays the caller's, and
 * may be closed. The VM stands, or has never run.
 */
int mem_map_file(struct mem *mem, uint64_t first_page, uint64_t count, int fd, uint64_t at, struct err *err);
/* After the last of them: one call for all, not one for each. */
void mem_map_done(struct mem *mem);
/* The pages read as zero from here on, and the host has theirs back where it can; pages of the pool (hugetlb) stay.
 * Marks nothing as dirty. A whole number of pages within RAM. */
int mem_discard(struct mem *mem, uint64_t ram_offset, uint64_t bytes, struct err *err);
/*
 * The guest gives these pages back (balloon, free page reporting): marks them as dirty, then discards them. From an I/O thread, as every
 * write of the VMM. -EBUSY while discards are held: nothing was done. Otherwise as mem_discard.
 */
int mem_give_back(struct mem *mem, uint64_t ram_offset, uint64_t bytes, struct err *err);
/* How often mem_give_back discarded: where it is the same as before, no page was taken away in between. */
uint64_t mem_given_back(const struct mem *mem);
/*
 * While pages are held as they were by protecting them, none may be taken away: it would be gone before it is saved, and its protection
 * with it. From mem_hold_discards on mem_give_back refuses, and none is under way any more. Holds nest. Any thread.
 */
void mem_hold_discards(struct mem *mem);
void mem_release_discards(struct mem *mem);
/* fn is called, in the thread of the release, when the last hold ends; it must not call back into the memory. One listener, NULL: none. */
void mem_on_release(struct mem *mem, void (*fn)(void *opaque), void *opaque);
/* gpa -> ram offset; false if not RAM. */
bool mem_ram_offset(const struct mem *mem, uint64_t gpa, uint64_t *ram_offset);

#endif
