/* Whole reads and writes on pipes and files that a cancel ends, and that keep to a rate. */
#include <errno.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "checkpoint/store/transfer_internal.h"

#define POLL_MS 100

bool transfer_is_cancelled(const volatile bool *cancel, struct err *err)
{
	if (!cancel || !__atomic_load_n(cancel, __ATOMIC_RELAXED))
		return false;
	err_set(err, ERR_FAILED, ECANCELED, "cancelled");
	return true;
}

/* Until something can be done; what cannot be polled (a file) always is. */
static int wait_ready(const struct transfer_io *io, short events, struct err *err)
{
	struct pollfd p = {.fd = io->fd, .events = events};

	for (;;) {
		if (transfer_is_cancelled(io->cancel, err))
			return -ECANCELED;
		int n = poll(&p, 1, POLL_MS);
		if (n > 0)
			return 0;
		if (n < 0 && errno != EINTR)
			return err_sys(err, errno, "%s", io->what);
	}
}

static int keep_rate(const struct transfer_io *io, struct err *err)
{
	const struct timespec moment = {.tv_nsec = 5000000};

	while (io->max_rate && (double)(clock_now_ns() - io->started_ns) < (double)io->bytes / (double)io->max_rate * 1e9) {
		if (transfer_is_cancelled(io->cancel, err))
			return -ECANCELED;
		nanosleep(&moment, NULL);
	}
	return 0;
}

int transfer_write_raw(struct transfer_io *io, const void *data, size_t length, struct err *err)
{
	int rc = keep_rate(io, err);

	for (size_t done = 0; !rc && done < length;) {
		rc = wait_ready(io, POLLOUT, err);
		if (rc)
			return rc;
		ssize_t n = write(io->fd, (const uint8_t *)data + done, length - done);
		if (n < 0 && errno == EPIPE)
			return err_set(err, ERR_FAILED, EPIPE, "%s: the other end has closed the pipe", io->what);
		if (n < 0 && errno != EINTR && errno != EAGAIN)
			return err_sys(err, errno, "%s", io->what);
		done += n > 0 ? (size_t)n : 0;
		io->bytes += n > 0 ? (uint64_t)n : 0;
	}
	return rc;
}

int transfer_read_raw(struct transfer_io *io, void *data, size_t length, size_t *got, struct err *err)
{
	int rc = keep_rate(io, err);

	*got = 0;
	while (!rc && *got < length) {
		rc = wait_ready(io, POLLIN, err);
		if (rc)
			return rc;
		ssize_t n = read(io->fd, (uint8_t *)data + *got, length - *got);
		if (n == 0)
			return 0;
		if (n < 0 && errno != EINTR && errno != EAGAIN)
			return err_sys(err, errno, "%s", io->what);
		*got += n > 0 ? (size_t)n : 0;
		io->bytes += n > 0 ? (uint64_t)n : 0;
	}
	return rc;
}

int transfer_write(struct transfer_io *io, const void *data, size_t length, struct err *err)
{
	return io->seal ? transfer_seal_write(io, data, length, err) : transfer_write_raw(io, data, length, err);
}

int transfer_read(struct transfer_io *io, void *data, size_t length, size_t *got, struct err *err)
{
	return io->seal ? transfer_seal_read(io, data, length, got, err) : transfer_read_raw(io, data, length, got, err);
}
