# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace top``, a live view of a running trace."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click

from cwndtrace.cli import options, user
from cwndtrace.cli.interrupt import Interrupt
from cwndtrace.cli.output import OutputError, output_closed, printing
from cwndtrace.errors import CaptureError, UsageError

EVERY_S: Final = 1.0
"""The time from one picture to the next, in seconds."""
_SLICE_S: Final = 0.1
_FILTERS: Final = {
    "iface": "--iface", "pid": "--pid", "port": "--port", "namespace": "--netns", "cgroup": "--cgroup",
    "container": "--container", "pod": "--pod", "unit": "--unit", "min_idle": "--min-idle", "probe": "--probe",
}  # fmt: skip
"""The filters of ``run`` by their parameters. A family has no value."""


@click.command()
@click.argument("capture", required=False, type=click.Path(path_type=Path))
@options.filters
@click.option(
    "-d", "--duration", type=options.Span(), metavar="TIME", help="End after this time, for example 90s or 10m."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="NAME.cwnd",
    help="Without CAPTURE: keep the capture in this new directory (default: a temporary one, deleted at the end).",
)
@click.option(
    "--page",
    type=click.Choice(["connections", "workloads", "devices", "resets"]),
    default="connections",
    show_default=True,
    help="Begin with this page. A plain table has only this one.",
)
@click.option("-b", "--plain", is_flag=True, help="Print a plain table once a second, as in a pipe.")
@click.option("--once", is_flag=True, help="Print one plain table of what there is now, and end.")
@click.option(
    "--rows", type=click.IntRange(min=1), default=20, show_default=True, metavar="N",
    help="The most rows of a plain table.",
)  # fmt: skip
def top(
    capture: Path | None,
    duration: float | None,
    output: Path | None,
    page: str,
    plain: bool,
    once: bool,
    rows: int,
    **filters: Any,
) -> None:
    """Watch a trace while it runs: connections by cost, workloads, devices, resets.

    With CAPTURE, which `cwndtrace run` is writing or has written, this needs no root. Without it, top traces as `run`
    does, and takes the same filters. In a pipe and on a terminal that can't do more, it prints a plain table once a
    second.

    \b
    Examples:
      cwndtrace top web.cwnd
      sudo cwndtrace top --iface eth0
      cwndtrace top web.cwnd --once --page workloads
    """
    asked = [part for name, value in filters.items() if value is not None for part in _option(name, value)]
    if capture is not None and (asked or output):
        raise UsageError("filters and -o are for a trace that top starts", "leave them out, or leave CAPTURE out")
    with ExitStack() as stack:
        said: Any = ()
        if capture is None:
            from cwndtrace.cli.top_trace import Tracing

            tracing = stack.enter_context(Tracing(asked, output))
            path, said = tracing.path, tracing.said
        else:
            user.drop_privileges()
            path = capture
        # These modules load pandas and pyarrow, and no library gets root's privileges here.
        from cwndtrace.cli.top_feed import Feed

        feed = Feed(path, said)
        if plain or once or _plain_terminal():
            _print_tables(feed, page, most=rows, duration_s=duration, once=once)
        else:
            from cwndtrace.cli.top_screen import TopScreen

            screen = TopScreen(feed, page, duration)
            screen.run()
            if screen.error is not None:
                raise screen.error


def _option(name: str, value: Any) -> list[str]:
    if name == "family":
        return [f"-{value}"]
    return [_FILTERS[name], f"{value}s" if name == "min_idle" else str(value)]


def _plain_terminal() -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return True
    if find_spec("textual") is None:
        click.echo(
            "Textual isn't installed, so this is a plain table. It comes with: pip install 'cwndtrace[top]'", err=True
        )
        return True
    return False


def _print_tables(feed: Any, page: str, *, most: int, duration_s: float | None, once: bool) -> None:
    """Print a table each second until the trace ends, the time is up, or nobody wants another one.

    Raises CaptureError where the capture is deleted meanwhile.
    """
    from cwndtrace.cli.top_feed import lines

    begin = time.monotonic()
    with Interrupt() as interrupt, suppress(OutputError):
        while True:
            due = time.monotonic() + EVERY_S
            feed.read()
            while once and feed.follower.behind and not interrupt.requested:
                feed.read()
            with printing():
                for line in lines(feed, page, most):
                    click.echo(line)
                click.echo()
            ended = feed.follower.status != "running" and not feed.follower.behind
            if feed.follower.status == "gone":
                raise CaptureError("The capture was deleted.", "The table above is the last of it.")
            if once or ended:
                return
            while time.monotonic() < due:
                time.sleep(_SLICE_S)
                over = duration_s is not None and time.monotonic() - begin >= duration_s
                if interrupt.requested or over or output_closed():
                    return
