/* SPDX-License-Identifier: GPL-2.0 */
/* The values that a probe on a function notes on entry and compares with the socket on return. */
#ifndef CWNDTRACE_WINDOW_BEFORE_H
#define CWNDTRACE_WINDOW_BEFORE_H

#include "sock.h"

struct before {
	u64 sk;
	u32 cwnd;
	u32 ssthresh;
	u32 idle;
	u32 reason;
};

static __always_inline struct before note_before(const void *sk, u8 reason)
{
	struct before b = {
		.sk = (u64)sk,
		.cwnd = READ(u32, sk, tcp_sock, snd_cwnd),
		.ssthresh = READ(u32, sk, tcp_sock, snd_ssthresh),
		.idle = idle_for(sk, reason),
		.reason = reason,
	};

	return b;
}

#endif
