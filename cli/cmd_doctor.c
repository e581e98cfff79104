/* doctor: what this host can do, what each lack costs, and how to mend it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/host.h"
#include "cli/cli.h"

struct finding {
	const char *what;
	bool good;
	char value[96];
	const char *cost; /* of the lack */
	const char *mend;
};

#define MAX_FINDINGS 24
#define MIN_FILES    4096u	   /* a chain of layers and what a check holds open */
#define MIN_FREE     (1ull << 30) /* of the store's filesystem */

static const char *kvm_word(const struct host *host)
{
	switch (host->kvm_kind) {
	case HOST_KVM_HARDWARE:
		return "hardware";
	case HOST_KVM_SOFTWARE:
		return "software";
	default:
		return "none";
	}
}

static void add(struct finding *list, size_t *n, const char *what, bool good, const char *value, const char *cost,
		const char *mend)
{
	list[*n] = (struct finding){.what = what, .good = good, .cost = cost, .mend = mend};
	snprintf(list[*n].value, sizeof(list[*n].value), "%s", value);
	(*n)++;
}

static size_t examine(const struct host *host, struct finding *list)
{
	char text[96], size[16];
	size_t n = 0;

	snprintf(text, sizeof(text), "%s%s%s", kvm_word(host), host->kvm_module[0] ? ", " : "",
		 host->kvm_kind == HOST_KVM_NONE ? strerror(host->kvm_errno) : host->kvm_module);
	add(list, &n, "kvm", host->kvm_kind == HOST_KVM_HARDWARE, text,
	    host->kvm_kind == HOST_KVM_SOFTWARE ? "guest code at CPL 0 is emulated: a stock Linux kernel does not boot"
						: "no VM can run",
	    host->kvm_errno == EACCES ? "add yourself to the group kvm, or run as root"
				      : "load kvm_intel or kvm_amd, switch virtualization on in the firmware, or use a "
					"machine with nested KVM");
	if (host->kvm_kind != HOST_KVM_NONE) {
		bool all = host->kvm_irqfd && host->kvm_ioeventfd && host->kvm_xsave2 && host->kvm_sregs2;

		add(list, &n, "kvm features", all, all ? "irqfd, ioeventfd, xsave2, sregs2" : "some are missing",
		    "devices need irqfd and ioeventfd; older register calls lose state of new CPUs",
		    "use Linux 5.17 or later");
		add(list, &n, "dirty log", host->kvm_manual_dirty_log,
		    host->kvm_manual_dirty_log ? "cleared by hand" : "not cleared by hand",
		    "every checkpoint saves all memory, every revert reads it all", "use Linux 5.6 or later");
	}
	add(list, &n, "userfaultfd", host->uffd_features != 0,
	    host->uffd_features ? "usable" : strerror(host->uffd_errno),
	    "live checkpoints take their instant at the end of the save (--instant settled)",
	    "give access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1");
	if (host->uffd_features)
		add(list, &n, "write protection", host->uffd_wp_shmem,
		    host->uffd_wp_shmem ? "of memfds" : "not of memfds",
		    "live checkpoints take their instant at the end of the save (--instant settled)",
		    "use Linux 5.19 or later");
	add(list, &n, "io_uring", host->io_uring, host->io_uring ? "usable" : strerror(host->io_uring_errno),
	    "disk requests go through threads, which is slower",
	    "set kernel.io_uring_disabled=0, or allow it in the container's seccomp profile");
	cli_format_size(size, host->memory_available_bytes);
	snprintf(text, sizeof(text), "%s available", size);
	add(list, &n, "memory", host->memory_available_bytes >= (256ull << 20), text, "guests do not fit", "free some");
	add(list, &n, "huge pages, thp", host->thp_shmem, host->thp_shmem ? "for memfds where asked for" : "not for memfds",
	    "memory_backing = thp gets small pages",
	    "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled");
	snprintf(text, sizeof(text), "%llu of %llu in the pool are free", (unsigned long long)host->hugetlb_2m_available,
		 (unsigned long long)host->hugetlb_2m_total);
	add(list, &n, "huge pages, 2 MiB", host->hugetlb_2m_available > 0, text, "no VM with memory_backing = hugetlb can start",
	    "as root: sysctl vm.nr_hugepages=N, N for each 2 MiB of guest memory");
	snprintf(text, sizeof(text), "%u", host->cpus);
	add(list, &n, "cpus", host->cpus >= 2, text,
	    "the VM and the threads of a checkpoint share one CPU: longer pauses", "use 2 or more");
	add(list, &n, "kernel", true, host->kernel_release, "", "");
	return n;
}

/* The folder that is there and that the store is or will be in. */
static char *existing_parent(const char *path)
{
	char *folder = xstrdup(path), *slash;

	while (access(folder, F_OK) && (slash = strrchr(folder, '/')) && slash != folder)
		*slash = '\0';
	if (access(folder, F_OK) == 0)
		return folder;
	free(folder);
	return xstrdup(path[0] == '/' ? "/" : ".");
}

/* What is this user's rather than the host's: rights, limits, the store. */
static size_t examine_user(const struct cli *cli, struct finding *list, size_t n)
{
	CLEANUP_FREE char *folder = existing_parent(cli->store_path);
	struct rlimit files = {0};
	struct statvfs space;
	char text[96], size[16];

	getrlimit(RLIMIT_NOFILE, &files);
	snprintf(text, sizeof(text), "%llu at most", (unsigned long long)files.rlim_max);
	add(list, &n, "open files", files.rlim_max >= MIN_FILES, text, "long chains of disk layers cannot be opened",
	    "raise the hard limit: /etc/security/limits.conf, or LimitNOFILE= of a unit");
	bool tun = access("/dev/net/tun", R_OK | W_OK) == 0;
	add(list, &n, "tap devices", tun, tun ? "usable" : strerror(errno), "network cards with mode = tap or bridge do not start; mode = user does",
	    errno == ENOENT ? "as root: modprobe tun" : "give access to /dev/net/tun, or run as root");
	bool writable = access(folder, W_OK) == 0;
	bool known = statvfs(folder, &space) == 0;
	uint64_t free_bytes = known ? (uint64_t)space.f_bavail * space.f_frsize : 0;
	cli_format_size(size, free_bytes);
	snprintf(text, sizeof(text), "%s, %s free", writable ? "writable" : "not writable", size);
	add(list, &n, "store", writable && free_bytes >= MIN_FREE, text, "checkpoints find no place",
	    writable ? "make room, or name another store with --store or VMCP_STORE" : "name another store with --store or VMCP_STORE");
	struct store *store;
	if (store_open(cli->store_path, false, &store, NULL) == 0) {
		add(list, &n, "encryption", true,
		    store_is_encrypted(store) ? "of memory and states; disks, names, messages, consoles are plain" : "none: see --store-key", "", "");
		store_close(store);
	}
	return n;
}

static int run(struct cli *cli, struct err *err)
{
	struct finding list[MAX_FINDINGS];
	json_t *findings = json_array();
	struct host host;

	(void)err;
	host_probe(&host);
	size_t n = examine_user(cli, list, examine(&host, list));
	for (size_t i = 0; i < n; i++) {
		const struct finding *f = &list[i];

		json_array_append_new(findings, json_pack("{s:s, s:b, s:s, s:s, s:s}", "what", f->what, "ok", f->good,
							  "value", f->value, "cost", f->good ? "" : f->cost, "mend",
							  f->good ? "" : f->mend));
		if (cli->json)
			continue;
		printf("%s  %-17s %s\n", f->good ? "ok  " : "LACK", f->what, f->value);
		if (!f->good)
			printf("      cost: %s\n      mend: %s\n", f->cost, f->mend);
	}
	if (cli->json)
		cli_print_json(json_pack("{s:s, s:s, s:I, s:b, s:b, s:b, s:b, s:o}", "kvm", kvm_word(&host), "kernel",
					 host.kernel_release, "uffd_features", (json_int_t)host.uffd_features,
					 "uffd_wp_shmem", host.uffd_wp_shmem, "io_uring", host.io_uring, "pagemap_scan",
					 host.pagemap_scan, "dirty_ring", host.kvm_dirty_ring, "findings", findings));
	else
		json_decref(findings);
	return 0;
}

static const struct cli_option none[] = {{0}};

const struct cli_command cli_doctor = {.name = "doctor",
				       .synopsis = "",
				       .summary = "what this host can do, and how to mend what it lacks",
				       .options = none,
				       .json = "kvm, kernel, uffd_features, uffd_wp_shmem, io_uring, pagemap_scan, dirty_ring, findings [what, ok, value, cost, mend]",
				       .run = run};
