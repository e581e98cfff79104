/*
 * The state codec: plain C structs to CBOR and back, driven by one const table per component.
 *
 * A device declares a POD struct of what its hardware shows and one table of its fields; the same table saves and
 * loads. On disk a struct is a CBOR map from field name to value (RFC 8949, definite lengths), so that fields may be
 * added: a field marked CODEC_OPTIONAL is missing where it is zero; any other missing, unknown or repeated field, a
 * value that does not fit its C type, or an array of another length is an error that names component and field.
 */
#ifndef VMCP_BASE_CODEC_H
#define VMCP_BASE_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"

enum codec_type {
	CODEC_U8,     /* uint8_t; of a bool the macros make CODEC_BOOL */
	CODEC_U16,
	CODEC_U32,
	CODEC_U64,
	CODEC_I64,
	CODEC_BYTES,  /* uint8_t[size]: always `size` bytes */
	CODEC_VBYTES, /* uint8_t[size] of which a uint32_t at count_offset says how many are used */
	CODEC_STRUCT, /* a nested struct with its own table */
	CODEC_ARRAY,  /* `count` elements of `size` bytes each, every one as `element` with its table */
	CODEC_VARRAY, /* the same, of which a uint32_t at count_offset says how many are used */
	CODEC_BOOL,   /* bool: 0 or 1, as another value in a bool would be undefined behaviour */
};

enum { CODEC_OPTIONAL = 1 };

struct codec_table;

struct codec_field {
	const char *name;
	enum codec_type type;
	size_t offset;		     /* in the struct */
	size_t size;		     /* bytes of the field, of one element for arrays */
	size_t count;		     /* elements of an array */
	size_t count_offset;	     /* of the uint32_t that counts, CODEC_VBYTES and CODEC_VARRAY */
	enum codec_type element;     /* CODEC_U8 ... CODEC_I64 or CODEC_STRUCT, for arrays */
	const struct codec_table *table; /* of a nested struct */
	unsigned flags;
};

struct codec_table {
	const char *name;	   /* of the component or struct, for errors */
	size_t size;		   /* sizeof the struct */
	const struct codec_field *fields; /* ends with name == NULL */
};

/* t, but CODEC_BOOL where the member is a bool. */
#define CODEC_INT_TYPE(member, t) _Generic((member), bool: CODEC_BOOL, default: (t))
/* The macros for a table's fields. A counting member (n) is saved with what it counts and is no field of its own. */
#define CODEC_INT(s, f, t)                                                                                             \
	{                                                                                                              \
		.name = #f, .type = CODEC_INT_TYPE(((s *)0)->f, t), .offset = offsetof(s, f),                          \
		.size = sizeof(((s *)0)->f)                                                                            \
	}
#define CODEC_OPTIONAL_INT(s, f, t)                                                                                    \
	{                                                                                                              \
		.name = #f, .type = CODEC_INT_TYPE(((s *)0)->f, t), .offset = offsetof(s, f),                          \
		.size = sizeof(((s *)0)->f), .flags = CODEC_OPTIONAL                                                   \
	}
#define CODEC_RAW(s, f) {.name = #f, .type = CODEC_BYTES, .offset = offsetof(s, f), .size = sizeof(((s *)0)->f)}
#define CODEC_VRAW(s, f, n)                                                                                            \
	{                                                                                                              \
		.name = #f, .type = CODEC_VBYTES, .offset = offsetof(s, f), .size = sizeof(((s *)0)->f),               \
		.count_offset = offsetof(s, n)                                                                         \
	}
#define CODEC_SUB(s, f, tab)                                                                                           \
	{                                                                                                              \
		.name = #f, .type = CODEC_STRUCT, .offset = offsetof(s, f), .size = sizeof(((s *)0)->f), .table = (tab)\
	}
#define CODEC_INTS(s, f, t)                                                                                            \
	{                                                                                                              \
		.name = #f, .type = CODEC_ARRAY, .offset = offsetof(s, f), .size = sizeof(((s *)0)->f[0]),             \
		.count = sizeof(((s *)0)->f) / sizeof(((s *)0)->f[0]),                                                 \
		.element = CODEC_INT_TYPE(((s *)0)->f[0], t)                                                           \
	}
#define CODEC_SUBS(s, f, tab)                                                                                          \
	{                                                                                                              \
		.name = #f, .type = CODEC_ARRAY, .offset = offsetof(s, f), .size = sizeof(((s *)0)->f[0]),             \
		.count = sizeof(((s *)0)->f) / sizeof(((s *)0)->f[0]), .element = CODEC_STRUCT, .table = (tab)         \
	}
#define CODEC_VSUBS(s, f, n, tab)                                                                                      \
	{                                                                                                              \
		.name = #f, .type = CODEC_VARRAY, .offset = offsetof(s, f), .size = sizeof(((s *)0)->f[0]),            \
		.count = sizeof(((s *)0)->f) / sizeof(((s *)0)->f[0]), .count_offset = offsetof(s, n),                 \
		.element = CODEC_STRUCT, .table = (tab)                                                                \
	}
#define CODEC_END {.name = NULL}

/* Appends the CBOR map of *object to *out. */
int codec_encode(const struct codec_table *table, const void *object, struct buf *out, struct err *err);
/* Decodes exactly one map that fills [data, data + length) into *object (table->size bytes, zeroed first).
 * On failure -EINVAL, ERR_DAMAGED; *object is unspecified and must not be used. The input is untrusted. */
int codec_decode(const struct codec_table *table, const void *data, size_t length, void *object, struct err *err);

#endif
