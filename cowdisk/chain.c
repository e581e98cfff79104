/* Backing chains: names, opening downwards, loops. */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/buf.h"
#include "cowdisk/image_internal.h"

enum { MAX_CHAIN = 1024 };

/* "nbd://..." and "json:..." name no file; "file:x" does. As QEMU: a colon before the first slash makes a protocol. */
static const char *protocol_end(const char *name)
{
	size_t n = strcspn(name, ":/");
	return name[n] == ':' ? name + n + 1 : NULL;
}

int cow_resolve_name(const char *referrer, const char *name, char **out, struct err *err)
{
	const char *rest = protocol_end(name);
	if (rest && strncmp(name, "file:", 5) != 0) {
		err_set(err, ERR_FAILED, ENOTSUP, "%s: its backing file '%.200s' is not a local file", referrer, name);
		err_hint(err, "flatten it first: qemu-img convert -O qcow2 SRC DST");
		return -ENOTSUP;
	}
	if (rest)
		name = rest;
	const char *slash = strrchr(referrer, '/');
	if (name[0] == '/' || !slash)
		*out = xstrdup(name);
	else
		*out = xasprintf("%.*s%s", (int)(slash - referrer + 1), referrer, name);
	return 0;
}

static int check_loop(const struct image *top, const struct image *candidate, struct err *err)
{
	unsigned depth = 0;
	for (const struct image *i = top; i; i = i->backing, depth++)
		if (i->device == candidate->device && i->inode == candidate->inode)
			return err_set(err, ERR_DAMAGED, ELOOP, "%s: its backing chain leads back to %s", top->path,
				       i->path);
	if (depth >= MAX_CHAIN)
		return err_set(err, ERR_FAILED, ELOOP, "%s: more than %d images in its backing chain", top->path,
			       MAX_CHAIN);
	return 0;
}

static bool was_replaced(const struct image *image)
{
	struct stat st;
	return stat(image->path, &st) == 0 && (st.st_dev != image->device || st.st_ino != image->inode);
}

/* Opens the file that `image` names as its backing file. */
static int open_backing(struct image *top, struct image *image, bool lock, struct err *err)
{
	CLEANUP_FREE char *path = NULL;
	int rc = cow_resolve_name(image->path, image->backing_name, &path, err);
	if (rc < 0)
		return rc;
	struct image *next;
	/* No lock before it is known to be no loop: the lock would complain about ourselves. */
	rc = cow_image_open(image->io, path, image->backing_format, false, false, &next, err);
	/* A merge has put another file in the place of `image`, and what that one stood on could go. */
	if (rc == -ENOENT && was_replaced(image))
		return -ESTALE;
	if (rc < 0)
		return err_prefix(err, "backing file of %s", image->path);
	rc = check_loop(top, next, err);
	if (rc == 0 && lock)
		rc = cow_lock_take(next->fd, false, next->path, err);
	if (rc < 0) {
		cow_image_free(next);
		return rc;
	}
	image->backing = next;
	return 0;
}

int cow_chain_open(struct image *top, bool lock, struct err *err)
{
	uint64_t depth = 0;
	for (struct image *i = top; i->backing_name; i = i->backing, depth++) {
		int rc = open_backing(top, i, lock, err);
		if (rc < 0) {
			cow_chain_free(top->backing);
			top->backing = NULL;
			return rc;
		}
	}
	for (struct image *i = top; i; i = i->backing) {
		i->generation = depth--;
		i->fixed = i != top || i->sealed;
	}
	return 0;
}

void cow_chain_free(struct image *top)
{
	while (top) {
		struct image *next = top->backing;
		cow_image_free(top);
		top = next;
	}
}
