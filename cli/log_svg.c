/* The tree of checkpoints as an SVG picture: a row for each, newest first, a circle as large as what it occupies, where each VM stands. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/buf.h"
#include "cli/cli.h"
#include "cli/log_tree.h"

#define ROW_HEIGHT 28
#define LANE_WIDTH 22
#define MARGIN	   20
#define MIN_RADIUS 3.0
#define MAX_RADIUS 10.0
#define TEXT_WIDTH 900

static const char *const colours[] = {"#1b6ac9", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c", "#0f766e", "#475569"};

struct picture {
	const struct tree *tree;
	struct tree_layout layout;
	size_t *row, *lane; /* of each of the list */
	size_t lanes;
	uint64_t largest; /* bytes */
	FILE *out;
};

static double x_of(const struct picture *p, size_t index) { return MARGIN + (double)p->lane[index] * LANE_WIDTH; }

static double y_of(const struct picture *p, size_t index) { return MARGIN + ((double)p->row[index] + 1) * ROW_HEIGHT; }

/* What XML does not take as it is. */
static void put_text(FILE *out, const char *text)
{
	for (; *text; text++)
		switch (*text) {
		case '&':
			fputs("&amp;", out);
			break;
		case '<':
			fputs("&lt;", out);
			break;
		case '>':
			fputs("&gt;", out);
			break;
		case '"':
			fputs("&quot;", out);
			break;
		default:
			fputc((unsigned char)*text < 0x20 ? ' ' : *text, out);
		}
}

/* A lane belongs to a branch from its tip down to the row of the parent at which it ends. */
static void choose_lanes(struct picture *p)
{
	size_t count = p->tree->count;
	size_t *awaited = xcalloc(count + 1, sizeof(*awaited)); /* lane -> index it leads to, or TREE_NONE */

	for (size_t i = 0; i < count; i++)
		p->lane[i] = TREE_NONE;
	for (size_t row = 0; row < count; row++) {
		size_t at = p->layout.order[row], parent = p->layout.parents[at], lane = p->lane[at];

		for (size_t i = 0; i < p->lanes; i++) /* all others that lead here end */
			if (awaited[i] == at)
				awaited[i] = TREE_NONE;
		for (lane = lane == TREE_NONE ? 0 : lane; p->lane[at] == TREE_NONE && lane < p->lanes && awaited[lane] != TREE_NONE;)
			lane++;
		if (lane == p->lanes)
			p->lanes++;
		p->lane[at] = lane;
		p->row[at] = row;
		awaited[lane] = parent;
		if (parent != TREE_NONE && (p->lane[parent] == TREE_NONE || p->lane[parent] > lane))
			p->lane[parent] = lane;
	}
	free(awaited);
}

static double radius_of(const struct picture *p, const struct store_checkpoint *c)
{
	double part = p->largest ? sqrt((double)c->size_bytes / (double)p->largest) : 0;

	return MIN_RADIUS + part * (MAX_RADIUS - MIN_RADIUS);
}

/* Straight down its own lane, then over to the parent's. */
static void put_edge(const struct picture *p, size_t index)
{
	size_t parent = p->layout.parents[index];
	const char *colour = colours[p->lane[index] % ARRAY_LENGTH(colours)];

	if (parent == TREE_NONE || p->row[parent] <= p->row[index])
		return;
	double x = x_of(p, index), to_x = x_of(p, parent), to_y = y_of(p, parent);
	fprintf(p->out, "<path d=\"M %.0f %.0f V %.0f C %.0f %.0f %.0f %.0f %.0f %.0f\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", x, y_of(p, index),
		to_y - ROW_HEIGHT, x, to_y - ROW_HEIGHT / 2.0, to_x, to_y - ROW_HEIGHT / 2.0, to_x, to_y, colour);
}

static void put_node(const struct picture *p, size_t index)
{
	const struct store_checkpoint *c = &p->tree->list[index];
	CLEANUP_FREE char *standing = tree_standing(p->tree, c->id);
	time_t seconds = (time_t)(c->created_wall_ns / 1000000000u);
	double x = x_of(p, index), y = y_of(p, index);
	char size[16], when[32] = "";
	struct tm tm;

	cli_format_size(size, c->size_bytes);
	if (gmtime_r(&seconds, &tm))
		strftime(when, sizeof(when), "%Y-%m-%d %H:%M:%S", &tm);
	fprintf(p->out, "<g><title>%s</title><circle cx=\"%.0f\" cy=\"%.0f\" r=\"%.1f\" fill=\"%s\"%s/>\n", c->id, x, y, radius_of(p, c),
		colours[p->lane[index] % ARRAY_LENGTH(colours)], standing ? " stroke=\"black\" stroke-width=\"2\"" : "");
	fprintf(p->out, "<text x=\"%.0f\" y=\"%.0f\"><tspan class=\"id\">%.12s</tspan> <tspan class=\"less\">%sZ %s</tspan>",
		MARGIN + (double)p->lanes * LANE_WIDTH, y + 4, c->id, when, size);
	if (standing) {
		fputs(" <tspan class=\"vm\">", p->out);
		put_text(p->out, standing);
		fputs("</tspan>", p->out);
	}
	if (c->tag[0]) {
		fputs(" <tspan class=\"tag\">", p->out);
		put_text(p->out, c->tag);
		fputs("</tspan>", p->out);
	}
	if (c->message) {
		fputc(' ', p->out);
		put_text(p->out, c->message);
	}
	fputs("</text></g>\n", p->out);
}

static void draw(const struct picture *p)
{
	double width = 2.0 * MARGIN + (double)p->lanes * LANE_WIDTH + TEXT_WIDTH;
	double height = 2.0 * MARGIN + ((double)p->tree->count + 1) * ROW_HEIGHT;

	fprintf(p->out,
		"<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" viewBox=\"0 0 %.0f %.0f\">\n"
		"<title>vmcp: %zu checkpoints</title>\n"
		"<style>text{font:13px sans-serif}.id{font-family:monospace;font-weight:bold}.less{fill:#64748b}.vm{fill:#15803d;font-weight:bold}"
		".tag{fill:#7e22ce;font-weight:bold}</style>\n"
		"<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
		width, height, width, height, p->tree->count);
	for (size_t i = 0; i < p->tree->count; i++)
		put_edge(p, i);
	for (size_t row = 0; row < p->tree->count; row++)
		put_node(p, p->layout.order[row]);
	fputs("</svg>\n", p->out);
}

static int make_text(const struct tree *tree, char **text, size_t *length, struct err *err)
{
	struct picture p = {.tree = tree, .out = open_memstream(text, length)};

	if (!p.out)
		return err_sys(err, errno, "picture");
	p.row = xcalloc(tree->count + 1, sizeof(*p.row));
	p.lane = xcalloc(tree->count + 1, sizeof(*p.lane));
	for (size_t i = 0; i < tree->count; i++)
		p.largest = tree->list[i].size_bytes > p.largest ? tree->list[i].size_bytes : p.largest;
	tree_layout(tree, &p.layout);
	choose_lanes(&p);
	draw(&p);
	tree_layout_free(&p.layout);
	free(p.row);
	free(p.lane);
	return fclose(p.out) ? err_sys(err, ENOMEM, "picture") : 0;
}

int tree_write_svg(const struct tree *tree, const char *path, struct err *err)
{
	CLEANUP_FREE char *text = NULL;
	size_t length = 0;
	int rc = make_text(tree, &text, &length, err);

	if (rc)
		return rc;
	if (!strcmp(path, "-")) {
		fwrite(text, 1, length, stdout);
		return 0;
	}
	return cli_replace_file(path, text, length, err);
}
