/* The other side of mux.c: starting multiplexers, and asking them. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/file.h"
#include "control/identity.h"
#include "control/local_socket.h"
#include "control/mux_internal.h"

#define ANSWER_BYTES (4u << 20)

int mux_socket(int dir, const char *place, bool listening)
{
	CLEANUP_FREE char *name = xasprintf("%s.sock", place);

	return listening ? local_socket_listen(dir, name, NULL) : local_socket_connect(dir, name, NULL);
}

/* --- starting --- */

/* This program once more, in a session of its own: it must not end with the VM that happened to need it first. *report: where it says how it went. */
static int spawn(const char *store_path, const char *place, const char *log, int *report, struct err *err)
{
	char *const argv[] = {(char *)"vmcp", (char *)"__mux", (char *)"--store", (char *)store_path, (char *)place, NULL};
	posix_spawn_file_actions_t files;
	posix_spawnattr_t how;
	sigset_t none;
	int ends[2];
	pid_t pid;

	if (pipe2(ends, O_CLOEXEC))
		return err_sys(err, errno, "pipe");
	sigemptyset(&none);
	posix_spawn_file_actions_init(&files);
	posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_adddup2(&files, ends[1], STDOUT_FILENO);
	posix_spawn_file_actions_addopen(&files, STDERR_FILENO, log, O_WRONLY | O_CREAT | O_APPEND, 0600);
	posix_spawn_file_actions_addclosefrom_np(&files, STDERR_FILENO + 1);
	posix_spawnattr_init(&how);
	posix_spawnattr_setsigmask(&how, &none);
	posix_spawnattr_setflags(&how, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK);
	int rc = posix_spawn(&pid, "/proc/self/exe", &files, &how, argv, environ);
	posix_spawn_file_actions_destroy(&files);
	posix_spawnattr_destroy(&how);
	close(ends[1]);
	if (rc) {
		close(ends[0]);
		return err_sys(err, rc, "multiplexer");
	}
	*report = ends[0];
	/* It begins a process of its own (cmd_mux.c), and ends: nobody is left to be waited for. */
	waitpid(pid, NULL, 0);
	return 0;
}

/* What mux_serve reports. */
static int read_report(int fd, const char *place, struct err *err)
{
	char text[sizeof(err->message) + 32] = "";
	size_t used = 0;
	ssize_t n;
	unsigned class, number;
	int at = 0;

	while (used < sizeof(text) - 1 && ((n = read(fd, text + used, sizeof(text) - 1 - used)) > 0 || (n < 0 && errno == EINTR)))
		used += n > 0 ? (size_t)n : 0;
	if (!strcmp(text, "ok"))
		return 0;
	if (sscanf(text, "%u %u %n", &class, &number, &at) != 2 || !at || class < ERR_FAILED || class > ERR_HOST || !number || number > 4095)
		return err_set(err, ERR_FAILED, EPIPE, "the multiplexer of %s ended before it served", place);
	err_set(err, (enum err_class)class, (int)number, "multiplexer: %s", text + at);
	if (number == EADDRINUSE)
		err_hint(err, "somebody else listens there; or VMs share that port in another way: `vmcp mux` shows how");
	return -(int)number;
}

static int ensure(const char *store_path, const char *place, struct err *err)
{
	CLEANUP_FREE char *folder = xasprintf("%s/" MUX_FOLDER, store_path), *log = xasprintf("%s/log", folder);
	CLEANUP_CLOSE int dir = file_open_dir(AT_FDCWD, folder, 1, err);
	int report;

	if (dir < 0)
		return dir;
	/* One that is about to end does not answer, or sees this VM in the table once more (may_end in mux.c). */
	CLEANUP_CLOSE int there = mux_socket(dir, place, false);
	if (there >= 0)
		return 0;
	int rc = spawn(store_path, place, log, &report, err);
	if (rc)
		return rc;
	rc = read_report(report, place, err);
	close(report);
	return rc;
}

int mux_ensure(const char *store_path, const struct machine_config *config, struct err *err)
{
	int rc = 0;

	for (unsigned i = 0; !rc && i < config->net_count; i++)
		for (unsigned k = 0; !rc && config->nets[i].mode == NET_USER && k < config->nets[i].shared_count; k++) {
			char place[IDENTITY_SHARED_BYTES];

			identity_shared(&config->nets[i].shared[k], place);
			rc = ensure(store_path, place, err);
		}
	return rc;
}

/* --- asking --- */

/* NULL: it has ended, or is about to. */
static json_t *ask(int dir, const char *place)
{
	const struct timeval patience = {.tv_sec = 5};
	CLEANUP_BUF struct buf text = BUF_INIT;
	CLEANUP_CLOSE int fd = mux_socket(dir, place, false);
	char part[4096];
	ssize_t n;

	if (fd < 0)
		return NULL;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	while ((n = read(fd, part, sizeof(part))) > 0 && text.length < ANSWER_BYTES)
		buf_append(&text, part, (size_t)n, NULL);
	return text.data ? json_loadb((char *)text.data, text.length, 0, NULL) : NULL;
}

/* The next place of which there is a socket; false: there is none. */
static bool next_place(DIR *dir, char place[256])
{
	const struct dirent *entry;
	struct sockaddr_in address;
	enum config_sharing sharing;

	while ((entry = readdir(dir)) != NULL) {
		size_t length = strlen(entry->d_name);

		if (length < 6 || strcmp(entry->d_name + length - 5, ".sock"))
			continue;
		snprintf(place, 256, "%.*s", (int)(length - 5), entry->d_name);
		if (mux_parse_place(place, &address, &sharing))
			return true;
	}
	return false;
}

int mux_list(struct store *store, json_t **out, struct err *err)
{
	CLEANUP_FREE char *folder = xasprintf("%s/" MUX_FOLDER, store_path(store));
	DIR *dir = opendir(folder);
	char place[256];

	*out = json_array();
	if (!dir && errno == ENOENT)
		return 0;
	if (!dir) {
		int number = errno;

		json_decref(*out);
		return err_sys(err, number, "%s", folder);
	}
	while (next_place(dir, place)) {
		json_t *one = ask(dirfd(dir), place);

		if (one)
			json_array_append_new(*out, one);
	}
	closedir(dir);
	return 0;
}

void mux_remove_dead(struct store *store)
{
	CLEANUP_FREE char *folder = xasprintf("%s/" MUX_FOLDER, store_path(store));
	DIR *dir = opendir(folder);
	char place[256];

	while (dir && next_place(dir, place)) {
		CLEANUP_FREE char *lock = xasprintf("%s.lock", place), *told = xasprintf("%s.sock", place);
		CLEANUP_CLOSE int fd = openat(dirfd(dir), lock, O_RDWR | O_CLOEXEC | O_NOFOLLOW);

		if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0)
			unlinkat(dirfd(dir), told, 0);
	}
	if (dir)
		closedir(dir);
}
