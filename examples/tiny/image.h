#ifndef TINY_IMAGE_H
#define TINY_IMAGE_H

#include <stdint.h>

/* A sum over our own code and constants, which nothing may ever change. */
uint64_t image_sum(void);

#endif
