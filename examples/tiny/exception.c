#include "tiny.h"

struct gate {
	uint16_t offset_0_15;
	uint16_t selector;
	uint8_t stack;
	uint8_t type;
	uint16_t offset_16_31;
	uint32_t offset_32_63;
	uint32_t reserved;
};

#define GATES	       32u
#define STUB_BYTES     16u
#define SELECTOR_CPL0  0x08
#define TYPE_INTERRUPT 0x8e

extern struct gate idt[GATES];
extern const char exception_stubs[];

void exception_start(void)
{
	unsigned int i;
	uint64_t stub;

	for (i = 0; i < GATES; i++) {
		stub = (uintptr_t)exception_stubs + (uint64_t)i * STUB_BYTES;
		idt[i] = (struct gate){
			.offset_0_15 = (uint16_t)stub,
			.selector = SELECTOR_CPL0,
			.type = TYPE_INTERRUPT,
			.offset_16_31 = (uint16_t)(stub >> 16),
			.offset_32_63 = (uint32_t)(stub >> 32),
		};
	}
}
