// SPDX-License-Identifier: GPL-2.0
/*
 * Congestion-window resets, one section per rung of the ladder. It is compiled once for each reason that is
 * traced, with -DREASON and the -DRUNG_* that cwndtrace/kernel/ladder.py chose for it. Every section ends in
 * emit().
 */
#include "sock.h"

/* Room for a reset of each of 10,000 connections at once: how many pages is said in cwndtrace/capture/live.py. */
BPF_RINGBUF_OUTPUT(cwnd_resets, RESET_PAGES);

#ifdef FILTER_PID
/* Inodes of the sockets that the process holds, kept fresh from user space: timers and ACKs have no process. */
BPF_HASH(pid_sockets, u64, u8, 65536);
#endif
#ifdef FILTER_CGROUP
/* The cgroup that was asked for and those below it, kept fresh from user space. */
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

static __always_inline void emit(struct cwnd_reset *r)
{
	if (r->cwnd_after >= r->cwnd_before) {
		count(COUNT_UNCHANGED);
		return;
	}
#ifdef FILTER_MIN_IDLE_US
	if (r->idle_us < FILTER_MIN_IDLE_US)
		return;
#endif
	if (cwnd_resets.ringbuf_output(r, sizeof(*r), 0))
		count(COUNT_LOST);
	/* After a timeout the window isn't expected to come back to what it was. */
	if (REASON != REASON_RTO_LOSS)
		follow(r);
}

/* The window has fallen just now: the socket shows what came after. */
static __always_inline void emit_fallen(const void *sk, u8 probe, u32 cwnd_before, u32 ssthresh_before,
					u32 idle)
{
	struct cwnd_reset r = {};

	if (!wanted(sk))
		return;
	fill_from_sock(&r, sk);
	r.idle_us = jiffies_to_us(idle);
	r.reason = REASON;
	r.probe = probe;
	r.cwnd_before = cwnd_before;
	r.ssthresh_before = ssthresh_before;
	if (REASON == REASON_RTO_LOSS) {
		r.ca_state = TCP_CA_LOSS;
		/* While a SYN is all that was sent, lsndtime isn't set. */
		if (!READ(u32, sk, tcp_sock, data_segs_out))
			r.idle_us = 0;
	}
	emit(&r);
}

/* ---- tracepoint: TP_PROTO(sk, reason, old_cwnd, old_ssthresh, idle) of kernel-patches/ ---- */
#ifdef RUNG_TRACEPOINT
int on_tcp_cwnd_reset(struct bpf_raw_tracepoint_args *ctx)
{
	if (ctx->args[1] == REASON)
		emit_fallen((const void *)ctx->args[0], PROBE_TRACEPOINT, ctx->args[2], ctx->args[3],
			    ctx->args[4]);
	return 0;
}
#endif

/* ---- fentry and kprobe: the window is noted on entry and compared on return ---- */
#if defined(RUNG_FENTRY) || defined(RUNG_KPROBE)
struct before {
	u64 sk;
	u32 cwnd;
	u32 ssthresh;
	u32 idle;
	u32 unused;
};

static __always_inline struct before note_before(const void *sk)
{
	struct before b = {
		.sk = (u64)sk,
		.cwnd = READ(u32, sk, tcp_sock, snd_cwnd),
		.ssthresh = READ(u32, sk, tcp_sock, snd_ssthresh),
		.idle = sk_idle(sk),
	};

	return b;
}
#endif

#ifdef RUNG_FENTRY
#if REASON == 0
#define FUNCTION tcp_cwnd_restart
#elif REASON == 1
#define FUNCTION tcp_enter_loss
#else
#define FUNCTION tcp_cwnd_application_limited
#endif

/* The socket is locked between entry and return, so its address is key enough. */
BPF_HASH(entered, u64, struct before, 16384);

static __always_inline int fentry_in(const void *sk)
{
	struct before b = note_before(sk);

	if (entered.update(&b.sk, &b))
		count(COUNT_LOST);
	return 0;
}

static __always_inline int fentry_out(const void *sk)
{
	u64 key = (u64)sk;
	struct before *b = entered.lookup(&key);

	if (!b)
		return 0;
	/* The copy is a plain number; the verifier allows no arithmetic on the argument itself. */
	emit_fallen((const void *)b->sk, PROBE_FENTRY, b->cwnd, b->ssthresh, b->idle);
	entered.delete(&key);
	return 0;
}

/* One more level of macros, so that FUNCTION is expanded before bcc pastes it into the program's name. */
#define ENTRY_OF(function) KFUNC_PROBE(function, void *sk)
#define EXIT_OF(function) KRETFUNC_PROBE(function, void *sk)

ENTRY_OF(FUNCTION)
{
	return fentry_in(sk);
}

EXIT_OF(FUNCTION)
{
	return fentry_out(sk);
}
#endif

#ifdef RUNG_KPROBE
#include <uapi/linux/ptrace.h>

/*
 * A return has no arguments, and an interrupt can enter the same function for another socket on the same
 * thread: the stack pointer tells the calls apart. FRAME_SHIFT is what the return address took of it.
 */
struct frame {
	u64 tid;
	u64 sp;
};
BPF_HASH(frames, struct frame, struct before, 16384);

int kprobe_in(struct pt_regs *ctx)
{
	struct frame key = {.tid = bpf_get_current_pid_tgid(), .sp = PT_REGS_SP(ctx)};
	struct before b = note_before((const void *)PT_REGS_PARM1(ctx));

	if (frames.update(&key, &b))
		count(COUNT_LOST);
	return 0;
}

int kprobe_out(struct pt_regs *ctx)
{
	struct frame key = {.tid = bpf_get_current_pid_tgid(), .sp = PT_REGS_SP(ctx) - FRAME_SHIFT};
	struct before *b = frames.lookup(&key);

	if (!b) {
		count(COUNT_LOST);
		return 0;
	}
	emit_fallen((const void *)b->sk, PROBE_KPROBE, b->cwnd, b->ssthresh, b->idle);
	frames.delete(&key);
	return 0;
}
#endif

/* ---- sendmsg and tcp_probe see a timeout where the congestion state is set ---- */
#ifdef RUNG_CONG_STATE
/*
 * tcp_set_ca_state(sk, TCP_CA_Loss) is called by tcp_enter_loss() after it lowered the window. On the first
 * timeout of an episode prior_cwnd and prior_ssthresh hold what came before (the latter as
 * tcp_current_ssthresh() gives it); on a repeated one nothing does, and the window is already at its least.
 * tcp_simple_retransmit() comes here too: it lowers no window and clears prior_ssthresh.
 */
int on_tcp_cong_state_set(struct bpf_raw_tracepoint_args *ctx)
{
	const void *sk = (const void *)ctx->args[0];
	u32 state, prior_ssthresh;

	if ((u8)ctx->args[1] != TCP_CA_LOSS)
		return 0;
	state = READ_BITS(sk, inet_connection_sock, icsk_ca_state);
	if (state > CA_STATE_DISORDER &&
	    (s32)(READ(u32, sk, tcp_sock, snd_una) - READ(u32, sk, tcp_sock, high_seq)) < 0 &&
	    !(state == TCP_CA_LOSS && !READ(u8, sk, inet_connection_sock, icsk_retransmits)))
		return 0;
	prior_ssthresh = READ(u32, sk, tcp_sock, prior_ssthresh);
	if (prior_ssthresh)
		emit_fallen(sk, RUNG_CONG_STATE, READ(u32, sk, tcp_sock, prior_cwnd),
			    prior_ssthresh, sk_idle(sk));
	return 0;
}
#endif

#if defined(RUNG_SENDMSG) || defined(RUNG_TCP_PROBE)
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

/* ---- sendmsg: the kernel's own rule, applied before it does, confirmed by what is sent ---- */
#ifdef RUNG_SENDMSG
/*
 * The sender goes on from here to the kernel's own look at the clock: a tick, or the time that another task has
 * the CPU, may fall between. Idle time that is short of the RTO by no more than this (20 ms) may still become one.
 */
#define LATE_JIFFIES (CWT_HZ / 50)

/*
 * The first half of tcp_slow_start_after_idle_check() of include/net/tcp.h: whether the socket has been idle so long
 * that the kernel may restart its window now. This runs on every send and every ACK.
 */
static __always_inline bool idle_for_rto(const void *tp)
{
	if (LOAD(u32, tp, tcp_sock, packets_out))
		return false;
	return (s32)(jiffies32() - LOAD(u32, tp, tcp_sock, lsndtime) + LATE_JIFFIES) >
	       (s32)LOAD(u32, tp, inet_connection_sock, icsk_rto);
}

/* tcp_cwnd_restart() of net/ipv4/tcp_output.c: the window after it. */
static __always_inline u32 restarted_cwnd(u32 cwnd, u32 init_cwnd, s32 idle, s32 rto)
{
	u32 floor = init_cwnd < cwnd ? init_cwnd : cwnd;
	int i;

	/* A window has 32 bits: it can't be halved more often than that. */
	for (i = 0; i < 32; i++) {
		idle -= rto;
		if (idle <= 0 || cwnd <= floor)
			break;
		cwnd >>= 1;
	}
	return cwnd > floor ? cwnd : floor;
}

BPF_HASH(pending, u64, struct cwnd_reset, 16384);
/* How many there are: spares every packet a hash look-up. */
BPF_ARRAY(pending_count, u64, 1);

static __always_inline void add_pending(s64 n)
{
	int zero = 0;
	u64 *c = pending_count.lookup(&zero);

	if (c)
		__sync_fetch_and_add(c, n);
}

/* If a restart of this socket was expected: has it come? */
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
		/* The kernel saw the first tick behind the RTO, at least. */
		if (r->idle_us <= r->rto_us)
			r->idle_us = r->rto_us + jiffies_to_us(1);
		emit(r);
	} else if (r->idle_us > r->rto_us) {
		count(COUNT_WITHDRAWN);
	}
	pending.delete(&key);
	add_pending(-1);
}

/* For a socket that has been idle. */
static __always_inline void expect_restart(const void *sk)
{
	struct cwnd_reset r = {};
	u64 key = (u64)sk;
	u32 rto = READ(u32, sk, inet_connection_sock, icsk_rto), idle = sk_idle(sk);

	if (!restarts(sk) || !wanted(sk))
		return;
	fill_from_sock(&r, sk);
	r.reason = REASON;
	r.probe = PROBE_SENDMSG;
	r.cwnd_before = r.cwnd_after;
	r.ssthresh_before = r.ssthresh_after;
	if (restarted_cwnd(r.cwnd_before, r.init_cwnd, (s32)idle > (s32)rto ? idle : rto + 1, rto) >=
	    r.cwnd_before) {
		if ((s32)idle > (s32)rto)
			count(COUNT_UNCHANGED);
		return;
	}
	if (pending.update(&key, &r))
		count(COUNT_LOST);
	else
		add_pending(1);
}

int on_tcp_sendmsg_locked(struct bpf_raw_tracepoint_args *ctx)
{
	const void *sk = (const void *)ctx->args[0], *tp = bpf_skc_to_tcp_sock((void *)sk);
	u64 skb;

	settle(sk);
	if (!tp || !idle_for_rto(tp))
		return 0;
	skb = argument(ctx, 2);
	/* Only a new buffer is checked by the kernel (tcp_skb_entail); this one still takes more. */
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
	on_ack(sk);
	/* Data that a closed window held back: tcp_ack_update_window() checks when it opens. */
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
#endif

/* ---- tcp_probe: the window as the last ACK left it, against the one that the next burst starts with ---- */
#ifdef RUNG_TCP_PROBE
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
				count(COUNT_LOST);
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
#endif
