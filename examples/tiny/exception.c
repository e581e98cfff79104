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

#define EXCEPTIONS     32u
#define STUB_BYTES     16u
#define SELECTOR_CPL0  0x08
#define TYPE_INTERRUPT 0x8e

extern struct gate idt[EXCEPTIONS + 1];
extern const char exception_stubs[];

void exception_gate(unsigned int vector, const char *code)
{
	uint64_t offset = (uintptr_t)code;

	idt[vector] = (struct gate){
		.offset_0_15 = (uint16_t)offset,
		.selector = SELECTOR_CPL0,
		.type = TYPE_INTERRUPT,
		.offset_16_31 = (uint16_t)(offset >> 16),
		.offset_32_63 = (uint32_t)(offset >> 32),
	};
}

void exception_start(void)
{
	unsigned int i;

	for (i = 0; i < EXCEPTIONS; i++)
		exception_gate(i, exception_stubs + (uintptr_t)i * STUB_BYTES);
}
