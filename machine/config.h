/*
 * guest.cfg: what machine to build. The keys are those of docs/guest-cfg.md.
 *
 * Reading checks everything that can be checked without starting anything: unknown sections and keys, values out of range, files
 * that are not there. An error names file, line and what to do.
 */
#ifndef VMCP_MACHINE_CONFIG_H
#define VMCP_MACHINE_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "net/net.h"
#include "vmm/memory.h"

#define CONFIG_MAX_DISKS 26
#define CONFIG_MAX_NETS 8
#define CONFIG_NAME_BYTES 64
#define CONFIG_UUID_BYTES 37
#define CONFIG_HOSTNAME_BYTES 64
#define CONFIG_MAX_SHARED 16 /* ports that a card shares with other VMs */
#define CONFIG_KEEP	  20 /* periodic checkpoints, where nothing else is said */
#define CONFIG_MAX_KEEP	  1000000u
#define CONFIG_MIN_EVERY_NS 10000000ull
#define CONFIG_MAX_EVERY_NS (10000 * 3600000000000ull)

enum config_console { CONFIG_CONSOLE_STDIO, CONFIG_CONSOLE_SOCKET };

struct config_disk {
	char name[CONFIG_NAME_BYTES]; /* of its section: [disk NAME] */
	char *path;		      /* absolute; the file that is the disk. NULL for a `base` disk until the machine places it */
	char *base;		      /* absolute; read-only base shared by many VMs, or NULL */
	bool readonly;
	bool detect_zeroes;
};

/* How a multiplexer gives a new connection to one of the VMs that share its port. */
enum config_sharing { CONFIG_ROUND_ROBIN, CONFIG_LEAST, CONFIG_BY_NAME };

/* A port of the host that this VM shares with others. The guest's is one of the card's forwards. */
struct config_shared {
	uint8_t host_address[4];
	uint16_t host_port, guest_port; /* TCP */
	enum config_sharing sharing;
};

struct config_net {
	char name[CONFIG_NAME_BYTES]; /* of its section: [net NAME] */
	enum net_mode mode;	      /* NET_NONE: no card */
	bool mac_given;		      /* else the machine chooses one */
	uint8_t mac[6];
	uint8_t ip[4];	   /* what the agent in the guest is to give the card */
	unsigned ip_length; /* of its prefix; 0: the card's address is the guest's own affair */
	unsigned queues;   /* pairs of them; 0 is 1 */
	uint64_t send_rate, receive_rate; /* bytes a second, 0: no limit */
	char tap[NET_INTERFACE_BYTES], bridge[NET_INTERFACE_BYTES];
	char network[CONFIG_NAME_BYTES]; /* of libvirt */
	unsigned forward_count;
	struct net_forward forwards[NET_MAX_FORWARDS];
	unsigned shared_count;
	struct config_shared shared[CONFIG_MAX_SHARED];
};

struct machine_config {
	char name[CONFIG_NAME_BYTES];
	char uuid[CONFIG_UUID_BYTES]; /* of the libvirt domain that it was read from; "": of none. In no guest.cfg: a VM keeps its own in the store */
	char *source;  /* absolute path of the file, "" if it came from a checkpoint */
	uint64_t memory_bytes;
	enum mem_backing memory_backing;
	unsigned cpus;
	char *kernel;  /* absolute; NULL only where `need_kernel` was not asked for */
	char *initrd;  /* absolute, or NULL */
	char *cmdline; /* "" if none */
	char *cpu_model;
	enum config_console console;
	bool rng;
	bool balloon;
	uint32_t vsock_cid; /* 0: no socket device */
	char hostname[CONFIG_HOSTNAME_BYTES]; /* what the agent in the guest is to call it; "": as it is */
	bool qemu;	    /* of a checkpoint that QEMU made: vmcp cannot run it */
	char *libvirt;	    /* URI of the libvirt that networks and volumes are of; "": its default */
	uint64_t every_ns; /* periodic live checkpoints; 0: none */
	uint64_t keep;	   /* how many of these stay */
	uint64_t keep_hourly, keep_daily; /* and the newest one of each of so many hours and days */
	unsigned disk_count;
	struct config_disk disks[CONFIG_MAX_DISKS];
	unsigned net_count;
	struct config_net nets[CONFIG_MAX_NETS];
};

/* As the keys `every` and `keep`: false if the text is none or out of bounds. */
bool config_parse_every(const char *text, uint64_t *ns);
bool config_parse_keep(const char *text, uint64_t *keep);
#define CONFIG_EVERY_HINT "a number with ms, s, m or h, from 10ms to 10000h, for example 30s; 0 means never"
#define CONFIG_KEEP_HINT  "a number from 1 to 1000000"

/* Reads a file. The name defaults to the file's name without its ending. */
int config_read_file(const char *path, struct machine_config *out, struct err *err);
/* Reads text that config_to_text made (from a checkpoint's manifest: untrusted). `what` names it in errors. Files are not looked for. */
int config_read_text(const char *what, const char *text, struct machine_config *out, struct err *err);
/* Appends the canonical form: every key, absolute paths. */
int config_to_text(const struct machine_config *config, struct buf *out, struct err *err);
/* Settings of cards beside the text: "NAME:KEY=VALUE", several with commas between them; keys and values as in [net NAME]. The first `forward` of a
 * card replaces those that it has. -EINVAL, ERR_USAGE; the configuration is then not to be used. */
int config_set_nets(struct machine_config *config, const char *settings, struct err *err);
const char *config_net_mode_name(enum net_mode mode);
const char *config_sharing_name(enum config_sharing sharing);
/* "10.0.0.5/24": an address that a card can have in its network. */
bool config_parse_ip(const char *text, uint8_t ip[4], unsigned *length);
#define CONFIG_IP_BYTES 19
void config_format_ip(const uint8_t ip[4], unsigned length, char out[CONFIG_IP_BYTES]);
/* Is the card on a network that others are on, where an address means something? */
bool config_net_takes_ip(const struct config_net *net);
/* Letters, digits and '-', at most 63, none of these '-' at either end (RFC 1123). */
bool config_is_hostname(const char *text);
const char *config_backing_name(enum mem_backing backing);
/* Another backing than the text says: -EINVAL, ERR_USAGE if `name` is none, or the configuration excludes it. */
int config_choose_backing(struct machine_config *config, const char *name, struct err *err);
void config_free(struct machine_config *config); /* leaves zeroes */

#endif
