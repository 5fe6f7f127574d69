// SPDX-License-Identifier: GPL-2.0
/* Traces resets with tcp:tcp_cwnd_reset of kernel-patches/: TP_PROTO(sk, reason, old_cwnd, old_ssthresh, idle). */
#include "reset.h"

int on_tcp_cwnd_reset(struct bpf_raw_tracepoint_args *ctx)
{
	if (ctx->args[1] == REASON)
		emit_fallen((const void *)ctx->args[0], PROBE_TRACEPOINT, ctx->args[2], ctx->args[3],
			    ctx->args[4], 0);
	return 0;
}
