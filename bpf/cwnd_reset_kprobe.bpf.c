// SPDX-License-Identifier: GPL-2.0
/* Traces resets with kprobe and kretprobe: notes the window on entry to the kernel's function, compares on return. */
#include <uapi/linux/ptrace.h>

#include "follow_programs.h"
#include "reset.h"
#include "window_before.h"

/*
 * A return has no arguments, and an interrupt can enter the same function for another socket on the same thread, so
 * the stack pointer distinguishes the calls. FRAME_SHIFT is the number of bytes that the return address takes.
 */
struct frame {
	u64 tid;
	u64 sp;
};
BPF_HASH(frames, struct frame, struct before, 16384);

static __always_inline int kprobe_in(struct pt_regs *ctx, u8 reason)
{
	struct frame key = {.tid = bpf_get_current_pid_tgid(), .sp = PT_REGS_SP(ctx)};
	struct before b = note_before((const void *)PT_REGS_PARM1(ctx), reason);

	if (frames.update(&key, &b))
		count(lost, 1);
	return 0;
}

int kprobe_in_idle(struct pt_regs *ctx)
{
	return kprobe_in(ctx, REASON_IDLE);
}

int kprobe_in_rto_loss(struct pt_regs *ctx)
{
	return kprobe_in(ctx, REASON_RTO_LOSS);
}

int kprobe_in_app_limited(struct pt_regs *ctx)
{
	return kprobe_in(ctx, REASON_APP_LIMITED);
}

int kprobe_in_tlp_loss(struct pt_regs *ctx)
{
	return kprobe_in(ctx, REASON_TLP_LOSS);
}

/* Serves all functions: what was noted on entry says which one it was. */
int kprobe_out(struct pt_regs *ctx)
{
	struct frame key = {.tid = bpf_get_current_pid_tgid(), .sp = PT_REGS_SP(ctx) - FRAME_SHIFT};
	struct before *b = frames.lookup(&key);

	if (!b) {
		count(lost, 1);
		return 0;
	}
	emit_fallen((const void *)b->sk, b->reason, PROBE_KPROBE, b->cwnd, b->ssthresh, b->idle);
	frames.delete(&key);
	return 0;
}
