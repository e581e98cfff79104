/*
 * The log: one line on stderr (or where log_to says) per event, "vmcp: [VM: ]TEXT".
 *
 * The level and the sink are the only mutable globals of the project: passing a log handle
 * through every function would hide the contracts that matter. They are set once at start,
 * before threads exist.
 */
#ifndef VMCP_BASE_LOG_H
#define VMCP_BASE_LOG_H

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARN, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

void log_set_level(enum log_level level);
enum log_level log_get_level(void);
/* Lines go to this descriptor (default 2), with `name` (copied, may be "") after "vmcp: ". */
void log_set_sink(int fd, const char *name);

void log_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_debug(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
