/*
 * Numbered fault points. A test sets VMCP_FAULT=NUMBER[:COUNT][:ACTION] in the environment: at the COUNT-th passage
 * (default 1) through that point the process acts: "kill" (SIGKILL to itself, the default), "eio", "enospc" (the point
 * reports that errno), "sleep=MS" (said on stderr as it begins). Without the variable a point costs one predictable branch.
 * The numbers are listed in fault_points.def, one line each with the place's meaning; numbers are never reused.
 */
#ifndef VMCP_BASE_FAULT_H
#define VMCP_BASE_FAULT_H

#include "base/err.h"

enum fault_point {
#define FAULT_POINT(number, name, meaning) FAULT_##name = (number),
#include "base/fault_points.def"
#undef FAULT_POINT
};

/* Reads the environment. Once, at start, before threads. A malformed variable: -EINVAL, ERR_USAGE. */
int fault_init(struct err *err);
/* 0, or -errno if the test asked for one here (err set, naming the point). */
int fault_check(enum fault_point point, struct err *err);
/* Name and meaning of each point, for the test that lists them; index from 0, NULL at the end. */
const char *fault_name(unsigned index, unsigned *number, const char **meaning);

#endif
