/* SPDX-License-Identifier: GPL-2.0 */
/* The kernel's own rule of when idle time makes a window restart. */
#ifndef CWNDTRACE_RESTART_H
#define CWNDTRACE_RESTART_H

#include "sock.h"

/* Whether idle time can cost this socket its window: not where the sysctl is off or the congestion control is exempt. */
static __always_inline bool restarts(const void *sk)
{
	u64 ca_ops = READ(u64, sk, inet_connection_sock, icsk_ca_ops);
	u64 net = READ(u64, sk, sock_common, skc_net__net);

	if (READ(u64, ca_ops, tcp_congestion_ops, cong_control))
		return false;
	/* An int in older kernels, a byte in newer ones. */
	return READ_OPT(u8, net, net, ipv4__sysctl_tcp_slow_start_after_idle) ||
	       READ_OPT(u32, net, net, ipv4__sysctl_tcp_slow_start_after_idle);
}

#endif
