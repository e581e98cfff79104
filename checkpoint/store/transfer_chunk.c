/* Chunks of an export and what is in them: docs/format.md, "Export". Everything that is decoded is untrusted. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <jansson.h>

#include "checkpoint/store/transfer_internal.h"

/* Skippable frames of zstd: other tools pass over them. */
#define START_MAGIC  0x184D2A50u
#define HEADER_MAGIC 0x184D2A51u
#define TABLE_MAGIC  0x184D2A5Eu
#define SEEKABLE_MAGIC 0x8F92EAB1u
#define TABLE_FOOTER_BYTES 9u

static const char start_text[12] = "vmcp-export\n";

void transfer_put_start(uint8_t out[TRANSFER_START_BYTES])
{
	put_le32(out, START_MAGIC);
	put_le32(out + 4, TRANSFER_START_BYTES - 8);
	memcpy(out + 8, start_text, sizeof(start_text));
	put_le32(out + 20, TRANSFER_VERSION);
}

int transfer_check_start(const uint8_t start[TRANSFER_START_BYTES], struct err *err)
{
	if (get_le32(start) != START_MAGIC || get_le32(start + 4) != TRANSFER_START_BYTES - 8 ||
	    memcmp(start + 8, start_text, sizeof(start_text)) != 0) {
		err_set(err, ERR_DAMAGED, EINVAL, "it is no export of vmcp");
		return err_hint(err, "`vmcp export CKPT FILE` makes one");
	}
	uint32_t version = get_le32(start + 20);
	if (version == 0)
		return err_set(err, ERR_DAMAGED, EINVAL, "it has no version");
	if (version <= TRANSFER_VERSION)
		return 0;
	err_set(err, ERR_FAILED, ENOTSUP, "version %u of the export is newer than this vmcp knows (%d)", version, TRANSFER_VERSION);
	return err_hint(err, "use the newer vmcp that wrote it");
}

void transfer_put_header(uint8_t out[TRANSFER_HEADER_BYTES], const struct transfer_header *h)
{
	put_le32(out, HEADER_MAGIC);
	put_le32(out + 4, TRANSFER_HEADER_BYTES - 8);
	put_le32(out + 8, h->kind);
	put_le32(out + 12, h->number);
	put_le32(out + 16, h->content_bytes);
	put_le32(out + 20, h->packed_bytes);
	put_le64(out + 24, h->sum);
}

int transfer_get_header(const uint8_t in[TRANSFER_HEADER_BYTES], uint32_t number, struct transfer_header *h, struct err *err)
{
	*h = (struct transfer_header){get_le32(in + 8), get_le32(in + 12), get_le32(in + 16), get_le32(in + 20), get_le64(in + 24)};
	if (get_le32(in) != HEADER_MAGIC || get_le32(in + 4) != TRANSFER_HEADER_BYTES - 8)
		return err_set(err, ERR_DAMAGED, EINVAL, "damaged: there is no chunk %u where it should be", number);
	if (h->number != number)
		return err_set(err, ERR_DAMAGED, EINVAL, "damaged: chunk %u is where chunk %u should be", h->number, number);
	if (h->kind < TRANSFER_HEAD || h->kind > TRANSFER_END || h->content_bytes == 0 || h->content_bytes > TRANSFER_MAX_CONTENT ||
	    h->packed_bytes == 0 || h->packed_bytes > transfer_packed_bound() || number >= TRANSFER_MAX_CHUNKS)
		return err_set(err, ERR_DAMAGED, EINVAL, "damaged: the header of chunk %u", number);
	return 0;
}

/* The header's fields are its seed, but for packed_bytes, which says how, not what. */
uint64_t transfer_sum(const struct transfer_header *h, const void *content)
{
	uint8_t fields[12];

	put_le32(fields, h->kind);
	put_le32(fields + 4, h->number);
	put_le32(fields + 8, h->content_bytes);
	return XXH3_64bits_withSeed(content, h->content_bytes, XXH3_64bits(fields, sizeof(fields)));
}

/* --- the ledger --- */

static int add_entry(struct transfer_ledger *ledger, uint32_t packed, uint32_t content, struct err *err)
{
	uint8_t entry[8];

	put_le32(entry, packed);
	put_le32(entry + 4, content);
	return buf_append(&ledger->table, entry, sizeof(entry), err);
}

int transfer_ledger_init(struct transfer_ledger *ledger, struct err *err)
{
	*ledger = (struct transfer_ledger){.sums = XXH3_createState()};
	if (!ledger->sums)
		return err_sys(err, ENOMEM, "checksums");
	XXH3_64bits_reset(ledger->sums);
	return add_entry(ledger, TRANSFER_START_BYTES, 0, err);
}

void transfer_ledger_free(struct transfer_ledger *ledger)
{
	XXH3_freeState(ledger->sums);
	buf_free(&ledger->table);
	*ledger = (struct transfer_ledger){0};
}

int transfer_ledger_add(struct transfer_ledger *ledger, const struct transfer_header *header, struct err *err)
{
	uint8_t sum[8];

	put_le64(sum, header->sum);
	XXH3_64bits_update(ledger->sums, sum, sizeof(sum));
	ledger->chunks++;
	int rc = add_entry(ledger, TRANSFER_HEADER_BYTES, 0, err);
	return rc ? rc : add_entry(ledger, header->packed_bytes, header->content_bytes, err);
}

void transfer_ledger_end(const struct transfer_ledger *ledger, uint8_t out[TRANSFER_END_BYTES])
{
	put_le64(out, ledger->chunks);
	put_le64(out + 8, XXH3_64bits_digest(ledger->sums));
}

int transfer_ledger_table(const struct transfer_ledger *ledger, struct buf *out, struct err *err)
{
	uint8_t head[8], foot[TABLE_FOOTER_BYTES];

	put_le32(head, TABLE_MAGIC);
	put_le32(head + 4, (uint32_t)ledger->table.length + TABLE_FOOTER_BYTES);
	put_le32(foot, (uint32_t)(ledger->table.length / 8));
	foot[4] = 0;
	put_le32(foot + 5, SEEKABLE_MAGIC);
	int rc = buf_append(out, head, sizeof(head), err);
	if (!rc)
		rc = buf_append(out, ledger->table.data, ledger->table.length, err);
	return rc ? rc : buf_append(out, foot, sizeof(foot), err);
}

/* --- runs --- */

static int bad_runs(struct err *err) { return err_set(err, ERR_DAMAGED, EINVAL, "damaged: its runs are none"); }

int transfer_get_runs(const uint8_t *content, size_t length, uint64_t unit, uint64_t limit, uint64_t *next, struct transfer_runs *out,
		      struct err *err)
{
	if (length < TRANSFER_RUNS_BYTES)
		return bad_runs(err);
	out->count = get_le32(content);
	out->object = get_le32(content + 4);
	out->data_bytes = 0;
	if (out->count == 0 || out->count > TRANSFER_MAX_RUNS || length - TRANSFER_RUNS_BYTES < (size_t)out->count * TRANSFER_RUN_BYTES)
		return bad_runs(err);
	for (uint32_t i = 0; i < out->count; i++) {
		const uint8_t *entry = content + TRANSFER_RUNS_BYTES + (size_t)i * TRANSFER_RUN_BYTES;
		struct transfer_run *run = &out->run[i];
		uint32_t kind = get_le32(entry + 16);

		*run = (struct transfer_run){get_le64(entry), get_le64(entry + 8), kind == 1};
		if (kind > 1 || get_le32(entry + 20) || run->count == 0 || run->first < *next || !range_within(run->first, run->count, limit))
			return bad_runs(err);
		*next = run->first + run->count;
		if (run->data && run->count > TRANSFER_DATA_BYTES / unit)
			return bad_runs(err);
		out->data_bytes += run->data ? run->count * unit : 0;
	}
	size_t head = TRANSFER_RUNS_BYTES + (size_t)out->count * TRANSFER_RUN_BYTES;
	if (out->data_bytes != length - head)
		return bad_runs(err);
	out->data = content + head;
	return 0;
}

size_t transfer_put_runs(uint8_t *content, const struct transfer_runs *runs)
{
	size_t head = TRANSFER_RUNS_BYTES + (size_t)runs->count * TRANSFER_RUN_BYTES;

	memmove(content + head, content + TRANSFER_DATA_AT, runs->data_bytes);
	put_le32(content, runs->count);
	put_le32(content + 4, runs->object);
	for (uint32_t i = 0; i < runs->count; i++) {
		uint8_t *entry = content + TRANSFER_RUNS_BYTES + (size_t)i * TRANSFER_RUN_BYTES;

		put_le64(entry, runs->run[i].first);
		put_le64(entry + 8, runs->run[i].count);
		put_le32(entry + 16, runs->run[i].data);
		put_le32(entry + 20, 0);
	}
	return head + runs->data_bytes;
}

/* --- the head --- */

int transfer_head_encode(const struct transfer_head *head, struct buf *out, struct err *err)
{
	json_t *disks = json_array(), *since = json_null();
	char sum[17];

	for (uint32_t i = 0; i < head->disk_count; i++)
		json_array_append_new(disks, json_pack("{s:s, s:I, s:b, s:b}", "name", head->disks[i].name, "size_bytes",
						       (json_int_t)head->disks[i].size_bytes, "readonly", head->disks[i].readonly,
						       "kept", head->disks[i].kept));
	if (head->since[0]) {
		snprintf(sum, sizeof(sum), "%016" PRIx64, head->since_state_xxh3);
		since = json_pack("{s:s, s:I, s:s}", "id", head->since, "created_wall_ns", (json_int_t)head->since_created_ns, "state_xxh3", sum);
	}
	json_t *json = json_pack("{s:s, s:s, s:o, s:o}", "id", head->id, "tag", head->tag, "since", since, "disks", disks);
	char *text = json ? json_dumps(json, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
	json_decref(json);
	if (!text)
		return err_sys(err, ENOMEM, "head of the export");
	int rc = buf_append(out, text, strlen(text), err);
	free(text);
	return rc;
}

static bool get_text(const json_t *object, const char *key, char *out, size_t size)
{
	const json_t *value = json_object_get(object, key);

	if (!json_is_string(value) || json_string_length(value) >= size || strlen(json_string_value(value)) != json_string_length(value))
		return false;
	memcpy(out, json_string_value(value), json_string_length(value) + 1);
	return true;
}

static bool get_number(const json_t *object, const char *key, uint64_t *out)
{
	const json_t *value = json_object_get(object, key);

	*out = (uint64_t)json_integer_value(value);
	return json_is_integer(value) && json_integer_value(value) >= 0;
}

static bool get_disk(const json_t *object, struct transfer_head_disk *disk)
{
	const json_t *readonly = json_object_get(object, "readonly"), *kept = json_object_get(object, "kept");

	disk->readonly = json_is_true(readonly);
	disk->kept = json_is_true(kept);
	return get_text(object, "name", disk->name, sizeof(disk->name)) && store_check_name("disk", disk->name, NULL) == 0 &&
	       get_number(object, "size_bytes", &disk->size_bytes) && disk->size_bytes % 512 == 0 && json_is_boolean(readonly) &&
	       json_is_boolean(kept) && (!disk->kept || disk->readonly);
}

static bool get_since(const json_t *since, struct transfer_head *out)
{
	char sum[17], *end;

	if (json_is_null(since))
		return true;
	if (!get_text(since, "id", out->since, sizeof(out->since)) || !store_is_id(out->since) ||
	    !get_number(since, "created_wall_ns", &out->since_created_ns) || !get_text(since, "state_xxh3", sum, sizeof(sum)))
		return false;
	out->since_state_xxh3 = strtoull(sum, &end, 16);
	return strspn(sum, "0123456789abcdef") == 16 && !*end;
}

static bool get_head(const json_t *json, struct transfer_head *out)
{
	const json_t *disks = json_object_get(json, "disks");

	if (!get_text(json, "id", out->id, sizeof(out->id)) || !store_is_id(out->id) || !get_text(json, "tag", out->tag, sizeof(out->tag)) ||
	    (out->tag[0] && store_check_name("tag", out->tag, NULL)) || !json_is_array(disks) || json_array_size(disks) > TRANSFER_MAX_DISKS ||
	    !get_since(json_object_get(json, "since"), out))
		return false;
	out->disk_count = (uint32_t)json_array_size(disks);
	for (uint32_t i = 0; i < out->disk_count; i++) {
		if (!get_disk(json_array_get(disks, i), &out->disks[i]) || (out->disks[i].kept && !out->since[0]))
			return false;
		for (uint32_t j = 0; j < i; j++)
			if (!strcmp(out->disks[i].name, out->disks[j].name))
				return false;
	}
	return true;
}

int transfer_head_decode(const void *data, size_t length, struct transfer_head *out, struct err *err)
{
	json_error_t why;
	json_t *json = json_loadb(data, length, JSON_REJECT_DUPLICATES, &why);

	*out = (struct transfer_head){0};
	bool good = json && get_head(json, out);
	json_decref(json);
	return good ? 0 : err_set(err, ERR_DAMAGED, EINVAL, "damaged: its head is none");
}
