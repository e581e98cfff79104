/*
 * XML documents as small trees of elements: names without prefix, attributes, text. Read with libxml2, which is loaded when the first document is read: a VM that
 * has nothing to do with XML does not carry it.
 *
 * Untrusted input: no network, no external files, no entities of the document's own (one with a DTD is refused), bounded depth. One thread.
 */
#ifndef VMCP_MACHINE_XML_H
#define VMCP_MACHINE_XML_H

#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"

#define XML_MAX_BYTES (4u << 20)

struct xml_attribute {
	char *name, *value;
	struct xml_attribute *next;
};

struct xml_node {
	char *name;
	bool foreign; /* of another namespace than the document's own, such as qemu:commandline */
	unsigned line;
	char *text; /* of this element itself, white space at both ends taken off; "" if none */
	struct xml_attribute *attributes;
	struct xml_node *children, *next; /* in the order of the document */
	struct xml_node *parent;	  /* NULL: the root */
};

/* `what` names the document in errors. Not well-formed, empty, or with a DTD: ERR_USAGE with the line. No libxml2: ERR_HOST. The tree is freed by xml_free. */
int xml_parse(const char *what, const char *data, size_t length, struct xml_node **out, struct err *err);
void xml_free(struct xml_node *root); /* NULL is allowed */

/* Each takes node == NULL, and answers NULL then. */
const char *xml_attribute(const struct xml_node *node, const char *name);
const struct xml_node *xml_child(const struct xml_node *node, const char *name); /* the first of that name */
/* The child's attribute or text; NULL without the child (or attribute). */
const char *xml_child_attribute(const struct xml_node *node, const char *child, const char *name);
const char *xml_child_text(const struct xml_node *node, const char *child);

#endif
