# SPDX-License-Identifier: Apache-2.0
"""Values as a person reads them. Everything that came from outside goes through ``clean`` before a terminal sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

_INFINITE: Final = 0x7FFFFFFF
_NUMBER_AND_UNIT: Final = re.compile(r"(?<![\w.:/-])(\d[\d,]*(?:\.\d+)?) (?=[A-Za-z%])")


def clean(text: str) -> str:
    """``text`` from outside without what could steer a terminal: each control character becomes ``?``."""
    return "".join(c if c.isprintable() else "?" for c in text)


def span(us: float) -> str:
    """A time span with its unit, three digits: 45 us, 2.10 ms, 204 ms, 1.30 s."""
    if us < 999.5:
        return f"{us:.0f} us"
    if us < 999_500:
        return f"{_three(us / 1000)} ms"
    return f"{_three(us / 1_000_000)} s"


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def size(count: float) -> str:
    """A number of bytes with its unit: 512 B, 4.10 kB, 2.80 GB."""
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{_three(count)} {unit}"
    return f"{_three(count / 1000)} TB"


def threshold(segments: int) -> str:
    """A slow start threshold in segments; the kernel's "never set" as inf."""
    return "inf" if segments >= _INFINITE else str(segments)


def endpoint(address: str, port: int) -> str:
    """Address and port, IPv6 in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def connection(row: Mapping[Any, Any]) -> str:
    """Local and remote end of a record."""
    return f"{endpoint(row['saddr'], row['sport'])} > {endpoint(row['daddr'], row['dport'])}"


def process(comm: str, pid: int) -> str:
    """Name and pid, a dash where nobody is known."""
    return f"{clean(comm)}[{pid}]" if pid else "-"


def plural(number: int, noun: str) -> str:
    """``1 reset``, ``2,000 resets``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


_NARROWER: Final = {"cgroups": "a cgroup further down", "sockets": "a port, or its cgroup"}


def left_out(kind: str, number: int) -> str:
    """That a filter had no room for so many cgroups or sockets, and what to ask for instead."""
    here = f"at least {number:,} {kind} of what was asked for aren't traced, because the filter is full"
    return f"{here}: ask for {_NARROWER[kind]}" if kind in _NARROWER else here


def lost(number: int, noun: str, of: str = "") -> str:
    """``1 record was lost``, ``2 records of block_io were lost``."""
    return f"{plural(number, noun)}{of and f' of {of}'} {'was' if number == 1 else 'were'} lost"


def unbroken(text: str) -> str:
    """``text`` with no-break spaces between a number and what it counts, so that no line ends between them."""
    return _NUMBER_AND_UNIT.sub("\\1\u00a0", text)


def json_line(row: Mapping[Any, Any], *, allow_nan: bool = True) -> str:
    """An object as one line of JSON, in ASCII that prints; json alone leaves DEL, a control character, as it is."""
    return json.dumps(row, ensure_ascii=True, allow_nan=allow_nan).replace("\x7f", "\\u007f")
