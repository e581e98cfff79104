#include "vmm/memory_guard.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

/* Everything from here to on_bus_error runs in a signal's handler: async-signal-safe functions only (signal-safety(7)). */

static void say(const char *text)
{
	if (write(STDERR_FILENO, text, strlen(text)) < 0)
		return; /* nobody listens */
}

static uint64_t parse_hex(const char **at)
{
	uint64_t value = 0;
	for (;; ++*at) {
		char c = **at;
		if (c >= '0' && c <= '9')
			value = value << 4 | (uint64_t)(c - '0');
		else if (c >= 'a' && c <= 'f')
			value = value << 4 | (uint64_t)(c - 'a' + 10);
		else
			return value;
	}
}

/* A line of /proc/self/maps: the file's path, if the address lies in it and it names one. */
static const char *match_line(const char *line, uint64_t address)
{
	const char *at = line;
	uint64_t start = parse_hex(&at);
	if (*at++ != '-')
		return NULL;
	uint64_t end = parse_hex(&at);
	return address >= start && address < end ? strchr(at, '/') : NULL;
}

/* The file that is mapped at `address`: copied to `path`, false if there is none. */
static bool find_file(uint64_t address, char *path, size_t bytes)
{
	char line[4352], block[1024];
	size_t length = 0;
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	for (ssize_t n; fd >= 0 && (n = read(fd, block, sizeof(block))) > 0;) {
		for (ssize_t i = 0; i < n; i++) {
			if (block[i] != '\n') {
				if (length < sizeof(line) - 1)
					line[length++] = block[i];
				continue;
			}
			line[length] = '\0';
			length = 0;
			const char *found = match_line(line, address);
			if (found && strlen(found) < bytes) {
				memcpy(path, found, strlen(found) + 1);
				return true;
			}
		}
	}
	return false;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
	static const char suffix[] = ".mem";
	char path[4352];
	(void)context;
	uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
	if (info->si_code > 0 && find_file(address, path, sizeof(path)) && strstr(path, suffix)) {
		say("vmcp: memory layer ");
		say(path);
		say(": a page of it that the VM needs cannot be read, by an I/O error or as it was cut off: the VM ends\n"
		    "hint: start the VM from a checkpoint that does not share this layer: see `vmcp log`\n");
		_exit(1);
	}
	/* Another kind of trouble: what it would have been without us. */
	signal(number, SIG_DFL);
	raise(number);
}

int memory_guard_install(struct err *err)
{
	struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER};
	sigemptyset(&action.sa_mask);
	return sigaction(SIGBUS, &action, NULL) == 0 ? 0 : err_sys(err, errno, "sigaction");
}
