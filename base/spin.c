#include "base/spin.h"

#include "base/bytes.h"

#define BUDGET_NS   50000u
#define VAIN_MOST   8u	     /* then they are the exception */
#define TRY_EACH    16u	     /* one in so many */
#define WAIT_NS	    50000u   /* a look that took longer was one off the processor */
#define SPIN_NS	    5000000u /* looked in vain for so long, the thread takes stock */
#define SPIN_WAITS  3u	     /* so many waits in SPIN_NS: others need the processor */
#define CROWDED_NS  200000000u

bool tries_worth(struct tries *t)
{
	if (t->vain >= VAIN_MOST && ++t->skipped < TRY_EACH)
		return false;
	t->skipped = 0;
	return true;
}

void tries_in_vain(struct tries *t) { t->vain += t->vain < VAIN_MOST; }

uint64_t spin_begin(struct spin *s, uint64_t now_ns)
{
	return tries_worth(&s->phases) && now_ns >= s->crowded_until_ns ? BUDGET_NS : 0;
}

bool spin_in_vain(struct spin *s, uint64_t spun_ns, uint64_t now_ns)
{
	s->waits += spun_ns > WAIT_NS;
	s->spun_ns += min_u64(spun_ns, WAIT_NS);
	if (s->spun_ns < SPIN_NS)
		return false;
	bool crowded = s->waits >= SPIN_WAITS;
	if (crowded)
		s->crowded_until_ns = now_ns + CROWDED_NS;
	s->waits = 0;
	s->spun_ns = 0;
	return crowded;
}

void spin_end(struct spin *s, bool paid)
{
	if (paid)
		s->phases.vain = 0;
	else
		tries_in_vain(&s->phases);
}
