# SPDX-License-Identifier: Apache-2.0
"""Reads the offsets of structure members from BTF, the running kernel's type information.

The kernel's Documentation/bpf/btf.rst describes the format. This module reads only the parts that offsets need.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cwndtrace.errors import KernelLacks

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")

_PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF = 2, 3, 4, 5, 6, 8
_VOLATILE, _CONST, _RESTRICT, _FUNC, _TYPE_TAG = 9, 10, 11, 12, 18
_ALIASES: Final = frozenset({_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG})
# The number of 32-bit words after a type's three header words, by kind: a fixed number, and one per element of vlen.
_TRAILERS, _PER_ELEMENT = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
_TRAILERS[[1, _ARRAY, 14, 17]] = 1, 3, 1, 1
_PER_ELEMENT[[_STRUCT, _UNION, _ENUM, 13, 15, 19]] = 3, 3, 2, 2, 3, 3
_POINTER_SIZE: Final = 8


@dataclass(frozen=True)
class Member:
    """A member's byte offset, its size in bytes (0 for a type without a size), and a bitfield's shift and bits."""

    offset: int
    size: int
    shift: int = 0
    bits: int = 0


class Btf:
    """The type information of one kernel, from the bytes of its BTF.

    Raises KernelLacks where the bytes aren't BTF of a little-endian kernel.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) < 24 or data[:2] != b"\x9f\xeb":
            raise KernelLacks("the kernel's type information is not little-endian BTF")
        header, types_at, types_len, strings_at, strings_len = struct.unpack_from("<IIIII", data, 4)
        self._types = memoryview(data)[header + types_at : header + types_at + types_len]
        self._strings = data[header + strings_at : header + strings_at + strings_len]
        self._at: npt.NDArray[Any] = np.zeros(1, np.uint32)
        self._names: npt.NDArray[Any] = np.zeros(0, np.uint32)
        self._kinds = self._names
        self._found: dict[tuple[int, str], int | None] = {}
        self._index()

    @classmethod
    def running(cls, path: Path = VMLINUX) -> Btf:
        """Return the running kernel's BTF. Raises KernelLacks where it has none."""
        try:
            return cls(path.read_bytes())
        except OSError as e:
            raise KernelLacks(
                f"no BTF: {path}: {e.strerror}",
                "use a kernel with CONFIG_DEBUG_INFO_BTF=y (as the stock kernels of Debian 12, Ubuntu 22.04, Fedora)",
            ) from e

    def _index(self) -> None:
        # A kernel has 150,000 types of different lengths in sequence. One array operation computes, for every word,
        # where a type that began there would end, which leaves one lookup per type to the loop.
        words = np.frombuffer(self._types, "<u4", len(self._types) // 4)
        if len(words) < 3:
            return
        info = words[1:]
        kind, vlen = info >> 24 & 31, info & 0xFFFF
        length = _TRAILERS[kind] + _PER_ELEMENT[kind] * vlen
        following: memoryview[int] = memoryview(np.arange(3, len(info) + 3, dtype=np.uint32) + length)
        at, end = 0, len(following)
        offsets = []
        while at < end:
            offsets.append(at)
            at = following[at]
        starts = np.array(offsets, np.uint32)
        self._at = np.concatenate((self._at, starts * np.uint32(4)))
        self._names, self._kinds = words[starts], kind[starts]

    def _type(self, type_id: int) -> tuple[int, int, int, int, int]:
        """Return a type's kind, vlen, kind flag, size or type, and the offset of its trailer."""
        at = int(self._at[type_id])
        _, info, size = struct.unpack_from("<III", self._types, at)
        return info >> 24 & 31, info & 0xFFFF, info >> 31, size, at + 12

    def _string(self, at: int) -> str:
        return self._strings[at : self._strings.index(b"\0", at)].decode()

    def _find(self, kind: int, name: str) -> int | None:
        if (kind, name) not in self._found:
            # Each string is stored once, so its offset identifies the name.
            at = self._strings.find(b"\0" + name.encode() + b"\0")
            ids = np.flatnonzero((self._names == at + 1) & (self._kinds == kind)).tolist() if at >= 0 else []
            self._found[kind, name] = int(ids[0]) + 1 if ids else None
        return self._found[kind, name]

    def has_function(self, name: str) -> bool:
        """Return whether the kernel has a function ``name`` that isn't inlined everywhere."""
        return self.function_id(name) is not None

    def function_id(self, name: str) -> int | None:
        """Return the type id of that function, which names a BPF program's target, or None."""
        return self._find(_FUNC, name)

    def has_tracepoint(self, name: str) -> bool:
        """Return whether the kernel itself, rather than a module, has a tracepoint ``name``."""
        return self.tracepoint_id(name) is not None

    def tracepoint_id(self, name: str) -> int | None:
        """Return the type id of the tracepoint's arguments, which names a BPF program's target, or None."""
        return self._find(_TYPEDEF, f"btf_trace_{name}")

    def argument(self, tracepoint: str, struct_name: str) -> int | None:
        """Return which argument of a tracepoint points to a struct, from 0; None where there is none of that type."""
        wanted, typedef = self._find(_STRUCT, struct_name), self.tracepoint_id(tracepoint)
        prototype = self._pointee(typedef) if typedef else None
        if not wanted or not prototype:
            return None
        _, parameters, _, _, at = self._type(prototype)
        # The first parameter is the tracepoint's own data, which programs don't get.
        for n in range(1, parameters):
            if self._pointee(struct.unpack_from("<II", self._types, at + 8 * n)[1]) == wanted:
                return n - 1
        return None

    def _pointee(self, type_id: int) -> int | None:
        """Return what a pointer points to; None where the type isn't a pointer, or one to void."""
        kind, _, _, target, _ = self._type(self._resolve(type_id))
        return self._resolve(target) if kind == _PTR and target else None

    def enumerator(self, enum: str, name: str) -> int | None:
        """Return the value of an enumerator; None where this kernel has no such enum or name."""
        type_id = self._find(_ENUM, enum)
        if type_id is None:
            return None
        _, vlen, _, _, at = self._type(type_id)
        for i in range(vlen):
            label, value = struct.unpack_from("<Ii", self._types, at + 8 * i)
            if self._string(label) == name:
                return int(value)
        return None

    def member(self, struct_name: str, path: str) -> Member | None:
        """Return the member ``path`` of a struct, or None. "a.b" is b in a, or in the first element of an array a."""
        type_id = self._find(_STRUCT, struct_name)
        offset, found = 0, None
        for name in path.split("."):
            if type_id is None:
                return None
            step = self._step(self._resolve(type_id), name)
            if step is None:
                return None
            type_id, bit, bits = step
            offset += bit
            found = Member(offset // 8, self._size(type_id), offset % 8 if bits else 0, bits)
        return found

    def _resolve(self, type_id: int) -> int:
        """Return the struct or union behind typedefs, qualifiers and arrays."""
        while True:
            kind, _, _, target, at = self._type(type_id)
            if kind in _ALIASES:
                type_id = target
            elif kind == _ARRAY:
                type_id = struct.unpack_from("<I", self._types, at)[0]
            else:
                return type_id

    def _step(self, type_id: int, name: str) -> tuple[int, int, int] | None:
        """Return type, bit offset and bit width of a member, which may be in an anonymous struct or union."""
        kind, vlen, flag, _, at = self._type(type_id)
        if kind not in (_STRUCT, _UNION):
            return None
        for i in range(vlen):
            label, target, where = struct.unpack_from("<III", self._types, at + 12 * i)
            bits = where >> 24 if flag else 0
            bit = where & 0xFFFFFF if flag else where
            if label and self._string(label) == name:
                return target, bit, bits
            if not label:
                inner = self._step(self._resolve(target), name)
                if inner is not None:
                    return inner[0], bit + inner[1], inner[2]
        return None

    def _size(self, type_id: int) -> int:
        kind, _, _, size, at = self._type(type_id)
        if kind in _ALIASES:
            return self._size(size)
        if kind == _PTR:
            return _POINTER_SIZE
        if kind == _ARRAY:
            element, _, count = struct.unpack_from("<III", self._types, at)
            return self._size(int(element)) * int(count)
        return size if kind in (1, _STRUCT, _UNION, _ENUM, 16, 19) else 0
