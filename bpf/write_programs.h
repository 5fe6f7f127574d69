/* SPDX-License-Identifier: GPL-2.0 */
/* The programs that note when a followed socket's data is written, for the probes that see no writes themselves. */
#ifndef CWNDTRACE_WRITE_PROGRAMS_H
#define CWNDTRACE_WRITE_PROGRAMS_H

#include "follow.h"

int on_write_follow(struct bpf_raw_tracepoint_args *ctx)
{
	on_write((const void *)ctx->args[0]);
	return 0;
}

int on_wrote_follow(struct bpf_raw_tracepoint_args *ctx)
{
	on_wrote((const void *)ctx->args[0]);
	return 0;
}

#endif
