#include "checkpoint/scheduling.h"

bool scheduling_leave_vcpus(struct vm *vm, cpu_set_t *before, cpu_set_t *busy)
{
	cpu_set_t all, theirs, left;
	if (sched_getaffinity(0, sizeof(all), &all) != 0)
		CPU_ZERO(&all);
	vm_busy_processors(vm, &theirs);
	CPU_AND(&theirs, &theirs, &all);
	CPU_XOR(&left, &all, &theirs);
	bool shared = CPU_COUNT(&left) == 0;
	if (CPU_COUNT(&theirs) > 0 && !shared)
		shared = sched_setaffinity(0, sizeof(left), &left) != 0;
	if (before)
		*before = all;
	if (busy)
		*busy = theirs;
	return shared;
}

void scheduling_restore(const cpu_set_t *before)
{
	if (CPU_COUNT(before) > 0)
		sched_setaffinity(0, sizeof(*before), before);
}
