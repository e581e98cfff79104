#include "checkpoint/store/power_sim.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"

#define NO_NODE UINT32_MAX
#define SECTOR	512u

/* Something that was done to a file's content and is not synced. */
struct pending {
	uint64_t offset, length;
	uint8_t *data; /* NULL: cut, or made longer, to `offset` bytes */
};

struct node {
	dev_t device;
	ino_t inode;
	bool folder, dead; /* dead: without a name, and its number may come again */
	uint8_t *durable;
	uint64_t durable_bytes;
	struct pending *pending;
	size_t count;
	char *made; /* by the cut that is being made: where it is; NULL: nowhere yet */
};

/* Something that was done to one folder or two: a name taken away, a name given. */
struct change {
	uint32_t from, to; /* folders, NO_NODE: none */
	char from_name[NAME_MAX + 1], to_name[NAME_MAX + 1];
	uint32_t node; /* that has the new name */
	bool durable, taken;
};

struct entry {
	uint32_t folder, node;
	const char *name;
};

enum kind { NOTHING, EVERYTHING, IN_ORDER, IN_ORDER_2, WHOLE, TORN, TORN_2, KINDS };

static struct {
	pthread_mutex_t lock;
	bool active;
	uint64_t random;
	struct node *nodes;
	uint32_t node_count;
	struct change *changes;
	size_t change_count;
	uint64_t cut_in, fail_in;
	int error;
	bool cut, failed;
	char cut_folder[PATH_MAX];
} sim = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* splitmix64 */
uint64_t power_sim_pick(uint64_t limit)
{
	uint64_t z = (sim.random += 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return (z ^ (z >> 31)) % limit;
}

/* --- what is known --- */

static uint32_t find_node(const struct stat *st)
{
	for (uint32_t i = 0; i < sim.node_count; i++)
		if (!sim.nodes[i].dead && sim.nodes[i].inode == st->st_ino && sim.nodes[i].device == st->st_dev)
			return i;
	return NO_NODE;
}

static uint32_t add_node(const struct stat *st)
{
	uint32_t same = find_node(st);
	if (same != NO_NODE)
		sim.nodes[same].dead = true;
	struct node *grown = realloc(sim.nodes, (sim.node_count + 1) * sizeof(*grown));
	if (!grown)
		abort();
	sim.nodes = grown;
	sim.nodes[sim.node_count] =
		(struct node){.device = st->st_dev, .inode = st->st_ino, .folder = S_ISDIR(st->st_mode)};
	return sim.node_count++;
}

static uint32_t node_of(int fd)
{
	struct stat st;
	return fstat(fd, &st) == 0 ? find_node(&st) : NO_NODE;
}

/* The folder in which the path's last part is; NO_NODE: none of ours. */
static uint32_t folder_of(int dirfd, const char *path, const char **name)
{
	char parent[PATH_MAX];
	const char *slash = strrchr(path, '/');
	struct stat st;

	*name = slash ? slash + 1 : path;
	if (!slash && dirfd != AT_FDCWD)
		return node_of(dirfd);
	snprintf(parent, sizeof(parent), "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
	return fstatat(dirfd, slash == path ? "/" : parent, &st, 0) == 0 ? find_node(&st) : NO_NODE;
}

static struct change *add_change(void)
{
	struct change *grown = realloc(sim.changes, (sim.change_count + 1) * sizeof(*grown));
	if (!grown)
		abort();
	sim.changes = grown;
	struct change *c = &grown[sim.change_count++];
	*c = (struct change){.from = NO_NODE, .to = NO_NODE, .node = NO_NODE};
	return c;
}

static void note_name(uint32_t folder, const char *name, uint32_t node)
{
	struct change *c = add_change();
	c->to = folder;
	c->node = node;
	snprintf(c->to_name, sizeof(c->to_name), "%s", name);
}

static void note_no_name(uint32_t folder, const char *name)
{
	struct change *c = add_change();
	c->from = folder;
	snprintf(c->from_name, sizeof(c->from_name), "%s", name);
}

static void note_content(uint32_t node, uint64_t offset, const void *data, uint64_t length)
{
	struct node *n = &sim.nodes[node];
	struct pending *grown = realloc(n->pending, (n->count + 1) * sizeof(*grown));
	uint8_t *copy = data ? malloc(length + 1) : NULL;
	if (!grown || (data && !copy))
		abort();
	if (data)
		memcpy(copy, data, length);
	n->pending = grown;
	grown[n->count++] = (struct pending){offset, length, copy};
}

/* --- what is durable --- */

static void apply(uint8_t **content, uint64_t *bytes, const struct pending *p, uint64_t from, uint64_t length)
{
	uint64_t end = p->data ? max_u64(p->offset + from + length, *bytes) : p->offset;
	uint8_t *grown = realloc(*content, end + 1);
	if (!grown)
		abort();
	*content = grown;
	if (end > *bytes)
		memset(grown + *bytes, 0, end - *bytes);
	*bytes = end;
	if (p->data)
		memcpy(grown + p->offset + from, p->data + from, length);
}

static void settle_file(struct node *n)
{
	for (size_t i = 0; i < n->count; i++) {
		apply(&n->durable, &n->durable_bytes, &n->pending[i], 0, n->pending[i].length);
		free(n->pending[i].data);
	}
	n->count = 0;
}

/* All that was done to the folder up to there; and to another one what came before something that was done to both. */
static void settle_folder(uint32_t folder, size_t limit)
{
	for (size_t i = 0; i < limit; i++) {
		struct change *c = &sim.changes[i];
		if (c->durable || (c->from != folder && c->to != folder))
			continue;
		c->durable = true;
		uint32_t other = c->from == folder ? c->to : c->from;
		if (other != NO_NODE && other != folder)
			settle_folder(other, i);
	}
}

/* --- the cut --- */

static void take_changes(enum kind kind)
{
	size_t limit = kind == IN_ORDER || kind == IN_ORDER_2 ? power_sim_pick(sim.change_count + 1) : sim.change_count;
	bool each = kind >= WHOLE;
	bool *stopped = calloc(sim.node_count + 1, 1);
	if (!stopped)
		abort();
	for (size_t i = 0; i < sim.change_count; i++) {
		struct change *c = &sim.changes[i];
		bool stop = (c->from != NO_NODE && stopped[c->from]) || (c->to != NO_NODE && stopped[c->to]);
		c->taken = c->durable || (kind != NOTHING && i < limit && !(each && (stop || power_sim_pick(6) == 0)));
		if (c->taken)
			continue;
		if (c->from != NO_NODE)
			stopped[c->from] = true;
		if (c->to != NO_NODE)
			stopped[c->to] = true;
	}
	free(stopped);
}

static void take_name(struct entry *list, size_t *count, uint32_t folder, const char *name)
{
	for (size_t i = 0; i < *count; i++)
		if (list[i].folder == folder && strcmp(list[i].name, name) == 0)
			list[i--] = list[--*count];
}

static size_t list_entries(struct entry *list)
{
	size_t count = 0;
	for (size_t i = 0; i < sim.change_count; i++) {
		const struct change *c = &sim.changes[i];
		if (c->taken && c->from != NO_NODE)
			take_name(list, &count, c->from, c->from_name);
		if (!c->taken || c->to == NO_NODE)
			continue;
		take_name(list, &count, c->to, c->to_name);
		list[count++] = (struct entry){c->to, c->node, c->to_name};
	}
	return count;
}

static void take_write(uint8_t **content, uint64_t *bytes, const struct pending *p, enum kind kind)
{
	if (kind < TORN || !p->data) {
		if (kind < WHOLE || power_sim_pick(2))
			apply(content, bytes, p, 0, p->length);
		return;
	}
	for (uint64_t at = 0; at < p->length;) {
		uint64_t next = min_u64(round_up(p->offset + at + 1, SECTOR) - p->offset, p->length);
		if (power_sim_pick(2))
			apply(content, bytes, p, at, next - at);
		at = next;
	}
}

static void make_file(struct node *n, const char *path, enum kind kind)
{
	uint8_t *content = malloc(n->durable_bytes + 1);
	uint64_t bytes = n->durable_bytes;
	size_t limit = kind == NOTHING				? 0
		       : kind == IN_ORDER || kind == IN_ORDER_2 ? power_sim_pick(n->count + 1)
								: n->count;
	bool turned = kind >= WHOLE && power_sim_pick(2);
	if (!content)
		abort();
	if (bytes)
		memcpy(content, n->durable, bytes);
	for (size_t i = 0; i < limit; i++)
		take_write(&content, &bytes, &n->pending[turned ? power_sim_pick(n->count) : i], kind);
	int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd < 0 || syscall(SYS_pwrite64, fd, content, bytes, 0) != (long)bytes)
		abort();
	close(fd);
	free(content);
	n->made = xstrdup(path);
}

static bool is_shared_memory(const char *name)
{
	size_t length = strlen(name);
	return length > 4 && strcmp(name + length - 4, "-shm") == 0;
}

static void make_folder(uint32_t folder, const char *path, const struct entry *list, size_t count, enum kind kind)
{
	char below[PATH_MAX];
	if (syscall(SYS_mkdirat, AT_FDCWD, path, 0700) != 0)
		abort();
	sim.nodes[folder].made = xstrdup(path);
	for (size_t i = 0; i < count; i++) {
		struct node *n = &sim.nodes[list[i].node];
		/* SQLite's, mapped and never written: its first user makes it anew. */
		if (list[i].folder != folder || is_shared_memory(list[i].name))
			continue;
		if (snprintf(below, sizeof(below), "%s/%s", path, list[i].name) >= (int)sizeof(below))
			abort();
		if (n->folder && !n->made)
			make_folder(list[i].node, below, list, count, kind);
		else if (!n->folder && n->made)
			syscall(SYS_linkat, AT_FDCWD, n->made, AT_FDCWD, below, 0);
		else if (!n->folder)
			make_file(n, below, kind);
	}
}

static void cut(void)
{
	enum kind kind = (enum kind)power_sim_pick(KINDS);
	struct entry *list = calloc(sim.change_count + 1, sizeof(*list));
	if (!list)
		abort();
	take_changes(kind);
	make_folder(0, sim.cut_folder, list, list_entries(list), kind);
	free(list);
	for (uint32_t i = 0; i < sim.node_count; i++) {
		free(sim.nodes[i].made);
		sim.nodes[i].made = NULL;
	}
	sim.cut = true;
}

/* --- the calls --- */

/* Before a call that changes or syncs something: true: it fails. */
static bool enter(void)
{
	pthread_mutex_lock(&sim.lock);
	if (!sim.active || !sim.fail_in || --sim.fail_in)
		return false;
	sim.failed = true;
	return true;
}

static int leave_failed(void)
{
	int error = sim.error;
	pthread_mutex_unlock(&sim.lock);
	errno = error;
	return -1;
}

/* Behind it, with its result. */
static long leave(long result)
{
	int number = errno;
	if (sim.active && sim.cut_in && --sim.cut_in == 0)
		cut();
	pthread_mutex_unlock(&sim.lock);
	errno = number;
	return result;
}

static int open_watched(int dirfd, const char *path, int flags, mode_t mode)
{
	const char *name;
	struct stat st;
	if (!(flags & (O_CREAT | O_TRUNC)))
		return (int)syscall(SYS_openat, dirfd, path, flags, mode);
	if (enter())
		return leave_failed();
	uint32_t folder = sim.active ? folder_of(dirfd, path, &name) : NO_NODE;
	bool was_there = folder != NO_NODE && fstatat(dirfd, path, &st, 0) == 0;
	int fd = (int)syscall(SYS_openat, dirfd, path, flags, mode);
	if (fd < 0 || folder == NO_NODE || fstat(fd, &st) || !S_ISREG(st.st_mode))
		return (int)leave(fd);
	if (!was_there)
		note_name(folder, name, add_node(&st));
	else if (flags & O_TRUNC && find_node(&st) != NO_NODE)
		note_content(find_node(&st), 0, NULL, 0);
	return (int)leave(fd);
}

static mode_t mode_of(int flags, va_list list) { return flags & O_CREAT ? (mode_t)va_arg(list, unsigned) : 0; }

int open(const char *path, int flags, ...)
{
	va_list list;
	va_start(list, flags);
	mode_t mode = mode_of(flags, list);
	va_end(list);
	return open_watched(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
	va_list list;
	va_start(list, flags);
	mode_t mode = mode_of(flags, list);
	va_end(list);
	return open_watched(AT_FDCWD, path, flags, mode);
}

int openat(int dirfd, const char *path, int flags, ...)
{
	va_list list;
	va_start(list, flags);
	mode_t mode = mode_of(flags, list);
	va_end(list);
	return open_watched(dirfd, path, flags, mode);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
	if (enter())
		return leave_failed();
	ssize_t n = syscall(SYS_pwrite64, fd, data, length, offset);
	uint32_t node = n > 0 && sim.active ? node_of(fd) : NO_NODE;
	if (node != NO_NODE)
		note_content(node, (uint64_t)offset, data, (uint64_t)n);
	return leave(n);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return pwrite64(fd, data, length, offset); }

int ftruncate64(int fd, off64_t size)
{
	if (enter())
		return leave_failed();
	int rc = (int)syscall(SYS_ftruncate, fd, size);
	uint32_t node = rc == 0 && sim.active ? node_of(fd) : NO_NODE;
	if (node != NO_NODE)
		note_content(node, (uint64_t)size, NULL, 0);
	return (int)leave(rc);
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

/* What the host's own disk does meanwhile is not what is looked at. */
int fsync(int fd)
{
	if (enter())
		return leave_failed();
	if (!sim.active)
		return (int)leave(syscall(SYS_fsync, fd));
	uint32_t node = node_of(fd);
	if (node != NO_NODE && sim.nodes[node].folder)
		settle_folder(node, sim.change_count);
	else if (node != NO_NODE)
		settle_file(&sim.nodes[node]);
	return (int)leave(0);
}

int fdatasync(int fd) { return fsync(fd); }

int mkdirat(int dirfd, const char *path, mode_t mode)
{
	const char *name;
	struct stat st;
	if (enter())
		return leave_failed();
	int rc = (int)syscall(SYS_mkdirat, dirfd, path, mode);
	uint32_t folder = rc == 0 && sim.active ? folder_of(dirfd, path, &name) : NO_NODE;
	if (folder != NO_NODE && fstatat(dirfd, path, &st, AT_SYMLINK_NOFOLLOW) == 0)
		note_name(folder, name, add_node(&st));
	return (int)leave(rc);
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int dirfd, const char *path, int flags)
{
	const char *name;
	struct stat st;
	if (enter())
		return leave_failed();
	uint32_t folder = sim.active ? folder_of(dirfd, path, &name) : NO_NODE;
	bool known = folder != NO_NODE && fstatat(dirfd, path, &st, AT_SYMLINK_NOFOLLOW) == 0;
	int rc = (int)syscall(SYS_unlinkat, dirfd, path, flags);
	if (rc == 0 && known) {
		uint32_t node = find_node(&st);
		note_no_name(folder, name);
		if (node != NO_NODE && (S_ISDIR(st.st_mode) || st.st_nlink == 1))
			sim.nodes[node].dead = true;
	}
	return (int)leave(rc);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int renameat(int from_dir, const char *from, int to_dir, const char *to)
{
	const char *from_name, *to_name;
	struct stat st, old;
	if (enter())
		return leave_failed();
	uint32_t from_folder = sim.active ? folder_of(from_dir, from, &from_name) : NO_NODE;
	uint32_t to_folder = sim.active ? folder_of(to_dir, to, &to_name) : NO_NODE;
	bool replaced =
		to_folder != NO_NODE && fstatat(to_dir, to, &old, AT_SYMLINK_NOFOLLOW) == 0 && old.st_nlink == 1;
	int rc = (int)syscall(SYS_renameat, from_dir, from, to_dir, to);
	if (rc != 0 || from_folder == NO_NODE || to_folder == NO_NODE || fstatat(to_dir, to, &st, AT_SYMLINK_NOFOLLOW))
		return (int)leave(rc);
	if (replaced && find_node(&old) != NO_NODE)
		sim.nodes[find_node(&old)].dead = true;
	struct change *c = add_change();
	c->from = from_folder;
	c->to = to_folder;
	c->node = find_node(&st);
	snprintf(c->from_name, sizeof(c->from_name), "%s", from_name);
	snprintf(c->to_name, sizeof(c->to_name), "%s", to_name);
	return (int)leave(rc);
}

int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags)
{
	const char *name;
	struct stat st;
	if (enter())
		return leave_failed();
	int rc = (int)syscall(SYS_linkat, from_dir, from, to_dir, to, flags);
	uint32_t folder = rc == 0 && sim.active ? folder_of(to_dir, to, &name) : NO_NODE;
	if (folder == NO_NODE || fstatat(to_dir, to, &st, AT_SYMLINK_NOFOLLOW))
		return (int)leave(rc);
	uint32_t node = find_node(&st);
	if (node == NO_NODE) {
		int fd = (int)syscall(SYS_openat, to_dir, to, O_RDONLY | O_CLOEXEC, 0);
		node = add_node(&st);
		sim.nodes[node].durable = malloc((size_t)st.st_size + 1);
		sim.nodes[node].durable_bytes = (uint64_t)st.st_size;
		if (fd < 0 || file_pread_full(fd, sim.nodes[node].durable, (size_t)st.st_size, 0, NULL))
			abort();
		close(fd);
	}
	note_name(folder, name, node);
	return (int)leave(rc);
}

/* --- for the tests --- */

void power_sim_begin(const char *root, uint64_t seed)
{
	struct stat st;
	if (stat(root, &st))
		abort();
	sim.random = seed;
	add_node(&st);
	sim.cut_in = sim.fail_in = 0;
	sim.cut = sim.failed = false;
	sim.active = true;
}

void power_sim_end(void)
{
	sim.active = false;
	for (uint32_t i = 0; i < sim.node_count; i++) {
		for (size_t k = 0; k < sim.nodes[i].count; k++)
			free(sim.nodes[i].pending[k].data);
		free(sim.nodes[i].pending);
		free(sim.nodes[i].durable);
	}
	free(sim.nodes);
	free(sim.changes);
	sim.nodes = NULL;
	sim.changes = NULL;
	sim.node_count = 0;
	sim.change_count = 0;
}

void power_sim_arm(uint64_t calls, const char *folder)
{
	sim.cut = false;
	sim.cut_in = calls;
	snprintf(sim.cut_folder, sizeof(sim.cut_folder), "%s", folder);
}

bool power_sim_was_cut(void) { return sim.cut; }

void power_sim_fail(uint64_t calls, int error)
{
	sim.failed = false;
	sim.fail_in = calls;
	sim.error = error;
}

bool power_sim_has_failed(void) { return sim.failed; }
