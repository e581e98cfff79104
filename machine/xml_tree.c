/* The trees that xml.c makes. */
#include <stdlib.h>
#include <string.h>

#include "machine/xml.h"

void xml_free(struct xml_node *root)
{
	if (!root)
		return;
	for (struct xml_attribute *a = root->attributes, *next; a; a = next) {
		next = a->next;
		free(a->name);
		free(a->value);
		free(a);
	}
	for (struct xml_node *child = root->children, *next; child; child = next) {
		next = child->next;
		xml_free(child);
	}
	free(root->name);
	free(root->text);
	free(root);
}

const char *xml_attribute(const struct xml_node *node, const char *name)
{
	for (const struct xml_attribute *a = node ? node->attributes : NULL; a; a = a->next)
		if (!strcmp(a->name, name))
			return a->value;
	return NULL;
}

const struct xml_node *xml_child(const struct xml_node *node, const char *name)
{
	for (const struct xml_node *child = node ? node->children : NULL; child; child = child->next)
		if (!child->foreign && !strcmp(child->name, name))
			return child;
	return NULL;
}

const char *xml_child_attribute(const struct xml_node *node, const char *child, const char *name)
{
	return xml_attribute(xml_child(node, child), name);
}

const char *xml_child_text(const struct xml_node *node, const char *child)
{
	const struct xml_node *found = xml_child(node, child);

	return found ? found->text : NULL;
}
