# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace top`` as plain tables: in a pipe, of captures in every state, and with hostile names."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cwndtrace import cli
from cwndtrace.cli import top as command
from cwndtrace.cli import top_feed
from cwndtrace.cli.top_pages import PAGES, bars
from cwndtrace.top.history import BARS, PLAIN_BARS
from tests.harness.tcp import until
from tests.harness.top import next_table, watching
from tests.unit import frames, hostile
from tests.unit.writing import written

ONCE = ("--once", "--page")


def call(*arguments: str) -> str:
    result = CliRunner().invoke(cli.main, ["top", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def heading(line: str) -> str:
    return line.split("; ")[0].rsplit(", ", 1)[0].split(": ", 1)[1]


@pytest.mark.parametrize("page", list(PAGES))
def test_each_page_is_a_table(tmp_path: Path, page: str) -> None:
    frames.two_idle_connections(tmp_path / "a.cwnd")
    head, titles, *rows = call(str(tmp_path / "a.cwnd"), *ONCE, page).splitlines()
    assert head.startswith("a.cwnd: the trace is complete, 1 min 00 s; 21 resets; cost 7.77 s (measured)")
    for figure in PAGES[page].figures:
        assert figure.column.title in titles
    assert {"connections": 2, "workloads": 1, "devices": 2, "resets": 21}[page] == sum(bool(row) for row in rows)
    width = titles.index(PAGES[page].figures[0].column.title)
    assert all(len(row) > width for row in rows if row)


def test_connections_that_cost_most_come_first(tmp_path: Path) -> None:
    frames.two_idle_connections(tmp_path / "a.cwnd")
    _, _, first, second, *_ = call(str(tmp_path / "a.cwnd"), "--once").splitlines()
    assert (first.split()[-2:], second.split()[-2:]) == (["4.37", "s"], ["3.41", "s"])


def test_rows_are_as_many_as_asked(tmp_path: Path) -> None:
    frames.two_idle_connections(tmp_path / "a.cwnd")
    lines = call(str(tmp_path / "a.cwnd"), *ONCE, "resets", "--rows", "5").splitlines()
    assert len(lines) == 9
    assert lines[-2] == "and 16 more"


@pytest.mark.quick(8)
@pytest.mark.parametrize("name", hostile.NAMES)
@pytest.mark.parametrize("page", list(PAGES))
def test_hostile_names_are_harmless(tmp_path: Path, page: str, name: str) -> None:
    hostile.named(tmp_path / "a.cwnd", hostile.NAMES[name])
    output = call(str(tmp_path / "a.cwnd"), *ONCE, page)
    assert [line for line in output.split("\n") if not line.isprintable()] == []


def test_a_name_of_a_capture_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m[red]\n.cwnd"
    frames.two_idle_connections(path)
    assert call(str(path), "--once").startswith("?[31m[red]?.cwnd: ")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("missing.cwnd",), "There is no missing.cwnd"),
        (("a.cwnd", "--port", "80"), "filters and -o are for a trace that top starts"),
        (("a.cwnd", "-o", "b.cwnd"), "filters and -o are for a trace that top starts"),
    ],
)
def test_a_mistake_is_named(arguments: tuple[str, ...], cause: str) -> None:
    result = CliRunner().invoke(cli.main, ["top", *arguments])
    assert result.exit_code != 0
    assert result.output.startswith(f"cwndtrace: {cause}")


def test_what_cannot_be_read_is_said_above_the_table(tmp_path: Path) -> None:
    frames.two_idle_connections(tmp_path / "a.cwnd")
    (tmp_path / "a.cwnd" / "block_io" / "part-000001.parquet").write_bytes(b"PAR1")
    head, warning, titles, *_ = call(str(tmp_path / "a.cwnd"), "--once").splitlines()
    assert head.startswith("a.cwnd: ")
    assert warning.startswith("warning: block_io/part-000001.parquet ")
    assert titles.startswith("CONNECTION ")


@pytest.mark.parametrize(
    ("encoding", "characters"), [("utf-8", BARS), ("UTF8", BARS), ("latin-1", PLAIN_BARS), (None, PLAIN_BARS)]
)
def test_bars_are_of_characters_that_can_be_printed(
    monkeypatch: pytest.MonkeyPatch, encoding: str | None, characters: str
) -> None:
    monkeypatch.setattr("sys.stdout", SimpleNamespace(encoding=encoding))
    assert bars() == characters


def test_tracing_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    result = CliRunner().invoke(cli.main, ["top"])
    assert (result.exit_code, result.output.splitlines()[0]) == (1, "cwndtrace: tracing needs root")


@pytest.mark.slow
def test_tables_follow_a_running_trace_until_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    with written(path, 3) as writer, watching(path) as top:
        first = next_table(top)
        while "3 open" not in first[0]:
            assert heading(first[0]) == "running"
            first = next_table(top)

        def resets(head: str) -> int:
            return int(head.split("; ")[1].split()[0])

        second = next_table(top)
        while resets(second[0]) <= resets(first[0]):
            second = next_table(top)
        assert len(second) == 5
        assert writer.stdin is not None
        writer.stdin.close()
        last = second
        while lines := next_table(top):
            last = lines
        assert heading(last[0]) == "the trace is complete"
        assert top.wait(30) == 0


@pytest.mark.slow
def test_tables_end_where_the_trace_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    with written(path, 3) as writer, watching(path) as top:
        next_table(top)
        writer.kill()
        writer.wait()
        last: list[str] = []
        while lines := next_table(top):
            last = lines
        assert heading(last[0]) == "the trace was cut short: its process is gone"
        assert top.wait(30) == 0


@pytest.mark.slow
def test_tables_end_with_an_error_where_the_capture_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    with written(path, 3), watching(path) as top:
        before = next_table(top)
        path.rename(tmp_path / "b.cwnd")
        shutil.rmtree(tmp_path / "b.cwnd", ignore_errors=True)
        last: list[str] = []
        while lines := next_table(top):
            last = lines
        assert heading(last[0]) == "the capture was deleted: this is what it held"
        assert len(last) == len(before)
        assert top.wait(30) == 1
        assert top.stderr is not None
        assert top.stderr.read() == "cwndtrace: The capture was deleted.\n  The table above is the last of it.\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with written(tmp_path / "a.cwnd", 3), watching(tmp_path / "a.cwnd") as top:
        next_table(top)
        top.send_signal(number)
        assert top.wait(30) == 0
        assert top.stderr is not None
        assert top.stderr.read() == ""


@pytest.mark.slow
def test_it_ends_when_nobody_reads_it(tmp_path: Path) -> None:
    with written(tmp_path / "a.cwnd", 3), watching(tmp_path / "a.cwnd") as top:
        next_table(top)
        assert top.stdout is not None
        top.stdout.close()
        assert top.wait(30) == 0


@pytest.mark.slow
def test_it_ends_after_its_duration(tmp_path: Path) -> None:
    with written(tmp_path / "a.cwnd", 3):
        begin = time.monotonic()
        with watching(tmp_path / "a.cwnd", "-d", "3s") as top:
            until(lambda: top.poll() is not None, 60, "top to end")
            assert top.returncode == 0
    assert time.monotonic() - begin >= 3


def test_a_table_comes_each_second_until_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, read = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(top_feed, "lines", lambda *_: [f"{now:.0f}"])
    feed = SimpleNamespace(read=lambda: read.append(now), follower=SimpleNamespace(status="running", behind=False))
    command._print_tables(feed, "connections", most=10, duration_s=2.5, once=False)
    assert capsys.readouterr().out.split() == ["100", "101", "102"]
    assert len(read) == 3
    assert now == pytest.approx(102.5, abs=0.2)
