/* SPDX-License-Identifier: GPL-2.0 */
#ifndef CWT_PTRACE_H
#define CWT_PTRACE_H
/* The registers at a kprobe, as the architecture saves them (arch/ARCH/include/asm/ptrace.h). */
#if defined(CWT_ARCH_X86_64)
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8;
	unsigned long ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
};
#elif defined(CWT_ARCH_AARCH64)
struct user_pt_regs {
	unsigned long regs[31], sp, pc, pstate;
};
struct pt_regs {
	unsigned long regs[31], sp, pc, pstate;
};
#endif
#endif
