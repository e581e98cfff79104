#include "control/local_socket.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG 16

static int open_socket(int dir, const char *name, bool listening, struct err *err)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int n = snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d/%s", dir, name), number = ENAMETOOLONG;

	if (fd < 0)
		return err_sys(err, errno, "%s", name);
	if (n > 0 && n < (int)sizeof(address.sun_path)) {
		int rc = listening ? bind(fd, (struct sockaddr *)&address, sizeof(address)) : connect(fd, (struct sockaddr *)&address, sizeof(address));

		if (rc == 0 && (!listening || listen(fd, BACKLOG) == 0))
			return fd;
		number = errno;
	}
	close(fd);
	return err_sys(err, number, "%s", name);
}

int local_socket_listen(int dir, const char *name, struct err *err)
{
	unlinkat(dir, name, 0);
	return open_socket(dir, name, true, err);
}

int local_socket_connect(int dir, const char *name, struct err *err) { return open_socket(dir, name, false, err); }
