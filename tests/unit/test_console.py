# SPDX-License-Identifier: Apache-2.0
"""What run says beside its view goes to stderr, once, and errors even where it is to be quiet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cwndtrace.capture.source import Filters
from cwndtrace.cli import console as module
from cwndtrace.cli.console import Console, InterfaceWatch
from cwndtrace.cli.live import JsonView
from cwndtrace.errors import CaptureError
from tests.unit.fake_source import FakeSource, session_of

Output = pytest.CaptureFixture[str]


class ToldChanges(InterfaceWatch):
    """What is said of an interface, in turn."""

    def __init__(self, *lines: str | None) -> None:
        self._lines = list(lines)

    def news(self) -> str | None:
        return self._lines.pop(0) if self._lines else None


def console(*news: str | None, quiet: bool = False, stop: bool = False) -> Console:
    session = session_of(FakeSource())
    view = JsonView(session, print_block=False)
    return Console(view, session, ToldChanges(*news), what="eth0", quiet=quiet, stop_when_refused=stop)


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_left_out_or_gone_is_a_warning_on_stderr_once(capsys: Output, quiet: bool) -> None:
    shown = console("interface eth0 is gone", None, "interface eth0 is back", quiet=quiet)
    shown._session.tally.left_out = {"sockets": 3}
    for _ in range(4):
        assert shown.turn([])
    stdout, stderr = capsys.readouterr()
    lines = [line.removeprefix("warning: ") for line in stderr.splitlines()]
    assert stdout == ""
    if quiet:
        assert lines == []
        return
    assert [lines[0], lines[2]] == ["interface eth0 is gone", "interface eth0 is back"]
    assert lines[1].startswith("at least 3 requested sockets aren't traced")
    assert len(lines) == 3


@pytest.mark.parametrize("quiet", [False, True])
def test_an_error_is_said_with_its_remedy_and_news_unless_it_is_to_be_quiet(capsys: Output, quiet: bool) -> None:
    shown = console(quiet=quiet)
    shown.say("dumped to a.cwnd\x1b")
    shown.say("the dump failed", "Free some space.")
    shown.say("nobody knows why", "")
    stdout, stderr = capsys.readouterr()
    errors = "\ncwndtrace: the dump failed\n  Free some space.\n\ncwndtrace: nobody knows why\n"
    assert (stdout, stderr) == ("", errors if quiet else f"dumped to a.cwnd?\n{errors}")


def test_a_part_that_is_missing_is_said_once(capsys: Output) -> None:
    shown = console(quiet=True)
    shown.say_lacking()
    shown._session.helper.lacking = "the helper process ended"
    shown.turn([])
    shown.say_lacking()
    assert capsys.readouterr().err == "\ncwndtrace: the helper process ended\n"


def test_a_disk_that_refuses_rows_is_said_once_or_ends_the_trace(capsys: Output) -> None:
    error = CaptureError("The disk is full.", "Free some space.")
    shown = console(quiet=True)
    for _ in range(3):
        shown.refused(error)
    assert capsys.readouterr().err == "\ncwndtrace: The disk is full.\n  Free some space.\n"
    with pytest.raises(CaptureError, match="The disk is full"):
        console(stop=True).refused(error)


def test_each_change_of_the_interface_is_told_every_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = 1000.0, list[tuple[bool, str | None] | None]()
    session = session_of(FakeSource())

    def watched() -> Any:
        return seen.pop(0)

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(session.helper, "watched", watched)
    watch = InterfaceWatch(session, Filters(netns=5, ifindex=3), "eth0")

    def told(*answers: tuple[bool, str | None] | None, after_s: float = 2.0) -> str | None:
        nonlocal now
        now += after_s
        seen[:] = answers
        return watch.news()

    goes_on = "; the trace goes on"
    assert told((True, "eth0")) is None
    assert told(after_s=1.9) is None
    assert told(None, after_s=0.1) is None
    assert told((True, "lan0")) == f"interface eth0 is called lan0 now{goes_on}"
    assert told((True, None)) == f"interface lan0 is gone, removed or moved to another network namespace{goes_on}"
    assert told((True, "lan0")) == "interface lan0 is back"
    assert told((False, "lan0")) == f"the traced network namespace has no name and no process left{goes_on}"
    assert told((False, "lan0")) is None
    assert told((True, "lan0")) is None
    assert InterfaceWatch(session, Filters(), None).news() is None
