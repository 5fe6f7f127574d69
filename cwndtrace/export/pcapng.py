# SPDX-License-Identifier: Apache-2.0
"""Files of packets, block by block: pcapng as it is, and classic pcap as the blocks of pcapng that say the same.

A file may be made to do harm. Nothing here believes a length before it has been checked, and no more than one block of
at most ``MOST_BLOCK`` bytes is held. Whatever isn't understood is handed on byte by byte.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple

from cwndtrace.format import plural

SECTION: Final = 0x0A0D0D0A
INTERFACE: Final = 1
OLD_PACKET: Final = 2
SIMPLE_PACKET: Final = 3
PACKET: Final = 6
"""The types of blocks that are looked into; see draft-ietf-opsawg-pcapng."""

MOST_BLOCK: Final = 16 << 20
"""The most bytes of a block. Wireshark has the same limit, so that it could read no file with a larger one."""

MOST_INTERFACES: Final = 1 << 16
"""The most interfaces of a section."""

_LONGEST_NAME: Final = 64
"""The bytes that are kept of an interface's name. Linux has names of 15 bytes at most (IFNAMSIZ)."""

_ORDERS: Final = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
_CLASSIC: Final = {
    b"\xd4\xc3\xb2\xa1": ("<", 1_000_000),
    b"\xa1\xb2\xc3\xd4": (">", 1_000_000),
    b"\x4d\x3c\xb2\xa1": ("<", 1_000_000_000),
    b"\xa1\xb2\x3c\x4d": (">", 1_000_000_000),
}
"""The byte order and the ticks a second of a classic pcap file, by its first bytes."""

_END, _COMMENT, _NAME, _RESOLUTION, _FCS, _OFFSET = 0, 1, 2, 9, 13, 14
_HEAD: Final = 20
"""The bytes of a packet block before the packet."""


class Damaged(Exception):
    """A file can't be read or isn't what it says. The text says how, and at which byte where that is known."""

    def __init__(self, offset: int | None, what: str) -> None:
        super().__init__(what if offset is None else f"at byte {offset:,} {what}")


class Block(NamedTuple):
    """A block: where it begins in the file, its type, its byte order, and what is between its two lengths."""

    offset: int
    kind: int
    order: str
    body: bytes

    def encode(self) -> bytes:
        """Return the block as it is in a file."""
        length = struct.pack(f"{self.order}I", len(self.body) + 12)
        return b"".join((struct.pack(f"{self.order}I", self.kind), length, self.body, length))


class Packet(NamedTuple):
    """A packet: the number of its interface in its section, its time in ticks, and its bytes in the block's body."""

    interface: int
    ticks: int
    end: int
    wire: int

    def data(self, block: Block) -> bytes:
        """Return what was captured of the packet."""
        return block.body[_HEAD : self.end]

    def bare(self, block: Block) -> bool:
        """Return true if the block has no options."""
        return len(block.body) == _padded(self.end)


@dataclass(frozen=True)
class Interface:
    """An interface: the type of its link, its name (empty where it has none), and what a tick of its clock is."""

    link: int
    name: str = ""
    per_second: int = 1_000_000
    offset_s: int = 0

    def time_ns(self, ticks: int) -> int:
        """Return a time in ns since 1970."""
        return ticks * 1_000_000_000 // self.per_second + self.offset_s * 1_000_000_000


def is_classic(file: BinaryIO) -> bool:
    """Return true if a file is in the older format, which has no comments."""
    file.seek(0)
    return file.read(4) in _CLASSIC


def blocks(file: BinaryIO) -> Iterator[Block]:
    """Yield the blocks of a file from its beginning. Raises Damaged."""
    try:
        file.seek(0)
        first = file.read(4)
        if first in _CLASSIC:
            yield from _converted(file, *_CLASSIC[first])
        elif first == struct.pack("<I", SECTION):
            file.seek(0)
            yield from _blocks(file)
        else:
            raise Damaged(0, "it begins neither as pcapng nor as pcap")
    except OSError as e:
        raise Damaged(None, e.strerror or f"its compression is damaged ({e})") from e
    except (EOFError, zlib.error) as e:
        raise Damaged(None, f"its compression is damaged ({e})") from e


def _blocks(file: BinaryIO) -> Iterator[Block]:
    offset, order = 0, ""
    while head := file.read(12):
        if len(head) < 12:
            raise Damaged(offset, "the file ends inside a block")
        if head[:4] == b"\x0a\x0d\x0d\x0a":
            order = _ORDERS.get(head[8:], "")
            if not order:
                raise Damaged(offset, "a section has no valid byte order")
        kind, length = struct.unpack_from(f"{order}II", head)
        if not 12 <= length <= MOST_BLOCK or length % 4:
            raise Damaged(offset, f"a block claims to have {plural(length, 'byte')}")
        rest = head[8:] + file.read(length - 12)
        if len(rest) < length - 8:
            raise Damaged(offset, f"a block has {plural(length, 'byte')}, and the file ends inside it")
        if rest[-4:] != struct.pack(f"{order}I", length):
            raise Damaged(offset, "the two lengths of a block differ")
        block = Block(offset, kind, order, rest[:-4])
        if kind == SECTION and (length < 28 or struct.unpack_from(f"{order}H", rest, 4)[0] != 1):
            raise Damaged(offset, "a section isn't of version 1")
        yield block
        offset += length


def _converted(file: BinaryIO, order: str, per_second: int) -> Iterator[Block]:
    head = file.read(20)
    if len(head) < 20:
        raise Damaged(4, "the file ends inside its head")
    major, _, _, _, snap, link = struct.unpack(f"{order}HHiIII", head)
    if major != 2:
        raise Damaged(4, f"the file is of version {major}")
    yield Block(0, SECTION, "<", struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    options = [(_RESOLUTION, b"\x09")] if per_second > 1_000_000 else []
    if link & 0x0400_0000:
        options.append((_FCS, bytes([(link >> 28) * 16])))
    said = b"".join(_option("<", code, value) for code, value in options)
    end = struct.pack("<HH", _END, 0) if said else b""
    yield Block(4, INTERFACE, "<", struct.pack("<HHI", link & 0xFFFF, 0, snap) + said + end)
    offset = 24
    while record := file.read(16):
        if len(record) < 16:
            raise Damaged(offset, "the file ends inside a packet's head")
        seconds, fraction, length, wire = struct.unpack(f"{order}IIII", record)
        if length > MOST_BLOCK - 64:
            raise Damaged(offset, f"a packet claims to have {plural(length, 'byte')}")
        data = file.read(length)
        if len(data) < length:
            raise Damaged(offset, f"a packet has {plural(length, 'byte')}, and the file ends inside it")
        ticks = seconds * per_second + fraction
        fixed = struct.pack("<IIIII", 0, ticks >> 32, ticks & 0xFFFF_FFFF, length, wire)
        yield Block(offset, PACKET, "<", fixed + data + bytes(-length % 4))
        offset += 16 + length


def interface(block: Block) -> Interface:
    """Return what an INTERFACE block says. Raises Damaged."""
    if len(block.body) < 8:
        raise Damaged(block.offset, "the description of an interface is too short")
    link = struct.unpack_from(f"{block.order}H", block.body)[0]
    found: dict[int, bytes] = {}
    for code, value in _options(block, 8):
        if code in (_NAME, _RESOLUTION, _OFFSET):
            found.setdefault(code, value)  # the first of two holds
    per_second, offset_s = 1_000_000, 0
    if len(raw := found.get(_RESOLUTION, b"")) == 1:
        per_second = (2 if raw[0] & 0x80 else 10) ** (raw[0] & 0x7F)
    if len(raw := found.get(_OFFSET, b"")) == 8:
        offset_s = struct.unpack(f"{block.order}q", raw)[0]
    name = found.get(_NAME, b"").rstrip(b"\0")[:_LONGEST_NAME].decode("utf-8", "replace")
    return Interface(link, name, per_second, offset_s)


def packet(block: Block) -> Packet:
    """Return the packet of a PACKET or OLD_PACKET block. Raises Damaged."""
    if len(block.body) < _HEAD:
        raise Damaged(block.offset, "a packet's block is too short")
    if block.kind == PACKET:
        number, high, low, length, wire = struct.unpack_from(f"{block.order}5I", block.body)
    else:
        number, _, high, low, length, wire = struct.unpack_from(f"{block.order}HH4I", block.body)
    if _padded(_HEAD + length) > len(block.body):
        raise Damaged(block.offset, f"a packet claims to have {plural(length, 'byte')}, which is more than its block")
    return Packet(number, high << 32 | low, _HEAD + length, wire)


def with_comment(block: Block, found: Packet, text: str) -> Block:
    """Return a packet's block with one more comment, in front of the options that it has."""
    at = _padded(found.end)
    more = comment(block.order, text, bare=found.bare(block))
    return block._replace(body=block.body[:at] + more + block.body[at:])


def comment(order: str, text: str, *, bare: bool) -> bytes:
    """Return a comment as it is added to a block, which may have been ``bare`` of options."""
    option = _option(order, _COMMENT, text.encode("utf-8", "replace")[:60_000])
    return option + (struct.pack(f"{order}HH", _END, 0) if bare else b"")


def with_more(block: Block, more: int) -> Block:
    """Return a SECTION block that says that its section has so many more bytes, if it says how many it has."""
    length = struct.unpack_from(f"{block.order}q", block.body, 8)[0]
    if length < 0 or not more:
        return block
    said = struct.pack(f"{block.order}q", min(length + more, 2**63 - 1))
    return block._replace(body=block.body[:8] + said + block.body[16:])


def _option(order: str, code: int, value: bytes) -> bytes:
    return struct.pack(f"{order}HH", code, len(value)) + value + bytes(-len(value) % 4)


def _options(block: Block, at: int) -> Iterator[tuple[int, bytes]]:
    """Yield the code and the value of each option from this byte of a block's body on."""
    body = block.body
    while at + 4 <= len(body):
        code, length = struct.unpack_from(f"{block.order}HH", body, at)
        if code == _END:
            return
        if at + 4 + length > len(body):
            raise Damaged(
                block.offset, f"an option claims to have {plural(length, 'byte')}, which is more than its block"
            )
        yield code, body[at + 4 : at + 4 + length]
        at = _padded(at + 4 + length)


def _padded(length: int) -> int:
    return length + -length % 4
