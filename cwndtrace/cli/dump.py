# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace dump``, which makes a capture of a span of another one."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from cwndtrace.cli import options
from cwndtrace.cli.table import echo_prose
from cwndtrace.errors import CaptureError, UsageError
from cwndtrace.format import clean, moment, plural, span
from cwndtrace.records import arrow
from cwndtrace.store import Capture, open_capture
from cwndtrace.store.dump import Dump, Moments, clock_column
from cwndtrace.store.dump import dump as make
from cwndtrace.store.layout import show
from cwndtrace.store.window import NAMES
from cwndtrace.store.writer import refuse_place
from cwndtrace.store.written import when_written

ARRIVED_S: Final = 2.0
"""The time, in seconds, that a record may take from its moment until the trace can read it: some are made at an ACK."""

_LATE: Final = "the trace had not written all of the span when the dump was made, so records at its end may be missing"

_NOUNS: Final = {"cwnd_reset": "reset", "block_io": "block I/O", "connections": "snapshot"}


class When(click.ParamType[int]):
    """A time such as 2026-01-02T03:04:05, in UTC unless it has an offset, converted to ns since 1970."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the time in ns since 1970."""
        if isinstance(value, int):
            return value
        try:
            at = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a time: write 2026-01-02T03:04:05, in UTC", param, ctx)
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return int((at - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1_000_000) * 1000


@click.command()
@click.argument("capture", type=click.Path(path_type=Path))
@click.option("--last", type=options.Span(), metavar="TIME", help="Take this much until the end, for example 5m.")
@click.option("--from", "start", type=When(), metavar="WHEN", help="Take what came from this time on (UTC).")
@click.option("--to", "end", type=When(), metavar="WHEN", help="Take what came before this time (UTC).")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="NAME.cwnd",
    help="Write the dump to this new directory (default: CAPTURE-dump-DATE-TIME.cwnd beside the capture).",
)
def dump(capture: Path, *, last: float | None, start: int | None, end: int | None, output: Path | None) -> None:
    """Make a capture of its own of a span of CAPTURE, which may go on being written.

    Whole parts become hard links where that can be, so a dump takes little time and space, and it stays when the window
    of CAPTURE moves on. Without --last, --from and --to, it takes all that CAPTURE has.

    \b
    Examples:
      cwndtrace dump now.cwnd --last 5m -o incident.cwnd
      cwndtrace dump now.cwnd --from 2026-01-02T03:04 --to 2026-01-02T03:10
    """
    said, warnings = dumped(capture, output or beside(capture), last, start, end, why="cwndtrace dump")
    echo_prose(said)
    for line in warnings:
        echo_prose(f"warning: {line}", err=True)


def dumped(
    capture: Path,
    place: Path,
    last_s: float | None,
    start_ns: int | None = None,
    end_ns: int | None = None,
    *,
    why: str,
) -> tuple[str, list[str]]:
    """Make a dump at ``place``, and return what it has and its warnings, in words.

    The span is as in ``moments``. Waits for records that are on their way to the disk, see ``written.when_written``.
    """
    opened = open_capture(capture)
    refuse_place(place, None)
    asked = moments(opened, last_s, start_ns, end_ns)
    opened, written = when_written(opened, asked.end_ns + int(ARRIVED_S * 1e9))
    made = make(opened, place, asked, why=why, lacking="" if written else _LATE)
    warnings = [clean(line) for line in opened.warnings[len(opened.about.lacking) :]]
    if not written:
        warnings.append(f"{_LATE}.")
    if made.span.start_ns > asked.start_ns:
        warnings.append("its beginning left the window of the capture meanwhile.")
    return f"The dump is in {clean(str(place))}: {told(made, opened)}.", warnings


def beside(capture: Path) -> Path:
    """Return the place of a dump that nobody has named."""
    return capture.with_name(f"{capture.stem}-dump-{time.strftime('%Y%m%d-%H%M%S')}.cwnd")


def told(made: Dump, capture: Capture) -> str:
    """Return what a dump has, in words."""
    start, end = (capture.about.utc_ns(at) for at in (made.span.start_ns, made.span.end_ns))
    held = ", ".join(plural(made.rows[table], noun) for table, noun in _NOUNS.items())
    lasted = span((made.span.end_ns - made.span.start_ns) / 1000)
    return f"{held}, {lasted}" + ("" if start is None or end is None else f" from {moment(start)} to {moment(end)}")


def moments(capture: Capture, last_s: float | None, start_ns: int | None, end_ns: int | None) -> Moments:
    """Return the span that is asked for, as far as the capture has it.

    ``start_ns`` and ``end_ns`` are ns since 1970. Raises UsageError for a span that makes no sense, and CaptureError
    for one that the capture doesn't have.
    """
    if last_s is not None and (start_ns is not None or end_ns is not None):
        raise UsageError("--last and --from or --to exclude each other", "give one of them")
    if (start_ns is not None and end_ns is not None and start_ns >= end_ns) or last_s == 0:
        raise UsageError("the span is empty", "give a --to after --from, or a longer --last")
    first, final = _first(capture), _final(capture)
    wanted = Moments(
        first if start_ns is None else _mono_ns(capture, start_ns),
        final if end_ns is None else _mono_ns(capture, end_ns),
    )
    if last_s is not None:
        wanted = Moments(final - int(last_s * 1e9), final)
    found = Moments(max(wanted.start_ns, first), min(wanted.end_ns, final))
    if found.start_ns >= found.end_ns:
        raise _gone(capture, wanted, first, final)
    return found


def _gone(capture: Capture, wanted: Moments, first: int, final: int) -> CaptureError:
    def utc(mono_ns: int) -> str:
        at = capture.about.utc_ns(mono_ns)
        return "an unknown time" if at is None else moment(at)

    name = show(capture.path)
    if wanted.end_ns <= first and capture.about.kept_from is not None:
        cause = f"The span until {utc(wanted.end_ns)} is gone: the window of {name} begins at {utc(first)}."
        return CaptureError(cause, "Give a later span, and trace with a longer --keep.")
    return CaptureError(
        f"{name} has nothing of this span: it goes from {utc(first)} to {utc(final)}.", "Give a span inside that."
    )


def _mono_ns(capture: Capture, utc_ns: int) -> int:
    mono_ns = capture.about.mono_ns(utc_ns)
    if mono_ns is None:
        raise CaptureError(f"{show(capture.path)} doesn't say when it was made.", "Use --last.")
    return mono_ns


def _first(capture: Capture) -> int:
    return capture.about.begin.mono_ns if capture.about.begin else 0


def _final(capture: Capture) -> int:
    """Return the end of a capture, in ns of CLOCK_MONOTONIC: now, what meta.json says, or after its last record."""
    if capture.status == "running":
        return time.monotonic_ns()
    if capture.about.end is not None:
        return capture.about.end.mono_ns
    last = 0
    for table in set(arrow.TABLES) - NAMES:
        for piece in capture.pieces(table, [clock_column(table)]):
            last = max([last, *(int(np.max(arrow.values(c))) for c in piece[0].chunks if len(c))])
    return last + 1
