/* What Jansson has not. Header only. */
#ifndef VMCP_BASE_JSON_H
#define VMCP_BASE_JSON_H

#include <string.h>

#include <jansson.h>

#include "base/buf.h"

/* An array of the parts of a text between separators; none is empty. */
static inline json_t *json_split(const char *text, const char *separators)
{
	CLEANUP_FREE char *copy = xstrdup(text);
	json_t *list = json_array();
	char *rest;

	for (char *part = strtok_r(copy, separators, &rest); part; part = strtok_r(NULL, separators, &rest))
		json_array_append_new(list, json_string(part));
	return list;
}

#endif
