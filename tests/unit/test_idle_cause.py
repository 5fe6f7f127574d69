# SPDX-License-Identifier: Apache-2.0
"""The cause of idle time is right for idle times whose cause is known; overlaps equal counting each moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cwndtrace.analysis import block_io, connections, idle_cause, idle_disk, recovery
from cwndtrace.present import idle
from tests.unit import frames

# ---- overlap of intervals --------------------------------------------------------------------------

SPAN = st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda t: (t[0], t[0] + t[1]))
SPANS = st.lists(SPAN, max_size=12)


def columns(rows: list[tuple[int, int]]) -> list[np.ndarray]:
    return [np.array([row[i] for row in rows], dtype=np.int64) for i in range(2)]


@given(SPANS.map(sorted), SPANS, st.integers(0, 3))
@example([(0, 10), (2, 3), (8, 12), (12, 14)], [(1, 12), (3, 13), (12, 12)], 0)
@example([(0, 2), (5, 6), (10, 11)], [(0, 12), (3, 4)], 3)
def test_covered_equals_counting_each_moment(
    intervals: list[tuple[int, int]], spans: list[tuple[int, int]], bridge: int
) -> None:
    result = idle_disk.covered(*columns(intervals), *columns(spans), bridge=bridge)
    ends = [max(e for _, e in intervals[: at + 1]) for at in range(len(intervals))]
    gaps = [(e, b) for e, (b, _) in zip(ends, intervals[1:], strict=False) if e < b <= e + bridge]
    busy = [*intervals, *gaps]
    truth = [sum(any(b <= t < e for b, e in busy) for t in range(since, until)) for since, until in spans]
    assert result.tolist() == truth


# ---- causes ----------------------------------------------------------------------------------------


def causes(resets: list[Any], blocks: list[Any], recovered: Sequence[Any] = (), **options: Any) -> list[dict[Any, Any]]:
    none = frames.snapshots().to_pandas()
    r, _ = connections.identify(frames.pandas(frames.table("cwnd_reset", *resets)), none)
    w = recovery.identify(frames.pandas(frames.table("cwnd_recovery", *recovered)), r)
    b = block_io.with_latency(frames.pandas(frames.table("block_io", *blocks)), {"7:0": "loop0"})
    b = b.sort_values("start_ns", ignore_index=True)
    for name in options.pop("without", ()):
        r, w = r.drop(columns=name), w.drop(columns=name)
    r = r.set_axis(r.index + 7)  # as rows that were chosen from others
    out = idle_cause.with_cause(r, b, w, **options)
    assert list(out.columns) == [*r.columns, *idle_cause.COLUMNS]
    assert len(out) == len(resets)
    rows: list[dict[Any, Any]] = out.to_dict("records")
    for row in rows:
        parts = row["peer_us"] + row["unclear_us"] + row["disk_us"] + row["application_us"]
        assert parts == (row["idle_us"] if row["cause"] else 0)
        assert row["cause"] in ("", *idle_cause.CAUSES)
    return rows


def idle_reset(at_s: float = 10.0, seconds: float = 2.0, since_data_s: float = 9.0, **fields: Any) -> Any:
    """Return a reset after ``seconds`` of idle time; the last data arrived ``since_data_s`` before it."""
    return frames.reset(at_s, idle_us=int(seconds * 1e6), last_rcv_us=int(since_data_s * 1e6), **fields)


def read(at_s: float, seconds: float, **fields: Any) -> Any:
    return frames.block(at_s, seconds * 1e6, **({"tgid": 4242, "tid": 4243} | fields))


def write(at_s: float, seconds: float, **fields: Any) -> Any:
    return read(at_s, seconds, **({"op": "write"} | fields))


def conversation(*idle_times: tuple[float, float, int, int], **fields: Any) -> tuple[list[Any], list[Any]]:
    """Return the resets and recoveries of a connection that sends after each of these idle times.

    Each is its length and how long before its end data last came in, both in s, and how many bytes and segments came in
    meanwhile. Before the first, the connection has received a million bytes in a thousand segments.
    """
    at, received, segments = 5.0, 1_000_000, 1000
    resets, recoveries = [], []
    for seconds, since_data_s, size, number in idle_times:
        recoveries.append(frames.recovered(at - 1, 0.5, bytes_received=received, data_segs_in=segments))
        resets.append(idle_reset(at - 1, 0.5, **{"bytes_received": received, "data_segs_in": segments} | fields))
        at, received, segments = at + seconds, received + size, segments + number
        resets.append(idle_reset(at, seconds, since_data_s, bytes_received=received, data_segs_in=segments, **fields))
        at += 2
    return resets, recoveries


def heard(*idle_times: tuple[float, float, int, int], blocks: Sequence[Any] = (), **options: Any) -> list[str]:
    """Return the causes of the idle times of a ``conversation``."""
    resets, recoveries = conversation(*idle_times)
    return [row["cause"] for row in causes(resets, list(blocks), recoveries, **options)[1::2]]


def test_the_request_that_a_send_waited_for_is_the_last_that_ended_before_it() -> None:
    own = [read(8 + at, 0.4) for at in (0, 0.5, 1.0, 1.5)]
    other = [read(7, 0.2), read(9.95, 0.01, tgid=1, tid=1), read(10.3, 0.1)]
    process = [read(8.1, 1.85, tid=9), read(8.1, 0.2, tid=9)]
    rows = sorted([*own, *other], key=lambda block: int(block["start_ns"][0]))
    (row,) = causes([idle_reset()], rows)
    assert (row["cause"], row["disk_of"]) == ("disk", "thread")
    assert rows[row["disk_last"]] is own[-1]
    (row,) = causes([idle_reset()], process)
    # Causes sorts the requests by their start, and keeps the order of those that start at once.
    assert (row["cause"], row["disk_of"], row["disk_last"]) == ("probably disk", "process", 0)
    (row,) = causes([idle_reset()], [read(8, 0.01)])
    assert (row["cause"], row["disk_last"]) == ("application", -1)


# ---- what came in: seconds idle, seconds since data, bytes, segments ----


@pytest.mark.parametrize(
    ("came", "cause"),
    [
        pytest.param((2.0, 0.004, 300, 1), "peer", id="a request, answered at once"),
        pytest.param((2.0, 0.004, 20, 1), "peer", id="a small request, answered at once"),
        pytest.param((2.0, 0.004, 100_000, 70), "peer", id="a request of many full segments"),
        pytest.param((2.0, 0.004, 900, 3), "peer", id="a request in three writes"),
        pytest.param((2.0, 1.5, 300, 1), "application", id="a request, answered slowly"),
        pytest.param((2.0, 1.95, 20, 1), "application", id="an answer to what was sent last, then the sender's timer"),
        pytest.param((2.0, 2.1, 0, 0), "application", id="a silent peer and the sender's timer"),
        pytest.param((3.0, 0.7, 30, 3), "peer or application", id="chatter and the sender's timer"),
        pytest.param((3.0, 0.0, 30, 3), "peer or application", id="chatter, by chance just before the timer"),
        pytest.param((2.0, 0.7, 10, 1), "peer or application", id="one message of chatter, and the timer"),
        pytest.param((3.0, 0.3, 530, 4), "peer or application", id="chatter, a request and a slow answer"),
        pytest.param((3.0, 0.004, 530, 4), "peer", id="chatter, and a request, answered at once"),
        pytest.param((3.0, 0.004, 80, 4), "peer or application", id="chatter, and a request that is as small"),
    ],
)
def test_the_cause_follows_from_what_came_in(came: tuple[float, float, int, int], cause: str) -> None:
    assert heard(came) == [cause]


def test_a_timer_that_meets_chatter_now_and_then_is_not_taken_for_requests() -> None:
    phases = [0.7, 0.01, 0.4, 0.9, 0.2]
    assert set(heard(*((1.2, phase, 10, 1) for phase in phases if phase < 0.6))) == {"peer or application"}
    prompt, other, *_ = heard((1.2, 0.01, 10, 1), (1.2, 0.4, 10, 1))
    assert prompt == other == "peer or application"


def test_a_connection_that_answers_most_requests_at_once_is_asked_also_where_it_is_slower() -> None:
    rows = [(2.0, 0.01, 300, 1), (2.0, 0.01, 300, 1), (2.0, 0.5, 300, 1), (2.0, 0.02, 300, 1)]
    assert heard(*rows) == ["peer"] * 4


def test_far_less_than_its_usual_requests_is_no_clear_request() -> None:
    rows = [(2.0, 0.01, 400, 1), (2.0, 0.01, 500, 1), (2.0, 0.01, 10, 1), (2.0, 0.02, 450, 1)]
    assert heard(*rows) == ["peer", "peer", "peer or application", "peer"]


def test_counters_from_long_before_the_idle_time_only_limit_what_came_in() -> None:
    """After the window was back, there were small requests in turn, and then the idle time that one ended."""
    first = frames.recovered(1, 0.5, bytes_received=1000, data_segs_in=10)
    last = idle_reset(10, 2, 0.001, bytes_received=1500, data_segs_in=20)
    (row,) = causes([last], [], [first])
    assert row["cause"] == "peer"


def test_the_first_reset_of_a_connection_that_received_much_is_clear_only_for_a_prompt_answer() -> None:
    much = {"bytes_received": 10**9, "data_segs_in": 10**7}
    (prompt,) = causes([idle_reset(10, 2, 0.004, **much)], [])
    (late,) = causes([idle_reset(10, 2, 0.04, **much)], [])
    (young,) = causes([idle_reset(10, 2, 0.04, bytes_received=200, data_segs_in=2)], [])
    assert [row["cause"] for row in (prompt, late, young)] == ["peer", "peer or application", "peer"]


def test_captures_without_the_counters_tell_what_was_prompt_and_what_is_the_senders() -> None:
    without = ("bytes_received", "data_segs_in")
    rows = [idle_reset(10, 2, since, sock_cookie=n) for n, since in enumerate((0.004, 0.2, 1.5, 2.5), start=1)]
    expected = ["peer", "peer or application", "application", "application"]
    assert [row["cause"] for row in causes(rows, [], without=[*without])] == expected


def test_missing_counters_in_some_rows_are_as_in_captures_without_them() -> None:
    none = frames.snapshots().to_pandas()
    r, _ = connections.identify(
        frames.pandas(frames.table("cwnd_reset", idle_reset(10, 2, 0.2), idle_reset(20, 2, 0.004))), none
    )
    w = recovery.identify(frames.pandas(frames.table("cwnd_recovery", frames.recovered(10))), r)
    b = block_io.with_latency(frames.pandas(frames.table("block_io")), {})
    r["bytes_received"], r["data_segs_in"] = pd.array([None, 300], "UInt64"), pd.array([None, 1], "UInt64")
    w["bytes_received"] = pd.array([None], "UInt64")
    assert list(idle_cause.with_cause(r, b, w)["cause"]) == ["peer or application"] * 2


def test_counters_that_fall_change_no_other_row() -> None:
    resets, recoveries = conversation((2.0, 0.004, -500_000, -900), (2.0, 0.004, 300, 1))
    assert [row["cause"] for row in causes(resets, [], recoveries)[1::2]] == ["peer or application", "peer"]


# ---- the disk ----


def test_time_until_the_request_is_the_peers() -> None:
    (row,) = causes([idle_reset(since_data_s=0.004)], [read(8.1, 1.8)])
    assert (row["cause"], row["peer_us"], row["disk_us"]) == ("peer", 1_996_000, 0)


def test_reads_of_the_sending_thread_are_disk_time() -> None:
    (row,) = causes([idle_reset()], [read(8.1, 0.9), read(8.5, 1.2), read(9.9, 0.05, tid=2)])
    assert (row["cause"], row["disk_of"], row["disk_device"], row["disk_requests"]) == ("disk", "thread", "loop0", 3)
    assert row["disk_us"] == 1_650_000
    assert (row["peer_us"], row["application_us"]) == (0, 350_000)


def test_short_gaps_between_requests_count_as_in_flight() -> None:
    reads = [read(8 + 0.0002 * n, 0.00011) for n in range(9000)]
    (dense,) = causes([idle_reset()], reads)
    (sparse,) = causes([idle_reset()], reads[::2])
    assert (dense["cause"], dense["disk_us"]) == ("disk", 8999 * 200 + 110)
    assert (sparse["cause"], sparse["disk_us"]) == ("application", 4500 * 110)


@pytest.mark.parametrize(("gap_ns", "counts"), [(100_000, True), (100_001, False)])
def test_a_gap_counts_as_in_flight_up_to_a_tenth_of_a_millisecond(gap_ns: int, counts: bool) -> None:
    second = frames.MONO + 9 * frames.SECOND
    reads = [read(8.5, 0, done_ns=second - gap_ns), read(0, 0, start_ns=second, done_ns=second + 10**9)]
    (row,) = causes([idle_reset()], reads)
    assert row["disk_us"] == (1_500_000 if counts else 1_500_000 - gap_ns / 1000)


@pytest.mark.parametrize("who", [{"tid": 1}, {"tgid": 9, "tid": 9, "cgroup_id": 77}])
def test_block_io_of_others_that_ends_before_the_send_was_probably_waited_for(who: dict[str, int]) -> None:
    (row,) = causes([idle_reset(cgroup_id=77)], [read(8.0, 1.0, **who), read(9.1, 0.85, **who)])
    whose = "process" if "tgid" not in who else "cgroup"
    assert (row["cause"], row["disk_of"]) == ("probably disk", whose)
    assert (row["disk_us"], row["application_us"]) == (1_850_000, 150_000)


@pytest.mark.parametrize("who", [{"tid": 1}, {"tgid": 9, "tid": 9, "cgroup_id": 77}])
@pytest.mark.parametrize("last", [[(9.1, 1.0)], [(9.1, 0.6)], [(9.1, 0.85), (10.004, 1.0)]])
def test_block_io_of_others_that_goes_on_or_ends_early_may_have_been_beside_a_sleep(
    who: dict[str, int], last: list[tuple[float, float]]
) -> None:
    (row,) = causes([idle_reset(cgroup_id=77)], [read(8.0, 1.1, **who), *(read(at, s, **who) for at, s in last)])
    assert row["cause"] == "disk or application"


def test_the_root_cgroup_says_little() -> None:
    (row,) = causes([idle_reset(cgroup_id=1)], [read(8.0, 1.9, tgid=9, tid=9, cgroup_id=1)])
    assert (row["cause"], row["disk_of"], row["disk_us"]) == ("disk or application", "cgroup", 1_900_000)


@pytest.mark.parametrize("changes", [{"tgid": 777}, {"start": 4.0}, {"start": 10.5}, {"comm": b"kworker/1:2"}])
def test_block_io_of_other_cgroups_at_other_times_and_of_the_kernel_is_not_disk_time(changes: dict[str, Any]) -> None:
    who = {"tgid": 777, "cgroup_id": 77} if "comm" in changes else {"cgroup_id": 78}
    start = changes.get("start", 8.1)
    (row,) = causes(
        [idle_reset(cgroup_id=77)], [read(start, 1.8, **who | {k: v for k, v in changes.items() if k != "start"})]
    )
    found = (row["cause"], row["disk_us"], row["disk_of"], row["disk_device"], row["disk_requests"])
    assert found == ("application", 0, "", "", 0)


KWORKER: dict[str, Any] = {"tgid": 300, "tid": 300, "comm": b"kworker/u8:1", "cgroup_id": 1, "owner_cgroup_id": 77}
SYNC = 1 << 3
"""REQ_SYNC in the column flags."""


@pytest.mark.parametrize("how", [{"op": "write", "flags": SYNC}, {"op": "read"}, {"op": "flush"}])
def test_what_kernel_threads_do_for_the_cgroup_was_probably_waited_for(how: dict[str, Any]) -> None:
    (row,) = causes([idle_reset(cgroup_id=77)], [read(8.0, 1.9, **KWORKER | how)])
    assert (row["cause"], row["disk_of"], row["disk_us"]) == ("probably disk", "cgroup", 1_900_000)
    (row,) = causes([idle_reset(cgroup_id=78)], [read(8.0, 1.9, **KWORKER | how)])
    assert (row["cause"], row["disk_us"]) == ("application", 0)


def test_nobody_may_have_waited_for_write_back_in_the_background() -> None:
    write_back = [write(8.0, 1.9, **KWORKER)]
    (row,) = causes([idle_reset(cgroup_id=77)], write_back)
    assert (row["cause"], row["disk_of"], row["disk_us"]) == ("disk or application", "cgroup", 1_900_000)
    # The write for which the cgroup waited decides, if it took most of the time.
    waited = read(8.0, 1.85, tgid=9, tid=9, cgroup_id=77)
    (row,) = causes([idle_reset(cgroup_id=77)], [waited, *write_back])
    assert (row["cause"], row["disk_us"]) == ("probably disk", 1_850_000)


def test_what_a_process_submits_belongs_to_the_cgroup_that_owns_it() -> None:
    resets = [idle_reset(cgroup_id=77)]
    blocks = [read(8.0, 1.9, tgid=9, tid=9, cgroup_id=1, owner_cgroup_id=77)]
    assert [row["cause"] for row in causes(resets, blocks)] == ["probably disk"]


@pytest.mark.parametrize("comm", [b"web", b"kworker/u8:1"])
def test_captures_without_owners_count_by_submitter(comm: bytes) -> None:
    blocks = [read(8.0, 1.9, tgid=9, tid=9, cgroup_id=77, comm=comm)]
    older = frames.pandas(frames.table("block_io", *blocks)).assign(owner_cgroup_id=np.nan)
    rows = frames.pandas(frames.table("cwnd_reset", idle_reset(cgroup_id=77)))
    resets, _ = connections.identify(rows, frames.snapshots().to_pandas())
    nothing = recovery.identify(frames.pandas(frames.table("cwnd_recovery")), resets)
    (row,) = idle_cause.with_cause(resets, block_io.with_latency(older, {}), nothing).to_dict("records")
    assert row["cause"] == ("application" if b"kworker" in comm else "probably disk")


def commits(since: float, until: float, **by: Any) -> list[Any]:
    """Return the block I/O of fsyncs in turn: a write of 1 ms by the caller, then 4 ms of the journal's."""
    times = np.arange(since, until, 0.00505)
    journal = {"tgid": 300, "tid": 300, "comm": b"jbd2/loop0-8", "cgroup_id": 1}
    return [r for at in times for r in (write(at, 0.001, **by), write(at + 0.00105, 0.004, **journal))]


def test_waits_for_a_journal_are_probably_the_disks() -> None:
    (row,) = causes([idle_reset(cgroup_id=77)], commits(8.0, 9.99))
    assert (row["cause"], row["disk_of"], row["disk_device"]) == ("probably disk", "journal", "loop0")
    assert row["disk_us"] > 1_950_000


def test_a_journal_for_which_others_wait_is_not_the_disks() -> None:
    others = commits(8.0, 10.5, tgid=9, tid=9)
    (row,) = causes([idle_reset(cgroup_id=77)], others)
    assert row["cause"] == "application"
    (row,) = causes([idle_reset(cgroup_id=77)], [*others, write(8.1, 0.01)])
    assert row["cause"] == "disk or application"


def test_reads_before_the_request_are_not_disk_time() -> None:
    # The request came 1.5 s before the reset, at 8.5 s; a read for another connection lasted until 9 s.
    resets, recoveries = conversation((2.0, 0.01, 300, 1), (2.0, 0.01, 300, 1), (2.0, 1.5, 300, 1))
    at = 5.0 + 2 + 2 + 2 + 2
    (*_, row) = causes(resets, [read(at, 1.0)], recoveries)
    assert (row["peer_us"], row["disk_us"], row["application_us"]) == (500_000, 500_000, 1_000_000)
    assert row["cause"] == "application"


def test_a_disk_is_the_cause_whatever_chatter_comes_in_meanwhile() -> None:
    resets, recoveries = conversation((3.0, 0.7, 30, 3))
    (_, row) = causes(resets, [read(5.1, 2.8)], recoveries)
    assert (row["cause"], row["disk_us"], row["unclear_us"], row["application_us"]) == ("disk", 2.8e6, 1e5, 1e5)
    (_, row) = causes(resets, [read(5.1, 1.0)], recoveries)
    assert (row["cause"], row["disk_us"], row["unclear_us"]) == ("peer or application", 0, 2.3e6)


def test_only_reads_of_the_process_that_sends_are_disk_time() -> None:
    mine, other = causes(
        [idle_reset(10, tgid=1, tid=1), idle_reset(20, tgid=2, tid=2)],
        [read(8, 2, tgid=1, tid=1), read(18, 1.9, tgid=1)],
    )
    assert (mine["cause"], other["cause"]) == ("disk", "application")


def test_the_device_that_was_busy_longest_is_named() -> None:
    blocks = [read(9.9, 0.05, dev=8 << 20), read(7.9, 0.5, dev=8 << 20), read(8.0, 1.2), read(8.2, 1.0)]
    (row,) = causes([idle_reset()], blocks)
    assert (row["disk_device"], row["disk_requests"], row["disk_us"]) == ("loop0", 3, 1_250_000)


# ---- the rest ----


def test_idle_time_with_a_closed_receive_window_is_the_peers() -> None:
    reopened = idle_reset(tgid=0, tid=0, comm=b"", unsent_bytes=5000)
    (row,) = causes([reopened], [read(8.0, 2.0, tgid=0)])
    assert (row["cause"], row["peer_us"]) == ("peer", 2_000_000)
    # A process that writes more meanwhile changes nothing.
    (row,) = causes([idle_reset(unsent_bytes=5000)], [read(8.0, 2.0)])
    assert (row["cause"], row["peer_us"]) == ("peer", 2_000_000)
    # It may have corked a part of a segment.
    (row,) = causes([idle_reset(unsent_bytes=1000)], [read(8.0, 2.0)])
    assert (row["cause"], row["peer_us"]) == ("disk", 0)


def test_resets_for_other_reasons_than_idle_time_have_no_cause() -> None:
    rows = causes([idle_reset(reason="rto_loss"), idle_reset(reason="app_limited")], [read(8, 2)])
    assert [(row["cause"], row["peer_us"], row["disk_us"]) for row in rows] == [("", 0, 0)] * 2


def test_without_block_io_the_cause_is_never_the_application() -> None:
    resets = [
        idle_reset(),
        idle_reset(20, since_data_s=0.004, sock_cookie=1),
        idle_reset(30, since_data_s=0.5, sock_cookie=2),
    ]
    assert [row["cause"] for row in causes(resets, [], recorded=False)] == ["unknown", "peer", "unknown"]


def test_idle_time_from_before_the_trace_is_unknown_where_it_may_have_been_a_disks() -> None:
    started = frames.MONO + 8_500_000_000
    asked = idle_reset(10, 2, 0.004, sock_cookie=1)
    rows = causes(
        [idle_reset(10, 2), idle_reset(20, 2), asked, idle_reset(10, 2, tgid=7, tid=7)],
        [read(8.6, 1.3, tgid=7, tid=7)],
        started_ns=started,
    )
    assert [row["cause"] for row in rows] == ["unknown", "application", "peer", "disk"]


def test_impossible_process_ids_change_no_other_cause() -> None:
    rows = causes([idle_reset(tgid=2**32 - 1), idle_reset(20)], [read(8, 2, tgid=2**32 - 1), read(18, 2)])
    assert [row["cause"] for row in rows] == ["application", "disk"]


def test_no_resets_have_no_causes() -> None:
    assert causes([], []) == []
    assert causes([], [read(1, 1)]) == []


@pytest.mark.slow
def test_the_causes_of_many_resets_equal_those_of_each_alone() -> None:
    rng = np.random.default_rng(1)
    resets = pd.concat([frames.pandas(frames.table("cwnd_reset", idle_reset()))] * 10_000, ignore_index=True)
    resets["ts_ns"] = np.sort(rng.integers(0, 10**12, len(resets))).astype(np.uint64) + np.uint64(frames.MONO)
    resets["tgid"] = rng.integers(1, 50, len(resets)).astype(np.uint32)
    start = np.sort(rng.integers(0, 10**12, 1_000_000)) + frames.MONO
    tgid = rng.integers(1, 100, len(start)).astype(np.uint32)
    blocks = pd.DataFrame(
        {
            "start_ns": start.astype(np.uint64),
            "done_ns": (start + rng.integers(10**5, 10**8, len(start))).astype(np.uint64),
            "tgid": tgid,
            "tid": tgid,
            "cgroup_id": np.uint64(0),
            "owner_cgroup_id": np.uint64(0),
            "op": pd.Categorical(["read"] * len(start)),
            "comm": pd.Categorical(["fio"] * len(start)),
            "device": pd.Categorical(np.array(["a", "b", "c"])[rng.integers(0, 3, len(start))]),
        }
    )
    resets["tid"] = resets["tgid"]
    resets, _ = connections.identify(resets, frames.snapshots().to_pandas())
    nothing = recovery.identify(frames.pandas(frames.table("cwnd_recovery")), resets)
    out = idle_cause.with_cause(resets, blocks, nothing)
    sample = out.sample(20, random_state=1)
    for row in sample.to_dict("records"):
        mine = blocks[blocks["tgid"] == row["tgid"]]
        since, until = int(row["ts_ns"]) - 2 * 10**9, int(row["ts_ns"])
        spans = mine[(mine["start_ns"] < until) & (mine["done_ns"] > since)].astype({"start_ns": int, "done_ns": int})
        reach, total = since, 0
        for begin, end in zip(spans["start_ns"], spans["done_ns"], strict=True):
            gap = since < reach < begin <= reach + idle_disk.BRIDGE_NS
            total += max(0, min(end, until) - (reach if gap else max(begin, reach)))
            reach = max(reach, min(end, until))
        assert row["disk_us"] == pytest.approx(total / 1000)


def test_a_cause_has_its_sums_and_the_device_that_most_of_its_resets_name() -> None:
    judged = pd.DataFrame({"cause": ["disk"] * 4 + ["application", ""], "disk_device": ["", "a", "b", "b", "", "c"]})
    judged = judged.assign(verdict=["harmful"] * 3 + ["slight"] * 3, lost_us=[4.0, 3.0, 2.0, 1.0, 9.0, 99.0])
    judged = judged.assign(**dict.fromkeys(("peer_us", "unclear_us", "disk_us", "application_us"), 5.0))
    assert list(idle_cause.summary(judged).itertuples(index=False, name=None)) == [
        ("disk", 4, 3, 10.0, 80.0, 20.0, "b"), ("application", 1, 0, 9.0, 20.0, 5.0, ""),
    ]  # fmt: skip


# ---- in words ----


def test_each_cause_has_a_label_and_a_reason_without_control_characters() -> None:
    assert set(idle.LABELS) == set(idle_cause.CAUSES)
    row: dict[str, Any] = {"peer_us": 5e5, "unclear_us": 3e5, "disk_us": 1e6, "application_us": 2e5}
    row |= {"comm": "evil\x1b[2J", "disk_device": "sda\n", "disk_requests": 7, "disk_of": "cgroup"}
    reasons = {cause: idle.because(row | {"cause": cause}) for cause in idle_cause.CAUSES}
    assert len(set(reasons.values())) == len(reasons)
    assert all(reason.startswith("; ") and reason.isprintable() for reason in reasons.values())
    assert "1.00 s (50 %) of the idle time" in reasons["probably disk"]
    assert "inferred" in reasons["probably disk"]
    assert idle.because(row | {"cause": ""}) == ""
