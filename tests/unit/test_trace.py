# SPDX-License-Identifier: Apache-2.0
"""A Trace has the documented frames, and a text of one screen that is harmless whatever a capture contains."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from cwndtrace import format as fmt
from cwndtrace.errors import CaptureError, NotFound
from cwndtrace.records import arrow
from cwndtrace.trace import Trace, load
from tests.unit import frames

EVIL = "<script>alert(1)</script>&amp;\x1b[31m\x1b]0;owned\x07\u202e\n" + "A" * 500


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    resets, connections = frames.story(peers=2, seconds=30)
    return frames.capture(
        tmp_path_factory.mktemp("trace") / "a.cwnd", resets=resets, connections=connections, block_io=frames.disk(500),
        counts={"cwnd_reset": {"kept": 9, "lost": 0}, "block_io": {"kept": 500, "lost": 17}}, unwritten={"block_io": 3},
        unchanged=4,
    )  # fmt: skip


def test_frames_begin_with_utc_time_in_order(trace: Trace) -> None:
    for name, frame in (("cwnd_reset", trace.resets), ("connections", trace.connections), ("block_io", trace.block_io)):
        assert frame.columns[0] == "time"
        assert str(frame["time"].dt.tz) == "UTC"
        assert frame["time"].is_monotonic_increasing
        assert set(arrow.schema(name).names) <= set(frame.columns)
        assert frame.index.tolist() == list(range(len(frame)))
    first = trace.resets.iloc[0]
    clock = trace.meta["clock"]["start"]
    assert first["time"] == pd.Timestamp(int(first["ts_ns"]) + clock["utc_offset_ns"], tz="UTC").floor("us")


def test_rows_written_out_of_order_are_sorted(tmp_path: Path) -> None:
    block_io = frames.table("block_io", frames.block(3), frames.block(1), frames.block(2))
    block_io_read = frames.capture(tmp_path / "a.cwnd", block_io=block_io).block_io
    assert (block_io_read["start_ns"] - frames.MONO).tolist() == [10**9, 2 * 10**9, 3 * 10**9]


def test_text_columns_are_strings_and_those_of_block_io_categories(trace: Trace) -> None:
    ends = trace.resets["saddr"] + ":" + trace.resets["sport"].astype(str)
    assert set(ends) == {"10.1.0.1:443"}
    assert not any(isinstance(kind, pd.CategoricalDtype) for kind in trace.resets.dtypes)
    assert isinstance(trace.block_io["comm"].dtype, pd.CategoricalDtype)
    assert isinstance(trace.block_io["device"].dtype, pd.CategoricalDtype)


def test_frames_are_read_once(trace: Trace) -> None:
    assert trace.resets is trace.resets
    assert trace.connections is trace.connections
    assert trace.block_io is trace.block_io


def test_the_summary_reads_no_block_io(tmp_path: Path) -> None:
    resets, connections = frames.story(seconds=30)
    fresh = frames.capture(tmp_path / "a.cwnd", resets=resets, connections=connections, block_io=frames.disk(9))
    key = fresh.summary()["connection"].iloc[0]
    for answer in (fresh.host(), fresh.remedies(), fresh.remedies(key), fresh.audit(), fresh.explain(0), repr(fresh)):
        assert len(str(answer)) > 9
    assert "block_io" not in vars(fresh)
    assert set(fresh.verdicts["cause"]) == {"application"}


def test_a_connection_has_the_same_key_in_all_frames(trace: Trace) -> None:
    assert set(trace.summary()["connection"]) == set(trace.resets["connection"]) == set(trace.connections["connection"])
    assert trace.summary()["resets"].sum() == len(trace.resets)


def test_the_block_summary_names_devices(trace: Trace) -> None:
    assert trace.block_summary()["device"].unique().tolist() == ["loop0"]
    assert trace.block_summary()["count"].sum() == 500


def test_repr_describes_the_capture_on_one_screen(trace: Trace) -> None:
    lines = repr(trace).splitlines()
    assert len(lines) <= 12
    text = repr(trace)
    assert "(complete)" in lines[0]
    for part in (
        "web1, Linux 6.18.0",
        "from 2026-11-18 12:30:00 UTC to 12:31:00, 60.0 s",
        f"{len(trace.resets)} resets, {len(trace.recoveries)} recoveries, 500 block I/Os",
        "20 block I/Os",
        "4 idle restarts left the window as it was",
        "idle: sendmsg, rto_loss: sendmsg, app_limited: none",
        "iface=eth0",
    ):
        assert part in text


class TagNames(HTMLParser):
    """A parser that collects the tags that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert [name for name, _ in attrs] in ([], ["style"])
        self.names.add(tag)


def test_no_text_of_a_capture_becomes_markup_or_controls_a_terminal(tmp_path: Path) -> None:
    evil = frames.capture(
        tmp_path / "<b>\x1b[2J.cwnd",
        resets=frames.table("cwnd_reset", frames.reset(1, comm=b"<i>x\x1b[1m")),
        host=EVIL, kernel=EVIL, started="2026-11-18T12:30:00Z", ended=EVIL, probes={EVIL: EVIL}, filters={EVIL: EVIL},
        unchanged=EVIL, counts=EVIL, unwritten=EVIL, devices=EVIL, lossy=EVIL, clock=EVIL,
    )  # fmt: skip
    (evil.path / "cwnd_reset" / "<u>\x1b[m.parquet").write_bytes(b"half")
    text = repr(evil)
    assert text.replace("\n", "").isprintable()
    assert len(text.splitlines()) <= 12
    assert max(map(len, text.splitlines())) < 240
    page = evil._repr_html_()
    tags = TagNames()
    tags.feed(page)
    assert tags.names == {"div", "b", "code", "table", "tr", "th", "td"}
    assert page.replace("\n", "").isprintable()
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("value", [None, 5, [], "", {}, {"start": 3}, [{"a": 1}]])
def test_metadata_of_any_shape_is_shown(tmp_path: Path, value: object) -> None:
    names = ("host", "kernel", "started", "ended", "probes", "filters", "unchanged", "counts", "unwritten", "devices")
    trace = frames.capture(
        tmp_path / "a.cwnd", block_io=frames.table("block_io", frames.block()), **dict.fromkeys(names, value)
    )
    assert "cwndtrace capture" in repr(trace)
    assert "cwndtrace capture" in trace._repr_html_()
    assert trace.block_io["device"].tolist() == ["7:0"]


def test_damaged_parts_are_named_and_counted(tmp_path: Path) -> None:
    trace = frames.capture(tmp_path / "a.cwnd", block_io=frames.table("block_io", frames.block()))
    for n in range(2, 10):
        (trace.path / "block_io" / f"part-{n:06}.parquet").write_bytes(b"PAR1")
    text = repr(trace)
    assert "block_io/part-000002.parquet is cut off or corrupt" in text
    assert "and 3 more, see .warnings" in text
    assert len(trace.warnings) == 8
    assert len(trace.block_io) == 1


def test_an_empty_capture_has_all_its_columns(tmp_path: Path) -> None:
    trace = frames.capture(tmp_path / "a.cwnd")
    assert (len(trace.resets), len(trace.connections), len(trace.block_io)) == (0, 0, 0)
    assert {"latency_us", "queue_us", "device"} <= set(trace.block_io.columns)
    assert (len(trace.summary()), len(trace.block_summary())) == (0, 0)
    assert "0 resets" in repr(trace)


def test_a_missing_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="There is no"):
        load(tmp_path / "nothing.cwnd")


# ---- what Jupyter shows -----------------------------------------------------------------------------


def test_a_connection_shows_its_figures_and_verdict(trace: Trace) -> None:
    row = trace.summary().iloc[0]
    one = trace.connection(row["connection"])
    assert len(one.resets) == row["resets"] == len(trace.resets[trace.resets["connection"] == row["connection"]])
    assert len(one.snapshots) == row["snapshots"]
    text = repr(one)
    assert text.splitlines()[0] == f"connection 10.1.0.1:443 > 10.2.0.9:{row['dport']}"
    assert f"{row['resets']} ({row['resets_harmful']} harmful)" in text
    assert str(one.verdict) in text
    assert text.count("costly reset") == 3
    assert "<code>10.1.0.1:443 &gt; 10.2.0.9" in one._repr_html_()
    with pytest.raises(NotFound, match="no connection 1:1"):
        trace.connection("1:1")


def test_a_verdict_shows_its_sentence(trace: Trace) -> None:
    row = trace.verdicts.iloc[2]
    one = trace.explain(2)
    assert one.verdict == row["verdict"]
    assert str(one) == repr(one)
    assert f"{row['cwnd_before']} -> {row['cwnd_after']} segments" in str(one)
    assert repr(trace.host()) == trace.host().text
    with pytest.raises(KeyError):
        trace.explain(len(trace.resets))


def test_a_hostile_connection_is_shown_harmlessly(tmp_path: Path) -> None:
    resets = frames.table("cwnd_reset", frames.reset(1, comm=b"<i>x\x1b[1m", ca_name=b"<u>\x1b[2J"))
    seen = [frames.snapshot(t, bytes_sent=40_100_000 + t * 10**6, comm=EVIL, state=EVIL, ca_name=EVIL) for t in (0, 9)]
    trace = frames.capture(tmp_path / "a.cwnd", resets=resets, connections=frames.snapshots(*seen))
    one = trace.connection(trace.resets["connection"].item())
    for item in (one, one.verdict, trace.explain(0), trace.host()):
        assert repr(item).replace("\n", "").isprintable()
        page = item._repr_html_()
        assert page.isprintable()
        tags = TagNames()
        tags.feed(page)
        assert tags.names <= {"div", "b", "code", "table", "tr", "th", "td", "br", "bdi"}


def test_rows_of_a_closed_connection_are_left_out(tmp_path: Path) -> None:
    """Older recordings have rows of closed connections, with only zeros; these aren't snapshots of a window."""
    socket = {"sport": 443, "sock_cookie": 7}
    zeros = dict.fromkeys(("cwnd", "ssthresh", "mss", "rto_us", "srtt_us", "min_rtt_us", "snd_wnd", "bytes_sent"), 0)
    rows = frames.snapshots(
        frames.snapshot(1.0, cwnd=40, **socket),
        frames.snapshot(3.0, cwnd=44, **socket),
        frames.snapshot(5.0, state="FIN-WAIT-2", **zeros, **socket),
    )
    trace = frames.capture(tmp_path / "a.cwnd", connections=rows)
    assert trace.connections["cwnd"].tolist() == [40, 44]
    assert trace.connections.attrs["units"]["cwnd"] == "segments"
    (row,) = trace.summary().to_dict("records")
    assert (row["cwnd_min_segments"], row["cwnd_last_segments"], row["snapshots"]) == (40, 44, 2)
    assert row["srtt_us"] > 0


def test_targets_that_a_filter_had_no_room_for_are_shown(tmp_path: Path) -> None:
    counts = {"cgroups": 117, "sockets": 0, "<b>": 5}
    trace = frames.capture(tmp_path / "a.cwnd", left_out=counts)
    assert trace.left_out == {"cgroups": 117}
    assert ("left out", fmt.left_out("cgroups", 117)) in trace.facts()
    assert "117 requested cgroups" in repr(trace)
    invalid: tuple[object, ...] = (None, [], {"cgroups": "many"}, {"cgroups": -1})
    for value in invalid:
        hostile = frames.capture(tmp_path / f"{len(str(value))}{value is None}.cwnd", left_out=value)
        assert hostile.left_out == {}
        assert repr(hostile)


def test_records_have_the_names_of_their_workloads_and_processes(tmp_path: Path) -> None:
    requests = frames.table(
        "block_io",
        frames.block(1, 100, cgroup_id=1, owner_cgroup_id=7, comm=b"kworker/u4:1"),
        frames.block(2, 300, cgroup_id=7, owner_cgroup_id=7),
        frames.block(3, 100, cgroup_id=9, owner_cgroup_id=9),
    )
    trace = frames.capture(
        tmp_path / "a.cwnd",
        resets=frames.table(
            "cwnd_reset", frames.reset(1, cgroup_id=7, process=b"leader"), frames.reset(2, cgroup_id=9)
        ),
        connections=frames.snapshots(frames.snapshot(sock_cgroup_id=7, listener_pid=4242, listener="leader")),
        block_io=requests,
        workloads=frames.workloads({"cgroup_id": 7}, {"cgroup_id": 1, "path": "/", "kind": "cgroup"} | _UNNAMED),
        processes=frames.processes({}),
        cgroups="v2",
    )
    assert list(trace.resets["workload"]) == ["web", "web"]  # of one connection, whose first record tells it
    assert list(trace.resets["process"]) == ["leader", "replica"]
    assert set(trace.verdicts["cmdline"]) == {"/usr/bin/replica --all"}
    assert list(trace.connections["workload"]) == ["web"]
    assert list(trace.summary()["service"]) == ["leader:443"]
    assert list(trace.block_io["submitter"]) == ["/", "web", ""]
    assert list(trace.block_io["owner"]) == ["web", "web", ""]
    assert list(trace.block_columns("owner")["owner"]) == ["web", "web", ""]
    batches = [*trace.block_batches("owner", "tgid")]
    assert [[*batch.columns] for batch in batches] == [["owner", "tgid"]] * 2  # the first is empty
    assert [name for batch in batches for name in batch["owner"]] == ["web", "web", ""]
    assert list(trace.block_owners()[["owner", "count"]].itertuples(index=False, name=None)) == [("web", 2), ("", 1)]


_UNNAMED = dict.fromkeys(("container_id", "container_name", "image", "runtime"), "")
