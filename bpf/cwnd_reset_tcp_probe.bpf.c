// SPDX-License-Identifier: GPL-2.0
/*
 * Traces idle resets with tcp:tcp_probe: compares the window that the last ACK left with the one that the next burst
 * starts with.
 */
#include "cong_state.h"
#include "reset.h"
#include "restart.h"
#include "write_programs.h"

/* ports and bytes_acked show whether this is still the same connection: the memory of a freed socket is used again. */
struct window {
	u64 bytes_acked;
	u32 ports;
	u32 cwnd;
	u32 ssthresh;
	u32 lsndtime;
	u32 unsent;	/* bytes queued when the last ACK came with nothing in flight */
	u32 padding;
};
/* Not an LRU hash, which could evict a window whose fall would then go unseen. capture/live.py sets WINDOWS. */
BPF_HASH(windows, u64, struct window, WINDOWS);
/*
 * tcp_probe runs before its ACK is processed, so the socket is read again once this CPU has gone on. There are two
 * members, because other ACKs can interrupt a process that handles an ACK from the socket's backlog.
 */
struct last_ack {
	u64 sk;
	u32 cwnd;	/* what the socket's entry in windows has */
	u32 ssthresh;
};
struct probed {
	struct last_ack of_interrupt;
	struct last_ack of_process;
};
BPF_PERCPU_ARRAY(probed, struct probed, 1);

/* Numbers from the kernel. Segments without data have a special truesize: see skb_is_tcp_pure_ack(). */
#define TCPHDR_FIN 1
#define PURE_ACK_TRUESIZE 2

/* Notes the window after the ACK has been processed. Most ACKs that end a flight leave it as it was. */
static __always_inline void note_window(struct last_ack *last)
{
	u64 key = last->sk;
	const void *sk = (const void *)key;
	u32 cwnd = READ(u32, sk, tcp_sock, snd_cwnd), ssthresh = READ(u32, sk, tcp_sock, snd_ssthresh);
	struct window *w;

	if (cwnd == last->cwnd && ssthresh == last->ssthresh)
		return;
	w = windows.lookup(&key);
	if (!w)
		return;
	w->cwnd = last->cwnd = cwnd;
	w->ssthresh = last->ssthresh = ssthresh;
}

/*
 * Returns true if this ACK leaves nothing in flight, so that idle time may follow. If it leaves data in flight, a later
 * ACK comes here too, but not behind a FIN.
 */
static __always_inline bool ends_flight(const void *tp, u64 skb)
{
	const void *cb = AT(skb, sk_buff, cb);

	return LOAD(u32, cb, tcp_skb_cb, ack_seq) == LOAD(u32, tp, tcp_sock, snd_nxt) ||
	       LOAD_BYTE(cb, tcp_skb_cb, tcp_flags) & TCPHDR_FIN;
}

/*
 * Returns true if the noted window still holds, with nothing in flight: only an undo can change the window then, or a
 * write while the peer's window holds data back, which restarts it and sends nothing yet.
 */
static __always_inline bool holds(const struct window *w, const void *tp, u32 unsent)
{
	u32 cwnd = LOAD(u32, tp, tcp_sock, snd_cwnd);

	return w->ports == LOAD(u32, tp, sock_common, skc_portpair) &&
	       w->bytes_acked <= LOAD(u64, tp, tcp_sock, bytes_acked) &&
	       (w->cwnd == cwnd || (unsent && w->cwnd > cwnd)) && !LOAD(u32, tp, tcp_sock, undo_marker);
}

int on_tcp_probe_ack(struct bpf_raw_tracepoint_args *ctx)
{
	u64 key = ctx->args[0];
	struct last_ack *last;
	const void *sk = (const void *)key, *tp = bpf_skc_to_tcp_sock((void *)key);
	struct window *w, first = {};
	struct probed *p;
	bool under_way;
	int zero = 0;
	u32 unsent;

	on_ack(sk, ctx->args[1]);
	if (!tp)
		return 0;
	note_ssthresh_again(sk, tp);
	under_way = LOAD(u32, tp, tcp_sock, packets_out) != 0;
	if (under_way && !ends_flight(tp, ctx->args[1]))
		return 0;
	unsent = under_way ? 0 : LOAD(u32, tp, tcp_sock, write_seq) - LOAD(u32, tp, tcp_sock, snd_nxt);
	w = windows.lookup(&key);
	if (!under_way && w && holds(w, tp, unsent)) {
		w->unsent = unsent;
		return 0;
	}
	p = probed.lookup(&zero);
	if (!p)
		return 0;
	/* This uses sk: calls were given the address of key, and some verifiers don't treat key as a pointer then. */
	last = LOAD(s32, sk, sock, sk_lock__owned) ? &p->of_process : &p->of_interrupt;
	if (last->sk && last->sk != key)
		note_window(last);
	last->sk = 0;
	if (!wanted(sk))
		return 0;
	if (!w) {
		if (windows.update(&key, &first)) {
			/* There is no room to note this window, so a reset after idle time would go unseen. */
			if (restarts(sk) && LOAD(u32, tp, tcp_sock, snd_cwnd) > sk_init_cwnd(sk))
				count(lost, 1);
			return 0;
		}
		w = windows.lookup(&key);
		if (!w)
			return 0;
	}
	w->bytes_acked = LOAD(u64, tp, tcp_sock, bytes_acked);
	w->ports = LOAD(u32, tp, sock_common, skc_portpair);
	w->cwnd = last->cwnd = LOAD(u32, tp, tcp_sock, snd_cwnd);
	w->ssthresh = last->ssthresh = LOAD(u32, tp, tcp_sock, snd_ssthresh);
	last->sk = key;
	w->lsndtime = LOAD(u32, tp, tcp_sock, lsndtime);
	w->unsent = unsent;
	return 0;
}

int on_tcp_destroy_sock_window_follow(struct bpf_raw_tracepoint_args *ctx)
{
	u64 key = ctx->args[0];

	forget((const void *)key);
	windows.delete(&key);
	return 0;
}

int on_napi_poll(struct bpf_raw_tracepoint_args *ctx)
{
	int zero = 0;
	struct probed *p = probed.lookup(&zero);

	if (!p)
		return 0;
	if (p->of_interrupt.sk) {
		note_window(&p->of_interrupt);
		p->of_interrupt.sk = 0;
	}
	/* While a process owns the socket, the ACK may not have been processed yet. */
	if (p->of_process.sk && !sk_owned((const void *)p->of_process.sk)) {
		note_window(&p->of_process);
		p->of_process.sk = 0;
	}
	return 0;
}

static __always_inline void refresh_one(struct last_ack *last)
{
	if (!last->sk)
		return;
	note_window(last);
	if (!sk_owned((const void *)last->sk))
		last->sk = 0;
}

/*
 * User space runs this on each CPU, more often than the shortest RTO: no NAPI poll follows an ACK from a backlog or
 * from a TUN device. It isn't an attached program, for the reason given at hand_over() in block_io.bpf.c.
 */
int refresh(struct bpf_raw_tracepoint_args *ctx)
{
	int zero = 0;
	struct probed *p = probed.lookup(&zero);

	if (!p)
		return 0;
	refresh_one(&p->of_interrupt);
	refresh_one(&p->of_process);
	return 0;
}

/*
 * Returns the number of data bytes in the packet that is being sent. bytes_sent has them already, and snd_nxt hasn't.
 * The packet is a copy of the first one in the write queue, which stays there until IP has taken the copy: see
 * tcp_write_xmit() of net/ipv4/tcp_output.c.
 */
static __always_inline u32 bytes_under_way(const void *sk)
{
	u64 first = READ(u64, sk, sock, sk_write_queue__next);

	return first == (u64)AT(sk, sock, sk_write_queue) ? 0 : READ(u32, first, sk_buff, len);
}

static __always_inline void emit_restart(const void *sk, u32 cwnd, u32 ssthresh, u32 idle, u32 unsent)
{
	struct cwnd_reset r = {};

	if (!fill_fallen(&r, sk, REASON_IDLE, PROBE_TCP_PROBE, cwnd, ssthresh, idle))
		return;
	/* The record has what was sent and queued before this packet. */
	r.bytes_sent -= bytes_under_way(sk);
	r.unsent_bytes = unsent;
	emit(&r, REASON_IDLE);
}

int on_net_dev_queue_first(struct bpf_raw_tracepoint_args *ctx)
{
	u64 skb = ctx->args[0], sk, key;
	u32 cwnd, ssthresh, lsndtime, unsent, sent;
	struct window *w;
	u8 state;

	if (LOAD(u32, skb, sk_buff, truesize) == PURE_ACK_TRUESIZE)
		return 0;
	sk = LOAD(u64, skb, sk_buff, sk);
	if (!sk)
		return 0;
	/* In these two states it isn't a full socket: see sk_fullsock() of include/net/sock.h. */
	state = LOAD(u8, sk, sock_common, skc_state);
	if (state == TCP_STATE_NEW_SYN_RECV || state == TCP_STATE_TIME_WAIT)
		return 0;
	/* Segments in flight wait in this queue. The verifier permits no access to the tcp_sock of a packet's socket. */
	if (LOAD(u64, sk, sock, tcp_rtx_queue__rb_node))
		return 0;
	/* key is a copy of sk, for the same reason as in on_tcp_probe_ack(). */
	key = sk;
	w = windows.lookup(&key);
	if (!w || w->ports != LOAD(u32, sk, sock_common, skc_portpair))
		return 0;
	/* lsndtime has just been set to now, and no RTO is so short. In other states, no ACK updates the noted window. */
	lsndtime = jiffies32();
	if (state == TCP_STATE_ESTABLISHED && lsndtime - w->lsndtime < 2) {
		w->lsndtime = lsndtime;
		return 0;
	}
	if (w->bytes_acked > READ(u64, sk, tcp_sock, bytes_acked))
		return 0;
	/* A probe of the peer's closed window has no data. */
	sent = READ(u32, sk, tcp_sock, lsndtime);
	if ((s32)(sent - w->lsndtime) <= 0)
		return 0;
	cwnd = w->cwnd;
	ssthresh = w->ssthresh;
	lsndtime = w->lsndtime;
	unsent = w->unsent;
	w->cwnd = READ(u32, sk, tcp_sock, snd_cwnd);
	w->ssthresh = READ(u32, sk, tcp_sock, snd_ssthresh);
	w->lsndtime = sent;
	w->unsent = 0;
	if (w->cwnd < cwnd && (s32)(sent - lsndtime) > (s32)READ(u32, sk, inet_connection_sock, icsk_rto) &&
	    READ_BITS(sk, inet_connection_sock, icsk_ca_state) != TCP_CA_LOSS && restarts((const void *)sk))
		emit_restart((const void *)sk, cwnd, ssthresh, sent - lsndtime, unsent);
	return 0;
}

int on_tcp_cong_state_set(struct bpf_raw_tracepoint_args *ctx)
{
	entered_state(ctx, PROBE_TCP_PROBE);
	return 0;
}

int on_tcp_cong_state_set_tlp(struct bpf_raw_tracepoint_args *ctx)
{
	left_cwr(ctx, PROBE_TCP_PROBE);
	return 0;
}
