/* SPDX-License-Identifier: GPL-2.0 */
/* The kernel's rule for restarting a window after idle time. */
#ifndef CWNDTRACE_RESTART_H
#define CWNDTRACE_RESTART_H

#include "sock.h"

/*
 * Returns true if idle time can restart this socket's window: the sysctl is on, and its congestion control has no
 * cong_control.
 */
static __always_inline bool restarts(const void *sk)
{
	u64 ca_ops = READ(u64, sk, inet_connection_sock, icsk_ca_ops);
	u64 net = READ(u64, sk, sock_common, skc_net__net);

	if (READ(u64, ca_ops, tcp_congestion_ops, cong_control))
		return false;
	/* This is an int in older kernels and a byte in newer ones. */
	return READ_NUMBER(net, net, ipv4__sysctl_tcp_slow_start_after_idle) != 0;
}

#endif
