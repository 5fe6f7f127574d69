# SPDX-License-Identifier: Apache-2.0
"""Format values for people. Every text from outside goes through ``clean`` before it is printed to a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

_INFINITE: Final = 0x7FFFFFFF
_NUMBER_AND_UNIT: Final = re.compile(r"(?<![\w.:/-])(\d[\d,]*(?:\.\d+)?) (?=[A-Za-z%])")


def clean(text: str) -> str:
    """Return ``text`` with each unprintable character replaced by ``?``, because it could control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def span(us: float) -> str:
    """Return a time span with its unit and three digits: 45 us, 2.10 ms, 204 ms, 1.30 s."""
    if us < 999.5:
        return f"{us:.0f} us"
    if us < 999_500:
        return f"{_three(us / 1000)} ms"
    return f"{_three(us / 1_000_000)} s"


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def signed(value: float, show: Callable[[float], str]) -> str:
    """Return a difference with its sign, as ``show`` shows its size: +241 ms, -0.3; one that it shows as zero has none.

    ``"{:.0f} ms".format`` and ``span`` are such functions. A unit comes after a space.
    """
    text = show(abs(value))
    if not any(digit in text.partition(" ")[0] for digit in "123456789"):
        return text
    return f"{'-' if value < 0 else '+'}{text}"


def size(count: float) -> str:
    """Return a number of bytes with its unit: 512 B, 4.10 kB, 2.80 GB."""
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{_three(count)} {unit}"
    return f"{_three(count / 1000)} TB"


def nominal_size(count: float) -> str:
    """Return a number of bytes that somebody chose, without the zeros that ``size`` shows: 300 kB, 1.5 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def threshold(segments: float) -> str:
    """Return a slow start threshold (ssthresh) in segments; one that was never set, which frames lack, as inf."""
    return f"{segments:.0f}" if segments < _INFINITE else "inf"


def moment(utc_ns: int) -> str:
    """Return a time in ns since 1970 as text in UTC, to the second: 2026-01-02 03:04:05 UTC."""
    try:
        return f"{datetime.fromtimestamp(utc_ns // 1_000_000_000, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):  # an untrusted capture may have any time
        return "an impossible time"


def endpoint(address: str, port: int) -> str:
    """Return address and port as text, with an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def connection(row: Mapping[Any, Any]) -> str:
    """Return the local and the remote end of a record as text."""
    return f"{endpoint(row['saddr'], row['sport'])} > {endpoint(row['daddr'], row['dport'])}"


def process(name: str, pid: int, thread: str = "") -> str:
    """Return a process's name and pid as text, with a ``thread`` of another name; a dash where no process is known.

    The pid comes last, as everywhere, so that a narrow table cuts the thread's name first: ``grpc/event_engine[42]``.
    """
    beside = f"/{clean(thread)}" if thread and thread != name else ""
    return f"{clean(name)}{beside}[{pid}]" if pid else "-"


def holder(row: Mapping[Any, Any]) -> str:
    """Return the process of a connection, a row of ``Trace.summary()``, as ``process`` does."""
    return process(row["process"], row["pid"], row["thread"])


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 reset``, ``2,000 resets``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


_NARROWER: Final = {"cgroups": "a cgroup further down the hierarchy", "sockets": "a port, or its cgroup"}


def left_out(kind: str, number: int) -> str:
    """Return the warning that a filter had no room for so many cgroups or sockets, with a narrower choice."""
    one, are = (kind.removesuffix("s"), "isn't") if number == 1 else (kind, "aren't")
    warning = f"at least {number:,} requested {one} {are} traced, because the filter is full"
    return f"{warning}: ask for {_NARROWER[kind]}" if kind in _NARROWER else warning


def lost(number: int, noun: str, of: str = "") -> str:
    """Return a loss as a clause: ``1 record was lost``, ``2 records of block_io were lost``."""
    return f"{plural(number, noun)}{of and f' of {of}'} {'was' if number == 1 else 'were'} lost"


def guessed(number: int) -> str:
    """Return a sentence on block requests whose submitter is inferred, without its full stop."""
    are, them = ("is", "it") if number == 1 else ("are", "them")
    return (
        f"{plural(number, 'block request')} {are} charged to the task that queued {them} (inferred), because the "
        f"kernel didn't show who submitted {them}"
    )


def unbroken(text: str) -> str:
    """Return ``text`` with a no-break space between each number and its unit, so that no line breaks there."""
    return _NUMBER_AND_UNIT.sub("\\1\u00a0", text).replace("round trip", "round\u00a0trip")


def json_line(row: Mapping[Any, Any], *, allow_nan: bool = True) -> str:
    """Return an object as one line of JSON in printable ASCII. json itself doesn't escape DEL, a control character."""
    return json.dumps(row, ensure_ascii=True, allow_nan=allow_nan).replace("\x7f", "\\u007f")
