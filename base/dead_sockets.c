#include "base/dead_sockets.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/buf.h"

/* One that is open would take the call, or is of another type. */
static void remove_if_dead(int dir, const char *name, int probe)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	/* By descriptor, as a path has room for 107 bytes only. */
	int n = snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d/%s", dir, name);

	if (n > 0 && n < (int)sizeof(address.sun_path) && connect(probe, (const struct sockaddr *)&address, sizeof(address)) && errno == ECONNREFUSED)
		unlinkat(dir, name, 0);
}

/* The folder's own descriptor stays open. NULL: it cannot be read. */
static DIR *open_stream(int dir)
{
	int copy = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;

	if (!stream && copy >= 0)
		close(copy);
	return stream;
}

void dead_sockets_remove(int dir)
{
	CLEANUP_CLOSE int probe = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	DIR *stream = open_stream(dir);
	struct dirent *entry;

	while (probe >= 0 && stream && (entry = readdir(stream)))
		if (entry->d_name[0] != '.' && (entry->d_type == DT_SOCK || entry->d_type == DT_UNKNOWN))
			remove_if_dead(dir, entry->d_name, probe);
	if (stream)
		closedir(stream);
}

void dead_sockets_remove_below(int parent, bool (*skip)(void *opaque, const char *name), void *opaque, bool empty_too)
{
	DIR *stream = open_stream(parent);
	struct dirent *entry;

	while (stream && (entry = readdir(stream))) {
		if (entry->d_name[0] == '.' || (skip && skip(opaque, entry->d_name)))
			continue;
		CLEANUP_CLOSE int dir = openat(parent, entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
		if (dir < 0)
			continue;
		dead_sockets_remove(dir);
		if (empty_too)
			unlinkat(parent, entry->d_name, AT_REMOVEDIR);
	}
	if (stream)
		closedir(stream);
}
