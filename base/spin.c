#include "base/spin.h"

#include "base/bytes.h"

#define BUDGET_NS   50000u
#define VAIN_PHASES 8u	     /* then looking is the exception */
#define TRY_EACH    16u	     /* one phase in so many */
#define WAIT_NS	    50000u   /* a look that took longer was one off the processor */
#define SPIN_NS	    5000000u /* looked in vain for so long, the thread takes stock */
#define SPIN_WAITS  3u	     /* so many waits in SPIN_NS: others need the processor */
#define CROWDED_NS  200000000u

uint64_t spin_begin(struct spin *s, uint64_t now_ns)
{
	bool worth = s->vain < VAIN_PHASES || ++s->skipped >= TRY_EACH;
	if (worth)
		s->skipped = 0;
	return worth && now_ns >= s->crowded_until_ns ? BUDGET_NS : 0;
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
		s->vain = 0;
	else if (s->vain < VAIN_PHASES)
		s->vain++;
}
