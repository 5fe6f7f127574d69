// SPDX-License-Identifier: GPL-2.0
/* Compiled behind bpf/block_io.bpf.c: programs that do nothing, to tell what calling them takes. */
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
