/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Follows a socket after a reset, ACK by ACK, until it has regained its window.
 *
 * tcp_probe runs before its ACK is processed, so it shows the window that the previous ACK left.
 */
#ifndef CWNDTRACE_FOLLOW_H
#define CWNDTRACE_FOLLOW_H

#include "counters.h"
#include "sock.h"

#define FOLLOW_BUCKET_BITS 12

BPF_RINGBUF_OUTPUT(cwnd_recoveries, RESET_PAGES / 4);
BPF_RINGBUF_OUTPUT(cwnd_samples, RESET_PAGES / 2);

struct followed {
	u64 reset_ts_ns;
	u64 acked_ns;		/* time of the last ACK seen, at first of the reset itself */
	u64 sampled_ns;
	u64 bytes_acked;
	u32 target;
	u32 cwnd_start;
	u32 cwnd;
	u32 acks;
	/* User space reads these for the recoveries that the end of the trace cuts short. */
	u64 sock_cookie;
	u32 netns_ino;
	u16 reason;
	u16 bucket;
};
BPF_HASH(followed, u64, struct followed, 16384);
/* The number of followed sockets, by some bits of the connection's hash. It saves most other sockets a hash lookup. */
BPF_ARRAY(follow_buckets, u64, 1 << FOLLOW_BUCKET_BITS);

/* The argument is the kernel's hash of a connection's addresses and ports, which finds the socket of a packet. */
#define FOLLOW_BUCKET(hash) ((hash) & ((1 << FOLLOW_BUCKET_BITS) - 1))

static __always_inline u64 *follow_bucket(int bucket)
{
	return follow_buckets.lookup(&bucket);
}

static __always_inline void end_following(u64 sk, const struct followed *f, u8 outcome, u64 end_ns, u32 cwnd)
{
	struct cwnd_recovery r = {
		.reset_ts_ns = f->reset_ts_ns,
		.end_ts_ns = end_ns,
		.sock_cookie = READ(u64, sk, sock_common, skc_cookie),
		.skaddr = sk,
		.bytes_acked = READ(u64, sk, tcp_sock, bytes_acked) - f->bytes_acked,
		.acks = f->acks,
		.target = f->target,
		.cwnd_start = f->cwnd_start,
		.cwnd_end = cwnd,
		.ssthresh_end = READ(u32, sk, tcp_sock, snd_ssthresh),
		.srtt_us = READ(u32, sk, tcp_sock, srtt_us) >> 3,
		.netns_ino = f->netns_ino,
		.cpu = bpf_get_smp_processor_id(),
		.reason = REASON,
		.outcome = outcome,
	};
	u64 *n = follow_bucket(f->bucket);

	if (cwnd_recoveries.ringbuf_output(&r, sizeof(r), 0))
		count(lost_recoveries, 1);
	followed.delete(&sk);
	if (n)
		__sync_fetch_and_add(n, -1);
}

static __always_inline void start_following(const struct cwnd_reset *r)
{
	u64 sk = r->skaddr, *n;
	struct followed f = {
		.reset_ts_ns = r->ts_ns,
		.acked_ns = r->ts_ns,
		.sampled_ns = r->ts_ns,
		.bytes_acked = r->bytes_acked,
		.target = r->cwnd_before,
		.cwnd_start = r->cwnd_after,
		.cwnd = r->cwnd_after,
		.sock_cookie = r->sock_cookie,
		.netns_ino = r->netns_ino,
		.reason = REASON,
		.bucket = FOLLOW_BUCKET(READ(u32, sk, sock_common, skc_hash)),
	};

	if (followed.update(&sk, &f)) {
		count(lost_recoveries, 1);
		return;
	}
	n = follow_bucket(f.bucket);
	if (n)
		__sync_fetch_and_add(n, 1);
}

/* Follows a socket that was reset, from r->cwnd_after until it is back at r->cwnd_before. */
static __always_inline void follow(const struct cwnd_reset *r)
{
	u64 sk = r->skaddr;
	struct followed *old = followed.lookup(&sk);

	if (old) {
		/* The last ACK before this idle time may have regained the window, and no later ACK has shown that. */
		bool regained = r->cwnd_before >= old->target;
		u64 end_ns = regained ? old->acked_ns : r->ts_ns;

		end_following(sk, old, regained ? OUTCOME_REGAINED : OUTCOME_RESET_AGAIN, end_ns, r->cwnd_before);
	}
	/* A separate function, so that it reuses the space that end_following() took on the small stack. */
	start_following(r);
}

/* Runs on every ACK, in a program of type tp_btf. */
static __always_inline void on_ack(const void *sock)
{
	u64 sk = (u64)sock, now, *n = follow_bucket(FOLLOW_BUCKET(LOAD(u32, sock, sock_common, skc_hash)));
	struct followed *f;
	u32 cwnd, srtt_us;

	if (!n || !*n)
		return;
	f = followed.lookup(&sk);
	if (!f)
		return;
	now = bpf_ktime_get_ns();
	cwnd = READ(u32, sock, tcp_sock, snd_cwnd);
	f->cwnd = cwnd;
	if (READ_BITS(sock, inet_connection_sock, icsk_ca_state) >= CA_STATE_CWR) {
		end_following(sk, f, OUTCOME_LOSS, now, cwnd);
		return;
	}
	if (cwnd >= f->target) {
		end_following(sk, f, OUTCOME_REGAINED, f->acked_ns, cwnd);
		return;
	}
	f->acks++;
	f->acked_ns = now;
	srtt_us = READ(u32, sock, tcp_sock, srtt_us) >> 3;
	if (now - f->sampled_ns >= srtt_us * 1000ULL) {
		struct cwnd_sample s = {
			.ts_ns = now,
			.reset_ts_ns = f->reset_ts_ns,
			.skaddr = sk,
			.sock_cookie = READ(u64, sk, sock_common, skc_cookie),
			.cwnd = cwnd,
			.ssthresh = READ(u32, sock, tcp_sock, snd_ssthresh),
			.packets_out = READ(u32, sock, tcp_sock, packets_out),
			.srtt_us = srtt_us,
		};

		if (cwnd_samples.ringbuf_output(&s, sizeof(s), 0))
			count(lost_samples, 1);
		f->sampled_ns = now;
	}
}

static __always_inline void forget(const void *sock)
{
	u64 sk = (u64)sock;
	struct followed *f = followed.lookup(&sk);

	if (f)
		end_following(sk, f, OUTCOME_CLOSED, bpf_ktime_get_ns(), READ(u32, sock, tcp_sock, snd_cwnd));
}

/* These two programs serve the probes that need their tracepoints for nothing else. */
int on_tcp_probe_follow(struct bpf_raw_tracepoint_args *ctx)
{
	on_ack((const void *)ctx->args[0]);
	return 0;
}

int on_tcp_destroy_sock_follow(struct bpf_raw_tracepoint_args *ctx)
{
	forget((const void *)ctx->args[0]);
	return 0;
}

#endif
