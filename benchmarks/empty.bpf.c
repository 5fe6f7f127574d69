// SPDX-License-Identifier: GPL-2.0
/* Empty programs, to measure the cost of calling a BPF program. */
#include "block.h"

int empty_done(struct bpf_raw_tracepoint_args *ctx)
{
	return 0;
}

int empty_issue(struct bpf_raw_tracepoint_args *ctx)
{
	return 0;
}

int empty_start(struct bpf_raw_tracepoint_args *ctx)
{
	return 0;
}
