/* Records of VMs: rows of the catalogue, and a folder vms/<name>/ whose lock tells whether the VM's process lives. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/file.h"
#include "base/nearest.h"
#include "checkpoint/store/resources.h"
#include "checkpoint/store/store_internal.h"

#define VM_COLUMNS "name, uuid, at, pid, state, memory_bytes, cpus, started_wall_ns, config_path, config_text"

#define RESERVED_FILE "reserved"

struct store_vm_lock {
	int fd;
};

void store_vm_free(struct store_vm *vm)
{
	free(vm->config_text);
	*vm = (struct store_vm){0};
}

char *store_vm_disk_path(const char *store, const char *vm, const char *disk) { return xasprintf("%s/vms/%s/%s.qcow2", store, vm, disk); }

int store_vm_dir(struct store *store, const char *name, struct err *err)
{
	int rc = store_check_name("VM", name, err);

	return rc ? rc : file_open_dir(store->vms_dir, name, 0, err);
}

static int open_lock(struct store *store, const char *name, const char *file, struct err *err)
{
	int rc = store_check_name("VM", name, err);

	if (rc)
		return rc;
	CLEANUP_CLOSE int dir = file_open_dir(store->vms_dir, name, 1, err);
	if (dir < 0)
		return dir;
	int fd = openat(dir, file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	return fd < 0 ? err_sys(err, errno, "%s/vms/%s/%s", store->path, name, file) : fd;
}

int store_vm_reserve(struct store *store, const char *name, struct store_vm_lock **out, struct err *err)
{
	int fd = open_lock(store, name, RESERVED_FILE, err);

	if (fd < 0)
		return fd;
	if (store_try_lock(fd) || store_vm_is_alive(store, name)) {
		close(fd);
		err_set(err, ERR_STATE, EBUSY, "VM %s: runs already, or is being started", name);
		return err_hint(err, "choose another name");
	}
	*out = xcalloc(1, sizeof(**out));
	(*out)->fd = fd;
	return 0;
}

int store_vm_lock(struct store *store, const char *name, struct store_vm_lock **out, struct err *err)
{
	char text[32] = "";
	int rc, fd = open_lock(store, name, "lock", err);

	if (fd < 0)
		return fd;
	if (store_try_lock(fd)) {
		ssize_t n = pread(fd, text, sizeof(text) - 1, 0);

		close(fd);
		text[n > 0 ? strcspn(text, "\n") : 0] = '\0';
		/* Empty in the moment between another process's lock and its entry. */
		err_set(err, ERR_STATE, EBUSY, "VM %s: runs already%s%s", name, *text ? ", in process " : "", text);
		err_hint(err, "`vmcp console %s` attaches to it; --name starts another one", name);
		return -EBUSY;
	}
	int length = snprintf(text, sizeof(text), "%d\n", (int)getpid());
	if (ftruncate(fd, 0) || pwrite(fd, text, (size_t)length, 0) != length) {
		rc = err_sys(err, errno, "%s/vms/%s/lock", store->path, name);
		close(fd);
		return rc;
	}
	*out = xcalloc(1, sizeof(**out));
	(*out)->fd = fd;
	return 0;
}

void store_vm_unlock(struct store_vm_lock *lock)
{
	if (!lock)
		return;
	close(lock->fd);
	free(lock);
}

static bool is_locked(struct store *store, const char *name, const char *file)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	char path[STORE_NAME_BYTES + 16];

	snprintf(path, sizeof(path), "%s/%s", name, file);
	CLEANUP_CLOSE int fd = openat(store->vms_dir, path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
	return fd >= 0 && fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

/* A statement about a value and a VM's name, in this order. */
static int change_row(struct store *store, const char *sql, const char *name, const char *value, struct err *err)
{
	sqlite3_stmt *s;

	pthread_mutex_lock(&store->lock);
	int rc = catalog_prepare_locked(store, sql, &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 1, value, -1, SQLITE_STATIC);
		sqlite3_bind_text(s, 2, name, -1, SQLITE_STATIC);
		rc = catalog_step_locked(store, s, err);
		sqlite3_finalize(s);
	}
	pthread_mutex_unlock(&store->lock);
	return rc;
}

int store_vm_forget(struct store *store, const char *name, const char *uuid, struct err *err)
{
	struct store_vm_lock *lock;
	struct store_vm vm;
	int rc = store_vm_lock(store, name, &lock, err);

	if (rc)
		return rc;
	rc = change_row(store, "DELETE FROM vms WHERE uuid = ? AND name = ?", name, uuid, err);
	if (!rc && store_vm_get(store, name, &vm, NULL) == 0) {
		store_vm_free(&vm);
		rc = err_set(err, ERR_STATE, EEXIST, "VM %s: is another one", name);
	}
	if (!rc)
		rc = store_resources_free(store, name, err);
	if (!rc)
		rc = file_remove_tree(store->vms_dir, name, err);
	store_vm_unlock(lock);
	return rc;
}

bool store_vm_is_alive(struct store *store, const char *name) { return is_locked(store, name, "lock"); }

bool store_vm_is_held(struct store *store, const char *name) { return store_vm_is_alive(store, name) || is_locked(store, name, RESERVED_FILE); }

int store_vm_put(struct store *store, const struct store_vm *vm, struct err *err)
{
	sqlite3_stmt *s;

	pthread_mutex_lock(&store->lock);
	int rc = catalog_prepare_locked(store, "INSERT OR REPLACE INTO vms(" VM_COLUMNS ") VALUES(?,?,?,?,?,?,?,?,?,?)", &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 1, vm->name, -1, SQLITE_STATIC);
		sqlite3_bind_text(s, 2, vm->uuid, -1, SQLITE_STATIC);
		sqlite3_bind_text(s, 3, vm->at, -1, SQLITE_STATIC);
		sqlite3_bind_int(s, 4, vm->pid);
		sqlite3_bind_text(s, 5, vm->state, -1, SQLITE_STATIC);
		sqlite3_bind_int64(s, 6, (sqlite3_int64)vm->memory_bytes);
		sqlite3_bind_int64(s, 7, vm->cpus);
		sqlite3_bind_int64(s, 8, (sqlite3_int64)vm->started_wall_ns);
		sqlite3_bind_text(s, 9, vm->config_path, -1, SQLITE_STATIC);
		sqlite3_bind_text(s, 10, vm->config_text ? vm->config_text : "", -1, SQLITE_STATIC);
		rc = catalog_step_locked(store, s, err);
		sqlite3_finalize(s);
	}
	pthread_mutex_unlock(&store->lock);
	return rc;
}

int store_vm_set_state(struct store *store, const char *name, const char *state, struct err *err)
{
	return change_row(store, "UPDATE vms SET state = ? WHERE name = ?", name, state, err);
}

int store_vm_set_note(struct store *store, const char *name, const char *note, struct err *err)
{
	return change_row(store, "UPDATE vms SET note = ? WHERE name = ?", name, note, err);
}

static void read_row(struct store *store, sqlite3_stmt *s, struct store_vm *vm)
{
	*vm = (struct store_vm){0};
	catalog_text(s, 0, vm->name, sizeof(vm->name));
	catalog_text(s, 1, vm->uuid, sizeof(vm->uuid));
	catalog_text(s, 2, vm->at, sizeof(vm->at));
	vm->pid = sqlite3_column_int(s, 3);
	catalog_text(s, 4, vm->state, sizeof(vm->state));
	vm->memory_bytes = (uint64_t)sqlite3_column_int64(s, 5);
	vm->cpus = (uint32_t)sqlite3_column_int64(s, 6);
	vm->started_wall_ns = (uint64_t)sqlite3_column_int64(s, 7);
	catalog_text(s, 8, vm->config_path, sizeof(vm->config_path));
	const unsigned char *text = sqlite3_column_text(s, 9);
	vm->config_text = xstrdup(text ? (const char *)text : "");
	catalog_text(s, 10, vm->note, sizeof(vm->note));
	vm->alive = store_vm_is_alive(store, vm->name);
	/* One that dies asleep loses nothing: it is in its checkpoint. */
	if (!vm->alive && strcmp(vm->state, "stopped"))
		snprintf(vm->state, sizeof(vm->state), strcmp(vm->state, "suspended") ? "crashed" : "stopped");
}

static int list_locked(struct store *store, struct store_vm **list, size_t *count, struct err *err)
{
	size_t capacity = 0;
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, "SELECT " VM_COLUMNS ", note FROM vms ORDER BY name", &s, err);

	if (rc)
		return rc;
	while ((rc = catalog_step_locked(store, s, err)) == 1) {
		if (*count == capacity) {
			capacity = capacity ? capacity * 2 : 16;
			struct store_vm *grown = realloc(*list, capacity * sizeof(**list));

			if (!grown) {
				rc = err_sys(err, ENOMEM, "list of VMs");
				break;
			}
			*list = grown;
		}
		read_row(store, s, &(*list)[(*count)++]);
	}
	sqlite3_finalize(s);
	return rc;
}

int store_vm_list(struct store *store, struct store_vm **list, size_t *count, struct err *err)
{
	*list = NULL;
	*count = 0;
	pthread_mutex_lock(&store->lock);
	int rc = list_locked(store, list, count, err);
	pthread_mutex_unlock(&store->lock);
	if (rc) {
		for (size_t i = 0; i < *count; i++)
			store_vm_free(&(*list)[i]);
		free(*list);
		*list = NULL;
		*count = 0;
	}
	return rc;
}

static int unknown_vm(struct store *store, const char *name, struct err *err)
{
	struct nearest nearest = nearest_to(name);
	struct store_vm *list = NULL;
	char known[160] = "";
	size_t count = 0, used = 0;

	list_locked(store, &list, &count, NULL);
	for (size_t i = 0; i < count; i++) {
		nearest_try(&nearest, list[i].name);
		if (used < sizeof(known))
			used += (size_t)snprintf(known + used, sizeof(known) - used, "%s%s", i ? ", " : "",
						 list[i].name);
		store_vm_free(&list[i]);
	}
	free(list);
	err_set(err, ERR_NOT_FOUND, ENOENT, "VM %s: there is none of that name", name);
	if (nearest.name[0])
		err_hint(err, "did you mean '%s'?", nearest.name);
	else if (count)
		err_hint(err, "known: %s", known);
	else
		err_hint(err, "start one with `vmcp run guest.cfg`");
	return -ENOENT;
}

int store_vm_get(struct store *store, const char *name, struct store_vm *out, struct err *err)
{
	sqlite3_stmt *s;

	pthread_mutex_lock(&store->lock);
	int rc = catalog_prepare_locked(store, "SELECT " VM_COLUMNS ", note FROM vms WHERE name = ?", &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 1, name, -1, SQLITE_STATIC);
		rc = catalog_step_locked(store, s, err);
		if (rc == 1)
			read_row(store, s, out);
		sqlite3_finalize(s);
		rc = rc == 1 ? 0 : rc < 0 ? rc : unknown_vm(store, name, err);
	}
	pthread_mutex_unlock(&store->lock);
	return rc;
}
