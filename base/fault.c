#include "base/fault.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum fault_action { FAULT_ACT_KILL, FAULT_ACT_ERROR, FAULT_ACT_SLEEP };

/* An exception to "no mutable globals": a fault point may stand anywhere, so its switch can be no one's parameter.
 * Set once by fault_init, before threads; only `passed` changes later. */
static bool fault_armed;
static struct {
	unsigned number;
	uint64_t count;
	enum fault_action action;
	int error;
	uint64_t sleep_ms;
	_Atomic uint64_t passed;
} plan;

static const struct {
	unsigned number;
	const char *name;
	const char *meaning;
} points[] = {
#define FAULT_POINT(number, name, meaning) {(number), #name, (meaning)},
#include "base/fault_points.def"
#undef FAULT_POINT
};

const char *fault_name(unsigned index, unsigned *number, const char **meaning)
{
	if (index >= sizeof(points) / sizeof(points[0]))
		return NULL;
	if (number != NULL)
		*number = points[index].number;
	if (meaning != NULL)
		*meaning = points[index].meaning;
	return points[index].name;
}

static const char *name_of(unsigned wanted)
{
	unsigned number;
	const char *name;

	for (unsigned i = 0; (name = fault_name(i, &number, NULL)) != NULL; i++) {
		if (number == wanted)
			return name;
	}
	return NULL;
}

/* Reads decimal digits at *at, at least one and at most nine; moves *at behind them. */
static bool read_number(const char **at, uint64_t *out)
{
	uint64_t value = 0;
	unsigned digits = 0;

	for (; **at >= '0' && **at <= '9'; (*at)++) {
		if (++digits > 9)
			return false;
		value = value * 10 + (uint64_t)(**at - '0');
	}
	*out = value;
	return digits > 0;
}

static bool read_action(const char *word)
{
	if (strcmp(word, "kill") == 0) {
		plan.action = FAULT_ACT_KILL;
	} else if (strcmp(word, "eio") == 0) {
		plan.action = FAULT_ACT_ERROR;
		plan.error = EIO;
	} else if (strcmp(word, "enospc") == 0) {
		plan.action = FAULT_ACT_ERROR;
		plan.error = ENOSPC;
	} else if (strncmp(word, "sleep=", 6) == 0) {
		plan.action = FAULT_ACT_SLEEP;
		word += 6;
		return read_number(&word, &plan.sleep_ms) && *word == '\0';
	} else {
		return false;
	}
	return true;
}

static bool read_plan(const char *text)
{
	uint64_t number;

	if (!read_number(&text, &number))
		return false;
	plan.number = (unsigned)number;
	plan.count = 1;
	plan.action = FAULT_ACT_KILL;
	if (text[0] == ':' && text[1] >= '0' && text[1] <= '9') {
		text++;
		if (!read_number(&text, &plan.count) || plan.count == 0)
			return false;
	}
	if (*text == '\0')
		return true;
	return *text == ':' && read_action(text + 1);
}

int fault_init(struct err *err)
{
	const char *text = getenv("VMCP_FAULT");

	fault_armed = false;
	atomic_store(&plan.passed, 0);
	if (text == NULL)
		return 0;
	if (!read_plan(text)) {
		err_set(err, ERR_USAGE, EINVAL, "VMCP_FAULT=%s: not understood", text);
		err_hint(err, "NUMBER[:COUNT][:kill|eio|enospc|sleep=MS]");
		return -EINVAL;
	}
	if (name_of(plan.number) == NULL)
		return err_set(err, ERR_USAGE, EINVAL, "VMCP_FAULT=%s: there is no fault point %u", text, plan.number);
	fault_armed = true;
	return 0;
}

static int act(struct err *err)
{
	switch (plan.action) {
	case FAULT_ACT_KILL:
		kill(getpid(), SIGKILL);
		for (;;)
			pause();
	case FAULT_ACT_ERROR:
		return err_sys(err, plan.error, "fault point %u (%s), asked for by VMCP_FAULT", plan.number,
			       name_of(plan.number));
	case FAULT_ACT_SLEEP:
		break;
	}
	/* For a test that has to do something meanwhile. */
	fprintf(stderr, "fault point %u (%s): sleeping\n", plan.number, name_of(plan.number));
	struct timespec rest = {.tv_sec = (time_t)(plan.sleep_ms / 1000),
				.tv_nsec = (long)(plan.sleep_ms % 1000) * 1000000};
	while (nanosleep(&rest, &rest) != 0 && errno == EINTR)
		;
	return 0;
}

int fault_check(enum fault_point point, struct err *err)
{
	if (__builtin_expect(!fault_armed, 1))
		return 0;
	if ((unsigned)point != plan.number || atomic_fetch_add(&plan.passed, 1) + 1 != plan.count)
		return 0;
	return act(err);
}
