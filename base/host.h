/* What this host can do, probed once into one const struct. */
#ifndef VMCP_BASE_HOST_H
#define VMCP_BASE_HOST_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

enum host_kvm_kind {
	HOST_KVM_NONE,	   /* no /dev/kvm, or no permission: see kvm_errno */
	HOST_KVM_HARDWARE, /* kvm_intel, kvm_amd (or nested) */
	HOST_KVM_SOFTWARE, /* kvm_pvm: emulates CPL 0, cannot run a stock kernel */
};

struct host {
	enum host_kvm_kind kvm_kind;
	int kvm_errno;		/* why not, if HOST_KVM_NONE */
	char kvm_module[32];	/* "kvm_amd", ... "" if unknown */
	bool kvm_irqfd, kvm_ioeventfd, kvm_xsave2, kvm_sregs2, kvm_dirty_ring, kvm_manual_dirty_log;
	uint64_t uffd_features; /* UFFD_FEATURE_* that the kernel offers, 0 if userfaultfd cannot be used */
	int uffd_errno;		/* why not */
	bool uffd_wp_shmem;	/* write protection on a memfd, unpopulated pages included */
	bool io_uring;
	int io_uring_errno;
	bool pagemap_scan;
	char kernel_release[64];
	uint64_t memory_bytes, memory_available_bytes;
	uint64_t hugetlb_2m_total, hugetlb_2m_available;
	bool thp_shmem; /* transparent huge pages for memfds are possible */
	unsigned cpus;
};

/* The pool of huge pages of 2 MiB: how many it has, and how many of these nobody uses or has reserved. */
struct host_huge_pages {
	uint64_t total, available;
};
struct host_huge_pages host_huge_pages(void);
/* Whether a memfd gets transparent huge pages where madvise asks for them. */
bool host_thp_shmem(void);

/* Fills *out; what cannot be found out is false or 0. Never fails as a whole. */
void host_probe(struct host *out);
/* Memory that can be had now without swapping: what the kernel calls available, or what is left to this process's control group (v2), if that is
 * less. 0 if it cannot be found out. */
uint64_t host_available_memory(void);

#endif
