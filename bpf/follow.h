/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Follows a socket after a reset, ACK by ACK, until it has the window from before the reset again.
 *
 * A reset of a socket that hasn't regained its window belongs to the same chain as the one before, and then the window
 * from before the chain is the one to regain. tcp_probe runs before its ACK is processed, so it shows the window that
 * the previous ACK left.
 */
#ifndef CWNDTRACE_FOLLOW_H
#define CWNDTRACE_FOLLOW_H

#include "followed.h"
#include "waiting.h"

BPF_RINGBUF_OUTPUT(cwnd_recoveries, RESET_PAGES / 4);
BPF_RINGBUF_OUTPUT(cwnd_samples, RESET_PAGES / 2);

/* From include/net/sock.h. */
#define SEND_SHUTDOWN 2

/* Returns true if the peer has acknowledged a FIN, which the kernel counts as a byte. */
static __always_inline bool fin_acked(const void *sk, const void *tp)
{
	return LOAD_BITS(sk, sock, sk_shutdown) & SEND_SHUTDOWN &&
	       LOAD(u32, tp, tcp_sock, snd_una) == LOAD(u32, tp, tcp_sock, write_seq);
}

/*
 * Brings the record of a followed socket up to date. sk is the program's argument, of which loads are the cheapest, and
 * tp is what bpf_skc_to_tcp_sock() returns for it.
 */
static __always_inline void update_record(struct followed *f, const void *sk, const void *tp, u32 now_jiffies)
{
	struct chrono c = load_chrono(tp);

	f->r.sock_cookie = LOAD(u64, sk, sock_common, skc_cookie);
	f->r.bytes_acked = LOAD(u64, tp, tcp_sock, bytes_acked) - fin_acked(sk, tp) - f->bytes_acked;
	/* Once the window is back, these belong to the ACK that brought it back. */
	if (!f->regained) {
		f->r.cwnd_end = LOAD(u32, tp, tcp_sock, snd_cwnd);
		f->r.ssthresh_end = LOAD(u32, tp, tcp_sock, snd_ssthresh);
	}
	f->r.srtt_us = LOAD(u32, tp, tcp_sock, srtt_us) >> 3;
	f->r.busy_us = jiffies_to_us(chrono(&c, CHRONO_BUSY, now_jiffies) - f->busy);
	f->r.rwnd_limited_us = jiffies_to_us(chrono(&c, CHRONO_RWND_LIMITED, now_jiffies) - f->rwnd_limited);
	f->r.sndbuf_limited_us = jiffies_to_us(chrono(&c, CHRONO_SNDBUF_LIMITED, now_jiffies) - f->sndbuf_limited);
	if (LOAD(u32, tp, tcp_sock, packets_out)) {
		f->r.bytes_received = LOAD(u64, tp, tcp_sock, bytes_received);
		f->r.data_segs_in = LOAD(u32, tp, tcp_sock, data_segs_in);
	}
}

static __always_inline void end_following(u64 sk, struct followed *f, u8 outcome, u64 end_ns)
{
	u64 *n = follow_bucket(f->bucket);

	end_wait(f, READ(u32, sk, tcp_sock, mss_cache));
	end_burst(f);
	f->r.outcome = outcome;
	f->r.end_ts_ns = end_ns;
	f->r.cpu = bpf_get_smp_processor_id();
	if (cwnd_recoveries.ringbuf_output(&f->r, sizeof(f->r), 0))
		count(lost_recoveries, 1);
	followed.delete(&sk);
	if (n)
		__sync_fetch_and_add(n, -1);
}

/* Returns a new entry, all zeros, of a socket that isn't followed; NULL where there is no room. */
static __always_inline struct followed *new_followed(u64 sk)
{
	int zero = 0;
	struct followed *blank = blank_followed.lookup(&zero);

	if (!blank || followed.update(&sk, blank))
		return 0;
	return followed.lookup(&sk);
}

static __always_inline void start_following(const struct cwnd_reset *r, u32 chain_window, u32 chain_resets,
					    bool slow_start)
{
	u64 sk = r->skaddr, *n;
	u32 now = jiffies32();
	struct chrono c = read_chrono(sk);
	struct followed *f = new_followed(sk);

	if (!f) {
		count(lost_recoveries, 1);
		return;
	}
	f->r.reset_ts_ns = r->ts_ns;
	f->r.sock_cookie = r->sock_cookie;
	f->r.skaddr = sk;
	f->r.bytes_received = r->bytes_received;
	f->r.data_segs_in = r->data_segs_in;
	f->r.target = r->cwnd_before;
	f->r.chain_window = chain_window;
	f->r.chain_resets = chain_resets;
	f->r.cwnd_start = r->cwnd_after;
	f->r.cwnd_end = r->cwnd_after;
	f->r.srtt_us = r->srtt_us;
	f->r.netns_ino = r->netns_ino;
	f->r.ssthresh_end = r->ssthresh_after;
	f->r.reason = r->reason;
	f->r.outcome = OUTCOME_CAPTURE_END;
	f->slow_start = slow_start;
	f->acked_ns = r->ts_ns;
	f->sampled_ns = r->ts_ns;
	f->bytes_acked = r->bytes_acked;
	f->busy = chrono(&c, CHRONO_BUSY, now);
	f->rwnd_limited = chrono(&c, CHRONO_RWND_LIMITED, now);
	f->sndbuf_limited = chrono(&c, CHRONO_SNDBUF_LIMITED, now);
	f->acked_jiffies = now;
	f->written = READ(u32, sk, tcp_sock, write_seq);
	mark_written(f, f->written, r->ts_ns);
	f->bucket = FOLLOW_BUCKET(READ(u32, sk, sock_common, skc_hash));
	n = follow_bucket(f->bucket);
	if (n)
		__sync_fetch_and_add(n, 1);
}

/* Follows a socket that was reset, from r->cwnd_after until it has the window from before its chain of resets. */
static __always_inline void follow(const struct cwnd_reset *r)
{
	u64 sk = r->skaddr;
	struct followed *old = followed.lookup(&sk);
	u32 chain_window = r->cwnd_before, chain_resets = 1;
	bool slow_start = r->cwnd_before < r->ssthresh_before;

	if (old) {
		/* The last ACK before this idle time may have regained the window, and no later ACK has shown that. */
		u8 outcome = old->r.outcome == OUTCOME_LOSS ? OUTCOME_LOSS :
			     old->regained || r->cwnd_before >= old->r.chain_window ? OUTCOME_REGAINED :
			     OUTCOME_RESET_AGAIN;
		u64 end_ns = outcome != OUTCOME_REGAINED ? r->ts_ns :
			     old->regained ? old->r.end_ts_ns : old->acked_ns;

		if (outcome == OUTCOME_RESET_AGAIN) {
			chain_window = old->r.chain_window;
			chain_resets = old->r.chain_resets + 1;
			slow_start = old->slow_start;
		}
		if (!old->regained) {
			old->r.cwnd_end = r->cwnd_before;
			old->r.ssthresh_end = r->ssthresh_after;
		}
		old->r.bytes_acked = r->bytes_acked - old->bytes_acked;
		end_following(sk, old, outcome, end_ns);
	}
	start_following(r, chain_window, chain_resets, slow_start);
}

/* Notes a loss that no later ACK shows: the socket isn't in CWR any more. */
static __always_inline void lost_data(const struct cwnd_reset *r)
{
	u64 sk = r->skaddr;
	struct followed *f = followed.lookup(&sk);

	if (f)
		f->r.outcome = OUTCOME_LOSS;
}

/* Hands over the window of a followed socket, at most once per round-trip time. */
static __always_inline void sample(struct followed *f, const void *tp, u64 now)
{
	struct cwnd_sample s = {
		.ts_ns = now,
		.reset_ts_ns = f->r.reset_ts_ns,
		.skaddr = f->r.skaddr,
		.sock_cookie = f->r.sock_cookie,
		.cwnd = f->r.cwnd_end,
		.ssthresh = f->r.ssthresh_end,
		.packets_out = LOAD(u32, tp, tcp_sock, packets_out),
		.srtt_us = f->r.srtt_us,
	};

	if (now - f->sampled_ns < f->r.srtt_us * 1000ULL)
		return;
	if (cwnd_samples.ringbuf_output(&s, sizeof(s), 0))
		count(lost_samples, 1);
	f->sampled_ns = now;
}

/* Notes that there is data to send. */
static __always_inline void begin_burst(struct followed *f)
{
	if (f->r.outcome == OUTCOME_CAPTURE_END_IDLE)
		f->r.outcome = OUTCOME_CAPTURE_END;
}

/* Runs on every ACK, in a program of type tp_btf. skb is the ACK. */
static __always_inline void on_ack(const void *sock, u64 skb)
{
	u64 sk = (u64)sock, now;
	struct followed *f = find_followed(sk, LOAD(u32, sock, sock_common, skc_hash));
	const void *tp;
	u32 now_jiffies, nxt;
	bool all_sent;

	if (!f)
		return;
	tp = bpf_skc_to_tcp_sock((void *)sock);
	if (!tp)
		return;
	now = bpf_ktime_get_ns();
	now_jiffies = jiffies32();
	add_waiting(f, tp, now, now_jiffies);
	update_record(f, sock, tp, now_jiffies);
	if (LOAD(u32, tp, tcp_sock, packets_out))
		begin_burst(f);
	if (LOAD_BITS(tp, inet_connection_sock, icsk_ca_state) >= CA_STATE_CWR)
		f->r.outcome = OUTCOME_LOSS;
	if (!f->regained && f->r.outcome != OUTCOME_LOSS && f->r.cwnd_end >= f->r.chain_window) {
		f->regained = true;
		f->r.end_ts_ns = f->acked_ns;
	}
	nxt = LOAD(u32, tp, tcp_sock, snd_nxt);
	all_sent = LOAD(u32, tp, tcp_sock, write_seq) == nxt;
	/* What is queued when the window comes back still waits for it. */
	if (f->regained && (all_sent || f->r.outcome == OUTCOME_LOSS)) {
		end_following(sk, f, OUTCOME_REGAINED, f->r.end_ts_ns);
		return;
	}
	f->r.acks++;
	f->acked_ns = now;
	f->acked_jiffies = now_jiffies;
	/* True if this ACK leaves nothing in flight. */
	if (all_sent && LOAD(u32, tp, tcp_sock, packets_out) &&
	    LOAD(u32, AT(skb, sk_buff, cb), tcp_skb_cb, ack_seq) == nxt) {
		end_burst(f);
		f->r.bursts++;
		if (f->r.outcome == OUTCOME_LOSS) {
			end_following(sk, f, OUTCOME_LOSS, now);
			return;
		}
		f->r.outcome = OUTCOME_CAPTURE_END_IDLE;
	}
	if (!f->regained)
		sample(f, tp, now);
}

/* Runs before a process writes data, in a program of type tp_btf. */
static __always_inline void on_write(const void *sk)
{
	struct followed *f = find_followed((u64)sk, LOAD(u32, sk, sock_common, skc_hash));
	const void *tp;
	u32 written;

	if (!f)
		return;
	tp = bpf_skc_to_tcp_sock((void *)sk);
	if (!tp)
		return;
	written = LOAD(u32, tp, tcp_sock, write_seq);
	if (written == LOAD(u32, tp, tcp_sock, snd_nxt))
		f->marks = 0;
	mark_written(f, written, bpf_ktime_get_ns());
	f->written = written;
	begin_burst(f);
}

/* Runs after a process has written data: what has been added since the last look was written now. */
static __always_inline void on_wrote(const void *sk)
{
	struct followed *f = find_followed((u64)sk, LOAD(u32, sk, sock_common, skc_hash));
	u32 written;

	if (!f)
		return;
	written = READ(u32, sk, tcp_sock, write_seq);
	if (written == f->written)
		return;
	mark_written(f, f->written, bpf_ktime_get_ns());
	f->written = written;
	begin_burst(f);
}

/* Runs when a socket ends, in a program of type tp_btf. */
static __always_inline void forget(const void *sock)
{
	u64 sk = (u64)sock;
	struct followed *f = followed.lookup(&sk);
	const void *tp;

	if (!f)
		return;
	tp = bpf_skc_to_tcp_sock((void *)sock);
	/* If an RST closed the connection, tcp_disconnect() has cleared the counters. The record has them as of the last ACK. */
	if (tp && LOAD(u32, tp, tcp_sock, data_segs_out))
		update_record(f, sock, tp, jiffies32());
	end_following(sk, f, f->r.outcome == OUTCOME_LOSS ? OUTCOME_LOSS : OUTCOME_CLOSED, bpf_ktime_get_ns());
}

#endif
