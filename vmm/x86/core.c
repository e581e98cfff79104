#include "vmm/core.h"

#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/procfs.h>

#include "base/bytes.h"
#include "vmm/x86/state.h"

#define FXSAVE_BYTES 512u

uint16_t core_machine(void) { return EM_X86_64; }
const char *core_vcpu_id(void) { return "vcpu"; }

static int add_note(struct buf *notes, uint32_t type, const void *data, size_t length, struct err *err)
{
	Elf64_Nhdr head = {.n_namesz = 5, .n_descsz = (uint32_t)length, .n_type = type};
	int r = buf_append(notes, &head, sizeof(head), err);
	if (r == 0)
		r = buf_append(notes, "CORE\0\0\0", 8, err);
	if (r == 0)
		r = buf_append(notes, data, length, err);
	return r == 0 ? buf_append(notes, NULL, round_up(length, 4) - length, err) : r;
}

/* In the order of the kernel's struct user_regs_struct. */
static void fill_registers(const struct vcpu_state *state, elf_gregset_t out)
{
	const struct kvm_regs *r = &state->regs;
	const struct kvm_sregs2 *s = &state->sregs;
	const uint64_t values[] = {r->r15, r->r14, r->r13,	   r->r12,	   r->rbp,	   r->rbx,	   r->r11,
				   r->r10, r->r9,  r->r8,	   r->rax,	   r->rcx,	   r->rdx,	   r->rsi,
				   r->rdi, ~0ull,  r->rip,	   s->cs.selector, r->rflags,	   r->rsp,	   s->ss.selector,
				   s->fs.base,	   s->gs.base,	   s->ds.selector, s->es.selector, s->fs.selector, s->gs.selector};
	_Static_assert(sizeof(values) == sizeof(elf_gregset_t), "registers");
	memcpy(out, values, sizeof(values));
}

int core_add_vcpu(const void *body, size_t length, unsigned index, struct buf *notes, struct err *err)
{
	CLEANUP_FREE struct vcpu_state *state = aligned_alloc(64, round_up(sizeof(*state), 64));
	struct elf_prstatus status;
	if (!state)
		return err_sys(err, ENOMEM, "vCPU %u", index);
	int r = codec_decode(&vcpu_state_table, body, length, state, err);
	if (r != 0)
		return err_prefix(err, "vCPU %u", index);
	memset(&status, 0, sizeof(status));
	status.pr_pid = (pid_t)index + 1;
	status.pr_fpvalid = 1;
	fill_registers(state, status.pr_reg);
	r = add_note(notes, NT_PRSTATUS, &status, sizeof(status), err);
	/* The first part of a saved extended state is what FXSAVE saves. */
	return r == 0 ? add_note(notes, NT_FPREGSET, state->xsave, FXSAVE_BYTES, err) : r;
}
