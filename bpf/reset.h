/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Checks a reset that a probe has found, passes it to user space and follows its socket. Each probe has a source of its
 * own, cwnd_reset_*.bpf.c, with the programs for every reason that it can trace.
 */
#ifndef CWNDTRACE_RESET_H
#define CWNDTRACE_RESET_H

#include "filter.h"
#include "follow.h"

/* This has room for one reset of each of 10,000 connections at once. cwndtrace/capture/live.py sets RESET_PAGES. */
BPF_RINGBUF_OUTPUT(cwnd_resets, RESET_PAGES);

/* The reason is r's own. As an argument it is a constant in most places, which makes the program smaller. */
static __always_inline void emit(struct cwnd_reset *r, u8 reason)
{
	if (r->cwnd_after >= r->cwnd_before) {
		if (reason == REASON_IDLE)
			count(unchanged, 1);
		return;
	}
#ifdef FILTER_MIN_IDLE_US
	if (r->idle_us < FILTER_MIN_IDLE_US)
		return;
#endif
	if (cwnd_resets.ringbuf_output(r, sizeof(*r), 0))
		count(lost, 1);
	/* After a loss, the window isn't expected to return to its former size. */
	if (reason == REASON_IDLE || reason == REASON_APP_LIMITED)
		follow(r);
	else if (reason == REASON_TLP_LOSS)
		lost_data(r);
}

/*
 * Fills in the record of a reset whose window has just fallen, so that the socket has the values from after it. Returns
 * false if the socket isn't one to trace.
 */
static __always_inline bool fill_fallen(struct cwnd_reset *r, const void *sk, u8 reason, u8 probe, u32 cwnd_before,
					u32 ssthresh_before, u32 idle)
{
	if (!wanted(sk))
		return false;
	fill_from_sock(r, sk);
	r->idle_us = jiffies_to_us(idle);
	r->reason = reason;
	r->probe = probe;
	r->cwnd_before = cwnd_before;
	r->ssthresh_before = ssthresh_before;
	if (reason == REASON_RTO_LOSS) {
		r->ca_state = TCP_CA_LOSS;
		/* lsndtime isn't set while only a SYN has been sent. */
		if (!READ(u32, sk, tcp_sock, data_segs_out))
			r->idle_us = 0;
	}
	return true;
}

static __always_inline void emit_fallen(const void *sk, u8 reason, u8 probe, u32 cwnd_before, u32 ssthresh_before,
					u32 idle)
{
	struct cwnd_reset r = {};

	if (fill_fallen(&r, sk, reason, probe, cwnd_before, ssthresh_before, idle))
		emit(&r, reason);
}

#endif
