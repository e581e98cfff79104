/*
 * A writer of AML, the bytecode of ACPI's definition blocks (ACPI 6.4, chapter 20).
 *
 * Calls append in the order of the bytecode; whatever has a length is opened by a *_begin, which returns a mark, and
 * closed by aml_end with that mark, innermost first. A failed allocation is kept in the writer: check `failed` once, at
 * the end.
 */
#ifndef VMCP_VMM_X86_AML_H
#define VMCP_VMM_X86_AML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"

struct aml {
	struct buf buf;
	bool failed;
};

#define AML_INIT ((struct aml){.buf = BUF_INIT})

void aml_free(struct aml *aml);

/* Objects: each is one operand, for example the value after aml_name. */
void aml_integer(struct aml *aml, uint64_t value);
void aml_string(struct aml *aml, const char *text);
void aml_eisa_id(struct aml *aml, const char id[7]); /* "PNP0A03" */

/* Name (path, ...): one object follows. Paths as in ASL, short segments are filled with '_': "\\_SB.PCI0". */
void aml_name(struct aml *aml, const char *path);

size_t aml_scope_begin(struct aml *aml, const char *path);
size_t aml_device_begin(struct aml *aml, const char *path);
size_t aml_method_begin(struct aml *aml, const char *path, unsigned arguments); /* serialized */
size_t aml_package_begin(struct aml *aml, uint8_t elements); /* so many objects follow */
/* ResourceTemplate () as one object; only aml_res_* calls come before its end. */
size_t aml_resources_begin(struct aml *aml);
void aml_end(struct aml *aml, size_t mark);
void aml_resources_end(struct aml *aml, size_t mark);

/* Notify (path, value), in a method. */
void aml_notify(struct aml *aml, const char *path, uint8_t value);

/* Resource descriptors (6.4). Windows are what a bridge passes on to its bus; `last` is inclusive. */
void aml_res_io(struct aml *aml, uint16_t port, uint8_t ports);
void aml_res_irq(struct aml *aml, unsigned irq); /* ISA: edge, active high, exclusive */
void aml_res_gsi(struct aml *aml, unsigned gsi); /* any: edge, active high, exclusive */
void aml_res_bus_window(struct aml *aml, uint16_t first, uint16_t last);
void aml_res_io_window(struct aml *aml, uint16_t first, uint16_t last);
void aml_res_mem32_window(struct aml *aml, uint32_t first, uint32_t last);
void aml_res_mem64_window(struct aml *aml, uint64_t first, uint64_t last);

#endif
