// SPDX-License-Identifier: GPL-2.0
/*
 * Traces idle resets with tcp:tcp_sendmsg_locked: applies the kernel's rule before the kernel does, and has the next
 * transmit confirm the result.
 */
#include "cong_state.h"
#include "reset.h"
#include "restart.h"

/*
 * The kernel checks the idle time some time after this program. A tick may fall in between, or another task may run on
 * the CPU. Idle time that is short of the RTO by no more than this (20 ms) may still exceed it then.
 */
#define LATE_JIFFIES (CWT_HZ / 50)

/*
 * Does the first half of tcp_slow_start_after_idle_check() of include/net/tcp.h: returns true if the socket has been
 * idle so long that the kernel may restart its window now. This runs on every send and every ACK.
 */
static __always_inline bool idle_for_rto(const void *tp)
{
	if (LOAD(u32, tp, tcp_sock, packets_out))
		return false;
	return (s32)(jiffies32() - LOAD(u32, tp, tcp_sock, lsndtime) + LATE_JIFFIES) >
	       (s32)LOAD(u32, tp, inet_connection_sock, icsk_rto);
}

/* Returns the window that tcp_cwnd_restart() of net/ipv4/tcp_output.c leaves. */
static __always_inline u32 restarted_cwnd(u32 cwnd, u32 init_cwnd, s32 idle, s32 rto)
{
	u32 floor = init_cwnd < cwnd ? init_cwnd : cwnd;
	int i;

	/* A window has 32 bits, so it can't be halved more often than that. */
	for (i = 0; i < 32; i++) {
		idle -= rto;
		if (idle <= 0 || cwnd <= floor)
			break;
		cwnd >>= 1;
	}
	return cwnd > floor ? cwnd : floor;
}

BPF_HASH(pending, u64, struct cwnd_reset, 16384);
/* The number of pending restarts. While it is 0, packets need no hash lookup. */
BPF_ARRAY(pending_count, u64, 1);

static __always_inline void add_pending(s64 n)
{
	int zero = 0;
	u64 *c = pending_count.lookup(&zero);

	if (c)
		__sync_fetch_and_add(c, n);
}

/* If a restart of this socket is pending, finds out whether it has happened, and forgets it. */
static __always_inline void settle(const void *sk)
{
	int zero = 0;
	u64 key = (u64)sk, *n = pending_count.lookup(&zero);
	struct cwnd_reset *r;

	if (!n || !*n)
		return;
	r = pending.lookup(&key);
	if (!r)
		return;
	r->cwnd_after = READ(u32, sk, tcp_sock, snd_cwnd);
	r->ssthresh_after = READ(u32, sk, tcp_sock, snd_ssthresh);
	if (r->cwnd_after < r->cwnd_before) {
		/* The kernel saw at least the first tick after the RTO. */
		if (r->idle_us <= r->rto_us)
			r->idle_us = r->rto_us + jiffies_to_us(1);
		emit(r, REASON_IDLE);
	} else if (r->idle_us > r->rto_us) {
		count(withdrawn, 1);
	}
	pending.delete(&key);
	add_pending(-1);
}

/* Notes the state of a socket that has been idle, if the kernel is going to restart its window. */
static __always_inline void expect_restart(const void *sk)
{
	struct cwnd_reset r = {};
	u64 key = (u64)sk;
	u32 rto = READ(u32, sk, inet_connection_sock, icsk_rto), idle = sk_idle(sk);

	if (!restarts(sk) || !wanted(sk))
		return;
	fill_from_sock(&r, sk);
	r.reason = REASON_IDLE;
	r.probe = PROBE_SENDMSG;
	r.cwnd_before = r.cwnd_after;
	r.ssthresh_before = r.ssthresh_after;
	if (restarted_cwnd(r.cwnd_before, r.init_cwnd, (s32)idle > (s32)rto ? idle : rto + 1, rto) >=
	    r.cwnd_before) {
		if ((s32)idle > (s32)rto)
			count(unchanged, 1);
		return;
	}
	if (pending.update(&key, &r))
		count(lost, 1);
	else
		add_pending(1);
}

int on_tcp_sendmsg_locked(struct bpf_raw_tracepoint_args *ctx)
{
	const void *sk = (const void *)ctx->args[0], *tp = bpf_skc_to_tcp_sock((void *)sk);
	u64 skb;

	settle(sk);
	/*
	 * Not sk: bcc turns loads from a variable that it knows to hold an argument into calls, and fails where a macro
	 * expands to them.
	 */
	on_write((const void *)ctx->args[0]);
	if (!tp || !idle_for_rto(tp))
		return 0;
	skb = argument(ctx, 2);
	/* The kernel checks only for a new buffer, in tcp_skb_entail(). This one still takes more. */
	if (skb && (s32)READ(u32, skb, sk_buff, len) < (s32)ctx->args[3] &&
	    !READ_BITS(AT(skb, sk_buff, cb), tcp_skb_cb, eor))
		return 0;
	expect_restart(sk);
	return 0;
}

int on_tcp_probe(struct bpf_raw_tracepoint_args *ctx)
{
	const void *sk = (const void *)ctx->args[0], *tp = bpf_skc_to_tcp_sock((void *)sk);

	settle(sk);
	on_ack((const void *)ctx->args[0], ctx->args[1]);
	if (tp)
		note_ssthresh_again((const void *)ctx->args[0], tp);
	/* A closed window held data back. The kernel checks when it opens, in tcp_ack_update_window(). */
	if (tp && !LOAD(u32, tp, tcp_sock, packets_out) &&
	    LOAD(u32, tp, tcp_sock, write_seq) != LOAD(u32, tp, tcp_sock, snd_nxt) && idle_for_rto(tp))
		expect_restart(sk);
	return 0;
}

int on_net_dev_queue(struct bpf_raw_tracepoint_args *ctx)
{
	int zero = 0;
	u64 *n = pending_count.lookup(&zero);

	if (n && *n)
		settle((const void *)READ(u64, ctx->args[0], sk_buff, sk));
	return 0;
}

int on_tcp_destroy_sock(struct bpf_raw_tracepoint_args *ctx)
{
	settle((const void *)ctx->args[0]);
	forget((const void *)ctx->args[0]);
	return 0;
}

int on_tcp_cong_state_set(struct bpf_raw_tracepoint_args *ctx)
{
	entered_state(ctx, PROBE_SENDMSG);
	return 0;
}

int on_tcp_cong_state_set_tlp(struct bpf_raw_tracepoint_args *ctx)
{
	left_cwr(ctx, PROBE_SENDMSG);
	return 0;
}
