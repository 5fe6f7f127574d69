# SPDX-License-Identifier: Apache-2.0
"""Captures whose texts are attacks on terminals, pages and pictures."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from cwndtrace.trace import Trace
from tests.unit import frames

NAMES = {
    "control characters": "\x1b]0;owned\x07\x1b[2J\x9b31m\r\n\x7f\b",
    "bidi overrides": "a\u202egpj\u2066.exe\u200f\ufeff\u2028",
    "HTML": "<img src=x onerror=alert(1)>\"'&",
    "a format string": "%s%n{0}{a.b}{{7*7}}${x}`id`",
    "mathtext": "$x^{$_\\frac{1}{$",
    "256 bytes of UTF-8": "é\U0001f4a9" * 42 + "xyzé",
    "nothing but a combining mark": "\u0301\u0488",
    "a formula": "=cmd|' /C calc'!A0",
}
assert len(NAMES["256 bytes of UTF-8"].encode()) == 257
TEXT = "<script>alert(1)</script>'\"&\x1b[31m\x1b]0;owned\x07\u202e{{7*7}}$x^2$"
"""Markup, terminal controls and templates in one text."""


def named(path: Path, name: str) -> Trace:
    """Write a capture in which every name is ``name``, cut to its field."""
    short = name.encode()[:16]
    resets = frames.table("cwnd_reset", frames.reset(5, comm=short, ca_name=short), frames.reset(7, comm=short))
    seen = [frames.snapshot(t, bytes_sent=40_100_000 + t * 100_000, comm=name, ca_name=name) for t in (0, 9)]
    blocks = frames.table("block_io", frames.block(1, comm=short), frames.block(2, comm=short))
    return frames.capture(
        path, resets=resets, connections=frames.snapshots(*seen), block_io=blocks, host=name, kernel=name,
        devices={"7:0": name, "259:0": name}, interfaces={"2": name},
        filters={"cgroup": f"/sys/fs/cgroup/{name}", "iface": name}, probes={"idle": name, name: None},
        sysctls={str(frames.NETNS): {"name": name, "net.ipv4.tcp_congestion_control": name}, "1": {"name": name}},
    )  # fmt: skip


def everywhere(path: Path) -> Trace:
    """Write a capture in which every text is an attack."""
    resets = frames.table("cwnd_reset", frames.reset(5, comm=TEXT.encode()[:16], ca_name=b"</td><b>\x1b[1m"))
    seen = [
        frames.snapshot(t, bytes_sent=40_100_000 + t * 100_000, comm=TEXT, state=TEXT, ca_name=TEXT) for t in (0, 9)
    ]
    blocks = frames.table("block_io", frames.block(1, comm=b"<img src=x>\x1b[2J"), frames.block(2))
    return frames.capture(
        path, resets=resets, connections=frames.snapshots(*seen), block_io=blocks, host=TEXT, kernel=TEXT,
        devices={"7:0": TEXT}, filters={TEXT: TEXT}, probes={"idle": TEXT, TEXT: None},
        sysctls={str(frames.NETNS): {"name": TEXT, "net.ipv4.tcp_congestion_control": TEXT}, TEXT: {"name": TEXT}},
    )  # fmt: skip


class Markup(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attrs} | {(tag, "")}
