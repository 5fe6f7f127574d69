# SPDX-License-Identifier: Apache-2.0
"""Perfetto's trace format: tracks, and the events on them, written as they come.

All times are ns of CLOCK_MONOTONIC, which is the clock of the trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackDescriptor, TrackEvent
from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

from cwndtrace.export.text import Writable
from cwndtrace.format import clean

_MONOTONIC: Final = 3  # of enum BuiltinClock in builtin_clock.proto
_REALTIME: Final = 1
_CLEARED, _NEEDS_STATE = 1, 2  # of enum SequenceFlags in trace_packet.proto
_SEQUENCE: Final = 1

_MOST_TEXTS: Final = 50_000
"""The most texts that are remembered, so that each is written once. A capture may have a new one in every row."""

_LONGEST: Final = 1000
"""The most characters of a text."""

_LAST_PID: Final = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h."""


class Packets:
    """A trace that is written to ``file`` packet by packet; ``events`` counts slices, instants and counter values.

    Raises ValueError for a time or a number that the format has no room for, which only a damaged capture has.
    """

    def __init__(self, file: Writable) -> None:
        self._builder = StreamingTraceProtoBuilder(file)
        self._texts: dict[str, dict[str, int]] = {}
        self._tracks = 0
        self._pids: set[int] = set()
        self._cleared = True
        self.events = 0

    def clocks(self, moments: Iterable[tuple[int, int | None]]) -> None:
        """Say what the wall clock showed, ns since 1970, at some moments; None where that isn't known."""
        for mono_ns, utc_ns in moments:
            packet = self._builder.create_packet()
            snapshot = packet.clock_snapshot
            snapshot.primary_trace_clock = _MONOTONIC
            snapshot.clocks.add(clock_id=_MONOTONIC, timestamp=mono_ns)
            if utc_ns is not None:
                snapshot.clocks.add(clock_id=_REALTIME, timestamp=utc_ns)
            self._write(packet)

    def track(self, name: str, parent: int = 0, *, unit: str = "") -> int:
        """Return a new track, after the others of ``parent``; with a ``unit`` it takes values of a counter."""
        packet, descriptor = self._descriptor(parent)
        descriptor.name = _shown(name)
        if unit:
            descriptor.counter.unit_name = unit
        self._write(packet)
        return self._tracks

    def process(self, pid: int, name: str) -> int:
        """Return a new track of a process, for other tracks to be under.

        Perfetto has one process for each pid. Another one with that pid gets a plain track, and so does one with an
        impossible pid.
        """
        if not 0 < pid <= _LAST_PID or pid in self._pids:
            return self.track(f"{name}[{pid}]")
        self._pids.add(pid)
        packet, descriptor = self._descriptor(0)
        descriptor.process.pid = pid
        descriptor.process.process_name = _shown(name)
        self._write(packet)
        return self._tracks

    def slice(
        self, track: int, name: str, start_ns: int, end_ns: int, args: Mapping[str, Any], flows: Iterable[int] = ()
    ) -> None:
        """Write a slice, from which ``flows`` start. Slices of a track come in order and don't overlap."""
        if end_ns < start_ns:
            raise ValueError("a slice ends before it begins")
        event = self._event(track, TrackEvent.TYPE_SLICE_BEGIN, start_ns, name, args)
        event.track_event.flow_ids.extend(flows)
        self._write(event)
        self._write(self._event(track, TrackEvent.TYPE_SLICE_END, end_ns))
        self.events += 1

    def instant(self, track: int, name: str, at_ns: int, args: Mapping[str, Any], flows: Iterable[int] = ()) -> None:
        """Write an instant, at which ``flows`` end."""
        event = self._event(track, TrackEvent.TYPE_INSTANT, at_ns, name, args)
        event.track_event.terminating_flow_ids.extend(flows)
        self._write(event)
        self.events += 1

    def value(self, track: int, at_ns: int, value: int) -> None:
        """Write a value of a counter, which holds from then on."""
        packet = self._event(track, TrackEvent.TYPE_COUNTER, at_ns)
        packet.track_event.counter_value = value
        self._write(packet)
        self.events += 1

    def _descriptor(self, parent: int) -> tuple[Any, Any]:
        self._tracks += 1
        packet = self._builder.create_packet()
        descriptor = packet.track_descriptor
        descriptor.uuid = self._tracks
        if parent:
            descriptor.parent_uuid = parent
        descriptor.child_ordering = TrackDescriptor.EXPLICIT
        descriptor.sibling_order_rank = self._tracks
        # Two connections may have the same name in two network namespaces.
        descriptor.sibling_merge_behavior = TrackDescriptor.SIBLING_MERGE_BEHAVIOR_NONE
        return packet, descriptor

    def _event(
        self, track: int, kind: int, at_ns: int, name: str | None = None, args: Mapping[str, Any] | None = None
    ) -> Any:
        packet = self._builder.create_packet()
        packet.timestamp = at_ns
        packet.sequence_flags = _NEEDS_STATE
        if self._cleared or sum(map(len, self._texts.values())) > _MOST_TEXTS:
            packet.sequence_flags |= _CLEARED
            packet.trace_packet_defaults.timestamp_clock_id = _MONOTONIC
            self._texts = {"event_names": {}, "debug_annotation_names": {}, "debug_annotation_string_values": {}}
            self._cleared = False
        event = packet.track_event
        event.type = kind
        event.track_uuid = track
        if name is not None:
            event.name_iid = self._interned(packet, "event_names", name)
        for key, value in (args or {}).items():
            if value is None or value != value or value == "":  # NaN, and a text that isn't known
                continue
            note = event.debug_annotations.add(name_iid=self._interned(packet, "debug_annotation_names", key))
            if isinstance(value, bool):
                note.bool_value = value
            elif isinstance(value, float):
                note.double_value = value
            elif isinstance(value, int):
                setattr(note, "uint_value" if value >= 1 << 63 else "int_value", value)
            else:
                note.string_value_iid = self._interned(packet, "debug_annotation_string_values", str(value))
        return packet

    def _interned(self, packet: Any, kind: str, text: str) -> int:
        """Return the number of a text, which is written with the first packet that has it."""
        known, text = self._texts[kind], text[:_LONGEST]
        if (number := known.get(text)) is None:
            number = known[text] = len(known) + 1
            entry = getattr(packet.interned_data, kind).add(iid=number)
            if kind == "debug_annotation_string_values":
                entry.str = clean(text).encode()
            else:
                entry.name = clean(text)
        return number

    def _write(self, packet: Any) -> None:
        packet.trusted_packet_sequence_id = _SEQUENCE
        self._builder.write_packet(packet)


def _shown(text: str) -> str:
    return clean(text[:_LONGEST])
