/* SPDX-License-Identifier: GPL-2.0 */
/* The sockets that are followed after a reset, and what is known of each. */
#ifndef CWNDTRACE_FOLLOWED_H
#define CWNDTRACE_FOLLOWED_H

#include "counters.h"
#include "sock.h"

#define FOLLOW_BUCKET_BITS 12
#define MARKS 8

/* Data from seq on, up to the next mark, was written at this time. */
struct mark {
	u64 ns;
	u32 seq;
};

struct followed {
	struct cwnd_recovery r;	/* the record as of the last ACK; capture/live.py reads it from here at the trace's end */
	u64 acked_ns;		/* time of the last ACK seen, at first of the reset itself */
	u64 sampled_ns;
	u64 bytes_acked;	/* the socket's counters at the reset; the record has their growth */
	u32 busy;
	u32 rwnd_limited;
	u32 sndbuf_limited;
	u32 acked_jiffies;	/* acked_ns on the clock of lsndtime */
	u32 written;		/* write_seq when it was last read */
	u32 queued_una;		/* snd_una at queued_ns */
	u64 queued_ns;		/* since when there has been unsent data; 0 while there is none */
	u64 owed_us;		/* waiting for the window that wasn't counted yet, see add_held() */
	u64 wait_us;		/* since queued_ns: time in which data was unsent, */
	u64 wait_cwnd_us;	/* the part of it in which the window was full, */
	u64 wait_short_us;	/* this part times the share that the window lacked of the one before the chain, */
	u64 wait_held_us;	/* and the part that was counted */
	u32 wait_queue;		/* most bytes unsent and in flight */
	u32 wait_snd_wnd;	/* largest window of the peer */
	u64 burst_waited_us;	/* how long the data of this burst has waited for the window */
	u64 burst_latest_us;	/* the longest time that a byte of it has been unsent */
	u16 bucket;
	bool slow_start;	/* the window before the chain was below ssthresh */
	bool regained;
	bool blocked;		/* since queued_ns, the writer has waited for room in the send buffer */
	u8 first;		/* the oldest mark */
	u8 marks;
	struct mark mark[MARKS];
};
BPF_HASH(followed, u64, struct followed, 16384);
/* Zeros from which an entry is made: an entry and a reset together are too large for the stack. */
BPF_ARRAY(blank_followed, struct followed, 1);
/*
 * The number of followed sockets, and with probe sendmsg of pending restarts, by some bits of the connection's hash. It
 * saves most other sockets a hash lookup.
 */
BPF_ARRAY(follow_buckets, u64, 1 << FOLLOW_BUCKET_BITS);

/* The argument is the kernel's hash of a connection's addresses and ports, which finds the socket of a packet. */
#define FOLLOW_BUCKET(hash) ((hash) & ((1 << FOLLOW_BUCKET_BITS) - 1))

static __always_inline u64 *follow_bucket(int bucket)
{
	return follow_buckets.lookup(&bucket);
}

/* Returns true if a connection with this hash may be followed, or have a pending restart. */
static __always_inline bool in_use(u32 hash)
{
	u64 *n = follow_bucket(FOLLOW_BUCKET(hash));

	return n && *n;
}

/* Returns the entry of a socket, by its address and the hash of its connection. */
static __always_inline struct followed *find_followed(u64 sk, u32 hash)
{
	return in_use(hash) ? followed.lookup(&sk) : 0;
}

/* The states of enum tcp_chrono of include/linux/tcp.h in which data is queued or unacknowledged. */
#define CHRONO_BUSY 1
#define CHRONO_RWND_LIMITED 2
#define CHRONO_SNDBUF_LIMITED 3

/* The jiffies that the kernel has counted in these states, and the state that it is counting in since start. */
struct chrono {
	u32 stat[3];
	u32 start;
	u8 current;
};

static __always_inline struct chrono read_chrono(u64 sk)
{
	struct chrono c = {
		.start = READ(u32, sk, tcp_sock, chrono_start),
		.current = READ_BITS(sk, tcp_sock, chrono_type),
	};

	bpf_probe_read_kernel(c.stat, sizeof(c.stat), AT(sk, tcp_sock, chrono_stat));
	return c;
}

/* Does the same where tp is what bpf_skc_to_tcp_sock() returns. */
static __always_inline struct chrono load_chrono(const void *tp)
{
	const volatile u32 *stat = (const volatile u32 *)AT(tp, tcp_sock, chrono_stat);
	struct chrono c = {
		.stat = {stat[0], stat[1], stat[2]},
		.start = LOAD(u32, tp, tcp_sock, chrono_start),
		.current = LOAD_BITS(tp, tcp_sock, chrono_type),
	};

	return c;
}

/* Returns the jiffies in one of these states until now, as tcp_get_info_chrono_stats() does. */
static __always_inline u32 chrono(const struct chrono *c, int state, u32 now)
{
	/* The two limited states are busy too. */
	if (state == CHRONO_BUSY)
		return c->stat[0] + c->stat[1] + c->stat[2] + (c->current ? now - c->start : 0);
	return c->stat[state - 1] + (c->current == state ? now - c->start : 0);
}

#endif
