#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/codec.h"

struct queue {
	uint16_t size;
	bool ready;
	uint64_t ring;
};

static const struct codec_table queue_table = {
	.name = "queue",
	.size = sizeof(struct queue),
	.fields =
		(const struct codec_field[]){
			CODEC_INT(struct queue, size, CODEC_U16),
			CODEC_INT(struct queue, ready, CODEC_U8),
			CODEC_INT(struct queue, ring, CODEC_U64),
			CODEC_END,
		},
};

struct device {
	uint8_t u8;
	uint16_t u16;
	uint32_t u32;
	uint64_t u64;
	int64_t i64;
	bool on;
	uint8_t mac[6];
	uint32_t fifo_used;
	uint8_t fifo[16];
	struct queue control;
	uint32_t regs[4];
	bool flags[3];
	struct queue fixed[2];
	uint32_t queues_used;
	struct queue queues[4];
	uint32_t late;
};

#define LATE CODEC_OPTIONAL_INT(struct device, late, CODEC_U32)

static const struct codec_table device_table = {
	.name = "device",
	.size = sizeof(struct device),
	.fields =
		(const struct codec_field[]){
			CODEC_INT(struct device, u8, CODEC_U8),
			CODEC_INT(struct device, u16, CODEC_U16),
			CODEC_INT(struct device, u32, CODEC_U32),
			CODEC_INT(struct device, u64, CODEC_U64),
			CODEC_INT(struct device, i64, CODEC_I64),
			CODEC_INT(struct device, on, CODEC_U8),
			CODEC_RAW(struct device, mac),
			CODEC_VRAW(struct device, fifo, fifo_used),
			CODEC_SUB(struct device, control, &queue_table),
			CODEC_INTS(struct device, regs, CODEC_U32),
			CODEC_INTS(struct device, flags, CODEC_U8),
			CODEC_SUBS(struct device, fixed, &queue_table),
			CODEC_VSUBS(struct device, queues, queues_used, &queue_table),
			LATE,
			CODEC_END,
		},
};

static struct device sample(void)
{
	struct device d;

	memset(&d, 0, sizeof(d)); /* the padding too, so that memcmp compares */
	d.u8 = 255;
	d.u16 = 65535;
	d.u32 = 0xffffffff;
	d.u64 = UINT64_MAX;
	d.i64 = -5;
	d.on = true;
	memcpy(d.mac, "\x52\x54\0\1\2\3", 6);
	d.fifo_used = 3;
	memcpy(d.fifo, "abc", 3);
	d.control.size = 256;
	d.control.ready = true;
	d.control.ring = 0x123456789a;
	d.regs[3] = 77;
	d.flags[1] = true;
	d.fixed[1].size = 24;
	d.queues_used = 2;
	d.queues[0].size = 8;
	d.queues[1].ring = 23;
	d.late = 9;
	return d;
}

static void encode_sample(struct buf *out)
{
	struct device d = sample();
	cr_assert_eq(codec_encode(&device_table, &d, out, NULL), 0);
}

Test(codec, round_trip)
{
	CLEANUP_BUF struct buf buf = BUF_INIT;
	struct err err = ERR_INIT;
	struct device in = sample(), out;

	encode_sample(&buf);
	memset(&out, 0xee, sizeof(out));
	cr_assert_eq(codec_decode(&device_table, buf.data, buf.length, &out, &err), 0, "%s", err.message);
	cr_assert_eq(memcmp(&in, &out, sizeof(in)), 0);
}

Test(codec, round_trip_of_extremes)
{
	static const int64_t values[] = {0,	    1,	       -1,	  23,	     24,	   -24,
					 -25,	    255,       256,	  65535,     -65536,	   65536,
					 INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, INT64_MIN + 1};

	for (size_t i = 0; i < ARRAY_LENGTH(values); i++) {
		CLEANUP_BUF struct buf buf = BUF_INIT;
		struct device in = sample(), out;
		in.i64 = values[i];
		in.u64 = (uint64_t)values[i];
		in.u32 = (uint32_t)values[i];
		in.u16 = (uint16_t)values[i];
		in.u8 = (uint8_t)values[i];
		cr_assert_eq(codec_encode(&device_table, &in, &buf, NULL), 0);
		cr_assert_eq(codec_decode(&device_table, buf.data, buf.length, &out, NULL), 0);
		cr_assert_eq(memcmp(&in, &out, sizeof(in)), 0, "value %lld", (long long)values[i]);
	}
}

Test(codec, round_trip_of_empty_and_full_lists)
{
	for (uint32_t used = 0; used <= 4; used += 4) {
		CLEANUP_BUF struct buf buf = BUF_INIT;
		struct device in = sample(), out;
		memset(in.queues, 0, sizeof(in.queues));
		memset(in.fifo, 0, sizeof(in.fifo));
		in.queues_used = used;
		in.fifo_used = used * 4;
		cr_assert_eq(codec_encode(&device_table, &in, &buf, NULL), 0);
		cr_assert_eq(codec_decode(&device_table, buf.data, buf.length, &out, NULL), 0);
		cr_assert_eq(memcmp(&in, &out, sizeof(in)), 0);
	}
}

/* The format on disk: RFC 8949, shortest heads, fields in the order of the table. */
Test(codec, the_bytes_are_the_specified_ones)
{
	static const uint8_t expected[] = "\xa3\x64size\x19\x01\x00\x65ready\x01\x64ring\x18\x18";
	CLEANUP_BUF struct buf buf = BUF_INIT;
	struct queue queue = {.size = 256, .ready = true, .ring = 24};

	cr_assert_eq(codec_encode(&queue_table, &queue, &buf, NULL), 0);
	cr_assert_eq(buf.length, sizeof(expected) - 1);
	cr_assert_eq(memcmp(buf.data, expected, buf.length), 0);
}

Test(codec, encoding_appends)
{
	CLEANUP_BUF struct buf buf = BUF_INIT;
	struct queue queue = {0}, out;

	buf_append(&buf, "head", 4, NULL);
	cr_assert_eq(codec_encode(&queue_table, &queue, &buf, NULL), 0);
	cr_assert_eq(memcmp(buf.data, "head", 4), 0);
	cr_assert_eq(codec_decode(&queue_table, buf.data + 4, buf.length - 4, &out, NULL), 0);
}

Test(codec, encoding_refuses_counts_beyond_the_field)
{
	CLEANUP_BUF struct buf buf = BUF_INIT;
	struct err err = ERR_INIT;
	struct device d = sample();

	buf_append(&buf, "head", 4, NULL);
	d.queues_used = 5;
	cr_assert_eq(codec_encode(&device_table, &d, &buf, &err), -EINVAL);
	cr_assert_not_null(strstr(err.message, "queues"), "%s", err.message);
	cr_assert_eq(buf.length, 4);
	d = sample();
	d.fifo_used = 17;
	cr_assert_eq(codec_encode(&device_table, &d, &buf, &err), -EINVAL);
	cr_assert_eq(buf.length, 4);
}

/* --- damage, on the small table, so that the bytes can be read here --- */

static const struct {
	const char *what;
	const char *bytes;
	size_t length;
	const char *names; /* the error must contain it */
} damages[] = {
#define D(what, bytes, names)                                                                                          \
	{                                                                                                              \
		what, bytes, sizeof(bytes) - 1, names                                                                  \
	}
	D("nothing at all", "", "cut off"),
	D("not a map", "\x01", "not a map"),
	D("an array", "\x80", "not a map"),
	D("empty map", "\xa0", "size"),
	D("missing field", "\xa2\x64size\x01\x65ready\x01", "ring: missing"),
	D("missing field in the middle", "\xa2\x64size\x01\x64ring\x01", "ready: missing"),
	D("unknown field", "\xa4\x64size\x01\x65ready\x01\x64ring\x01\x63new\x01", "new: unknown"),
	D("prefix of a name", "\xa3\x63siz\x01\x65ready\x01\x64ring\x01", "siz: unknown"),
	D("name with a NUL", "\xa3\x65size\0\x01\x65ready\x01\x64ring\x01", "size?: unknown"),
	D("empty name", "\xa3\x60\x01\x65ready\x01\x64ring\x01", "unknown"),
	D("repeated field", "\xa4\x64size\x01\x64size\x01\x65ready\x01\x64ring\x01", "size: repeated"),
	D("repeated instead of another", "\xa3\x64size\x01\x64size\x01\x64ring\x01", "size: repeated"),
	D("integer as a name", "\xa3\x01\x01\x65ready\x01\x64ring\x01", "not a field name"),
	D("bytes as a name", "\xa3\x44size\x01\x65ready\x01\x64ring\x01", "not a field name"),
	D("too large for 16 bits", "\xa3\x64size\x1a\0\1\0\0\x65ready\x01\x64ring\x01", "size: too large"),
	D("a bool of 2", "\xa3\x64size\x01\x65ready\x02\x64ring\x01", "ready: too large"),
	D("negative", "\xa3\x64size\x20\x65ready\x01\x64ring\x01", "size: not an unsigned"),
	D("true", "\xa3\x64size\x01\x65ready\xf5\x64ring\x01", "ready: not an unsigned"),
	D("null", "\xa3\x64size\xf6\x65ready\x01\x64ring\x01", "size: not an unsigned"),
	D("float", "\xa3\x64size\xfb\0\0\0\0\0\0\0\0\x65ready\x01\x64ring\x01", "size: not an unsigned"),
	D("half float", "\xa3\x64size\xf9\x3c\0\x65ready\x01\x64ring\x01", "size: not an unsigned"),
	D("tagged", "\xa3\x64size\xc1\x01\x65ready\x01\x64ring\x01", "size: not an unsigned"),
	D("text for a number", "\xa3\x64size\x61x\x65ready\x01\x64ring\x01", "size: not an unsigned"),
	D("break", "\xa3\x64size\xff\x65ready\x01\x64ring\x01", "size: not an unsigned"),
	D("reserved head", "\xa3\x64size\x1c\x65ready\x01\x64ring\x01", "size: not CBOR"),
	D("indefinite map", "\xbf\x64size\x01\x65ready\x01\x64ring\x01\xff", "indefinite"),
	D("indefinite name", "\xa3\x7f\x64size\xff\x01\x65ready\x01\x64ring\x01", "indefinite"),
	D("indefinite bytes", "\xa3\x64size\x5f\x41x\xff\x65ready\x01\x64ring\x01", "size: of indefinite"),
	D("indefinite array", "\xa3\x64size\x9f\xff\x65ready\x01\x64ring\x01", "size: of indefinite"),
	D("trailing byte", "\xa3\x64size\x01\x65ready\x01\x64ring\x01\0", "after its end"),
	D("trailing map", "\xa3\x64size\x01\x65ready\x01\x64ring\x01\xa0", "after its end"),
	D("map of 2^64 - 1", "\xbb\xff\xff\xff\xff\xff\xff\xff\xff\x64size\x01\x65ready\x01\x64ring\x01", "cut off"),
	D("map of 4", "\xa4\x64size\x01\x65ready\x01\x64ring\x01", "cut off"),
	D("name of 2^64 - 1", "\xa3\x7b\xff\xff\xff\xff\xff\xff\xff\xffsize", "cut off"),
	D("name of 2^63", "\xa3\x7b\x80\0\0\0\0\0\0\0size", "cut off"),
	D("deep arrays", "\xa3\x64size\x81\x81\x81\x81\x81\x81\x81\x81", "size: not an unsigned"),
#undef D
};

Test(codec, every_kind_of_damage_is_refused_and_named)
{
	for (size_t i = 0; i < ARRAY_LENGTH(damages); i++) {
		struct err err = ERR_INIT;
		struct queue queue;
		/* A copy of the exact size, so that a read past the end is seen by ASan. */
		uint8_t *copy = malloc(damages[i].length + 1);
		memcpy(copy, damages[i].bytes, damages[i].length);
		copy = realloc(copy, damages[i].length > 0 ? damages[i].length : 1);
		cr_expect_eq(codec_decode(&queue_table, copy, damages[i].length, &queue, &err), -EINVAL, "%s",
			     damages[i].what);
		cr_expect_eq(err.class, ERR_DAMAGED, "%s", damages[i].what);
		cr_expect_not_null(strstr(err.message, damages[i].names), "%s: \"%s\" lacks \"%s\"", damages[i].what,
				   err.message, damages[i].names);
		cr_expect_not_null(strstr(err.message, "queue"), "%s: %s", damages[i].what, err.message);
		free(copy);
	}
}

Test(codec, longer_heads_than_needed_are_read)
{
	static const uint8_t bytes[] = "\xb8\x03\x78\x04size\x1b\0\0\0\0\0\0\0\x05\x65ready\x18\x01\x64ring\x19\0\x07";
	struct queue queue;

	cr_assert_eq(codec_decode(&queue_table, bytes, sizeof(bytes) - 1, &queue, NULL), 0);
	cr_assert_eq(queue.size, 5);
	cr_assert_eq(queue.ring, 7);
}

/* A table with one field and a value for it, for the shapes that queue has not. */
static int decode_one(const struct codec_field *field, size_t size, const char *value, size_t length, void *object,
		      struct err *err)
{
	struct codec_field fields[2] = {*field, CODEC_END};
	struct codec_table table = {.name = "one", .size = size, .fields = fields};
	CLEANUP_BUF struct buf buf = BUF_INIT;
	uint8_t head[2] = {0xa1, (uint8_t)(0x60 + strlen(field->name))};

	buf_append(&buf, head, 2, NULL);
	buf_append(&buf, field->name, strlen(field->name), NULL);
	buf_append(&buf, value, length, NULL);
	return codec_decode(&table, buf.data, buf.length, object, err);
}
#define DECODE_ONE(field, object, bytes, err)                                                                          \
	decode_one(&(field), sizeof(object), (bytes), sizeof(bytes) - 1, &(object), err)

Test(codec, lengths_of_bytes_and_arrays_must_fit)
{
	struct device d;
	struct err err = ERR_INIT;
	static const struct codec_field mac = CODEC_RAW(struct device, mac);
	static const struct codec_field fifo = CODEC_VRAW(struct device, fifo, fifo_used);
	static const struct codec_field regs = CODEC_INTS(struct device, regs, CODEC_U32);
	static const struct codec_field queues = CODEC_VSUBS(struct device, queues, queues_used, &queue_table);

	cr_expect_eq(DECODE_ONE(mac, d,
				"\x46"
				"123456",
				&err),
		     0);
	cr_expect_eq(DECODE_ONE(mac, d,
				"\x45"
				"12345",
				&err),
		     -EINVAL);
	cr_expect_eq(DECODE_ONE(mac, d,
				"\x47"
				"1234567",
				&err),
		     -EINVAL);
	cr_expect_eq(DECODE_ONE(mac, d,
				"\x66"
				"123456",
				&err),
		     -EINVAL, "text for bytes");
	cr_expect_eq(DECODE_ONE(fifo, d,
				"\x50"
				"0123456789abcdef",
				&err),
		     0);
	cr_expect_eq(d.fifo_used, 16);
	cr_expect_eq(DECODE_ONE(fifo, d,
				"\x51"
				"0123456789abcdefg",
				&err),
		     -EINVAL);
	cr_expect_eq(DECODE_ONE(fifo, d,
				"\x5b\xff\xff\xff\xff\xff\xff\xff\xff"
				"0123",
				&err),
		     -EINVAL);
	cr_expect_eq(DECODE_ONE(regs, d, "\x84\1\2\3\4", &err), 0);
	cr_expect_eq(DECODE_ONE(regs, d, "\x83\1\2\3", &err), -EINVAL);
	cr_expect_eq(DECODE_ONE(regs, d, "\x85\1\2\3\4\5", &err), -EINVAL);
	cr_expect_eq(DECODE_ONE(regs, d, "\x84\1\2\3", &err), -EINVAL);
	cr_expect_not_null(strstr(err.message, "regs[3]"), "%s", err.message);
	cr_expect_eq(DECODE_ONE(queues, d, "\x80", &err), 0);
	cr_expect_eq(DECODE_ONE(queues, d, "\x9b\xff\xff\xff\xff\xff\xff\xff\xff", &err), -EINVAL);
	cr_expect_eq(DECODE_ONE(queues, d, "\x85\xa0\xa0\xa0\xa0\xa0", &err), -EINVAL);
	cr_expect_eq(DECODE_ONE(queues, d, "\x81\xa3\x64size\x1a\1\1\1\1", &err), -EINVAL);
	cr_expect_not_null(strstr(err.message, "one: field queues[0].size: too large"), "%s", err.message);
}

Test(codec, signed_numbers_must_fit)
{
	struct device d;
	static const struct codec_field i64 = CODEC_INT(struct device, i64, CODEC_I64);

	cr_expect_eq(DECODE_ONE(i64, d, "\x3b\x7f\xff\xff\xff\xff\xff\xff\xff", NULL), 0);
	cr_expect_eq(d.i64, INT64_MIN);
	cr_expect_eq(DECODE_ONE(i64, d, "\x3b\x80\0\0\0\0\0\0\0", NULL), -EINVAL);
	cr_expect_eq(DECODE_ONE(i64, d, "\x1b\x80\0\0\0\0\0\0\0", NULL), -EINVAL);
	cr_expect_eq(DECODE_ONE(i64, d, "\x1b\x7f\xff\xff\xff\xff\xff\xff\xff", NULL), 0);
	cr_expect_eq(d.i64, INT64_MAX);
}

static const struct codec_table optional_table = {
	.name = "optional", .size = sizeof(struct device), .fields = (const struct codec_field[]){LATE, CODEC_END}};

Test(codec, optional_fields_may_be_missing_and_are_zero)
{
	struct device d;

	memset(&d, 0xee, sizeof(d));
	cr_assert_eq(codec_decode(&optional_table, "\xa0", 1, &d, NULL), 0);
	cr_assert_eq(d.late, 0);
	cr_assert_eq(codec_decode(&optional_table, "\xa1\x64late\x05", 7, &d, NULL), 0);
	cr_assert_eq(d.late, 5);
}

Test(codec, optional_fields_that_are_zero_are_not_written)
{
	struct device d = {.late = 5};
	CLEANUP_BUF struct buf out = BUF_INIT;

	cr_assert_eq(codec_encode(&optional_table, &d, &out, NULL), 0);
	cr_expect(out.length == 7 && memcmp(out.data, "\xa1\x64late\x05", 7) == 0);
	out.length = 0;
	d.late = 0;
	cr_assert_eq(codec_encode(&optional_table, &d, &out, NULL), 0);
	cr_expect(out.length == 1 && out.data[0] == 0xa0);
}

/* --- our own mistakes: an error, no wild access --- */

static void expect_bad_table(const struct codec_field *fields, size_t size, const char *why)
{
	struct codec_table table = {.name = "wrong", .size = size, .fields = fields};
	struct err err = ERR_INIT;
	CLEANUP_BUF struct buf buf = BUF_INIT;
	uint8_t object[64] = {0};

	cr_expect_eq(codec_encode(&table, object, &buf, &err), -EINVAL, "%s", why);
	cr_expect_eq(err.class, ERR_FAILED, "%s: %s", why, err.message);
	cr_expect_eq(codec_decode(&table, "\xa0", 1, object, &err), -EINVAL, "%s", why);
	cr_expect_eq(err.class, ERR_FAILED, "%s: %s", why, err.message);
}

Test(codec, wrong_tables_are_refused)
{
	expect_bad_table((const struct codec_field[]){{.name = "f", .type = CODEC_U32, .size = 8}, CODEC_END}, 64,
			 "width");
	expect_bad_table(
		(const struct codec_field[]){{.name = "f", .type = CODEC_U32, .offset = 61, .size = 4}, CODEC_END}, 64,
		"outside");
	expect_bad_table(
		(const struct codec_field[]){
			{.name = "f", .type = CODEC_ARRAY, .size = 8, .count = 9, .element = CODEC_U64}, CODEC_END},
		64, "array outside");
	expect_bad_table(
		(const struct codec_field[]){
			{.name = "f", .type = CODEC_ARRAY, .size = 8, .count = SIZE_MAX, .element = CODEC_U64},
			CODEC_END},
		64, "overflow");
	expect_bad_table(
		(const struct codec_field[]){{.name = "f", .type = CODEC_STRUCT, .size = 8, .table = &queue_table},
					     CODEC_END},
		64, "struct size");
	expect_bad_table((const struct codec_field[]){{.name = "f", .type = CODEC_STRUCT, .size = 8}, CODEC_END}, 64,
			 "no table");
	expect_bad_table(
		(const struct codec_field[]){
			{.name = "n", .type = CODEC_U32, .size = 4},
			{.name = "f", .type = CODEC_VBYTES, .offset = 8, .size = 8, .count_offset = 0},
			CODEC_END},
		64, "the count is a field as well");
	expect_bad_table(
		(const struct codec_field[]){
			{.name = "a", .type = CODEC_VBYTES, .offset = 8, .size = 8, .count_offset = 0},
			{.name = "b", .type = CODEC_VBYTES, .offset = 16, .size = 4, .count_offset = 0},
			CODEC_END},
		64, "two share a count");
	expect_bad_table(
		(const struct codec_field[]){{.name = "f", .type = CODEC_VBYTES, .size = 8, .count_offset = 61},
					     CODEC_END},
		64, "count outside");
}

Test(codec, a_table_within_itself_ends)
{
	struct codec_field fields[2] = {{.name = "f", .type = CODEC_STRUCT, .size = 64}, CODEC_END};
	struct codec_table table = {.name = "self", .size = 64, .fields = fields};
	CLEANUP_BUF struct buf buf = BUF_INIT;
	uint8_t object[64] = {0}, deep[2000];

	fields[0].table = &table;
	cr_assert_eq(codec_encode(&table, object, &buf, NULL), -EINVAL);
	for (size_t i = 0; i + 3 <= sizeof(deep); i += 3)
		memcpy(deep + i,
		       "\xa1\x61"
		       "f",
		       3);
	cr_assert_eq(codec_decode(&table, deep, 1998, object, NULL), -EINVAL);
}

/* --- fuzz --- */

/* splitmix64: the same sequence every time. */
static uint64_t next_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

/* Decodes a copy of exact size. What is accepted must be within bounds and survive a round trip. 1 if accepted. */
static unsigned try_bytes(const uint8_t *data, size_t length)
{
	CLEANUP_FREE uint8_t *copy = malloc(length > 0 ? length : 1);
	CLEANUP_BUF struct buf buf = BUF_INIT;
	struct err err = ERR_INIT;
	struct device d, again;

	memcpy(copy, data, length);
	int ret = codec_decode(&device_table, copy, length, &d, &err);
	if (ret != 0) {
		cr_assert_eq(ret, -EINVAL);
		cr_assert_eq(err.class, ERR_DAMAGED);
		cr_assert_eq(strncmp(err.message, "state of device: ", 17), 0);
		return 0;
	}
	cr_assert_leq(d.queues_used, 4);
	cr_assert_leq(d.fifo_used, 16);
	cr_assert_eq(codec_encode(&device_table, &d, &buf, NULL), 0);
	cr_assert_eq(codec_decode(&device_table, buf.data, buf.length, &again, NULL), 0);
	cr_assert_eq(memcmp(&d, &again, sizeof(d)), 0);
	return 1;
}

Test(codec, fuzz_random_bytes, .timeout = 120)
{
	uint64_t state = 1;
	uint8_t data[256];

	for (int i = 0; i < 100000; i++) {
		size_t length = next_random(&state) % sizeof(data);
		for (size_t j = 0; j < length; j++)
			data[j] = (uint8_t)next_random(&state);
		try_bytes(data, length);
	}
}

Test(codec, fuzz_mutations_of_a_good_state, .timeout = 120)
{
	CLEANUP_BUF struct buf good = BUF_INIT;
	uint64_t state = 2;
	unsigned accepted = 0;
	uint8_t data[1024];

	encode_sample(&good);
	cr_assert_lt(good.length + 16, sizeof(data));
	for (int i = 0; i < 100000; i++) {
		size_t length = good.length;
		memcpy(data, good.data, length);
		for (uint64_t n = 1 + next_random(&state) % 3; n > 0; n--) {
			size_t at = next_random(&state) % length;
			switch (next_random(&state) % 4) {
			case 0:
				data[at] = (uint8_t)next_random(&state);
				break;
			case 1:
				data[at] ^= (uint8_t)(1u << next_random(&state) % 8);
				break;
			case 2: /* take a byte out */
				memmove(data + at, data + at + 1, length - at - 1);
				length--;
				break;
			default: /* put one in */
				memmove(data + at + 1, data + at, length - at);
				data[at] = (uint8_t)next_random(&state);
				length++;
				break;
			}
		}
		accepted += try_bytes(data, length);
	}
	/* Mutations of values are fine; if none got through, the fuzzer did not reach the depths. */
	cr_assert_gt(accepted, 1000);
}

Test(codec, every_truncation_is_refused)
{
	CLEANUP_BUF struct buf good = BUF_INIT;

	encode_sample(&good);
	for (size_t length = 0; length < good.length; length++)
		cr_assert_eq(try_bytes(good.data, length), 0, "%zu bytes of %zu", length, good.length);
	cr_assert_eq(try_bytes(good.data, good.length), 1);
}
