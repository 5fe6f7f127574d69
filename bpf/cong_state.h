/* SPDX-License-Identifier: GPL-2.0 */
/* Traces retransmission timeouts with tcp:tcp_cong_state_set, for the probes sendmsg and tcp_probe. */
#ifndef CWNDTRACE_CONG_STATE_H
#define CWNDTRACE_CONG_STATE_H

#include "reset.h"

/*
 * tcp_enter_loss() calls tcp_set_ca_state(sk, TCP_CA_Loss) after it has lowered the window. On the first timeout of an
 * episode, prior_cwnd and prior_ssthresh hold the values from before (prior_ssthresh as tcp_current_ssthresh() returns
 * it). On a repeated timeout no member holds them, and the window is already at its minimum. tcp_simple_retransmit()
 * sets this state too: it lowers no window and clears prior_ssthresh.
 */
static __always_inline void entered_state(struct bpf_raw_tracepoint_args *ctx, u8 probe)
{
	const void *sk = (const void *)ctx->args[0];
	u32 state, prior_ssthresh;

	if ((u8)ctx->args[1] != TCP_CA_LOSS)
		return;
	state = READ_BITS(sk, inet_connection_sock, icsk_ca_state);
	if (state > CA_STATE_DISORDER &&
	    (s32)(READ(u32, sk, tcp_sock, snd_una) - READ(u32, sk, tcp_sock, high_seq)) < 0 &&
	    !(state == TCP_CA_LOSS && !READ(u8, sk, inet_connection_sock, icsk_retransmits)))
		return;
	prior_ssthresh = READ(u32, sk, tcp_sock, prior_ssthresh);
	if (prior_ssthresh)
		emit_fallen(sk, REASON_RTO_LOSS, probe, READ(u32, sk, tcp_sock, prior_cwnd),
			    prior_ssthresh, sk_idle(sk));
}

#endif
