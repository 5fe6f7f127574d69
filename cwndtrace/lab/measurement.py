# SPDX-License-Identifier: Apache-2.0
"""The record of one measured burst, and a DataFrame of many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pandas as pd

from cwndtrace.format import plural
from cwndtrace.lab.wire import Sent

Setting = Literal["on", "off"]


@dataclass(frozen=True)
class Measurement:
    """One burst after one idle time. Windows are in segments; ``_ns`` times are of CLOCK_MONOTONIC."""

    round: int
    setting: Setting
    """the value of net.ipv4.tcp_slow_start_after_idle"""
    idle_s: float
    burst_bytes: int
    latency_ms: float
    """from the request (or, if the sender chooses the time, from its first byte) to the last byte, at the receiver"""
    start_ns: int
    """when the sender began to send"""
    end_ns: int
    """when the last byte had arrived"""
    acked_ns: int
    """when the sender knew that all data was acknowledged"""
    idle_ms: float
    """time since the sender's kernel last sent data"""
    cwnd_before: int
    cwnd_after: int
    """after the first write, before any ACK"""
    cwnd_end: int
    """at ``acked_ns``"""
    ssthresh_before: int
    ssthresh_after: int
    srtt_ms: float
    min_rtt_ms: float
    rto_ms: float
    mss: int
    snd_wnd: int
    """the receiver's window, bytes"""
    sndbuf: int
    """the send buffer as the kernel counts it, bytes"""
    taken_at_once: int
    """bytes that the first write put into the send buffer"""
    rwnd_limited_ms: float
    sndbuf_limited_ms: float
    retrans: int
    """retransmitted segments"""
    read_ms: float
    """the longest single read from the slow device during the idle time; 0 without a slow device"""
    sock_cookie: int
    netns_ino: int
    sport: int
    """the sender's port"""

    @property
    def reset(self) -> bool:
        """True if the window fell when the burst began."""
        return self.cwnd_after < self.cwnd_before


def measured(
    *,
    round: int,
    setting: Setting,
    idle_s: float,
    burst_bytes: int,
    latency_ms: float,
    end_ns: int,
    sent: Sent,
    netns_ino: int,
    read_ms: float = 0.0,
) -> Measurement:
    """Build a measurement from the figures of both ends."""
    before, after, end = sent.before, sent.after, sent.end
    return Measurement(
        round=round,
        setting=setting,
        idle_s=idle_s,
        burst_bytes=burst_bytes,
        latency_ms=latency_ms,
        start_ns=sent.start_ns,
        end_ns=end_ns,
        acked_ns=sent.end_ns,
        idle_ms=float(before.last_data_sent),
        cwnd_before=before.snd_cwnd,
        cwnd_after=after.snd_cwnd,
        cwnd_end=end.snd_cwnd,
        ssthresh_before=before.snd_ssthresh,
        ssthresh_after=after.snd_ssthresh,
        srtt_ms=before.rtt / 1e3,
        min_rtt_ms=before.min_rtt / 1e3,
        rto_ms=before.rto / 1e3,
        mss=before.snd_mss,
        snd_wnd=before.snd_wnd,
        sndbuf=sent.sndbuf,
        taken_at_once=sent.first_bytes,
        rwnd_limited_ms=(end.rwnd_limited - before.rwnd_limited) / 1e3,
        sndbuf_limited_ms=(end.sndbuf_limited - before.sndbuf_limited) / 1e3,
        retrans=end.total_retrans - before.total_retrans,
        read_ms=read_ms,
        sock_cookie=sent.cookie,
        netns_ino=netns_ino,
        sport=sent.port,
    )


def frame(rows: Iterable[Measurement]) -> pd.DataFrame:
    """Return a frame with one row per measurement, in their order, and the fields of ``Measurement`` as columns."""
    return pd.DataFrame([asdict(row) for row in rows], columns=[f.name for f in fields(Measurement)])


def limits(rows: Iterable[Measurement]) -> list[str]:
    """Return sentences on the buffers that delayed bursts beside the congestion window; empty if none did."""
    sentences: dict[tuple[str, int], str] = {}
    for row in rows:
        size = f"the burst of {plural(row.burst_bytes, 'byte')}"
        if row.taken_at_once < row.burst_bytes:
            sentences["sndbuf", row.burst_bytes] = (
                f"{size} is bigger than the send buffer, which took {plural(row.taken_at_once, 'byte')} at once and"
                f" delayed it for {row.sndbuf_limited_ms:.0f} ms: raise net.ipv4.tcp_wmem, or the program's SO_SNDBUF"
            )
        if row.rwnd_limited_ms > max(1.0, 0.05 * row.latency_ms):
            sentences["rwnd", row.burst_bytes] = (
                f"{size} was delayed by the receiver's window of {plural(row.snd_wnd, 'byte')} for"
                f" {row.rwnd_limited_ms:.0f} ms: raise net.ipv4.tcp_rmem at the receiver"
            )
    return list(sentences.values())
