/* The kernel command line: words "key=value". README.md says what each of them does. */
#ifndef TINY_OPTIONS_H
#define TINY_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#define OPTIONS_SET_ALL UINT64_MAX

enum mem_mode { MEM_UNIFORM, MEM_ZIPF, MEM_HOT, MEM_SEQ };

struct options {
	uint64_t set_bytes; /* OPTIONS_SET_ALL: all that there is */
	uint64_t hot_pages;
	uint64_t rate; /* pages written per second, 0 = as fast as it goes */
	enum mem_mode mode;
	bool full; /* rewrite the whole page at each step */
	uint64_t disks; /* in use, at most 2 */
	bool bench; /* of the disk, which is then for nothing else */
	bool balloon;
	uint64_t net; /* pairs of queues of the card, 0: it is not used */
	uint64_t beat_rate; /* frames to everybody per second */
	uint64_t random_rate; /* numbers of the entropy device per second, 0: it is not used */
	uint64_t spare_bytes; /* for the balloon to give back */
	uint64_t report_rate; /* chunks of it reported as free or filled again per second */
	bool disk_fill;	      /* write the whole area once at boot */
	bool disk_mixed;      /* requests of many sizes, not only 4 KiB */
	uint64_t disk_blocks; /* of 4 KiB */
	uint64_t disk_rate;   /* writes per second, 0 = as fast as it goes */
	uint64_t queue_depth;
	uint64_t seed;
	uint64_t report_ms;  /* 0 = no status lines but on request */
	uint64_t tsc_khz;    /* 0 = measure */
	bool idle;	     /* sleep where there is nothing to do */
	bool paused;	     /* begin with the work stopped */
	const char *unknown; /* the last word that means nothing to us, NULL if there is none */
};

void options_default(struct options *options);

/*
 * Takes `text` apart in place. Returns NULL, or the word whose value is wrong. A word with a key that is not
 * ours is no error (loaders add words of their own) but is noted in `unknown`.
 */
const char *options_parse(struct options *options, char *text);

bool options_parse_mode(const char *text, enum mem_mode *mode);
const char *options_mode_name(enum mem_mode mode);

#endif
