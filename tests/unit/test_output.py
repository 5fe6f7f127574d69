# SPDX-License-Identifier: Apache-2.0
"""Buffered output never blocks, keeps the order of lines, and counts those that weren't printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import pytest

from cwndtrace.cli import output
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.output import OutputError, buffered_output, output_discarded, printing
from tests.harness.command import CHECKOUT, ENVIRONMENT

LINE = "x" * 99


class Reader(threading.Thread):
    """A thread that, once it is started, reads a pipe to its end."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.lines: list[str] = []

    def run(self) -> None:
        with os.fdopen(self.descriptor) as file:
            self.lines = file.read().splitlines()


REOPENED = """
import json, os, sys
from cwndtrace.cli.output import reopen_std_fds
before = os.listdir("/proc/self/fd")
for descriptor in (0, 1, 2):
    os.close(descriptor)
sys.stdout = sys.stderr = None
reopen_std_fds()
there = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in range(3)]
others = sorted(set(os.listdir("/proc/self/fd")) ^ set(before))
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print("nobody reads this", flush=True)
os.write(file, json.dumps(there + others).encode())
"""


def test_closed_standard_streams_are_opened_and_no_others(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", REOPENED, tmp_path / "out"], check=True, cwd=CHECKOUT, env=ENVIRONMENT)
    assert json.loads((tmp_path / "out").read_text()) == ["/dev/null"] * 3


@contextmanager
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Make stdout and stderr one pipe, and yield the thread that can read it."""
    descriptor, writer = os.pipe()
    with os.fdopen(writer, "w") as out, os.fdopen(os.dup(writer), "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        yield Reader(descriptor)


def not_hurried() -> bool:
    return False


@pytest.mark.parametrize("blocking", [True, False])
def test_a_late_reader_gets_all_lines_in_order(monkeypatch: pytest.MonkeyPatch, blocking: bool) -> None:
    with piped(monkeypatch) as reader:
        os.set_blocking(sys.stdout.fileno(), blocking)
        with buffered_output(TextView.output_dropped, not_hurried):
            for number in range(2000):
                with printing():
                    click.echo(f"{number} {LINE}", err=bool(number % 3))
            reader.start()
    reader.join(30)
    assert reader.lines == [f"{number} {LINE}" for number in range(2000)]


def test_lines_beyond_the_buffer_are_counted_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_MOST_WAITING", 200_000)
    with piped(monkeypatch) as reader, buffered_output(JsonView.output_dropped, not_hurried):
        for number in range(10_000):
            click.echo(json.dumps({"number": number, "text": LINE}))
        reader.start()
    reader.join(30)
    *kept, note = [json.loads(line) for line in reader.lines]
    assert [row["number"] for row in kept] == list(range(len(kept)))
    assert 100 < len(kept) < 10_000
    assert note == {"event": "output_dropped", "lines": 10_000 - len(kept)}


def test_printing_continues_after_lines_were_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_MOST_WAITING", 200_000)
    with piped(monkeypatch) as reader, buffered_output(TextView.output_dropped, not_hurried):
        for _ in range(10_000):
            click.echo(LINE)
        reader.start()
        deadline, turns = time.monotonic() + 30, 0
        # Print until a line fits into the buffer again.
        while isinstance(sys.stdout, output._QueuedStream) and sys.stdout._dropped and time.monotonic() < deadline:
            click.echo("more")
            turns += 1
    reader.join(30)
    (note,) = (index for index, line in enumerate(reader.lines) if "not printed" in line)
    assert set(reader.lines[:note]) == {LINE}
    assert set(reader.lines[note + 1 :]) == {"more"}
    lines = int(reader.lines[note].split(" ")[0].replace(",", ""))
    assert lines + len(reader.lines) - 1 == 10_000 + turns


def test_a_hurried_end_does_not_wait_for_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch) as reader:
        with buffered_output(TextView.output_dropped, lambda: True):
            assert isinstance(sys.stdout, output._QueuedStream)
            thread = sys.stdout._output_thread
            for _ in range(2000):
                click.echo(LINE)
        # All output is discarded from now on; otherwise this would block forever.
        click.echo(LINE * 2000)
        sys.stdout.flush()
        os.close(reader.descriptor)
        # Wait for the thread, which could otherwise write its text into the next file that gets this descriptor.
        assert thread.printed(60)


@pytest.mark.parametrize(("path", "nowhere"), [("/dev/null", True), ("/dev/zero", False), ("null", False)])
def test_only_the_null_device_discards_output(path: str, nowhere: bool, tmp_path: Path) -> None:
    with (tmp_path / path).open("wb") as file:  # an absolute path stays as it is
        assert output_discarded(file.fileno()) == nowhere


def test_a_closed_pipe_raises_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch) as reader:
        os.close(reader.descriptor)
        with pytest.raises(OutputError) as error, buffered_output(TextView.output_dropped, not_hurried):
            click.echo(LINE)
        assert not error.value.failed


def test_another_exception_takes_precedence_over_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch) as reader:
        os.close(reader.descriptor)
        with suppress(KeyError), buffered_output(TextView.output_dropped, not_hurried):
            later = sys.stdout
            later.write(LINE)
            raise KeyError
        # Python closes the stream like this when it frees it; from 3.13 on, it prints an error of that.
        later.close()
        with pytest.raises(BrokenPipeError):
            later.flush()


def test_a_closed_stderr_raises_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with buffered_output(TextView.output_dropped, not_hurried):
            for _ in range(10):
                with printing():
                    click.echo("to stderr", err=True)
                    click.echo("to stdout")
    assert capfd.readouterr().out == "to stdout\n" * 10
