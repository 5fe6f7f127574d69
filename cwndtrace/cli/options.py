# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from cwndtrace.kernel.ladder import RUNGS
from cwndtrace.store import MOST_ROWS

F = TypeVar("F", bound=Callable[..., Any])
_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


class Span(click.ParamType[float]):
    """A time span such as 500ms, 2s, 1.5m; a bare number is seconds. Gives seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds from the text."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(\w*)", str(value))
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is no time span: write 500ms, 2s, 10m", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


def _family(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    family = int(str(param.name).removeprefix("ipv")) if value else None
    before = ctx.params.setdefault("family", family)
    if before and family and before != family:
        raise click.UsageError("-4 and -6 together leave nothing: give one of them, or none for both", ctx)
    ctx.params["family"] = before or family


def family(four: str, six: str) -> Callable[[F], F]:
    """The options -4 and -6, one of which ``family`` tells: 4, 6 or None."""

    def both(command: F) -> F:
        for number, text in ((6, six), (4, four)):
            option = click.option(
                f"-{number}", f"ipv{number}", is_flag=True, expose_value=False, callback=_family, help=text
            )
            command = option(command)
        return command

    return both


def max_rows(command: F) -> F:
    """How many rows a capture may have that is to be read."""
    return click.option(
        "--max-rows", type=click.IntRange(min=1), default=MOST_ROWS, show_default=True, metavar="N",
        help="Refuse captures with more rows: each takes 100 to 1,000 bytes of memory.",
    )(command)  # fmt: skip


def filters(command: F) -> F:
    """The filters of ``run``, decided in the kernel."""
    for option in reversed(
        (
            click.option("-i", "--iface", metavar="NAME", help="Connections whose route goes out of this interface."),
            click.option("-p", "--pid", type=int, metavar="PID", help="Connections and block I/O of this process."),
            click.option("-P", "--port", type=int, metavar="PORT", help="Connections with this port at either end."),
            click.option(
                "-n", "--netns", "namespace", metavar="NAME", help="This network namespace: name, pid, inode or path."
            ),
            click.option("-c", "--cgroup", metavar="FOLDER", help="This cgroup (v2) and those below it."),
            family("IPv4 only, mapped addresses included.", "IPv6 only."),
            click.option(
                "--min-idle", type=Span(), metavar="TIME", help="Idle for at least this long, as 500ms or 2s."
            ),
            click.option("--probe", type=click.Choice([r.name for r in RUNGS]), help="Use this probe alone."),
        )
    ):
        command = option(command)
    return command
