/* Any bytes as the checksums of a memory layer: listed from one end to the other, and asked for pages that are there and that are not. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/file.h"
#include "checkpoint/sums.h"
#include "fuzz/fuzz.h"

enum { ASKED = 32 };

static void ask(struct page_sums *sums, uint64_t seed)
{
	struct page_entry entries[PAGE_SUMS_MAX_READ];
	struct page_sum_entry list[PAGE_SUMS_MAX_READ];
	uint64_t listed = min_u64(sums->count, PAGE_SUMS_MAX_READ);
	page_sums_list(sums, 0, listed, list, NULL);
	for (uint64_t i = 0; i < ASKED; i++) {
		seed = seed * 6364136223846793005ull + 1442695040888963407ull;
		uint64_t page = listed && i % 2 ? list[(seed >> 33) % listed].page : (seed >> 33) % 70000;
		page_sums_read(sums, page, 1 + (seed >> 20) % (i % 3 ? 4 : PAGE_SUMS_MAX_READ), entries, NULL);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct page_sums sums;
	int fd = memfd_create("sums", MFD_CLOEXEC);
	if (fd < 0 || file_pwrite_full(fd, data, size, 0, NULL) != 0)
		abort();
	if (page_sums_open(&sums, fd, NULL) == 0)
		ask(&sums, size ? data[size - 1] + size : 0);
	page_sums_close(&sums);
	close(fd);
	return 0;
}
