# SPDX-License-Identifier: Apache-2.0
"""Connections that mostly receive are found, in a capture and while it is traced, and their senders are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cwndtrace.analysis import connections
from cwndtrace.analysis.direction import Receivers, mostly_receives
from cwndtrace.capture.session import Batch
from cwndtrace.capture.source import Filters
from cwndtrace.cli.console import Console, InterfaceWatch
from cwndtrace.cli.live import JsonView
from cwndtrace.present.direction import elsewhere
from cwndtrace.report import content
from tests.unit import frames
from tests.unit.fake_source import FakeSource, session_of

NO_RESET = frames.pandas(frames.table("cwnd_reset"))
MB = 1_000_000


def seen(at_s: float, cookie: int = 1, *, sent: int = 0, received: int | None = 0, **fields: Any) -> dict[str, Any]:
    """Return a row of a snapshot; a cookie has a local port of its own."""
    ends = {"sport": 40_000 + cookie, "daddr": "192.0.2.7", "dport": 443}
    return frames.snapshot(
        at_s, sock_cookie=cookie, **(ends | {"bytes_sent": sent, "bytes_received": received} | fields)
    )


def row_of(*rows: dict[str, Any]) -> dict[Any, Any]:
    summary = connections.summary(NO_RESET, frames.pandas(frames.snapshots(*rows)))
    return dict(summary[summary["sock_cookie"] == 1].iloc[0])


@pytest.mark.parametrize(
    ("sent", "received", "expected"),
    [
        (0, 10_000, False),
        (0, 10_001, True),
        (2_000, 20_000, True),
        (2_001, 20_000, False),
        (MB, MB, False),
        (MB, 0, False),
    ],
)
def test_a_connection_mostly_receives_above_a_ratio_and_a_size(sent: int, received: int, expected: bool) -> None:
    assert mostly_receives(sent, received) == expected


def test_what_came_in_before_the_first_snapshot_does_not_count() -> None:
    row = row_of(seen(0, sent=9, received=5 * MB), seen(9, sent=MB, received=6 * MB))
    assert (row["bytes_received"], row["received_bytes"], row["mostly_receives"]) == (6 * MB, MB, False)
    row = row_of(seen(0, sent=5 * MB, received=9), seen(9, sent=5 * MB + 9, received=MB + 9))
    assert (row["received_bytes"], row["mostly_receives"]) == (MB, True)


def test_a_later_connection_counts_from_its_beginning() -> None:
    row = row_of(seen(0, 2), seen(5, received=MB))
    assert (row["received_bytes"], row["mostly_receives"]) == (MB, True)


@pytest.mark.parametrize(
    "rows",
    [
        [seen(0, received=None), seen(9, received=None)],  # an older version
        [seen(0, received=MB)],  # all of it may have come in before
    ],
)
def test_an_unknown_direction_is_missing(rows: list[dict[str, Any]]) -> None:
    row = row_of(*rows)
    assert pd.isna(row["received_bytes"])
    assert row["mostly_receives"] is pd.NA


def test_a_connection_that_is_closed_by_rst_has_no_negative_count() -> None:
    row = row_of(seen(0, sent=MB, received=MB), seen(9))
    assert (row["received_bytes"], row["mostly_receives"]) == (0, False)


# ---- while it is traced -----------------------------------------------------------------------------


def shown(*snapshots: list[dict[str, Any]]) -> list[list[int] | None]:
    """Return the cookies that each snapshot gives, in turn."""
    receivers = Receivers()
    found = [receivers.add(frames.snapshots(*rows)) for rows in snapshots]
    return [None if table is None else table["sock_cookie"].to_pylist() for table in found]


def test_all_connections_that_move_data_have_to_receive() -> None:
    first = [seen(0, 1, received=MB), seen(0, 2, sent=MB), seen(0, 3)]
    assert shown(first, first) == [None, None]
    # The second one is idle. Its counters are those of before.
    assert shown(first, [seen(2, 3), seen(2, 2, sent=MB), seen(2, 1, received=2 * MB)]) == [None, [1]]
    sends = [seen(2, 1, received=2 * MB), seen(2, 2, sent=2 * MB)]
    later = [seen(4, 1, received=3 * MB), seen(4, 2, sent=2 * MB)]
    assert shown(first, sends, later) == [None, None, None]
    # What goes both ways counts as a whole.
    both = [seen(2, 1, received=2 * MB), seen(2, 2, sent=MB + 6_000, received=6_000)]
    assert shown(first, both) == [None, None]


def test_a_new_connection_counts_from_its_beginning() -> None:
    assert shown([seen(0, 1)], [seen(2, 1), seen(2, 2, received=MB)]) == [None, [2]]
    assert shown([], [seen(2, 2, received=MB)], [seen(4, 2, sent=MB, received=MB)]) == [None, [2], None]


def test_equal_cookies_of_two_namespaces_are_two_connections() -> None:
    first = [seen(0, 1, received=MB), seen(0, 1, netns_ino=7)]
    assert shown(first, [seen(2, 1, netns_ino=7), seen(2, 1, received=MB)]) == [None, None]


@pytest.mark.parametrize("quiet", [False, True])
def test_run_says_once_on_stderr_where_to_trace_instead(capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    session = session_of(FakeSource())
    session.tally.kept["cwnd_reset"] = 1
    watch = InterfaceWatch(session, Filters(), None)
    view = JsonView(session, print_block=False)
    console = Console(view, session, watch, what="eth0", quiet=quiet, stop_when_refused=False)
    for second in (0, 2, 4):
        rows = [seen(second, 1, received=second * MB), seen(second, 2)]
        console.turn([Batch("connections", frames.snapshots(*rows))])
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    line = (
        "warning: 1 of 2 connections mostly receives: its sender is at the other end (192.0.2.7, port 443). "
        "Its window is kept there: run `sudo cwndtrace run --port 443` on 192.0.2.7.\n"
    )
    assert stderr == ("" if quiet else line)


# ---- in words ---------------------------------------------------------------------------------------


def end(daddr: str, sport: int, dport: int) -> dict[str, Any]:
    return {"saddr": "192.0.2.1", "sport": sport, "daddr": daddr, "dport": dport}


def test_the_port_is_that_of_the_service_at_whichever_end() -> None:
    text = elsewhere([end("192.0.2.7", 443, 50_001), end("192.0.2.7", 443, 50_002)], 9)
    assert text.startswith(
        "2 of 9 connections mostly receive: their senders are at the other end (192.0.2.7, port 443)"
    )
    assert text.endswith("Their windows are kept there: run `sudo cwndtrace run --port 443` on 192.0.2.7.")


def test_many_senders_are_named_in_part() -> None:
    ends = [end(f"192.0.2.{n}", 50_000 + n, 443) for n in (7, 7, 8, 9, 10, 11)]
    text = elsewhere(ends, 6)
    assert "(192.0.2.7, port 443; 192.0.2.8, port 443; 192.0.2.9, port 443; 2 more)" in text
    assert text.endswith("on 192.0.2.7, and likewise on the others.")


def test_a_sender_on_loopback_is_this_host() -> None:
    assert "on this host." in elsewhere([end("127.0.0.1", 50_000, 80)], 1)
    assert "on this host." in elsewhere([end("::1", 50_000, 80)], 1)


# ---- in a report ------------------------------------------------------------------------------------


def caveats(path: Path, *rows: dict[str, Any]) -> list[str]:
    return content.report(frames.capture(path, connections=frames.snapshots(*rows))).caveats["limits"]


def test_a_report_names_the_senders_at_the_other_end(tmp_path: Path) -> None:
    rows = [seen(at, n, received=at * MB) for at in (0, 9) for n in (1, 2)] + [
        seen(at, 3, sent=at * MB) for at in (0, 9)
    ]
    line = caveats(tmp_path / "a.cwnd", *rows)[0]
    assert line.startswith(
        "2 of 3 connections mostly receive: their senders are at the other end (192.0.2.7, port 443)"
    )


def test_a_report_names_no_sender_that_it_has(tmp_path: Path) -> None:
    """Over loopback, a trace sees both ends."""
    ends: dict[str, Any] = {"saddr": "127.0.0.1", "sport": 5, "daddr": "127.0.0.1", "dport": 6}
    mirror: dict[str, Any] = {"saddr": "127.0.0.1", "sport": 6, "daddr": "127.0.0.1", "dport": 5}
    rows = [seen(at, 1, received=at * MB, **ends) for at in (0, 9)] + [
        seen(at, 2, sent=at * MB, **mirror) for at in (0, 9)
    ]
    found = content.report(frames.capture(tmp_path / "a.cwnd", connections=frames.snapshots(*rows)))
    assert not [line for line in found.caveats["limits"] if "mostly" in line]
    assert list(found.connections["verdict"]) == ["nothing_sent", "no_reset"]
    assert list(found.remedies["action"]) == ["leave the settings as they are"]


def test_a_report_on_an_older_capture_says_that_it_cannot_tell(tmp_path: Path) -> None:
    rows = [seen(at, n, sent=at * size, received=None) for at in (0, 9) for n, size in ((1, 1), (2, MB))]
    line = caveats(tmp_path / "a.cwnd", *rows)[0]
    assert "can't tell whether the sender is the other end of the 1 of 2 connections that sent less than" in line
