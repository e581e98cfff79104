#include <criterion/criterion.h>
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "checkpoint/store/store_internal.h"

#define ID "0123456789abcdef0123456789abcdef"

static struct store_disk_layer disks[2] = {
	{.disk = "root",
	 .layer = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
	 .format = "qcow2",
	 .size_bytes = 1ull << 40,
	 .file_bytes = 12345678,
	 .xxh3 = 0xfedcba9876543210,
	 .inflight_writes = 3,
	 .inflight_reads = 4},
	{.disk = "data", .layer = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb", .format = "raw", .size_bytes = 512},
};

static const struct store_checkpoint full = {
	.id = ID,
	.parent = "00000000000000000000000000000001",
	.vm = "web",
	.vm_uuid = "11111111-2222-4333-8444-555555555555",
	.tag = "v1.0",
	.message = (char *)"before the \"upgrade\"\n\xc3\xa4",
	.created_wall_ns = 1800000000123456789,
	.live = true,
	.group = {.id = "dddddddddddddddddddddddddddddddd", .tag = "cut", .members = (char *)"web db"},
	.memory_bytes = 1ull << 30,
	.saved_pages = 5,
	.zero_pages = 6,
	.parent_pages = 7,
	.written_bytes = 20480,
	.pause_ns = 250000,
	.durable_ns = INT64_MAX,
	.cpus = 4,
	.memory_layer = "cccccccccccccccccccccccccccccccc",
	.disk_count = 2,
	.disks = disks,
	.config_text = (char *)"[vm]\nname = web\n",
	.needs = (char *)"processor: AuthenticAMD\nfeatures: fpu, avx2\n",
	.state_bytes = 1000,
	.state_xxh3 = 1,
	.index_bytes = 2000,
	.index_xxh3 = UINT64_MAX,
	.size_bytes = 99999,
};

static void encode(const struct store_checkpoint *c, struct buf *out)
{
	struct err err = ERR_INIT;
	cr_assert_eq(manifest_encode(c, out, &err), 0, "%s", err.message);
}

static bool same_text(const char *a, const char *b) { return !strcmp(a ? a : "", b ? b : ""); }

static bool same_disk(const struct store_disk_layer *a, const struct store_disk_layer *b)
{
	return same_text(a->disk, b->disk) && same_text(a->layer, b->layer) && same_text(a->format, b->format) &&
	       a->size_bytes == b->size_bytes && a->file_bytes == b->file_bytes && a->xxh3 == b->xxh3 &&
	       a->inflight_writes == b->inflight_writes && a->inflight_reads == b->inflight_reads;
}

static bool same(const struct store_checkpoint *a, const struct store_checkpoint *b)
{
	bool equal = same_text(a->id, b->id) && same_text(a->parent, b->parent) && same_text(a->vm, b->vm) &&
		     same_text(a->vm_uuid, b->vm_uuid) && same_text(a->tag, b->tag) &&
		     same_text(a->message, b->message) && same_text(a->config_text, b->config_text) && same_text(a->needs, b->needs) &&
		     same_text(a->memory_layer, b->memory_layer) && same_text(a->group.id, b->group.id) &&
		     same_text(a->group.tag, b->group.tag) && same_text(a->group.members, b->group.members) && a->created_wall_ns == b->created_wall_ns &&
		     a->live == b->live && a->memory_bytes == b->memory_bytes && a->saved_pages == b->saved_pages &&
		     a->zero_pages == b->zero_pages && a->parent_pages == b->parent_pages &&
		     a->written_bytes == b->written_bytes && a->pause_ns == b->pause_ns &&
		     a->durable_ns == b->durable_ns && a->cpus == b->cpus && a->state_bytes == b->state_bytes &&
		     a->state_xxh3 == b->state_xxh3 && a->index_bytes == b->index_bytes &&
		     a->index_xxh3 == b->index_xxh3 && a->size_bytes == b->size_bytes && a->disk_count == b->disk_count;
	for (uint32_t i = 0; equal && i < a->disk_count; i++)
		equal = same_disk(&a->disks[i], &b->disks[i]);
	return equal;
}

/* Decodes what may be anything: refused with a cause, or the very same checkpoint. True if accepted. */
static bool refused_or_same(const void *data, size_t length, const char *what, size_t where)
{
	struct store_checkpoint c;
	struct err err = ERR_INIT;
	/* A copy of its own, so that AddressSanitizer sees a read beyond the end. */
	CLEANUP_FREE char *copy = malloc(length ? length : 1);

	memcpy(copy, data, length);
	int rc = manifest_decode("m", copy, length, &c, &err);
	if (rc) {
		cr_assert_lt(rc, 0);
		cr_assert(err.class == ERR_DAMAGED || rc == -ENOTSUP, "%s at %zu: %s", what, where, err.message);
		cr_assert_eq(strncmp(err.message, "m: ", 3), 0, "%s", err.message);
		cr_assert_null(c.disks);
		return false;
	}
	cr_assert(same(&c, &full), "%s at %zu was accepted with another content", what, where);
	store_checkpoint_free(&c);
	return true;
}

Test(manifest, round_trip)
{
	CLEANUP_BUF struct buf text = BUF_INIT;

	encode(&full, &text);
	cr_assert(refused_or_same(text.data, text.length, "nothing", 0));
}

Test(manifest, round_trip_of_the_least)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	struct store_checkpoint least = {.id = ID, .vm = "v", .memory_layer = ID}, c;
	struct err err = ERR_INIT;

	encode(&least, &text);
	cr_assert_eq(manifest_decode("m", text.data, text.length, &c, &err), 0, "%s", err.message);
	cr_assert(same(&c, &least));
	cr_assert_null(c.message);
	cr_assert_str_eq(c.config_text, "");
	store_checkpoint_free(&c);
}

Test(manifest, texts_that_are_no_utf8_are_refused)
{
	struct store_disk_layer bad_disk = disks[0];
	struct store_checkpoint bad = full;
	CLEANUP_BUF struct buf text = BUF_INIT;

	bad.message = (char *)"\xff";
	cr_assert_eq(manifest_encode(&bad, &text, NULL), -EILSEQ);
	bad = full;
	bad.config_text = (char *)"kernel = /home/\xe4/vmlinuz";
	cr_assert_eq(manifest_encode(&bad, &text, NULL), -EILSEQ);
	bad = full;
	strcpy(bad_disk.disk, "\xc3");
	bad.disks = &bad_disk;
	bad.disk_count = 1;
	cr_assert_eq(manifest_encode(&bad, &text, NULL), -EILSEQ, "no disk is left out silently");
	cr_assert_eq(text.length, 0);
}

Test(manifest, every_truncation_is_refused)
{
	CLEANUP_BUF struct buf text = BUF_INIT;

	encode(&full, &text);
	for (size_t length = 0; length < text.length; length++)
		cr_assert(!refused_or_same(text.data, length, "truncated", length));
}

Test(manifest, every_flipped_bit_is_refused_or_means_the_same)
{
	CLEANUP_BUF struct buf text = BUF_INIT;

	encode(&full, &text);
	for (size_t i = 0; i < text.length; i++) {
		uint8_t right = text.data[i];
		for (unsigned bit = 0; bit < 8; bit++) {
			text.data[i] = (uint8_t)(right ^ 1u << bit);
			refused_or_same(text.data, text.length, "flipped", i);
		}
		text.data[i] = 0;
		refused_or_same(text.data, text.length, "zeroed",
				i); /* jansson takes a NUL behind a number for white space */
		text.data[i] = right;
	}
}

Test(manifest, random_mutations, .timeout = 120)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	unsigned seed = 20261;

	encode(&full, &text);
	for (int round = 0; round < 20000; round++) {
		CLEANUP_FREE uint8_t *copy = malloc(text.length + 64);
		size_t length = text.length;

		memcpy(copy, text.data, length);
		for (int n = rand_r(&seed) % 4 + 1; n > 0; n--) {
			size_t at = (size_t)rand_r(&seed) % length, span = (size_t)rand_r(&seed) % 16;

			if (span > length - at)
				span = length - at;
			switch (rand_r(&seed) % 4) {
			case 0: /* cut out */
				memmove(copy + at, copy + at + span, length - at - span);
				length -= span;
				break;
			case 1: /* double */
				if (length + span <= text.length + 64) {
					memmove(copy + at + span, copy + at, length - at);
					length += span;
				}
				break;
			case 2:
				copy[at] = (uint8_t) "{}[]\",:0-9eE.\\u\0\xff"[rand_r(&seed) % 17];
				break;
			default:
				copy[at] = (uint8_t)rand_r(&seed);
			}
		}
		refused_or_same(copy, length, "mutated", (size_t)round);
	}
}

/* --- hostile documents with a right checksum --- */

static void seal(json_t *manifest, struct buf *out)
{
	char sum[17];

	json_object_del(manifest, "xxh3");
	char *text = json_dumps(manifest, JSON_COMPACT | JSON_SORT_KEYS);
	cr_assert_not_null(text);
	snprintf(sum, sizeof(sum), "%016llx", (unsigned long long)XXH3_64bits(text, strlen(text)));
	free(text);
	json_object_set_new(manifest, "xxh3", json_string(sum));
	text = json_dumps(manifest, 0);
	buf_append(out, text, strlen(text), NULL);
	free(text);
}

static json_t *parsed(void)
{
	CLEANUP_BUF struct buf text = BUF_INIT;

	encode(&full, &text);
	json_t *manifest = json_loadb((char *)text.data, text.length, 0, NULL);
	cr_assert_not_null(manifest);
	return manifest;
}

/* Sets `path` ("a", "a.b" or "disks.0.b") to `value`, a JSON text; NULL removes it. Returns the decoder's verdict. */
static int verdict(const char *path, const char *value, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	struct store_checkpoint c;
	json_t *manifest = parsed(), *object = manifest;
	char copy[64], *rest = NULL;

	snprintf(copy, sizeof(copy), "%s", path);
	char *key = strtok_r(copy, ".", &rest);
	for (char *next; (next = strtok_r(NULL, ".", &rest)) != NULL; key = next)
		object = json_is_array(object) ? json_array_get(object, (size_t)atoi(key))
					       : json_object_get(object, key);
	if (value) {
		json_t *wanted = json_loads(value, JSON_DECODE_ANY, NULL);
		cr_assert_not_null(wanted, "%s", value);
		json_object_set_new(object, key, wanted);
	} else {
		json_object_del(object, key);
	}
	seal(manifest, &text);
	json_decref(manifest);
	int rc = manifest_decode("m", text.data, text.length, &c, err);
	if (!rc)
		store_checkpoint_free(&c);
	return rc;
}

static const char *const integers[] = {"created_wall_ns",
				       "cpus",
				       "pause_ns",
				       "durable_ns",
				       "size_bytes",
				       "memory.bytes",
				       "memory.saved_pages",
				       "memory.zero_pages",
				       "memory.parent_pages",
				       "memory.written_bytes",
				       "state.bytes",
				       "index.bytes",
				       "disks.1.size_bytes",
				       "disks.1.file_bytes",
				       "disks.1.inflight_writes",
				       "version"};
static const char *const texts[] = {"format",	    "id",	    "parent",	     "vm",
				    "vm_uuid",	    "tag",	    "message",	     "config",
				    "memory.layer", "disks.1.name", "disks.1.layer", "disks.1.format",
				    "disks.0.xxh3", "state.xxh3",   "index.xxh3"};
static const char *const others[] = {"live", "memory", "disks", "state", "index"};

static void refuse(const char *path, const char *value)
{
	struct err err = ERR_INIT;
	const char *key = strrchr(path, '.') ? strrchr(path, '.') + 1 : path;
	int rc = verdict(path, value, &err);

	cr_expect_lt(rc, 0, "%s = %.40s was accepted", path, value ? value : "(missing)");
	cr_expect(err.class == ERR_DAMAGED || rc == -ENOTSUP, "%s = %.40s: %s", path, value ? value : "", err.message);
	if (err.class == ERR_DAMAGED && strcmp(path, "format"))
		cr_expect(strstr(err.message, key) || (value && value[0] == '{'), "%s is not named: %s", path,
			  err.message);
}

Test(manifest, fields_missing_or_of_another_type)
{
	static const char *const values[] = {
		NULL, "null", "{}", "[]", "true", "1.5", "\"no\"", "-1", "9223372036854775807"};

	for (size_t v = 0; v < ARRAY_LENGTH(values); v++) {
		bool number = v >= 7;
		for (size_t i = 0; i < ARRAY_LENGTH(integers); i++)
			if (!(v == 8 && strstr(integers[i], "_ns")) &&
			    !(v == 8 && strstr(integers[i], "bytes") && strcmp(integers[i], "memory.bytes")))
				refuse(integers[i], values[v]);
		for (size_t i = 0; i < ARRAY_LENGTH(texts); i++)
			if (v != 6 || strstr(texts[i], "id") == texts[i] || strstr(texts[i], "layer") ||
			    strstr(texts[i], "xxh3"))
				refuse(texts[i], values[v]);
		for (size_t i = 0; i < ARRAY_LENGTH(others); i++)
			if (!(v == 4 && i == 0) && !(v == 3 && i == 2))
				refuse(others[i], number ? "1" : values[v]);
	}
	cr_expect_eq(verdict("live", "false", NULL), 0);
	cr_expect_eq(verdict("disks", "[]", NULL), 0);
	cr_expect_eq(verdict("parent", "\"\"", NULL), 0);
	cr_expect_eq(verdict("tag", "\"\"", NULL), 0);
}

Test(manifest, names_and_ids_that_lead_elsewhere)
{
	static const char *const ids[] = {"\"../../../../../../../../etc/pass\"",
					  "\"0123456789ABCDEF0123456789ABCDEF\"", "\"\"", "\"0123\"",
					  "\"0123456789abcdef0123456789abcdef0\""};
	static const char *const names[] = {"\"../x\"", "\"a/b\"", "\"a b\"", "\"\\n\"",
					    "\"x234567890123456789012345678901234567890123456789012345678901234\""};

	for (size_t i = 0; i < ARRAY_LENGTH(ids); i++) {
		refuse("id", ids[i]);
		refuse("memory.layer", ids[i]);
		refuse("disks.0.layer", ids[i]);
		if (i != 2)
			refuse("parent", ids[i]);
	}
	for (size_t i = 0; i < ARRAY_LENGTH(names); i++) {
		refuse("vm", names[i]);
		refuse("tag", names[i]);
		refuse("disks.0.name", names[i]);
	}
	refuse("disks.0.format", "\"qcow2000\"");
	refuse("state.xxh3", "\"0x00000000000001\"");
	refuse("state.xxh3", "\"+000000000000001\"");
	refuse("state.xxh3", "\" 00000000000001\"");
}

Test(manifest, needs)
{
	static const char *const needs[] = {"1", "null", "{}", "\"x\"", "[1]", "[null]", "[\"\"]", "[\"a: b\\nc: d\"]"};

	for (size_t i = 0; i < ARRAY_LENGTH(needs); i++)
		refuse("needs", needs[i]);
}

Test(manifest, groups)
{
	static const char *const groups[] = {"1", "null", "[]", "\"x\"", "{}"};
	static const char *const members[] = {"{}", "null", "[]", "[1]", "[null]", "[\"web\", \"../x\"]", "[\"a b\"]", "\"web\""};
	char many[STORE_GROUP_MAX * 4 + 16] = "[";

	for (size_t i = 0; i < ARRAY_LENGTH(groups); i++)
		refuse("group", groups[i]);
	for (size_t i = 0; i < ARRAY_LENGTH(members); i++)
		refuse("group.members", members[i]);
	refuse("group.members", NULL);
	refuse("group.id", "\"\"");
	refuse("group.id", NULL);
	refuse("group.tag", "\"a/b\"");
	for (unsigned i = 0; i <= STORE_GROUP_MAX; i++)
		strcat(many, i ? ",\"v\"" : "\"v\"");
	strcat(many, "]");
	refuse("group.members", many);
	cr_expect_eq(verdict("group", NULL, NULL), 0, "most are in none");
	cr_expect_eq(verdict("group.tag", "\"\"", NULL), 0);
}

Test(manifest, versions)
{
	struct err err = ERR_INIT;

	cr_assert_eq(verdict("version", "2", &err), -ENOTSUP);
	cr_assert_eq(err.class, ERR_FAILED);
	cr_assert_not_null(strstr(err.hint, "newer vmcp"));
	cr_assert_eq(verdict("version", "0", &err), -EINVAL);
	cr_assert_eq(verdict("format", "\"other\"", &err), -EINVAL);
	cr_assert_eq(err.class, ERR_DAMAGED);
	cr_assert_eq(verdict("an_unknown_field", "1", NULL), 0, "a field that this version does not know is let be");
}

static void refuse_text(const char *text, size_t length)
{
	cr_assert(!refused_or_same(text, length, "hostile", length));
}

Test(manifest, hostile_json)
{
	static const char *const documents[] = {"",
						" ",
						"null",
						"[]",
						"1",
						"\"x\"",
						"{",
						"{}",
						"{\"format\":\"vmcp-checkpoint\"}",
						"{\"a\":1,\"a\":2}",
						"{\"version\":1e999}",
						"{\"version\":99999999999999999999999}",
						"{\"a\":\"\\u0000\"}",
						"{\"a\":\"\\ud800\"}",
						"{\"a\":\"\xff\"}",
						"{}{}",
						"\xef\xbb\xbf{}"};
	for (size_t i = 0; i < ARRAY_LENGTH(documents); i++)
		refuse_text(documents[i], strlen(documents[i]));

	const size_t depth = 1u << 20;
	CLEANUP_FREE char *deep = malloc(depth + 8);
	memset(deep, '[', depth);
	refuse_text(deep, depth);
	for (size_t i = 0; i + 5 < depth; i += 5)
		memcpy(deep + i, "{\"a\":", 5);
	refuse_text(deep, depth / 5 * 5);
	memcpy(deep, "{\"a\":", 5);
	memset(deep + 5, '9', depth);
	refuse_text(deep, depth);
	memset(deep, ' ', depth);
	refuse_text(deep, depth);
}

Test(manifest, a_repeated_key_is_refused)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	CLEANUP_BUF struct buf twice = BUF_INIT;

	encode(&full, &text);
	buf_append(&twice, "{\"cpus\": 4,", 11, NULL);
	buf_append(&twice, text.data + 1, text.length - 1, NULL);
	refuse_text((char *)twice.data, twice.length);
}

Test(manifest, too_many_disks)
{
	struct store_checkpoint c = full;
	struct err err = ERR_INIT;
	CLEANUP_BUF struct buf text = BUF_INIT;

	c.disk_count = 27;
	c.disks = calloc(27, sizeof(*c.disks));
	for (int i = 0; i < 27; i++)
		c.disks[i] = disks[0];
	encode(&c, &text);
	free(c.disks);
	cr_assert_eq(manifest_decode("m", text.data, text.length, &c, &err), -ERANGE);
	cr_assert_eq(err.class, ERR_DAMAGED);
}
