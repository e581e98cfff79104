/* The choice of layers to merge: alone, and in a simulation of a guest that writes for ever. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/consolidate.h"

static unsigned chosen_live(const struct layer_use *list, unsigned count)
{
	unsigned live = 0;
	for (unsigned i = 0; i < count; i++)
		live += list[i].chosen ? (unsigned)list[i].live : 0;
	return live;
}

Test(consolidate, nothing_is_chosen_where_nothing_is_won)
{
	struct layer_use few[] = {{1, 10, 1000, false}, {2, 900, 1000, false}};
	cr_expect_eq(consolidation_choose(NULL, 0, 0), 0);
	cr_expect_eq(consolidation_choose(few, 1, 1000), 0, "too little");
	struct layer_use full[] = {{1, 100000, 100000, false}, {2, 1000, 1000, false}, {3, 50, 50, false}};
	cr_expect_eq(consolidation_choose(full, 3, 101050), 0, "nothing is dead, and there are few");
}

Test(consolidate, waste_goes_but_no_more_is_copied_than_is_dead)
{
	struct layer_use list[] = {{1, 60000, 100000, false}, {2, 100, 9000, false}, {3, 8000, 20000, false}};
	cr_expect_eq(consolidation_choose(list, 3, 70000), 2);
	cr_expect_eq(chosen_live(list, 3), 8100);
	for (unsigned i = 0; i < 3; i++)
		cr_expect_eq(list[i].chosen, list[i].number != 1);
	struct layer_use many[9];
	for (unsigned i = 0; i < 9; i++)
		many[i] = (struct layer_use){i + 1, 3, 10, false};
	cr_expect_eq(consolidation_choose(many, 9, 1000000), 9, "eight small ones are enough");
}

Test(consolidate, many_of_one_size_become_one)
{
	struct layer_use list[12];
	for (unsigned i = 0; i < 12; i++)
		list[i] = (struct layer_use){i + 1, i < 9 ? 20 + i : 5000, i < 9 ? 20 + i : 5000, false};
	cr_expect_eq(consolidation_choose(list, 12, 15216), 9);
	cr_expect_eq(chosen_live(list, 12), 216);
}

/*
 * A guest that writes `writes` pages of `set` between checkpoints (all of them equally, or most of them in a small part) for ever. Layers of the last
 * KEEP checkpoints may not be merged. What is stored stays bounded, and so does what is copied.
 */
#define KEEP   20u
#define LAYERS 4096u

struct simulation {
	unsigned set, writes;
	bool hot;
	uint32_t *where; /* layer of each page */
	uint64_t live[LAYERS], held[LAYERS];
	unsigned next;
	uint64_t saved, copied, most_held;
	unsigned most_layers;
};

static unsigned pick(const struct simulation *s)
{
	return s->hot && rand() % 10 ? (unsigned)rand() % (s->set / 20) : (unsigned)rand() % s->set;
}

static void move_page(struct simulation *s, unsigned page, unsigned layer)
{
	s->live[s->where[page]]--;
	s->where[page] = layer;
	s->live[layer]++;
	s->held[layer]++;
}

static void consolidate(struct simulation *s, const unsigned *own)
{
	static struct layer_use uses[LAYERS];
	static bool merged[LAYERS];
	unsigned count = 0;
	for (unsigned i = 0; i < s->next; i++) {
		bool is_own = false;
		for (unsigned k = 0; k < KEEP; k++)
			is_own |= own[k] == i;
		if (!is_own && s->live[i])
			uses[count++] = (struct layer_use){.number = i, .live = s->live[i], .held = s->held[i]};
	}
	if (consolidation_choose(uses, count, s->set) == 0)
		return;
	memset(merged, 0, sizeof(merged));
	for (unsigned i = 0; i < count; i++)
		merged[uses[i].number] = uses[i].chosen;
	unsigned layer = s->next++;
	for (unsigned page = 0; page < s->set; page++)
		if (merged[s->where[page]]) {
			move_page(s, page, layer);
			s->copied++;
		}
}

static void simulate(struct simulation *s, unsigned rounds)
{
	unsigned own[KEEP] = {0};
	s->where = calloc(s->set, sizeof(*s->where));
	s->live[0] = s->held[0] = s->set;
	s->next = 1;
	for (unsigned round = 0; round < rounds; round++) {
		unsigned layer = s->next++, layers = 0;
		uint64_t held = 0;
		cr_assert_lt(s->next, LAYERS - 1);
		for (unsigned i = 0; i < s->writes; i++) {
			unsigned page = pick(s);
			if (s->where[page] == layer)
				continue;
			move_page(s, page, layer);
			s->saved++;
		}
		own[round % KEEP] = layer;
		consolidate(s, own);
		for (unsigned i = 0; i < s->next; i++) {
			layers += s->live[i] > 0;
			held += s->live[i] ? s->held[i] : 0;
		}
		if (round > rounds / 2 && held > s->most_held)
			s->most_held = held;
		if (round > rounds / 2 && layers > s->most_layers)
			s->most_layers = layers;
	}
	free(s->where);
}

Test(consolidate, stays_bounded_for_ever)
{
	static const struct {
		unsigned set, writes;
		bool hot;
	} cases[] = {{16384, 1000, false}, {16384, 1000, true}, {16384, 20, false}, {16384, 20, true}, {4096, 4000, false}, {65536, 300, true}};
	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		static struct simulation s;
		s = (struct simulation){.set = cases[i].set, .writes = cases[i].writes, .hot = cases[i].hot};
		srand(1);
		simulate(&s, 2000);
		uint64_t increments = (KEEP + 8) * s.writes;
		cr_log_info("set %u, %u writes%s: held %llu, %u layers, %.2f copied for each one saved\n", s.set, s.writes,
			    s.hot ? " hot" : "", (unsigned long long)s.most_held, s.most_layers, (double)s.copied / (double)s.saved);
		cr_expect_leq(s.most_held, 2 * s.set + 2 * increments, "case %u: %llu pages held", i, (unsigned long long)s.most_held);
		cr_expect_leq(s.most_layers, KEEP + 60, "case %u: %u layers", i, s.most_layers);
		double steps = 1 + log((double)s.set / s.writes) / log(4);
		cr_expect_leq((double)s.copied, (1 + (steps > 0 ? steps : 0)) * (double)s.saved, "case %u: %llu copied, %llu saved", i,
			      (unsigned long long)s.copied, (unsigned long long)s.saved);
	}
}
