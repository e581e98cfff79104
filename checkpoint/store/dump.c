/*
 * The file: ELF header, program headers, notes, and at the next page RAM in one piece, so that page p of RAM is at data + p x 4096, whatever its
 * guest-physical address is.
 */
#include "checkpoint/store/dump.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "base/file.h"
#include "checkpoint/restore.h"
#include "checkpoint/state_file.h"
#include "vmm/core.h"

#define RANGES 2u /* of RAM: below and above the hole below 4 GiB */

struct writing {
	struct dump *dump;
	int fd;
	uint64_t data; /* where RAM begins in the file */
	struct restore_layers layers;
	uint8_t *chunk;
};

/* --- headers --- */

static int add_vcpus(const struct state_section *sections, size_t count, struct dump *dump, struct buf *notes, struct err *err)
{
	for (size_t i = 0; i < count; i++) {
		const struct state_section *s = &sections[i];
		if (s->kind != STATE_SECTION_STATE || strcmp(s->id, core_vcpu_id()) != 0)
			continue;
		int r = core_add_vcpu(s->body, s->length, s->instance, notes, err);
		if (r != 0)
			return r;
		dump->cpus++;
	}
	return dump->cpus ? 0 : err_set(err, ERR_DAMAGED, EINVAL, "state: it has no vCPU");
}

static int make_notes(struct store *store, const struct store_checkpoint *c, struct dump *dump, struct buf *notes, struct err *err)
{
	CLEANUP_BUF struct buf state = BUF_INIT;
	CLEANUP_FREE struct state_section *sections = NULL;
	size_t count;
	int r = store_checkpoint_read(store, c, "state", &state, err);
	if (r == 0)
		r = state_file_parse(state.data, state.length, &sections, &count, err);
	return r == 0 ? add_vcpus(sections, count, dump, notes, err) : r;
}

static unsigned find_ranges(uint64_t memory_bytes, Elf64_Phdr loads[RANGES])
{
	uint64_t low = min_u64(memory_bytes, MEM_HOLE_START);
	const uint64_t parts[RANGES][3] = {{0, 0, low}, {MEM_HOLE_END, low, memory_bytes - low}}; /* gpa, place in RAM, bytes */
	unsigned count = 0;
	for (unsigned i = 0; i < RANGES; i++)
		if (parts[i][2])
			loads[count++] = (Elf64_Phdr){.p_type = PT_LOAD,
						      .p_flags = PF_R | PF_W | PF_X,
						      .p_offset = parts[i][1],
						      .p_vaddr = parts[i][0],
						      .p_paddr = parts[i][0],
						      .p_filesz = parts[i][2],
						      .p_memsz = parts[i][2],
						      .p_align = PAGE_BYTES};
	return count;
}

static int write_headers(struct writing *w, const struct buf *notes, struct err *err)
{
	Elf64_Phdr headers[1 + RANGES] = {{0}};
	unsigned loads = find_ranges(w->dump->memory_bytes, headers + 1);
	size_t table = (1 + loads) * sizeof(*headers);
	Elf64_Ehdr elf = {.e_ident = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, EV_CURRENT},
			  .e_type = ET_CORE,
			  .e_machine = core_machine(),
			  .e_version = EV_CURRENT,
			  .e_phoff = sizeof(elf),
			  .e_ehsize = sizeof(elf),
			  .e_phentsize = sizeof(*headers),
			  .e_phnum = (Elf64_Half)(1 + loads)};
	w->data = round_up(sizeof(elf) + table + notes->length, PAGE_BYTES);
	headers[0] = (Elf64_Phdr){.p_type = PT_NOTE, .p_offset = sizeof(elf) + table, .p_filesz = notes->length, .p_memsz = notes->length, .p_align = 4};
	for (unsigned i = 1; i <= loads; i++)
		headers[i].p_offset += w->data;
	int r = file_pwrite_full(w->fd, &elf, sizeof(elf), 0, err);
	if (r == 0)
		r = file_pwrite_full(w->fd, headers, table, sizeof(elf), err);
	if (r == 0)
		r = file_pwrite_full(w->fd, notes->data, notes->length, sizeof(elf) + table, err);
	if (r == 0 && ftruncate(w->fd, (off_t)(w->data + w->dump->memory_bytes)) != 0)
		r = err_sys(err, errno, "its length");
	return r;
}

/* --- memory --- */

static int write_extent(struct writing *w, const struct index_extent *extent, struct err *err)
{
	struct dump *dump = w->dump;
	for (uint64_t done = 0, n; done < extent->count; done += n) {
		uint64_t page = extent->first + done;
		n = min_u64(extent->count - done, RESTORE_CHUNK_PAGES);
		if (dump->cancel && *dump->cancel)
			return err_set(err, ERR_FAILED, ECANCELED, "cancelled");
		int r = restore_read(&w->layers, extent->layer, page, n, w->chunk, err);
		if (r == 0)
			r = file_pwrite_full(w->fd, w->chunk, n * PAGE_BYTES, w->data + page * PAGE_BYTES, err);
		if (r != 0)
			return r;
		dump->written_bytes += n * PAGE_BYTES;
		if (dump->progress)
			dump->progress(dump->opaque, (page + n) * PAGE_BYTES, dump->memory_bytes);
	}
	return 0;
}

static int write_memory(struct writing *w, struct store *store, const struct store_checkpoint *c, struct err *err)
{
	CLEANUP_BUF struct buf data = BUF_INIT;
	struct page_index index = {0};
	int r = store_checkpoint_read(store, c, "index", &data, err);
	if (r == 0)
		r = page_index_decode(data.data, data.length, &index, err);
	if (r == 0 && index.page_count != c->memory_bytes / PAGE_BYTES)
		r = err_set(err, ERR_DAMAGED, EINVAL, "index: its size is not that of the memory");
	if (r == 0)
		r = restore_init(&w->layers, store, &index, err);
	for (uint64_t i = 0; i < index.extent_count && r == 0; i++)
		if (index.extents[i].layer != INDEX_ZERO_LAYER)
			r = write_extent(w, &index.extents[i], err);
	if (w->layers.layers)
		restore_close(&w->layers);
	page_index_free(&index);
	return r;
}

static int write_all(struct writing *w, struct store *store, const char *id, struct err *err)
{
	CLEANUP_BUF struct buf notes = BUF_INIT;
	struct store_checkpoint c;
	int r = store_checkpoint_get(store, id, &c, err);
	if (r != 0)
		return r;
	w->dump->memory_bytes = c.memory_bytes;
	r = make_notes(store, &c, w->dump, &notes, err);
	if (r == 0)
		r = write_headers(w, &notes, err);
	if (r == 0)
		r = write_memory(w, store, &c, err);
	if (r == 0 && fsync(w->fd) != 0)
		r = err_sys(err, errno, "%s", w->dump->path);
	store_checkpoint_free(&c);
	return r;
}

/* --- the file --- */

static int sync_folder_of(const char *path, struct err *err)
{
	const char *slash = strrchr(path, '/');
	CLEANUP_FREE char *folder = !slash ? xstrdup(".") : slash == path ? xstrdup("/") : strndup(path, (size_t)(slash - path));
	CLEANUP_CLOSE int dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return dir < 0 ? err_sys(err, errno, "%s", folder) : file_sync_dir(dir, err);
}

static int dump_pinned(struct store *store, const char *id, struct dump *dump, struct err *err)
{
	CLEANUP_FREE char *temporary = xasprintf("%s.tmp-XXXXXX", dump->path);
	struct writing w = {.dump = dump, .chunk = NULL};
	struct stat st;
	if (stat(dump->path, &st) == 0 && !S_ISREG(st.st_mode)) {
		err_set(err, ERR_USAGE, EINVAL, "%s: is no file", dump->path);
		return err_hint(err, "a core file has holes and is written in no order: name a file");
	}
	w.fd = mkostemp(temporary, O_CLOEXEC);
	if (w.fd < 0)
		return err_sys(err, errno, "%s", dump->path);
	w.chunk = malloc((size_t)RESTORE_CHUNK_PAGES * PAGE_BYTES);
	int r = w.chunk ? write_all(&w, store, id, err) : err_sys(err, ENOMEM, "buffer");
	close(w.fd);
	free(w.chunk);
	if (r == 0 && rename(temporary, dump->path) != 0)
		r = err_sys(err, errno, "%s", dump->path);
	if (r != 0)
		unlink(temporary);
	return r == 0 ? sync_folder_of(dump->path, err) : r;
}

int store_dump(struct store *store, const char *id, struct dump *dump, struct err *err)
{
	struct store_pin *pin;
	dump->written_bytes = 0;
	dump->cpus = 0;
	int r = store_pin(store, id, &pin, err);
	if (r != 0)
		return r;
	r = dump_pinned(store, id, dump, err);
	store_unpin(pin);
	return r;
}
