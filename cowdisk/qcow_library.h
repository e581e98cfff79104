/* libqcow, which is loaded when it is needed. What reads with it: second_opinion.c and legacy.c. */
#ifndef VMCP_COWDISK_QCOW_LIBRARY_H
#define VMCP_COWDISK_QCOW_LIBRARY_H

#include <errno.h>
#include <libqcow.h>

#include "base/err.h"
#include "base/library.h"

#define QCOW_FUNCTIONS(X)                                                                                                                    \
	X(libqcow_error_free)                                                                                                                \
	X(libqcow_error_sprint)                                                                                                              \
	X(libqcow_file_free)                                                                                                                 \
	X(libqcow_file_get_media_size)                                                                                                       \
	X(libqcow_file_get_utf8_backing_filename_size)                                                                                       \
	X(libqcow_file_initialize)                                                                                                           \
	X(libqcow_file_open)                                                                                                                 \
	X(libqcow_file_read_buffer_at_offset)                                                                                                \
	X(libqcow_file_set_parent_file)                                                                                                      \
	X(libqcow_file_set_utf8_password)
struct qcow_library {
	QCOW_FUNCTIONS(LIBRARY_FIELD)
};
static const struct library libqcow = {"libqcow.so.1", LIBRARY_NAMES(QCOW_FUNCTIONS)};

/* path: what for. -ENOSYS, ERR_HOST: it is not there. */
static inline int qcow_library_load(struct qcow_library *lib, const char *path, struct err *err)
{
	const char *why = library_load(&libqcow, lib);

	if (!why)
		return 0;
	err_set(err, ERR_HOST, ENOSYS, "%s: libqcow %s", path, why);
	err_hint(err, "`apt-get install libqcow1`");
	return -ENOSYS;
}

/* What libqcow says of the file, as one line; frees *error. -EIO, ERR_DAMAGED. */
static inline int qcow_library_failed(const struct qcow_library *lib, const char *path, libqcow_error_t **error, struct err *err)
{
	char text[256] = "";

	lib->libqcow_error_sprint(*error, text, sizeof(text));
	lib->libqcow_error_free(error);
	for (char *c = text; *c; c++)
		if (*c == '\n')
			*c = ' ';
	return err_set(err, ERR_DAMAGED, EIO, "%s: libqcow cannot read it: %s", path, text);
}

#endif
