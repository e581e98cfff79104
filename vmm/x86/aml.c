/* See aml.h. Numbers of opcodes and descriptors: ACPI 6.4, 20.2 and 6.4. */
#include <string.h>

#include "base/bytes.h"
#include "vmm/x86/aml.h"

#define OP_NAME	      0x08
#define OP_BYTE	      0x0a
#define OP_WORD	      0x0b
#define OP_DWORD      0x0c
#define OP_STRING     0x0d
#define OP_QWORD      0x0e
#define OP_SCOPE      0x10
#define OP_BUFFER     0x11
#define OP_PACKAGE    0x12
#define OP_METHOD     0x14
#define OP_DUAL_NAME  0x2e
#define OP_MULTI_NAME 0x2f
#define OP_EXTENDED   0x5b
#define OP_NOTIFY     0x86
#define OP_EXT_DEVICE 0x82

#define SEGMENT_BYTES	     4u
#define PKG_LENGTH_MAX_BYTES 4u

#define RES_IO		 0x47
#define RES_IRQ_NO_FLAGS 0x22
#define RES_END		 0x79
#define RES_DWORD_WINDOW 0x87
#define RES_WORD_WINDOW	 0x88
#define RES_INTERRUPT	 0x89
#define RES_QWORD_WINDOW 0x8a

#define METHOD_SERIALIZED      0x08
#define INTERRUPT_EDGE_CONSUMER 0x03 /* active high, exclusive */

enum window_kind { WINDOW_MEMORY = 0, WINDOW_IO = 1, WINDOW_BUS = 2 };
#define WINDOW_FIXED	       0x0c /* producer, positive decode, both ends fixed */
#define WINDOW_MEMORY_WRITABLE 1    /* and not cacheable */
#define WINDOW_IO_ENTIRE       3    /* ISA and non-ISA ports */

static void put(struct aml *aml, const void *data, size_t bytes)
{
	if (!aml->failed && buf_append(&aml->buf, data, bytes, NULL) < 0)
		aml->failed = true;
}

static void put_byte(struct aml *aml, uint8_t value) { put(aml, &value, 1); }

/* Little endian, the low `bytes` bytes. */
static void put_number(struct aml *aml, uint64_t value, size_t bytes)
{
	uint8_t raw[8];

	put_le64(raw, value);
	put(aml, raw, bytes);
}

void aml_free(struct aml *aml)
{
	buf_free(&aml->buf);
	*aml = AML_INIT;
}

void aml_integer(struct aml *aml, uint64_t value)
{
	if (value <= 1) {
		put_byte(aml, (uint8_t)value); /* ZeroOp, OneOp */
	} else if (value <= UINT8_MAX) {
		put_byte(aml, OP_BYTE);
		put_number(aml, value, 1);
	} else if (value <= UINT16_MAX) {
		put_byte(aml, OP_WORD);
		put_number(aml, value, 2);
	} else if (value <= UINT32_MAX) {
		put_byte(aml, OP_DWORD);
		put_number(aml, value, 4);
	} else {
		put_byte(aml, OP_QWORD);
		put_number(aml, value, 8);
	}
}

void aml_string(struct aml *aml, const char *text)
{
	put_byte(aml, OP_STRING);
	put(aml, text, strlen(text) + 1);
}

static unsigned hex_digit(char c) { return c <= '9' ? (unsigned)(c - '0') : (unsigned)(c - 'A' + 10); }

/* Three letters of five bits, four hex digits: big endian (EISAID, 19.3.4). */
void aml_eisa_id(struct aml *aml, const char id[7])
{
	uint8_t raw[4];
	uint32_t value = 0;

	for (int i = 0; i < 3; i++)
		value = value << 5 | (uint32_t)(id[i] - '@');
	for (int i = 3; i < 7; i++)
		value = value << 4 | hex_digit(id[i]);
	put_be32(raw, value);
	put_byte(aml, OP_DWORD);
	put(aml, raw, sizeof(raw));
}

static void put_path(struct aml *aml, const char *path)
{
	uint8_t segments = 1;

	if (*path == '\\') {
		put_byte(aml, '\\');
		path++;
	}
	for (const char *p = path; *p; p++)
		segments = (uint8_t)(segments + (*p == '.'));
	if (segments == 2) {
		put_byte(aml, OP_DUAL_NAME);
	} else if (segments > 2) {
		put_byte(aml, OP_MULTI_NAME);
		put_byte(aml, segments);
	}
	while (*path) {
		char name[SEGMENT_BYTES];
		size_t length = strcspn(path, ".");
		memset(name, '_', sizeof(name));
		memcpy(name, path, length < sizeof(name) ? length : sizeof(name));
		put(aml, name, sizeof(name));
		path += length + (path[length] == '.');
	}
}

void aml_name(struct aml *aml, const char *path)
{
	put_byte(aml, OP_NAME);
	put_path(aml, path);
}

/* PkgLength (20.2.4) counts itself, and is as long as it needs to be: it is put in front of the content once that is
 * known. */
void aml_end(struct aml *aml, size_t mark)
{
	uint8_t raw[PKG_LENGTH_MAX_BYTES];
	size_t bytes = 1;

	if (aml->failed)
		return;
	size_t content = aml->buf.length - mark;
	while (bytes < sizeof(raw) && content + bytes >= (bytes == 1 ? (size_t)1 << 6 : (size_t)1 << (8 * bytes - 4)))
		bytes++;
	size_t total = content + bytes;
	if (bytes == 1) {
		raw[0] = (uint8_t)total;
	} else {
		raw[0] = (uint8_t)((bytes - 1) << 6 | (total & 0xf));
		for (size_t i = 1; i < bytes; i++)
			raw[i] = (uint8_t)(total >> (8 * i - 4));
	}
	put(aml, NULL, bytes);
	if (aml->failed)
		return;
	memmove(aml->buf.data + mark + bytes, aml->buf.data + mark, content);
	memcpy(aml->buf.data + mark, raw, bytes);
}

size_t aml_scope_begin(struct aml *aml, const char *path)
{
	put_byte(aml, OP_SCOPE);
	size_t mark = aml->buf.length;
	put_path(aml, path);
	return mark;
}

size_t aml_device_begin(struct aml *aml, const char *path)
{
	put_byte(aml, OP_EXTENDED);
	put_byte(aml, OP_EXT_DEVICE);
	size_t mark = aml->buf.length;
	put_path(aml, path);
	return mark;
}

size_t aml_method_begin(struct aml *aml, const char *path, unsigned arguments)
{
	put_byte(aml, OP_METHOD);
	size_t mark = aml->buf.length;
	put_path(aml, path);
	put_byte(aml, (uint8_t)(arguments | METHOD_SERIALIZED));
	return mark;
}

void aml_notify(struct aml *aml, const char *path, uint8_t value)
{
	put_byte(aml, OP_NOTIFY);
	put_path(aml, path);
	aml_integer(aml, value);
}

size_t aml_package_begin(struct aml *aml, uint8_t elements)
{
	put_byte(aml, OP_PACKAGE);
	size_t mark = aml->buf.length;
	put_byte(aml, elements);
	return mark;
}

/* The buffer's size is an integer in front of the content: two bytes, filled in at the end. */
size_t aml_resources_begin(struct aml *aml)
{
	put_byte(aml, OP_BUFFER);
	size_t mark = aml->buf.length;
	put_byte(aml, OP_WORD);
	put_number(aml, 0, 2);
	return mark;
}

void aml_resources_end(struct aml *aml, size_t mark)
{
	put_byte(aml, RES_END);
	put_byte(aml, 0); /* checksum 0: not checked */
	if (!aml->failed)
		put_le16(aml->buf.data + mark + 1, (uint16_t)(aml->buf.length - mark - 3));
	aml_end(aml, mark);
}

void aml_res_io(struct aml *aml, uint16_t port, uint8_t ports)
{
	put_byte(aml, RES_IO);
	put_byte(aml, 1); /* decodes 16 bits */
	put_number(aml, port, 2);
	put_number(aml, port, 2);
	put_byte(aml, 1);
	put_byte(aml, ports);
}

void aml_res_irq(struct aml *aml, unsigned irq)
{
	put_byte(aml, RES_IRQ_NO_FLAGS);
	put_number(aml, 1u << irq, 2);
}

void aml_res_gsi(struct aml *aml, unsigned gsi)
{
	put_byte(aml, RES_INTERRUPT);
	put_number(aml, 6, 2);
	put_byte(aml, INTERRUPT_EDGE_CONSUMER);
	put_byte(aml, 1);
	put_number(aml, gsi, 4);
}

static void put_window(struct aml *aml, uint8_t tag, enum window_kind kind, uint8_t flags, uint64_t first,
		       uint64_t last, size_t width)
{
	put_byte(aml, tag);
	put_number(aml, 3 + 5 * width, 2);
	put_byte(aml, (uint8_t)kind);
	put_byte(aml, WINDOW_FIXED);
	put_byte(aml, flags);
	put_number(aml, 0, width); /* granularity */
	put_number(aml, first, width);
	put_number(aml, last, width);
	put_number(aml, 0, width); /* translation */
	put_number(aml, last - first + 1, width);
}

void aml_res_bus_window(struct aml *aml, uint16_t first, uint16_t last)
{
	put_window(aml, RES_WORD_WINDOW, WINDOW_BUS, 0, first, last, 2);
}

void aml_res_io_window(struct aml *aml, uint16_t first, uint16_t last)
{
	put_window(aml, RES_WORD_WINDOW, WINDOW_IO, WINDOW_IO_ENTIRE, first, last, 2);
}

void aml_res_mem32_window(struct aml *aml, uint32_t first, uint32_t last)
{
	put_window(aml, RES_DWORD_WINDOW, WINDOW_MEMORY, WINDOW_MEMORY_WRITABLE, first, last, 4);
}

void aml_res_mem64_window(struct aml *aml, uint64_t first, uint64_t last)
{
	put_window(aml, RES_QWORD_WINDOW, WINDOW_MEMORY, WINDOW_MEMORY_WRITABLE, first, last, 8);
}
