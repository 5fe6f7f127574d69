# SPDX-License-Identifier: Apache-2.0
"""The full screen of ``top``, drawn by Textual.

No text is markup here: each line is a Strip of one segment, so that a name such as ``[red]`` is only a name. Nothing
needs colour: what is chosen is reversed, and heads are bold, in the terminal's own colours.
"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import ClassVar, Final

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Input

from cwndtrace.cli.dump import beside, dumped
from cwndtrace.cli.table import cut
from cwndtrace.cli.top import EVERY_S
from cwndtrace.cli.top_feed import Feed, layout
from cwndtrace.cli.top_pages import PAGES, Now, Shown, bars, window
from cwndtrace.errors import CaptureError, UsageError
from cwndtrace.format import clean
from cwndtrace.top.model import Watched

_NAMES: Final = tuple(PAGES)
_BOLD: Final = Style(bold=True)
_REVERSE: Final = Style(reverse=True)
_PLAIN: Final = Style()
_HELP: Final = """\
1 2 3 4, Tab     connections, workloads, devices, resets
arrows, PgUp..   choose a row; Home and End go to the first and the last
< >, F6 or s     order by the column to the left, to the right, the next one
r                turn the order round
/                show only rows with a text; Esc shows all again
Enter            the window of the chosen connection over time
Space            hold the picture; the trace goes on
d                dump the last 15 minutes, to the folder top was started in
h, ?, F1         this help
q, F10, Ctrl-C   quit

RESETS counts since the trace began. COST is what was measured while windows
grew back, in the kernel; "-" says that none was measured. RTT, CWND and STATE
are those of the last snapshot or reset. P50 and P99 are within 1 %.
docs/top.md has more.

Any key closes this.""".splitlines()
DUMPED_S: Final = 900.0
"""The length of a dump, in seconds."""
_NEWS_S: Final = 10.0
_KEYS: Final = "1-4 Page  <> Sort  / Filter  Enter Window  Space Pause  d Dump  h Help  q Quit"


class Rows(ScrollView, can_focus=False):
    """The rows of a page. Only those that are visible are made into text, and only those that changed are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[int, tuple[str, Style]] = {}
        self.number = 0
        self.chosen = 0

    @property
    def visible_range(self) -> range:
        """The indices of the rows that are on the screen."""
        top = round(self.scroll_offset.y)
        return range(top, min(top + self.size.height, self.number))

    def show(self, number: int, lines: dict[int, tuple[str, Style]]) -> None:
        """Take the number of rows, and the visible ones by index."""
        if number != self.number:
            self.number = number
            self.virtual_size = Size(0, number)
        changed = {y for y in {*lines, *self._lines} if lines.get(y) != self._lines.get(y)}
        self._lines = lines
        top = round(self.scroll_offset.y)
        self.refresh(*(Region(0, y - top, self.size.width, 1) for y in changed if 0 <= y - top < self.size.height))

    def render_line(self, y: int) -> Strip:
        """Return a line of the screen."""
        text, style = self._lines.get(y + round(self.scroll_offset.y), ("", _PLAIN))
        return Strip([Segment(text, style)]).extend_cell_length(self.size.width, style).crop(0, self.size.width)

    def reach(self) -> None:
        """Scroll so far that the chosen row is visible."""
        top, height = round(self.scroll_offset.y), max(self.size.height, 1)
        to = min(max(top, self.chosen - height + 1), self.chosen)
        if to != top:
            self.scroll_to(y=to, animate=False, immediate=True)


class Lines(ScrollView, can_focus=False):
    """A few lines of text, with a style for each."""

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self._texts: list[tuple[str, Style]] = []

    def show(self, texts: list[tuple[str, Style]]) -> None:
        """Take the lines, and draw those that changed."""
        if texts != self._texts:
            self._texts = texts
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Return a line of the screen."""
        text, style = self._texts[y] if y < len(self._texts) else ("", _PLAIN)
        return Strip([Segment(text, style)]).extend_cell_length(self.size.width, style).crop(0, self.size.width)


class TopScreen(App[None]):
    """The application. It ends after ``duration_s`` seconds if that is given.

    ``error`` is the one that ended it, None if none did.
    """

    CSS = """
    Screen, Rows, Lines, Input { background: ansi_default; color: ansi_default; scrollbar-size: 0 0; }
    #head { height: 3; }
    #foot { height: 1; }
    Rows { height: 1fr; }
    Input { height: 1; border: none; padding: 0; display: none; }
    Input.asked { display: block; }
    """
    TITLE = "cwndtrace top"
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number), f"page({number - 1})") for number in range(1, len(_NAMES) + 1)),
        Binding("tab", "next_page(1)", priority=True),
        Binding("shift+tab", "next_page(-1)", priority=True),
        *(Binding(key, f"move({step})") for key, step in (("up", -1), ("down", 1))),
        *(Binding(key, f"leap({step})") for key, step in (("pageup", -1), ("pagedown", 1))),
        *(Binding(key, f"edge({step})") for key, step in (("home", 0), ("end", 1))),
        *(Binding(key, "order(1)") for key in ("greater_than_sign", "f6", "s")),
        Binding("less_than_sign", "order(-1)"),
        Binding("r", "turn"),
        Binding("slash", "ask"),
        Binding("enter", "window"),
        Binding("space", "hold"),
        Binding("d", "dump"),
        *(Binding(key, "help") for key in ("h", "question_mark", "f1")),
        *(Binding(key, "quit") for key in ("q", "f10", "ctrl+c")),
    ]

    def __init__(self, feed: Feed, page: str = "connections", duration_s: float | None = None) -> None:
        super().__init__(ansi_color=True)
        self.animation_level = "none"
        self.error: Exception | None = None
        self.feed = feed
        self.choices = {name: Shown(PAGES[name]) for name in _NAMES}
        self.page_name = page
        self.held: Now | None = None
        self.help_shown = False
        self.watched: Watched | None = None
        self._news = ("", 0.0)
        self._bars = bars()
        self._ends_at = None if duration_s is None else time.monotonic() + duration_s

    def compose(self) -> ComposeResult:
        """Yield the widgets, from top to bottom."""
        yield Lines("head")
        yield Rows()
        yield Input(placeholder="show only rows with this text; Enter keeps it, Esc shows all", select_on_focus=False)
        yield Lines("foot")

    def on_mount(self) -> None:
        """Begin to read, and end in order on signals."""
        self._head, self._rows = self.query_one("#head", Lines), self.query_one(Rows)
        self._foot, self._input = self.query_one("#foot", Lines), self.query_one(Input)
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self.exit)
        self.run_worker(self._read())

    async def _read(self) -> None:
        """Read and draw until that fails, as it may where memory or descriptors run out."""
        try:
            await self._keep_reading()
        except Exception as error:
            self.error = error
            self.exit()

    async def _keep_reading(self) -> None:
        """Read and draw once a second; at once again while there are rows that time didn't suffice for."""
        while True:
            due = time.monotonic() + EVERY_S
            if self.held is None:  # what came meanwhile is read once it goes on
                self.feed.add(await asyncio.to_thread(self.feed.rows))
                self.draw()
            if self._ends_at is not None and time.monotonic() >= self._ends_at:
                self.exit()
            await asyncio.sleep(
                0.05 if self.feed.follower.behind and self.held is None else max(due - time.monotonic(), 0.1)
            )

    # ---- what is drawn ----------------------------------------------------------------------------

    @property
    def choice(self) -> Shown:
        """What is shown of the page."""
        return self.choices[self.page_name]

    def draw(self) -> None:
        """Bring the screen up to date."""
        now = self.held or self.feed.now(self._bars)
        width = self.size.width
        held = "  PAUSED" if self.held else ""
        tabs = "  ".join(
            f"[{number} {PAGES[name].title}]" if name == self.page_name else f" {number} {PAGES[name].title} "
            for number, name in enumerate(_NAMES, start=1)
        )
        shown = f"  filter: {self.choice.filter}" if self.choice.filter else ""
        head = [(cut(self.feed.headline(now), width), _PLAIN)]
        head.append((cut(f"{tabs}{held}{shown}", width), _BOLD))
        if self.help_shown:
            body, head_line = list(enumerate(_HELP)), "HELP"
        elif self.watched is not None:
            size = (width, max(self._rows.size.height, 3))
            head_line, *plotted = window(now, self.watched, size)
            body = list(enumerate(plotted))
        else:
            self._draw_rows(now, head)
            return
        self._head.show([*head, (cut(head_line, width), _BOLD)])
        self._rows.show(len(body), {y: (cut(line, width), _PLAIN) for y, line in body})
        self._show_foot()

    def _draw_rows(self, now: Now, head: list[tuple[str, Style]]) -> None:
        page, rows = self.choice.page, self.choice.rows(now)
        self._rows.chosen = min(self._rows.chosen, max(len(rows) - 1, 0))
        if len(rows) != self._rows.number:
            self._rows.show(len(rows), {})
        self._rows.reach()
        fitted = layout(self.page_name, self.size.width)
        titles = [column.title for column in page.columns()]
        titles[self.choice.order] += "^" if page.figures[self.choice.order].largest_first == self.choice.turned else "v"
        texts = {y: page.texts(now, rows[y]) for y in self._rows.visible_range}
        self._head.show([*head, (fitted.line(titles), _BOLD)])
        lines = {}
        for y, row in texts.items():
            lines[y] = fitted.line(row), _REVERSE if y == self._rows.chosen else _PLAIN
        self._rows.show(len(rows), lines)
        self._show_foot()

    def _show_foot(self) -> None:
        warning, (news, until) = self.feed.warning(), self._news
        line = news if time.monotonic() < until else f"! {warning}" if warning else _KEYS
        self._foot.show([(cut(line, self.size.width), _REVERSE)])

    def _tell(self, news: str) -> None:
        """Show news in the last line for some seconds."""
        self._news = news, time.monotonic() + _NEWS_S
        self._show_foot()

    # ---- keys -------------------------------------------------------------------------------------

    def action_page(self, index: int) -> None:
        """Show a page by its place."""
        self.page_name = _NAMES[index]
        self.help_shown, self.watched, self._rows.chosen = False, None, 0
        self.draw()

    def action_next_page(self, step: int) -> None:
        """Show the next page or the one before."""
        self.action_page((_NAMES.index(self.page_name) + step) % len(_NAMES))

    def action_move(self, step: int) -> None:
        """Choose another row."""
        self._rows.chosen = min(max(self._rows.chosen + step, 0), max(self._rows.number - 1, 0))
        self.draw()

    def action_leap(self, step: int) -> None:
        """Choose a row one screen away."""
        self.action_move(step * max(self._rows.size.height - 1, 1))

    def action_edge(self, last: int) -> None:
        """Choose the first row or the last one."""
        self.action_move(last * self._rows.number - (0 if last else self._rows.number))

    def action_order(self, step: int) -> None:
        """Order by another column that is on the screen."""
        shown = list(layout(self.page_name, self.size.width).widths)
        at = shown.index(self.choice.order) if self.choice.order in shown else 0
        self.choice.order = shown[(at + step) % len(shown)]
        self.draw()

    def action_turn(self) -> None:
        """Turn the order round."""
        self.choice.turned = not self.choice.turned
        self.draw()

    def action_hold(self) -> None:
        """Hold the picture, or go on."""
        self.held = None if self.held else self.feed.now(self._bars)
        self.draw()

    def action_dump(self) -> None:
        """Make a dump of the last minutes in the current folder."""
        self.run_worker(self._dump(), exclusive=True)

    async def _dump(self) -> None:
        self._tell("making a dump ...")
        capture = self.feed.follower.path
        place = Path(beside(capture).name)
        try:
            said, warnings = await asyncio.to_thread(dumped, capture, place, DUMPED_S, why="cwndtrace top")
            self._tell(" ".join([said, *warnings]))
        except (CaptureError, UsageError) as error:
            self._tell(clean(f"! no dump: {error.cause}"))

    def action_help(self) -> None:
        """Show the help."""
        self.help_shown = True
        self.draw()

    def action_window(self) -> None:
        """Show the window of the chosen connection, or the rows again."""
        rows = self.choice.rows(self.held or self.feed.now(self._bars))
        if self.watched is None and self._rows.chosen < len(rows):
            self.watched = self.choice.page.connection(rows[self._rows.chosen])
        else:
            self.watched = None
        self.draw()

    def action_ask(self) -> None:
        """Ask for a text that rows must have."""
        self._input.add_class("asked")
        self._input.value = self.choice.filter
        self._input.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while the text is being written."""
        self.choice.filter = event.value
        self._rows.chosen = 0
        self.draw()

    def on_input_submitted(self) -> None:
        """Keep the filter."""
        self._close_input()

    def on_key(self, event: events.Key) -> None:
        """Close what covers the rows."""
        if event.key == "escape" and self._input.has_class("asked"):
            self._input.value = ""
            self._close_input()
        elif event.key == "escape" and not (self.help_shown or self.watched):
            self.choice.filter = ""
        elif self.help_shown or (self.watched is not None and event.key == "escape"):
            self.help_shown, self.watched = False, None
        else:
            return
        event.stop()
        event.prevent_default()
        self.draw()

    def _close_input(self) -> None:
        self._input.remove_class("asked")
        self.set_focus(None)

    def on_resize(self) -> None:
        """Fit everything into the new size."""
        self.call_after_refresh(self._draw_if_ready)

    def _draw_if_ready(self) -> None:
        if self.is_mounted(self._rows) and self._rows.size.height:
            self.draw()
