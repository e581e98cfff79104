#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"

static int ends[2];

static void open_pipe(void) { cr_assert_eq(pipe(ends), 0); }

static const char *logged(void)
{
	static char text[8192];

	close(ends[1]);
	ssize_t n = read(ends[0], text, sizeof(text) - 1);
	text[n > 0 ? n : 0] = '\0';
	return text;
}

Test(log, lines_carry_the_name, .init = open_pipe)
{
	log_set_sink(ends[1], "web");
	log_error("disk %d is gone", 3);
	log_set_sink(ends[1], "");
	log_warn("low\n");
	cr_assert_str_eq(logged(), "vmcp: web: disk 3 is gone\nvmcp: low\n");
}

Test(log, the_level_holds_back, .init = open_pipe)
{
	log_set_sink(ends[1], "");
	log_set_level(LOG_LEVEL_WARN);
	cr_assert_eq(log_get_level(), LOG_LEVEL_WARN);
	log_info("not this");
	log_debug("nor this");
	log_warn("this");
	log_set_level(LOG_LEVEL_DEBUG);
	log_debug("and this");
	cr_assert_str_eq(logged(), "vmcp: this\nvmcp: and this\n");
}

Test(log, one_event_is_one_line_however_long, .init = open_pipe)
{
	char longer[5000];

	memset(longer, 'a', sizeof(longer) - 1);
	longer[sizeof(longer) - 1] = '\0';
	log_set_sink(ends[1], "");
	log_error("x\nvmcp: forged%s", longer);
	const char *text = logged();
	cr_assert_eq(strncmp(text, "vmcp: x?vmcp: forged", 20), 0);
	cr_assert_eq(strchr(text, '\n'), text + strlen(text) - 1);
}

Test(log, errno_stays, .init = open_pipe)
{
	log_set_sink(-1, "");
	errno = ENOSPC;
	log_error("to nowhere");
	cr_assert_eq(errno, ENOSPC);
}
