#include "base/spin.h"

#include <sys/resource.h>

#include "base/bytes.h"

#define BUDGET_NS   50000u
#define VAIN_PHASES 8u	     /* then looking is the exception */
#define TRY_EACH    16u	     /* one phase in so many */
#define MOST_NS	    50000u   /* of one look: the thread may have stood still */
#define SPIN_NS	    5000000u /* looked in vain for so long, the thread takes stock */
#define SPIN_WAITS  3u	     /* so often off the processor against its will in SPIN_NS of running: others need it */
#define CROWDED_NS  200000000u

static uint64_t timeval_ns(const struct timeval *t)
{
	return (uint64_t)t->tv_sec * 1000000000u + (uint64_t)t->tv_usec * 1000u;
}

uint64_t spin_begin(struct spin *s, uint64_t now_ns)
{
	bool worth = s->vain < VAIN_PHASES || ++s->skipped >= TRY_EACH;
	if (worth)
		s->skipped = 0;
	return worth && now_ns >= s->crowded_until_ns ? BUDGET_NS : 0;
}

bool spin_in_vain(struct spin *s, uint64_t spun_ns, uint64_t now_ns)
{
	struct rusage usage;
	s->spun_ns += min_u64(spun_ns, MOST_NS);
	if (s->spun_ns < SPIN_NS || getrusage(RUSAGE_THREAD, &usage) != 0)
		return false;
	uint64_t ran_ns = timeval_ns(&usage.ru_utime) + timeval_ns(&usage.ru_stime);
	uint64_t lately_ns = max_u64(ran_ns - s->ran_ns, SPIN_NS);
	bool crowded = (uint64_t)(usage.ru_nivcsw - s->waits) >= SPIN_WAITS * lately_ns / SPIN_NS;
	if (crowded)
		s->crowded_until_ns = now_ns + CROWDED_NS;
	s->ran_ns = ran_ns;
	s->waits = usage.ru_nivcsw;
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
