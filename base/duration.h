/* Stretches of time as people write them: digits, then ms, s, m or h; digits alone are seconds. */
#ifndef VMCP_BASE_DURATION_H
#define VMCP_BASE_DURATION_H

#include <stdbool.h>
#include <stdint.h>

/* False, and *ns as it was, if the text is no such thing or does not fit. */
bool duration_parse(const char *text, uint64_t *ns);
/* The shortest form that duration_parse reads back: "50ms", "30s". Below a millisecond is cut off. */
void duration_format(char out[32], uint64_t ns);
#define DURATION_HINT "write a number with ms, s, m or h, for example 30s"

#endif
