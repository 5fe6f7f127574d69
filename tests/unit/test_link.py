# SPDX-License-Identifier: Apache-2.0
"""A simulated path delays and drops packets as its settings say, and the relay measures its own lateness."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.errors import UsageError
from cwndtrace.lab.link import Lane, Link
from cwndtrace.lab.relay import Lateness, wire_size

MS = 1_000_000


def test_without_a_rate_packets_are_only_delayed() -> None:
    lane = Lane(Link(rtt_ms=100), seed=1)
    assert lane.offer(0, 1500) == 50 * MS
    assert lane.offer(7, 64_000) == 50 * MS + 7


def test_with_a_rate_packets_leave_one_after_the_other() -> None:
    # 12 Mbit/s: 1,500 bytes take a millisecond.
    lane = Lane(Link(rtt_ms=20, rate=12e6), seed=1)
    assert [lane.offer(0, 1500) for _ in range(3)] == [11 * MS, 12 * MS, 13 * MS]
    # After idle time the line is free at once, and unused time isn't credited.
    assert lane.offer(100 * MS, 1500) == 111 * MS


def test_a_full_queue_drops_packets() -> None:
    lane = Lane(Link(rtt_ms=20, rate=12e6, queue_bytes=3000), seed=1)
    taken = [lane.offer(0, 1500) for _ in range(5)]
    assert taken == [11 * MS, 12 * MS, None, None, None]
    assert lane.dropped == 3
    # After 0.5 ms half a packet has left, so another one doesn't fit; after 1 ms it does.
    assert lane.offer(MS // 2, 1500) is None
    assert lane.offer(MS, 1500) == 13 * MS


def test_an_idle_line_accepts_a_packet_larger_than_the_queue() -> None:
    lane = Lane(Link(rtt_ms=20, rate=12e6, queue_bytes=3000), seed=1)
    assert lane.offer(0, 60_000) == 50 * MS
    assert lane.offer(0, 60_000) is None


def test_losses_are_repeatable_and_as_frequent_as_set() -> None:
    def pattern(seed: int) -> list[bool]:
        lane = Lane(Link(rtt_ms=20, loss=0.1), seed)
        return [lane.offer(0, 100) is None for _ in range(10_000)]

    assert pattern(3) == pattern(3)
    assert pattern(3) != pattern(4)
    # The bounds are five standard deviations from the mean.
    assert 850 < sum(pattern(3)) < 1150


@given(
    rate=st.none() | st.floats(8e3, 1e10),
    queue=st.integers(3000, 1_000_000),
    packets=st.lists(st.tuples(st.integers(0, 10**9), st.integers(40, 65_536)), max_size=60),
)
def test_no_packet_overtakes_another_or_arrives_early(
    rate: float | None, queue: int, packets: list[tuple[int, int]]
) -> None:
    link = Link(rtt_ms=10, rate=rate, queue_bytes=queue)
    lane = Lane(link, seed=1)
    now, last = 0, 0
    for gap, size in packets:
        now += gap
        due = lane.offer(now, size)
        if due is not None:
            wire_ns = size * 8e9 / rate if rate else 0
            assert due >= now + link.one_way_ns + int(wire_ns) - 1
            assert due >= last
            last = due


@pytest.mark.parametrize(
    "link",
    [
        Link(rtt_ms=0),
        Link(rtt_ms=-1),
        Link(rtt_ms=1e6),
        Link(rtt_ms=float("nan")),
        Link(rtt_ms=10, rate=0),
        Link(rtt_ms=10, rate=1e12),
        Link(rtt_ms=10, loss=1),
        Link(rtt_ms=10, loss=-0.1),
        Link(rtt_ms=10, queue_bytes=10),
    ],
)
def test_an_impossible_path_is_refused(link: Link) -> None:
    with pytest.raises(UsageError) as caught:
        link.check()
    assert caught.value.remedy


def test_super_segments_are_split_with_a_low_rate_or_losses() -> None:
    assert not Link(rtt_ms=10).segmented
    assert not Link(rtt_ms=10, rate=1e9).segmented
    assert Link(rtt_ms=10, rate=1e8).segmented
    assert Link(rtt_ms=10, loss=0.001).segmented


def tcp_packet(payload: int, gso_type: int, segment: int) -> bytes:
    """Return a virtio header, 20 bytes of IPv4, 32 bytes of TCP with options, and a payload."""
    # hdr_len is a hint that may include data, so it is 1,000 here.
    virtio = struct.pack("=BBHHHH", 1, gso_type, 1000, segment, 20, 16)
    return virtio + bytes(20) + bytes(12) + bytes([8 << 4]) + bytes(19) + bytes(payload)


def test_wire_size_counts_the_headers_of_each_segment() -> None:
    assert wire_size(tcp_packet(1448, 0, 0)) == 1500
    assert wire_size(tcp_packet(1448, 1, 1448)) == 1500
    assert wire_size(tcp_packet(1449, 1, 1448)) == 1449 + 2 * 52
    assert wire_size(tcp_packet(14_480, 1, 1448)) == 15_000


def test_lateness_has_quantiles_and_a_maximum() -> None:
    late = Lateness()
    assert late.quantile_ms(0.99) == 0
    for _ in range(99):
        late.add(120_000)
    late.add(7 * MS)
    assert late.quantile_ms(0.99) == pytest.approx(0.15)
    assert late.worst_ns == 7 * MS
    late.add(10**12)
    assert late.quantile_ms(1) > 100
