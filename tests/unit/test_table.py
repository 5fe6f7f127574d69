# SPDX-License-Identifier: Apache-2.0
"""Tables and prose fit terminals of any width, with names of any script; a pipe gets them uncut."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cwndtrace
from cwndtrace.capture.session import Batch, Session
from cwndtrace.cli import compare, doctor, report, reproduce
from cwndtrace.cli.live import TextView
from cwndtrace.cli.table import (
    Column,
    cells,
    cut,
    cut_connection,
    cut_process,
    prose,
    table,
)
from cwndtrace.lab.statistics import summarise
from cwndtrace.report import content
from tests.harness.replay import Replay
from tests.record import FILE
from tests.unit import frames, hostile, playing

DATA = Path(__file__).parents[1] / "data"
SAMPLE = DATA / "sample.cwnd"
WIDE = "日本語のプロセス"
END = b"\0"
LEFT_OUT = "A wider terminal or pipe has them."


@contextmanager
def terminal(columns: int, encoding: str = "utf-8") -> Iterator[Callable[[], list[str]]]:
    """Make stdout a terminal of ``columns`` columns; yield a function that returns its lines after the exit."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    chunks: list[bytes] = []

    def drain() -> None:
        # Read up to a mark while the other end is still open. A read while it closes may fail although text is left,
        # because n_tty_read() in drivers/tty/n_tty.c checks for text first, and then whether the other end is closed.
        while not (chunks and chunks[-1].endswith(END)):
            chunks.append(os.read(master, 65536))

    def lines() -> list[str]:
        text = b"".join(chunks).removesuffix(END).decode(encoding)
        return click.unstyle(text).replace("\r\n", "\n").split("\n")[:-1]

    reader = threading.Thread(target=drain)
    reader.start()
    stream = os.fdopen(slave, "w", encoding=encoding, errors="replace", closefd=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "__stdout__", stream)
        patch.delenv("COLUMNS", raising=False)
        try:
            yield lines
        finally:
            stream.flush()
            os.write(slave, END)
            reader.join()
            os.close(slave)
            os.close(master)


def printed_lines(columns: int, print_it: Callable[[], object], encoding: str = "utf-8") -> list[str]:
    """Return the lines that ``print_it`` prints in such a terminal, and assert that none is wider."""
    with terminal(columns, encoding) as lines:
        print_it()
    assert lines()
    assert [line for line in lines() if cells(line) > columns] == []
    return lines()


def echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


# ---- cells ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "width"),
    [("abc", 3), ("é", 1), ("e\u0301", 1), ("日本", 4), ("ﾊﾝｶｸ", 4), ("\U0001f4a9", 2), ("각", 2), ("a\u200bb", 2)],
)  # fmt: skip
def test_cells_counts_wide_and_combining_characters(text: str, width: int) -> None:
    assert cells(text) == width


@given(st.text(max_size=40), st.integers(0, 50))
def test_shortened_texts_are_never_wider_than_asked(text: str, most: int) -> None:
    for shorten in (cut, cut_process, cut_connection):
        for name in (text, f"{text}[123]", f"[{text}]:1 > {text}:65535"):
            shortened = shorten(name, most)
            assert cells(shortened) <= most
            assert cells(name) > most or shorten is cut_connection or shortened == name


def test_shortened_texts_keep_the_identifying_parts() -> None:
    assert cut("harmful", 5) == "har.."
    assert cut(WIDE, 7) == "日本.."
    assert cut_process("postgres-checkpointer[12345]", 16) == "postgre..[12345]"
    long = "[2001:db8:1:2:3:4:5:6]:443 > [2001:db8:a:b:c:d:e:f]:53060"
    assert cut_connection(long, 45) == "[2001:db..:4:5:6]:443 > [2001:d..d:e:f]:53060"
    # A short endpoint leaves its unused width to the other one.
    assert cut_connection("10.0.0.1:1 > [2001:db8:a:b:c:d:e:f]:53060", 36).startswith("10.0.0.1:1 > [2001")


# ---- tables and prose -------------------------------------------------------------------------------


COLUMNS = (Column("NAME", least=8), Column("N", right=True), Column("MORE", 1), Column("MOST", 2, right=True))


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    lines = [*table(COLUMNS[:2], [("a", "1"), ("longer", "100")])]
    assert [click.unstyle(line) for line in lines] == ["NAME      N", "a         1", "longer  100"]


def test_a_pipe_gets_uncut_tables_and_prose() -> None:
    lines = [*table(COLUMNS, [("x" * 200, "1", "y" * 200, "z" * 200)])]
    assert len(lines) == 2
    assert [len(part) for part in lines[1].split()] == [200, 1, 200, 200]
    assert prose("a " * 200, None, indent=2) == ["a " * 200]


def test_the_least_important_columns_are_left_out_and_named() -> None:
    rows = [("short", "1", "y" * 10, "z" * 10)]

    def lines(columns: int) -> list[str]:
        return printed_lines(columns, lambda: echo(table(COLUMNS, rows)))

    assert lines(32) == ["NAME   N  MORE              MOST", "short  1  yyyyyyyyyy  zzzzzzzzzz"]
    assert lines(31)[:2] == ["NAME   N  MORE", "short  1  yyyyyyyyyy"]
    assert " ".join(lines(31)[2:]) == f"Left out: MOST. {LEFT_OUT}"
    assert lines(19)[:2] == ["NAME   N", "short  1"]
    assert " ".join(lines(19)[2:]) == f"Left out: MORE, MOST. {LEFT_OUT}"


def test_texts_are_shortened_no_more_than_needed() -> None:
    columns = (Column("A", least=5), Column("B", least=5))
    lines = printed_lines(20, lambda: echo(table(columns, [("a" * 12, "b" * 12), ("c", "d")])))
    assert lines == ["A             B", "aaaaaaaaaaaa  bbbb..", "c             d"]


def test_wide_characters_are_aligned() -> None:
    rows = [(WIDE, "1"), ("e\u0301\u0301", "2"), ("\U0001f4a9" * 5, "3"), ("ascii", "4")]
    for line, (name, number) in zip([*table(COLUMNS[:2], rows)][1:], rows, strict=True):
        assert cells(line) == cells(WIDE) + 3
        assert line == f"{name}{' ' * (cells(WIDE) + 2 - cells(name))}{number}"


def test_names_that_the_locale_cannot_print_are_aligned() -> None:
    rows = [(WIDE, "1"), ("é", "2")]
    lines = printed_lines(40, lambda: echo(table(COLUMNS[:2], rows)), "latin-1")
    assert lines == ["NAME      N", "????????  1", "é         2"]


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]), max_size=200), st.integers(4, 90))
def test_prose_is_broken_between_words_and_keeps_all_text(text: str, width: int) -> None:
    lines = prose(text, width, indent=2)
    assert all(cells(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_prose_keeps_numbers_with_their_units() -> None:
    assert prose("saves about 11.0 s here", 16, indent=2) == ["saves about", "  11.0 s here"]
    assert prose("    mend: it is", 12, indent=6) == ["    mend: it", "      is"]


# ---- output of the commands -------------------------------------------------------------------------


def test_report_fits_its_terminal_and_keeps_keys_and_verdicts() -> None:
    summary = content.report(cwndtrace.load(SAMPLE))

    def print_it() -> None:
        echo(report.lines(summary))

    whole = printed_lines(300, print_it)
    lines = printed_lines(80, print_it)
    assert LEFT_OUT not in " ".join(whole)
    assert LEFT_OUT in " ".join(lines)
    # A connection's line has its full key, and the verdict.
    keys = [match[1] for line in whole if (match := re.match(r"(\S+ > \S+)  ", line))]
    assert keys
    assert [line for line in lines if line.startswith(tuple(keys))] != []
    for key in keys:
        (line,) = (line for line in lines if line.startswith(key))
        assert line.endswith(("  harmful", "  never reset", "  sent by the other end"))
        assert "  python[" in line
    for columns in (40, 60, 100, 132):
        printed_lines(columns, print_it)


@pytest.mark.parametrize("name", hostile.NAMES)
def test_hostile_names_fit_into_80_columns(name: str, tmp_path: Path) -> None:
    trace = hostile.named(tmp_path / "a.cwnd", hostile.NAMES[name])
    summary = content.report(trace)
    printed_lines(80, lambda: echo(report.lines(summary)))
    printed_lines(80, lambda: compare.compare.main([str(trace.path), str(trace.path)], standalone_mode=False))


def test_ipv6_endpoints_fit_into_80_columns(tmp_path: Path) -> None:
    ends = {"family": 6, "saddr": "2001:db8:1111:2222:3333:4444:5555:6666", "daddr": "2001:db8:a:b:c:d:e:ffff"}
    seen = [frames.snapshot(t, bytes_sent=t * 100_000, comm=WIDE, **ends) for t in (0, 9)]
    summary = content.report(frames.capture(tmp_path / "a.cwnd", connections=frames.snapshots(*seen)))
    lines = printed_lines(80, lambda: echo(report.lines(summary)))
    assert any(re.match(r"\[2001:d\S*\.\.\S*6666\]:443 > \[2001:d\S*\.\.\S*ffff\]:\d+ ", line) for line in lines)


def test_compare_fits_its_terminal() -> None:
    def print_it() -> None:
        compare.compare.main([str(SAMPLE), str(SAMPLE)], standalone_mode=False)

    lines = printed_lines(80, print_it)
    assert any(line.split()[0] == "reset_rate" and line.endswith("unsure") for line in lines if line)
    assert f"Left out: 95 % INTERVAL, VALUES. {LEFT_OUT}" in lines


def test_run_and_its_summary_fit_their_terminal(tmp_path: Path) -> None:
    def print_it() -> None:
        playing.played(Replay(FILE), tmp_path, as_json=False, print_block=True)

    header, *lines = printed_lines(80, print_it)
    assert header.split() == ["TIME", "REASON", "CONNECTION", "CWND", "(segments)"]
    assert " ".join(lines[:2]).startswith("Left out: PROCESS, IDLE, RTO, SSTHRESH, SRTT. A wider")
    resets = [line for line in lines if " idle " in line]
    assert resets
    for line in resets:
        assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d  idle +127.0.0.1:\d+ > 127.0.0.1:\d+ +\d+ -> \d+", line)
    summary = next(number for number, line in enumerate(lines) if line.startswith("CONNECTION"))
    assert lines[summary].split()[:3] == ["CONNECTION", "PROCESS", "RESETS"]


def test_run_follows_a_change_of_the_terminals_width() -> None:
    batch = Batch("cwnd_reset", frames.table("cwnd_reset", frames.reset(5)))
    with Session(Replay(FILE)) as session, terminal(80) as lines:
        view = TextView(session, print_block=False, quiet=True)
        view.begin("eth0", FILE)
        view.batch(batch)
        fcntl.ioctl(sys.stdout.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        view.batch(batch)
        view.batch(batch)
    headers = [line.split() for line in lines() if line.startswith("TIME")]
    assert [len(header) for header in headers] == [5, 10]


def test_doctor_fits_its_terminal_and_leaves_nothing_out() -> None:
    facts = [
        doctor.Fact("probe sendmsg", "sees idle, rto_loss (computed by the kernel's rule, confirmed on transmit)" * 2),
        doctor.Fact(f"sysctl in {WIDE * 4}", "can't be read", doctor.LACK, "boot a kernel " * 12),
        doctor.Fact("bcc", "/" + "very/long/path/" * 12, doctor.BAD),
    ]
    findings = doctor.Findings(facts, None)
    lines = printed_lines(80, lambda: doctor._print(findings))
    text = "".join(" ".join(lines).split())
    # The table is complete.
    for fact in facts:
        for part in (*fact.name.split(), *fact.value.split(), *fact.remedy.split()):
            assert part in text or WIDE in part
    assert text.count("日") == 4


def test_reproduce_fits_its_terminal() -> None:
    summary = summarise(pd.read_parquet(DATA / "sample-measurements.parquet"))
    lines = printed_lines(80, lambda: echo(reproduce.costs_of(summary)))
    assert lines[0].split()[:2] == ["BURST", "IDLE"]
    assert "COST" in lines[0]
    assert LEFT_OUT in " ".join(lines)


def test_the_command_fits_a_terminal_and_leaves_nothing_out_of_a_pipe() -> None:
    """The command is run as a process, with a terminal of 80 columns and with a pipe."""
    command = [sys.executable, "-I", "-m", "cwndtrace", "report", str(SAMPLE)]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with terminal(80) as lines:
        subprocess.run(command, stdout=sys.stdout, env=environment, check=True, timeout=120)
    assert max(map(cells, lines())) <= 80
    assert LEFT_OUT in " ".join(lines())
    with terminal(80) as lines:
        subprocess.run(command, stdout=sys.stdout, env=environment | {"COLUMNS": "60"}, check=True, timeout=120)
    assert max(map(cells, lines())) <= 60
    piped = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, timeout=120, text=True).stdout
    assert LEFT_OUT not in piped
    assert "LONGEST IDLE" in piped
