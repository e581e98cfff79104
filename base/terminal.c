#include "base/terminal.h"

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

struct terminal_size terminal_size(int fd)
{
	struct winsize size;

	if (ioctl(fd, TIOCGWINSZ, &size) != 0 || size.ws_col == 0 || size.ws_row == 0)
		return (struct terminal_size){80, 24};
	return (struct terminal_size){size.ws_col, size.ws_row};
}

static struct {
	int fd;
	volatile sig_atomic_t raw;
	struct termios before, present;
} state; /* for the handlers; written while no signal of theirs is handled */

/* SA_RESETHAND: the signal takes its effect when this returns. */
static void end_by_signal(int number)
{
	if (state.raw)
		tcsetattr(state.fd, TCSANOW, &state.before);
	raise(number);
}

/* Whoever takes over, the shell, finds the terminal as it was; when this goes on it is raw again. */
static void stop_by_signal(int number)
{
	int saved = errno;

	(void)number;
	if (state.raw)
		tcsetattr(state.fd, TCSANOW, &state.before);
	raise(SIGSTOP);
	if (state.raw)
		tcsetattr(state.fd, TCSANOW, &state.present);
	errno = saved;
}

static void handle(int number, void (*handler)(int), int flags)
{
	struct sigaction action = {.sa_handler = handler, .sa_flags = flags}, present;

	if (sigaction(number, NULL, &present) == 0 && present.sa_handler == SIG_DFL)
		sigaction(number, &action, NULL);
}

bool terminal_set_raw(int fd, bool output)
{
	static const int ending[] = {SIGTERM, SIGHUP, SIGINT, SIGQUIT, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};

	if (!isatty(fd) || tcgetattr(fd, &state.before))
		return false;
	state.fd = fd;
	state.present = state.before;
	cfmakeraw(&state.present);
	if (output)
		state.present.c_oflag = state.before.c_oflag;
	for (size_t i = 0; i < sizeof(ending) / sizeof(ending[0]); i++)
		handle(ending[i], end_by_signal, (int)SA_RESETHAND);
	handle(SIGTSTP, stop_by_signal, SA_RESTART);
	state.raw = tcsetattr(fd, TCSADRAIN, &state.present) == 0;
	return state.raw;
}

void terminal_restore(void)
{
	if (state.raw)
		tcsetattr(state.fd, TCSADRAIN, &state.before);
	state.raw = 0;
}
