# SPDX-License-Identifier: Apache-2.0
"""meta.json of any content becomes values of the types that Meta declares, and that of a capture keeps its values."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cwndtrace import tcp
from cwndtrace.store.meta import Count, Deleted, LossySpan, Meta, Moment, NamespaceSettings, Part, listed
from tests.unit import frames

LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
KEYS = [
    *frames.meta(),
    "unwritten",
    "parts",
    "lacking",
    "left_out",
    "lossy",
    "sysctls_end",
    "kept_from",
    "deleted",
    "dump",
]


def shapes(value: Any) -> Any:
    """Return a strategy for ``value`` with each of its leaves replaced by any JSON."""
    if isinstance(value, dict):
        return st.fixed_dictionaries({name: JSON | shapes(inner) for name, inner in value.items()})
    return JSON


def test_the_metadata_of_a_capture_keeps_its_values() -> None:
    raw = frames.meta(
        clock={
            "start": {"mono_ns": 5, "utc_offset_ns": 7},
            "end": {"mono_ns": 9, "utc_offset_ns": 8},
            "segments": [{"utc_offset_ns": 7}, {"utc_offset_ns": 8}],
        },
        sysctls={"1": {"name": "this", "host": True, tcp.IDLE_SYSCTL: 1, tcp.CONTROL_SYSCTL: "cubic"}},
        counts={"cwnd_reset": {"kept": 3, "lost": 1}},
        lossy=[{"event": "cwnd_reset", "start_ns": 1, "end_ns": 2, "lost": 1}],
        left_out={"sockets": 2, "cgroups": 0},
        lacking=["something"],
        parts={"cwnd_reset": {"rows": [2, 1], "bytes": [20, 10], "footer_crc32": [8, 9]}},
    )
    about = Meta.parse(json.loads(json.dumps(raw)))
    assert (about.host, about.kernel) == (raw["host"], raw["kernel"])
    assert (about.begin, about.end, about.utc_offsets_ns) == (Moment(5, 7), Moment(9, 8), (7, 8))
    assert about.namespaces == {"1": NamespaceSettings("this", True, 1, "cubic")}
    assert about.counts == {"cwnd_reset": Count(3, 1)}
    assert about.lossy == (LossySpan("cwnd_reset", 1, 2, 1),)
    assert about.left_out == {"sockets": 2}
    assert about.lacking == ("something",)
    assert about.parts == {"cwnd_reset": (Part(2, 20, 8), Part(1, 10, 9))}
    assert (about.probes, about.interfaces) == (raw["probes"], {"3": "eth0"})


def test_settings_at_the_end_are_beside_those_at_the_start() -> None:
    def settings(name: str, idle: int | None) -> dict[str, Any]:
        return {"name": name, "host": False, tcp.IDLE_SYSCTL: idle, tcp.CONTROL_SYSCTL: "cubic"}

    spaces = Meta.parse(
        {
            "sysctls": {"1": settings("nginx[5]", 1), "2": settings("young", 0), "3": settings("gone", 1)},
            "sysctls_end": {
                "1": settings("nginx[9]", 0) | {tcp.CONTROL_SYSCTL: "bbr"},
                "2": settings("young", 0) | {"new": True},
                "4": 7,
            },
        }
    ).namespaces
    assert {inode: (space.idle_start, space.idle_end, space.idle_last) for inode, space in spaces.items()} == {
        "1": (1, 0, 0),
        "2": (None, 0, 0),
        "3": (1, None, 1),
    }
    assert (spaces["1"].name, spaces["3"].congestion_control_end) == ("nginx[9]", None)
    assert (spaces["1"].congestion_control, spaces["1"].congestion_control_end) == ("cubic", "bbr")


def test_listed_parts_are_read_back() -> None:
    parts = (Part(2, 20, 8), Part(1, 10, 9))
    whole = listed(parts)
    assert Meta.parse({"parts": {"block_io": whole}}).parts == {"block_io": parts}
    for name in whole:
        without = {key: each for key, each in whole.items() if key != name}
        for damaged in (without, without | {name: whole[name][:1]}, without | {name: 7}):
            assert Meta.parse({"parts": {"block_io": damaged}}).parts == {"block_io": ()}


def test_empty_metadata_gives_the_defaults() -> None:
    assert Meta.parse({}) == Meta()


@given(JSON | shapes(frames.meta()) | st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_content_becomes_values_of_the_right_types(raw: Any) -> None:
    about = Meta.parse(raw if isinstance(raw, dict) else {})
    assert about.host.isprintable()
    assert all(number > 0 for number in about.left_out.values())
    assert all(type(span.start_ns) is int for span in about.lossy)
    for space in about.namespaces.values():
        assert {type(space.idle_start), type(space.idle_end), type(space.idle_last)} <= {int, type(None)}
        assert type(space.new) is bool
    assert all(count.lost >= 0 for count in (about.counts or {}).values())
    assert all(part.rows >= 0 for parts in (about.parts or {}).values() for part in parts)


def test_moments_are_dated_by_the_segment_that_held() -> None:
    segments = [{"mono_ns": 100, "utc_offset_ns": 1000}, {"mono_ns": 200, "utc_offset_ns": 5000}]
    about = Meta.parse({"clock": {"start": segments[0], "segments": segments}})
    assert [about.utc_ns(mono_ns) for mono_ns in (50, 150, 200, 300)] == [1050, 1150, 5200, 5300]
    assert [about.mono_ns(utc_ns) for utc_ns in (1050, 1150, 5200, 5300)] == [50, 150, 200, 300]
    assert (Meta().utc_ns(5), Meta().mono_ns(5)) == (None, None)


def test_a_window_begins_where_it_is_complete() -> None:
    start = {"mono_ns": 100, "utc_offset_ns": 1000}
    raw = {"clock": {"start": start, "segments": [start]}, "deleted": {"block_io": {"parts": 3, "rows": 40}}}
    about = Meta.parse({**raw, "kept_from": 170})
    assert (about.begin, about.kept_from) == (Moment(170, 1000), 170)
    assert about.deleted == {"block_io": Deleted(3, 40)}
    for nonsense in (100, 90, 0, -5, "170", None, True):
        about = Meta.parse({**raw, "kept_from": nonsense})
        assert (about.begin, about.kept_from) == (Moment(100, 1000), None)
