/*
 * The fault thread: answers every write that met the protection. What it does depends on the phase (memcow_internal.h):
 * release and note, copy, claim and release, or just release.
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/priority.h"
#include "checkpoint/memcow_internal.h"
#include "checkpoint/uffd.h"

#define EVENTS_PER_READ 64

static void *page_address(struct memcow *cow, uint64_t page) { return cow->base + page * PAGE_BYTES; }

void memcow_lose_protection(struct memcow *cow, const char *what, int number)
{
	if (cow->uffd_lost)
		return;
	cow->uffd_lost = true;
	cow->phase = MEMCOW_IDLE;
	struct err err = ERR_INIT;
	err_sys(&err, number, "memory protection: %s", what);
	memcow_fail(cow, &err);
	/* Whoever waits in a fault must run on, now, and nobody may start to wait. Without the registration nothing is
	 * protected any more. The last resort is to close the userfaultfd, which drops it in any case; another file
	 * takes its number, so that a poll under way meets nothing foreign. */
	if (uffd_unregister(cow->uffd, cow->base, cow->pages * PAGE_BYTES) != 0)
		dup2(cow->stop_event, cow->uffd);
	log_error("%s; live checkpoints are off until the VM is started again", err.message);
}

static void release(struct memcow *cow, uint64_t page)
{
	struct err err = ERR_INIT;
	int r = fault_check(FAULT_MEMCOW_RELEASE, &err);
	if (r == 0)
		r = uffd_release(cow->uffd, page_address(cow, page), PAGE_BYTES);
	if (r != 0)
		memcow_lose_protection(cow, "cannot release a page", -r);
}

/* The slot of the next copy, NULL if the checkpoint failed meanwhile. Under lock; may wait for the writer. */
static struct segment *segment_with_room(struct memcow *cow)
{
	struct segment *segment = cow->fault_segment;
	if (segment && segment->count == SEGMENT_PAGES) {
		pool_push(cow->pool, segment);
		segment = NULL;
	}
	if (!segment) {
		bool waited;
		uint64_t start_ns = clock_now_ns();
		segment = pool_get(cow->pool, true, &waited);
		if (waited) {
			uint64_t waited_ns = clock_now_ns() - start_ns;
			atomic_fetch_add_explicit(&cow->throttled, 1, memory_order_relaxed);
			atomic_fetch_add_explicit(&cow->throttled_ns, waited_ns, memory_order_relaxed);
			atomic_fetch_add_explicit(&cow->all_throttled, 1, memory_order_relaxed);
			atomic_fetch_add_explicit(&cow->all_throttled_ns, waited_ns, memory_order_relaxed);
		}
	}
	cow->fault_segment = segment;
	return segment;
}

bool memcow_copy_page(struct memcow *cow, uint64_t page)
{
	const void *source = page_address(cow, page);
	if (bitmap_test(cow->claimed, page))
		return true; /* the sweeper has it and is about to release it, or it is a second writer's event */
	if (page_is_zero(source)) {
		if (bitmap_claim(cow->claimed, page)) {
			bitmap_claim(cow->zero, page);
			atomic_fetch_add_explicit(&cow->zero_pages, 1, memory_order_relaxed);
		}
		return true;
	}
	if (hold_copy(&cow->hold, page, source)) {
		if (bitmap_claim(cow->claimed, page))
			atomic_fetch_add_explicit(&cow->saved_pages, 1, memory_order_relaxed);
		else
			hold_drop(&cow->hold, page);
		return true;
	}
	struct segment *segment = segment_with_room(cow);
	if (!segment)
		return false;
	uint8_t *data = segment->data + (size_t)segment->count * PAGE_BYTES;
	page_copy(data, source);
	if (bitmap_claim(cow->claimed, page)) {
		segment->entries[segment->count++] = (struct segment_entry){.page = page, .data = data};
		atomic_fetch_add_explicit(&cow->saved_pages, 1, memory_order_relaxed);
	}
	return true;
}

static void handle_fault(struct memcow *cow, uint64_t page, uint64_t seen_ns)
{
	pthread_mutex_lock(&cow->lock);
	if (cow->uffd_lost) {
		/* its waiters were woken with the registration */
	} else if (cow->phase == MEMCOW_ARMED) {
		/* In this order: noted first, it could be taken from the set and protected again before it is released. */
		release(cow, page);
		page_set_add(&cow->dirty, page);
		atomic_fetch_add_explicit(&cow->arm_faults, 1, memory_order_relaxed);
	} else if (cow->phase == MEMCOW_CAPTURED) {
		if (!memcow_copy_page(cow, page))
			cow->phase = MEMCOW_IDLE;
		release(cow, page);
		uint64_t took_ns = clock_now_ns() - seen_ns;
		histogram_record(&cow->latency, took_ns);
		histogram_record(&cow->all_latency, took_ns);
	} else {
		release(cow, page);
	}
	pthread_mutex_unlock(&cow->lock);
}

static void read_events(struct memcow *cow)
{
	struct uffd_msg events[EVENTS_PER_READ];
	ssize_t n = read(cow->uffd, events, sizeof(events));
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	uint64_t seen_ns = clock_now_ns();
	if (n < (ssize_t)sizeof(events[0])) {
		pthread_mutex_lock(&cow->lock);
		memcow_lose_protection(cow, "cannot read its events", n < 0 ? errno : EIO);
		pthread_mutex_unlock(&cow->lock);
		return;
	}
	for (size_t i = 0; i < (size_t)n / sizeof(events[0]); i++) {
		uint64_t offset = events[i].arg.pagefault.address - (uintptr_t)cow->base;
		if (events[i].event == UFFD_EVENT_PAGEFAULT && offset < cow->pages * PAGE_BYTES)
			handle_fault(cow, offset / PAGE_BYTES, seen_ns);
	}
}

void *memcow_fault_main(void *opaque)
{
	struct memcow *cow = opaque;
	pthread_setname_np(pthread_self(), "vmcp-fault");
	priority_urgent();
	struct pollfd fds[2] = {{.fd = cow->uffd, .events = POLLIN}, {.fd = cow->stop_event, .events = POLLIN}};
	for (;;) {
		int n = poll(fds, 2, -1);
		if (n < 0 && errno != EINTR)
			break;
		if (n > 0 && fds[1].revents)
			return NULL;
		if (n <= 0 || !fds[0].revents)
			continue;
		if (fds[0].revents & POLLIN) {
			read_events(cow);
		} else {
			pthread_mutex_lock(&cow->lock);
			memcow_lose_protection(cow, "its descriptor failed", EIO);
			pthread_mutex_unlock(&cow->lock);
		}
		pthread_mutex_lock(&cow->lock);
		if (cow->uffd_lost)
			fds[0].fd = -1;
		pthread_mutex_unlock(&cow->lock);
	}
	pthread_mutex_lock(&cow->lock);
	memcow_lose_protection(cow, "cannot wait for its events", errno);
	pthread_mutex_unlock(&cow->lock);
	return NULL;
}
