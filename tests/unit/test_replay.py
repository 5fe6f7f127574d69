# SPDX-License-Identifier: Apache-2.0
"""Everything after the probes works on raw bytes that were recorded from a real trace (tests/record.py)."""

from __future__ import annotations

import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cwndtrace.capture.session import Batch
from cwndtrace.capture.source import Filters
from cwndtrace.cli.console import Console, InterfaceWatch
from cwndtrace.cli.live import RESETS_SHOWN, JsonView, TextView
from cwndtrace.cli.run import _print_probes
from cwndtrace.cli.table import cells
from cwndtrace.errors import CaptureError
from cwndtrace.plot.timeline import timeline
from tests.harness.replay import Replay, record
from tests.record import BLOCKS, BURSTS, CONNECTIONS, FILE
from tests.unit import frames, playing
from tests.unit.fake_source import FakeSource, session_of

RESETS = CONNECTIONS * BURSTS


def test_the_recording_has_the_current_layout() -> None:
    source = Replay(FILE)
    assert source.probes["idle"]
    assert {"cwnd_reset", "block_io"} <= set(source.events)


def test_the_text_view_prints_aligned_resets_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture, session = playing.played(Replay(FILE), tmp_path, as_json=False)
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    header, *lines = stdout.splitlines()
    assert re.split(" {2,}", header) == [column.title for column in RESETS_SHOWN]
    resets = [line for line in lines if " -> " in line]
    assert len(resets) == RESETS
    # Each heading begins or ends where its column's values do.
    for line in resets:
        assert line.index("127.0.0.1:") == header.index("CONNECTION")
        assert line.index(" idle ") + 1 == header.index("REASON")
    assert f"kept {RESETS} resets, {2 * BLOCKS} block I/Os; lost 0 resets, 0 block I/Os" in stdout
    assert "No TCP connection" not in stdout
    assert capture.status == "complete"
    assert session.tally.kept["cwnd_reset"] == RESETS


def test_the_json_view_prints_each_record_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture, _ = playing.played(Replay(FILE), tmp_path, as_json=True, print_block=True)
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    rows = [json.loads(line, parse_constant=pytest.fail) for line in stdout.splitlines()]
    by_event: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_event.setdefault(row["event"], []).append(row)
    assert len(by_event["cwnd_reset"]) == RESETS
    assert len(by_event["block_io"]) == 2 * BLOCKS
    (started,), (summary,) = by_event["started"], by_event["summary"]
    assert rows[0] == started
    assert {key: started[key] for key in ("capture", "traced", "time")} == {
        "capture": str(capture.path),
        "traced": "a recording",
        "time": capture.meta["started"],
    }
    assert started["probes"] == capture.meta["probes"]
    assert rows[-1] == summary
    assert summary["kept"]["cwnd_reset"] == RESETS
    assert sum(row["resets"] for row in summary["connections"]) == RESETS
    assert {(row["op"], row["count"], row["bytes"]) for row in summary["block_io"]} == {
        ("read", BLOCKS, BLOCKS * 4096),
        ("write", BLOCKS, BLOCKS * 4096),
    }
    # The printed records equal those on disk.
    assert [row["ts_ns"] for row in by_event["cwnd_reset"]] == list(capture.resets["ts_ns"])
    assert all(row["time"].endswith("Z") for row in rows)


def test_block_requests_are_printed_if_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    playing.played(Replay(FILE), tmp_path, as_json=False, print_block=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "  block_io  " in line]
    assert len(lines) == 2 * BLOCKS
    assert all(" sector " in line and "4.10 kB" in line for line in lines)


def test_the_capture_has_each_recorded_reset_and_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture, _ = playing.played(Replay(FILE), tmp_path, as_json=False)
    capsys.readouterr()
    resets = capture.resets
    assert len(resets) == RESETS
    assert resets["connection"].nunique() == CONNECTIONS
    assert set(resets["reason"]) == {"idle"}
    assert (resets["cwnd_after"] < resets["cwnd_before"]).all()
    assert (resets["idle_us"] > resets["rto_us"]).all()
    assert set(resets["ca_name"]) == {"cubic"}
    blocks = capture.block_io
    assert list(blocks.groupby("op", observed=True).size()) == [BLOCKS, BLOCKS]
    assert (blocks["latency_us"] > 0).all()
    summary = capture.summary()
    assert sorted(summary["resets"]) == [BURSTS] * CONNECTIONS


def test_the_capture_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture, _ = playing.played(Replay(FILE), tmp_path, as_json=False)
    capsys.readouterr()
    figure = timeline(capture.resets, capture.connections, capture.block_io, about=capture.about)
    figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 20_000


def test_losses_are_printed_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FakeSource([("block_io", frames.block().tobytes())], [])
    source.count.lost["block_io"] = 1234
    capture, _ = playing.played(source, tmp_path, as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (lost,) = (row for row in rows if row["event"] == "lost")
    assert (lost["of"], lost["lost"]) == ("block_io", 1234)
    assert lost["start_ns"] < lost["end_ns"]
    assert rows[-1]["lost"]["block_io"] == 1234
    assert capture.meta["counts"]["block_io"] == {"kept": 1, "lost": 1234}
    assert capture.meta["lossy"][0]["lost"] == 1234


@pytest.mark.parametrize("as_json", [False, True])
def test_losses_are_printed_every_ten_seconds_and_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """If records are lost for a minute, the first loss, one every ten seconds and the last are shown."""
    session = session_of(FakeSource(*[[] for _ in range(602)]))
    view = JsonView(session, print_block=False) if as_json else TextView(session, print_block=False, quiet=False)
    now = 1000.0
    monkeypatch.setattr("cwndtrace.cli.live.time.monotonic", lambda: now)
    assert isinstance(session.source, FakeSource)
    for _ in range(601):  # a minute of turns
        session.source.count.lost["block_io"] += 2
        session.step()
        view.tick("waiting")
        now += 0.1
    session.source.count.lost["cwnd_reset"] = 1
    session.step()
    view.tick("", last=True)
    view.tick("", last=True)
    stdout, stderr = capsys.readouterr()
    if as_json:
        rows = [json.loads(line) for line in stdout.splitlines()]
        assert sum(row["lost"] for row in rows if row["of"] == "block_io") == 1202
        assert [row["lost"] for row in rows if row["of"] == "cwnd_reset"] == [1]
        spans = [(row["start_ns"], row["end_ns"]) for row in rows if row["of"] == "block_io"]
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert len(spans) in (7, 8)
    else:
        lines = stderr.splitlines()
        assert lines[0] == "lost so far: 2 block_io (counted in the kernel)"
        assert lines[-1] == "lost so far: 1 cwnd_reset, 1,202 block_io (counted in the kernel)"
        assert len(lines) in (7, 8)


@pytest.mark.parametrize(("longest_s", "idle_s"), [(0.45, [0.3, 0.45, 0.45]), (0.15, [0.15, 0.15, 0.15])])
def test_a_source_without_records_is_polled_less_often(longest_s: float, idle_s: list[float]) -> None:
    block = ("block_io", frames.block().tobytes())
    source = FakeSource([], [], [], [block], [], [])
    source.longest_tick_s = longest_s
    with session_of(source) as session:
        list(session.turns(lambda: False))
    assert source.waits == pytest.approx([0.15, *idle_s, 0.15, idle_s[0]])


def test_lines_on_stderr_fit_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines break between words, and an ideograph is two cells wide; without a terminal each text is one line."""
    session = session_of(FakeSource())
    target = "connections of \u65e5\u672c\u8a9e, " * 5 + "and more"
    warned = ["no window is reset after idle time, in any namespace, " * 3 + "whatever comes"]
    monkeypatch.setattr("cwndtrace.cli.preflight.warnings", lambda *_: warned)
    batch = Batch("connections", frames.snapshots(frames.snapshot()))

    def printed(width: str) -> tuple[list[str], str]:
        monkeypatch.setenv("COLUMNS", width)
        _print_probes(session.source, target, verbose=False)
        view = TextView(session, print_block=False, quiet=False)
        watch = InterfaceWatch(session, Filters(), None)
        console = Console(view, session, watch, what=target, quiet=False, stop_when_refused=False)
        console._warn_of_settings(batch)
        lines = capsys.readouterr().err.splitlines()
        view.tick(target)
        return lines, capsys.readouterr().err.removeprefix("\r\x1b[K")

    whole, status = printed("60")
    assert len(whole) == 2
    assert status == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    lines, status = printed("60")
    assert " ".join(line.strip() for line in lines) == " ".join(line.strip() for line in whole)
    assert max(map(cells, lines)) <= 60
    assert 55 < cells(status) <= 59


def test_single_records_are_in_the_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FakeSource([("cwnd_reset", frames.reset().tobytes()), ("block_io", frames.block().tobytes())], [])
    source.count.unchanged = 1
    playing.played(source, tmp_path, as_json=False)
    stdout = capsys.readouterr().out
    assert "kept 1 reset, 1 block I/O; lost 0 resets, 0 block I/Os; 1 restart left the window as it was" in stdout
    assert TextView.output_dropped(1).startswith("1 line was not printed")


def test_control_characters_of_names_never_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = b"\x1b]0;p\x07\x9b1m\r\n\xff"
    reset, block = frames.reset(comm=evil, ca_name=evil), frames.block(comm=evil)
    source = FakeSource([("cwnd_reset", reset.tobytes()), ("block_io", block.tobytes())], [])
    playing.played(source, tmp_path, as_json=False, print_block=True)
    stdout = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in stdout)
    assert "]0;p" in stdout


# ---- recordings ------------------------------------------------------------------------------------


def test_a_recording_can_be_written_and_read(tmp_path: Path) -> None:
    reads = [("cwnd_reset", frames.reset().tobytes()), ("block_io", frames.block().tobytes() * 5)]
    source = FakeSource()
    source.count.lost["block_io"], source.count.unchanged = 3, 2
    record(tmp_path / "a.raw", source, reads)
    replay = Replay(tmp_path / "a.raw")
    assert (replay.probes, replay.tried, set(replay.events)) == (source.probes, source.tried, set(source.events))
    assert replay.counts() == source.count
    assert replay.poll(0) == [reads[0]]
    assert not replay.exhausted()
    assert replay.stop() == [reads[1]]
    assert replay.exhausted()
    assert replay.poll(0) == []


def test_a_replay_does_not_wait_for_records() -> None:
    source, begin = Replay(FILE), time.monotonic()
    while not source.exhausted():
        source.poll(100)
    assert time.monotonic() - begin < 100


@pytest.mark.parametrize("cut", [1, 7, 21, 100])
def test_a_recording_that_is_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.raw").write_bytes(FILE.read_bytes()[:-cut])
    with pytest.raises(CaptureError, match=r"a\.raw is cut off after \d+ reads"):
        Replay(tmp_path / "a.raw")


def with_header(folder: Path, **changes: Any) -> Path:
    first, _, body = FILE.read_bytes().partition(b"\n")
    header = json.loads(first) | changes
    (folder / "a.raw").write_bytes(json.dumps(header).encode() + b"\n" + body)
    return folder / "a.raw"


def test_records_of_another_layout_are_refused(tmp_path: Path) -> None:
    path = with_header(tmp_path, layout={"block_io": 72, "cwnd_reset": 200})
    with pytest.raises(CaptureError, match=r"holds block_io records of 72 bytes, this version has \d+") as caught:
        Replay(path)
    assert caught.value.remedy == "record it again"


def test_records_of_an_unknown_event_are_refused(tmp_path: Path) -> None:
    path = with_header(tmp_path, layout={"tea_break": 8})
    with pytest.raises(CaptureError, match="holds tea_break records of 8 bytes, this version has no such records"):
        Replay(path)


def test_records_of_an_undeclared_event_are_refused(tmp_path: Path) -> None:
    path = with_header(tmp_path, layout={})
    with pytest.raises(CaptureError, match="is damaged after 0 reads"):
        Replay(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no json\n", b"[]\n", b"{}\n", b'{"layout": {}}\n', b"\xff\xfe\n", b'{"layout": 5}\n', b"[" * 100_000],
)
def test_other_files_than_recordings_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.raw").write_bytes(content)
    with pytest.raises(CaptureError, match="isn't a recording of raw records"):
        Replay(tmp_path / "a.raw")


def test_a_missing_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="No such file"):
        Replay(tmp_path / "a.raw")
