#include "checkpoint/state_set.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "checkpoint/state_file.h"

int state_set_init(struct state_set *set, const struct component *components, unsigned count, struct err *err)
{
	*set = (struct state_set){.components = components, .count = count};
	set->states = xcalloc(count + 1, sizeof(*set->states));
	set->logs = xcalloc(count + 1, sizeof(*set->logs));
	for (unsigned i = 0; i < count; i++) {
		size_t size = components[i].table->size;
		set->states[i] = malloc(size);
		if (!set->states[i]) {
			state_set_free(set);
			return err_sys(err, ENOMEM, "state of %s %u: %zu bytes", components[i].id,
				       components[i].instance, size);
		}
		/* Fresh large blocks are not populated: not for the pause to find out. */
		memset(set->states[i], 0, size);
	}
	return 0;
}

void state_set_free(struct state_set *set)
{
	for (unsigned i = 0; i < set->count && set->states; i++) {
		free(set->states[i]);
		buf_free(&set->logs[i]);
	}
	free(set->states);
	free(set->logs);
	*set = (struct state_set){0};
}

int state_set_capture(struct state_set *set, struct err *err)
{
	for (unsigned i = 0; i < set->count; i++) {
		const struct component *c = &set->components[i];
		int r = c->capture(c->opaque, set->states[i], err);
		if (r != 0) {
			if (err && err->number == 0)
				err_sys(err, r, "cannot read the state");
			return err_prefix(err, "%s %u", c->id, c->instance);
		}
	}
	return 0;
}

static struct state_section section_of(const struct component *c, enum state_section_kind kind, const struct buf *body)
{
	struct state_section section = {.kind = kind,
					.instance = c->instance,
					.version = c->version,
					.body = body->data,
					.length = body->length};
	snprintf(section.id, sizeof(section.id), "%s", c->id);
	return section;
}

int state_set_encode(const struct state_set *set, struct buf *out, struct err *err)
{
	size_t sections = set->count;
	for (unsigned i = 0; i < set->count; i++)
		sections += set->components[i].apply_log != NULL;
	int r = state_file_start(out, sections, err);
	for (unsigned i = 0; i < set->count && r == 0; i++) {
		const struct component *c = &set->components[i];
		CLEANUP_BUF struct buf body = BUF_INIT;
		r = codec_encode(c->table, set->states[i], &body, err);
		if (r != 0)
			return err_prefix(err, "%s %u", c->id, c->instance);
		struct state_section section = section_of(c, STATE_SECTION_STATE, &body);
		r = state_file_add(out, &section, err);
		if (r == 0 && c->apply_log) {
			section = section_of(c, STATE_SECTION_LOG, &set->logs[i]);
			r = state_file_add(out, &section, err);
		}
	}
	return r;
}

static const struct state_section *find(const struct state_section *sections, size_t count,
					enum state_section_kind kind, const struct component *c)
{
	for (size_t i = 0; i < count; i++) {
		if (sections[i].kind == kind && sections[i].instance == c->instance &&
		    strcmp(sections[i].id, c->id) == 0)
			return &sections[i];
	}
	return NULL;
}

/* Each section belongs to one component, and none comes twice. */
static int check_sections(const struct state_set *set, const struct state_section *sections, size_t count,
			  struct err *err)
{
	for (size_t s = 0; s < count; s++) {
		const struct component *c = NULL;
		for (unsigned i = 0; i < set->count && !c; i++) {
			if (sections[s].instance == set->components[i].instance &&
			    strcmp(sections[s].id, set->components[i].id) == 0)
				c = &set->components[i];
		}
		const char *kind = sections[s].kind == STATE_SECTION_LOG ? "completion log" : "state";
		if (!c || (sections[s].kind == STATE_SECTION_LOG && !c->apply_log))
			return err_set(err, ERR_DAMAGED, EINVAL,
				       "state file: %s of %s %u, which this machine does not have", kind,
				       sections[s].id, sections[s].instance);
		if (find(sections, count, sections[s].kind, c) != &sections[s])
			return err_set(err, ERR_DAMAGED, EINVAL, "state file: %s of %s %u comes twice", kind, c->id,
				       c->instance);
		if (sections[s].version > c->version) {
			/* Whole, as its checksum says: no damage. */
			err_set(err, ERR_FAILED, ENOTSUP, "state file: %s %u: version %u is newer than this vmcp's %u",
				c->id, c->instance, sections[s].version, c->version);
			err_hint(err, "use the vmcp that made the checkpoint, or a newer one");
			return -ENOTSUP;
		}
	}
	return 0;
}

static int decode_component(struct state_set *set, unsigned i, const struct state_section *sections, size_t count,
			    struct err *err)
{
	const struct component *c = &set->components[i];
	const struct state_section *state = find(sections, count, STATE_SECTION_STATE, c);
	const struct state_section *log = c->apply_log ? find(sections, count, STATE_SECTION_LOG, c) : NULL;
	if (!state || (c->apply_log && !log))
		return err_set(err, ERR_DAMAGED, EINVAL, "state file: no %s of %s %u",
			       state ? "completion log" : "state", c->id, c->instance);
	int r = codec_decode(c->table, state->body, state->length, set->states[i], err);
	if (r == 0 && log) {
		set->logs[i].length = 0;
		r = log->length ? buf_append(&set->logs[i], log->body, log->length, err) : 0;
	}
	return r == 0 ? 0 : err_prefix(err, "%s %u", c->id, c->instance);
}

int state_set_decode(struct state_set *set, const void *data, size_t length, struct err *err)
{
	struct state_section *sections;
	size_t count;
	int r = state_file_parse(data, length, &sections, &count, err);
	if (r != 0)
		return r;
	r = check_sections(set, sections, count, err);
	for (unsigned i = 0; i < set->count && r == 0; i++)
		r = decode_component(set, i, sections, count, err);
	free(sections);
	return r == 0 ? state_set_validate(set, err) : r;
}

int state_set_validate(const struct state_set *set, struct err *err)
{
	for (unsigned i = 0; i < set->count; i++) {
		const struct component *c = &set->components[i];
		int r = c->validate ? c->validate(c->opaque, set->states[i], err) : 0;
		if (r != 0)
			return err_prefix(err, "%s %u", c->id, c->instance);
	}
	return 0;
}

int state_set_needs(const struct state_set *set, struct buf *out, struct err *err)
{
	int r = 0;
	for (unsigned i = 0; i < set->count && r == 0; i++)
		r = set->components[i].needs ? set->components[i].needs(set->components[i].opaque, set->states[i], out, err) : 0;
	for (unsigned i = 0; i < set->count && r == 0; i++) {
		char name[STATE_SECTION_ID_BYTES + 32];
		int length = snprintf(name, sizeof(name), "%s%s %u version %u", i ? ", " : "components: ", set->components[i].id, set->components[i].instance,
				      set->components[i].version);
		r = buf_append(out, name, (size_t)length, err);
	}
	return r == 0 ? buf_append(out, "\n", 2, err) : r;
}

int state_set_apply(const struct state_set *set, struct err *err)
{
	for (unsigned i = 0; i < set->count; i++) {
		const struct component *c = &set->components[i];
		int r = fault_check(FAULT_REVERT_APPLY, err);
		if (r == 0)
			r = c->apply(c->opaque, set->states[i], err);
		if (r != 0)
			return err_prefix(err, "%s %u: state", c->id, c->instance);
	}
	return 0;
}

int state_set_apply_logs(const struct state_set *set, struct err *err)
{
	for (unsigned i = 0; i < set->count; i++) {
		const struct component *c = &set->components[i];
		if (!c->apply_log)
			continue;
		int r = fault_check(FAULT_REVERT_APPLY_LOG, err);
		if (r == 0)
			r = c->apply_log(c->opaque, set->logs[i].data, set->logs[i].length, err);
		if (r != 0)
			return err_prefix(err, "%s %u: completion log", c->id, c->instance);
	}
	return 0;
}
