#include "cowdisk/legacy_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "cowdisk/image_internal.h"

/* Version 1: magic, version, backing file's offset and length, time, size, bits, encryption. Version 2 has other fields from 20 on: encryption at 32. */
#define V1_HEADER_BYTES 48u
#define V1_ENCRYPTION	36u
#define V2_ENCRYPTION	32u
#define SIZE_AT		24u
#define ENCRYPTION_AES	1u

#define CHUNK_BYTES    65536u
#define PROGRESS_BYTES (8u << 20)
#define SILENCE_MS     60000 /* a reader that says nothing for so long has lost its way */
#define LOOK_MS	       200

int legacy_recognise(const char *path, struct legacy *out, struct err *err)
{
	uint8_t header[V1_HEADER_BYTES];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return err_sys(err, errno, "%s", path);
	ssize_t n = pread(fd, header, sizeof(header), 0);
	close(fd);
	*out = (struct legacy){0};
	if (n < (ssize_t)sizeof(header) || get_be32(header) != QCOW2_MAGIC)
		return 0;
	out->version = get_be32(header + 4);
	out->size_bytes = get_be64(header + SIZE_AT);
	out->encrypted = get_be32(header + (out->version == 1 ? V1_ENCRYPTION : V2_ENCRYPTION)) == ENCRYPTION_AES;
	return out->version == 1 || (out->version <= 3 && out->encrypted);
}

#ifdef VMCP_HAVE_LIBQCOW
#include "cowdisk/qcow_library.h"

static struct qcow_library lib;

static int write_full(int fd, const uint8_t *data, size_t bytes, struct err *err)
{
	for (size_t done = 0; done < bytes;) {
		ssize_t n = write(fd, data + done, bytes - done);
		if (n < 0 && errno != EINTR)
			return err_sys(err, errno, "pipe");
		done += n > 0 ? (size_t)n : 0;
	}
	return 0;
}

/* In the child, which ends afterwards: nothing is freed. */
static int read_all(const struct cow_export *e, const struct legacy *image, int out, struct err *err)
{
	libqcow_error_t *error = NULL;
	libqcow_file_t *file = NULL;
	size_t name_bytes = 0;
	size64_t size = 0;
	static uint8_t data[CHUNK_BYTES];
	if (lib.libqcow_file_initialize(&file, &error) != 1)
		return qcow_library_failed(&lib, e->source, &error, err);
	if (image->encrypted && lib.libqcow_file_set_utf8_password(file, (const uint8_t *)e->password, strlen(e->password), &error) != 1)
		return qcow_library_failed(&lib, e->source, &error, err);
	if (lib.libqcow_file_open(file, e->source, LIBQCOW_OPEN_READ, &error) != 1 || lib.libqcow_file_get_media_size(file, &size, &error) != 1)
		return qcow_library_failed(&lib, e->source, &error, err);
	if (lib.libqcow_file_get_utf8_backing_filename_size(file, &name_bytes, &error) == 1 && name_bytes > 1) {
		err_set(err, ERR_FAILED, ENOTSUP, "%s: it has a backing file, which is not read for images of this kind", e->source);
		return err_hint(err, "make it whole first: qemu-img rebase -b ''");
	}
	if (size != image->size_bytes)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: libqcow takes its size for %llu", e->source, (unsigned long long)size);
	for (uint64_t at = 0; at < size; at += CHUNK_BYTES) {
		size_t bytes = (size_t)min_u64(size - at, CHUNK_BYTES);
		if (lib.libqcow_file_read_buffer_at_offset(file, data, bytes, (off64_t)at, &error) != (ssize_t)bytes)
			return qcow_library_failed(&lib, e->source, &error, err);
		int rc = write_full(out, data, bytes, err);
		if (rc < 0)
			return rc;
	}
	return 0;
}

struct reader {
	pid_t pid;
	int pipe;
	struct err *said; /* shared with the child: why it ended */
};

static int start_reader(struct reader *r, const struct cow_export *e, const struct legacy *image, struct err *err)
{
	int pipes[2];
	r->said = mmap(NULL, sizeof(*r->said), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (r->said == MAP_FAILED)
		return err_sys(err, errno, "mmap");
	if (pipe2(pipes, O_CLOEXEC) != 0) {
		munmap(r->said, sizeof(*r->said));
		return err_sys(err, errno, "pipe");
	}
	pid_t parent = getpid();
	r->pid = fork();
	if (r->pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		struct err failed = ERR_INIT;
		int rc = getppid() == parent ? read_all(e, image, pipes[1], &failed) : -1;
		*r->said = failed;
		_exit(rc == 0 ? 0 : 1);
	}
	int number = errno;
	close(pipes[1]);
	r->pipe = pipes[0];
	if (r->pid > 0)
		return 0;
	close(pipes[0]);
	munmap(r->said, sizeof(*r->said));
	return err_sys(err, number, "fork");
}

/* Its end, as an error if it was not a good one. */
static int end_reader(struct reader *r, const char *path, int rc, struct err *err)
{
	int status = 0;
	if (rc < 0)
		kill(r->pid, SIGKILL);
	close(r->pipe);
	while (waitpid(r->pid, &status, 0) < 0 && errno == EINTR)
		;
	if (rc == 0 && WIFSIGNALED(status))
		rc = err_set(err, ERR_DAMAGED, EIO, "%s: libqcow died of it (signal %d)", path, WTERMSIG(status));
	else if (rc == 0 && status != 0) {
		if (err)
			*err = *r->said;
		rc = -r->said->number;
	}
	munmap(r->said, sizeof(*r->said));
	return rc;
}

/* Reads a chunk, or less where the reader ended: *bytes. */
static int next_chunk(struct reader *r, const struct cow_export *e, uint8_t *data, size_t want, size_t *bytes, struct err *err)
{
	*bytes = 0;
	for (uint32_t silent_ms = 0; *bytes < want;) {
		struct pollfd p = {.fd = r->pipe, .events = POLLIN};
		int n = poll(&p, 1, LOOK_MS);
		if (e->cancel && *e->cancel)
			return err_set(err, ERR_FAILED, ECANCELED, "%s: cancelled", e->path);
		if (n == 0 && (silent_ms += LOOK_MS) >= SILENCE_MS)
			return err_set(err, ERR_DAMAGED, ETIMEDOUT, "%s: libqcow lost its way in it", e->source);
		if (n <= 0)
			continue;
		silent_ms = 0;
		ssize_t got = read(r->pipe, data + *bytes, want - *bytes);
		if (got < 0 && errno != EINTR)
			return err_sys(err, errno, "%s: pipe", e->source);
		if (got == 0)
			break;
		*bytes += got > 0 ? (size_t)got : 0;
	}
	return 0;
}

static int copy(struct reader *r, const struct cow_export *e, const struct legacy *image, struct cow_disk *to, struct err *err)
{
	static uint8_t data[CHUNK_BYTES];
	int rc = 0;
	for (uint64_t at = 0, told = 0; rc == 0 && at < image->size_bytes;) {
		size_t want = (size_t)min_u64(image->size_bytes - at, CHUNK_BYTES), bytes;
		rc = next_chunk(r, e, data, want, &bytes, err);
		if (rc == 0 && bytes < want)
			break; /* its end says why */
		if (rc == 0 && !bytes_are_zero(data, bytes))
			rc = cow_write_sync(to, at, data, bytes, err);
		at += bytes;
		if (e->progress && at - told >= PROGRESS_BYTES) {
			e->progress(e->opaque, at, image->size_bytes);
			told = at;
		}
	}
	return rc;
}

static int export_to(const struct cow_export *e, const struct legacy *image, struct cow_io *io, struct reader *r, struct err *err)
{
	struct cow_create create = {.size_bytes = image->size_bytes, .cluster_bytes = e->cluster_bytes};
	struct cow_disk *to;
	int rc = e->format == COW_FORMAT_QCOW2 ? cow_create(e->path, &create, err) : cow_create_raw(e->path, image->size_bytes, err);
	if (rc < 0)
		return end_reader(r, e->source, rc, err);
	rc = cow_open_as(io, e->path, (int)e->format, 0, &to, err);
	bool open = rc == 0;
	if (open)
		rc = copy(r, e, image, to, err);
	rc = end_reader(r, e->source, rc, err);
	if (open) {
		int closed = cow_close(to, rc < 0 ? NULL : err);
		rc = rc < 0 ? rc : closed;
	}
	if (rc < 0)
		unlink(e->path);
	return rc;
}

int legacy_export(const struct cow_export *e, const struct legacy *image, struct err *err)
{
	struct reader reader = {0};
	struct cow_io *io;
	if (image->encrypted && image->version == 3) {
		err_set(err, ERR_FAILED, ENOTSUP, "%s: an encrypted image of version 3: libqcow takes its zero clusters for data", e->source);
		return err_hint(err, "convert it with: qemu-img convert");
	}
	if (image->encrypted && !e->password) {
		err_set(err, ERR_FAILED, EACCES, "%s: it is encrypted", e->source);
		return err_hint(err, "give its password: --key-file FILE");
	}
	int rc = qcow_library_load(&lib, e->source, err);
	if (rc < 0)
		return rc;
	/* The reader first, as it forks: this process has no other thread yet. */
	rc = start_reader(&reader, e, image, err);
	if (rc < 0)
		return rc;
	rc = cow_io_create(NULL, &io, err);
	if (rc < 0)
		return end_reader(&reader, e->source, rc, err);
	rc = export_to(e, image, io, &reader, err);
	cow_io_destroy(io);
	return rc;
}

#else

int legacy_export(const struct cow_export *e, const struct legacy *image, struct err *err)
{
	err_set(err, ERR_FAILED, ENOTSUP, "%s: %s image of version %u, and this vmcp was built without libqcow", e->source,
		image->encrypted ? "an encrypted" : "an", image->version);
	return err_hint(err, "convert it with qemu-img convert, or build vmcp with Debian's libqcow-dev installed");
}

#endif
