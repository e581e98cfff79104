#include "checkpoint/state_file.h"

#include <cbor.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define FILE_NAME     "vmcp-state"
#define FILE_VERSION  1u
#define SECTION_ITEMS 7u
/* Least bytes of a section: seven items, the checksum with 9. Bounds what a hostile count can make us allocate. */
#define SECTION_MIN_BYTES 8u

static const char *const kind_names[] = {[STATE_SECTION_STATE] = "state", [STATE_SECTION_LOG] = "log"};

/* --- writing --- */

static int add_uint(struct buf *out, uint64_t value, struct err *err)
{
	uint8_t item[9];
	return buf_append(out, item, cbor_encode_uint(value, item, sizeof(item)), err);
}

static int add_array(struct buf *out, size_t count, struct err *err)
{
	uint8_t item[9];
	return buf_append(out, item, cbor_encode_array_start(count, item, sizeof(item)), err);
}

static int add_text(struct buf *out, const char *text, struct err *err)
{
	uint8_t item[9];
	int r = buf_append(out, item, cbor_encode_string_start(strlen(text), item, sizeof(item)), err);
	return r != 0 ? r : buf_append(out, text, strlen(text), err);
}

static int add_bytes(struct buf *out, const uint8_t *data, size_t length, struct err *err)
{
	uint8_t item[9];
	int r = buf_append(out, item, cbor_encode_bytestring_start(length, item, sizeof(item)), err);
	return r != 0 || length == 0 ? r : buf_append(out, data, length, err);
}

int state_file_start(struct buf *out, size_t section_count, struct err *err)
{
	int r = add_array(out, section_count + 2, err);
	if (r == 0)
		r = add_text(out, FILE_NAME, err);
	return r == 0 ? add_uint(out, FILE_VERSION, err) : r;
}

int state_file_add(struct buf *out, const struct state_section *section, struct err *err)
{
	int r = add_array(out, SECTION_ITEMS, err);
	if (r == 0)
		r = add_text(out, kind_names[section->kind], err);
	if (r == 0)
		r = add_text(out, section->id, err);
	if (r == 0)
		r = add_uint(out, section->instance, err);
	if (r == 0)
		r = add_uint(out, section->version, err);
	if (r == 0)
		r = add_uint(out, section->length, err);
	if (r == 0)
		r = add_uint(out, XXH3_64bits(section->body, section->length), err);
	return r == 0 ? add_bytes(out, section->body, section->length, err) : r;
}

/* --- reading: libcbor's streaming decoder, which allocates nothing and hands out pointers into the input --- */

enum item_type { ITEM_OTHER, ITEM_UINT, ITEM_TEXT, ITEM_BYTES, ITEM_ARRAY };

struct item {
	enum item_type type;
	uint64_t value; /* of an integer; elements of an array */
	const uint8_t *data;
	size_t length;
};

struct reader {
	const uint8_t *data;
	size_t length, at;
	struct item item;
};

static void set_uint(void *context, uint64_t value)
{
	*(struct item *)context = (struct item){.type = ITEM_UINT, .value = value};
}
static void on_uint8(void *context, uint8_t value) { set_uint(context, value); }
static void on_uint16(void *context, uint16_t value) { set_uint(context, value); }
static void on_uint32(void *context, uint32_t value) { set_uint(context, value); }
static void on_uint64(void *context, uint64_t value) { set_uint(context, value); }
static void on_bytes(void *context, cbor_data data, size_t length)
{
	*(struct item *)context = (struct item){.type = ITEM_BYTES, .data = data, .length = length};
}
static void on_text(void *context, cbor_data data, size_t length)
{
	*(struct item *)context = (struct item){.type = ITEM_TEXT, .data = data, .length = length};
}
static void on_array(void *context, size_t count)
{
	*(struct item *)context = (struct item){.type = ITEM_ARRAY, .value = count};
}

static int damaged(struct err *err, const struct reader *reader, const char *what)
{
	return err_set(err, ERR_DAMAGED, EINVAL, "state file: %s, at byte %zu", what, reader->at);
}

/* The next item, which must be of that type. */
static int next(struct reader *reader, enum item_type type, const char *what, struct err *err)
{
	struct cbor_callbacks callbacks = cbor_empty_callbacks;
	callbacks.uint8 = on_uint8;
	callbacks.uint16 = on_uint16;
	callbacks.uint32 = on_uint32;
	callbacks.uint64 = on_uint64;
	callbacks.byte_string = on_bytes;
	callbacks.string = on_text;
	callbacks.array_start = on_array;
	reader->item = (struct item){.type = ITEM_OTHER};
	struct cbor_decoder_result result = {.status = CBOR_DECODER_NEDATA};
	if (reader->at < reader->length)
		result = cbor_stream_decode(reader->data + reader->at, reader->length - reader->at, &callbacks,
					    &reader->item);
	if (result.status != CBOR_DECODER_FINISHED || reader->item.type != type)
		return damaged(err, reader, what);
	reader->at += result.read;
	return 0;
}

static int next_u32(struct reader *reader, const char *what, uint32_t *out, struct err *err)
{
	int r = next(reader, ITEM_UINT, what, err);
	if (r == 0 && reader->item.value > UINT32_MAX)
		r = damaged(err, reader, what);
	*out = (uint32_t)reader->item.value;
	return r;
}

static bool text_is(const struct item *item, const char *text)
{
	return item->length == strlen(text) && memcmp(item->data, text, item->length) == 0;
}

static int read_names(struct reader *reader, struct state_section *out, struct err *err)
{
	int r = next(reader, ITEM_TEXT, "no kind of section", err);
	if (r != 0)
		return r;
	if (text_is(&reader->item, kind_names[STATE_SECTION_STATE]))
		out->kind = STATE_SECTION_STATE;
	else if (text_is(&reader->item, kind_names[STATE_SECTION_LOG]))
		out->kind = STATE_SECTION_LOG;
	else
		return damaged(err, reader, "an unknown kind of section");
	r = next(reader, ITEM_TEXT, "no component id", err);
	if (r != 0)
		return r;
	const struct item *item = &reader->item;
	if (item->length == 0 || item->length >= sizeof(out->id))
		return damaged(err, reader, "a component id of a wrong length");
	for (size_t i = 0; i < item->length; i++) {
		if (item->data[i] < 0x21 || item->data[i] > 0x7e)
			return damaged(err, reader, "a component id that is no name");
	}
	memcpy(out->id, item->data, item->length);
	return 0;
}

static int read_section(struct reader *reader, struct state_section *out, struct err *err)
{
	*out = (struct state_section){0};
	int r = next(reader, ITEM_ARRAY, "no section", err);
	if (r == 0 && reader->item.value != SECTION_ITEMS)
		r = damaged(err, reader, "a section with another number of items");
	if (r == 0)
		r = read_names(reader, out, err);
	if (r == 0)
		r = next_u32(reader, "no instance", &out->instance, err);
	if (r == 0)
		r = next_u32(reader, "no version", &out->version, err);
	if (r == 0)
		r = next(reader, ITEM_UINT, "no length", err);
	uint64_t length = reader->item.value;
	if (r == 0)
		r = next(reader, ITEM_UINT, "no checksum", err);
	uint64_t sum = reader->item.value;
	if (r == 0)
		r = next(reader, ITEM_BYTES, "no body", err);
	if (r != 0)
		return r;
	out->body = reader->item.data;
	out->length = reader->item.length;
	if (out->length != length)
		return damaged(err, reader, "a body of another length than its section says");
	if (XXH3_64bits(out->body, out->length) != sum)
		return err_set(err, ERR_DAMAGED, EINVAL, "state file: section %s %u: wrong checksum", out->id,
			       out->instance);
	return 0;
}

static int read_head(struct reader *reader, size_t *count, struct err *err)
{
	int r = next(reader, ITEM_ARRAY, "no state file", err);
	if (r != 0)
		return r;
	uint64_t items = reader->item.value;
	r = next(reader, ITEM_TEXT, "no state file", err);
	if (r == 0 && !text_is(&reader->item, FILE_NAME))
		r = damaged(err, reader, "no state file");
	if (r == 0)
		r = next(reader, ITEM_UINT, "no version", err);
	if (r != 0)
		return r;
	if (reader->item.value != FILE_VERSION) {
		damaged(err, reader, "unknown version");
		return err_hint(err, "it was made by another version of vmcp");
	}
	if (items < 2 || items - 2 > (reader->length - reader->at) / SECTION_MIN_BYTES)
		return damaged(err, reader, "absurd number of sections");
	*count = (size_t)items - 2;
	return 0;
}

int state_file_parse(const void *data, size_t length, struct state_section **sections, size_t *count, struct err *err)
{
	struct reader reader = {.data = data, .length = length};
	*sections = NULL;
	int r = read_head(&reader, count, err);
	if (r != 0)
		return r;
	*sections = calloc(*count + 1, sizeof(**sections));
	if (!*sections)
		return err_sys(err, ENOMEM, "state file of %zu sections", *count);
	for (size_t i = 0; i < *count && r == 0; i++)
		r = read_section(&reader, &(*sections)[i], err);
	if (r == 0 && reader.at != length)
		r = damaged(err, &reader, "bytes after the last section");
	if (r != 0) {
		free(*sections);
		*sections = NULL;
	}
	return r;
}
