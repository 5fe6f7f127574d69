// SPDX-License-Identifier: GPL-2.0
/* Idle resets by tcp:tcp_probe: the window that the last ACK left is compared with the one that the next burst starts with. */
#include "reset.h"
#include "restart.h"

/* Ports and bytes, because a socket is freed and its memory used for the next one: is it still this connection? */
struct window {
	u64 bytes_acked;
	u32 ports;
	u32 cwnd;
	u32 ssthresh;
	u32 lsndtime;
};
/* Not one that evicts, or a window could be forgotten and fall with nobody to tell. How many: capture/live.py. */
BPF_HASH(windows, u64, struct window, WINDOWS);
/*
 * tcp_probe comes before its ACK is worked in: the socket is read again once this CPU has gone on. Two of them,
 * because an ACK that a process works in, from the socket's backlog, can be interrupted by others.
 */
struct probed {
	u64 of_interrupt;
	u64 of_process;
};
BPF_PERCPU_ARRAY(probed, struct probed, 1);

/* The kernel's own numbers. Segments without data have a size of their own: skb_is_tcp_pure_ack(). */
#define TCP_ESTABLISHED 1
#define TCP_TIME_WAIT 6
#define TCP_NEW_SYN_RECV 12
#define TCPHDR_FIN 1
#define PURE_ACK_TRUESIZE 2

/* Once the ACK is worked in. */
static __always_inline void note_window(u64 key)
{
	const void *sk = (const void *)key;
	struct window *w = windows.lookup(&key);

	if (!w)
		return;
	w->cwnd = READ(u32, sk, tcp_sock, snd_cwnd);
	w->ssthresh = READ(u32, sk, tcp_sock, snd_ssthresh);
}

/*
 * Whether this ACK leaves nothing under way, so that idle time may follow. The ACKs of what it leaves come here too,
 * but for those behind a FIN.
 */
static __always_inline bool ends_flight(const void *tp, u64 skb)
{
	const void *cb = AT(skb, sk_buff, cb);

	return LOAD(u32, cb, tcp_skb_cb, ack_seq) == LOAD(u32, tp, tcp_sock, snd_nxt) ||
	       LOAD_BYTE(cb, tcp_skb_cb, tcp_flags) & TCPHDR_FIN;
}

/* Whether what was noted still holds, with nothing under way: only an undo can change the window then. */
static __always_inline bool holds(const struct window *w, const void *tp)
{
	return w->ports == LOAD(u32, tp, sock_common, skc_portpair) &&
	       w->bytes_acked <= LOAD(u64, tp, tcp_sock, bytes_acked) &&
	       w->cwnd == LOAD(u32, tp, tcp_sock, snd_cwnd) && !LOAD(u32, tp, tcp_sock, undo_marker);
}

int on_tcp_probe_ack(struct bpf_raw_tracepoint_args *ctx)
{
	u64 key = ctx->args[0], *last;
	const void *sk = (const void *)key, *tp = bpf_skc_to_tcp_sock((void *)key);
	struct window *w, first = {};
	struct probed *p;
	bool under_way;
	int zero = 0;

	on_ack(sk);
	if (!tp)
		return 0;
	under_way = LOAD(u32, tp, tcp_sock, packets_out) != 0;
	if (under_way && !ends_flight(tp, ctx->args[1]))
		return 0;
	w = windows.lookup(&key);
	if (!under_way && w && holds(w, tp))
		return 0;
	p = probed.lookup(&zero);
	if (!p)
		return 0;
	/* Not by key, whose address calls were given: some verifiers take it for a pointer no more. */
	last = LOAD(s32, sk, sock, sk_lock__owned) ? &p->of_process : &p->of_interrupt;
	if (*last && *last != key)
		note_window(*last);
	*last = 0;
	if (!wanted(sk))
		return 0;
	*last = key;
	if (!w) {
		if (windows.update(&key, &first)) {
			/* A window that there is no room to note: idle time may follow that makes it fall unseen. */
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
	w->cwnd = LOAD(u32, tp, tcp_sock, snd_cwnd);
	w->ssthresh = LOAD(u32, tp, tcp_sock, snd_ssthresh);
	w->lsndtime = LOAD(u32, tp, tcp_sock, lsndtime);
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
	if (p->of_interrupt) {
		note_window(p->of_interrupt);
		p->of_interrupt = 0;
	}
	/* Not while the process is still at it. */
	if (p->of_process && !sk_owned((const void *)p->of_process)) {
		note_window(p->of_process);
		p->of_process = 0;
	}
	return 0;
}

static __always_inline void refresh_one(u64 *key)
{
	if (!*key)
		return;
	note_window(*key);
	if (!sk_owned((const void *)*key))
		*key = 0;
}

/*
 * User space runs this on each CPU, more often than the shortest RTO: an ACK from a backlog is followed by no
 * poll, and one from a TUN device neither. Not an attached program, for the reason that hand_over() gives.
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

int on_net_dev_queue_first(struct bpf_raw_tracepoint_args *ctx)
{
	u64 skb = ctx->args[0], sk, key;
	u32 cwnd, ssthresh, lsndtime;
	struct window *w;
	u8 state;

	if (LOAD(u32, skb, sk_buff, truesize) == PURE_ACK_TRUESIZE)
		return 0;
	sk = LOAD(u64, skb, sk_buff, sk);
	if (!sk)
		return 0;
	/* In these two it is no whole socket: sk_fullsock() of include/net/sock.h. */
	state = LOAD(u8, sk, sock_common, skc_state);
	if (state == TCP_NEW_SYN_RECV || state == TCP_TIME_WAIT)
		return 0;
	/* What is under way waits in this queue for its ACK. From a packet the verifier lets nobody see tcp_sock. */
	if (LOAD(u64, sk, sock, tcp_rtx_queue__rb_node))
		return 0;
	/* A copy, for the same reason as in on_tcp_probe_ack(). */
	key = sk;
	w = windows.lookup(&key);
	if (!w || w->ports != LOAD(u32, sk, sock_common, skc_portpair))
		return 0;
	/* No RTO is as short, and lsndtime has just been set. In other states no ACK tells of the window. */
	lsndtime = jiffies32();
	if (state == TCP_ESTABLISHED && lsndtime - w->lsndtime < 2) {
		w->lsndtime = lsndtime;
		return 0;
	}
	if (w->bytes_acked > READ(u64, sk, tcp_sock, bytes_acked))
		return 0;
	cwnd = w->cwnd;
	ssthresh = w->ssthresh;
	lsndtime = w->lsndtime;
	w->cwnd = READ(u32, sk, tcp_sock, snd_cwnd);
	w->ssthresh = READ(u32, sk, tcp_sock, snd_ssthresh);
	w->lsndtime = READ(u32, sk, tcp_sock, lsndtime);
	if (w->cwnd < cwnd && (s32)(w->lsndtime - lsndtime) > (s32)READ(u32, sk, inet_connection_sock, icsk_rto) &&
	    READ_BITS(sk, inet_connection_sock, icsk_ca_state) != TCP_CA_LOSS && restarts((const void *)sk))
		emit_fallen((const void *)sk, PROBE_TCP_PROBE, cwnd, ssthresh, w->lsndtime - lsndtime);
	return 0;
}
