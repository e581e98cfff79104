/*
 * Eight processes at once on one store: they take, go back to, tag, list, verify and remove checkpoints of each other and collect, at random, and are killed now
 * and then. Afterwards every checkpoint that was reported and that nobody set out to remove is whole, and nothing else is left.
 *
 * VMCP_TEST_CROWD_SECONDS sets how long (15), VMCP_TEST_SEED the choices. A plain program: runs under ThreadSanitizer too.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/file_sum.h"
#include "checkpoint/restore.h"
#include "checkpoint/state_file.h"
#include "checkpoint/store/store_internal.h"
#include "checkpoint/store/verify.h"
#include "tests/lib/check.h"

enum { PROCESSES = 8, PAGES = 256, MOST_CHECKPOINTS = 40, IMAGE_BYTES = 64 << 10 };

static char work[64], folder[80];
static uint64_t random_state;

static uint64_t pick(uint64_t below)
{
	random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
	return (random_state >> 33) % below;
}

struct member {
	struct store *store;
	unsigned number;
	char vm[STORE_NAME_BYTES], image[120];
	char at[STORE_ID_BYTES]; /* where its VM stands, "" */
	struct store_pin *standing;
	int journal; /* what was reported and what was set out to be done, one line each */
	uint64_t done[8]; /* operations that came to something */
};

static void note(const struct member *m, char what, const char *id)
{
	char line[STORE_ID_BYTES + 8];
	int length = snprintf(line, sizeof(line), "%c %s\n", what, id);
	if (write(m->journal, line, (size_t)length) != length)
		_exit(3);
}

/* What none may be: the others may take away what is asked for, at any instant, and that is told by these. */
static void expect(const struct member *m, const char *what, int rc, const struct err *err)
{
	if (rc == 0 || rc == -ENOENT || rc == -EBUSY || rc == -EEXIST)
		return;
	fprintf(stderr, "process %u: %s: %s\n", m->number, what, err->message);
	_exit(2);
}

/* --- taking --- */

static void page_content(const char *layer, uint64_t page, uint8_t *out)
{
	memset(out, (int)page, PAGE_BYTES);
	memcpy(out, layer, STORE_ID_BYTES);
	put_le64(out + 64, page);
}

static int put_layer(struct store_draft *draft, char layer[STORE_ID_BYTES], uint64_t *saved, struct err *err)
{
	uint64_t sums[PAGES], place = 0;
	uint8_t page[PAGE_BYTES];
	int mem, sums_fd, r = store_draft_memory_layer(draft, layer, &mem, &sums_fd, err);
	if (r != 0)
		return r;
	for (uint64_t i = 1 + pick(12); i > 0; i--) {
		uint64_t p = pick(PAGES);
		saved[p / 64] |= (uint64_t)1 << (p % 64);
	}
	for (uint64_t p = 0; p < PAGES && r == 0; p++) {
		if (!(saved[p / 64] >> (p % 64) & 1))
			continue;
		page_content(layer, p, page);
		sums[p] = page_sum(p, page);
		r = file_pwrite_full(mem, page, sizeof(page), place++ * PAGE_BYTES, err);
	}
	if (r == 0)
		r = page_sums_write(sums_fd, saved, saved, sums, PAGES, err);
	close(mem);
	close(sums_fd);
	return r;
}

static int put_index(struct member *m, struct store_draft *draft, const char *layer, const uint64_t *saved, struct err *err)
{
	static const _Atomic uint64_t no_zeroes[PAGES / 64];
	uint64_t all[PAGES / 64];
	_Atomic uint64_t zero[PAGES / 64];
	struct page_index parent = {0}, index = {0};
	struct store_checkpoint c;
	struct buf data = BUF_INIT;
	int r = 0;
	memset(all, 0xff, sizeof(all));
	for (unsigned i = 0; i < PAGES / 64; i++)
		zero[i] = ~saved[i];
	if (m->at[0]) {
		r = store_checkpoint_get(m->store, m->at, &c, err);
		if (r == 0)
			r = store_checkpoint_read(m->store, &c, "index", &data, err);
		if (r == 0)
			r = page_index_decode(data.data, data.length, &parent, err);
		store_checkpoint_free(&c);
		buf_free(&data);
	}
	const struct page_index_saved own = {.layer = layer, .scope = m->at[0] ? saved : all, .zero = m->at[0] ? no_zeroes : zero};
	if (r == 0)
		r = page_index_build(&index, &own, m->at[0] ? &parent : NULL, PAGES, err);
	if (r == 0)
		r = page_index_encode(&index, &data, err);
	if (r == 0)
		r = store_draft_put(draft, "index", data.data, data.length, err);
	buf_free(&data);
	page_index_free(&index);
	page_index_free(&parent);
	return r;
}

static bool goes_on(void *opaque, uint64_t bytes, bool read)
{
	(void)opaque, (void)bytes, (void)read;
	return true;
}

static int write_image(struct member *m, struct err *err)
{
	uint8_t data[IMAGE_BYTES];
	unlink(m->image);
	CLEANUP_CLOSE int fd = open(m->image, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)pick(256);
	return fd < 0 ? err_sys(err, errno, "%s", m->image) : file_pwrite_full(fd, data, sizeof(data), 0, err);
}

/* The image becomes a layer, and the VM goes on with a new one. */
static int put_disk(struct member *m, struct store_draft *draft, struct store_checkpoint *c, struct err *err)
{
	char *path = NULL;
	c->disks = xcalloc(1, sizeof(*c->disks));
	struct store_disk_layer *disk = c->disks;
	snprintf(disk->disk, sizeof(disk->disk), "root");
	snprintf(disk->format, sizeof(disk->format), "raw");
	int r = write_image(m, err);
	if (r == 0)
		r = store_draft_disk_layer(draft, "root", m->image, "raw", disk->layer, &path, err);
	if (r != 0)
		return r;
	CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);
	free(path);
	c->disk_count = 1;
	disk->size_bytes = disk->file_bytes = IMAGE_BYTES;
	store_draft_switched(draft);
	unlink(m->image);
	return fd < 0 ? err_sys(err, errno, "layer") : file_sum(fd, IMAGE_BYTES, goes_on, NULL, &disk->xxh3, err);
}

static int fill_draft(struct member *m, struct store_draft *draft, struct store_checkpoint *c, struct err *err)
{
	uint64_t saved[PAGES / 64] = {0};
	struct buf state = BUF_INIT;
	int r = put_layer(draft, c->memory_layer, saved, err);
	if (r == 0)
		r = put_index(m, draft, c->memory_layer, saved, err);
	if (r == 0)
		r = state_file_start(&state, 0, err);
	if (r == 0)
		r = store_draft_put(draft, "state", state.data, state.length, err);
	buf_free(&state);
	return r == 0 && pick(4) == 0 ? put_disk(m, draft, c, err) : r;
}

static void stand_at(struct member *m, const char *id, struct store_pin *pin)
{
	store_unpin(m->standing);
	m->standing = pin;
	snprintf(m->at, sizeof(m->at), "%s", id);
}

static void take(struct member *m)
{
	struct store_checkpoint c = {.live = true, .cpus = 1, .memory_bytes = PAGES * PAGE_BYTES, .created_wall_ns = clock_wall_ns()};
	struct err err = ERR_INIT;
	struct store_draft *draft;
	struct store_pin *pin;
	int r = store_draft_begin(m->store, &draft, &err);
	expect(m, "begin", r, &err);
	if (r != 0)
		return;
	memcpy(c.vm, m->vm, sizeof(c.vm));
	memcpy(c.parent, m->at, sizeof(c.parent));
	snprintf(c.vm_uuid, sizeof(c.vm_uuid), "11111111-2222-4333-8444-%012u", m->number);
	c.config_text = xstrdup("[vm]\n");
	r = fill_draft(m, draft, &c, &err);
	if (r == 0 && pick(8))
		r = store_draft_commit(draft, &c, &err);
	else {
		store_draft_abort(draft);
		c.id[0] = '\0';
	}
	expect(m, "take", r, &err);
	if (r == 0 && c.id[0]) {
		note(m, 'T', c.id);
		r = store_pin(m->store, c.id, &pin, &err);
		expect(m, "pin of what was just taken", r, &err);
		if (r == 0)
			stand_at(m, c.id, pin);
		m->done[0]++;
	}
	store_checkpoint_free(&c);
}

/* --- everything else --- */

/* One of all that are listed; "" if there is none. */
static size_t choose(struct member *m, char id[STORE_ID_BYTES])
{
	struct store_checkpoint *list;
	struct err err = ERR_INIT;
	size_t count;
	int r = store_checkpoint_list(m->store, NULL, &list, &count, &err);
	expect(m, "list", r, &err);
	id[0] = '\0';
	size_t chosen = r == 0 && count ? pick(count) : 0;
	for (size_t i = 0; r == 0 && i < count; i++) {
		if (i == chosen)
			memcpy(id, list[i].id, STORE_ID_BYTES);
		store_checkpoint_free(&list[i]);
	}
	if (r == 0)
		free(list);
	m->done[1] += r == 0;
	return r == 0 ? count : 0;
}

/* As a revert reads it: all of it, held. What is held is whole, whatever the others do. */
static void go_back(struct member *m)
{
	char id[STORE_ID_BYTES];
	struct restore_layers layers = {0};
	struct page_index index = {0};
	struct store_checkpoint c = {0};
	struct buf data = BUF_INIT;
	struct err err = ERR_INIT;
	struct store_pin *pin;
	choose(m, id);
	if (!id[0] || store_pin(m->store, id, &pin, NULL) != 0)
		return;
	int r = store_checkpoint_get(m->store, id, &c, &err);
	if (r == 0)
		r = store_checkpoint_read(m->store, &c, "index", &data, &err);
	if (r == 0)
		r = page_index_decode(data.data, data.length, &index, &err);
	if (r == 0)
		r = restore_init(&layers, m->store, &index, &err);
	CLEANUP_FREE uint8_t *chunk = restore_alloc_chunk(&err);
	if (r == 0)
		r = chunk ? restore_verify(&layers, NULL, 0, index.page_count, chunk, &err) : -ENOMEM;
	if (r != 0) {
		fprintf(stderr, "process %u: held, but not whole: %s\n", m->number, err.message);
		_exit(2);
	}
	r = store_vm_set_position(m->store, m->vm, id, &err);
	expect(m, "position", r, &err);
	restore_close(&layers);
	page_index_free(&index);
	buf_free(&data);
	store_checkpoint_free(&c);
	stand_at(m, id, pin);
	m->done[2]++;
}

static void remove_one(struct member *m, size_t *left)
{
	struct store_freed freed = {0};
	char id[STORE_ID_BYTES];
	struct err err = ERR_INIT;
	*left = choose(m, id);
	if (!id[0])
		return;
	note(m, 'R', id);
	int r = store_checkpoint_remove(m->store, id, pick(2), &freed, &err);
	expect(m, "remove", r, &err);
	if (r != 0)
		note(m, 'K', id); /* it was kept */
	m->done[3] += r == 0;
}

static void collect(struct member *m)
{
	struct store_gc_result result;
	struct err err = ERR_INIT;
	int r = store_gc(m->store, &result, &err);
	expect(m, "gc", r, &err);
	m->done[4] += r == 0;
}

static void tag(struct member *m)
{
	char id[STORE_ID_BYTES], name[32], found[STORE_ID_BYTES];
	struct err err = ERR_INIT;
	choose(m, id);
	snprintf(name, sizeof(name), "tag-%u", (unsigned)pick(1000));
	int r = id[0] ? store_tag(m->store, id, name, &err) : -ENOENT;
	expect(m, "tag", r, &err);
	m->done[5] += r == 0 && store_resolve(m->store, name, found, NULL) == 0;
}

static void verify(struct member *m)
{
	struct verify_options options = {.threads = 2};
	struct verify_result result;
	struct err err = ERR_INIT;
	int r = store_verify(m->store, NULL, 0, &options, &result, &err);
	expect(m, "verify", r, &err);
	if (r != 0)
		return;
	if (result.damage_count) {
		fprintf(stderr, "process %u: verify: %s\n", m->number, result.damages[0].message);
		_exit(2);
	}
	verify_result_free(&result);
	m->done[6]++;
}

/* As commands do, each on its own. */
static void open_again(struct member *m)
{
	struct err err = ERR_INIT;
	store_unpin(m->standing);
	m->standing = NULL;
	m->at[0] = '\0';
	store_close(m->store);
	int r = store_open(folder, false, &m->store, &err);
	if (r != 0) {
		fprintf(stderr, "process %u: open: %s\n", m->number, err.message);
		_exit(2);
	}
	m->done[7]++;
}

static void act(struct member *m)
{
	size_t left = 0;
	switch (pick(16)) {
	case 0 ... 4:
		take(m);
		break;
	case 5 ... 6:
		go_back(m);
		break;
	case 7 ... 9:
		do
			remove_one(m, &left);
		while (left > MOST_CHECKPOINTS);
		break;
	case 10 ... 11:
		collect(m);
		break;
	case 12:
		tag(m);
		break;
	case 13 ... 14:
		verify(m);
		break;
	default:
		open_again(m);
	}
}

static void member_main(unsigned number, uint64_t seed, uint64_t end_ns)
{
	struct store_vm vm = {.uuid = "11111111-2222-4333-8444-555555555555", .state = "running", .config_text = (char *)""};
	struct member m = {.number = number};
	struct err err = ERR_INIT;
	char path[120];
	random_state = seed;
	log_set_level(LOG_LEVEL_ERROR);
	snprintf(m.vm, sizeof(m.vm), "vm%u", number);
	memcpy(vm.name, m.vm, sizeof(vm.name));
	snprintf(m.image, sizeof(m.image), "%s/image%u", work, number);
	snprintf(path, sizeof(path), "%s/journal", work);
	m.journal = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
	if (m.journal < 0 || store_open(folder, false, &m.store, &err) != 0 || store_vm_put(m.store, &vm, &err) != 0) {
		fprintf(stderr, "process %u: %s\n", number, err.message);
		_exit(2);
	}
	while (clock_now_ns() < end_ns)
		act(&m);
	printf("process %u: taken %llu, lists %llu, back %llu, removed %llu, gc %llu, tags %llu, verified %llu, opened %llu\n", number,
	       (unsigned long long)m.done[0], (unsigned long long)m.done[1], (unsigned long long)m.done[2], (unsigned long long)m.done[3],
	       (unsigned long long)m.done[4], (unsigned long long)m.done[5], (unsigned long long)m.done[6], (unsigned long long)m.done[7]);
	fflush(stdout);
	_exit(m.done[0] ? 0 : 4);
}

/* --- the parent --- */

static pid_t start(unsigned number, uint64_t seed, uint64_t end_ns)
{
	fflush(stdout);
	pid_t child = fork();
	if (child == 0)
		member_main(number, seed, end_ns);
	CHECK(child > 0);
	return child;
}

/* A killed one is followed by another, which goes on where it was. */
static unsigned run_crowd(uint64_t seconds, uint64_t seed)
{
	const struct timespec pause = {.tv_nsec = 400000000};
	uint64_t end_ns = clock_now_ns() + seconds * 1000000000;
	pid_t children[PROCESSES];
	unsigned kills = 0;
	int status;
	for (unsigned i = 0; i < PROCESSES; i++)
		children[i] = start(i, seed + i, end_ns);
	while (clock_now_ns() + 2000000000 < end_ns) {
		nanosleep(&pause, NULL);
		unsigned victim = (unsigned)pick(PROCESSES);
		kill(children[victim], SIGKILL);
		CHECK(waitpid(children[victim], &status, 0) == children[victim]);
		CHECK(WIFSIGNALED(status)); /* and did not find anything wrong before */
		children[victim] = start(victim, seed + 1000 + kills++, end_ns);
	}
	for (unsigned i = 0; i < PROCESSES; i++) {
		CHECK(waitpid(children[i], &status, 0) == children[i]);
		CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 4));
	}
	return kills;
}

/* By the journal: reported, and no removal of it was begun but those that were refused. */
static bool must_be_there(const char *journal, const char *id)
{
	long taken = 0, begun = 0, kept = 0;
	for (const char *at = journal; (at = strstr(at, id)); at += STORE_ID_BYTES - 1) {
		taken += at[-2] == 'T';
		begun += at[-2] == 'R';
		kept += at[-2] == 'K';
	}
	return taken && begun == kept;
}

static void check_reported(struct store *store, const char *journal)
{
	unsigned long there = 0, gone = 0;
	for (const char *at = journal; *at; at = strchr(at, '\n') + 1) {
		char id[STORE_ID_BYTES];
		if (*at != 'T')
			continue;
		memcpy(id, at + 2, STORE_ID_BYTES - 1);
		id[STORE_ID_BYTES - 1] = '\0';
		bool is = store_has_folder(store, id);
		CHECK(is || !must_be_there(journal, id));
		there += is;
		gone += !is;
	}
	printf("%lu of those reported are there, %lu were removed\n", there, gone);
	CHECK(there > 0 && gone > 0);
}

static void check_whole(struct store *store)
{
	struct verify_options options = {0};
	struct verify_result result;
	struct err err = ERR_INIT;
	char catalog[512];
	CHECK(store_verify(store, NULL, 0, &options, &result, &err) == 0);
	for (size_t i = 0; i < result.damage_count; i++)
		fprintf(stderr, "%s\n", result.damages[i].message);
	CHECK(result.damage_count == 0 && result.checkpoint_count > 0 && result.read_bytes > 0);
	verify_result_free(&result);
	CHECK(store_verify_catalog(store, catalog, &err) == 0 && catalog[0] == '\0');
}

static unsigned count_files(const char *command_format)
{
	char command[300];
	unsigned count = 0;
	snprintf(command, sizeof(command), command_format, folder);
	FILE *out = popen(command, "r");
	CHECK(out && fscanf(out, "%u", &count) == 1);
	if (out)
		pclose(out);
	return count;
}

/* Nobody lives: what is left is what checkpoints name, and nothing is staged. */
static void check_exact(struct store *store)
{
	struct store_gc_result result;
	struct err err = ERR_INIT;
	sqlite3_stmt *s;
	int rc = store_gc(store, &result, &err);
	if (rc)
		fprintf(stderr, "gc: %s\n", err.message);
	CHECK(rc == 0);
	CHECK(count_files("ls -A %s/staging | wc -l") == 0);
	pthread_mutex_lock(&store->lock);
	CHECK(catalog_prepare_locked(store, "SELECT COUNT(*) FROM layers WHERE kind = 'mem'", &s, &err) == 0);
	CHECK(catalog_step_locked(store, s, &err) == 1);
	unsigned named = (unsigned)sqlite3_column_int(s, 0);
	sqlite3_finalize(s);
	pthread_mutex_unlock(&store->lock);
	CHECK(count_files("ls %s/layers | grep -c 'mem$'") == named);
	CHECK(count_files("ls %s/layers | grep -c 'sums$'") == named);
}

int main(void)
{
	const char *seconds = getenv("VMCP_TEST_CROWD_SECONDS"), *seed = getenv("VMCP_TEST_SEED"), *base = getenv("TMPDIR");
	struct buf journal = BUF_INIT;
	struct err err = ERR_INIT;
	struct store *store;
	char path[120];
	random_state = seed ? strtoull(seed, NULL, 10) : 1;
	snprintf(work, sizeof(work), "%.40s/vmcp-crowd-XXXXXX", base ? base : "/tmp");
	CHECK(mkdtemp(work) != NULL);
	snprintf(folder, sizeof(folder), "%s/store", work);
	snprintf(path, sizeof(path), "%s/journal", work);
	close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
	CHECK(store_open(folder, true, &store, &err) == 0);
	store_close(store);
	unsigned kills = run_crowd(seconds ? strtoull(seconds, NULL, 10) : 15, random_state * 100);
	CHECK(store_open(folder, false, &store, &err) == 0);
	CHECK(file_read_all(AT_FDCWD, path, 64 << 20, &journal, &err) == 0);
	check_reported(store, (const char *)journal.data);
	check_whole(store);
	check_exact(store);
	printf("%u processes were killed\n", kills);
	buf_free(&journal);
	store_close(store);
	if (atomic_load(&check_failures))
		printf("kept: %s\n", work);
	else
		file_remove_tree(AT_FDCWD, work, NULL);
	return check_report();
}
