/*
 * Another key of the user's for an encrypted store: its own key, which is encrypted with the user's in `format`, is encrypted anew, and `format` replaced. The commit
 * point is the rename. Nothing else changes, so that who has the store open needs to know nothing of it.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/store/crypt.h"
#include "checkpoint/store/store_internal.h"

#define WAIT_KEY_NS 10000000000ull /* a change takes some tenths of a second */

static int lock_key(struct store *store, struct err *err)
{
	return store_lock_byte_within(store, STORE_LOCK_KEY, F_WRLCK, WAIT_KEY_NS)
		       ? err_set(err, ERR_STATE, EBUSY, "%s: another process changes its key", store->path)
		       : 0;
}

/* Of changes that were killed: the store's key, encrypted with one of the user's that never came to be used. */
static void remove_leftovers(struct store *store)
{
	int copy = openat(store->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	while (stream && (entry = readdir(stream)))
		if (!strncmp(entry->d_name, FILE_TEMP_PREFIX, strlen(FILE_TEMP_PREFIX)))
			unlinkat(store->dir, entry->d_name, 0);
	if (stream)
		closedir(stream);
}

/* The key that it was opened with may be the store's no more. */
static int check_present(struct store *store, struct store_key *old, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	int rc = file_read_all(store->dir, STORE_FORMAT_FILE, 4096, &text, err);

	return rc ? rc : crypt_open_format(store, old, (const char *)text.data, err);
}

static int change(struct store *store, struct store_key *old, struct store_key *now, struct err *err)
{
	char text[CRYPT_FORMAT_BYTES] = "";
	int rc = check_present(store, old, err);

	if (!rc)
		rc = crypt_change_format(store, now, text, err);
	if (rc)
		return rc;
	remove_leftovers(store);
	rc = fault_check(FAULT_STORE_KEY_CHANGING, err);
	if (!rc)
		rc = file_write_atomic(store->dir, STORE_FORMAT_FILE, text, strlen(text), 0600, err);
	return rc ? rc : fault_check(FAULT_STORE_KEY_CHANGED, err);
}

int store_change_key(struct store *store, struct store_key *old, struct store_key *now, struct err *err)
{
	if (!store->encrypted)
		return crypt_not_encrypted(store, err);
	int rc = store_check_key(store, err);
	if (!rc)
		rc = lock_key(store, err);
	if (rc)
		return rc;
	rc = change(store, old, now, err);
	store_lock_byte(store, STORE_LOCK_KEY, F_UNLCK);
	return rc;
}
