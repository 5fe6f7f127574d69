/* SPDX-License-Identifier: GPL-2.0 */
/* Traces losses with tcp:tcp_cong_state_set, for the probes sendmsg and tcp_probe. */
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

/* ssthresh of sockets that have sent a tail loss probe, because tcp_process_tlp_ack() leaves no copy of it. */
BPF_TABLE("lru_hash", u64, u32, tlp_ssthresh, 4096);

static __always_inline void note_ssthresh(const void *sk)
{
	u64 key = (u64)sk;
	u32 ssthresh = READ(u32, sk, tcp_sock, snd_ssthresh);

	tlp_ssthresh.update(&key, &ssthresh);
}

/* Runs at each retransmission. That of a tail loss probe comes in one of these states, and no other does. */
int on_tcp_retransmit_skb_tlp(struct bpf_raw_tracepoint_args *ctx)
{
	if (READ_BITS(ctx->args[0], inet_connection_sock, icsk_ca_state) <= CA_STATE_CWR)
		note_ssthresh((const void *)ctx->args[0]);
	return 0;
}

/*
 * Runs before an ACK is processed. Since the tail loss probe, idle time or the end of slow start may have changed
 * ssthresh. This is part of the programs that see ACKs for another reason: one more at tcp_probe would cost 200 ns.
 */
static __always_inline void note_ssthresh_again(const void *sk, const void *tp)
{
	if (LOAD(u32, tp, tcp_sock, tlp_high_seq))
		note_ssthresh(sk);
}

/*
 * tcp_process_tlp_ack() enters CWR, sets the window to ssthresh and leaves CWR in one step. Then snd_una isn't above
 * high_seq, which tcp_init_cwnd_reduction() has just set to snd_nxt; all else that leaves CWR for one of these states
 * waits for that (tcp_fastretrans_alert()), but for tcp_disconnect().
 */
static __always_inline void left_cwr(struct bpf_raw_tracepoint_args *ctx, u8 probe)
{
	const void *sk = (const void *)ctx->args[0];
	u8 state = ctx->args[1];
	u64 key = (u64)sk;
	struct cwnd_reset r = {};
	u32 before, *ssthresh;

	if (state > CA_STATE_DISORDER ||
	    READ_BITS(sk, inet_connection_sock, icsk_ca_state) != CA_STATE_CWR ||
	    READ(u8, sk, sock_common, skc_state) == TCP_STATE_CLOSE ||
	    (s32)(READ(u32, sk, tcp_sock, snd_una) - READ(u32, sk, tcp_sock, high_seq)) > 0)
		return;
	before = READ(u32, sk, tcp_sock, prior_cwnd);
	/* A congestion control with a cong_control, such as BBR, keeps its window. */
	if (READ(u32, sk, tcp_sock, snd_cwnd) >= before)
		return;
	ssthresh = tlp_ssthresh.lookup(&key);
	if (!fill_fallen(&r, sk, REASON_TLP_LOSS, probe, before, ssthresh ? *ssthresh : 0, sk_idle(sk)))
		return;
	if (!ssthresh) {
		count(lost, 1);
		return;
	}
	r.ca_state = state;
	emit(&r, REASON_TLP_LOSS);
}

#endif
