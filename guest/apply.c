/* What an identity changes of the machine. */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/file.h"
#include "guest/agent.h"

#define NOTED_FOLDER  "/var/lib/vmcp-agent"
#define HOOKS	      "/etc/vmcp/hooks.d"
#define KEY_SECONDS   600u /* RSA on a slow machine */
#define FILE_BYTES    (1u << 20)
#define MAX_HOOKS     256
#define CLOCK_SLACK_S 1 /* a clock that is no farther off is left alone: it is somebody's who keeps it better */

static const char *const event_names[] = {[AGENT_SAME] = "same", [AGENT_FIRST] = "first", [AGENT_LIFE] = "life", [AGENT_CLONE] = "clone"};

const char *agent_event_name(enum agent_event event) { return event_names[event]; }

static bool is_real(const struct agent *agent) { return !*agent->root; }

/* The first failure is the one that is told. */
static void note(int rc, const struct err *error, int *first_rc, struct err *err)
{
	if (!rc || *first_rc)
		return;
	*first_rc = rc;
	if (err)
		*err = *error;
}

/* --- files --- */

static int read_file(const struct agent *agent, const char *path, struct buf *out, struct err *err)
{
	CLEANUP_FREE char *full = xasprintf("%s%s", agent->root, path);

	return file_read_all(AT_FDCWD, full, FILE_BYTES, out, err);
}

static int write_file(const struct agent *agent, const char *folder, const char *name, const char *text, struct err *err)
{
	CLEANUP_FREE char *full = xasprintf("%s%s", agent->root, folder);
	CLEANUP_CLOSE int dir = open(full, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (dir < 0)
		return err_sys(err, errno, "%s", full);
	int rc = file_write_atomic(dir, name, text, strlen(text), 0644, err);
	/* These are for everybody, whatever our umask is. */
	if (!rc && fchmodat(dir, name, 0644, 0))
		rc = err_sys(err, errno, "%s/%s", full, name);
	return rc;
}

static bool is_regular(const struct agent *agent, const char *path)
{
	CLEANUP_FREE char *full = xasprintf("%s%s", agent->root, path);
	struct stat st;

	return lstat(full, &st) == 0 && S_ISREG(st.st_mode);
}

static int noted_uuid(const struct agent *agent, char uuid[AGENT_UUID_BYTES], struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	int rc = read_file(agent, NOTED_FOLDER "/uuid", &text, err);

	uuid[0] = '\0';
	if (rc == -ENOENT)
		return 0;
	if (!rc && text.data)
		snprintf(uuid, AGENT_UUID_BYTES, "%.*s", (int)strcspn((char *)text.data, "\n"), (char *)text.data);
	return rc;
}

static int note_uuid(const struct agent *agent, const char *uuid, struct err *err)
{
	CLEANUP_FREE char *folder = xasprintf("%s" NOTED_FOLDER, agent->root), *text = xasprintf("%s\n", uuid);
	CLEANUP_CLOSE int dir = file_open_dir(AT_FDCWD, folder, 1, err);

	return dir < 0 ? dir : file_write_atomic(dir, "uuid", text, strlen(text), 0600, err);
}

/* --- in each life --- */

/* Two clones whose kernels know of no generation id have the same random numbers to come, until this. */
static int apply_seed(const struct agent *agent, const struct agent_identity *identity, struct err *err)
{
	CLEANUP_FREE char *path = xasprintf("%s/dev/urandom", agent->root);
	struct {
		struct rand_pool_info info;
		uint8_t data[AGENT_SEED_BYTES];
	} pool = {.info = {.entropy_count = (int)(identity->seed_bytes * 8), .buf_size = (int)identity->seed_bytes}};

	if (!identity->seed_bytes)
		return 0;
	CLEANUP_CLOSE int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return err_sys(err, errno, "%s", path);
	memcpy(pool.data, identity->seed, identity->seed_bytes);
	if (is_real(agent))
		return ioctl(fd, RNDADDENTROPY, &pool) || ioctl(fd, RNDRESEEDCRNG) ? err_sys(err, errno, "%s: random seed", path) : 0;
	return file_pwrite_full(fd, identity->seed, identity->seed_bytes, 0, err);
}

static int apply_time(const struct agent *agent, const struct agent_identity *identity, struct err *err)
{
	struct timespec now;

	if (!identity->has_time || !is_real(agent))
		return 0;
	clock_gettime(CLOCK_REALTIME, &now);
	if (llabs((long long)now.tv_sec - (long long)identity->time.tv_sec) <= CLOCK_SLACK_S)
		return 0;
	return clock_settime(CLOCK_REALTIME, &identity->time) ? err_sys(err, errno, "clock") : 0;
}

/* --- of a clone --- */

static int apply_hostname(const struct agent *agent, const struct agent_identity *identity, struct err *err)
{
	CLEANUP_BUF struct buf before = BUF_INIT, hosts = BUF_INIT;
	CLEANUP_FREE char *line = xasprintf("%s\n", identity->hostname);
	int rc = 0;

	if (!identity->hostname[0])
		return 0;
	if (is_real(agent) && sethostname(identity->hostname, strlen(identity->hostname)))
		rc = err_sys(err, errno, "host name");
	int read = read_file(agent, "/etc/hostname", &before, NULL);
	if (!rc)
		rc = write_file(agent, "/etc", "hostname", line, err);
	if (rc || read || !before.data || read_file(agent, "/etc/hosts", &hosts, NULL) || !hosts.data)
		return rc;
	before.data[strcspn((char *)before.data, " \t\r\n")] = '\0';
	CLEANUP_FREE char *text = agent_rename_in_hosts((char *)hosts.data, (char *)before.data, identity->hostname);
	return write_file(agent, "/etc", "hosts", text, err);
}

/* The uuid without its hyphens, as systemd makes one of a machine's uuid (machine-id(5)). */
static int apply_machine_id(const struct agent *agent, const struct agent_identity *identity, struct err *err)
{
	char text[AGENT_UUID_BYTES + 1];
	size_t used = 0;
	int rc = 0;

	for (const char *c = identity->uuid; *c; c++)
		if (*c != '-')
			text[used++] = *c;
	snprintf(text + used, sizeof(text) - used, "\n");
	if (is_regular(agent, "/etc/machine-id"))
		rc = write_file(agent, "/etc", "machine-id", text, err);
	if (!rc && is_regular(agent, "/var/lib/dbus/machine-id"))
		rc = write_file(agent, "/var/lib/dbus", "machine-id", text, err);
	return rc;
}

/* The new pair is whole before the old one goes; the public half first, as nobody trusts it alone. */
static int make_key(const char *path, const char *type, const char *comment, struct err *err)
{
	CLEANUP_FREE char *fresh = xasprintf("%s.vmcp-new", path), *fresh_public = xasprintf("%s.pub", fresh);
	CLEANUP_FREE char *public = xasprintf("%s.pub", path);
	char *const argv[] = {(char *)"ssh-keygen", (char *)"-q", (char *)"-N", (char *)"", (char *)"-C", (char *)comment,
			      (char *)"-t", (char *)type, (char *)"-f", fresh, NULL};

	unlink(fresh);
	unlink(fresh_public);
	int rc = agent_run(argv, NULL, KEY_SECONDS, err);
	if (!rc && (rename(fresh_public, public) || rename(fresh, path)))
		rc = err_sys(err, errno, "%s", path);
	return rc;
}

/* It reads its keys when it starts, and it starts itself anew at SIGHUP. */
static void tell_sshd(const struct agent *agent)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	char path[64];

	if (!is_real(agent) || read_file(agent, "/run/sshd.pid", &text, NULL) || !text.data)
		return;
	long pid = strtol((char *)text.data, NULL, 10);
	snprintf(path, sizeof(path), "/proc/%ld/comm", pid);
	/* Not file_read_all: files of /proc have no size. */
	CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);
	char comm[8] = "";
	if (pid > 1 && fd >= 0 && read(fd, comm, sizeof(comm) - 1) > 0 && !strcmp(comm, "sshd\n"))
		kill((pid_t)pid, SIGHUP);
}

static int apply_ssh_keys(const struct agent *agent, const struct agent_identity *identity, struct err *err)
{
	static const char *const types[] = {"ed25519", "ecdsa", "rsa"};
	CLEANUP_FREE char *comment = xasprintf("root@%s", identity->hostname[0] ? identity->hostname : identity->name);
	int first = 0;
	bool any = false;

	for (size_t i = 0; i < ARRAY_LENGTH(types); i++) {
		CLEANUP_FREE char *path = xasprintf("/etc/ssh/ssh_host_%s_key", types[i]), *full = xasprintf("%s%s", agent->root, path);
		struct err error = ERR_INIT;

		if (!is_regular(agent, path))
			continue;
		int rc = make_key(full, types[i], comment, &error);
		if (rc)
			err_prefix(&error, "%s is the origin's", path);
		any |= !rc;
		note(rc, &error, &first, err);
	}
	if (any)
		tell_sshd(agent);
	return first;
}

/* --- hooks --- */

/* As run-parts: nothing that an editor or a package manager leaves beside them. */
static int is_hook(const struct dirent *entry)
{
	for (const char *c = entry->d_name; *c; c++)
		if (!isalnum((unsigned char)*c) && !strchr("_-", *c))
			return 0;
	return 1;
}

static int run_hook(const struct agent *agent, const char *path, enum agent_event event, char *const environment[], struct err *err)
{
	char *const argv[] = {(char *)path, (char *)event_names[event], NULL};

	return access(path, X_OK) ? 0 : agent_run(argv, environment, agent->hook_seconds, err);
}

/* "PCI MAC ADDRESS/LENGTH" of each, one a line. malloc. */
static char *cards_text(const struct agent_identity *identity)
{
	char *text = xstrdup("");

	for (unsigned i = 0; i < identity->card_count; i++) {
		const struct agent_card *card = &identity->cards[i];
		char *longer = xasprintf("%s%s%s %s %s/%u", text, i ? "\n" : "", card->pci, card->mac, card->address, card->length);

		free(text);
		text = longer;
	}
	return text;
}

static int run_hooks(const struct agent *agent, const struct agent_identity *identity, enum agent_event event, const char *before, struct err *err)
{
	CLEANUP_FREE char *folder = xasprintf("%s" HOOKS, agent->root);
	CLEANUP_FREE char *cards = cards_text(identity);
	const char *search = getenv("PATH");
	char *environment[] = {xasprintf("VMCP_EVENT=%s", event_names[event]), xasprintf("VMCP_UUID=%s", identity->uuid),
			       xasprintf("VMCP_OLD_UUID=%s", before), xasprintf("VMCP_NAME=%s", identity->name),
			       xasprintf("VMCP_HOSTNAME=%s", identity->hostname), xasprintf("VMCP_GENERATION=%s", identity->generation),
			       xasprintf("VMCP_CARDS=%s", cards),
			       xasprintf("PATH=%s", search ? search : "/usr/sbin:/usr/bin:/sbin:/bin"), NULL};
	struct dirent **list;
	int count = scandir(folder, &list, is_hook, alphasort), first = 0;

	for (int i = 0; i < count; i++) {
		CLEANUP_FREE char *path = xasprintf("%s/%s", folder, list[i]->d_name);
		struct err error = ERR_INIT;

		note(i < MAX_HOOKS ? run_hook(agent, path, event, environment, &error) : 0, &error, &first, err);
		free(list[i]);
	}
	if (count >= 0)
		free(list);
	for (size_t i = 0; environment[i]; i++)
		free(environment[i]);
	return first;
}

/* --- all of it --- */

static enum agent_event find_event(const struct agent *agent, const struct agent_identity *identity, const char *noted)
{
	if (!*noted)
		return AGENT_FIRST;
	if (strcmp(noted, identity->uuid) != 0)
		return AGENT_CLONE;
	return agent->generation[0] && !strcmp(agent->generation, identity->generation) ? AGENT_SAME : AGENT_LIFE;
}

int agent_apply(struct agent *agent, const struct agent_identity *identity, enum agent_event *event, struct err *err)
{
	typedef int part_fn(const struct agent *, const struct agent_identity *, struct err *);
	static const struct {
		part_fn *apply;
		bool of_clones;
	} parts[] = {{apply_seed, false}, {apply_time, false}, {agent_apply_cards, false}, {apply_machine_id, true}, {apply_hostname, true}, {apply_ssh_keys, true}};
	char noted[AGENT_UUID_BYTES];
	int first = noted_uuid(agent, noted, err);

	if (first)
		return first;
	*event = find_event(agent, identity, noted);
	if (*event == AGENT_SAME)
		return 0;
	for (size_t i = 0; i < ARRAY_LENGTH(parts); i++) {
		struct err error = ERR_INIT;

		if (!parts[i].of_clones || *event == AGENT_CLONE)
			note(parts[i].apply(agent, identity, &error), &error, &first, err);
	}
	struct err error = ERR_INIT;
	note(run_hooks(agent, identity, *event, noted, &error), &error, &first, err);
	if (*event != AGENT_LIFE)
		note(note_uuid(agent, identity->uuid, &error), &error, &first, err);
	snprintf(agent->generation, sizeof(agent->generation), "%s", identity->generation);
	return first;
}
