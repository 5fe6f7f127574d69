// SPDX-License-Identifier: GPL-2.0
/* Counts the runs of tcp:tcp_cwnd_reduction by local port; that tracepoint has no text format. */
#include "kernel.h"

BPF_HASH(reductions, u64, u64, 1024);

int on_tcp_cwnd_reduction(struct bpf_raw_tracepoint_args *ctx)
{
	u64 port = READ(u16, ctx->args[0], sock_common, skc_num);

	reductions.increment(port);
	return 0;
}
