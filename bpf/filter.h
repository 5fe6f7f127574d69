/* SPDX-License-Identifier: GPL-2.0 */
/* Selects the sockets to trace, by the FILTER_* macros that the program is compiled with. */
#ifndef CWNDTRACE_FILTER_H
#define CWNDTRACE_FILTER_H

#include "sock.h"

#ifdef FILTER_PID
/* Inodes of the sockets that the process holds, updated from user space, since timers and ACKs have no process. */
BPF_HASH(pid_sockets, u64, u8, 65536);
#endif
#ifdef FILTER_CGROUP
/* The requested cgroup and those below it, updated from user space. */
BPF_HASH(cgroups, u64, u8, 16384);
#endif

static __always_inline bool wanted(const void *sk)
{
#ifdef FILTER_NETNS
	if (sk_netns(sk) != FILTER_NETNS)
		return false;
#endif
#ifdef FILTER_IFINDEX
	if (sk_ifindex(sk) != FILTER_IFINDEX)
		return false;
#endif
#ifdef FILTER_FAMILY
	if (sk_family(sk) != FILTER_FAMILY)
		return false;
#endif
#ifdef FILTER_PORT
	if (sk_sport(sk) != FILTER_PORT && sk_dport(sk) != FILTER_PORT)
		return false;
#endif
#ifdef FILTER_CGROUP
	u64 cgroup = sk_cgroup(sk);

	if (!cgroups.lookup(&cgroup))
		return false;
#endif
#ifdef FILTER_PID
	if (!(sk_owned(sk) && bpf_get_current_pid_tgid() >> 32 == FILTER_PID)) {
		u64 inode = sk_inode(sk);

		if (!pid_sockets.lookup(&inode))
			return false;
	}
#endif
	return true;
}

#endif
