// SPDX-License-Identifier: GPL-2.0
/* Traces resets with fentry and fexit: notes the window on entry to the kernel's function and compares on return. */
#include "follow_programs.h"
#include "reset.h"
#include "window_before.h"

/* The socket is locked between entry and return, so its address is sufficient as the key. */
BPF_HASH(entered, u64, struct before, 16384);

/* The arguments of a traced function are an array of 64-bit numbers, as those of a raw tracepoint are. */
static __always_inline int fentry_in(const struct bpf_raw_tracepoint_args *ctx, u8 reason)
{
	struct before b = note_before((const void *)ctx->args[0], reason);

	if (entered.update(&b.sk, &b))
		count(lost, 1);
	return 0;
}

int fentry_in_idle(struct bpf_raw_tracepoint_args *ctx)
{
	return fentry_in(ctx, REASON_IDLE);
}

int fentry_in_rto_loss(struct bpf_raw_tracepoint_args *ctx)
{
	return fentry_in(ctx, REASON_RTO_LOSS);
}

int fentry_in_app_limited(struct bpf_raw_tracepoint_args *ctx)
{
	return fentry_in(ctx, REASON_APP_LIMITED);
}

int fentry_in_tlp_loss(struct bpf_raw_tracepoint_args *ctx)
{
	return fentry_in(ctx, REASON_TLP_LOSS);
}

/* Serves all functions: what was noted on entry says which one it was. */
int fentry_out(struct bpf_raw_tracepoint_args *ctx)
{
	u64 key = ctx->args[0];
	struct before *b = entered.lookup(&key);

	if (!b)
		return 0;
	/* b->sk is a plain number; the verifier allows no arithmetic on the argument itself. */
	emit_fallen((const void *)b->sk, b->reason, PROBE_FENTRY, b->cwnd, b->ssthresh, b->idle);
	entered.delete(&key);
	return 0;
}
