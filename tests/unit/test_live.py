# SPDX-License-Identifier: Apache-2.0
"""What run prints while it traces: a line for each reset, a status line, and losses, as text and as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cwndtrace.capture.session import Batch, Loss, Tally
from cwndtrace.cli import live
from cwndtrace.records import arrow
from tests.unit import frames

Output = pytest.CaptureFixture[str]


class HandClock:
    """The time that views see, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    made = HandClock()
    monkeypatch.setattr(live, "time", made)
    return made


def session(**tally: Any) -> Any:
    """Return what a view asks of a session."""
    source = SimpleNamespace(probes={"idle": "fentry"}, block_probe="block_io_start")
    start = {"mono_ns": frames.MONO, "utc_offset_ns": frames.OFFSET}
    made = Tally(**({"kept": {}} | tally))
    return SimpleNamespace(tally=made, source=source, start=start, clock=SimpleNamespace(offset_ns=frames.OFFSET))


def batch(event: str, *records: Any) -> Batch:
    rows = np.concatenate(records)
    return Batch(event, arrow.TimedRecords(event, rows.tobytes(), np.full(len(rows), frames.OFFSET)))


def text_view(of: Any, *, terminal: bool = False, quiet: bool = False, print_block: bool = False) -> live.TextView:
    view = live.TextView(of, print_block=print_block, quiet=quiet)
    view._terminal = terminal and not quiet
    return view


def test_a_reset_is_a_line_under_its_header(capsys: Output) -> None:
    view = text_view(session())
    view.begin("everything", Path("a.cwnd"))
    view.batch(batch("cwnd_reset", frames.reset(2.5, ssthresh_after=2**31 - 1, cwnd_before=15, cwnd_after=10)))
    header, line = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "TIME REASON PROCESS CONNECTION IDLE RTO CWND (segments) SSTHRESH SRTT"
    assert " ".join(line.split()) == (
        "12:30:02.500000 idle replica[4242] 10.1.0.1:443 > 10.2.0.9:51324 2.10 s 308 ms 15 -> 10 inf 107 ms"
    )


def test_block_requests_are_lines_only_where_they_were_asked_for(capsys: Output) -> None:
    requests = batch("block_io", frames.block(1, 1500, bytes=512), frames.block(2, 250, error="ioerr", op="write"))
    text_view(session()).batch(requests)
    assert capsys.readouterr().out == ""
    text_view(session(), print_block=True).batch(requests)
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("fio[777]")[1].strip() == "7:0 read sector 2048 512 B in 1.50 ms"
    assert second.split("fio[777]")[1].strip() == "7:0 write sector 2048 4.10 kB in 250 us IOERR"


def test_losses_are_told_every_ten_seconds_and_at_the_end(clock: HandClock, capsys: Output) -> None:
    of = session()
    view = text_view(of)

    def told(lost: int, at: float, **options: bool) -> str:
        of.tally.lost["block_io"], clock.now = lost, at
        view.tick("waiting", **options)
        return capsys.readouterr().err

    assert told(0, 1000) == ""
    assert told(1500, 1001) == "lost so far: 1,500 block_io (counted in the kernel)\n"
    assert told(1600, 1010.9) == ""
    assert told(1600, 1011) == "lost so far: 1,600 block_io (counted in the kernel)\n"
    assert told(1600, 1030) == ""
    assert told(1700, 1031) == "lost so far: 1,700 block_io (counted in the kernel)\n"
    assert told(1701, 1032, last=True) == "lost so far: 1,701 block_io (counted in the kernel)\n"
    assert told(1701, 1033, last=True) == ""
    of.tally.lost["cwnd_reset"] = 1
    assert told(1701, 1050) == "lost so far: 1,701 block_io, 1 cwnd_reset (counted in the kernel)\n"
    quiet = text_view(of, quiet=True)
    quiet.tick("waiting", last=True)
    assert capsys.readouterr().err == ""


def test_the_status_line_is_rewritten_every_half_second(clock: HandClock, capsys: Output) -> None:
    of = session(unchanged=2)
    view = text_view(of, terminal=True)
    view.tick("waiting for the first reset")
    first = "\rwaiting for the first reset | 2 restarts left the window as it was | lost 0"
    assert capsys.readouterr().err == first
    clock.now += 0.49
    view.tick("waiting for the first reset")
    assert capsys.readouterr().err == ""
    clock.now += 0.01
    view.batch(batch("cwnd_reset", frames.reset(1)))
    assert capsys.readouterr().err == "\r"
    of.tally.unchanged = 0
    view.tick("waiting for the first reset")
    assert capsys.readouterr().err == "\r1 reset | lost 0"
    view.end()
    view.end()
    assert capsys.readouterr().err == "\r"


@pytest.mark.usefixtures("clock")
def test_the_status_line_has_percentiles_of_block_io(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "room", lambda **_: 200)
    view = text_view(session(), terminal=True)
    # Of a hundred latencies of 1 to 100 ms, the n-th percentile is n ms, to one percent.
    view.batch(batch("block_io", *(frames.block(1, 1000 * ms) for ms in range(1, 101))))
    view.tick("waiting")
    text = capsys.readouterr().err
    assert "| block I/O 100: p50 " in text
    shown = {int(percent): float(ms) for percent, ms in re.findall(r"p(\d\d) (\S+) ms", text)}
    assert all(percent <= shown[percent] <= percent * 1.01 for percent in (50, 95, 99))


def test_without_a_terminal_there_is_no_status_line(capsys: Output) -> None:
    for view in (text_view(session()), text_view(session(), terminal=True, quiet=True)):
        view.tick("waiting")
        view.end()
    assert capsys.readouterr().err == ""


def test_a_reset_in_no_process_is_that_of_the_holder_in_the_last_two_snapshots(capsys: Output) -> None:
    view = text_view(session())
    own = frames.reset(1, tgid=0, comm=b"swapper")

    def process(*comms: str) -> str:
        for comm in comms:
            view.batch(Batch("connections", frames.snapshots(frames.snapshot(0, comm=comm, pid=5))))
        view.batch(batch("cwnd_reset", own))
        return capsys.readouterr().out.splitlines()[-1].split()[2]

    assert process() == "-"
    assert process("old") == "old[5]"
    assert process("new") == "new[5]"
    elsewhere = Batch("connections", frames.snapshots(frames.snapshot(1, dport=1, comm="other", pid=6)))
    view.batch(elsewhere)
    assert process() == "new[5]"
    view.batch(elsewhere)
    assert process() == "-"
    view.batch(batch("cwnd_reset", frames.reset(1, comm=b"grpc/1")))
    assert "grpc/1[4242]" in capsys.readouterr().out


def test_block_figures_are_those_of_each_device_and_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = live.BlockFigures()
    figures.count()
    figures.add(batch("block_io", frames.block(1, 100, bytes=512), frames.block(2, 300, bytes=1024, error="ioerr")))
    figures.add(batch("block_io", frames.block(3, 50, op="write", dev=8 << 20 | 1)))
    assert figures.all().count == 0
    figures.count()
    assert (figures.all().count, figures.all().total_us) == (3, 450)
    read, write = ("7:0", "read"), ("8:1", "write")
    assert figures.bytes == {read: 1536, write: 4096}
    assert figures.errors == {read: 1, write: 0}
    assert {pair: (each.count, each.max_us) for pair, each in figures.latency.items()} == {
        read: (2, 300),
        write: (1, 50),
    }
    # Many are counted at once, so that they don't pile up.
    monkeypatch.setattr(live, "_COUNT_AT_ROWS", 3)
    figures.add(batch("block_io", *[frames.block(1, 10)] * 2))
    assert figures.all().count == 3
    figures.add(batch("block_io", frames.block(1, 10)))
    assert figures.all().count == 6
    assert figures.bytes[read] == 1536 + 3 * 4096


def objects(capsys: Output) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_has_an_object_for_each_event(capsys: Output) -> None:
    view = live.JsonView(session(), print_block=False)
    view.begin("everything", Path("a.cwnd"))
    view.batch(batch("cwnd_reset", frames.reset(2)))
    view.batch(batch("cwnd_recovery", frames.recovered(2)))
    view.batch(batch("block_io", frames.block(2)))
    view.batch(Batch("workloads", frames.workloads({})))
    view.batch(Batch("connections", frames.snapshots(frames.snapshot(1))))
    view.end()
    started, *rows = objects(capsys)
    assert started == {
        "event": "started", "time": "2026-11-18T12:30:00.000000Z", "capture": "a.cwnd", "traced": "everything",
        "probes": {"idle": "fentry"}, "block_probe": "block_io_start",
    }  # fmt: skip
    assert [row["event"] for row in rows] == ["cwnd_reset", "cwnd_recovery", "workloads"]
    view.block.count()
    assert view.block.all().count == 1
    live.JsonView(session(), print_block=True).batch(batch("block_io", frames.block(2)))
    assert [row["event"] for row in objects(capsys)] == ["block_io"]


def test_json_has_what_was_lost_since_the_last_report(clock: HandClock, capsys: Output) -> None:
    of = session()
    view = live.JsonView(of, print_block=False)
    second = frames.SECOND

    def lose(lost: int, begin: int, end: int, *, grow: bool = False) -> None:
        of.tally.lost["block_io"] = lost
        if grow:
            of.tally.lossy[-1].end_ns = frames.MONO + end * second
        else:
            of.tally.lossy.append(Loss("block_io", frames.MONO + begin * second, frames.MONO + end * second, lost))

    def reported(*, last: bool = False) -> list[tuple[int, float, float]]:
        view.tick("waiting", last=last)
        rows = objects(capsys)
        assert all((row["event"], row["of"]) == ("lost", "block_io") for row in rows)
        return [(row["lost"], *((row[at] - frames.MONO) / second for at in ("start_ns", "end_ns"))) for row in rows]

    assert reported() == []
    lose(5, 1, 2)
    assert reported() == [(5, 1, 2)]
    lose(8, 1, 4, grow=True)
    clock.now += 9.9
    assert reported() == []
    clock.now += 0.1
    assert reported() == [(3, 2, 4)]
    clock.now += 60
    assert reported() == []
    lose(9, 6, 7)
    lose(11, 8, 9)
    assert reported(last=True) == [(3, 6, 9)]


@pytest.mark.parametrize("event", ["block_io", "cwnd_reset"])
def test_printing_does_not_keep_the_rings_waiting(event: str, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes too fast in one turn is counted instead, and figures are of all."""
    monkeypatch.setattr(live, "_PRINTED", 3)
    record = {"block_io": frames.block, "cwnd_reset": frames.reset}[event]
    many = batch(event, *(record(n) for n in range(5)))
    text, as_json = text_view(session(), print_block=True), live.JsonView(session(), print_block=True)
    for view in (text, as_json):
        view.batch(many)
        assert view.unprinted == 2
        view.batch(batch(event, *(record(n) for n in range(3))))
        assert view.unprinted == 2
    lines = capsys.readouterr().out.splitlines()
    printed, objects = lines[:7], [json.loads(line) for line in lines[7:]]
    assert [line.startswith("2 lines were not printed") for line in printed] == [False] * 3 + [True] + [False] * 3
    assert [each["event"] for each in objects] == [event] * 3 + ["output_dropped"] + [event] * 3
    assert objects[3]["lines"] == 2
    if event == "block_io":
        text.block.count()
        assert text.block.all().count == 8


@pytest.mark.parametrize(("lines", "words"), [(1, "1 line was not printed"), (2000, "2,000 lines were not printed")])
def test_lines_that_were_dropped_are_counted(lines: int, words: str) -> None:
    assert live.TextView.output_dropped(lines) == (
        f"{words}, because they came too fast for this output; the capture has every record"
    )
    assert json.loads(live.JsonView.output_dropped(lines)) == {"event": "output_dropped", "lines": lines}
