/* The only file that knows libxml2. Its functions are looked up at run time; its structs are what its headers say, which has not changed since libxml2.so.2. */
#include "machine/xml.h"

#include <ctype.h>
#include <errno.h>
#include <libxml/parser.h>
#include <libxml/tree.h>
#include <libxml/xmlerror.h>
#include <string.h>

#include "base/buf.h"
#include "base/library.h"

#define MAX_DEPTH 64

#define FUNCTIONS(X) X(xmlReadMemory) X(xmlFreeDoc) X(xmlDocGetRootElement) X(xmlGetLastError) X(xmlResetLastError)
struct functions {
	FUNCTIONS(LIBRARY_FIELD)
};
static const struct library libxml2 = {"libxml2.so.2", LIBRARY_NAMES(FUNCTIONS)};

static int load(struct functions *out, struct err *err)
{
	const char *why = library_load(&libxml2, out);

	if (!why)
		return 0;
	err_set(err, ERR_HOST, ENOSYS, "libxml2: %s", why);
	return err_hint(err, "domain XML needs it: `apt-get install libxml2`, or write a guest.cfg");
}

/* --- copying --- */

static void trim(struct buf *text)
{
	char *start = (char *)text->data;
	size_t length = text->length;

	while (length && isspace((unsigned char)start[length - 1]))
		length--;
	size_t skip = 0;
	while (skip < length && isspace((unsigned char)start[skip]))
		skip++;
	memmove(start, start + skip, length - skip);
	start[length - skip] = '\0';
}

static int append_text(struct buf *out, const xmlNode *node, struct err *err)
{
	int rc = 0;

	for (; !rc && node; node = node->next)
		if ((node->type == XML_TEXT_NODE || node->type == XML_CDATA_SECTION_NODE) && node->content)
			rc = buf_append(out, node->content, strlen((const char *)node->content), err);
	return rc;
}

/* malloc. */
static int copy_text(const xmlNode *first, bool trimmed, char **out, struct err *err)
{
	struct buf text = BUF_INIT;
	int rc = append_text(&text, first, err);

	if (!rc)
		rc = buf_append(&text, NULL, 1, err);
	if (rc) {
		buf_free(&text);
		return rc;
	}
	if (trimmed) {
		text.length--;
		trim(&text);
	}
	*out = (char *)text.data;
	return 0;
}

static int copy_attributes(const xmlNode *from, struct xml_node *to, struct err *err)
{
	struct xml_attribute **end = &to->attributes;
	int rc = 0;

	for (const xmlAttr *a = from->properties; !rc && a; a = a->next) {
		if (a->ns)
			continue; /* xml:space and the like say nothing about a machine */
		struct xml_attribute *copy = xcalloc(1, sizeof(*copy));

		*end = copy;
		end = &copy->next;
		copy->name = xstrdup((const char *)a->name);
		rc = copy_text(a->children, false, &copy->value, err);
	}
	return rc;
}

static bool is_foreign(const xmlNode *node, const xmlNode *root)
{
	return node->ns && (!root->ns || strcmp((const char *)node->ns->href, (const char *)root->ns->href) != 0);
}

/* Depth is bounded before: by `depth`. */
static int copy_node(const xmlNode *from, const xmlNode *root, unsigned depth, struct xml_node *to, struct err *err)
{
	struct xml_node **end = &to->children;
	int rc = 0;

	to->name = xstrdup((const char *)from->name);
	to->foreign = is_foreign(from, root);
	to->line = from->line;
	rc = copy_attributes(from, to, err);
	if (!rc)
		rc = copy_text(from->children, true, &to->text, err);
	if (!rc && depth == MAX_DEPTH)
		return err_set(err, ERR_USAGE, EINVAL, "line %u: elements within elements, more than %d deep", to->line, MAX_DEPTH);
	for (const xmlNode *child = from->children; !rc && child; child = child->next) {
		if (child->type != XML_ELEMENT_NODE)
			continue;
		struct xml_node *copy = xcalloc(1, sizeof(*copy));

		copy->parent = to;
		*end = copy;
		end = &copy->next;
		rc = copy_node(child, root, depth + 1, copy, err);
	}
	return rc;
}

/* --- parsing --- */

static int tell_error(const struct functions *xml, const char *what, struct err *err)
{
	const xmlError *last = xml->xmlGetLastError();
	const char *why = last && last->message ? last->message : "it cannot be read";
	int line = last && last->line > 0 ? last->line : 1;

	err_set(err, ERR_USAGE, EINVAL, "%s:%d: is no well-formed XML: %.*s", what, line, (int)strcspn(why, "\n"), why);
	return err_hint(err, "`xmllint --noout FILE` shows where");
}

int xml_parse(const char *what, const char *data, size_t length, struct xml_node **out, struct err *err)
{
	struct functions xml = {0};
	int rc = load(&xml, err);

	if (rc)
		return rc;
	if (length > XML_MAX_BYTES)
		return err_set(err, ERR_USAGE, EFBIG, "%s: longer than %u bytes", what, XML_MAX_BYTES);
	xml.xmlResetLastError();
	xmlDoc *doc = xml.xmlReadMemory(data, (int)length, NULL, NULL, XML_PARSE_NONET | XML_PARSE_NOERROR | XML_PARSE_NOWARNING);
	if (!doc)
		return tell_error(&xml, what, err);
	const xmlNode *root = xml.xmlDocGetRootElement(doc);
	if (!root || doc->intSubset) {
		rc = err_set(err, ERR_USAGE, EINVAL, "%s: %s", what, root ? "has a document type of its own (DTD)" : "is empty");
		err_hint(err, "a libvirt domain is needed, as `virsh dumpxml` prints it");
	} else {
		*out = xcalloc(1, sizeof(**out));
		rc = copy_node(root, root, 0, *out, err);
		if (rc) {
			err_prefix(err, "%s", what);
			xml_free(*out);
			*out = NULL;
		}
	}
	xml.xmlFreeDoc(doc);
	return rc;
}
