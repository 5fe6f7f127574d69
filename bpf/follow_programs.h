/* SPDX-License-Identifier: GPL-2.0 */
/* The programs that follow sockets, for the probes that need these tracepoints for nothing else. */
#ifndef CWNDTRACE_FOLLOW_PROGRAMS_H
#define CWNDTRACE_FOLLOW_PROGRAMS_H

#include "write_programs.h"

int on_tcp_probe_follow(struct bpf_raw_tracepoint_args *ctx)
{
	on_ack((const void *)ctx->args[0], ctx->args[1]);
	return 0;
}

int on_tcp_destroy_sock_follow(struct bpf_raw_tracepoint_args *ctx)
{
	forget((const void *)ctx->args[0]);
	return 0;
}

#endif
