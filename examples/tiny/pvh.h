/* What a PVH loader hands over. Source: Xen xen/include/public/arch-x86/hvm/start_info.h. */
#ifndef TINY_PVH_H
#define TINY_PVH_H

#include <stdint.h>

#define PVH_MAGIC   0x336ec578u
#define PVH_MEM_RAM 1u

struct pvh_start_info {
	uint32_t magic;
	uint32_t version; /* the memory map is there from 1 on */
	uint32_t flags;
	uint32_t nr_modules;
	uint64_t modlist_gpa;
	uint64_t cmdline_gpa;
	uint64_t rsdp_gpa;
	uint64_t memmap_gpa;
	uint32_t memmap_entries;
	uint32_t reserved;
};

struct pvh_memmap_entry {
	uint64_t gpa;
	uint64_t size_bytes;
	uint32_t type;
	uint32_t reserved;
};

#endif
