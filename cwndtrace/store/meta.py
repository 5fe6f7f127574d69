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
    again. A raw part has no footer: its checksum is that of its header and its frames' heads.
    """

    rows: int
    bytes: int
    footer_crc32: int


@dataclass(frozen=True)
class Deleted:
    """What was deleted of a table, from its first part on."""

    parts: int
    rows: int


@dataclass(frozen=True)
class Meta:
    """A capture's metadata. Where a value is absent, mappings and texts are empty, and numbers 0 or None.

    ``begin`` is the moment from which on the capture is complete. If that is later than the start of the trace, because
    older parts were ``deleted``, ``kept_from`` is its time in ns of CLOCK_MONOTONIC; else None. ``dumped`` is the name
    of the capture of which this one is a dump. Where a reader asked a trace that still runs, all records from before
    ``written_to``, in ns of CLOCK_MONOTONIC, are on disk.

    ``cgroups`` says which versions of cgroups the host had mounted: v2, v1 or hybrid for both. ``counts`` is None where
    the capture has no counts at all, and ``parts`` where it doesn't list its parts.
    ``utc_offsets_ns`` has the first offset, and another one for each step of the wall clock; ``segments`` has the same
    with the moment from which each holds. ``interfaces`` has the interfaces in the namespace that cwndtrace ran in,
    index to name.
    """

    status: str = ""
    version: str = ""
    host: str = ""
    kernel: str = ""
    started: str | None = None
    ended: str | None = None
    begin: Moment | None = None
    end: Moment | None = None
    kept_from: int | None = None
    written_to: int | None = None
    dumped: str = ""
    utc_offsets_ns: tuple[int, ...] = ()
    segments: tuple[Moment, ...] = ()
    filters: Mapping[str, Any] = field(default_factory=dict)
    namespaces: Mapping[str, NamespaceSettings] = field(default_factory=dict)
    probes: Mapping[str, str | None] = field(default_factory=dict)
    block_probe: str = ""
    cgroups: str = ""
    devices: Mapping[str, str] = field(default_factory=dict)
    interfaces: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, Count] | None = None
    unwritten: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, tuple[Part, ...]] | None = None
    deleted: Mapping[str, Deleted] = field(default_factory=dict)
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
        segments = tuple(moment for each in _list(clock.get("segments")) if (moment := _moment(each)))
        start, kept_from = _moment(clock.get("start")), _positive(raw.get("kept_from"))
        late = start is not None and kept_from > start.mono_ns
        return cls(
            status=_text(raw.get("status")),
            version=_text(raw.get("version")),
            host=_text(raw.get("host")),
            kernel=_text(raw.get("kernel")),
            started=_text(raw.get("started")) or None,
            ended=_text(raw.get("ended")) or None,
            begin=Moment(kept_from, _offset(segments or (start,), kept_from)) if late and start else start,
            end=_moment(clock.get("end")),
            kept_from=kept_from if late else None,
            written_to=_integer(raw.get("written_to")),
            dumped=_text(_mapping(raw.get("dump")).get("capture")),
            utc_offsets_ns=tuple(
                _integers(_mapping(each).get("utc_offset_ns") for each in _list(clock.get("segments")))
            ),
            segments=segments,
            filters={name: _plain(value) for name, value in _named(raw.get("filters")) if value is not None},
            namespaces={
                clean(inode): _namespace(each, _mapping(ends.get(inode)))
                for inode, each in _mapping(raw.get("sysctls")).items()
                if isinstance(each, dict)
            },
            probes={reason: _text(probe) or None for reason, probe in _named(raw.get("probes", raw.get("rungs")))},
            block_probe=_text(raw.get("block_probe")),
            cgroups=_text(raw.get("cgroups")),
            devices={number: _text(name) for number, name in _named(raw.get("devices")) if _text(name)},
            interfaces={index: _text(name) for index, name in _named(raw.get("interfaces")) if _text(name)},
            counts={event: _count(_mapping(each)) for event, each in _named(counts)}
            if isinstance(counts, dict)
            else None,
            unwritten={table: _positive(rows) for table, rows in _named(raw.get("unwritten"))},
            parts={table: _parts(_mapping(each)) for table, each in _named(parts)} if isinstance(parts, dict) else None,
            deleted={
                table: Deleted(_positive(_mapping(each).get("parts")), _positive(_mapping(each).get("rows")))
                for table, each in _named(raw.get("deleted"))
            },
            unchanged=_positive(raw.get("unchanged")),
            guessed=_positive(raw.get("guessed")),
            left_out={kind: number for kind, each in _named(raw.get("left_out")) if (number := _positive(each))},
            lossy=tuple(span for each in _list(raw.get("lossy")) for span in _lossy(_mapping(each))),
            lacking=tuple(line[:400] for each in _list(raw.get("lacking"))[:5] if (line := _text(each))),
        )

    def utc_ns(self, mono_ns: int) -> int | None:
        """Return a moment of CLOCK_MONOTONIC in UTC, ns since 1970; None where the capture doesn't say."""
        offset = _offset(self.segments, mono_ns)
        if offset is None and self.begin is not None:
            offset = self.begin.utc_offset_ns
        return None if offset is None else mono_ns + offset

    def mono_ns(self, utc_ns: int) -> int | None:
        """Return a moment in UTC as ns of CLOCK_MONOTONIC; None where the capture doesn't say.

        Of the moments with that time, which are several if the wall clock was set back, this is the last.
        """
        known = [(each.mono_ns, each.utc_offset_ns) for each in self.segments if each.utc_offset_ns is not None]
        if not known and self.begin is not None and self.begin.utc_offset_ns is not None:
            known = [(self.begin.mono_ns, self.begin.utc_offset_ns)]
        for mono_ns, offset in reversed(known):
            if utc_ns - offset >= mono_ns:
                return utc_ns - offset
        return utc_ns - known[0][1] if known else None


def _offset(segments: tuple[Moment, ...], mono_ns: int) -> int | None:
    """Return the offset to UTC that held at a moment, that of the first segment for an earlier one."""
    held = [each.utc_offset_ns for each in segments if each.mono_ns <= mono_ns] or [
        each.utc_offset_ns for each in segments[:1]
    ]
    return held[-1] if held else None


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
