// SPDX-License-Identifier: GPL-2.0
/*
 * Traces idle resets with tcp:tcp_sendmsg_locked: applies the kernel's rule before the kernel does, and has the
 * connection's next ACK or send confirm the result. Nothing runs for each packet that is sent.
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

/* Returns what tcp_cwnd_restart() of net/ipv4/tcp_output.c leaves of a window above the floor, the initial window. */
static __always_inline u32 restarted_cwnd(u32 cwnd, u32 floor, s32 idle, s32 rto)
{
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

/* A reset that is due, with the window that the rule leaves. It counts in follow_buckets. */
struct restart {
	struct cwnd_reset r;
	u64 bucket;
};
BPF_HASH(pending, u64, struct restart, 16384);
/* Zeros. A restart is filled in where pending has it, because the stack of 512 bytes has no room for one. */
BPF_ARRAY(blank_restart, struct restart, 1);

/*
 * Returns the window that the restart left, where cwnd is the window now. That is what the rule gave, or less if a tick
 * came before the kernel's check, or if the data filled several buffers, each of which is a restart: then it is halved
 * more often. A timeout or a probe of the MTU (tcp_mtu_probe()) may have lowered it since, and where the kernel tells of
 * no ACK, it may have grown. All of these leave other windows, so that the rule's is the restart's then.
 */
static __always_inline u32 cwnd_left(const struct cwnd_reset *r, u32 cwnd)
{
	u32 left = r->cwnd_after;
	int i;

	for (i = 0; i < 32; i++) {
		if (left <= cwnd || left <= r->init_cwnd)
			break;
		left >>= 1;
	}
	if (left < r->init_cwnd)
		left = r->init_cwnd;
	return left == cwnd ? cwnd : r->cwnd_after;
}

/* If a restart of this socket is pending, finds out whether it has happened, and forgets it. */
static __always_inline void settle(const void *sk)
{
	u64 key = (u64)sk, *n;
	struct restart *due = pending.lookup(&key);
	struct cwnd_reset *r;
	u32 cwnd;

	if (!due)
		return;
	r = &due->r;
	cwnd = READ(u32, sk, tcp_sock, snd_cwnd);
	r->cwnd_after = cwnd_left(r, cwnd);
	/* Nothing was in flight, so data that was acknowledged since has been sent since. */
	if (r->cwnd_after < r->cwnd_before &&
	    (cwnd < r->cwnd_before || READ(u64, sk, tcp_sock, bytes_acked) != r->bytes_acked)) {
		/* The kernel saw at least the first tick after the RTO. */
		if (r->idle_us <= r->rto_us)
			r->idle_us = r->rto_us + jiffies_to_us(1);
		emit(r, REASON_IDLE);
	} else if (r->idle_us > r->rto_us) {
		count(withdrawn, 1);
	}
	n = follow_bucket(due->bucket);
	pending.delete(&key);
	if (n)
		__sync_fetch_and_add(n, -1);
}

/* As tcp_current_ssthresh() of include/net/tcp.h, which a restart sets ssthresh to. */
static __always_inline u32 restarted_ssthresh(const struct cwnd_reset *r)
{
	u32 most = (r->cwnd_before >> 1) + (r->cwnd_before >> 2);

	if (r->ca_state == CA_STATE_CWR || r->ca_state == CA_STATE_RECOVERY || r->ssthresh_before > most)
		return r->ssthresh_before;
	return most;
}

/* Notes the state of a socket that has been idle, if the kernel is going to restart its window. */
static __always_inline void expect_restart(const void *sk)
{
	int zero = 0;
	u64 key = (u64)sk, bucket, *n;
	u32 rto = READ(u32, sk, inet_connection_sock, icsk_rto), idle = sk_idle(sk);
	struct restart *blank = blank_restart.lookup(&zero), *due;
	struct cwnd_reset *r;

	if (!blank || !restarts(sk) || !wanted(sk))
		return;
	if (READ(u32, sk, tcp_sock, snd_cwnd) <= sk_init_cwnd(sk)) {
		if ((s32)idle > (s32)rto)
			count(unchanged, 1);
		return;
	}
	bucket = FOLLOW_BUCKET(READ(u32, sk, sock_common, skc_hash));
	n = follow_bucket(bucket);
	if (!n || pending.update(&key, blank)) {
		count(lost, 1);
		return;
	}
	due = pending.lookup(&key);
	if (!due)
		return;
	due->bucket = bucket;
	r = &due->r;
	fill_from_sock(r, sk);
	r->idle_us = jiffies_to_us(idle);
	r->reason = REASON_IDLE;
	r->probe = PROBE_SENDMSG;
	r->cwnd_before = r->cwnd_after;
	r->ssthresh_before = r->ssthresh_after;
	r->cwnd_after = restarted_cwnd(r->cwnd_before, r->init_cwnd, idle, rto);
	r->ssthresh_after = restarted_ssthresh(r);
	__sync_fetch_and_add(n, 1);
}

int on_tcp_sendmsg_locked(struct bpf_raw_tracepoint_args *ctx)
{
	const void *sk = (const void *)ctx->args[0], *tp = bpf_skc_to_tcp_sock((void *)sk);
	u64 skb;

	/*
	 * Not sk: bcc turns loads from a variable that it knows to hold an argument into calls, and fails where a macro
	 * expands to them.
	 */
	if (in_use(LOAD(u32, (const void *)ctx->args[0], sock_common, skc_hash))) {
		settle(sk);
		on_write((const void *)ctx->args[0]);
	}
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

	if (!tp)
		return 0;
	if (in_use(LOAD(u32, (const void *)ctx->args[0], sock_common, skc_hash))) {
		settle(sk);
		on_ack((const void *)ctx->args[0], ctx->args[1]);
	}
	note_ssthresh_again((const void *)ctx->args[0], tp);
	/* A closed window held data back. The kernel checks when it opens, in tcp_ack_update_window(). */
	if (!LOAD(u32, tp, tcp_sock, packets_out) &&
	    LOAD(u32, tp, tcp_sock, write_seq) != LOAD(u32, tp, tcp_sock, snd_nxt) && idle_for_rto(tp))
		expect_restart(sk);
	return 0;
}

/* No ACK is seen once a connection is being closed, and tcp_disconnect() clears the window after this. */
int on_inet_sock_set_state(struct bpf_raw_tracepoint_args *ctx)
{
	if (in_use(LOAD(u32, (const void *)ctx->args[0], sock_common, skc_hash)))
		settle((const void *)ctx->args[0]);
	return 0;
}

int on_tcp_destroy_sock(struct bpf_raw_tracepoint_args *ctx)
{
	settle((const void *)ctx->args[0]);
	forget((const void *)ctx->args[0]);
	return 0;
}

/* User space runs this for each pending restart once the other programs are detached. */
int settle_last(struct bpf_raw_tracepoint_args *ctx)
{
	settle((const void *)ctx->args[0]);
	return 0;
}

int on_tcp_cong_state_set(struct bpf_raw_tracepoint_args *ctx)
{
	/* A timeout comes after the restart. */
	settle((const void *)ctx->args[0]);
	entered_state(ctx, PROBE_SENDMSG);
	return 0;
}

int on_tcp_cong_state_set_tlp(struct bpf_raw_tracepoint_args *ctx)
{
	left_cwr(ctx, PROBE_SENDMSG);
	return 0;
}
