/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Measures for how long the data of a followed socket waits for the congestion window, and what of it the resets cost.
 *
 * Data waits for the window if some is unsent while the window is full. How much longer it waits than it would have
 * with the window from before the chain of resets follows from how much is queued: if that window, as it grows round
 * trip by round trip, would have let all of it go by now, then all of the waiting is the resets' cost.
 *
 * No burst is later than its latest byte, which matters where the sender writes as time goes by: then a late byte makes
 * the next ones late, but the delays don't add up.
 */
#ifndef CWNDTRACE_WAITING_H
#define CWNDTRACE_WAITING_H

#include "followed.h"

/* From include/linux/net.h. A writer sets it that waits for room in the send buffer. */
#define SOCK_NOSPACE 2
/* With more round trips than that, a doubling window exceeds all that can be queued. */
#define MOST_ROUNDS 30

static __always_inline struct mark *mark_at(struct followed *f, u32 i)
{
	return &f->mark[(f->first + i) & (MARKS - 1)];
}

/*
 * Notes when data from seq on was written. If there is no room, it counts as written with the data before it. So does
 * the data of a writer that waited for room in the send buffer, which would have written it earlier.
 */
static __always_inline void mark_written(struct followed *f, u32 seq, u64 ns)
{
	struct mark *m = mark_at(f, f->marks);

	if (f->marks >= MARKS || (f->marks && f->blocked))
		return;
	m->ns = ns;
	m->seq = seq;
	f->marks++;
}

/* Returns for how long the oldest unsent byte has been written, and drops the marks of the data before it. */
static __always_inline u64 oldest_unsent_us(struct followed *f, u32 snd_nxt, u64 now)
{
	u64 ns;
	int i;

	for (i = 0; i < MARKS; i++) {
		if (f->marks <= 1 || (s32)(mark_at(f, 1)->seq - snd_nxt) > 0)
			break;
		f->first = (f->first + 1) & (MARKS - 1);
		f->marks--;
	}
	ns = mark_at(f, 0)->ns;
	return f->marks && now > ns ? (now - ns) / 1000 : 0;
}

/* Returns the most bytes that go out in a number of round trips with the window from before the chain of resets. */
static __always_inline u64 whole_window_bytes(const struct followed *f, u32 rounds, u32 mss)
{
	/* In slow start, a full window doubles each round trip. In congestion avoidance it hardly grows. */
	return f->r.chain_window * (f->slow_start ? (1ULL << rounds) - 1 : rounds) * mss;
}

/*
 * Counts us, during which unsent data waited: for the congestion window where cwnd_limited, else for the peer's.
 *
 * While the window from before the chain would have been full too, the waiting isn't counted, but it may come due: what
 * was sent too late then is what the peer's window holds back later, after all could have been sent.
 */
static __always_inline void add_held(struct followed *f, u64 since, u64 us, u32 mss, u32 snd_wnd, bool cwnd_limited)
{
	u64 rtt = f->r.srtt_us * 1000ULL + 1, rounds = (since - f->queued_ns + rtt / 2) / rtt + 1;
	u32 queued = f->written - f->queued_una;

	if (rounds > MOST_ROUNDS)
		rounds = MOST_ROUNDS;
	if (queued > whole_window_bytes(f, rounds, mss) || queued > rounds * snd_wnd) {
		if (cwnd_limited)
			f->owed_us += us;
		return;
	}
	if (!cwnd_limited) {
		if (us > f->owed_us)
			us = f->owed_us;
		f->owed_us -= us;
	}
	f->r.held_us += us;
	f->wait_held_us += us;
	f->burst_waited_us += us;
}

/*
 * Ends a time in which data was unsent. If the writer waited for room in the send buffer, it had more data than could
 * be seen, and only now is it known how much went out, and in how many round trips that would have been.
 *
 * In congestion avoidance, more than the window from before the chain holds goes out in more than one round trip, and
 * how far that window would have grown meanwhile isn't known. Then the cost is at least what it had more to give.
 */
static __always_inline void end_wait(struct followed *f, u32 mss)
{
	u32 sent = f->written - f->queued_una, rounds, n;
	u64 late = 0;

	if (!f->queued_ns)
		return;
	if (f->blocked && f->wait_queue && f->wait_snd_wnd) {
		/* Unrolled in each place where this is inlined, the loop would double the programs. */
#pragma clang loop unroll(disable)
		for (rounds = 1; rounds < MOST_ROUNDS; rounds++) {
			if (whole_window_bytes(f, rounds, mss) >= sent)
				break;
		}
		n = (sent + f->wait_queue - 1) / f->wait_queue;
		if (n > rounds)
			rounds = n;
		n = (sent + f->wait_snd_wnd - 1) / f->wait_snd_wnd;
		if (n > rounds)
			rounds = n;
		if (f->wait_us > (rounds - 1) * (u64)f->r.srtt_us)
			late = f->wait_us - (rounds - 1) * (u64)f->r.srtt_us;
		if (late > f->wait_cwnd_us)
			late = f->wait_cwnd_us;
		/* What the writer had was late too. */
		f->burst_latest_us = ~0ULL;
	}
	if (!f->slow_start && late < f->wait_short_us)
		late = f->wait_short_us;
	if (late > f->wait_held_us) {
		f->r.short_us += late - f->wait_held_us;
		f->burst_waited_us += late - f->wait_held_us;
	}
	f->queued_ns = 0;
	f->owed_us = f->wait_us = f->wait_cwnd_us = f->wait_short_us = f->wait_held_us = 0;
	f->wait_queue = f->wait_snd_wnd = 0;
	f->blocked = false;
}

/*
 * Counts the time since the last ACK or transmit as what unsent data waited for. This runs at each ACK, before the ACK
 * is processed. tp is what bpf_skc_to_tcp_sock() returns.
 */
static __always_inline void add_waiting(struct followed *f, const void *tp, u64 now, u32 now_jiffies)
{
	u32 una = LOAD(u32, tp, tcp_sock, snd_una), nxt = LOAD(u32, tp, tcp_sock, snd_nxt);
	u32 written = LOAD(u32, tp, tcp_sock, write_seq), sent = LOAD(u32, tp, tcp_sock, lsndtime);
	u32 cwnd = LOAD(u32, tp, tcp_sock, snd_cwnd), snd_wnd = LOAD(u32, tp, tcp_sock, snd_wnd);
	u32 mss = LOAD(u32, tp, tcp_sock, mss_cache);
	/* As tcp_packets_in_flight(). */
	u32 in_flight = LOAD(u32, tp, tcp_sock, packets_out) + LOAD(u32, tp, tcp_sock, retrans_out) -
			LOAD(u32, tp, tcp_sock, sacked_out) - LOAD(u32, tp, tcp_sock, lost_out);
	bool peer_has_room = (s32)(una + snd_wnd - nxt) >= (s32)mss;
	u64 since = f->acked_ns, us, late, socket;
	bool cwnd_limited;

	if ((s32)(written - nxt) <= 0) {
		f->marks = 0;
		f->written = written;
		end_wait(f, mss);
		return;
	}
	if ((s32)(sent - f->acked_jiffies) > 0) {
		u64 sent_ns = now - jiffies_to_us(now_jiffies - sent) * 1000;

		if (sent_ns > since)
			since = sent_ns;
	}
	us = now > since ? (now - since) / 1000 : 0;
	/* Where no program sees writes, this data was written at some time since the last ACK. */
	if (written != f->written && !f->marks)
		mark_written(f, f->written, since);
	f->written = written;
	if (!f->queued_ns) {
		f->queued_ns = since;
		f->queued_una = una;
	}
	late = oldest_unsent_us(f, nxt, now);
	socket = LOAD(u64, tp, sock, sk_socket);
	if (socket && LOAD(u64, socket, socket, flags) & (1 << SOCK_NOSPACE))
		f->blocked = true;
	/*
	 * TCP segmentation offload may leave the window up to a third empty, because the kernel then waits until it can
	 * send a larger packet (tcp_tso_should_defer()). It sets is_cwnd_limited where the window is why.
	 */
	cwnd_limited = in_flight >= cwnd ||
		       (LOAD_BITS(tp, tcp_sock, is_cwnd_limited) && in_flight * 3 >= cwnd * 2 && peer_has_room);
	if (f->r.outcome == OUTCOME_LOSS) {
		f->r.after_loss_us += us;
		return;
	}
	f->wait_us += us;
	if (written - una > f->wait_queue)
		f->wait_queue = written - una;
	if (snd_wnd > f->wait_snd_wnd)
		f->wait_snd_wnd = snd_wnd;
	if (cwnd_limited) {
		f->wait_cwnd_us += us;
		if (cwnd < f->r.chain_window)
			f->wait_short_us += us * (f->r.chain_window - cwnd) / f->r.chain_window;
		if (written - una > f->r.waiting_bytes)
			f->r.waiting_bytes = written - una;
	}
	if (cwnd_limited || (!peer_has_room && f->owed_us)) {
		if (late > f->burst_latest_us)
			f->burst_latest_us = late;
		if (!f->blocked)
			add_held(f, since, us, mss, snd_wnd, cwnd_limited);
	} else if (peer_has_room) {
		f->r.other_us += us;
	}
}

/* Adds the cost of the burst that has just ended. */
static __always_inline void end_burst(struct followed *f)
{
	u64 late = f->burst_latest_us < f->burst_waited_us ? f->burst_latest_us : f->burst_waited_us;

	f->r.cost_us += late;
	if (!f->r.bursts)
		f->r.first_cost_us = late;
	f->burst_waited_us = f->burst_latest_us = 0;
}

#endif
