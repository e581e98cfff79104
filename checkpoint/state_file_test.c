#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/component.h"
#include "checkpoint/state_file.h"
#include "checkpoint/state_set.h"

/* --- the container --- */

static struct buf make_file(void)
{
	static const struct state_section sections[] = {
		{.kind = STATE_SECTION_STATE,
		 .id = "vcpu",
		 .instance = 0,
		 .version = 1,
		 .body = (const uint8_t *)"body one",
		 .length = 8},
		{.kind = STATE_SECTION_STATE,
		 .id = "vcpu",
		 .instance = 70000,
		 .version = 300,
		 .body = (const uint8_t *)"b",
		 .length = 1},
		{.kind = STATE_SECTION_LOG, .id = "virtio-blk", .instance = 3, .version = 1, .body = NULL, .length = 0},
	};
	struct buf file = BUF_INIT;
	cr_assert_eq(state_file_start(&file, 3, NULL), 0);
	for (unsigned i = 0; i < 3; i++)
		cr_assert_eq(state_file_add(&file, &sections[i], NULL), 0);
	return file;
}

Test(state_file, round_trip)
{
	struct buf file = make_file();
	struct state_section *sections;
	size_t count;
	cr_assert_eq(state_file_parse(file.data, file.length, &sections, &count, NULL), 0);
	cr_assert_eq(count, 3);
	cr_assert_str_eq(sections[0].id, "vcpu");
	cr_assert_eq(sections[0].length, 8);
	cr_assert_eq(memcmp(sections[0].body, "body one", 8), 0);
	cr_assert_eq(sections[1].instance, 70000);
	cr_assert_eq(sections[1].version, 300);
	cr_assert_eq(sections[2].kind, STATE_SECTION_LOG);
	cr_assert_str_eq(sections[2].id, "virtio-blk");
	cr_assert_eq(sections[2].length, 0);
	free(sections);
	buf_free(&file);
}

static void assert_damaged(const void *data, size_t length)
{
	struct state_section *sections;
	struct err err = ERR_INIT;
	size_t count;
	cr_assert_eq(state_file_parse(data, length, &sections, &count, &err), -EINVAL);
	cr_assert_eq(err.class, ERR_DAMAGED);
	cr_assert_null(sections);
}

Test(state_file, every_truncation_and_every_changed_body_is_damage)
{
	struct buf file = make_file();
	for (size_t length = 0; length < file.length; length++)
		assert_damaged(file.data, length);
	uint8_t *body = memmem(file.data, file.length, "body one", 8);
	cr_assert_not_null(body);
	for (unsigned i = 0; i < 8; i++) {
		body[i] ^= 1;
		assert_damaged(file.data, file.length);
		body[i] ^= 1;
	}
	cr_assert_eq(buf_append(&file, "x", 1, NULL), 0);
	assert_damaged(file.data, file.length);
	buf_free(&file);
}

Test(state_file, hostile_counts_allocate_nothing)
{
	/* An array of 2^62 items, the right name and version, and no sections. */
	static const uint8_t hostile[] = {0x9b, 0x40, 0,   0,	0,   0,	  0,   0,   0,	 0x6a, 'v',
					  'm',	'c',  'p', '-', 's', 't', 'a', 't', 'e', 0x01};
	assert_damaged(hostile, sizeof(hostile));
	/* A body of 2^62 bytes. */
	static const uint8_t body[] = {0x83, 0x6a, 'v',	 'm',  'c', 'p', '-', 's', 't',	 'a', 't',  'e',
				       0x01, 0x87, 0x65, 's',  't', 'a', 't', 'e', 0x61, 'a', 0x00, 0x01,
				       0x00, 0x00, 0x5b, 0x40, 0,   0,	 0,   0,   0,	 0,   0};
	assert_damaged(body, sizeof(body));
}

Test(state_file, random_bytes_never_hurt)
{
	struct buf file = make_file();
	uint64_t random = 7;
	for (unsigned round = 0; round < 50000; round++) {
		struct buf copy = BUF_INIT;
		struct state_section *sections;
		size_t count;
		cr_assert_eq(buf_append(&copy, file.data, file.length, NULL), 0);
		for (unsigned i = 0; i < 1 + round % 3; i++) {
			random = random * 6364136223846793005u + 1442695040888963407u;
			copy.data[(random >> 32) % copy.length] = (uint8_t)(random >> 24);
		}
		if (state_file_parse(copy.data, copy.length, &sections, &count, NULL) == 0)
			free(sections);
		buf_free(&copy);
	}
	buf_free(&file);
}

/* --- with components --- */

struct toy_state {
	uint32_t a;
	uint64_t b;
};
static const struct codec_field toy_fields[] = {
	CODEC_INT(struct toy_state, a, CODEC_U32),
	CODEC_INT(struct toy_state, b, CODEC_U64),
	CODEC_END,
};
static const struct codec_table toy_table = {.name = "toy", .size = sizeof(struct toy_state), .fields = toy_fields};

struct toy {
	struct toy_state state;
	unsigned applied;
	char log[16];
};

static int toy_capture(void *opaque, void *state, struct err *err)
{
	(void)err;
	memcpy(state, &((struct toy *)opaque)->state, sizeof(struct toy_state));
	return 0;
}
static int toy_validate(void *opaque, const void *state, struct err *err)
{
	(void)opaque;
	return ((const struct toy_state *)state)->a == 666 ? err_set(err, ERR_DAMAGED, EINVAL, "a is 666") : 0;
}
static int toy_apply(void *opaque, const void *state, struct err *err)
{
	struct toy *toy = opaque;
	(void)err;
	memcpy(&toy->state, state, sizeof(toy->state));
	toy->applied++;
	return 0;
}
static int toy_apply_log(void *opaque, const uint8_t *log, size_t length, struct err *err)
{
	(void)err;
	if (length < 16)
		memcpy(((struct toy *)opaque)->log, log, length);
	return 0;
}

static struct component component_of(struct toy *toy, uint32_t instance, bool log)
{
	return (struct component){.id = "toy",
				  .instance = instance,
				  .version = 2,
				  .table = &toy_table,
				  .opaque = toy,
				  .capture = toy_capture,
				  .validate = toy_validate,
				  .apply = toy_apply,
				  .apply_log = log ? toy_apply_log : NULL};
}

static struct buf save(const struct component *components, unsigned count)
{
	struct state_set set;
	struct buf file = BUF_INIT;
	cr_assert_eq(state_set_init(&set, components, count, NULL), 0);
	cr_assert_eq(state_set_capture(&set, NULL), 0);
	if (components[0].apply_log)
		cr_assert_eq(buf_append(&set.logs[0], "logged", 7, NULL), 0);
	cr_assert_eq(state_set_encode(&set, &file, NULL), 0);
	state_set_free(&set);
	return file;
}

static int load(const struct component *components, unsigned count, const struct buf *file, struct err *err)
{
	struct state_set set;
	cr_assert_eq(state_set_init(&set, components, count, NULL), 0);
	int r = state_set_decode(&set, file->data, file->length, err);
	if (r == 0)
		r = state_set_apply(&set, err);
	if (r == 0)
		r = state_set_apply_logs(&set, err);
	state_set_free(&set);
	return r;
}

Test(state_set, what_was_captured_comes_back)
{
	struct toy one = {.state = {.a = 1, .b = 2}}, two = {.state = {.a = 3, .b = UINT64_MAX}};
	struct component components[] = {component_of(&one, 0, true), component_of(&two, 1, false)};
	struct buf file = save(components, 2);
	one.state = two.state = (struct toy_state){0};
	struct err err = ERR_INIT;
	cr_assert_eq(load(components, 2, &file, &err), 0, "%s", err.message);
	cr_assert_eq(one.state.a, 1);
	cr_assert_eq(two.state.b, UINT64_MAX);
	cr_assert_str_eq(one.log, "logged");
	buf_free(&file);
}

Test(state_set, one_bad_component_leaves_all_untouched)
{
	struct toy one = {.state = {.a = 1}}, two = {.state = {.a = 666}};
	struct component components[] = {component_of(&one, 0, false), component_of(&two, 1, false)};
	struct buf file = save(components, 2);
	struct err err = ERR_INIT;
	cr_assert_eq(load(components, 2, &file, &err), -EINVAL);
	cr_assert_str_eq(err.message, "toy 1: a is 666");
	cr_assert_eq(one.applied + two.applied, 0);
	buf_free(&file);
}

Test(state_set, sections_and_components_must_match)
{
	struct toy one = {0}, two = {0};
	struct component both[] = {component_of(&one, 0, false), component_of(&two, 1, false)};
	struct component other[] = {component_of(&one, 0, false), component_of(&two, 5, false)};
	struct component logging[] = {component_of(&one, 0, true), component_of(&two, 1, false)};
	struct component older[] = {component_of(&one, 0, false), component_of(&two, 1, false)};
	older[1].version = 1;
	struct buf file = save(both, 2), file_one = save(both, 1), file_log = save(logging, 2);
	struct err err = ERR_INIT;
	cr_assert_eq(load(both, 2, &file_one, &err), -EINVAL); /* one is missing */
	cr_assert_eq(load(both, 1, &file, &err), -EINVAL);     /* one is unknown */
	cr_assert_eq(load(other, 2, &file, &err), -EINVAL);
	cr_assert_eq(load(logging, 2, &file, &err), -EINVAL);  /* no log */
	cr_assert_eq(load(both, 2, &file_log, &err), -EINVAL); /* a log for a component that has none */
	cr_assert_eq(load(older, 2, &file, &err), -ENOTSUP);   /* made by a newer version */
	cr_assert_eq(one.applied + two.applied, 0);
	buf_free(&file);
	buf_free(&file_one);
	buf_free(&file_log);
}
