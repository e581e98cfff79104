/* What QEMU has saved becomes a checkpoint of the store. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/file_sum.h"
#include "checkpoint/index.h"
#include "checkpoint/sums.h"
#include "machine/qemu_take_internal.h"
#include "vmm/memory.h"
#include "vmm/vm.h"

#define MEMORY_STEP (2ull << 20)
#define READ_PAGES  256u

struct maps {
	uint64_t *scope, *saved, *zero, *sums;
};

static int read_back(struct qemu_take *take, const struct maps *maps, struct err *err)
{
	uint64_t file_pages = div_round_up(take->result->stream_bytes, PAGE_BYTES);
	CLEANUP_FREE uint8_t *data = malloc(READ_PAGES * PAGE_BYTES);
	int rc = data ? 0 : err_sys(err, ENOMEM, "checksums");

	for (uint64_t page = 0; page < take->pages; page++)
		maps->scope[page / 64] |= 1ull << (page % 64);
	for (uint64_t at = 0, n; !rc && at < file_pages; at += n) {
		n = min_u64(READ_PAGES, file_pages - at);
		rc = file_pread_full(take->fd, data, n * PAGE_BYTES, at * PAGE_BYTES, err);
		for (uint64_t i = 0; !rc && i < n; i++) {
			const uint8_t *page = data + i * PAGE_BYTES;
			uint64_t number = at + i, bit = 1ull << (number % 64);

			if (bytes_are_zero(page, PAGE_BYTES)) {
				maps->zero[number / 64] |= bit;
				continue;
			}
			maps->saved[number / 64] |= bit;
			maps->sums[number] = page_sum(number, page);
			take->result->saved_pages++;
		}
		qemu_tell(take, "checksums", at * PAGE_BYTES, take->result->stream_bytes);
		rc = rc ? rc : qemu_check_cancel(take, err);
	}
	for (uint64_t page = file_pages; page < take->pages; page++)
		maps->zero[page / 64] |= 1ull << (page % 64);
	take->result->zero_pages = take->pages - take->result->saved_pages;
	return rc;
}

static int put_index(struct qemu_take *take, const struct maps *maps, struct err *err)
{
	const struct page_index_saved saved = {take->layer, maps->scope, (const _Atomic uint64_t *)maps->zero};
	CLEANUP_BUF struct buf text = BUF_INIT;
	struct page_index index = {0};
	int rc = page_sums_write(take->sums_fd, maps->saved, NULL, maps->sums, take->pages, err);

	if (!rc)
		rc = page_index_build(&index, &saved, NULL, take->pages, err);
	if (!rc)
		rc = page_index_encode(&index, &text, err);
	page_index_free(&index);
	return rc ? rc : store_draft_put(take->draft, "index", text.data, text.length, err);
}

/* The stream as pages of a layer: its length is rounded up to what memory of a VM may have. */
int qemu_put_stream(struct qemu_take *take, struct err *err)
{
	CLEANUP_BUF struct buf state = BUF_INIT;
	struct stat st;

	/* To its own length first, which gives back what was reserved behind it. */
	if (fstat(take->fd, &st) || ftruncate(take->fd, st.st_size) || ftruncate(take->fd, (off_t)round_up((uint64_t)st.st_size, PAGE_BYTES)))
		return err_sys(err, errno, "layer of the stream");
	take->result->stream_bytes = (uint64_t)st.st_size;
	take->pages = max_u64(round_up((uint64_t)st.st_size, MEMORY_STEP), MEM_MIN_BYTES) / PAGE_BYTES;
	size_t words = (size_t)div_round_up(take->pages, 64);
	CLEANUP_FREE uint64_t *bits = calloc(3 * words, sizeof(uint64_t)), *sums = calloc(take->pages, sizeof(uint64_t));
	if (!bits || !sums)
		return err_sys(err, ENOMEM, "map of %llu pages", (unsigned long long)take->pages);
	const struct maps maps = {bits, bits + words, bits + 2 * words, sums};
	int rc = read_back(take, &maps, err);
	if (!rc)
		rc = put_index(take, &maps, err);
	if (!rc)
		rc = qemu_state_encode(take->xml, take->result->stream_bytes, &state, err);
	return rc ? rc : store_draft_put(take->draft, "state", state.data, state.length, err);
}

int qemu_measure_layers(struct qemu_take *take, struct err *err)
{
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct qemu_take_disk *d = &take->disks[i];
		CLEANUP_CLOSE int fd = open(d->layer_path, O_RDONLY | O_CLOEXEC);
		struct stat st;

		if (fd < 0 || fstat(fd, &st) || fsync(fd))
			return err_sys(err, errno, "%s", d->layer_path);
		d->layer.file_bytes = (uint64_t)st.st_size;
		int rc = file_sum(fd, d->layer.file_bytes, NULL, NULL, &d->layer.xxh3, err);
		if (rc)
			return err_prefix(err, "disk %s: layer", d->layer.disk);
		take->result->disks[i] = d->layer;
	}
	take->result->disk_count = take->disk_count;
	return 0;
}

/* What lists, imports and exports know a checkpoint's machine by. */
static int describe_machine(const struct qemu_take *take, char **text, struct err *err)
{
	struct machine_config config = {.memory_bytes = take->pages * PAGE_BYTES, .cpus = (unsigned)min_u64(max_u64(take->domain.cpus, 1), VM_MAX_CPUS), .qemu = true};
	CLEANUP_BUF struct buf out = BUF_INIT;

	snprintf(config.name, sizeof(config.name), "%s", take->result->vm);
	config.source = xstrdup("");
	config.cmdline = xstrdup("");
	config.cpu_model = xstrdup("host");
	config.libvirt = xstrdup("");
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct config_disk *disk = &config.disks[config.disk_count++];

		snprintf(disk->name, sizeof(disk->name), "%s", take->disks[i].layer.disk);
		disk->path = xstrdup(take->disks[i].disk->path);
	}
	int rc = config_to_text(&config, &out, err);
	if (!rc)
		rc = buf_append(&out, NULL, 1, err);
	config_free(&config);
	if (!rc)
		*text = xstrdup((const char *)out.data);
	return rc;
}

static int put_record(const struct qemu_take *take, const char *text, struct err *err)
{
	struct store_vm vm = {.memory_bytes = take->pages * PAGE_BYTES, .cpus = take->domain.cpus, .started_wall_ns = clock_wall_ns()};

	snprintf(vm.name, sizeof(vm.name), "%s", take->result->vm);
	snprintf(vm.uuid, sizeof(vm.uuid), "%s", take->state.uuid);
	snprintf(vm.at, sizeof(vm.at), "%s", take->result->parent);
	snprintf(vm.state, sizeof(vm.state), "stopped");
	vm.config_text = xstrdup(text);
	int rc = store_vm_put(take->store, &vm, err);
	free(vm.config_text);
	if (!rc)
		rc = store_vm_set_note(take->store, vm.name, "a domain of libvirt, which vmcp does not run", err);
	return rc;
}

int qemu_commit(struct qemu_take *take, struct err *err)
{
	struct qemu_result *result = take->result;
	struct store_checkpoint checkpoint = {.created_wall_ns = result->created_wall_ns, .live = take->request->live};
	struct stat st;
	int rc = describe_machine(take, &checkpoint.config_text, err);

	if (!rc)
		rc = put_record(take, checkpoint.config_text, err);
	if (!rc)
		rc = fault_check(FAULT_QEMU_BEFORE_COMMIT, err);
	if (rc) {
		free(checkpoint.config_text);
		return rc;
	}
	checkpoint.memory_bytes = take->pages * PAGE_BYTES;
	checkpoint.saved_pages = result->saved_pages;
	checkpoint.zero_pages = result->zero_pages;
	checkpoint.written_bytes = result->stream_bytes;
	checkpoint.pause_ns = result->pause_ns;
	checkpoint.durable_ns = clock_now_ns() - take->start_ns;
	checkpoint.cpus = take->domain.cpus;
	checkpoint.disk_count = take->disk_count;
	checkpoint.disks = xcalloc(take->disk_count + 1, sizeof(*checkpoint.disks));
	checkpoint.message = take->request->message ? xstrdup(take->request->message) : NULL;
	checkpoint.size_bytes = fstat(take->fd, &st) ? 0 : (uint64_t)st.st_blocks * 512;
	snprintf(checkpoint.id, sizeof(checkpoint.id), "%s", result->id);
	snprintf(checkpoint.parent, sizeof(checkpoint.parent), "%s", result->parent);
	snprintf(checkpoint.vm, sizeof(checkpoint.vm), "%s", result->vm);
	snprintf(checkpoint.vm_uuid, sizeof(checkpoint.vm_uuid), "%s", take->state.uuid);
	snprintf(checkpoint.tag, sizeof(checkpoint.tag), "%s", take->request->tag ? take->request->tag : "");
	snprintf(checkpoint.memory_layer, sizeof(checkpoint.memory_layer), "%s", take->layer);
	for (unsigned i = 0; i < take->disk_count; i++) {
		checkpoint.disks[i] = take->disks[i].layer;
		checkpoint.size_bytes += stat(take->disks[i].layer_path, &st) ? 0 : (uint64_t)st.st_blocks * 512;
	}
	struct store_draft *draft = take->draft;
	take->draft = NULL; /* freed in every case */
	rc = store_draft_commit(draft, &checkpoint, err);
	store_checkpoint_free(&checkpoint);
	result->durable_ns = clock_now_ns() - take->start_ns;
	return rc;
}
