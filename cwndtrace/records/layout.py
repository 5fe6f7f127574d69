# SPDX-License-Identifier: Apache-2.0
"""``bpf/events.h`` parsed into numpy dtypes.

The header is the only place where a record is laid out. This module refuses every line that it can't parse exactly, and
names it, so that the layout never differs silently between the BPF programs and Python.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from cwndtrace.format import plural

Records = npt.NDArray[np.void]
"""A one-dimensional structured array with one row per record, of the dtype of one event."""

_SIZES: Final = {"__u8": 1, "__u16": 2, "__u32": 4, "__u64": 8, "__s8": 1, "__s16": 2, "__s32": 4, "__s64": 8}
_ENUM_OPEN = re.compile(r"enum (\w+) \{$")
_ENUM_ITEM = re.compile(r"([A-Z]\w*)\s*=\s*(\d+),\s*/\*\s*(.+?)\s*\*/$")
_STRUCT_OPEN = re.compile(r"struct (\w+) \{$")
_FIELD = re.compile(r"(__[us]\d+|char)\s+(\w+)(?:\[(\d+)\])?;\s*/\*\s*\[([^\]]+)\]\s*(.+?)\s*\*/$")


class LayoutError(ValueError):
    """The header holds something outside the subset; the message names the line."""


@dataclass(frozen=True)
class Field:
    """One member of a record: its C type, offset in bytes, unit and description."""

    name: str
    ctype: str
    count: int
    offset: int
    unit: str
    description: str

    @property
    def size(self) -> int:
        """The size in bytes, of all elements for an array."""
        return _width(self.ctype) * self.count


@dataclass(frozen=True)
class Event:
    """One struct of the header; ``dtype`` matches its memory layout byte for byte."""

    name: str
    fields: tuple[Field, ...]
    size: int
    dtype: np.dtype[np.void]


@dataclass
class Header:
    """The declarations of a header: events by name, and for each enum its labels and their meanings by value."""

    events: dict[str, Event] = field(default_factory=dict)
    enums: dict[str, dict[int, str]] = field(default_factory=dict)
    meanings: dict[str, dict[int, str]] = field(default_factory=dict)


def bpf_dir() -> Path:
    """Return the folder with the BPF sources: inside the installed package, or at the top of a checkout.

    Raises FileNotFoundError if the installation is broken.
    """
    here = Path(__file__).resolve().parents[1]
    for candidate in (here / "bpf", here.parent / "bpf"):
        if (candidate / "events.h").is_file():
            return candidate
    raise FileNotFoundError(f"bpf/events.h is neither in {here} nor beside it: reinstall cwndtrace")


def parse_layout(text: str) -> Header:
    """Parse the text of a record header.

    Raises LayoutError, with the line, for anything outside the subset: unknown types, pointers, bitfields, missing
    units, implicit padding, and sizes that aren't a multiple of eight bytes.
    """
    layout = Header()
    enum: dict[int, str] | None = None
    enum_name = ""
    struct: list[Field] | None = None
    struct_name = ""
    in_comment = False
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if in_comment:
            in_comment = "*/" not in line
        elif struct is not None:
            if line == "};":
                layout.events[struct_name] = _finish(struct_name, struct, number)
                struct = None
            elif line:
                struct.append(_parse_field(line, number, struct, layout))
        elif enum is not None:
            if line == "};":
                enum = None
            elif match := _ENUM_ITEM.match(line):
                if int(match[2]) in enum:
                    raise LayoutError(f"line {number}: {match[2]} has a name already: {line}")
                enum[int(match[2])] = match[1].removeprefix(f"{enum_name.upper()}_").lower()
                layout.meanings[enum_name][int(match[2])] = match[3]
            elif line:
                raise LayoutError(f"line {number}: this isn't an enum item with a value and a comment: {line}")
        elif match := _STRUCT_OPEN.match(line):
            struct_name, struct = match[1], []
        elif match := _ENUM_OPEN.match(line):
            enum_name = match[1]
            enum = layout.enums.setdefault(enum_name, {})
            layout.meanings.setdefault(enum_name, {})
        elif line.startswith("/*"):
            in_comment = "*/" not in line
        elif line and not line.startswith("#"):
            raise LayoutError(f"line {number}: this is outside the subset of record headers: {line}")
    if struct is not None or enum is not None or in_comment:
        raise LayoutError("the header ends inside a struct, an enum or a comment")
    return layout


def _width(ctype: str) -> int:
    return 1 if ctype == "char" else _SIZES[ctype]


def _parse_field(line: str, number: int, before: list[Field], layout: Header) -> Field:
    match = _FIELD.match(line)
    if match is None:
        raise LayoutError(f"line {number}: this isn't a fixed-size field with a [unit] comment: {line}")
    ctype, name, count, unit, description = match.groups()
    if ctype != "char" and ctype not in _SIZES:
        raise LayoutError(f"line {number}: type {ctype} isn't in the subset")
    if (ctype == "char") != (unit == "text") or (count and ctype not in ("char", "__u8")):
        raise LayoutError(f"line {number}: only char arrays are [text], and only bytes and chars form arrays")
    if unit.startswith("enum ") and unit[5:] not in layout.enums:
        raise LayoutError(f"line {number}: enum {unit[5:]} isn't declared above")
    if any(f.name == name for f in before):
        raise LayoutError(f"line {number}: there is a field {name} already")
    if count == "0":
        raise LayoutError(f"line {number}: an array needs elements: {line}")
    offset = before[-1].offset + before[-1].size if before else 0
    if offset % _width(ctype):
        raise LayoutError(f"line {number}: {name} would be padded; order the fields by size")
    return Field(name, ctype, int(count or 1), offset, unit, description)


def _finish(name: str, fields: list[Field], number: int) -> Event:
    if not fields:
        raise LayoutError(f"line {number}: struct {name} is empty")
    size = fields[-1].offset + fields[-1].size
    if size % 8:
        raise LayoutError(f"line {number}: struct {name} has {plural(size, 'byte')}, which isn't a multiple of 8")
    return Event(name, tuple(fields), size, np.dtype([numpy_field(f) for f in fields]))


def numpy_field(f: Field) -> tuple[str, str]:
    if f.ctype == "char":
        return f.name, f"S{f.count}"
    if f.count > 1:
        return f.name, f"V{f.count}"
    return f.name, f"<{'i' if f.ctype[2] == 's' else 'u'}{f.size}"


@cache
def header() -> Header:
    """Return the layout of the header that ships with this package. It is parsed once."""
    return parse_layout((bpf_dir() / "events.h").read_text(encoding="utf-8"))


def event(name: str) -> Event:
    """Return the event ``name``. Raises KeyError for one that the header doesn't declare."""
    return header().events[name]


def code(enum: str, label: str) -> int:
    """Return the number of an enum's label, as in ``code("reason", "idle")``. Raises KeyError for an unknown label."""
    return {text: value for value, text in header().enums[enum].items()}[label]


def decode(name: str, raw: bytes) -> Records:
    """Return the records of one event in ``raw``, without a copy.

    Raises ValueError if ``raw`` isn't a whole number of records.
    """
    return np.frombuffer(raw, dtype=event(name).dtype)
