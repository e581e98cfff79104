/*
 * The store's own speed: makes a history of small checkpoints, and times what is done to it.
 *
 *     store_bench FOLDER COUNT      FOLDER: of a new store. On a tmpfs, as each commit is synced
 *
 * Prints `key=value` lines: times in ns, bytes as the process wrote them (wchar of /proc/self/io).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/file.h"
#include "checkpoint/index.h"
#include "checkpoint/store/store.h"
#include "checkpoint/store/verify.h"
#include "checkpoint/state_file.h"
#include "checkpoint/sums.h"

enum { PAGES = 1024, LAYERS = 8 };

static void must(int rc, const struct err *err)
{
	if (rc == 0)
		return;
	fprintf(stderr, "store_bench: %s\n", err->message);
	exit(1);
}

/* Page `i` in the layer taken i checkpoints ago. */
static void put_index(struct store_draft *draft, char layers[LAYERS][STORE_ID_BYTES], uint32_t count, struct err *err)
{
	struct index_extent extents[LAYERS + 1];
	struct page_index index = {.page_count = PAGES, .layer_count = count, .layers = layers, .extents = extents};
	struct buf data = BUF_INIT;
	for (uint32_t i = 0; i < count; i++)
		extents[index.extent_count++] = (struct index_extent){.first = i, .count = 1, .layer = i + 1};
	extents[index.extent_count++] = (struct index_extent){.first = count, .count = PAGES - count, .layer = INDEX_ZERO_LAYER};
	must(page_index_encode(&index, &data, err), err);
	must(store_draft_put(draft, "index", data.data, data.length, err), err);
	buf_free(&data);
}

/* A page for each place that a later checkpoint may take from it. */
static void put_layer(struct store_draft *draft, char layer[STORE_ID_BYTES], struct err *err)
{
	uint64_t saved[PAGES / 64] = {(1u << LAYERS) - 1}, sums[PAGES] = {0};
	uint8_t page[PAGE_BYTES];
	int mem, sums_fd;
	must(store_draft_memory_layer(draft, layer, &mem, &sums_fd, err), err);
	for (uint64_t i = 0; i < LAYERS; i++) {
		memset(page, (int)i + 1, sizeof(page));
		memcpy(page, layer, STORE_ID_BYTES);
		sums[i] = page_sum(i, page);
		must(file_pwrite_full(mem, page, sizeof(page), i * PAGE_BYTES, err), err);
	}
	must(page_sums_write(sums_fd, saved, saved, sums, PAGES, err), err);
	close(mem);
	close(sums_fd);
}

static void take(struct store *store, char layers[LAYERS][STORE_ID_BYTES], uint32_t count, char id[STORE_ID_BYTES])
{
	struct store_checkpoint c = {.live = true, .cpus = 1, .memory_bytes = PAGES * PAGE_BYTES, .saved_pages = LAYERS, .created_wall_ns = clock_wall_ns()};
	struct err err = ERR_INIT;
	struct store_draft *draft;
	struct buf state = BUF_INIT;
	must(store_draft_begin(store, &draft, &err), &err);
	memmove(layers[1], layers[0], (LAYERS - 1) * sizeof(*layers));
	put_layer(draft, layers[0], &err);
	memcpy(c.memory_layer, layers[0], STORE_ID_BYTES);
	must(state_file_start(&state, 0, &err), &err);
	must(store_draft_put(draft, "state", state.data, state.length, &err), &err);
	buf_free(&state);
	put_index(draft, layers, count, &err);
	snprintf(c.vm, sizeof(c.vm), "bench");
	snprintf(c.vm_uuid, sizeof(c.vm_uuid), "11111111-2222-4333-8444-555555555555");
	memcpy(c.parent, id, STORE_ID_BYTES);
	c.config_text = xstrdup("[vm]\nname = bench\n");
	must(store_draft_commit(draft, &c, &err), &err);
	memcpy(id, c.id, STORE_ID_BYTES);
	store_checkpoint_free(&c);
}

static uint64_t written_bytes(void)
{
	unsigned long long bytes = 0;
	char line[128];
	FILE *file = fopen("/proc/self/io", "r");
	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "wchar: %llu", &bytes) == 1)
			break;
	if (file)
		fclose(file);
	return bytes;
}

static uint64_t time_list(struct store *store)
{
	struct store_checkpoint *list;
	struct err err = ERR_INIT;
	size_t count;
	uint64_t start = clock_now_ns();
	must(store_checkpoint_list(store, NULL, &list, &count, &err), &err);
	uint64_t took = clock_now_ns() - start;
	for (size_t i = 0; i < count; i++)
		store_checkpoint_free(&list[i]);
	free(list);
	return took;
}

static void time_verify(struct store *store)
{
	struct verify_options options = {0};
	struct verify_result result;
	struct err err = ERR_INIT;
	uint64_t start = clock_now_ns();
	must(store_verify(store, NULL, 0, &options, &result, &err), &err);
	printf("verify_ns=%llu verified=%zu damaged=%zu\n", (unsigned long long)(clock_now_ns() - start), result.checkpoint_count, result.damage_count);
	verify_result_free(&result);
}

static void time_remove(struct store *store, const char *id)
{
	struct store_freed freed = {0};
	struct err err = ERR_INIT;
	uint64_t start = clock_now_ns(), written = written_bytes();
	must(store_checkpoint_remove(store, id, true, &freed, &err), &err);
	printf("remove_ns=%llu remove_written_bytes=%llu\n", (unsigned long long)(clock_now_ns() - start),
	       (unsigned long long)(written_bytes() - written));
}

int main(int argc, char **argv)
{
	char layers[LAYERS][STORE_ID_BYTES] = {{0}}, id[STORE_ID_BYTES] = "", middle[STORE_ID_BYTES] = "";
	unsigned count = argc == 3 ? (unsigned)strtoul(argv[2], NULL, 10) : 0;
	struct err err = ERR_INIT;
	struct store *store;
	if (count < 2) {
		fprintf(stderr, "usage: store_bench FOLDER COUNT\n");
		return 2;
	}
	must(store_open(argv[1], true, &store, &err), &err);
	uint64_t start = clock_now_ns();
	for (unsigned i = 0; i < count; i++) {
		take(store, layers, i + 1 < LAYERS ? i + 1 : LAYERS, id);
		if (i == count / 2)
			memcpy(middle, id, sizeof(middle));
	}
	printf("checkpoints=%u commit_ns=%llu\n", count, (unsigned long long)((clock_now_ns() - start) / count));
	printf("list_ns=%llu\n", (unsigned long long)time_list(store));
	time_verify(store);
	time_remove(store, middle);
	store_close(store);
	start = clock_now_ns();
	must(store_open(argv[1], false, &store, &err), &err);
	printf("open_ns=%llu\n", (unsigned long long)(clock_now_ns() - start));
	store_close(store);
	return 0;
}
