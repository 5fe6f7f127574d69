// SPDX-License-Identifier: GPL-2.0
/* Programs that do nothing, to measure what calling them takes. */
#include "block_io.bpf.c"

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
