# SPDX-License-Identifier: Apache-2.0
"""Conditions are parsed and never evaluated, and dumps come when they should, and no more often."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.capture.session import Batch
from cwndtrace.cli import triggers as module
from cwndtrace.cli.conditions import Condition
from cwndtrace.cli.interrupt import DumpSignal
from cwndtrace.cli.triggers import Triggers
from cwndtrace.errors import CaptureError, UsageError
from cwndtrace.records import arrow, layout
from cwndtrace.store import CaptureWriter, ThreadedWriter
from cwndtrace.store.dump import dump
from cwndtrace.trace import load
from tests.harness.tcp import until
from tests.unit import frames


def batch(event: str, *records: layout.Records) -> Batch:
    rows = np.concatenate(records)
    return Batch(event, arrow.TimedRecords(event, rows.tobytes(), np.full(len(rows), frames.OFFSET, np.int64)))


def costs(*milliseconds: float) -> Batch:
    return batch("cwnd_recovery", *(frames.recovered(cost_us=int(ms * 1000)) for ms in milliseconds))


def resets(number: int) -> Batch:
    return batch("cwnd_reset", *(frames.reset() for _ in range(number)))


def latencies(*milliseconds: float) -> Batch:
    return batch("block_io", *(frames.block(latency_us=ms * 1000) for ms in milliseconds))


# ---- conditions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "batches", "met"),
    [
        ("cost > 200ms", [costs(10, 201, 3)], True),
        ("cost > 200ms", [costs(200)], False),
        ("cost >= 200ms", [costs(200)], True),
        ("cost>0.2s", [costs(199), costs(201)], True),
        ("cost > 200ms", [latencies(900), resets(5)], False),
        ("block_latency > 500ms", [latencies(1, 2, 501)], True),
        ("block_latency > 500ms", [latencies(1, 2, 499)], False),
        ("block_latency > 1m", [latencies(59_999)], False),
        ("resets > 3/min", [resets(4)], True),
        ("resets > 3/min", [resets(3)], False),
        ("resets >= 3 / h", [resets(2), resets(1)], True),
        ("resets >= 0/s", [], True),
        (" cost  >  200000us ", [costs(200.001)], True),
    ],
)
def test_conditions(text: str, batches: list[Batch], met: bool) -> None:
    assert Condition(text).met(batches, 0.0) is met


def test_resets_count_for_one_period() -> None:
    condition = Condition("resets > 10/min")
    met = {second: condition.met([resets(1)] if second < 100 else [], float(second)) for second in range(0, 200, 5)}
    assert [second for second, there in met.items() if there] == list(range(50, 105, 5))


def test_the_rate_of_weeks_takes_no_memory() -> None:
    condition = Condition("resets > 1000000/h")
    one = [resets(1)]
    for turn in range(50_000):
        condition.met(one, turn * 0.5)
    assert len(condition._recent) <= 61


@pytest.mark.parametrize(
    "text",
    [
        "", "cost", "cost > ", "cost > 200", "cost < 200ms", "cost > -1ms", "cost == 1ms", "cost > 1ms or resets > 1/s",
        "__import__('os')", "cost > 200ms; x", "cost > 1e9ms", "latency > 1ms", "resets > 100", "resets > 100ms",
        "resets > 1/day", "cost > 3/min", "block_latency > ٣ms", "cost > 9999999999999999s", "cost > 1ms\0",
    ],
)  # fmt: skip
def test_what_is_no_condition_has_a_cause_and_a_cure(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        Condition(text)
    assert "\n" not in refused.value.cause
    assert refused.value.remedy == "write 'cost > 200ms', 'resets > 100/min' or 'block_latency > 500ms'"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("cost < 1ms", "'cost < 1ms' isn't a condition"),
        ("rate > 1ms", "there is no metric rate; there are cost, resets, block_latency"),
        ("resets > 9ms", "'resets > 9ms' doesn't compare resets with a number per time"),
        ("cost > 3/min", "'cost > 3/min' doesn't compare cost with a time"),
    ],
)
def test_what_is_wrong_with_a_condition_is_said(text: str, cause: str) -> None:
    with pytest.raises(UsageError) as refused:
        Condition(text)
    assert refused.value.cause == cause


@given(st.text(max_size=30) | st.from_regex(r"\w+ ?[<>]=? ?\d+/?\w*", fullmatch=True))
def test_any_text_is_a_condition_or_an_error(text: str) -> None:
    try:
        Condition(text)
    except UsageError:
        return
    assert any(text.strip().startswith(name) for name in ("cost", "resets", "block_latency"))


# ---- dumps -----------------------------------------------------------------------------------------


class TriggeredTrace:
    """A trace of block requests with triggers, which began a minute ago.

    ``said`` has what the triggers said, ``asked`` what a person asks for.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        now = time.monotonic_ns() - 60 * frames.SECOND
        moment = {"mono_ns": now, "utc_offset_ns": frames.OFFSET}
        about = frames.meta(clock={"start": moment, "end": None, "segments": [moment]})
        self.writer = ThreadedWriter(CaptureWriter.create(path, about))
        self.path = path
        self.asked = False
        self.said: list[tuple[str, ...]] = []
        self.sector = 0
        self.read_ns: int | None = None
        """Up to when all is read; None for now."""
        values: dict[str, Any] = {
            "conditions": [],
            "every_s": 600.0,
            "most": 10,
            "window_s": None,
            **options,
        }
        self.triggers = Triggers(
            self.writer,
            read_ns=lambda: time.monotonic_ns() if self.read_ns is None else self.read_ns,
            asked=self._asked,
            user=None,
            say=lambda *news: self.said.append(news),
            **values,
        )

    def _asked(self) -> bool:
        asked, self.asked = self.asked, False
        return asked

    def add(self, latency_us: float = 100.0, ago_s: int = 0) -> list[Batch]:
        start = time.monotonic_ns() - ago_s * frames.SECOND
        record = frames.block(latency_us=latency_us, sector=self.sector)
        record["start_ns"], record["done_ns"] = start, start + int(latency_us * 1000)
        self.sector += 1
        batches = [batch("block_io", record)]
        for each in batches:
            self.writer.add(each.event, each.rows)
        return batches

    def turn(self, batches: list[Batch]) -> None:
        assert self.triggers.turn(batches)

    def until_said(self, number: int) -> None:
        def said() -> bool:
            self.turn([])
            return len(self.said) >= number

        until(said, 30, f"{number} dumps")

    def end(self) -> None:
        self.triggers.finish([])
        self.writer.close()

    def dumps(self) -> list[Path]:
        return sorted(self.path.parent.glob("a-dump-*.cwnd"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AFTER_S", 0.0)
    monkeypatch.setattr(module, "ARRIVED_S", 0.0)
    numbers = iter(range(1000))
    monkeypatch.setattr(module, "beside", lambda path: path.with_name(f"a-dump-{next(numbers):03}.cwnd"))


def test_a_signal_dumps_all_that_came_before(tmp_path: Path) -> None:
    traced = TriggeredTrace(tmp_path / "a.cwnd")
    for _ in range(20):
        traced.turn(traced.add())
    traced.asked = True
    traced.turn([])
    traced.until_said(1)
    (made,) = traced.dumps()
    assert load(made).block_io["sector"].tolist() == list(range(20))
    assert load(made).meta["dump"] == {"capture": "a.cwnd", "why": "SIGUSR1"}
    ((said,),) = traced.said
    assert said.startswith(f"dumped to {made} because of SIGUSR1: 0 resets, 20 block I/Os, 0 snapshots, ")
    traced.end()
    assert len(traced.dumps()) == 1


def test_a_dump_waits_until_all_of_its_span_is_read(tmp_path: Path) -> None:
    """A loop that is late, because it prints or waits for a CPU, reads the records of a moment long after it."""
    traced = TriggeredTrace(tmp_path / "a.cwnd")
    traced.read_ns = time.monotonic_ns()
    traced.asked = True
    traced.turn([])
    late = traced.add()
    assert traced.triggers._thread is None
    traced.read_ns = time.monotonic_ns()
    traced.turn(late)
    traced.until_said(1)
    traced.end()


def test_a_condition_dumps_once_in_a_time(tmp_path: Path) -> None:
    traced = TriggeredTrace(tmp_path / "a.cwnd", conditions=[Condition("block_latency > 1ms")])
    traced.turn(traced.add(900))
    assert traced.triggers._thread is None
    for _ in range(5):
        traced.turn(traced.add(1001))
    traced.until_said(1)
    for _ in range(5):
        traced.turn(traced.add(1001))
    traced.asked = True  # a person may ask whenever
    traced.turn([])
    traced.until_said(2)
    traced.end()
    first, second = (load(path).meta["dump"]["why"] for path in traced.dumps())
    assert (first, second) == ("block_latency > 1ms", "SIGUSR1")


def test_a_moment_that_is_asked_for_stays_while_its_dump_is_not_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AFTER_S", 1000.0)
    traced = TriggeredTrace(tmp_path / "a.cwnd", conditions=[Condition("block_latency > 1ms")])
    traced.turn(traced.add(2000.0))
    first = traced.triggers._pending
    traced.asked = True
    traced.turn(traced.add())
    assert first is not None
    assert (traced.triggers._pending, first[1]) == (first, "block_latency > 1ms")
    traced.end()


def test_the_oldest_dumps_are_removed(tmp_path: Path) -> None:
    traced = TriggeredTrace(tmp_path / "a.cwnd", conditions=[Condition("block_latency > 1ms")], every_s=0.0, most=2)
    for number in range(1, 5):
        traced.turn(traced.add(2000))
        traced.until_said(number)
    traced.end()
    assert [path.name for path in traced.dumps()] == ["a-dump-002.cwnd", "a-dump-003.cwnd"]
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_the_dump_has_the_window_around_its_moment(tmp_path: Path) -> None:
    traced = TriggeredTrace(tmp_path / "a.cwnd", window_s=25.0)
    traced.turn(traced.add(ago_s=26))
    traced.turn(traced.add())
    traced.asked = True
    traced.turn([])
    traced.until_said(1)
    traced.end()
    (made,) = traced.dumps()
    assert load(made).block_io["sector"].tolist() == [1]
    about = load(made).about
    assert about.begin
    assert about.end
    assert about.end.mono_ns - about.begin.mono_ns == 25 * frames.SECOND


def test_a_dump_that_is_asked_for_at_the_end_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AFTER_S", 3600.0)
    traced = TriggeredTrace(tmp_path / "a.cwnd")
    traced.asked = True
    traced.turn(traced.add())
    assert traced.dumps() == []
    traced.end()
    (made,) = traced.dumps()
    assert load(made).status == "complete"
    assert len(load(made).block_io) == 1


def test_a_dump_that_fails_says_why_and_the_trace_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = TriggeredTrace(tmp_path / "a.cwnd")

    def refuse(*_: Any, **__: Any) -> None:
        raise CaptureError("b.cwnd can't be made: No space left on device.", "Free some space.")

    monkeypatch.setattr(module, "dump", refuse)
    traced.turn(traced.add())
    traced.asked = True
    traced.until_said(1)
    assert traced.said == [
        ("the dump for SIGUSR1 failed: b.cwnd can't be made: No space left on device.", "Free some space.")
    ]
    traced.turn(traced.add())
    traced.end()
    assert len(load(tmp_path / "a.cwnd").block_io) == 2


def test_a_dump_never_holds_up_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def stuck(*arguments: Any, **options: Any) -> Any:
        assert go_on.wait(30)
        return dump(*arguments, **options)

    monkeypatch.setattr(module, "dump", stuck)
    traced = TriggeredTrace(tmp_path / "a.cwnd")
    traced.asked = True
    for _ in range(100):
        traced.turn(traced.add())
    assert traced.said == []
    go_on.set()
    traced.until_said(1)
    traced.end()


def test_the_signal_counts_once_until_it_is_taken() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with DumpSignal() as asked:
        assert not asked.taken()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: asked._asked, 10, "the signal")
        assert asked.taken()
        assert not asked.taken()
    assert signal.getsignal(signal.SIGUSR1) is before
