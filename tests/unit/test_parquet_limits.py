# SPDX-License-Identifier: Apache-2.0
"""Thrift's compact protocol is read as it is defined, and whatever would take too much is refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.store import parquet_limits
from cwndtrace.store.parquet_limits import Thrift, UnsafeFile


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def zigzag(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def page(unpacked: int, packed: int, fields: bytes = b"") -> bytes:
    """Return the header of a page: its type, and its sizes in bytes."""
    return b"\x15\x00" + b"\x15" + zigzag(unpacked) + b"\x15" + zigzag(packed) + fields + b"\x00"


def pages(*raw: bytes) -> parquet_limits._Work:
    data, work = b"".join(raw), parquet_limits._Work()
    parquet_limits._unpacked(io.BytesIO(data), 0, len(data), work)
    return work


@given(st.integers(-(2**63), 2**63 - 1))
def test_numbers_are_read_as_they_were_written(value: int) -> None:
    assert Thrift(b"\x16" + zigzag(value) + b"\x00").struct() == {1: value}


def test_each_type_is_read() -> None:
    raw = b"\x11\x12\x13\x07\x17" + bytes(range(8)) + b"\x18\x02ab" + b"\x1c\x15\x02\x00" + b"\x00"
    nested = {1: 1}
    assert Thrift(raw).struct() == {1: True, 2: False, 3: 7, 4: bytes(range(8)), 5: b"ab", 6: nested}
    # A long step from one field to the next is a number of its own, and a long list has its length after the type.
    assert Thrift(b"\x05" + zigzag(40) + zigzag(-3) + b"\x00").struct() == {40: -3}
    assert Thrift(b"\x19\x35" + zigzag(1) + zigzag(2) + zigzag(3) + b"\x00").struct() == {1: [1, 2, 3]}
    assert Thrift(b"\x19\xf5" + varint(15) + zigzag(4) * 15 + b"\x00").struct() == {1: [4] * 15}
    assert Thrift(b"\x19\x21\x01\x02\x00").struct() == {1: [1, 2]}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "cut off"),
        (b"\x16", "cut off"),
        (b"\x16\x80", "cut off"),
        (b"\x18\x05abcd", "cut off"),
        (b"\x19\xf5" + varint(1 << 40), "cut off"),
        (b"\x16" + b"\x80" * 10 + b"\x01\x00", "longer than 10 bytes"),
        (b"\x1b\x00", "unknown type 11"),
        (b"\x1c" * 100, "nested too deeply"),
        (b"\x19" * 6 + b"\x1c" * 50, "nested too deeply"),
    ],
)
def test_what_is_no_struct_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(UnsafeFile, match=why):
        Thrift(raw).struct()


def test_sixteen_levels_are_not_too_deep() -> None:
    expected: dict[int, Any] = {}
    for _ in range(16):
        expected = {1: expected}
    assert Thrift(b"\x1c" * 16 + b"\x00" * 17).struct() == expected
    with pytest.raises(UnsafeFile, match="nested too deeply"):
        Thrift(b"\x1c" * 17 + b"\x00" * 18).struct()


def test_the_pages_of_a_column_are_added_up() -> None:
    first, second = page(1000, 3) + b"abc", page(500, 0)
    work = pages(first, second)
    assert (work.pages, work.headers, work.unpacked) == (2, len(first) - 3 + len(second), 1500)


@pytest.mark.parametrize(("unpacked", "packed"), [(-1, 5), (5, -1), (0, -len(page(0, -8)))])
def test_a_page_of_a_negative_size_is_refused(unpacked: int, packed: int) -> None:
    with pytest.raises(UnsafeFile, match="a page has a negative size"):
        pages(page(unpacked, packed), b"rest")


def test_pages_up_to_the_limits_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_limits, "_MOST_PAGE", 100)
    monkeypatch.setattr(parquet_limits, "MOST_BYTES", 250)
    monkeypatch.setattr(parquet_limits, "MOST_PAGES", 3)
    assert pages(page(100, 0), page(100, 0), page(50, 0)).unpacked == 250
    for too_many in ([101], [100, 100, 51], [1, 1, 1, 1]):
        with pytest.raises(UnsafeFile, match="pages"):
            pages(*(page(size, 0) for size in too_many))
    monkeypatch.setattr(parquet_limits, "_MOST_HEADERS", 2 * len(page(1, 0)))
    pages(page(1, 0), page(1, 0))
    with pytest.raises(UnsafeFile, match="bytes of page headers"):
        pages(page(1, 0), page(1, 0), page(1, 0))


@pytest.mark.parametrize(
    ("chunk", "place"),
    [
        ({9: 10, 7: 5}, (10, 15)),
        ({9: 10, 7: 5, 11: 4}, (4, 9)),
        ({9: 10, 7: 5, 11: 0}, (10, 15)),
        ({9: 0, 7: 100}, (0, 100)),
        ({9: 0, 7: 101}, None),
        ({9: -1, 7: 5}, None),
        ({9: 10, 7: -1}, None),
    ],
)
def test_a_column_lies_within_its_file(chunk: dict[int, int], place: tuple[int, int] | None) -> None:
    if place is None:
        with pytest.raises(UnsafeFile, match="outside the file"):
            parquet_limits._place(100, chunk)
    else:
        assert parquet_limits._place(100, chunk) == place


def columns(*elements: dict[int, Any], number: int | None = None) -> dict[int, Any]:
    return {2: [{5: len(elements) if number is None else number}, *elements]}


def test_the_columns_of_a_footer() -> None:
    flat = [{4: b"n", 1: 2, 3: 1}, {4: b"comm", 1: 6}]
    assert parquet_limits._columns(columns(*flat)) == [("n", 2), ("comm", 6)]
    for footer, why in (
        (columns(*flat, number=1), "its columns are nested"),
        (columns({4: b"n", 1: 2, 5: 1}), "column n is nested"),
        (columns({4: b"n", 1: 2, 3: 2}), "column n is nested"),
        (columns({4: b"n"}), "column n is nested"),
        (columns({4: b"n", 1: 7}), "column n is of type FIXED_LEN_BYTE_ARRAY"),
        (columns({4: b"n", 1: 8}), "column n is of type 8"),
        (columns({4: b"n", 1: -1}), "column n is of type -1"),
    ):
        with pytest.raises(UnsafeFile) as refusal:
            parquet_limits._columns(footer)
        assert str(refusal.value) == why


def test_the_rows_of_a_footer_are_those_of_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_limits, "MOST_PART_ROWS", 10)
    one = columns({4: b"n", 1: 2})

    def sound(rows: int, *groups: dict[int, Any]) -> int:
        return parquet_limits._sound(one | {3: rows, 4: list(groups)})[1]

    assert sound(10, {1: [{}], 3: 4}, {1: [{}], 3: 6}) == 10
    assert sound(0) == 0
    for rows, groups, why in (
        (11, [{1: [{}], 3: 11}], "holds 11 rows, and a part has 10 at most"),
        (9, [{1: [{}], 3: 10}], "count different numbers of rows"),
        (0, [{1: [{}], 3: -1}, {1: [{}], 3: 1}], "don't match its footer"),
        (1, [{1: [], 3: 1}], "don't match its footer"),
        (1, [{1: [{}, {}], 3: 1}], "don't match its footer"),
    ):
        with pytest.raises(UnsafeFile, match=why):
            sound(rows, *groups)


def test_the_least_value_of_a_column_is_that_of_all_its_groups() -> None:
    def group(*least: bytes | None) -> dict[int, Any]:
        return {1: [{3: {12: {6: each}} if each is not None else {}} for each in least]}

    five, three = (number.to_bytes(8, "little") for number in (5, 3))
    groups = [group(five, five, b"abc"), group(three, None, b"ab")]
    assert parquet_limits._least(["ts_ns", "partly", "text"], groups) == {"ts_ns": 3}
    assert (
        parquet_limits._least(["ts_ns"], [{1: [{3: {12: 7}}]}]) == parquet_limits._least(["ts_ns"], [{1: [{}]}]) == {}
    )


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"x" * 3 + b"\x00\x00\x00\x00PAR1", b"x" * 8 + b"\x05\x00\x00\x00PAR1"])
def test_a_file_without_a_footer_is_refused(raw: bytes) -> None:
    with pytest.raises(UnsafeFile, match="no Parquet footer"):
        parquet_limits._footer(io.BytesIO(raw), len(raw))


def test_a_footer_is_what_lies_before_its_length() -> None:
    raw = b"PAR1" + b"data" + b"foot" + b"\x04\x00\x00\x00PAR1"
    assert parquet_limits._footer(io.BytesIO(raw), len(raw)) == b"foot"
    with pytest.raises(UnsafeFile, match="no Parquet footer"):
        parquet_limits._footer(io.BytesIO(raw[:-1] + b"2"), len(raw))
