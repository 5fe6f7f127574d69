# SPDX-License-Identifier: Apache-2.0
"""``meta.json`` as typed values, checked once where it is read.

A capture may be untrusted. A value of the wrong type counts as absent, and control characters in texts are replaced, so
users of ``Meta`` need no checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cwndtrace import tcp
from cwndtrace.format import clean


@dataclass(frozen=True)
class Moment:
    """One moment: ``mono_ns`` of CLOCK_MONOTONIC, and the offset to add to it for UTC, both in ns."""

    mono_ns: int
    utc_offset_ns: int | None


@dataclass(frozen=True)
class NamespaceSettings:
    """A network namespace: its name for people, whether it is the host's, and its settings.

    ``idle`` is tcp_slow_start_after_idle when the capture began, or, in a namespace that is younger (``new``), when it
    ended. ``idle_end`` is that at the end in any case. Settings are None where unknown: those at the end in captures of
    older versions, in captures that were cut short, and in namespaces that were gone by then.
    """

    name: str
    host: bool
    idle: int | None
    congestion_control: str | None
    idle_end: int | None = None
    congestion_control_end: str | None = None
    new: bool = False

    @property
    def idle_start(self) -> int | None:
        """The setting when the capture began; None where it is unknown or the namespace wasn't there yet."""
        return None if self.new else self.idle

    @property
    def idle_last(self) -> int | None:
        """The last known setting."""
        return self.idle if self.idle_end is None else self.idle_end


@dataclass(frozen=True)
class Count:
    """The numbers of records of one event that the trace kept and that the kernel lost."""

    kept: int
    lost: int


@dataclass(frozen=True)
class LossySpan:
    """A span of CLOCK_MONOTONIC, in ns, in which records of ``event`` were lost."""

    event: str
    start_ns: int
    end_ns: int
    lost: int


@dataclass(frozen=True)
class Part:
    """One part of a table, as it was written.

    Each page of a part has a checksum of its own, and the footer says where each column's pages are and what they hold.
    So a checksum of the footer tells whether a part is the one that was written, without writing or reading the pages
    again.
    """

    rows: int
    bytes: int
    footer_crc32: int


@dataclass(frozen=True)
class Meta:
    """A capture's metadata. Where a value is absent, mappings and texts are empty, and numbers 0 or None.

    ``counts`` is None where the capture has no counts at all, and ``parts`` where it doesn't list its parts.
    ``utc_offsets_ns`` has the first offset, and another one for each step of the wall clock. ``interfaces`` has
    the interfaces in the namespace that cwndtrace ran in, index to name.
    """

    status: str = ""
    version: str = ""
    host: str = ""
    kernel: str = ""
    started: str | None = None
    ended: str | None = None
    begin: Moment | None = None
    end: Moment | None = None
    utc_offsets_ns: tuple[int, ...] = ()
    filters: Mapping[str, Any] = field(default_factory=dict)
    namespaces: Mapping[str, NamespaceSettings] = field(default_factory=dict)
    probes: Mapping[str, str | None] = field(default_factory=dict)
    block_probe: str = ""
    devices: Mapping[str, str] = field(default_factory=dict)
    interfaces: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, Count] | None = None
    unwritten: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, tuple[Part, ...]] | None = None
    unchanged: int = 0
    guessed: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    lossy: tuple[LossySpan, ...] = ()
    lacking: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Meta:
        """Return the values of a ``meta.json`` with any content; older captures call the probes ``rungs``."""
        clock = _mapping(raw.get("clock"))
        counts, parts = raw.get("counts"), raw.get("parts")
        ends = _mapping(raw.get("sysctls_end"))
        return cls(
            status=_text(raw.get("status")),
            version=_text(raw.get("version")),
            host=_text(raw.get("host")),
            kernel=_text(raw.get("kernel")),
            started=_text(raw.get("started")) or None,
            ended=_text(raw.get("ended")) or None,
            begin=_moment(clock.get("start")),
            end=_moment(clock.get("end")),
            utc_offsets_ns=tuple(
                _integers(_mapping(each).get("utc_offset_ns") for each in _list(clock.get("segments")))
            ),
            filters={name: _plain(value) for name, value in _named(raw.get("filters")) if value is not None},
            namespaces={
                clean(inode): _namespace(each, _mapping(ends.get(inode)))
                for inode, each in _mapping(raw.get("sysctls")).items()
                if isinstance(each, dict)
            },
            probes={reason: _text(probe) or None for reason, probe in _named(raw.get("probes", raw.get("rungs")))},
            block_probe=_text(raw.get("block_probe")),
            devices={number: _text(name) for number, name in _named(raw.get("devices")) if _text(name)},
            interfaces={index: _text(name) for index, name in _named(raw.get("interfaces")) if _text(name)},
            counts={event: _count(_mapping(each)) for event, each in _named(counts)}
            if isinstance(counts, dict)
            else None,
            unwritten={table: _positive(rows) for table, rows in _named(raw.get("unwritten"))},
            parts={table: _parts(_mapping(each)) for table, each in _named(parts)} if isinstance(parts, dict) else None,
            unchanged=_positive(raw.get("unchanged")),
            guessed=_positive(raw.get("guessed")),
            left_out={kind: number for kind, each in _named(raw.get("left_out")) if (number := _positive(each))},
            lossy=tuple(span for each in _list(raw.get("lossy")) for span in _lossy(_mapping(each))),
            lacking=tuple(line[:400] for each in _list(raw.get("lacking"))[:5] if (line := _text(each))),
        )


def listed(parts: Iterable[Part]) -> dict[str, list[int]]:
    """Return a table's parts as ``meta.json`` lists them: one list for each field, in the order of the parts."""
    in_order = list(parts)
    return {column.name: [getattr(part, column.name) for part in in_order] for column in fields(Part)}


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _named(value: object) -> Iterator[tuple[str, Any]]:
    return ((clean(name), each) for name, each in _mapping(value).items())


def _text(value: object) -> str:
    return clean(value) if isinstance(value, str) else ""


def _integer(value: object) -> int | None:
    return value if type(value) is int else None


def _integers(values: Iterator[object]) -> Iterator[int]:
    return (value for value in values if type(value) is int)


def _positive(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


def _plain(value: object) -> Any:
    """Return a value of any type for display: integers and booleans unchanged, all else as clean text."""
    return value if type(value) in (int, bool) else clean(str(value))


def _moment(value: object) -> Moment | None:
    mono_ns = _integer(_mapping(value).get("mono_ns"))
    return None if mono_ns is None else Moment(mono_ns, _integer(_mapping(value).get("utc_offset_ns")))


def _namespace(value: dict[str, Any], end: dict[str, Any]) -> NamespaceSettings:
    return NamespaceSettings(
        # The process that the namespace was named after at the start may have ended.
        name=_text(end.get("name")) or _text(value.get("name")),
        host=value.get("host") is True,
        idle=_integer(value.get(tcp.IDLE_SYSCTL)),
        congestion_control=_text(value.get(tcp.CONTROL_SYSCTL)) or None,
        idle_end=_integer(end.get(tcp.IDLE_SYSCTL)),
        congestion_control_end=_text(end.get(tcp.CONTROL_SYSCTL)) or None,
        new=end.get("new") is True,
    )


def _count(value: dict[str, Any]) -> Count:
    return Count(_positive(value.get("kept")), _positive(value.get("lost")))


def _lossy(value: dict[str, Any]) -> Iterator[LossySpan]:
    start, end, lost = (value.get(name) for name in ("start_ns", "end_ns", "lost"))
    if type(start) is int and type(end) is int and type(lost) is int:
        yield LossySpan(_text(value.get("event")), start, end, lost)


def _parts(value: dict[str, Any]) -> tuple[Part, ...]:
    """Return the parts of one table; none where the lists of their fields are missing or differ in length."""
    columns = [value.get(column.name) for column in fields(Part)]
    lists = [column for column in columns if isinstance(column, list)]
    if len(lists) < len(columns) or len({len(column) for column in lists}) > 1:
        return ()
    return tuple(Part(*map(_positive, row)) for row in zip(*lists, strict=True))
