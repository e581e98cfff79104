/*
 * Errors that say what failed, why, and what a person can do about it.
 *
 * A function that can fail returns 0 or -errno and takes a `struct err *` as its
 * last parameter. The innermost caller that knows the cause sets it; callers on
 * the way up put the object they were working on in front of it. The object is
 * plain data: it can be copied, and handed from one thread to another.
 * Every function accepts err == NULL.
 */
#ifndef VMCP_BASE_ERR_H
#define VMCP_BASE_ERR_H

/* What a user's script needs to tell apart. The values are vmcp's exit statuses. */
enum err_class {
	ERR_FAILED = 1,	   /* it failed */
	ERR_USAGE = 2,	   /* wrong usage: command line, configuration */
	ERR_NOT_FOUND = 3, /* no such VM, checkpoint or file */
	ERR_STATE = 4,	   /* not possible in the present state: in use, busy, running */
	ERR_DAMAGED = 5,   /* damaged data */
	ERR_HOST = 6,	   /* this host lacks something */
};

struct err {
	int number;	      /* positive errno, 0 while nothing failed */
	enum err_class class; /* meaningful when number != 0 */
	char message[512];    /* "WHAT: WHY", no newline */
	char hint[256];	      /* what to do next, "" if nothing is known */
};

#define ERR_INIT ((struct err){0})

/* Sets class, message and number; returns -number. number must be a positive errno. */
int err_set(struct err *err, enum err_class class, int number, const char *format, ...)
	__attribute__((format(printf, 4, 5)));

/* As err_set, class chosen from the number (ENOENT: ERR_NOT_FOUND, EBUSY: ERR_STATE, else ERR_FAILED),
 * and ": " plus the text of the errno is appended; a full filesystem gets its hint here. number may be given as errno
 * or -errno. Returns -errno. */
int err_sys(struct err *err, int number, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Puts "TEXT: " in front of the message. Returns -err->number (-EIO if err is NULL), so that
 * `return err_prefix(err, "disk %s", name);` ends a failing function. */
int err_prefix(struct err *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Sets the hint, if none is set yet: the innermost place knows best. Returns -err->number as above. */
int err_hint(struct err *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A stable, lower-case word for JSON ("failed", "usage", "not-found", "state", "damaged", "host"). */
const char *err_class_name(enum err_class class);
/* The class named by `name`, ERR_FAILED if none is. */
enum err_class err_class_from_name(const char *name);

#endif
