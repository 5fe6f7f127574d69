# SPDX-License-Identifier: Apache-2.0
"""Printing that never waits: nothing is mixed up by it, and what wasn't printed is said."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click
import pytest

from cwndtrace.cli import output
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.output import OutputError, buffered_output, printing

LINE = "x" * 99


class Reader(threading.Thread):
    """Reads all there is, once it is started."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.lines: list[str] = []

    def run(self) -> None:
        with os.fdopen(self.descriptor) as file:
            self.lines = file.read().splitlines()


@contextmanager
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Who is to read stdout and stderr, which are one pipe."""
    descriptor, writer = os.pipe()
    with os.fdopen(writer, "w") as out, os.fdopen(os.dup(writer), "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        yield Reader(descriptor)


def no_hurry() -> bool:
    return False


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_comes_late_gets_all_in_its_order(monkeypatch: pytest.MonkeyPatch, blocking: bool) -> None:
    with piped(monkeypatch) as reader:
        os.set_blocking(sys.stdout.fileno(), blocking)
        with buffered_output(TextView.output_dropped, no_hurry):
            for number in range(2000):
                with printing():
                    click.echo(f"{number} {LINE}", err=bool(number % 3))
            reader.start()
    reader.join(30)
    assert reader.lines == [f"{number} {LINE}" for number in range(2000)]


def test_what_is_too_much_is_counted_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_MOST_WAITING", 200_000)
    with piped(monkeypatch) as reader, buffered_output(JsonView.output_dropped, no_hurry):
        for number in range(10_000):
            click.echo(json.dumps({"number": number, "text": LINE}))
        reader.start()
    reader.join(30)
    *kept, note = [json.loads(line) for line in reader.lines]
    assert [row["number"] for row in kept] == list(range(len(kept)))
    assert 100 < len(kept) < 10_000
    assert note == {"event": "output_dropped", "lines": 10_000 - len(kept)}


def test_it_goes_on_after_what_was_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_MOST_WAITING", 200_000)
    with piped(monkeypatch) as reader, buffered_output(TextView.output_dropped, no_hurry):
        for _ in range(10_000):
            click.echo(LINE)
        reader.start()
        deadline, turns = time.monotonic() + 30, 0
        # Until there was room for one.
        while isinstance(sys.stdout, output._QueuedStream) and sys.stdout._dropped and time.monotonic() < deadline:
            click.echo("more")
            turns += 1
    reader.join(30)
    (note,) = (index for index, line in enumerate(reader.lines) if "weren't printed" in line)
    assert set(reader.lines[:note]) == {LINE}
    assert set(reader.lines[note + 1 :]) == {"more"}
    lines = int(reader.lines[note].split(" ")[0].replace(",", ""))
    assert lines + len(reader.lines) - 1 == 10_000 + turns


def test_who_is_in_a_hurry_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch) as reader:
        with buffered_output(TextView.output_dropped, lambda: True):
            assert isinstance(sys.stdout, output._QueuedStream)
            thread = sys.stdout._output_thread
            for _ in range(2000):
                click.echo(LINE)
        # It would wait for ever otherwise.
        click.echo(LINE * 2000)
        sys.stdout.flush()
        os.close(reader.descriptor)
        # What its thread still has would go into the next file that is opened under this number.
        assert thread.printed(60)


def test_a_reader_that_has_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch) as reader:
        os.close(reader.descriptor)
        with pytest.raises(OutputError) as told, buffered_output(TextView.output_dropped, no_hurry):
            click.echo(LINE)
        assert not told.value.failed


def test_what_ends_for_another_reason_shows_no_error_of_printing(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch) as reader:
        os.close(reader.descriptor)
        with suppress(KeyError), buffered_output(TextView.output_dropped, no_hurry):
            later = sys.stdout
            later.write(LINE)
            raise KeyError
        # As Python does with garbage; from 3.13 on it shows what that raises.
        later.close()
        with pytest.raises(BrokenPipeError):
            later.flush()


def test_an_error_of_stderr_ends_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with buffered_output(TextView.output_dropped, no_hurry):
            for _ in range(10):
                with printing():
                    click.echo("said", err=True)
                    click.echo("shown")
    assert capfd.readouterr().out == "shown\n" * 10
