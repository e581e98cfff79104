/*
 * Looking for work instead of sleeping. A phase lasts from the first hot poller until none is hot.
 *
 * Nobody sleeps while a poller is hot, so a loop_poller_heat from anywhere in the loop's thread is never late. Where others work for a poller and there is no
 * processor to look beside them, all rest at once: a short sleep between two looks would take theirs away each time that it ends, or a vCPU's, which costs
 * more than being told.
 */
#include <stdlib.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/event_internal.h"

#define LOOK_NS	    50000u /* so often descriptors and tasks have their turn meanwhile */
#define ASIDE_NS    50000000u /* so long between two steps aside */
#define GLANCE_NS   10000u

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

static void begin_phase(struct polling *p, uint64_t now)
{
	p->in_phase = true;
	p->in_vain = p->paid = false;
	p->since_ns = now;
	uint64_t budget_ns = spin_begin(&p->spin, now);
	p->budget_ns = p->spare > 0 ? budget_ns : 0;
}

static void step_aside(struct polling *p, uint64_t now)
{
	if (p->step_aside == NULL || now < p->aside_from_ns)
		return;
	p->aside_from_ns = now + ASIDE_NS;
	p->step_aside(p->aside_opaque);
}

static void end_phase(struct polling *p, uint64_t now)
{
	p->in_phase = false;
	if (p->budget_ns == 0)
		return;
	spin_end(&p->spin, p->paid);
	if (!p->paid)
		step_aside(p, now);
}

static bool look_once(const struct polling *p, bool *stood)
{
	bool found = false;
	for (const struct loop_poller *one = p->pollers; one != NULL; one = one->next) {
		*stood |= loop_park_point(p->loop);
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

/* There is no processor to look on beside those who work for a poller. */
static bool makes_room(const struct polling *p)
{
	if (p->spare > 1)
		return false;
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
			end_phase(p, clock_now_ns());
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
		bool stood = false, found = look_once(p, &stood), room = !found && makes_room(p);
		now = clock_now_ns();
		if (found) {
			p->paid |= p->in_vain;
			p->since_ns = now;
		} else if (!stood && !room && spin_in_vain(&p->spin, now - before, now)) {
			p->budget_ns = 0;
			step_aside(p, now);
		}
		p->in_vain = !found;
		if (found)
			continue;
		bool spent = now - p->since_ns >= p->budget_ns;
		if (!spent && !room) {
			__builtin_ia32_pause();
			continue;
		}
		rest(p);
		if (!spent && !p->paid)
			p->budget_ns = 0; /* it made room, which tells nothing of whether looking pays */
		if (p->hot == 0)
			end_phase(p, now);
		return p->hot > 0;
	}
	return true;
}

/* --- glances --- */

bool polling_may_glance(const struct polling *p, struct loop_glance *glance)
{
	return p->spare > 0 && p->hot == 0 && tries_worth(&glance->tries);
}

bool polling_glance(const struct polling *p, struct loop_glance *glance, bool (*look)(void *opaque), void *opaque)
{
	uint64_t end = clock_now_ns() + GLANCE_NS;
	bool found;

	while (!(found = look(opaque)) && !loop_is_to_park(p->loop) && clock_now_ns() < end)
		__builtin_ia32_pause();
	if (!found)
		tries_in_vain(&glance->tries);
	else if (glance->tries.vain > 0)
		glance->tries.vain--;
	return found;
}
