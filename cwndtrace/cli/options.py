# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from cwndtrace.kernel.ladder import PROBES
from cwndtrace.store import MOST_ROWS

F = TypeVar("F", bound=Callable[..., Any])
_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


class Span(click.ParamType[float]):
    """A time span such as 500ms, 2s or 1.5m, converted to seconds. A number without a unit is in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the time span in seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(\w*)", str(value))
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is not a time span: write 500ms, 2s or 10m", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


class Bytes(click.ParamType[int]):
    """A number of bytes such as 500M or 2G, of powers of 1,000. A number without a unit is in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15}\.?\d{0,3})\s*([kMGT]?)B?", str(value), re.ASCII | re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size: write 500M or 2G", param, ctx)
        return int(float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " "))


def _set_family(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    family = int(str(param.name).removeprefix("ipv")) if value else None
    before = ctx.params.setdefault("family", family)
    if before and family and before != family:
        raise click.UsageError("-4 and -6 exclude each other: give one of them, or neither for both families", ctx)
    ctx.params["family"] = before or family


def family(four: str, six: str) -> Callable[[F], F]:
    """Add the options -4 and -6, with these help texts. They set the parameter ``family`` to 4, 6 or None."""

    def add_options(command: F) -> F:
        for number, text in ((6, six), (4, four)):
            option = click.option(
                f"-{number}", f"ipv{number}", is_flag=True, expose_value=False, callback=_set_family, help=text
            )
            command = option(command)
        return command

    return add_options


def max_rows(command: F) -> F:
    """Add the option --max-rows, which limits the rows of a capture that is read."""
    return click.option(
        "--max-rows", type=click.IntRange(min=1), default=MOST_ROWS, show_default=True, metavar="N",
        help="Refuse captures with more rows than this; each row takes 100 to 1,000 bytes of memory.",
    )(command)  # fmt: skip


probe: Final = click.option(
    "--probe",
    type=click.Choice([r.name for r in PROBES]),
    help="Use only this probe (default: the best one that works, for each reason).",
)


def filters(command: F) -> F:
    """Add the filters of ``run``, which are evaluated in the kernel."""
    for option in reversed(
        (
            click.option(
                "-i", "--iface", metavar="NAME", help="Trace only connections whose route leaves by this interface."
            ),
            click.option(
                "-p",
                "--pid",
                type=int,
                metavar="PID",
                help="Trace only connections and block I/O of this process, not of its children; see -c for a server.",
            ),
            click.option(
                "-P", "--port", type=int, metavar="PORT", help="Trace only connections with this local or remote port."
            ),
            click.option(
                "-n",
                "--netns",
                "namespace",
                metavar="NAME",
                help="Trace only connections in this network namespace, given as a name, PID, inode or path.",
            ),
            click.option(
                "-c",
                "--cgroup",
                metavar="FOLDER",
                help="Trace only connections and block I/O of this cgroup v2 and its descendants.",
            ),
            click.option(
                "--container",
                metavar="NAME|ID",
                help="Trace only those of the containers with this name, or with an id that begins so.",
            ),
            click.option("--pod", metavar="NS/NAME", help="Trace only those of this pod of Kubernetes."),
            click.option(
                "--unit", metavar="NAME", help="Trace only those of this systemd unit, such as nginx.service."
            ),
            family(
                "Trace only IPv4 connections, including those with IPv4-mapped IPv6 addresses.",
                "Trace only IPv6 connections.",
            ),
            click.option(
                "--min-idle",
                type=Span(),
                metavar="TIME",
                help="Skip idle resets after a shorter idle time, for example 500ms or 2s (default: none).",
            ),
            probe,
        )
    ):
        command = option(command)
    return command
