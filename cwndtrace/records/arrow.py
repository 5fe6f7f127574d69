# SPDX-License-Identifier: Apache-2.0
"""Records as Arrow tables, and the schemas of a capture's tables."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cwndtrace.format import clean
from cwndtrace.lazy import pa
from cwndtrace.records.layout import Field, Records, decode, event, header, numpy_field


def address(raw: bytes) -> str:
    """Return the text of a 16-byte IPv6 address; an IPv4-mapped one gives an IPv4 address."""
    ip = ipaddress.IPv6Address(raw)
    return str(ip.ipv4_mapped or ip)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _device(raw: bytes) -> str:
    value = int.from_bytes(raw, "little")
    return f"{value >> 20}:{value & 0xFFFFF}"


# ---- Arrow ----------------------------------------------------------------------------------------


@cache
def _dictionary() -> pa.DataType:
    return pa.dictionary(pa.int32(), pa.string())


@cache
def _time() -> pa.DataType:
    # Microseconds, because Spark reads no finer timestamps; the *_ns columns are exact.
    return pa.timestamp("us", tz="UTC")


@cache
def arrow_schema(name: str) -> pa.Schema:
    """Return the Arrow schema of an event.

    Enums, texts, addresses and devices become dictionary-encoded strings; other fields keep their integer type. Each
    column's metadata holds ``unit`` and ``description``. The first column, ``time``, is the record's first field in
    UTC.
    """
    ev = event(name)
    first = ev.fields[0].name
    columns = [_meta(pa.field("time", _time()), "UTC", f"{first} on the wall clock")]
    columns += [_meta(pa.field(f.name, _arrow_type(f)), f.unit, f.description) for f in ev.fields]
    return pa.schema(columns, metadata={"event": name})


def _meta(column: pa.Field, unit: str, description: str) -> pa.Field:
    return column.with_metadata({"unit": unit, "description": description})


@cache
def _columns(name: str) -> tuple[tuple[Field, pa.DataType], ...]:
    return tuple((f, _arrow_type(f)) for f in event(name).fields)


@cache
def _arrow_type(f: Field) -> pa.DataType:
    if f.unit in ("text", "addr", "dev") or f.unit.startswith("enum "):
        return _dictionary()
    return pa.from_numpy_dtype(np.dtype(numpy_field(f)[1]))


def to_arrow(name: str, records: Records, utc_offset_ns: int | npt.NDArray[np.int64]) -> pa.Table:
    """Return records as an Arrow table of ``arrow_schema(name)``.

    ``utc_offset_ns`` is the offset from CLOCK_MONOTONIC to UTC in nanoseconds, one for all records or one for each.
    """
    ev = event(name)
    times = (records[ev.fields[0].name].astype(np.int64) + utc_offset_ns) // 1000
    arrays: list[Any] = [numbers(_time(), times)]
    for f, column_type in _columns(name):
        column = np.ascontiguousarray(records[f.name])
        arrays.append(_labels(f, column) if column_type is _dictionary() else numbers(column_type, column))
    return pa.Table.from_arrays(arrays, schema=arrow_schema(name))


@dataclass(frozen=True, eq=False)
class TimedRecords:
    """Records of one event as the kernel wrote them, each with its offset from CLOCK_MONOTONIC to UTC, in nanoseconds.

    An Arrow table of a few records takes as long to make as one of a thousand, so joining the records first is faster.
    """

    event: str
    data: bytes = field(repr=False)
    utc_offsets_ns: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.utc_offsets_ns)

    @property
    def records(self) -> Records:
        """The records as ``decode`` reads them, without a copy."""
        return decode(self.event, self.data)

    def slice(self, offset: int, length: int) -> TimedRecords:
        """Return ``length`` records from the one with number ``offset`` on, as far as there are so many."""
        size, end = event(self.event).size, offset + length
        return TimedRecords(self.event, self.data[offset * size : end * size], self.utc_offsets_ns[offset:end])

    def to_arrow(self) -> pa.Table:
        """Return the records as an Arrow table, as the function ``to_arrow`` does."""
        return to_arrow(self.event, self.records, self.utc_offsets_ns)

    @staticmethod
    def joined(parts: list[TimedRecords]) -> TimedRecords:
        """Join ``parts`` of one event, at least one, in their order."""
        if len(parts) == 1:
            return parts[0]
        offsets = np.concatenate([part.utc_offsets_ns for part in parts])
        return TimedRecords(parts[0].event, b"".join(part.data for part in parts), offsets)


def joined(parts: Iterable[pa.Table | TimedRecords]) -> pa.Table:
    """Join rows of one event to one Arrow table, in their order."""
    tables: list[pa.Table] = []
    for part_type, group in groupby(parts, type):
        rows = list(group)
        tables += [TimedRecords.joined(rows).to_arrow()] if part_type is TimedRecords else rows
    return pa.concat_tables(tables).unify_dictionaries()


# These functions replace pa.array() and to_numpy(), which inspect their argument first, too slow for small batches, and
# import pandas, which a trace doesn't need while it waits.


def numbers(kind: pa.DataType, column: npt.NDArray[Any], known: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Return an array of type ``kind`` over ``column``, whose items have that width; null where not ``known``."""
    valid = None if known is None else pa.py_buffer(np.packbits(known, bitorder="little"))
    return pa.Array.from_buffers(kind, len(column), [valid, pa.py_buffer(column)])


def values(array: pa.Array) -> npt.NDArray[Any]:
    """Return the items of an array of numbers without nulls, without a copy."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def column(f: pa.Field, items: Any, known: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Return the column ``f`` of a table, of texts, numbers, or times in microseconds; null where not ``known``."""
    if pa.types.is_dictionary(f.type):
        return texts(items).dictionary_encode().cast(f.type)
    width = np.int64 if pa.types.is_timestamp(f.type) else f.type.to_pandas_dtype()
    return numbers(f.type, np.ascontiguousarray(items, width), known)


def texts(strings: Sequence[str]) -> pa.StringArray:
    """Return an array of text."""
    raw = [string.encode() for string in strings]
    ends = np.zeros(len(raw) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, raw), np.int32, len(raw)), out=ends[1:])
    return pa.Array.from_buffers(pa.string(), len(raw), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(raw))])


def _labels(f: Field, column: npt.NDArray[Any]) -> pa.DictionaryArray:
    # The bytes are dictionary-encoded first, so that only the few distinct values are converted to text.
    raw = pa.FixedSizeBinaryArray.from_buffers(pa.binary(f.size), len(column), [None, pa.py_buffer(column)])
    encoded = raw.dictionary_encode()
    distinct = [_label(f, value) for value in encoded.dictionary.to_pylist()]
    if len(set(distinct)) == len(distinct):
        return pa.DictionaryArray.from_arrays(encoded.indices, texts(distinct))
    # Values that differ only after a text's terminating zero give the same text, and a dictionary must not repeat it.
    labels = texts(distinct).dictionary_encode()
    return pa.DictionaryArray.from_arrays(labels.indices.take(encoded.indices), labels.dictionary)


def label(name: str, column: str, value: int) -> str:
    """Return the text that stands in Arrow tables for a number of an event's device or enum column."""
    f = next(f for f in event(name).fields if f.name == column)
    return _label(f, value.to_bytes(f.size, "little"))


def _label(f: Field, raw: bytes) -> str:
    if f.unit == "addr":
        return address(raw)
    if f.unit == "text":
        return _text(raw)
    if f.unit == "dev":
        return _device(raw)
    value = int.from_bytes(raw, "little")
    return header().enums[f.unit.removeprefix("enum ")].get(value, str(value))


def enum_labels(enum: str, codes: npt.NDArray[Any]) -> pa.DictionaryArray:
    """Return the texts that stand for numbers of an enum of the header; a number that it doesn't have is its own."""
    known = header().enums[enum]
    distinct, indices = np.unique(codes, return_inverse=True)
    labels = [known.get(value, str(value)) for value in distinct.tolist()]
    return pa.DictionaryArray.from_arrays(numbers(pa.int32(), indices.astype(np.int32)), texts(labels))


def clean_texts(table: pa.Table) -> pa.Table:
    """Return ``table`` with ``clean`` texts, because DataFrames are printed as they are.

    This is cheap, because a dictionary holds each text once.
    """
    for index, column in enumerate(table.schema):
        if not pa.types.is_dictionary(column.type):
            continue
        chunks = [_clean_chunk(chunk) for chunk in table.column(index).chunks]
        table = table.set_column(index, column, pa.chunked_array(chunks, type=column.type))
    return table.unify_dictionaries()


def filled(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Return ``table`` with zeros in place of missing numbers of some columns, as far as it has them."""
    for index, column in enumerate(table.schema):
        if column.name in columns and table.column(index).null_count:
            zeros = pa.chunked_array([numbers(column.type, np.zeros(len(table), column.type.to_pandas_dtype()))])
            table = table.set_column(index, column, zeros)
    return table


def _clean_chunk(chunk: pa.DictionaryArray) -> pa.DictionaryArray:
    texts = chunk.dictionary.to_pylist()
    cleaned = [text if text is None else clean(str(text)) for text in texts]
    if cleaned == texts:
        return chunk
    # Two texts may have become the same one, and a dictionary must not repeat it.
    labels = pa.array(cleaned, type=chunk.dictionary.type).dictionary_encode()
    return pa.DictionaryArray.from_arrays(labels.indices.take(chunk.indices), labels.dictionary)


def table_to_dicts(name: str, table: pa.Table) -> list[dict[str, Any]]:
    """Return one dict per row for JSON: ``event``, ``time`` (ISO 8601, UTC, microseconds) and the columns by name."""
    stamps = [iso_time(us * 1000) for us in table.column("time").cast(pa.int64()).to_pylist()]
    rows = table.drop_columns(["time"]).to_pylist()
    return [{"event": name, "time": stamp, **row} for stamp, row in zip(stamps, rows, strict=True)]


def iso_time(utc_ns: int) -> str:
    """Return nanoseconds since 1970 as ISO 8601 with microseconds and Z."""
    return f"{np.datetime64(utc_ns // 1000, 'us')}Z"


@cache
def _looked_up(name: str) -> pa.Schema:
    types = {"time": _time(), "text": _dictionary()}
    columns = [
        _meta(pa.field(column, types.get(kind) or pa.type_for_alias(kind)), unit, description)
        for column, kind, unit, description in _LOOKED_UP[name]
    ]
    return pa.schema(columns, metadata={"event": name})


_CONNECTIONS: Final = (
    ("time", "time", "UTC", "when the snapshot was taken"),
    ("ts_ns", "uint64", "ns", "the same, CLOCK_MONOTONIC"),
    ("sock_cookie", "uint64", "id", "socket cookie, as in ss -e"),
    ("netns_ino", "uint32", "id", "inode of the network namespace"),
    ("family", "uint8", "family", "2 IPv4 (mapped addresses too), 10 IPv6"),
    ("state", "text", "text", "TCP state, as in ss"),
    ("saddr", "text", "addr", "local"),
    ("sport", "uint16", "port", "local"),
    ("daddr", "text", "addr", "remote"),
    ("dport", "uint16", "port", "remote"),
    ("inode", "uint64", "id", "inode of the socket file; 0 where no process holds it"),
    ("uid", "uint32", "id", "owner"),
    ("pid", "uint32", "pid", "a process that holds it; 0 where none was found"),
    ("comm", "text", "text", "its name"),
    ("ca_name", "text", "text", "congestion control"),
    ("ca_state", "text", "enum ca_state", "congestion state"),
    ("cwnd", "uint32", "segments", "congestion window"),
    ("ssthresh", "uint32", "segments", "slow start threshold; 2147483647 where never set"),
    ("mss", "uint32", "bytes", "sender MSS"),
    ("rto_us", "uint32", "us", "retransmission timeout"),
    ("srtt_us", "uint32", "us", "smoothed round-trip time"),
    ("min_rtt_us", "uint32", "us", "least round-trip time of the kernel's window; 4294967295 where none"),
    ("snd_wnd", "uint32", "bytes", "window the peer offered; 0 where this kernel doesn't tell"),
    ("last_snd_us", "uint64", "us", "since data was last sent, to one millisecond"),
    ("last_rcv_us", "uint64", "us", "since data last came in, to one millisecond"),
    ("bytes_acked", "uint64", "bytes", "acknowledged over its life"),
    ("bytes_sent", "uint64", "bytes", "sent over its life, retransmissions included"),
    ("bytes_received", "uint64", "bytes", "received over its life; null in captures of older versions"),
    ("unsent_bytes", "uint32", "bytes", "queued and not yet sent"),
    ("unacked", "uint32", "segments", "sent and not yet acknowledged"),
    ("total_retrans", "uint32", "segments", "retransmitted over its life"),
    ("busy_us", "uint64", "us", "of its life with data sent or to be sent; null in captures of older versions"),
    ("rwnd_limited_us", "uint64", "us", "of these, held back by the peer's window"),
    ("sndbuf", "uint32", "bytes", "send buffer, as the kernel counts it; null in captures of older versions"),
    ("sndbuf_limited_us", "uint64", "us", "of these, held back by the send buffer"),
    ("sock_cgroup_id", "uint64", "id", "cgroup v2 of the socket; 0 where this kernel doesn't tell"),
    ("listener_pid", "uint32", "pid", "a process that listens on the local port; 0 where none does"),
    ("listener", "text", "text", "its name; empty where none does"),
)
"""The columns of connection snapshots, which come from inet_diag and not from BPF."""

_WORKLOADS: Final = (
    ("time", "time", "UTC", "first_ns on the wall clock"),
    ("first_ns", "uint64", "ns", "when it was first seen, CLOCK_MONOTONIC"),
    ("last_ns", "uint64", "ns", "when it was last seen; a row with a later one for the same cgroup replaces this"),
    ("cgroup_id", "uint64", "id", "cgroup v2; 0 for a cgroup v1, of which processes tell"),
    ("path", "text", "text", "the cgroup's path, as in /proc/PID/cgroup"),
    ("kind", "text", "text", "container, pod, unit, slice, or cgroup for any other"),
    ("unit", "text", "text", "systemd unit or slice; empty in a container"),
    ("container_id", "text", "text", "id of the container"),
    ("container_name", "text", "text", "its name, in Kubernetes within its pod; empty where it isn't known"),
    ("image", "text", "text", "image that it was made from"),
    ("runtime", "text", "text", "docker, podman, containerd or cri-o; empty where it isn't known"),
    ("pod_namespace", "text", "text", "namespace of the container's pod in Kubernetes"),
    ("pod_name", "text", "text", "name of the pod"),
    ("pod_uid", "text", "text", "uid of the pod"),
)
"""The columns of the cgroups whose ids other tables have, by the names that their runtimes left on the disk."""

_PROCESSES: Final = (
    ("time", "time", "UTC", "first_ns on the wall clock"),
    ("first_ns", "uint64", "ns", "when it was first seen, CLOCK_MONOTONIC"),
    ("last_ns", "uint64", "ns", "when it was last seen; a row with a later one for the same process replaces this"),
    ("pid", "uint32", "pid", "process"),
    ("start_ticks", "uint64", "ticks", "its start since boot, in ticks of the kernel's USER_HZ"),
    ("netns_ino", "uint32", "id", "inode of its network namespace; 0 where it couldn't be seen"),
    ("comm", "text", "text", "its name, its first thread's"),
    ("cmdline", "text", "text", "the first 200 bytes of its command line; empty for a kernel thread"),
    ("cgroup", "text", "text", "path of its cgroup: path in workloads"),
)
"""The columns of the processes whose ids other tables have."""

MAY_BE_NULL: Final = frozenset({"busy_us", "bytes_received", "rwnd_limited_us", "sndbuf", "sndbuf_limited_us"})
"""The columns that may have nulls; in all other columns of ``TABLES`` a null is damage."""

OF_LATER_VERSIONS: Final = (
    frozenset(
        ("after_loss_us", "bursts", "bytes_received", "chain_resets", "chain_window", "cost_us", "data_segs_in"),
    )
    .union(
        (
            "first_cost_us",
            "held_us",
            "listener",
            "listener_pid",
            "other_us",
            "process",
            "short_us",
            "tcp_state",
            "unacked_bytes",
        ),
    )
    .union(("waiting_bytes",))
)
"""The columns that captures of older versions lack, without which their rows are still of use."""

IDS_OF_LATER_VERSIONS: Final = frozenset({"sock_cgroup_id"})
"""The same for ids, which are 0 in the rows of such captures."""

_UNJUDGED: Final = (MAY_BE_NULL | OF_LATER_VERSIONS | IDS_OF_LATER_VERSIONS).union(
    ("acks", "ca_state", "cpu", "flags", "ifindex", "last_snd_us"),
    ("owner_cgroup_id", "packets_out", "sector", "uid", "unacked"),
)
"""The columns of ``TABLES`` that no analysis and no plot uses, or whose values may be missing."""


def needed(table: str) -> list[str]:
    """Return the columns that a table's rows need for a verdict. A recording of an older version may lack some."""
    return [name for name in schema(table).names if name not in _UNJUDGED]


_LOOKED_UP: Final = {"connections": _CONNECTIONS, "workloads": _WORKLOADS, "processes": _PROCESSES}
"""The tables whose records don't come from BPF: name, type, unit and description of each column."""

TABLES: Final = ("cwnd_reset", "cwnd_recovery", "cwnd_sample", "block_io", *_LOOKED_UP)
"""The tables of a capture, in the order in which they are written."""


def schema(table: str) -> pa.Schema:
    """Return the Arrow schema of one of ``TABLES``. Raises KeyError for another name."""
    return _looked_up(table) if table in _LOOKED_UP else arrow_schema(table)
