# SPDX-License-Identifier: Apache-2.0
"""Tables and prose fit terminals of any width, with names of any script; a pipe gets them uncut."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cwndtrace
from cwndtrace.capture.session import Batch
from cwndtrace.cli import doctor, main, report, reproduce
from cwndtrace.cli import summary as summary_of_a_run
from cwndtrace.cli.live import BlockFigures, ConnectionHolders, TextView
from cwndtrace.cli.summary import print_summary, summary_object
from cwndtrace.cli.table import (
    Column,
    cells,
    cut,
    cut_connection,
    cut_middle,
    cut_process,
    cut_service,
    prose,
    table,
)
from cwndtrace.lab.statistics import summarise
from cwndtrace.records import arrow, layout
from cwndtrace.report import content
from tests.harness.replay import Replay
from tests.harness.users import need_command
from tests.record import FILE
from tests.unit import frames, hostile, playing
from tests.unit.fake_source import session_of
from tests.unit.terminal import printed_lines, terminal

DATA = Path(__file__).parents[1] / "data"
SAMPLE = DATA / "sample.cwnd"
WIDE = "日本語のプロセス"
LEFT_OUT = "A wider terminal or pipe has them."


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
    for shorten in (cut, cut_middle, cut_process, cut_service, cut_connection):
        for name in (text, f"{text}[123]", f"{text}:443", f"[{text}]:1 > {text}:65535"):
            shortened = shorten(name, most)
            assert cells(shortened) <= most
            assert cells(name) > most or shorten is cut_connection or shortened == name


def test_shortened_texts_keep_the_identifying_parts() -> None:
    assert cut("harmful", 5) == "har.."
    assert cut(WIDE, 7) == "日本.."
    assert cut_process("postgres-checkpointer[12345]", 16) == "postgre..[12345]"
    # Of a thread and its process the latter's name stays.
    assert cut_process("grpc/event_engine[12345]", 16) == "grpc/ev..[12345]"
    assert cut_process("grpc/a[b]c[12345]", 14) == "grpc/..[12345]"
    assert cut_service("postgres-proxy:5432", 14) == "post..oxy:5432"
    assert cut_service("outgoing event_engine", 14) == cut_middle("outgoing event_engine", 14) == "outgoi..engine"
    assert cut_middle("default/web-7d9c5b8f6d-x2x4q/nginx", 15) == "default../nginx"
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


SERVED = [
    {"workload": "default/web-7d9c5b8f6d-x2x4q/nginx", "process": "nginx", "listener": "nginx", "listener_pid": 7},
    {"workload": "postgresql@15-main.service", "process": "postgres", "listener": "", "listener_pid": 0},
    {"workload": WIDE, "process": WIDE, "listener": WIDE, "listener_pid": 9},
]


def served(path: Path) -> cwndtrace.Trace:
    """Return a trace of 30 connections of three workloads, each of which has a local address of its own."""
    seen = [
        frames.snapshot(at, sock_cookie=n, saddr=f"10.1.0.{n}", bytes_sent=at * 100_000)
        for at in (0, 9)
        for n in range(1, 31)
    ]
    resets = frames.table("cwnd_reset", frames.reset(5, sock_cookie=1, saddr="10.1.0.1", bytes_sent=500_000))
    return frames.named(frames.capture(path, resets=resets, connections=frames.snapshots(*seen)), *SERVED)


def test_groups_fit_80_and_140_columns_and_keep_names_and_verdicts(tmp_path: Path) -> None:
    found = content.report(served(tmp_path / "a.cwnd"))

    def table_of(columns: int) -> list[str]:
        lines = printed_lines(columns, lambda: echo(report.lines(found)))
        at = next(number for number, line in enumerate(lines) if line.startswith("WORKLOAD"))
        return lines[at : at + 5]

    head, first, *others, left_out = table_of(80)
    assert head.split() == ["WORKLOAD", "SERVICE", "CONNECTIONS", "RESETS", "COST", "VERDICT"]
    assert re.fullmatch(r"default..q/nginx +nginx:443 +10 +1 +\d+ ms  harmful \(1 of 10\)", first)
    names = [re.split(r"  +", line)[:2] for line in others]
    assert names == [["postgre..service", "outgoi..stgres"], [WIDE, "日本..セス:443"]]
    assert left_out.startswith("Left out: HARMFUL, CAUSE, WORST CONNECTION, ITS COST. ")
    head, first, *others, left_out = table_of(140)
    assert left_out == f"Left out: ITS COST. {LEFT_OUT}"
    shown = dict(zip(re.split(r"  +", head), re.split(r"  +", first), strict=True))
    assert shown["WORST CONNECTION"] == "10.1.0.1:443 > 10.2.0.9:51324"
    assert (shown["CAUSE"], shown["HARMFUL"], shown["VERDICT"]) == ("application", "1", "harmful (1 of 10)")
    # Of connections that were never reset, none is the worst one.
    assert all(" -  " in line for line in others)
    for columns in (40, 60, 100, 200):
        printed_lines(columns, lambda: echo(report.lines(found)))


def test_the_summary_of_a_run_begins_with_a_row_for_each_service(tmp_path: Path) -> None:
    trace = served(tmp_path / "a.cwnd")
    with session_of(Replay(FILE)) as session:
        lines = printed_lines(160, lambda: print_summary(trace, session, BlockFigures()))
        found = summary_object(trace, session, BlockFigures())
        lines_of_one = printed_lines(80, lambda: print_summary(named_alike(tmp_path), session, BlockFigures()))
    heads = [line.split()[0] for line in lines if line[:4].isupper()]
    assert heads == ["WORKLOAD", "CONNECTION"]
    at = next(number for number, line in enumerate(lines) if line.startswith("CONNECTION"))
    assert lines[at + 9].startswith("and 22 more connections: no reset")
    assert [row["connections"] for row in found["groups"]] == [10, 10, 10]
    assert sum(row["lost_us"] for row in found["groups"]) == trace.summary()["lost_us"].sum() > 0
    assert {row["service"] for row in found["connections"]} == {"nginx:443", "", f"{WIDE}:443"}
    # A missing figure is null, because NaN isn't JSON.
    json.dumps(found, allow_nan=False)
    assert " ".join(lines_of_one).strip().startswith(f"All 4 connections are of {WIDE}:443 in {WIDE}. CONNECTION")


def named_alike(folder: Path) -> cwndtrace.Trace:
    seen = [frames.snapshot(at, sock_cookie=n) for at in (0, 9) for n in range(4)]
    return frames.named(frames.capture(folder / "b.cwnd", connections=frames.snapshots(*seen)), SERVED[2])


def test_the_summary_reads_few_block_requests_and_only_for_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, records = BlockFigures(), np.zeros(50, layout.event("block_io").dtype).tobytes()
    block.add(Batch("block_io", arrow.TimedRecords("block_io", records, np.zeros(50, np.int64))))
    for most, read in ((50, True), (49, False)):
        monkeypatch.setattr(summary_of_a_run, "_MOST_REQUESTS", most)
        trace = served(tmp_path / f"{most}.cwnd")
        with session_of(Replay(FILE)) as session:
            found = summary_object(trace, session, block)
        assert ("_verdicts" in trace.__dict__) == read
        assert [bool(row["cause"]) for row in found["groups"]] == [read, False, False]


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", hostile.NAMES)
def test_hostile_names_fit_into_80_columns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = hostile.named(tmp_path / "a.cwnd", hostile.NAMES[name])
    monkeypatch.setattr(cwndtrace, "load", lambda *_, **__: trace)
    summary = content.report(trace)
    printed_lines(80, lambda: echo(report.lines(summary)))
    printed_lines(80, lambda: main(["compare", str(trace.path), str(trace.path)], standalone_mode=False))


def test_ipv6_endpoints_fit_into_80_columns(tmp_path: Path) -> None:
    ends = {"family": 6, "saddr": "2001:db8:1111:2222:3333:4444:5555:6666", "daddr": "2001:db8:a:b:c:d:e:ffff"}
    seen = [frames.snapshot(t, bytes_sent=t * 100_000, comm=WIDE, **ends) for t in (0, 9)]
    summary = content.report(frames.capture(tmp_path / "a.cwnd", connections=frames.snapshots(*seen)))
    lines = printed_lines(80, lambda: echo(report.lines(summary)))
    assert any(re.match(r"\[2001:d\S*\.\.\S*6666\]:443 > \[2001:d\S*\.\.\S*ffff\]:\d+ ", line) for line in lines)


def test_compare_fits_its_terminal() -> None:
    def print_it() -> None:
        main(["compare", str(SAMPLE), str(SAMPLE)], standalone_mode=False)

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


def test_the_line_of_a_reset_names_the_process_and_its_thread() -> None:
    row = {"tgid": 7, "comm": "event_engine"}
    assert ConnectionHolders().of(row | {"process": "grpc"}) == ("grpc", 7, "event_engine")
    assert ConnectionHolders().of(row) == ConnectionHolders().of(row | {"process": ""})
    assert ConnectionHolders().of(row) == ("event_engine", 7, "event_engine")


def test_run_follows_a_change_of_the_terminals_width() -> None:
    batch = Batch("cwnd_reset", frames.table("cwnd_reset", frames.reset(5)))
    with session_of(Replay(FILE)) as session, terminal(80) as lines:
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
        doctor.Fact("probe sendmsg", "sees idle, rto_loss (computed by the kernel's rule, confirmed by an ACK)" * 2),
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


@pytest.mark.slow
def test_the_command_fits_a_terminal_and_leaves_nothing_out_of_a_pipe() -> None:
    """The command is run as a process, with a terminal of 80 columns and with a pipe."""
    need_command()
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
