/*
 * Looking for work instead of sleeping. A phase lasts from the first hot poller until none is hot.
 *
 * Nobody sleeps while a poller is hot, so a loop_poller_heat from anywhere in the loop's thread is never late. Where others work for a poller and there is no
 * processor to look beside them, all rest at once: a short sleep between two looks would take theirs away each time that it ends, or a vCPU's, which costs
 * more than being told.
 */
#include <stdlib.h>
#include <sys/resource.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/event_internal.h"

#define POLL_NS	    50000u /* so long after the last work */
#define LOOK_NS	    50000u /* so often descriptors and tasks have their turn meanwhile */
#define VAIN_PHASES 8u	   /* then polling is the exception */
#define TRY_EACH    16u	   /* one phase in so many */
#define SPIN_NS	    5000000u
#define SPIN_WAITS  3u /* so often off the processor against its will in SPIN_NS of looking in vain: others need it */
#define CROWDED_NS  200000000u

struct loop_poller *polling_add(struct polling *p, const struct loop_poller_ops *ops, void *opaque)
{
	struct loop_poller *poller = xcalloc(1, sizeof(*poller));
	*poller = (struct loop_poller){.polling = p, .ops = ops, .opaque = opaque, .next = p->pollers};
	p->pollers = poller;
	return poller;
}

void polling_remove(struct polling *p, struct loop_poller *poller)
{
	struct loop_poller **at = &p->pollers;
	while (*at != poller)
		at = &(*at)->next;
	*at = poller->next;
	p->hot -= poller->hot;
	free(poller);
}

void polling_clear(struct polling *p)
{
	while (p->pollers != NULL)
		polling_remove(p, p->pollers);
}

void loop_poller_heat(struct loop_poller *poller)
{
	poller->polling->hot += !poller->hot;
	poller->hot = true;
}

static long involuntary_waits(void)
{
	struct rusage usage;
	return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
}

static void begin_phase(struct polling *p, uint64_t now)
{
	bool worth = p->vain < VAIN_PHASES || ++p->skipped >= TRY_EACH;
	if (worth)
		p->skipped = 0;
	p->in_phase = true;
	p->in_vain = p->paid = false;
	p->since_ns = now;
	p->budget_ns = worth && p->spare > 0 && now >= p->crowded_until_ns ? POLL_NS : 0;
}

static void end_phase(struct polling *p)
{
	p->in_phase = false;
	if (p->budget_ns == 0)
		return;
	if (p->paid)
		p->vain = 0;
	else if (p->vain < VAIN_PHASES)
		p->vain++;
}

/* Looking in vain takes the processor from nobody, or it ends for a while. */
static void count_spin(struct polling *p, uint64_t spun_ns, uint64_t now)
{
	p->spun_ns += min_u64(spun_ns, LOOK_NS); /* the loop may have been parked */
	if (p->spun_ns < SPIN_NS)
		return;
	long waits = involuntary_waits();
	if (waits - p->waits >= (long)SPIN_WAITS) {
		p->crowded_until_ns = now + CROWDED_NS;
		p->budget_ns = 0;
	}
	p->waits = waits;
	p->spun_ns = 0;
}

static bool look_once(const struct polling *p)
{
	bool found = false;
	for (const struct loop_poller *one = p->pollers; one != NULL; one = one->next) {
		loop_park_point(p->loop);
		if (one->hot && one->ops->poll(one->opaque))
			found = true;
	}
	return found;
}

static void rest(struct polling *p)
{
	for (struct loop_poller *one = p->pollers; one != NULL; one = one->next) {
		if (!one->hot)
			continue;
		one->hot = one->ops->rest(one->opaque);
		p->hot -= !one->hot;
	}
}

static bool is_helped(const struct polling *p)
{
	for (const struct loop_poller *one = p->pollers; one != NULL; one = one->next) {
		if (one->ops->helped != NULL && one->ops->helped(one->opaque))
			return true;
	}
	return false;
}

bool polling_look(struct polling *p)
{
	if (p->hot == 0) {
		if (p->in_phase)
			end_phase(p);
		return false;
	}
	uint64_t now = clock_now_ns(), look = now + LOOK_NS;
	if (!p->in_phase)
		begin_phase(p, now);
	if (p->told)
		p->since_ns = now;
	p->told = false;
	while (now < look && !loop_is_stopping(p->loop)) {
		uint64_t before = now;
		bool found = look_once(p);
		now = clock_now_ns();
		if (found) {
			p->paid |= p->in_vain;
			p->since_ns = now;
		} else {
			count_spin(p, now - before, now);
		}
		p->in_vain = !found;
		if (found)
			continue;
		if (now - p->since_ns < p->budget_ns && (p->spare > 1 || !is_helped(p))) {
			__builtin_ia32_pause();
			continue;
		}
		rest(p);
		if (p->hot == 0)
			end_phase(p);
		return p->hot > 0;
	}
	return true;
}
