# SPDX-License-Identifier: Apache-2.0
"""Decoding of Perfetto's trace format by its own messages, without its trace processor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TracePacket, TrackEvent

_VALUES = ("bool_value", "uint_value", "int_value", "double_value", "string_value_iid")


@dataclass
class Placed:
    """A slice, an instant or a counter value, on a track: the names from the outermost one, then its number."""

    track: tuple[Any, ...]
    kind: str
    start_ns: int
    end_ns: int
    name: str
    value: int
    args: dict[str, Any]
    flows: list[int]


@dataclass
class Decoded:
    """A trace: events in the order of the file, clock snapshots as (MONOTONIC, REALTIME), and all of its texts."""

    events: list[Placed] = field(default_factory=list)
    clocks: list[dict[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    cleared: int = 0

    def on(self, *track: str) -> list[Placed]:
        """Return the events on tracks of these names; a name is that of the track or of one above it."""
        return [event for event in self.events if set(track) <= {*event.track}]


def decode(file: Path) -> Decoded:
    """Return what a file has. Raises AssertionError where slices of a track overlap."""
    out, texts = Decoded(), dict[tuple[str, int], str]()
    tracks, open_slices, ended, clock = dict[int, tuple[Any, ...]](), dict[int, Placed](), dict[int, int](), 0
    for packet in Trace.FromString(file.read_bytes()).packet:
        if packet.HasField("clock_snapshot"):
            assert packet.clock_snapshot.primary_trace_clock == 3
            out.clocks.append({each.clock_id: each.timestamp for each in packet.clock_snapshot.clocks})
            continue
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            name = track.process.process_name if track.HasField("process") else track.name
            above = tracks[track.parent_uuid][:-1] if track.parent_uuid else ()
            tracks[track.uuid] = (*above, name, track.uuid)
            out.texts.append(name)
            continue
        if packet.sequence_flags & TracePacket.SEQ_INCREMENTAL_STATE_CLEARED:
            texts, clock = {}, packet.trace_packet_defaults.timestamp_clock_id
            out.cleared += 1
        assert packet.sequence_flags & TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        assert clock == 3
        for kind in ("event_names", "debug_annotation_names", "debug_annotation_string_values"):
            for entry in getattr(packet.interned_data, kind):
                text = entry.name if kind != "debug_annotation_string_values" else entry.str.decode()
                texts[kind, entry.iid] = text
                out.texts.append(text)
        event = packet.track_event
        if event.type == TrackEvent.TYPE_SLICE_END:
            ended[event.track_uuid] = open_slices.pop(event.track_uuid).end_ns = packet.timestamp
            continue
        args = {}
        for note in event.debug_annotations:
            (value,) = (getattr(note, name) for name in _VALUES if note.HasField(name))
            is_text = note.HasField("string_value_iid")
            args[texts["debug_annotation_names", note.name_iid]] = (
                texts["debug_annotation_string_values", value] if is_text else value
            )
        shown = Placed(
            tracks[event.track_uuid], TrackEvent.Type.Name(event.type).removeprefix("TYPE_"), packet.timestamp,
            packet.timestamp, texts.get(("event_names", event.name_iid), ""), event.counter_value, args,
            [*event.flow_ids, *event.terminating_flow_ids],
        )  # fmt: skip
        out.events.append(shown)
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            assert event.track_uuid not in open_slices
            assert packet.timestamp >= ended.get(event.track_uuid, 0)
            open_slices[event.track_uuid] = shown
    assert not open_slices
    return out
