/*
 * "Did you mean": which of the known names one that is not known was meant to be.
 *
 * Meant is one of which at most a third of the letters differ (one of two); letters that changed places count once, and the beginning of a longer name as one
 * letter. Capitals are the same as small letters. Of several equally near ones the first that was tried.
 *
 *     struct nearest nearest = nearest_to(name);
 *     for (...)
 *             nearest_try(&nearest, known[i]);
 *     if (nearest.name[0])
 *             err_hint(err, "did you mean '%s'?", nearest.name);
 */
#ifndef VMCP_BASE_NEAREST_H
#define VMCP_BASE_NEAREST_H

#define NEAREST_BYTES 64 /* names that are longer are not compared */

struct nearest {
	const char *wanted;
	unsigned distance;
	char name[NEAREST_BYTES]; /* "": none is near */
};

/* `wanted` must outlive the struct's use. */
struct nearest nearest_to(const char *wanted);
void nearest_try(struct nearest *nearest, const char *known);

#endif
