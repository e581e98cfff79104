#include "base/dead_sockets.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* Bound in the folder that is the current one. */
static int open_socket(const char *name, int type, bool listening)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
	snprintf(address.sun_path, sizeof(address.sun_path), "%s", name);
	cr_assert_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
	cr_assert(!listening || listen(fd, 1) == 0);
	return fd;
}
static bool is_there(const char *name) { return access(name, F_OK) == 0; }

Test(dead_sockets, only_what_nobody_has_open)
{
	char folder[] = "/tmp/vmcp-dead-sockets-XXXXXX";
	cr_assert_not_null(mkdtemp(folder));
	cr_assert_eq(chdir(folder), 0);
	open_socket("listens", SOCK_STREAM, true);
	open_socket("does not listen yet", SOCK_STREAM, false);
	open_socket("datagrams", SOCK_DGRAM, false);
	open_socket("packets", SOCK_SEQPACKET, true);
	close(open_socket("dead stream", SOCK_STREAM, true));
	close(open_socket("dead datagrams", SOCK_DGRAM, false));
	close(open_socket(".hidden", SOCK_STREAM, true));
	close(open("file", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
	cr_assert_eq(mkfifo("fifo", 0600), 0);
	int dir = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	for (int i = 0; i < 2; i++) {
		dead_sockets_remove(dir);
		cr_expect(is_there("listens") && is_there("does not listen yet") && is_there("datagrams") && is_there("packets"));
		cr_expect(is_there("file") && is_there("fifo") && is_there(".hidden"));
		cr_expect(!is_there("dead stream") && !is_there("dead datagrams"));
	}
	cr_expect(fcntl(dir, F_GETFD) >= 0, "it stays open");
	char command[64];
	snprintf(command, sizeof(command), "rm -r %s", folder);
	cr_expect_eq(system(command), 0);
}
