/*
 * The item layer is libcbor's streaming decoder: one item per call, stateless, without allocation. Which item may
 * come next is decided by the table alone, so hostile input can neither nest deeper than the tables do nor ask for
 * memory.
 */
#include "base/codec.h"

#include <cbor.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"

enum { MAX_DEPTH = 16, MAX_FIELDS = 256 };

/* --- where we are, for errors --- */

struct place {
	const struct place *parent;
	const struct codec_table *table; /* of the struct that holds the field */
	const char *field;		 /* NULL: the struct itself */
	size_t field_length;
	bool indexed;
	uint64_t index;
};

static void append_text(char *out, size_t capacity, size_t *used, const char *text, size_t length)
{
	for (size_t i = 0; i < length && *used + 1 < capacity; i++) {
		unsigned char c = (unsigned char)text[i];
		out[(*used)++] = c < 0x20 || c > 0x7e ? '?' : text[i];
	}
	out[*used] = '\0';
}

/* "a.b[3].c", outermost first. */
static void append_path(char *out, size_t capacity, size_t *used, const struct place *place)
{
	if (place == NULL || place->field == NULL)
		return;
	append_path(out, capacity, used, place->parent);
	if (*used > 0)
		append_text(out, capacity, used, ".", 1);
	append_text(out, capacity, used, place->field, place->field_length > 40 ? 40 : place->field_length);
	if (place->indexed) {
		char index[24];
		int n = snprintf(index, sizeof(index), "[%llu]", (unsigned long long)place->index);
		append_text(out, capacity, used, index, (size_t)n);
	}
}

static int fail(const struct place *place, enum err_class class, struct err *err, const char *why)
{
	char path[256] = "";
	size_t used = 0;
	const struct place *root = place;

	append_path(path, sizeof(path), &used, place);
	while (root->parent != NULL)
		root = root->parent;
	if (used == 0)
		return err_set(err, class, EINVAL, "state of %s: %s", root->table->name, why);
	return err_set(err, class, EINVAL, "state of %s: field %s: %s", root->table->name, path, why);
}

static int damaged(const struct place *place, struct err *err, const char *why)
{
	return fail(place, ERR_DAMAGED, err, why);
}

/* --- tables are ours, but a wrong one must not become a wild write --- */

static size_t width_of(enum codec_type type)
{
	switch (type) {
	case CODEC_BOOL:
		return sizeof(bool);
	case CODEC_U8:
		return 1;
	case CODEC_U16:
		return 2;
	case CODEC_U32:
		return 4;
	case CODEC_U64:
	case CODEC_I64:
		return 8;
	default:
		return 0;
	}
}

static bool is_counted(const struct codec_field *field)
{
	return field->type == CODEC_VBYTES || field->type == CODEC_VARRAY;
}

static size_t elements_of(const struct codec_field *field)
{
	return field->type == CODEC_ARRAY || field->type == CODEC_VARRAY ? field->count : 1;
}

static const char *wrong_element(const struct codec_field *field, enum codec_type type)
{
	if (type == CODEC_STRUCT)
		return field->table == NULL || field->table->size != field->size ? "size of the struct" : NULL;
	return width_of(type) != field->size ? "size of the integer" : NULL;
}

static const char *wrong_field(const struct codec_table *table, const struct codec_field *field)
{
	size_t bytes;

	if (__builtin_mul_overflow(field->size, elements_of(field), &bytes) || field->offset > table->size ||
	    bytes > table->size - field->offset)
		return "outside the struct";
	if (is_counted(field)) {
		if (table->size < sizeof(uint32_t) || field->count_offset > table->size - sizeof(uint32_t))
			return "count outside the struct";
		/* A second writer of the count could raise it above what this field has room for. */
		for (const struct codec_field *other = table->fields; other->name != NULL; other++) {
			size_t end = other->offset + other->size * elements_of(other);
			if (other->offset < field->count_offset + sizeof(uint32_t) && field->count_offset < end)
				return "its count is a field too";
			if (other != field && is_counted(other) && other->count_offset == field->count_offset)
				return "its count is shared";
		}
	}
	switch (field->type) {
	case CODEC_BYTES:
	case CODEC_VBYTES:
		return NULL;
	case CODEC_ARRAY:
	case CODEC_VARRAY:
		return wrong_element(field, field->element);
	default:
		return wrong_element(field, field->type);
	}
}

static int check_table(const struct place *place, const struct codec_table *table, unsigned depth, size_t *fields,
		       struct err *err)
{
	size_t n = 0;

	if (depth > MAX_DEPTH)
		return fail(place, ERR_FAILED, err, "codec table: nested too deep");
	for (const struct codec_field *field = table->fields; field->name != NULL; field++) {
		const char *wrong = wrong_field(table, field);
		if (wrong != NULL) {
			struct place here = {place, table, field->name, strlen(field->name), false, 0};
			return fail(&here, ERR_FAILED, err, wrong);
		}
		n++;
	}
	if (n > MAX_FIELDS)
		return fail(place, ERR_FAILED, err, "codec table: too many fields");
	*fields = n;
	return 0;
}

/* --- encoding --- */

static int put_head(struct buf *out, size_t (*encode)(size_t, unsigned char *, size_t), uint64_t value, struct err *err)
{
	unsigned char head[9];
	return buf_append(out, head, encode(value, head, sizeof(head)), err);
}

static int put_uint(struct buf *out, uint64_t value, struct err *err)
{
	unsigned char head[9];
	return buf_append(out, head, cbor_encode_uint(value, head, sizeof(head)), err);
}

static int put_negint(struct buf *out, int64_t value, struct err *err)
{
	unsigned char head[9];
	return buf_append(out, head, cbor_encode_negint(~(uint64_t)value, head, sizeof(head)), err);
}

static int encode_integer(enum codec_type type, const uint8_t *at, struct buf *out, struct err *err)
{
	union {
		uint8_t u8;
		uint16_t u16;
		uint32_t u32;
		uint64_t u64;
		int64_t i64;
	} v;

	memcpy(&v, at, width_of(type));
	switch (type) {
	case CODEC_BOOL:
		return put_uint(out, v.u8 != 0, err);
	case CODEC_U8:
		return put_uint(out, v.u8, err);
	case CODEC_U16:
		return put_uint(out, v.u16, err);
	case CODEC_U32:
		return put_uint(out, v.u32, err);
	case CODEC_U64:
		return put_uint(out, v.u64, err);
	default:
		return v.i64 < 0 ? put_negint(out, v.i64, err) : put_uint(out, v.u64, err);
	}
}

static int encode_struct(const struct place *place, const struct codec_table *table, const uint8_t *object,
			 unsigned depth, struct buf *out, struct err *err);

static int encode_value(const struct place *place, enum codec_type type, const struct codec_field *field,
			const uint8_t *at, unsigned depth, struct buf *out, struct err *err)
{
	if (type == CODEC_STRUCT)
		return encode_struct(place, field->table, at, depth + 1, out, err);
	return encode_integer(type, at, out, err);
}

static int encode_field(struct place *place, const struct codec_field *field, const uint8_t *object, unsigned depth,
			struct buf *out, struct err *err)
{
	const uint8_t *at = object + field->offset;
	uint32_t used = 0;
	size_t length;
	int ret;

	if (is_counted(field))
		memcpy(&used, object + field->count_offset, sizeof(used));
	switch (field->type) {
	case CODEC_BYTES:
	case CODEC_VBYTES:
		length = field->type == CODEC_VBYTES ? used : field->size;
		if (length > field->size)
			return fail(place, ERR_FAILED, err, "more bytes in use than the field has");
		ret = put_head(out, cbor_encode_bytestring_start, length, err);
		return ret != 0 || length == 0 ? ret : buf_append(out, at, length, err);
	case CODEC_ARRAY:
	case CODEC_VARRAY:
		length = field->type == CODEC_VARRAY ? used : field->count;
		if (length > field->count)
			return fail(place, ERR_FAILED, err, "more elements in use than the field has");
		ret = put_head(out, cbor_encode_array_start, length, err);
		place->indexed = true;
		for (size_t i = 0; ret == 0 && i < length; i++) {
			place->index = i;
			ret = encode_value(place, field->element, field, at + i * field->size, depth, out, err);
		}
		return ret;
	default:
		return encode_value(place, field->type, field, at, depth, out, err);
	}
}

/* What is read as zero where it is missing is not written as zero. */
static bool is_missing(const struct codec_field *field, const uint8_t *object)
{
	const uint8_t *from = object + (is_counted(field) ? field->count_offset : field->offset);
	size_t bytes = is_counted(field) ? sizeof(uint32_t) : field->size * elements_of(field);

	return (field->flags & CODEC_OPTIONAL) && bytes_are_zero(from, bytes);
}

static int encode_struct(const struct place *place, const struct codec_table *table, const uint8_t *object,
			 unsigned depth, struct buf *out, struct err *err)
{
	size_t fields;
	int ret = check_table(place, table, depth, &fields, err);

	for (const struct codec_field *field = table->fields; ret == 0 && field->name != NULL; field++)
		fields -= is_missing(field, object);
	if (ret == 0)
		ret = put_head(out, cbor_encode_map_start, fields, err);
	for (const struct codec_field *field = table->fields; ret == 0 && field->name != NULL; field++) {
		size_t name_length = strlen(field->name);
		struct place here = {place, table, field->name, name_length, false, 0};
		if (is_missing(field, object))
			continue;
		ret = put_head(out, cbor_encode_string_start, name_length, err);
		if (ret == 0)
			ret = buf_append(out, field->name, name_length, err);
		if (ret == 0)
			ret = encode_field(&here, field, object, depth, out, err);
	}
	return ret;
}

int codec_encode(const struct codec_table *table, const void *object, struct buf *out, struct err *err)
{
	struct place root = {.table = table};
	size_t before = out->length;
	int ret = encode_struct(&root, table, object, 0, out, err);

	if (ret != 0)
		out->length = before;
	return ret;
}

/* --- decoding: items --- */

enum item_kind {
	ITEM_OTHER, /* tags, floats, null, booleans, break */
	ITEM_UINT,
	ITEM_NEGINT,
	ITEM_BYTES,
	ITEM_TEXT,
	ITEM_ARRAY,
	ITEM_MAP,
	ITEM_INDEFINITE,
};

struct item {
	enum item_kind kind;
	uint64_t value; /* of an integer (negative: -1 - value), length of the others */
	const uint8_t *data;
};

static void on_uint(void *context, uint64_t value)
{
	*(struct item *)context = (struct item){.kind = ITEM_UINT, .value = value};
}
static void on_uint8(void *context, uint8_t value) { on_uint(context, value); }
static void on_uint16(void *context, uint16_t value) { on_uint(context, value); }
static void on_uint32(void *context, uint32_t value) { on_uint(context, value); }
static void on_negint(void *context, uint64_t value)
{
	*(struct item *)context = (struct item){.kind = ITEM_NEGINT, .value = value};
}
static void on_negint8(void *context, uint8_t value) { on_negint(context, value); }
static void on_negint16(void *context, uint16_t value) { on_negint(context, value); }
static void on_negint32(void *context, uint32_t value) { on_negint(context, value); }
static void on_bytes(void *context, cbor_data data, size_t length)
{
	*(struct item *)context = (struct item){.kind = ITEM_BYTES, .value = length, .data = data};
}
static void on_text(void *context, cbor_data data, size_t length)
{
	*(struct item *)context = (struct item){.kind = ITEM_TEXT, .value = length, .data = data};
}
static void on_array(void *context, size_t length)
{
	*(struct item *)context = (struct item){.kind = ITEM_ARRAY, .value = length};
}
static void on_map(void *context, size_t length)
{
	*(struct item *)context = (struct item){.kind = ITEM_MAP, .value = length};
}
static void on_indefinite(void *context) { *(struct item *)context = (struct item){.kind = ITEM_INDEFINITE}; }
static void on_simple(void *context) { *(struct item *)context = (struct item){.kind = ITEM_OTHER}; }
static void on_tag(void *context, uint64_t value) { (void)value, on_simple(context); }
static void on_float(void *context, float value) { (void)value, on_simple(context); }
static void on_double(void *context, double value) { (void)value, on_simple(context); }
static void on_bool(void *context, bool value) { (void)value, on_simple(context); }

static const struct cbor_callbacks callbacks = {
	.uint8 = on_uint8,
	.uint16 = on_uint16,
	.uint32 = on_uint32,
	.uint64 = on_uint,
	.negint8 = on_negint8,
	.negint16 = on_negint16,
	.negint32 = on_negint32,
	.negint64 = on_negint,
	.byte_string_start = on_indefinite,
	.byte_string = on_bytes,
	.string = on_text,
	.string_start = on_indefinite,
	.indef_array_start = on_indefinite,
	.array_start = on_array,
	.indef_map_start = on_indefinite,
	.map_start = on_map,
	.tag = on_tag,
	.float2 = on_float,
	.float4 = on_float,
	.float8 = on_double,
	.undefined = on_simple,
	.null = on_simple,
	.boolean = on_bool,
	.indef_break = on_simple,
};

struct reader {
	const uint8_t *data;
	size_t length;
	size_t at;
	struct err *err;
};

static const char *const kind_names[] = {
	[ITEM_UINT] = "not an unsigned integer", [ITEM_NEGINT] = "not a negative integer",
	[ITEM_BYTES] = "not a byte string",	 [ITEM_TEXT] = "not a field name",
	[ITEM_ARRAY] = "not an array",		 [ITEM_MAP] = "not a map",
};

static int read_item(struct reader *reader, const struct place *place, struct item *item)
{
	if (reader->at == reader->length)
		return damaged(place, reader->err, "cut off");

	*item = (struct item){.kind = ITEM_OTHER};
	struct cbor_decoder_result result =
		cbor_stream_decode(reader->data + reader->at, reader->length - reader->at, &callbacks, item);
	if (result.status == CBOR_DECODER_NEDATA)
		return damaged(place, reader->err, "cut off");
	if (result.status != CBOR_DECODER_FINISHED || result.read == 0 || result.read > reader->length - reader->at)
		return damaged(place, reader->err, "not CBOR");
	if (item->kind == ITEM_INDEFINITE)
		return damaged(place, reader->err, "of indefinite length");
	reader->at += result.read;
	return 0;
}

static int read_kind(struct reader *reader, const struct place *place, enum item_kind kind, struct item *item)
{
	int ret = read_item(reader, place, item);

	if (ret == 0 && item->kind != kind)
		return damaged(place, reader->err, kind_names[kind]);
	return ret;
}

/* --- decoding: values --- */

static int decode_signed(struct reader *reader, const struct place *place, uint8_t *at)
{
	struct item item;
	int ret = read_item(reader, place, &item);

	if (ret != 0)
		return ret;
	if (item.kind != ITEM_UINT && item.kind != ITEM_NEGINT)
		return damaged(place, reader->err, "not an integer");
	if (item.value > INT64_MAX)
		return damaged(place, reader->err, "too large");
	int64_t value = item.kind == ITEM_UINT ? (int64_t)item.value : -1 - (int64_t)item.value;
	memcpy(at, &value, sizeof(value));
	return 0;
}

static int decode_integer(struct reader *reader, const struct place *place, enum codec_type type, uint8_t *at)
{
	struct item item;
	uint64_t limit = type == CODEC_BOOL  ? 1
			 : type == CODEC_U8  ? UINT8_MAX
			 : type == CODEC_U16 ? UINT16_MAX
			 : type == CODEC_U32 ? UINT32_MAX
					     : UINT64_MAX;

	if (type == CODEC_I64)
		return decode_signed(reader, place, at);
	int ret = read_kind(reader, place, ITEM_UINT, &item);
	if (ret != 0)
		return ret;
	if (item.value > limit)
		return damaged(place, reader->err, "too large");
	/* The host is little-endian: the low bytes are the narrower integer. */
	memcpy(at, &item.value, width_of(type));
	return 0;
}

static int decode_struct(struct reader *reader, const struct place *place, const struct codec_table *table,
			 uint8_t *object, unsigned depth);

static int decode_value(struct reader *reader, const struct place *place, enum codec_type type,
			const struct codec_field *field, uint8_t *at, unsigned depth)
{
	if (type == CODEC_STRUCT)
		return decode_struct(reader, place, field->table, at, depth + 1);
	return decode_integer(reader, place, type, at);
}

static int decode_bytes(struct reader *reader, const struct place *place, const struct codec_field *field,
			uint8_t *object)
{
	struct item item;
	int ret = read_kind(reader, place, ITEM_BYTES, &item);

	if (ret != 0)
		return ret;
	if (item.value > field->size || (field->type == CODEC_BYTES && item.value != field->size))
		return damaged(place, reader->err, "wrong number of bytes");
	if (item.value > 0)
		memcpy(object + field->offset, item.data, item.value);
	if (field->type == CODEC_VBYTES) {
		uint32_t used = (uint32_t)item.value;
		memcpy(object + field->count_offset, &used, sizeof(used));
	}
	return 0;
}

static int decode_array(struct reader *reader, struct place *place, const struct codec_field *field, uint8_t *object,
			unsigned depth)
{
	struct item item;
	int ret = read_kind(reader, place, ITEM_ARRAY, &item);

	if (ret != 0)
		return ret;
	if (item.value > field->count || (field->type == CODEC_ARRAY && item.value != field->count))
		return damaged(place, reader->err, "wrong number of elements");
	place->indexed = true;
	for (uint64_t i = 0; ret == 0 && i < item.value; i++) {
		place->index = i;
		ret = decode_value(reader, place, field->element, field, object + field->offset + i * field->size,
				   depth);
	}
	if (field->type == CODEC_VARRAY) {
		uint32_t used = (uint32_t)item.value;
		memcpy(object + field->count_offset, &used, sizeof(used));
	}
	return ret;
}

static int decode_field(struct reader *reader, struct place *place, const struct codec_field *field, uint8_t *object,
			unsigned depth)
{
	switch (field->type) {
	case CODEC_BYTES:
	case CODEC_VBYTES:
		return decode_bytes(reader, place, field, object);
	case CODEC_ARRAY:
	case CODEC_VARRAY:
		return decode_array(reader, place, field, object, depth);
	default:
		return decode_value(reader, place, field->type, field, object + field->offset, depth);
	}
}

static const struct codec_field *find_field(const struct codec_table *table, const uint8_t *name, uint64_t length)
{
	for (const struct codec_field *field = table->fields; field->name != NULL; field++) {
		if (strlen(field->name) == length && memcmp(field->name, name, length) == 0)
			return field;
	}
	return NULL;
}

static int check_missing(struct reader *reader, const struct place *place, const struct codec_table *table,
			 const uint64_t *seen)
{
	size_t i = 0;

	for (const struct codec_field *field = table->fields; field->name != NULL; field++, i++) {
		if (!(seen[i / 64] >> (i % 64) & 1) && !(field->flags & CODEC_OPTIONAL)) {
			struct place here = {place, table, field->name, strlen(field->name), false, 0};
			return damaged(&here, reader->err, "missing");
		}
	}
	return 0;
}

/* The object is zeroed already. */
static int decode_struct(struct reader *reader, const struct place *place, const struct codec_table *table,
			 uint8_t *object, unsigned depth)
{
	uint64_t seen[MAX_FIELDS / 64] = {0};
	size_t fields;
	struct item map;

	int ret = check_table(place, table, depth, &fields, reader->err);
	if (ret != 0)
		return ret;
	ret = read_kind(reader, place, ITEM_MAP, &map);
	if (ret != 0)
		return ret;
	/* No check of the number of entries up front: each must be known and new, so at most `fields` are read. */
	for (uint64_t i = 0; i < map.value; i++) {
		struct item key;
		ret = read_kind(reader, place, ITEM_TEXT, &key);
		if (ret != 0)
			return ret;
		struct place here = {place, table, (const char *)key.data, key.value, false, 0};
		const struct codec_field *field = find_field(table, key.data, key.value);
		if (field == NULL)
			return damaged(&here, reader->err, "unknown");
		size_t index = (size_t)(field - table->fields);
		if (seen[index / 64] >> (index % 64) & 1)
			return damaged(&here, reader->err, "repeated");
		seen[index / 64] |= (uint64_t)1 << (index % 64);
		ret = decode_field(reader, &here, field, object, depth);
		if (ret != 0)
			return ret;
	}
	return check_missing(reader, place, table, seen);
}

int codec_decode(const struct codec_table *table, const void *data, size_t length, void *object, struct err *err)
{
	struct place root = {.table = table};
	struct reader reader = {.data = data, .length = length, .err = err};

	memset(object, 0, table->size);
	int ret = decode_struct(&reader, &root, table, object, 0);
	if (ret == 0 && reader.at != length)
		return damaged(&root, err, "bytes after its end");
	return ret;
}
