#include "checkpoint/check_turn.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/log.h"

#define MAGIC	  "vmcpchk\n"
#define BOOT_PATH "/proc/sys/kernel/random/boot_id"

/* The record's fields, by their offsets. */
enum {
	AT_BOOT = 8,	/* XXH3 of the boot's id: another one has another page cache */
	AT_KEY = 16,	/* what is checked */
	AT_BEGUN = 24,	/* number of the last check that began */
	AT_PASSED = 32, /* of the last one that found all whole */
	AT_SUM = 48,	/* XXH3 of what is before it */
};

static int lock(int fd)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	return fcntl(fd, F_OFD_SETLK, &lock);
}

static bool is_whole(const uint8_t *record)
{
	return memcmp(record, MAGIC, AT_BOOT) == 0 && get_le64(record + AT_SUM) == XXH3_64bits(record, AT_SUM);
}

static uint64_t boot_hash(void)
{
	char id[64];
	int fd = open(BOOT_PATH, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, id, sizeof(id));
	if (fd >= 0)
		close(fd);
	return n > 0 ? XXH3_64bits(id, (size_t)n) : 0;
}

static bool is_ours(const struct check_turn *turn, const uint8_t *record)
{
	return get_le64(record + AT_BOOT) == turn->boot && get_le64(record + AT_KEY) == turn->key;
}

/* A check with this number or a lower one may have begun before memory was mapped. */
static uint64_t last_before(const struct check_turn *turn)
{
	if (turn->before_bytes == 0)
		return 0;
	if (turn->before_bytes != CHECK_TURN_RECORD_BYTES || !is_whole(turn->before))
		return UINT64_MAX; /* read while it was written */
	return is_ours(turn, turn->before) ? get_le64(turn->before + AT_BEGUN) : 0;
}

static int write_record(const struct check_turn *turn, uint64_t passed)
{
	uint8_t record[CHECK_TURN_RECORD_BYTES] = {0};
	memcpy(record, MAGIC, AT_BOOT);
	put_le64(record + AT_BOOT, turn->boot);
	put_le64(record + AT_KEY, turn->key);
	put_le64(record + AT_BEGUN, turn->number);
	put_le64(record + AT_PASSED, passed);
	put_le64(record + AT_SUM, XXH3_64bits(record, AT_SUM));
	return pwrite(turn->fd, record, sizeof(record), 0) == (ssize_t)sizeof(record) ? 0 : -1;
}

void check_turn_open(struct check_turn *turn, struct store *store, const char *checkpoint)
{
	struct err err = ERR_INIT;
	*turn = (struct check_turn){.fd = -1};
	if (store_hint_open(store, checkpoint, "checks", &turn->fd, &err) != 0) {
		log_debug("checkpoint %.8s: its memory is checked by this VM alone: %s", checkpoint, err.message);
		return;
	}
	turn->before_bytes = (int)pread(turn->fd, turn->before, sizeof(turn->before), 0);
}

enum check_turn_answer check_turn_take(struct check_turn *turn, uint64_t key)
{
	uint8_t record[CHECK_TURN_RECORD_BYTES];
	if (turn->fd < 0)
		return CHECK_TURN_MINE;
	if (lock(turn->fd) != 0) {
		if (errno == EAGAIN || errno == EACCES)
			return CHECK_TURN_WAIT;
		check_turn_close(turn);
		return CHECK_TURN_MINE;
	}
	uint64_t begun = 0, passed = 0;
	turn->boot = boot_hash();
	turn->key = key;
	if (pread(turn->fd, record, sizeof(record), 0) == (ssize_t)sizeof(record) && is_whole(record) && is_ours(turn, record)) {
		begun = get_le64(record + AT_BEGUN);
		passed = get_le64(record + AT_PASSED);
	}
	if (turn->boot != 0 && passed > last_before(turn)) {
		check_turn_close(turn);
		return CHECK_TURN_OVER;
	}
	turn->number = begun + 1;
	if (write_record(turn, passed) != 0)
		check_turn_close(turn);
	return CHECK_TURN_MINE;
}

void check_turn_passed(struct check_turn *turn)
{
	if (turn->fd >= 0)
		write_record(turn, turn->number);
}

void check_turn_close(struct check_turn *turn)
{
	if (turn->fd >= 0)
		close(turn->fd);
	turn->fd = -1;
}
