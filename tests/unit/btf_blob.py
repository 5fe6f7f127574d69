# SPDX-License-Identifier: Apache-2.0
"""An encoder of small BTF blobs, after the kernel's Documentation/bpf/btf.rst."""

from __future__ import annotations

import struct

from cwndtrace.kernel.btf import Btf

Members = list[tuple[str, int, int]]
"""Name, type id and offset in bits of each member; with bitfields the offset's top byte is the width in bits."""


class Blob:
    """A BTF blob to which types are added one by one; each call returns the new type's id."""

    def __init__(self) -> None:
        self._strings = bytearray(b"\0")
        self._known = {"": 0}
        self._types = bytearray()
        self._count = 0

    def string(self, text: str) -> int:
        """Return the offset of a string, which is stored once."""
        if text not in self._known:
            self._known[text] = len(self._strings)
            self._strings += text.encode() + b"\0"
        return self._known[text]

    def add(
        self, kind: int, name: str, size_or_type: int, *, vlen: int = 0, flag: bool = False, trailer: bytes = b""
    ) -> int:
        """Add a type of any kind."""
        self._types += struct.pack("<III", self.string(name), flag << 31 | kind << 24 | vlen, size_or_type) + trailer
        self._count += 1
        return self._count

    def integer(self, name: str, size: int) -> int:
        return self.add(1, name, size, trailer=struct.pack("<I", size * 8))

    def pointer(self, target: int) -> int:
        return self.add(2, "", target)

    def array(self, element: int, count: int) -> int:
        return self.add(3, "", 0, trailer=struct.pack("<III", element, element, count))

    def struct(self, name: str, size: int, members: Members, *, bitfields: bool = False) -> int:
        return self._composite(4, name, size, members, bitfields)

    def union(self, name: str, size: int, members: Members) -> int:
        return self._composite(5, name, size, members, False)

    def _composite(self, kind: int, name: str, size: int, members: Members, bitfields: bool) -> int:
        trailer = b"".join(struct.pack("<III", self.string(label), target, at) for label, target, at in members)
        return self.add(kind, name, size, vlen=len(members), flag=bitfields, trailer=trailer)

    def enum(self, name: str, values: dict[str, int]) -> int:
        trailer = b"".join(struct.pack("<Ii", self.string(label), value) for label, value in values.items())
        return self.add(6, name, 4, vlen=len(values), trailer=trailer)

    def function(self, *parameters: int) -> int:
        """Add a prototype (13) of a function that returns nothing."""
        trailer = b"".join(struct.pack("<II", 0, each) for each in parameters)
        return self.add(13, "", 0, vlen=len(parameters), trailer=trailer)

    def alias(self, kind: int, target: int, name: str = "") -> int:
        """Add a typedef (8), volatile (9), const (10), restrict (11) or type tag (18)."""
        return self.add(kind, name, target)

    def data(self) -> bytes:
        """Return the blob."""
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self._types), len(self._types), len(self._strings))
        return header + bytes(self._types) + bytes(self._strings)

    def btf(self) -> Btf:
        """Return the blob, parsed."""
        return Btf(self.data())
