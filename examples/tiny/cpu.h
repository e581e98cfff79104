/* The few instructions that C has no words for. All of them work at CPL 3 with IOPL 3. */
#ifndef TINY_CPU_H
#define TINY_CPU_H

#include <stdint.h>

static inline uint64_t cpu_tsc(void)
{
	uint32_t low, high;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

static inline void cpu_relax(void) { __asm__ volatile("pause" : : : "memory"); }

/* x86 keeps loads and stores in order but for a store before a load of another address. */
static inline void cpu_barrier(void) { __asm__ volatile("" : : : "memory"); }

static inline void cpu_fence(void) { __asm__ volatile("lock addl $0, -8(%%rsp)" : : : "memory", "cc"); }

static inline void outb(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void outw(uint16_t port, uint16_t value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void outl(uint16_t port, uint32_t value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t inb(uint16_t port)
{
	uint8_t value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint32_t inl(uint16_t port)
{
	uint32_t value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

/* Device memory is touched by plain moves only: any other form may be one that an emulator lacks. */
static inline uint8_t mmio_read8(const volatile void *at)
{
	uint8_t value;
	__asm__ volatile("movb %1, %0" : "=q"(value) : "m"(*(const volatile uint8_t *)at) : "memory");
	return value;
}

static inline uint16_t mmio_read16(const volatile void *at)
{
	uint16_t value;
	__asm__ volatile("movw %1, %0" : "=r"(value) : "m"(*(const volatile uint16_t *)at) : "memory");
	return value;
}

static inline uint32_t mmio_read32(const volatile void *at)
{
	uint32_t value;
	__asm__ volatile("movl %1, %0" : "=r"(value) : "m"(*(const volatile uint32_t *)at) : "memory");
	return value;
}

static inline void mmio_write8(volatile void *at, uint8_t value)
{
	__asm__ volatile("movb %0, %1" : : "q"(value), "m"(*(volatile uint8_t *)at) : "memory");
}

static inline void mmio_write16(volatile void *at, uint16_t value)
{
	__asm__ volatile("movw %0, %1" : : "r"(value), "m"(*(volatile uint16_t *)at) : "memory");
}

static inline void mmio_write32(volatile void *at, uint32_t value)
{
	__asm__ volatile("movl %0, %1" : : "r"(value), "m"(*(volatile uint32_t *)at) : "memory");
}

#endif
