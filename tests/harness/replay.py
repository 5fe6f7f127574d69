# SPDX-License-Identifier: Apache-2.0
"""Raw records in a file, with which everything after the probes runs without a kernel or root.

The file begins with one line of JSON: layout (record sizes in bytes by event), probes, tried, and counts at the end of
the recording. Then follows each read: an event's name, a length, and that many bytes as the kernel wrote them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Final

from cwndtrace.capture.source import TICK_SECONDS, Counts, RawRecords, Source
from cwndtrace.errors import CaptureError
from cwndtrace.format import plural
from cwndtrace.privileges import User
from cwndtrace.records.layout import event, header

_HEAD: Final = struct.Struct("<16sI")


def record(path: Path, source: Source, reads: Iterable[RawRecords]) -> None:
    """Write ``reads``, which came from ``source``, to ``path``."""
    head = {
        "layout": {name: event(name).size for name in source.events},
        "probes": source.probes,
        "tried": source.tried,
        "block_probe": source.block_probe,
        "lacking": source.lacking,
        "counts": asdict(source.counts()),
    }
    with path.open("wb") as file:
        file.write(json.dumps(head, sort_keys=True).encode() + b"\n")
        for name, raw in reads:
            file.write(_HEAD.pack(name.encode(), len(raw)) + raw)


class Replay:
    """A recording as a source (see cwndtrace.capture.source.Source). Each poll returns one read, until none is left.

    The constructor raises CaptureError where the file isn't a recording, is cut off, or has records of another layout.
    """

    def __init__(self, path: Path) -> None:
        try:
            first, _, body = path.read_bytes().partition(b"\n")
            head = json.loads(first)
            sizes = dict(head["layout"])
            self.probes: dict[str, str | None] = dict(head.get("probes", head.get("rungs")))
            self.tried: dict[str, dict[str, str]] = dict(head["tried"])
            self.block_probe: str | None = head.get("block_probe")
            self.lacking: str | None = head.get("lacking")
            self.longest_tick_s = TICK_SECONDS
            self.read_ns = 0
            self._counts = Counts(**head["counts"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise CaptureError(f"{path} isn't a recording of raw records: {e}") from e
        ours = {name: each.size for name, each in header().events.items()}
        for name, size in sizes.items():
            if size != ours.get(name):
                here = f"has {ours[name]}" if name in ours else "has no such records"
                cause = f"{path} holds {name} records of {plural(size, 'byte')}, this version {here}"
                raise CaptureError(cause, "record it again")
        self.events: tuple[str, ...] = tuple(sizes)
        self._reads = list(reversed(self._parse(path, body, sizes)))

    @staticmethod
    def _parse(path: Path, body: bytes, sizes: dict[str, int]) -> list[RawRecords]:
        reads: list[RawRecords] = []
        at = 0
        while at < len(body):
            if at + _HEAD.size > len(body):
                raise CaptureError(f"{path} is cut off after {plural(len(reads), 'read')}", "record it again")
            name, size = _HEAD.unpack_from(body, at)
            at += _HEAD.size + size
            if at > len(body):
                raise CaptureError(f"{path} is cut off after {plural(len(reads), 'read')}", "record it again")
            which = name.rstrip(b"\0").decode("ascii", "replace")
            if which not in sizes or size % sizes[which]:
                raise CaptureError(f"{path} is damaged after {plural(len(reads), 'read')}", "record it again")
            reads.append((which, body[at - size : at]))
        return reads

    def begin(self, mono_ns: int) -> None:
        """Do nothing: all records of a recording are from before."""

    def poll(self, timeout_s: float) -> list[RawRecords]:  # noqa: ARG002  (nothing to wait for)
        """Return the records of the next read, if there is one."""
        return [self._reads.pop()] if self._reads else []

    def counts(self) -> Counts:
        """Return the counters at the end of the recording."""
        return self._counts

    def exhausted(self) -> bool:
        """Return whether all reads have been returned."""
        return not self._reads

    def capabilities_needed(self, user: User | None) -> frozenset[int]:  # noqa: ARG002
        """Return no capabilities: the file has been read completely."""
        return frozenset()

    def stop(self) -> list[RawRecords]:
        """Return the remaining reads."""
        left, self._reads = list(reversed(self._reads)), []
        return left

    def close(self) -> None:
        """Do nothing: no file is open."""
