#include "tests/inflight/test_layer.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "tests/disk/sectors.h"

#define TICK_NS 200000l

struct held {
	struct io_op *op;
	const struct test_rule *rule;
	uint64_t due_ns;
};

struct test_layer {
	struct cow_io *io;
	struct loop *loop;
	struct loop_source *source;
	int timer_fd;
	uint64_t random;
	const struct test_rule *rules;
	unsigned rule_count;
	struct held *held;
	unsigned count, capacity;
	unsigned long errors, cuts;
};

static uint64_t pick(struct test_layer *layer, uint64_t below) { return next_random(&layer->random) % below; }

static bool ends_with(int fd, const char *end)
{
	char link[64], path[PATH_MAX];
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	ssize_t length = readlink(link, path, sizeof(path) - 1);
	size_t wanted = strlen(end);
	return length >= (ssize_t)wanted && memcmp(path + length - wanted, end, wanted) == 0;
}

static const struct test_rule *rule_for(const struct test_layer *layer, const struct io_op *op)
{
	for (unsigned i = 0; i < layer->rule_count; i++) {
		const struct test_rule *rule = &layer->rules[i];
		if (!(rule->kinds & RULE_KIND(op->kind)) || (rule->file && !ends_with(op->fd, rule->file)))
			continue;
		if (rule->to == 0 || op->kind == IO_SYNC || ranges_overlap(op->offset, op->length, rule->from, rule->to - rule->from))
			return rule;
	}
	return NULL;
}

static uint64_t due(struct test_layer *layer, const struct test_rule *rule)
{
	if (rule->hold)
		return UINT64_MAX;
	return clock_now_ns() + rule->least_ns + (rule->most_ns > rule->least_ns ? pick(layer, rule->most_ns - rule->least_ns) : 0);
}

static int on_start(void *opaque, const struct io_op *op)
{
	struct test_layer *layer = opaque;
	const struct test_rule *rule = rule_for(layer, op);
	if (!rule)
		return IO_HOOK_PASS;
	if (layer->count == layer->capacity) {
		layer->capacity = layer->capacity ? 2 * layer->capacity : 64;
		layer->held = realloc(layer->held, layer->capacity * sizeof(*layer->held));
	}
	/* The operation is ours from here on, to be ended. */
	layer->held[layer->count++] = (struct held){(struct io_op *)(uintptr_t)op, rule, due(layer, rule)};
	return IO_HOOK_TAKE;
}

/* The first `length` bytes of what is left of it. Returns what the system call would. */
static int transfer(const struct io_op *op, uint64_t length)
{
	unsigned count;
	const struct iovec *iov = io_op_iov(op, &count);
	uint64_t at = op->offset + op->transferred, end = at + length;
	for (unsigned i = 0; i < count && at < end; i++) {
		size_t bytes = (size_t)min_u64(iov[i].iov_len, end - at);
		ssize_t n = op->kind == IO_READ ? pread(op->fd, iov[i].iov_base, bytes, (off_t)at)
						: pwrite(op->fd, iov[i].iov_base, bytes, (off_t)at);
		if (n < 0)
			return -errno;
		at += (uint64_t)n;
		if ((size_t)n < bytes)
			break; /* the end of the file */
	}
	return (int)(at - op->offset - op->transferred);
}

static int carry_out(struct test_layer *layer, const struct held *h)
{
	struct io_op *op = h->op;
	int how = FALLOC_FL_KEEP_SIZE | (op->kind == IO_PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
	uint64_t length = op->length - op->transferred;
	switch (op->kind) {
	case IO_READ:
	case IO_WRITE:
		/* In whole sectors: no disk tears them. */
		if (length > SECTOR && pick(layer, 100) < h->rule->short_percent) {
			length = (1 + pick(layer, length / SECTOR - (length % SECTOR == 0))) * SECTOR;
			layer->cuts++;
		}
		return transfer(op, length);
	case IO_SYNC:
		return fdatasync(op->fd) == 0 ? 0 : -errno;
	case IO_PUNCH:
	case IO_ZERO:
		return fallocate(op->fd, how, (off_t)op->offset, (off_t)op->length) == 0 ? 0 : -errno;
	}
	return -EINVAL;
}

static void end(struct test_layer *layer, unsigned i)
{
	struct held h = layer->held[i];
	layer->held[i] = layer->held[--layer->count];
	int result;
	if (pick(layer, 100) < h.rule->error_percent) {
		layer->errors++;
		result = -h.rule->error;
	} else {
		result = carry_out(layer, &h);
	}
	cow_io_plug(layer->io);
	cow_io_end_taken(layer->io, h.op, result);
	cow_io_unplug(layer->io);
}

bool test_layer_end_one(struct test_layer *layer)
{
	if (layer->count == 0)
		return false;
	unsigned i = (unsigned)pick(layer, layer->count), reluctance = layer->held[i].rule->reluctance;
	if (reluctance == 0 || pick(layer, reluctance) == 0)
		end(layer, i);
	return true;
}

/* Those that are due, in any order. */
static void end_due(struct test_layer *layer)
{
	uint64_t now = clock_now_ns();
	for (unsigned i = 0; i < layer->count;) {
		if (layer->held[i].due_ns <= now) {
			end(layer, i);
			i = 0; /* others may have come */
		} else {
			i++;
		}
	}
}

static void on_timer(void *opaque, uint32_t events)
{
	struct test_layer *layer = opaque;
	uint64_t count;
	(void)events;
	if (read(layer->timer_fd, &count, sizeof(count)) == sizeof(count))
		end_due(layer);
}

static void pump(void *opaque)
{
	struct test_layer *layer = opaque;
	end_due(layer);
	for (uint64_t n = pick(layer, 4); n > 0 && test_layer_end_one(layer); n--)
		;
}

struct test_layer *test_layer_create(struct cow_io *io, struct loop *loop, uint64_t seed)
{
	struct test_layer *layer = xcalloc(1, sizeof(*layer));
	layer->io = io;
	layer->loop = loop;
	layer->random = seed;
	layer->timer_fd = -1;
	if (loop) {
		const struct itimerspec tick = {.it_interval = {.tv_nsec = TICK_NS}, .it_value = {.tv_nsec = TICK_NS}};
		layer->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
		if (layer->timer_fd < 0 || timerfd_settime(layer->timer_fd, 0, &tick, NULL) != 0 ||
		    loop_add(loop, layer->timer_fd, EPOLLIN, on_timer, layer, &layer->source, NULL) != 0)
			abort();
	} else {
		cow_io_set_pump(io, pump, layer);
	}
	cow_io_set_hook(io, on_start, layer);
	return layer;
}

void test_layer_destroy(struct test_layer *layer)
{
	cow_io_set_hook(layer->io, NULL, NULL);
	cow_io_set_pump(layer->io, NULL, NULL);
	if (layer->source)
		loop_remove(layer->loop, layer->source);
	if (layer->timer_fd >= 0)
		close(layer->timer_fd);
	free(layer->held);
	free(layer);
}

void test_layer_set_rules(struct test_layer *layer, const struct test_rule *rules, unsigned count)
{
	static const struct test_rule passes = {.kinds = RULE_ALL};
	layer->rules = rules;
	layer->rule_count = count;
	for (unsigned i = 0; i < layer->count; i++) {
		const struct test_rule *rule = rule_for(layer, layer->held[i].op);
		layer->held[i].rule = rule ? rule : &passes;
		layer->held[i].due_ns = rule ? due(layer, rule) : 0;
	}
	end_due(layer);
}

unsigned test_layer_held(const struct test_layer *layer) { return layer->count; }
unsigned long test_layer_errors(const struct test_layer *layer) { return layer->errors; }
unsigned long test_layer_cuts(const struct test_layer *layer) { return layer->cuts; }
