# SPDX-License-Identifier: Apache-2.0
"""The full screen of ``top``: its keys at three sizes, by Textual's Pilot, and the whole program in tmux."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

import cwndtrace
from cwndtrace.cli.table import cells
from cwndtrace.cli.top_feed import Feed
from cwndtrace.cli.top_screen import _KEYS, Rows, TopScreen
from cwndtrace.store import CaptureWriter
from tests.harness.command import COMMAND, ENVIRONMENT
from tests.harness.tcp import until
from tests.harness.users import need_command
from tests.unit import frames, hostile
from tests.unit.writing import written

SIZES = [(80, 24), (120, 40), (200, 50)]
Play = Callable[[Pilot[None]], Awaitable[None]]


def lines(pilot: Pilot[None]) -> list[str]:
    """Return what is on the screen."""
    strips = pilot.app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip).rstrip() for strip in strips]


def play(path: Path, do: Play, size: tuple[int, int] = (80, 24), **options: Any) -> TopScreen:
    """Run the application on a capture, and ``do`` something once the first picture is there."""
    app = TopScreen(Feed(path), **options)

    def there(pilot: Pilot[None]) -> bool:
        picture = lines(pilot)
        drawn = bool(picture[0]) and (not app.query_one(Rows).number or any(picture[3:-1]))
        return app.feed.follower.behind is False and drawn

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await shows(pilot, lambda: there(pilot))
            await do(pilot)

    asyncio.run(run())
    return app


async def shows(pilot: Pilot[None], what: Callable[[], bool]) -> None:
    """Wait until ``what`` is true, at most 20 seconds."""
    for _ in range(400):
        if what():
            return
        await pilot.pause(0.05)
    raise AssertionError("\n".join(lines(pilot)))


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    frames.two_idle_connections(tmp_path / "a.cwnd")
    return tmp_path / "a.cwnd"


@pytest.fixture
def many(tmp_path: Path) -> Iterator[tuple[Path, CaptureWriter]]:
    """A running capture with 300 connections, of which number n has a window of n segments."""
    writer = CaptureWriter.create(tmp_path / "many.cwnd", frames.meta())
    rows = [frames.snapshot(1, sock_cookie=n, dport=n, cwnd=n, bytes_sent=n) for n in range(1, 301)]
    writer.add("connections", frames.snapshots(*rows))
    writer.flush(force=True)
    yield writer.path, writer
    writer.close()


@pytest.mark.parametrize("size", SIZES)
def test_every_page_fits_every_size(capture: Path, size: tuple[int, int]) -> None:
    async def do(pilot: Pilot[None]) -> None:
        for key, row in (("1", "10.1.0.1:443 > 10.2.0.9:2000"), ("2", "(unknown)"), ("3", "loop0"), ("4", "idle")):
            await pilot.press(key)
            shown = lines(pilot)
            assert len(shown) == size[1]
            assert all(cells(line) <= size[0] for line in shown)
            assert shown[0].startswith("a.cwnd: the trace is complete, 1 min 00 s; 21 resets; cost 7.77 s (measured)")
            assert f"[{key} " in shown[1]
            assert row in shown[3]
            assert shown[-1] == _KEYS
        assert len([line for line in lines(pilot)[3:-1] if line]) == min(21, size[1] - 4)

    play(capture, do, size)


def test_keys_of_every_page_fit_eighty_columns() -> None:
    assert len(_KEYS) <= 80


def test_d_makes_a_dump_in_the_current_folder(capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    async def do(pilot: Pilot[None]) -> None:
        await pilot.press("d")
        await shows(pilot, lambda: "The dump is in" in lines(pilot)[-1])

    play(capture, do)
    (dump,) = here.glob("*-dump-*.cwnd")
    assert len(cwndtrace.load(dump).resets) == len(cwndtrace.load(capture).resets)


def test_a_dump_that_can_not_be_made_says_why(capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "a.cwnd").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr("cwndtrace.cli.top_screen.beside", lambda _: Path("a.cwnd"))

    async def do(pilot: Pilot[None]) -> None:
        await pilot.press("d")
        await shows(pilot, lambda: "! no dump: a.cwnd exists already" in lines(pilot)[-1])

    play(capture, do)


@pytest.mark.parametrize("key", ["greater_than_sign", "less_than_sign", "f6", "s"])
def test_keys_order_rows_by_a_column_that_is_shown(capture: Path, key: str) -> None:
    async def do(pilot: Pilot[None]) -> None:
        seen = []
        for _ in range(4):
            (title,) = [word for word in lines(pilot)[2].split() if word[-1] in "v^"]
            seen.append(title[:-1])
            await pilot.press(key)
        assert set(seen) == {"CONNECTION", "PROCESS", "RESETS", "COST"}

    play(capture, do)


def test_r_turns_the_order_round(capture: Path) -> None:
    async def do(pilot: Pilot[None]) -> None:
        before = lines(pilot)[3:5]
        await pilot.press("r")
        assert lines(pilot)[3:5] == before[::-1]
        assert lines(pilot)[2].endswith("COST^")

    play(capture, do)


@pytest.mark.slow
def test_a_filter_leaves_matching_rows(capture: Path) -> None:
    async def do(pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"REPLICA")  # in any case
        assert len([line for line in lines(pilot)[3:-2] if line]) == 2
        await pilot.press(*["backspace"] * 7, *"20001")
        assert [line.split()[2] for line in lines(pilot)[3:-2] if line] == ["10.2.0.9:20001"]
        await pilot.press("enter")
        assert "filter: 20001" in lines(pilot)[1]
        assert lines(pilot)[-1] == _KEYS
        await pilot.press("escape")
        assert len([line for line in lines(pilot)[3:-1] if line]) == 2
        await pilot.press("slash", *"q1r", "escape")  # texts, and no keys of the program
        assert pilot.app.is_running
        assert len([line for line in lines(pilot)[3:-1] if line]) == 2

    play(capture, do)


def test_a_filter_with_markup_is_a_text(capture: Path) -> None:
    async def do(pilot: Pilot[None]) -> None:
        await pilot.press("slash", "[", "r", "e", "d", "]")
        assert "filter: [red]" in lines(pilot)[1]

    play(capture, do)


@pytest.mark.parametrize("page", ["1", "2", "4"])
def test_enter_plots_the_window_of_a_connection(capture: Path, page: str) -> None:
    async def do(pilot: Pilot[None]) -> None:
        await pilot.press(page, "enter")
        shown = lines(pilot)
        assert shown[2].startswith("10.1.0.1:443 > 10.2.0.9:20001  replica[4242]  12 resets, cost 4.37 s")
        assert shown[3].startswith("    2785 ")
        assert shown[-2].endswith("now")
        assert any("█" in line for line in shown)
        await pilot.press("enter")
        assert lines(pilot)[2].split()[0] in ("CONNECTION", "WORKLOAD", "UTCv")

    play(capture, do)


def test_of_a_device_there_is_no_window(capture: Path) -> None:
    async def do(pilot: Pilot[None]) -> None:
        await pilot.press("3", "enter")
        assert lines(pilot)[2].startswith("DEVICE")

    play(capture, do)


@pytest.mark.parametrize("key", ["h", "question_mark", "f1"])
def test_help_names_the_keys(capture: Path, key: str) -> None:
    async def do(pilot: Pilot[None]) -> None:
        await pilot.press(key)
        assert lines(pilot)[2] == "HELP"
        assert any(line.startswith("q, F10, Ctrl-C   quit") for line in lines(pilot))
        await pilot.press("x")
        assert lines(pilot)[2].startswith("CONNECTION")

    play(capture, do)


@pytest.mark.parametrize("key", ["q", "f10", "ctrl+c"])
def test_keys_end_it(capture: Path, key: str) -> None:
    async def do(pilot: Pilot[None]) -> None:
        await pilot.press(key)

    assert play(capture, do).return_code == 0


@pytest.mark.slow
def test_it_ends_after_its_duration(capture: Path) -> None:
    async def do(pilot: Pilot[None]) -> None:
        await shows(pilot, lambda: not pilot.app.is_running)

    play(capture, do, duration_s=0.1)


@pytest.mark.slow
def test_an_error_ends_it(capture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def do(pilot: Pilot[None]) -> None:
        def fail(_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(Feed, "rows", fail)
        await shows(pilot, lambda: not pilot.app.is_running)

    assert isinstance(play(capture, do).error, MemoryError)


@pytest.mark.slow
def test_arrows_scroll_through_all_rows(many: tuple[Path, CaptureWriter]) -> None:
    async def do(pilot: Pilot[None]) -> None:
        await pilot.press("less_than_sign", "less_than_sign")  # by process, which all have in common
        first = lines(pilot)[3]
        await pilot.press("down", "down", "up")
        assert lines(pilot)[3] == first
        await pilot.press("pagedown", "pagedown")
        assert lines(pilot)[3] != first
        await pilot.press("end")
        assert pilot.app._rows.chosen == 299  # type: ignore[attr-defined]
        assert "" not in lines(pilot)[3:-1]
        last = lines(pilot)[-2]
        await pilot.press("down")
        assert lines(pilot)[-2] == last
        await pilot.press("home")
        assert lines(pilot)[3] == first

    play(many[0], do)


@pytest.mark.slow
def test_only_rows_that_changed_are_drawn(many: tuple[Path, CaptureWriter], monkeypatch: pytest.MonkeyPatch) -> None:
    path, writer = many
    drawn: list[int] = []

    async def do(pilot: Pilot[None]) -> None:
        rows = pilot.app._rows  # type: ignore[attr-defined]
        real = rows.refresh

        def refresh(*regions: Any, **options: Any) -> Any:
            drawn.extend(region.y for region in regions)
            return real(*regions, **options)

        monkeypatch.setattr(rows, "refresh", refresh)
        writer.add("cwnd_reset", frames.table("cwnd_reset", frames.reset(2, sock_cookie=7, dport=7)))
        writer.flush(force=True)
        await shows(pilot, lambda: "1 reset;" in lines(pilot)[0])
        # It moved to the first place, and the row that was chosen is the first one still.
        assert set(drawn) == set(range(7))

    app = play(path, do)
    assert app.feed.model.resets == 1


@pytest.mark.slow
def test_a_pause_holds_the_picture_and_loses_nothing(many: tuple[Path, CaptureWriter]) -> None:
    path, writer = many

    async def do(pilot: Pilot[None]) -> None:
        await pilot.press("space")
        held = lines(pilot)
        assert "PAUSED" in held[1]
        writer.add("cwnd_reset", frames.table("cwnd_reset", frames.reset(2, sock_cookie=7, dport=7)))
        writer.flush(force=True)
        await pilot.pause(2.2)  # two pictures
        assert lines(pilot) == held
        await pilot.press("space")
        await shows(pilot, lambda: "1 reset;" in lines(pilot)[0])

    play(path, do)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", [*hostile.NAMES, "markup"])
def test_hostile_names_are_only_names(tmp_path: Path, name: str) -> None:
    text = hostile.NAMES.get(name, "[red]x[/][@click=app.quit]")
    hostile.named(tmp_path / "a.cwnd", text)

    async def do(pilot: Pilot[None]) -> None:
        for key in ("1", "2", "3", "4", "enter"):
            await pilot.press(key)
            assert [line for line in lines(pilot) if not line.isprintable()] == []
            assert all(cells(line) <= 80 for line in lines(pilot))
        if name == "markup":
            assert "[red]x[/][@clic" in lines(pilot)[2]

    play(tmp_path / "a.cwnd", do)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["complete", "killed", "deleted"])
def test_the_end_of_a_trace_is_said(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.cwnd"
    with written(path, 3) as writer:

        async def do(pilot: Pilot[None]) -> None:
            await shows(pilot, lambda: "3 open" in lines(pilot)[0])
            assert lines(pilot)[0].startswith("a.cwnd: running")
            rows = lines(pilot)[3:6]
            if end == "complete":
                assert writer.stdin is not None
                writer.stdin.close()
            elif end == "killed":
                writer.kill()
            else:
                path.rename(tmp_path / "b.cwnd")
            words = {"killed": "the trace was cut short", "deleted": "the capture was deleted"}
            await shows(pilot, lambda: words.get(end, "the trace is complete") in lines(pilot)[0])
            assert len([line for line in lines(pilot)[3:6] if line]) == len(rows) == 3

        play(path, do, size=(120, 40))


class Terminal:
    """The command in a terminal of tmux, with a server of its own."""

    def __init__(self, folder: Path, size: tuple[int, int], path: str, environment: dict[str, str]) -> None:
        self._tmux = ("tmux", "-S", str(folder / "tmux"), "-f", os.devnull)
        # tmux sets some variables itself, such as TERM.
        variables = [f"{name}={value}" for name, value in environment.items()]
        command = ["env", *variables, *COMMAND, "top", path]
        size_options = ("-x", str(size[0]), "-y", str(size[1]))
        self._call("new-session", "-d", *size_options, *command, ";", "set-option", "-g", "remain-on-exit", "on")

    def _call(self, *arguments: str) -> str:
        command = [*self._tmux, *arguments]
        return subprocess.run(command, check=True, text=True, capture_output=True, env=ENVIRONMENT).stdout

    def text(self, *options: str) -> str:
        return self._call("capture-pane", "-p", *options)

    def keys(self, *keys: str) -> None:
        self._call("send-keys", *keys)

    def ended(self) -> bool:
        return self._call("display-message", "-p", "#{pane_dead}").strip() == "1"

    def shows(self, text: str) -> None:
        until(lambda: text in self.text(), 60, f"{text!r} on the screen")

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=False, capture_output=True)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux: sudo make develop installs it")
    need_command()
    opened: list[Terminal] = []

    def open_terminal(size: tuple[int, int], path: Path, **environment: str) -> Terminal:
        opened.append(Terminal(tmp_path, size, str(path), environment))
        return opened[-1]

    try:
        yield open_terminal
    finally:
        for each in opened:
            each.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_in_a_terminal(tmp_path: Path, terminal: Callable[..., Terminal], size: tuple[int, int]) -> None:
    with written(tmp_path / "a.cwnd", 30) as writer:
        top = terminal(size, tmp_path / "a.cwnd")
        top.shows("30 open")
        top.keys("2")
        top.shows("shop-")
        top.keys("3")
        top.shows("nvme0n1")
        top.keys("1", "Enter")
        top.shows("█")
        top.keys("Escape")
        top.shows("CONNECTION")
        assert all(cells(line) <= size[0] for line in top.text().splitlines())
        writer.kill()
        top.shows("the trace was cut short")
        top.keys("q")
        until(top.ended, 30, "top to end")


@pytest.mark.slow
def test_in_a_terminal_without_colour(terminal: Callable[..., Terminal], capture: Path) -> None:
    top = terminal((80, 24), capture, NO_COLOR="1")
    top.shows("10.2.0.9:20001")
    top.keys("Down")
    escapes = {part.split("m")[0] for part in top.text("-e").split("\x1b[")[1:]}
    assert {"1", "7"} <= {code for each in escapes for code in each.split(";")}  # bold, reverse
    codes = {int(code) for each in escapes for code in each.split(";") if code}
    assert not [code for code in codes - {39, 49} if code >= 30]  # these two are the terminal's own colours
    top.keys("q")
    until(top.ended, 30, "top to end")


@pytest.mark.slow
def test_a_dumb_terminal_gets_plain_tables(terminal: Callable[..., Terminal], capture: Path) -> None:
    top = terminal((100, 30), capture, TERM="dumb")
    until(top.ended, 60, "top to end")
    text = top.text("-S", "-")  # with what has scrolled away
    assert "a.cwnd: the trace is complete" in text
    assert "10.2.0.9:20001" in text


@pytest.mark.slow
def test_a_signal_restores_the_terminal(terminal: Callable[..., Terminal], capture: Path) -> None:
    top = terminal((80, 24), capture)
    top.shows("10.2.0.9:20001")
    pid = top._call("display-message", "-p", "#{pane_pid}").strip()
    os.kill(int(pid), 15)
    until(top.ended, 30, "top to end")
    assert top._call("display-message", "-p", "#{alternate_on}").strip() == "0"
