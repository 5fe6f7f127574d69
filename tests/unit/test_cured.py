# SPDX-License-Identifier: Apache-2.0
"""Two captures are called cured or not cured only where they show it; else the conclusion says what is lacking."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cwndtrace.analysis import cured
from cwndtrace.present.compared import Conclusion
from cwndtrace.records import layout
from cwndtrace.tcp import CONTROL_SYSCTL, IDLE_SYSCTL
from cwndtrace.trace import Trace
from tests.unit import frames

MEGABYTE = 1_000_000
OTHER = frames.NETNS + 1
NUMBERS = count()


def space(idle: int | None = 1, name: str = "web", control: str = "cubic") -> dict[str, Any]:
    return {"name": name, IDLE_SYSCTL: idle, CONTROL_SYSCTL: control}


def spaces(idle: int | None = 1, **changes: Any) -> dict[str, Any]:
    return {str(frames.NETNS): space(idle, **changes)}


def bursts(
    *,
    resets: int = 0,
    quiet: int = 0,
    burst: int = MEGABYTE,
    after: int = 44,
    init_cwnd: int = 10,
    snapshot: dict[str, Any] | None = None,
    **shared: Any,
) -> tuple[list[layout.Records], list[dict[str, Any]]]:
    """Return records and snapshots of a connection that sends a burst every four seconds, after idle time.

    The first ``resets`` bursts begin with a reset, and the ``quiet`` ones after them don't. There is a snapshot in
    each idle period, which began a second before it, with the fields of ``snapshot``.
    """
    shared = {"comm": "replica"} | shared
    records, seen = [], []
    for n in range(resets + quiet + 1):
        at, sent = 4 * n, {"bytes_sent": 40_000_000 + n * burst}
        seen.append(frames.snapshot(at + 1, **{"last_snd_us": 1_000_000} | sent | shared | (snapshot or {})))
        if n < resets:
            known = shared | {"comm": shared["comm"].encode(), "init_cwnd": init_cwnd, "cwnd_after": after}
            records.append(frames.reset(at + 2, idle_us=2_000_000, **sent, **known))
    return records, seen


def capture(path: Path, *connections: tuple[list[Any], list[Any]], **values: Any) -> Trace:
    """Write a capture under a name of its own in the folder ``path``."""
    records, seen = ([each for pair in connections for each in pair[side]] for side in (0, 1))
    tables = {"resets": frames.table("cwnd_reset", *records), "connections": frames.snapshots(*seen)}
    return frames.capture(path / f"{next(NUMBERS)}.cwnd", **tables, **{"sysctls": spaces()} | values)


def concluded(path: Path, before: Any, after: Any, **values: Any) -> Conclusion:
    """Return the conclusion from one connection in each capture, the second one with the sysctl at 0 by default.

    The first one may be there already.
    """
    first = before if isinstance(before, Trace) else capture(path, before)
    return first.conclude(capture(path, after, **{"sysctls": spaces(0)} | values))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A capture of three bursts that began with a reset, which no test changes."""
    return capture(tmp_path_factory.mktemp("three"), bursts(resets=3))


# ---- cured ------------------------------------------------------------------------------------------


def test_no_reset_after_the_sysctl_and_the_same_idle_periods_is_a_cure(three: Trace, tmp_path: Path) -> None:
    out = concluded(tmp_path, three, bursts(quiet=3))
    assert (out.verdict, out.before.resets, out.before.costly, out.before.quiet) == ("cured", 3, 3, 0)
    assert (out.after.resets, out.after.quiet, out.after.explained) == (0, 3, 3)
    assert out.changes == (cured.Change(IDLE_SYSCTL, "in namespace web", "1", "0"),)
    assert str(out) == (
        "Cured: before, 3 of 3 idle resets cost 1.28 s in all (measured); after, there was no idle reset, and at "
        "least 3 idle periods longer than the RTO ended without one. What changed: "
        "net.ipv4.tcp_slow_start_after_idle was 1 before and 0 after in namespace web."
    )


def test_another_congestion_control_is_a_cure_and_named(three: Trace, tmp_path: Path) -> None:
    out = concluded(tmp_path, three, bursts(quiet=2, ca_name="bbr"), sysctls=spaces(control="bbr"))
    assert out.verdict == "cured"
    assert [(c.setting, c.before, c.after) for c in out.changes] == [
        (CONTROL_SYSCTL, "cubic", "bbr"), ("congestion control", "cubic", "bbr"),
    ]  # fmt: skip
    assert "; congestion control was cubic before and bbr after on connections of replica." in out.text


def test_a_container_that_was_made_anew_is_found_by_its_program(three: Trace, tmp_path: Path) -> None:
    after = {str(OTHER): space(0, name="web-2")}
    out = concluded(tmp_path, three, bursts(quiet=3, netns_ino=OTHER), sysctls=after)
    assert out.verdict == "cured"
    assert out.changes == (cured.Change(IDLE_SYSCTL, "in namespace web-2", "1", "0"),)


def test_a_larger_initial_window_is_a_cure_where_bursts_are_as_large(tmp_path: Path) -> None:
    out = concluded(tmp_path, bursts(resets=4), bursts(resets=4, init_cwnd=900, after=900), sysctls=spaces())
    assert (out.verdict, out.after.resets, out.after.costly) == ("cured", 4, 0)
    assert out.changes == (cured.Change("initcwnd", "on the route to 10.2.0.9", "10", "900"),)
    assert "after, 4 idle resets cost nothing. What changed: initcwnd was 10 before and 900 after on the" in out.text


# ---- not cured --------------------------------------------------------------------------------------


def test_resets_that_still_cost_time_are_no_cure_and_the_setting_is_named(three: Trace, tmp_path: Path) -> None:
    out = concluded(tmp_path, three, bursts(resets=2, quiet=1), sysctls=spaces())
    assert (out.verdict, out.after.costly, out.after.quiet, out.changes) == ("not_cured", 2, 1, ())
    assert str(out) == (
        "Not cured: before, 3 of 3 idle resets cost 1.28 s in all (measured); after, 2 of 2 idle resets of replica "
        "cost 958 ms in all (measured), and at least 1 idle period longer than the RTO ended without one; "
        "net.ipv4.tcp_slow_start_after_idle was 1 in namespace web when the second capture began. "
        "No setting that the captures hold has changed."
    )


def test_a_cure_in_one_namespace_is_none_in_another(tmp_path: Path) -> None:
    both = {str(frames.NETNS): space(), str(OTHER): space(name="left")}
    there: dict[str, Any] = {"netns_ino": OTHER, "sock_cookie": 0x60}
    before = capture(tmp_path, bursts(resets=3), bursts(resets=3, **there), sysctls=both)
    both[str(frames.NETNS)] = space(0)
    for left, verdict, words in (
        (bursts(resets=1, **there), "not_cured", "was 1 in namespace left when the second capture began"),
        (bursts(**there), "unknown", "shows no idle period of replica"),
    ):
        after = capture(tmp_path, bursts(quiet=3), left, sysctls=both)
        out = before.conclude(after)
        assert out.verdict == verdict
        assert words in out.text


def test_other_programs_resets_neither_cure_nor_spoil(three: Trace, tmp_path: Path) -> None:
    other: dict[str, Any] = {"comm": "backup", "sock_cookie": 0x60}
    after = capture(tmp_path, bursts(quiet=3), bursts(resets=2, **other), sysctls=spaces(0))
    out = three.conclude(after)
    assert out.verdict == "cured"
    assert out.text.endswith(
        "Other programs had resets that cost time in the second capture: 2 of 2 idle resets cost 852 ms in all "
        "(measured)."
    )
    idle = capture(tmp_path, bursts(), bursts(quiet=9, **other), sysctls=spaces(0))
    assert three.conclude(idle).verdict == "unknown"


# ---- can't tell -------------------------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "after",
    [
        bursts(),
        # The connection sends as often as its RTO, or never again.
        bursts(quiet=3, snapshot={"last_snd_us": 300_000}),
        bursts(quiet=3, burst=0),
        # A restart leaves the initial window as it is.
        bursts(quiet=3, snapshot={"cwnd": 10}),
        # What is under way may be sent again, which begins no burst.
        bursts(quiet=3, snapshot={"unacked": 1}),
        # Another program was idle.
        bursts(quiet=3, comm="other"),
    ],
    ids=["one snapshot", "busy", "nothing sent", "initial window", "under way", "another program"],
)
def test_without_idle_periods_there_is_no_conclusion(three: Trace, tmp_path: Path, after: Any) -> None:
    out = concluded(tmp_path, three, after)
    assert out.verdict == "unknown"
    assert "the second capture shows no idle period of replica longer than its RTO that ended in a burst" in out.text


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"counts": {"cwnd_reset": {"kept": 0, "lost": 2}}}, "isn't whole: 2 resets were lost"),
        ({"counts": {"cwnd_recovery": {"kept": 0, "lost": 1}}}, "isn't whole: 1 followed window was lost"),
        ({"counts": {"connections": {"kept": 4, "lost": 1}}}, "isn't whole: 1 snapshot was lost"),
        ({"probes": {"idle": None, "rto_loss": "sendmsg"}}, "isn't whole: no probe could see idle resets"),
        ({"left_out": {"sockets": 4}}, "isn't whole: at least 4 requested sockets aren't traced"),
        ({"host": "web2"}, "the captures are of different hosts"),
    ],
)
def test_a_capture_with_gaps_allows_no_conclusion(
    three: Trace, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    out = concluded(tmp_path, three, bursts(quiet=3), **values)
    assert out.verdict == "unknown"
    assert str(out).startswith("Can't tell: ")
    assert words in out.text


@pytest.mark.parametrize(("status", "words"), [("running", "still being written"), ("failed", "the trace failed")])
def test_a_trace_without_an_end_allows_no_conclusion(
    three: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, words: str
) -> None:
    before, after = three, capture(tmp_path, bursts(quiet=3), sysctls=spaces(0))
    assert before.conclude(after).verdict == "cured"
    monkeypatch.setattr(Trace, "status", status)
    assert all(any(words in gap for gap in trace._evidence().gaps) for trace in (before, after))
    assert before.conclude(after).verdict == "unknown"


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (bursts(quiet=3), "the first capture has no idle reset"),
        (bursts(resets=3, burst=1000), "none of the first capture's 3 idle resets cost time"),
    ],
)
def test_nothing_to_cure_is_no_cure(tmp_path: Path, before: Any, words: str) -> None:
    out = concluded(tmp_path, before, bursts(quiet=3))
    assert (out.verdict, out.before.costly) == ("unknown", 0)
    assert words in out.text


def test_a_cure_that_no_setting_explains_is_not_believed(tmp_path: Path) -> None:
    for idle in (1, None):
        out = concluded(tmp_path, bursts(resets=30), bursts(quiet=10), sysctls=spaces(idle))
        assert (out.verdict, out.after.quiet) == ("unknown", 10)
        assert "no setting that the captures hold explains it" in out.text


@pytest.mark.slow
def test_harmless_resets_of_smaller_bursts_or_an_unchanged_route_are_no_cure(tmp_path: Path) -> None:
    for after in (
        bursts(resets=4, burst=1000, init_cwnd=900, after=900),
        bursts(resets=1, init_cwnd=900, after=900),
        bursts(resets=4, after=900),
    ):
        out = concluded(tmp_path, bursts(resets=4), after, sysctls=spaces())
        assert (out.verdict, out.after.costly) == ("unknown", 0)
        assert "too few of them came before bursts as large as those that had cost time" in out.text


def test_resets_of_unknown_cost_allow_no_conclusion(tmp_path: Path) -> None:
    unfollowed = {"recoveries": frames.table("cwnd_recovery")}
    before, after = (capture(tmp_path, bursts(resets=2, quiet=2), **values) for values in ({}, unfollowed))
    assert "the second capture doesn't show what 2 idle resets of replica cost" in before.conclude(after).text
    assert "the first capture doesn't show what 2 idle resets cost" in after.conclude(before).text
    assert before.conclude(after).verdict == after.conclude(before).verdict == "unknown"


def test_captures_without_records_allow_no_conclusion(three: Trace, tmp_path: Path) -> None:
    empty = capture(tmp_path)
    for before, after, words in (
        (empty, empty, "the first capture has no idle reset"),
        (empty, three, "the first capture has no idle reset"),
        (three, empty, "the second capture shows no idle period of replica"),
    ):
        out = before.conclude(after)
        assert out.verdict == "unknown"
        assert words in out.text


# ---- what counts ------------------------------------------------------------------------------------


def test_costs_are_known_in_a_capture_with_gaps(tmp_path: Path) -> None:
    gap = {"counts": {"cwnd_reset": {"kept": 2, "lost": 1}}}
    before, after = capture(tmp_path, bursts(resets=2), **gap), capture(tmp_path, bursts(resets=2), **gap)
    assert before.conclude(after).verdict == "not_cured"
    assert before.conclude(capture(tmp_path, bursts(quiet=3), sysctls=spaces(0))).verdict == "cured"


def test_a_setting_that_changed_while_it_was_traced_is_told_and_explains_nothing(tmp_path: Path) -> None:
    switched = capture(tmp_path, bursts(quiet=3), sysctls=spaces(0), sysctls_end=spaces(1))
    out = capture(tmp_path, bursts(resets=3), sysctls_end=spaces(1)).conclude(switched)
    assert (out.verdict, out.changes[0].before, out.changes[0].after) == ("unknown", "1", "0, then 1,")
    assert "tcp_slow_start_after_idle was 1 before and 0, then 1, after in namespace web." in out.text


def test_an_idle_period_that_ended_in_a_reset_is_not_quiet(three: Trace, tmp_path: Path) -> None:
    records, seen = bursts(resets=2, quiet=2)
    # A snapshot is read just before its time, and the burst may begin in between.
    early = frames.reset(8.99, bytes_sent=42_000_000, comm=b"replica", idle_us=990_000)
    out = concluded(tmp_path, three, ([*records, early], seen))
    assert (out.after.resets, out.after.quiet) == (3, 1)


def test_names_from_outside_are_cleaned(tmp_path: Path) -> None:
    evil = "e\x1b[31m"
    before = capture(tmp_path, bursts(resets=3, comm=evil), sysctls=spaces(name=evil))
    after = capture(tmp_path, bursts(quiet=3, comm=evil), sysctls=spaces(0, name=evil))
    out = before.conclude(after)
    assert out.verdict == "cured"
    assert str(out).isprintable()
    assert "e?[31m" in str(out)
    assert "<script" not in replace(out, text="<script>")._repr_html_()
