/* Endian access to byte arrays and checked arithmetic. Header only. */
#ifndef VMCP_BASE_BYTES_H
#define VMCP_BASE_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PAGE_BYTES 4096u
#define PAGE_SHIFT 12

static inline uint16_t get_be16(const void *p)
{
	uint16_t v;
	memcpy(&v, p, sizeof(v));
	return __builtin_bswap16(v);
}
static inline uint32_t get_be32(const void *p)
{
	uint32_t v;
	memcpy(&v, p, sizeof(v));
	return __builtin_bswap32(v);
}
static inline uint64_t get_be64(const void *p)
{
	uint64_t v;
	memcpy(&v, p, sizeof(v));
	return __builtin_bswap64(v);
}
static inline void put_be16(void *p, uint16_t v)
{
	v = __builtin_bswap16(v);
	memcpy(p, &v, sizeof(v));
}
static inline void put_be32(void *p, uint32_t v)
{
	v = __builtin_bswap32(v);
	memcpy(p, &v, sizeof(v));
}
static inline void put_be64(void *p, uint64_t v)
{
	v = __builtin_bswap64(v);
	memcpy(p, &v, sizeof(v));
}
/* The host is little-endian x86-64 (checked in bytes_test.c), so little endian is a copy. */
static inline uint16_t get_le16(const void *p)
{
	uint16_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}
static inline uint32_t get_le32(const void *p)
{
	uint32_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}
static inline uint64_t get_le64(const void *p)
{
	uint64_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}
static inline void put_le16(void *p, uint16_t v) { memcpy(p, &v, sizeof(v)); }
static inline void put_le32(void *p, uint32_t v) { memcpy(p, &v, sizeof(v)); }
static inline void put_le64(void *p, uint64_t v) { memcpy(p, &v, sizeof(v)); }

/* True if a + b does not fit; otherwise *sum is set. */
static inline bool add_overflows(uint64_t a, uint64_t b, uint64_t *sum) { return __builtin_add_overflow(a, b, sum); }
/* True if a * b does not fit; otherwise *product is set. */
static inline bool mul_overflows(uint64_t a, uint64_t b, uint64_t *product)
{
	return __builtin_mul_overflow(a, b, product);
}
/* True if [offset, offset + length) lies within [0, size), without overflow. */
static inline bool range_within(uint64_t offset, uint64_t length, uint64_t size)
{
	return offset <= size && length <= size - offset;
}
/* True if [a, a + an) and [b, b + bn) share a byte. The sums must not overflow. */
static inline bool ranges_overlap(uint64_t a, uint64_t an, uint64_t b, uint64_t bn)
{
	return an != 0 && bn != 0 && a < b + bn && b < a + an;
}
/* alignment is a power of two. */
static inline uint64_t round_down(uint64_t v, uint64_t alignment) { return v & ~(alignment - 1); }
/* alignment is a power of two; the result must fit. */
static inline uint64_t round_up(uint64_t v, uint64_t alignment) { return (v + alignment - 1) & ~(alignment - 1); }
static inline uint64_t div_round_up(uint64_t v, uint64_t by) { return v / by + (v % by != 0); }
static inline uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }
/* length: at least 1. */
static inline bool bytes_are_zero(const uint8_t *data, size_t length) { return data[0] == 0 && memcmp(data, data + 1, length - 1) == 0; }

/* Two lower-case digits a byte, and a 0 behind them. */
static inline void put_hex(char *out, const uint8_t *data, size_t bytes)
{
	static const char digits[] = "0123456789abcdef";

	for (size_t i = 0; i < bytes; i++) {
		out[2 * i] = digits[data[i] >> 4];
		out[2 * i + 1] = digits[data[i] & 15];
	}
	out[2 * bytes] = '\0';
}
/* The same back. False, and *out is undefined, if the text is anything else. */
static inline bool get_hex(uint8_t *out, const char *text, size_t bytes)
{
	static const char digits[] = "0123456789abcdef";

	if (strlen(text) != 2 * bytes || strspn(text, digits) != 2 * bytes)
		return false;
	for (size_t i = 0; i < bytes; i++)
		out[i] = (uint8_t)((strchr(digits, text[2 * i]) - digits) << 4 | (strchr(digits, text[2 * i + 1]) - digits));
	return true;
}

#endif
