/*
 * Runs a fuzz target without libFuzzer: on every file of a corpus, and on seeded mutations of them.
 *
 *     NAME_replay FOLDER [MUTATIONS [SEED]]
 *
 * A hang is ended by SIGALRM. To run one input under a debugger: put it into a folder of its own.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/file.h"
#include "fuzz/fuzz.h"

enum { INPUT_LIMIT = 1 << 20, SECONDS_EACH = 60 };

static uint64_t random_state;

static uint64_t pick(uint64_t below)
{
	random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
	return (random_state >> 33) % below;
}

static void mutate(uint8_t *data, size_t size)
{
	static const uint8_t special[] = {0, 1, 2, 3, 0x7f, 0x80, 0xff, 0xfe, 9, 21, 63};
	for (uint64_t n = 1 + pick(6); n > 0; n--) {
		size_t at = (size_t)(pick(3) ? pick(size < 128 ? size : 128) : pick(size));
		switch (pick(4)) {
		case 0:
			data[at] ^= (uint8_t)(1u << pick(8));
			break;
		case 1:
			data[at] = special[pick(sizeof(special))];
			break;
		case 2:
			data[at] = (uint8_t)pick(256);
			break;
		default: /* a table entry becomes another one */
			if (size >= 16)
				memmove(data + (at & ~(size_t)7) % (size - 8), data + pick(size / 8) * 8 % (size - 8),
					8);
		}
	}
}

static void run(const uint8_t *data, size_t size)
{
	alarm(SECONDS_EACH);
	LLVMFuzzerTestOneInput(data, size);
	alarm(0);
}

static int run_file(int folder, const char *name, uint64_t mutations)
{
	struct err err = ERR_INIT;
	struct buf input = BUF_INIT;
	if (file_read_all(folder, name, INPUT_LIMIT, &input, &err) < 0) {
		fprintf(stderr, "replay: %s\n", err.message);
		return 1;
	}
	run((const uint8_t *)input.data, input.length);
	uint8_t *copy = malloc(input.length + 1);
	for (uint64_t i = 0; i < mutations && input.length; i++) {
		memcpy(copy, input.data, input.length);
		mutate(copy, input.length);
		run(copy, pick(10) ? input.length : (size_t)pick(input.length));
	}
	free(copy);
	buf_free(&input);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	uint64_t mutations = argc > 2 ? strtoull(argv[2], NULL, 0) : 0, files = 0;
	random_state = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
	DIR *folder = opendir(argv[1]);
	int failed = !folder;
	for (struct dirent *e; folder && (e = readdir(folder));)
		if (e->d_name[0] != '.') {
			failed |= run_file(dirfd(folder), e->d_name, mutations);
			files++;
		}
	if (folder)
		closedir(folder);
	printf("checks: %llu\n", (unsigned long long)(files * (mutations + 1)));
	return failed || files == 0;
}
