/*
 * What lies under a disk's top, found once: a map from guest ranges to the layer that holds them, so that the depth
 * of a chain costs nothing once a range was looked at.
 *
 * The map is about the immutable part of a chain alone: the layers from its root down, of which none is written any
 * more. So writes need not care for it. When a checkpoint has sealed another layer, that is the new root; what an
 * older root said of a range stays true for the layers from there down, and only those above are looked at again.
 *
 * Guest space is cut into spans, each with its extents in ascending order without gaps; spans are made on demand,
 * and those that were not used for longest go when there are too many.
 */
#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "cowdisk/image_internal.h"

enum { BUCKETS = 16384, SPAN_CLUSTERS = 512 }; /* as many spans without extents to speak of as fill the map: a dozen in each */
#define MAP_BYTES (16u << 20)

struct extent {
	uint32_t start;	     /* sectors from the beginning of the span; it ends where the next one starts */
	uint32_t kind;	     /* enum map_kind, never MAP_HOLE or MAP_ZERO_HOST */
	struct image *owner; /* who says so; NULL: nobody, all layers have a hole there */
	uint64_t host;	     /* of the first byte; MAP_COMPRESSED: the L2 entry */
};

struct span {
	struct span *hash_next;
	struct span *lru_prev, *lru_next;
	uint64_t index;
	uint64_t root; /* generation of the root for which it holds */
	uint64_t end;  /* sectors from its beginning that it covers: less than all at the end of the disk */
	size_t count;
	struct extent extents[];
};

struct resolved {
	struct span *buckets[BUCKETS];
	struct span lru; /* ring */
	uint64_t bytes;
	unsigned span_bits; /* log2 of its bytes; 0: not yet known */
	struct image *root; /* the one that span_bits was chosen for */
};

struct builder {
	struct extent *extents;
	size_t count, capacity;
	uint64_t end; /* sectors */
};

static size_t span_bytes(const struct span *s) { return sizeof(*s) + s->count * sizeof(s->extents[0]); }

static struct resolved *get_map(struct cow_disk *disk)
{
	if (!disk->resolved) {
		disk->resolved = xcalloc(1, sizeof(*disk->resolved));
		disk->resolved->lru.lru_next = disk->resolved->lru.lru_prev = &disk->resolved->lru;
	}
	return disk->resolved;
}

static void lru_remove(struct span *s)
{
	s->lru_prev->lru_next = s->lru_next;
	s->lru_next->lru_prev = s->lru_prev;
}

static void lru_push(struct resolved *map, struct span *s)
{
	s->lru_next = map->lru.lru_next;
	s->lru_prev = &map->lru;
	s->lru_next->lru_prev = s;
	map->lru.lru_next = s;
}

static void drop(struct resolved *map, struct span *s)
{
	struct span **p = &map->buckets[s->index % BUCKETS];
	while (*p != s)
		p = &(*p)->hash_next;
	*p = s->hash_next;
	lru_remove(s);
	map->bytes -= span_bytes(s);
	free(s);
}

void cow_resolved_forget(struct cow_disk *disk)
{
	struct resolved *map = disk->resolved;
	if (!map)
		return;
	while (map->lru.lru_next != &map->lru)
		drop(map, map->lru.lru_next);
	free(map);
	disk->resolved = NULL;
}

static struct span *find(struct resolved *map, uint64_t index)
{
	struct span *s = map->buckets[index % BUCKETS];
	while (s && s->index != index)
		s = s->hash_next;
	return s;
}

/* A span is as large as so many of the smallest clusters: its extents are bounded, whatever the layers are like. */
static void choose_span(struct cow_disk *disk, struct resolved **map, struct image *root)
{
	uint64_t smallest = (uint64_t)1 << QCOW2_MAX_CLUSTER_BITS;
	if ((*map)->root == root)
		return;
	for (const struct image *i = root; i; i = i->backing)
		smallest = min_u64(smallest, image_cluster_bytes(i));
	unsigned bits = (unsigned)__builtin_ctzll(smallest * SPAN_CLUSTERS);
	if ((*map)->span_bits && (*map)->span_bits != bits) {
		cow_resolved_forget(disk);
		*map = get_map(disk);
	}
	(*map)->span_bits = bits;
	(*map)->root = root;
}

static size_t find_extent(const struct extent *extents, size_t count, uint64_t sector)
{
	size_t low = 0, high = count;
	while (high - low > 1) {
		size_t middle = low + (high - low) / 2;
		if (extents[middle].start <= sector)
			low = middle;
		else
			high = middle;
	}
	return low;
}

static uint64_t extent_end(const struct span *s, size_t i)
{
	return i + 1 < s->count ? s->extents[i + 1].start : s->end;
}

/* What the span says of its byte `within`; m->length is cut to what it knows. */
static void look_up(const struct span *s, uint64_t within, uint64_t length, struct image **owner, struct mapping *m)
{
	size_t i = find_extent(s->extents, s->count, within / COW_SECTOR_BYTES);
	const struct extent *e = &s->extents[i];
	uint64_t skip = within - (uint64_t)e->start * COW_SECTOR_BYTES;
	*owner = e->owner;
	*m = (struct mapping){.kind = (enum map_kind)e->kind};
	m->length = min_u64(length, extent_end(s, i) * COW_SECTOR_BYTES - within);
	if (m->kind == MAP_DATA)
		m->host = e->host + skip;
	else if (m->kind == MAP_COMPRESSED)
		m->entry = e->host;
}

/* The extent, from `sector` on, which lies in it. */
static struct extent tail_of(const struct extent *e, uint64_t sector)
{
	struct extent tail = *e;
	tail.start = (uint32_t)sector;
	if (e->kind == MAP_DATA)
		tail.host += (sector - e->start) * COW_SECTOR_BYTES;
	return tail;
}

static int reserve(struct builder *b, size_t count)
{
	if (count <= b->capacity)
		return 0;
	size_t capacity = count * 2 + 64;
	struct extent *larger = realloc(b->extents, capacity * sizeof(*larger));
	if (!larger)
		return -ENOMEM;
	b->extents = larger;
	b->capacity = capacity;
	return 0;
}

/* Puts `e` over whatever [e.start, end) was. */
static int paint(struct builder *b, struct extent e, uint64_t end)
{
	size_t first = find_extent(b->extents, b->count, e.start), last = find_extent(b->extents, b->count, end - 1);
	uint64_t last_end = last + 1 < b->count ? b->extents[last + 1].start : b->end;
	struct extent after = b->extents[last];
	bool keep_head = b->extents[first].start < e.start, keep_tail = end < last_end;
	size_t pieces = 1u + (size_t)keep_head + (size_t)keep_tail, behind = b->count - last - 1;
	int rc = reserve(b, first + pieces + behind);
	if (rc < 0)
		return rc;
	memmove(b->extents + first + pieces, b->extents + last + 1, behind * sizeof(e));
	b->extents[first + keep_head] = e;
	if (keep_tail)
		b->extents[first + keep_head + 1] = tail_of(&after, end);
	b->count = first + pieces + behind;
	return 0;
}

static int paint_mapping(struct builder *b, uint64_t sector, uint64_t end, struct image *owner, const struct mapping *m)
{
	struct extent e = {.start = (uint32_t)sector, .kind = MAP_ZERO, .owner = owner};
	if (m->kind == MAP_DATA || m->kind == MAP_COMPRESSED) {
		e.kind = m->kind;
		e.host = m->kind == MAP_DATA ? m->host : m->entry;
	}
	return paint(b, e, end);
}

/* What the layer has hides what is below it. */
static int paint_layer(struct builder *b, struct image *image, uint64_t base)
{
	uint64_t end = base + b->end * COW_SECTOR_BYTES, limit = min_u64(end, image->size), at = base;
	int rc = 0;
	while (rc == 0 && at < limit) {
		struct mapping m;
		rc = cow_image_map(image, at, limit - at, &m);
		if (rc == 0 && m.kind != MAP_HOLE)
			rc = paint_mapping(b, (at - base) / COW_SECTOR_BYTES, (at + m.length - base) / COW_SECTOR_BYTES,
					   image, &m);
		at += m.length;
	}
	/* A backing file that is shorter: zeroes from there on, whatever lies deeper. */
	if (rc == 0 && at < end)
		rc = paint_mapping(b, (at - base) / COW_SECTOR_BYTES, b->end, image,
				   &(struct mapping){.kind = MAP_ZERO});
	return rc;
}

/* From the deepest that is not yet known upwards, as a sparse layer is few runs. */
static int paint_layers(struct builder *b, struct image *root, const struct span *old, uint64_t base)
{
	size_t count = 0;
	for (struct image *i = root; i && !(old && i->generation <= old->root); i = i->backing)
		count++;
	CLEANUP_FREE struct image **layers = calloc(count, sizeof(*layers));
	if (count && !layers)
		return -ENOMEM;
	size_t n = 0;
	for (struct image *i = root; n < count; i = i->backing)
		layers[n++] = i;
	int rc = 0;
	while (rc == 0 && n > 0)
		rc = paint_layer(b, layers[--n], base);
	return rc;
}

static bool continues(const struct extent *e, const struct extent *next)
{
	if (e->kind != next->kind || e->owner != next->owner)
		return false;
	uint64_t distance = (uint64_t)(next->start - e->start) * COW_SECTOR_BYTES;
	return e->kind == MAP_ZERO || (e->kind == MAP_DATA && next->host == e->host + distance);
}

static void join_neighbours(struct builder *b)
{
	size_t kept = 0;
	for (size_t i = 1; i < b->count; i++)
		if (!continues(&b->extents[kept], &b->extents[i]))
			b->extents[++kept] = b->extents[i];
	b->count = kept + 1;
}

static void insert(struct resolved *map, struct span *s)
{
	while (map->bytes > MAP_BYTES && map->lru.lru_prev != &map->lru)
		drop(map, map->lru.lru_prev);
	s->hash_next = map->buckets[s->index % BUCKETS];
	map->buckets[s->index % BUCKETS] = s;
	lru_push(map, s);
	map->bytes += span_bytes(s);
}

static int begin(struct builder *b, const struct span *old)
{
	size_t count = old ? old->count : 0;
	int rc = reserve(b, count + 1);
	if (rc < 0)
		return rc;
	if (old)
		memcpy(b->extents, old->extents, count * sizeof(b->extents[0]));
	/* The disk may be larger now than the old root was: beyond that one all reads as zeroes. */
	if (!old || old->end < b->end)
		b->extents[count++] = (struct extent){.start = old ? (uint32_t)old->end : 0, .kind = MAP_ZERO};
	b->count = count;
	return 0;
}

/* Makes the span anew for `root`, on top of what `old` knows of deeper layers; frees `old`. */
static int build(struct resolved *map, struct image *root, uint64_t index, struct span *old, struct span **out)
{
	uint64_t base = index << map->span_bits, end = min_u64(root->size, base + ((uint64_t)1 << map->span_bits));
	struct builder b = {.end = (end - base) / COW_SECTOR_BYTES};
	struct span *s = NULL;
	/* What an overlay of a larger image that was cut off cannot show is of no use. */
	if (old && old->end > b.end)
		drop(map, old), old = NULL;
	int rc = begin(&b, old);
	if (rc == 0)
		rc = paint_layers(&b, root, old, base);
	if (rc == 0) {
		join_neighbours(&b);
		s = malloc(sizeof(*s) + b.count * sizeof(s->extents[0]));
		rc = s ? 0 : -ENOMEM;
	}
	if (s) {
		*s = (struct span){.index = index, .root = root->generation, .count = b.count, .end = b.end};
		memcpy(s->extents, b.extents, b.count * sizeof(s->extents[0]));
		if (old)
			drop(map, old);
		insert(map, s);
	}
	free(b.extents);
	*out = s;
	return rc;
}

int cow_resolve(struct cow_disk *disk, struct image *root, uint64_t offset, uint64_t length, struct image **owner,
		struct mapping *out)
{
	struct resolved *map = get_map(disk);
	choose_span(disk, &map, root);
	uint64_t index = offset >> map->span_bits;
	struct span *s = find(map, index);
	if (!s || s->root != root->generation) {
		int rc = build(map, root, index, s, &s);
		if (rc < 0)
			return rc;
	} else if (map->lru.lru_next != s) {
		lru_remove(s);
		lru_push(map, s);
	}
	look_up(s, offset - (index << map->span_bits), length, owner, out);
	return 0;
}
