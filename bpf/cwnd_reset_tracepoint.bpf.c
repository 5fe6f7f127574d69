// SPDX-License-Identifier: GPL-2.0
/* Traces resets with tcp:tcp_cwnd_reset of kernel-patches/: TP_PROTO(sk, reason, old_cwnd, old_ssthresh). */
#include "follow_programs.h"
#include "reset.h"

/* capture/live.py sets REASONS, in which a bit is set for each reason to trace. */
int on_tcp_cwnd_reset(struct bpf_raw_tracepoint_args *ctx)
{
	u32 reason = ctx->args[1];

	if (reason < 32 && REASONS >> reason & 1)
		emit_fallen((const void *)ctx->args[0], reason, PROBE_TRACEPOINT, ctx->args[2], ctx->args[3],
			    idle_for((const void *)ctx->args[0], reason));
	return 0;
}
