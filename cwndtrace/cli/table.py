# SPDX-License-Identifier: Apache-2.0
"""Tables and prose that fit the terminal. A pipe or a file gets all columns and unbroken lines.

If a terminal is too narrow, a table leaves out its least important columns, shortens texts, and names the columns that
are missing. Widths are in terminal cells: an ideograph takes two, and a combining mark takes none.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import click

from cwndtrace.format import unbroken

_GAP: Final = 2
_CUT: Final = ".."
_NARROW: Final = 14
_DEFAULT_COLUMNS: Final = 80
IPV4: Final = 45
"""Cells of the longest IPv4 connection, which is shortened only in terminals narrower than any table."""


def room(*, err: bool = False) -> int | None:
    """Return the width of the terminal at stdout (or stderr) in cells, or None if that isn't a terminal.

    COLUMNS overrides the width.
    """
    stream = sys.stderr if err else sys.stdout
    if not stream.isatty():
        return None
    if not err or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    # shutil asks for the size of stdout, which may be a pipe.
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT_COLUMNS
    return _DEFAULT_COLUMNS


def cells(text: str) -> int:
    """Return the number of terminal cells that ``text`` takes."""
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(char: str) -> int:
    # The vowels and finals of Hangul combine with the syllable before them.
    if unicodedata.category(char) in ("Mn", "Me", "Cf") or "\u1160" <= char <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _head(text: str, most: int) -> str:
    """Return as much of the start of ``text`` as fits into ``most`` cells."""
    taken = 0
    for at, char in enumerate(text):
        taken += _width(char)
        if taken > most:
            return text[:at]
    return text


def _tail(text: str, most: int) -> str:
    """Return as much of the end of ``text`` as fits into ``most`` cells. It never begins with a combining character."""
    taken, start = 0, len(text)
    for at in range(len(text) - 1, -1, -1):
        width = _width(text[at])
        if taken + width > most:
            break
        taken += width
        if width:
            start = at
    return text[start:]


def cut(text: str, most: int) -> str:
    """Return ``text`` cut to ``most`` cells. Two dots mark a missing end."""
    return text if cells(text) <= most else _head(text, max(most - len(_CUT), 0)) + _CUT[: max(most, 0)]


def cut_middle(text: str, most: int) -> str:
    """Return ``text`` cut to ``most`` cells in its middle, so that as much stays of its end as of its start."""
    spare = most - len(_CUT)
    if cells(text) <= most or spare < 2:
        return cut(text, most)
    end = _tail(text, spare // 2)
    return _head(text, spare - cells(end)) + _CUT + end


def cut_tail_kept(text: str, most: int, tail: str) -> str:
    """Return ``text`` cut to ``most`` cells in its middle, so that ``tail`` stays.

    Before a tail that begins with a colon, the end of the text gets as much room as the start.
    """
    spare = most - cells(tail) - len(_CUT)
    if cells(text) <= most or spare < 1:
        return cut(text, most)
    rest = text.removesuffix(tail)
    end = _tail(rest, spare // 2) if tail.startswith(":") else ""
    return _head(rest, spare - cells(end)) + _CUT + end + tail


def cut_process(text: str, most: int) -> str:
    """Return ``name[pid]`` cut to ``most`` cells, with the whole pid."""
    return cut_tail_kept(text, most, text[text.rfind("[") :] if "[" in text else "")


def cut_service(text: str, most: int) -> str:
    """Return ``name:port`` cut to ``most`` cells, with the whole port; any other text in its middle."""
    name, colon, port = text.rpartition(":")
    return cut_tail_kept(text, most, f":{port}") if name and colon and port.isdecimal() else cut_middle(text, most)


def cut_connection(text: str, most: int) -> str:
    """Return ``address:port > address:port`` cut to ``most`` cells.

    Both ports stay, and the start and the end of each address.
    """
    ends = text.partition(" > ")[::2]
    widths = [cells(end) for end in ends]
    share = max(most - 3, 0)
    # A short endpoint leaves its room to the long one.
    left = min(widths[0], max(share // 2, share - widths[1]))
    parts = (
        cut_tail_kept(end, n, f":{end.rpartition(':')[2]}") for end, n in zip(ends, (left, share - left), strict=True)
    )
    return cut(" > ".join(parts), most)


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, and how it gives way if there is too little room.

    Columns with a ``rank`` are left out, the highest rank first, until the others fit with ``least`` cells each. Then
    ``shorten`` cuts texts, beginning with the last column. A column without ``least`` isn't shortened.
    """

    title: str
    rank: int = 0
    right: bool = False
    least: int | None = None
    shorten: Callable[[str, int], str] = cut


class FittedTable:
    """The layout of a table: the ``columns`` that fit into ``room`` cells, and their widths. None means no limit."""

    def __init__(self, columns: Sequence[Column], widths: Sequence[int], room: int | None) -> None:
        self._columns = columns
        self._room = room
        self.widths = dict(enumerate(widths))
        """The widths of the columns that are shown, by the index of the column."""
        for i in sorted(self.widths, key=lambda i: -columns[i].rank):
            if columns[i].rank and self._excess(self._least(j) for j in self.widths) > 0:
                del self.widths[i]
        for i in sorted(self.widths, reverse=True):
            self._shrink(i, self._least(i))
        # This happens only in terminals that are narrower than any table.
        for least in (_NARROW, len(_CUT)):
            for i in sorted(self.widths, key=lambda i: -self.widths[i]):
                self._shrink(i, least)

    def _shrink(self, i: int, least: int) -> None:
        self.widths[i] -= max(0, min(self._excess(self.widths.values()), self.widths[i] - least))

    def _least(self, i: int) -> int:
        least = self._columns[i].least
        return self.widths[i] if least is None else min(self.widths[i], least)

    def _excess(self, widths: Iterable[int]) -> int:
        taken = list(widths)
        return 0 if self._room is None else sum(taken) + _GAP * (len(taken) - 1) - self._room

    def line(self, texts: Sequence[str], paint: Mapping[int, Callable[[str], str]] | None = None) -> str:
        """Return a row as a line. A column grows for a wider text while there is room.

        ``paint`` maps indices of columns to functions that colour their text.
        """
        paint, parts = paint or {}, []
        for i in self.widths:
            column, text = self._columns[i], _as_printed(texts[i])
            spare = cells(text) if self._room is None else self.widths[i] - self._excess(self.widths.values())
            self.widths[i] = max(self.widths[i], min(cells(text), spare))
            text = column.shorten(text, self.widths[i]) if cells(text) > self.widths[i] else text
            padding = " " * (self.widths[i] - cells(text))
            text = padding + text if column.right else text + padding
            parts.append(paint[i](text) if i in paint else text)
        return (" " * _GAP).join(parts).rstrip()

    def header(self) -> str:
        """Return the line of titles."""
        return click.style(self.line([column.title for column in self._columns]), bold=True)

    def left_out(self) -> list[str]:
        """Return lines that name the columns left out, and how to see them."""
        names = [column.title for i, column in enumerate(self._columns) if i not in self.widths]
        if not names:
            return []
        text = f"Left out: {', '.join(names)}. A wider terminal or pipe has them."
        return [click.style(line, dim=True) for line in prose(text, self._room)]


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the header, the rows and the names of columns left out, for the width of stdout's terminal."""
    texts = [[_as_printed(text) for text in row] for row in rows]
    widths = [max(cells(row[i]) for row in [[c.title for c in columns], *texts]) for i in range(len(columns))]
    layout = FittedTable(columns, widths, room())
    yield layout.header()
    yield from map(layout.line, texts)
    yield from layout.left_out()


def prose(text: str, room: int | None, indent: int = 0) -> list[str]:
    """Return ``text`` as lines of at most ``room`` cells, or as one line if ``room`` is None.

    ``indent`` is the indentation of all lines after the first. A number stays on one line with its unit.
    """
    if room is None:
        return [text]
    text = unbroken(_as_printed(text))
    words = text.lstrip(" ")
    lines = [" " * (len(text) - len(words))]
    for word in words.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1].strip() else lines[-1] + word
        if cells(joined) <= room:
            lines[-1] = joined
            continue
        if lines[-1].strip():
            lines.append(" " * indent)
        rest = lines.pop() + word
        # A word that is longer than a line is broken.
        while cells(rest) > room and room > indent + 1:
            lines.append(_head(rest, room))
            rest = " " * indent + rest[len(lines[-1]) :]
        lines.append(rest)
    return [line.replace("\u00a0", " ") for line in lines]


def echo_prose(text: str, *, err: bool = False) -> None:
    """Print ``text`` in lines that fit the terminal at stdout, or at stderr."""
    for line in prose(text, room(err=err), indent=2):
        click.echo(line, err=err)


def _as_printed(text: str) -> str:
    """Return ``text`` as stdout's encoding prints it. A replaced character may have another width."""
    if text.isascii():
        return text
    # Textual puts something in the place of stdout that has neither.
    encoding, errors = getattr(sys.stdout, "encoding", None) or "utf-8", getattr(sys.stdout, "errors", None) or "strict"
    return text.encode(encoding, "replace" if errors == "strict" else errors).decode(encoding, "replace")
