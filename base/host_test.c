#include <criterion/criterion.h>
#include <string.h>

#include "base/host.h"

Test(host, what_is_there_on_every_linux)
{
	struct host host;

	memset(&host, 0xff, sizeof(host));
	host_probe(&host);
	cr_assert_gt(host.cpus, 0);
	cr_assert_gt(host.memory_bytes, UINT64_C(64) << 20);
	cr_assert_leq(host.memory_available_bytes, host.memory_bytes);
	cr_assert_gt(strlen(host.kernel_release), 0);
}

Test(host, available_memory)
{
	struct host host;
	host_probe(&host);
	cr_assert_gt(host_available_memory(), 0);
	cr_assert_lt(host_available_memory(), host.memory_bytes);
}

Test(host, what_is_missing_has_a_reason)
{
	struct host host;

	host_probe(&host);
	cr_assert_eq(host.kvm_kind == HOST_KVM_NONE, host.kvm_errno != 0);
	cr_assert_eq(host.uffd_features == 0, host.uffd_errno != 0);
	cr_assert_eq(!host.io_uring, host.io_uring_errno != 0);
	cr_assert(!host.uffd_wp_shmem || host.uffd_features != 0);
}
