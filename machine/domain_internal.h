/* What the readers of domain XML (domain.c, domain_disk.c, domain_net.c, domain_source.c) share. */
#ifndef VMCP_MACHINE_DOMAIN_INTERNAL_H
#define VMCP_MACHINE_DOMAIN_INTERNAL_H

#include "base/buf.h"
#include "machine/config.h"
#include "machine/domain.h"
#include "machine/xml.h"

enum domain_format { DOMAIN_RAW, DOMAIN_QCOW2 };

struct domain_reading {
	const char *what;
	bool lines; /* errors name lines of a file that the user has */
	struct buf vm, disks, nets; /* the sections of the guest.cfg */
	bool vsock, rng, serial, huge;
	unsigned disk_count, net_count;
	char uuid[CONFIG_UUID_BYTES]; /* "" if it says none */
	enum domain_format formats[CONFIG_MAX_DISKS];
	struct err *err; /* never NULL */
};

typedef int domain_rule_fn(struct domain_reading *reading, const struct xml_node *node);
struct domain_rule {
	const char *name;
	domain_rule_fn *read; /* NULL: says nothing about the machine that vmcp runs */
};
#define DOMAIN_RULES(rules) (rules), sizeof(rules) / sizeof((rules)[0])

/* domain.c: the text of a guest.cfg, in *text. Ends the sections of the reading. */
int domain_translate(struct domain_reading *reading, const char *xml, size_t length, const char *connect, struct buf *text);
/* Each child of `node` by its rule; what has none is told as not honoured. */
int domain_walk(struct domain_reading *reading, const struct xml_node *node, const struct domain_rule *rules, size_t count);
/* One line of the log: what is not as the domain has it. Always 0. */
int domain_tell(const struct domain_reading *reading, const struct xml_node *node, const char *format, ...) __attribute__((format(printf, 3, 4)));
int domain_not_honoured(struct domain_reading *reading, const struct xml_node *node);
/* Attributes of the node besides `known` (names, separated by blanks) are told. Always 0. */
int domain_tell_attributes(struct domain_reading *reading, const struct xml_node *node, const char *known);
/* -EINVAL, ERR_USAGE. */
int domain_refuse(struct domain_reading *reading, const struct xml_node *node, const char *hint, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
/* "KEY = VALUE": line ends in the value become blanks. */
int domain_put(struct domain_reading *reading, struct buf *section, const char *key, const char *value);
/* `text` as a name of guest.cfg, with '-' for what no name has; true if it is the text itself. */
bool domain_make_name(const char *text, char name[CONFIG_NAME_BYTES]);

int domain_read_disk(struct domain_reading *reading, const struct xml_node *node);
int domain_read_interface(struct domain_reading *reading, const struct xml_node *node);

#endif
