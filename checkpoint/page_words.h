/* Pages as words of a bitmap, and which of these are worth a look: what was written in much memory is gone through in little time. */
#ifndef VMCP_CHECKPOINT_PAGE_WORDS_H
#define VMCP_CHECKPOINT_PAGE_WORDS_H

#include <stdint.h>

struct page_words {
	const uint64_t *words; /* one bit a ram page */
	const uint32_t *list;  /* numbers of the words that are not 0, ascending; the rest is not looked at */
	uint64_t count;	       /* of the list */
};

#endif
