// SPDX-License-Identifier: GPL-2.0
/*
 * For each system call of one process (FLOOD_TGID), this program keeps a finished request, which is then handled like
 * any other.
 */
#include "block.h"

int on_sys_enter(struct bpf_raw_tracepoint_args *ctx)
{
	u64 pid_tgid = bpf_get_current_pid_tgid();
	struct flight f = {};

	if (pid_tgid >> 32 != FLOOD_TGID)
		return 0;
	f.start_ns = bpf_ktime_get_ns();
	f.issue_ns = f.start_ns;
	f.sector = f.start_ns & 0xFFFFF;
	f.bytes = 4096;
	f.tgid = pid_tgid >> 32;
	f.tid = pid_tgid;
	bpf_get_current_comm(f.comm, sizeof(f.comm));
	keep(&f, 0);
	return 0;
}
