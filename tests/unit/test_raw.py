# SPDX-License-Identifier: Apache-2.0
"""Raw parts give the rows that Parquet gives, and never others, whatever happens to the file."""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace import store
from cwndtrace.records import arrow, layout
from cwndtrace.store import files, raw
from cwndtrace.store.layout import MOST_PART_ROWS, final_name, is_raw, part_name, raw_name
from cwndtrace.store.parquet_limits import Footer, UnsafeFile
from tests.unit import frames, raws

SIZE = layout.event("block_io").size


def written(path: Path, *appends: list[arrow.TimedRecords], table: str = "block_io") -> raw.RawPart:
    with path.open("ab", buffering=0) as file:
        part = raw.RawPart(table, file)
        for rows in appends:
            part.append(rows)
    return part


def read(content: bytes, table: str = "block_io") -> tuple[list[int], Footer]:
    rows, footer = raw.read(table, io.BytesIO(content), len(content))
    assert footer == raw.footer(table, io.BytesIO(content), len(content))
    assert len(rows) == footer.rows
    return rows["sector"].to_pylist(), footer


def frame(count: int, records: bytes, offset_ns: int = 0) -> bytes:
    head = struct.pack("<qII", offset_ns, count, zlib.crc32(records))
    return head + zlib.crc32(head).to_bytes(4, "little") + records


@given(st.data())
def test_rows_are_those_of_parquet(data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(("block_io", "cwnd_reset", "cwnd_recovery", "cwnd_sample")))
    size = layout.event(table).size
    offsets = data.draw(st.lists(st.lists(st.integers(-(1 << 60), 1 << 60), max_size=4), max_size=4))
    batches = [
        arrow.TimedRecords(table, data.draw(st.binary(min_size=n * size, max_size=n * size)), np.array(each, np.int64))
        for each, n in ((each, len(each)) for each in offsets)
    ]
    file = NamedBytes()
    part = raw.RawPart(table, file)
    half = len(batches) // 2
    for some in (batches[:half], batches[half:]):
        part.append(some)
    content = file.content()
    rows, footer = raw.read(table, io.BytesIO(content), len(content))
    assert (footer.rows, footer.size, footer.crc, footer.damage) == (
        part.part.rows, part.part.bytes, part.part.footer_crc32, "",
    )  # fmt: skip
    assert footer.size == len(content)
    if batches:
        assert rows.equals(arrow.joined(batches))


class NamedBytes(io.BytesIO):
    """A file in memory, which writev(2) can write to."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.memfd_create("raw")

    def fileno(self) -> int:
        return self._fd

    def content(self) -> bytes:
        """Return what was written, and close the file."""
        size = os.fstat(self._fd).st_size
        content = os.pread(self._fd, size, 0)
        os.close(self._fd)
        return content


def test_a_file_that_is_cut_off_has_the_rows_of_its_whole_frames(tmp_path: Path) -> None:
    two_offsets = [raws.records(3, 1, 5), raws.records(4, 2, 5), raws.records(6, 1, 6)]
    written(tmp_path / "raw", [raws.records(0, 3)], two_offsets, [raws.records(7, 2)])
    content = (tmp_path / "raw").read_bytes()
    ends = dict(raws.frame_ends(content))
    assert list(ends.values()) == [3, 6, 7, 9]
    for cut in range(len(content) + 1):
        sectors, footer = read(content[:cut])
        assert sectors == list(range(max((rows for end, rows in ends.items() if end <= cut), default=0)))
        assert footer.damage == ""


def test_a_damaged_byte_never_makes_rows_and_never_goes_unnoticed(tmp_path: Path) -> None:
    path = frames.capture(tmp_path / "a.cwnd").path
    rows = [raws.records(0, 2), raws.records(2, 2, 5), raws.records(4, 1)]
    (path / "block_io").mkdir(exist_ok=True)
    for old in (path / "block_io").iterdir():
        old.unlink()
    part = written(path / "block_io" / raw_name(1), rows)
    content = (path / "block_io" / raw_name(1)).read_bytes()
    assert part.part.rows == 5
    for at in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
            try:
                sectors, footer = read(damaged)
            except UnsafeFile:
                continue
            assert footer.damage
            assert sectors in ([], [0, 1], [0, 1, 2, 3])
            assert footer.crc != part.part.footer_crc32


def test_what_is_wrong_with_a_raw_part_is_said_and_its_rows_count_as_missing(tmp_path: Path) -> None:
    path, content = raw_capture(tmp_path / "a.cwnd")
    part = path / "block_io" / raw_name(1)
    (first, _), *_ = raws.frame_ends(content)
    part.write_bytes(content[: first + 30] + b"\xff" + content[first + 31 :])
    capture = store.open_capture(path)
    assert capture.table("block_io")["sector"].to_pylist() == [0, 1, 2]
    (warning,) = capture.warnings
    assert warning == f"block_io/{raw_name(1)} is cut off or corrupt, its rows from there on are left out " \
        "(its records are damaged)"  # fmt: skip
    assert capture.missing("block_io") == (4, 7)
    assert capture.strange("block_io") == [part_name(1)]
    part.write_bytes(content[: first + 30])  # as after a full disk, but this trace ended as it should
    capture = store.open_capture(path)
    assert (len(capture.table("block_io")), capture.warnings, capture.missing("block_io")) == (3, [], (4, 7))
    part.unlink()
    assert store.open_capture(path).gone("block_io") == [part_name(1)]


def raw_capture(path: Path) -> tuple[Path, bytes]:
    """Return a complete capture with seven requests in a raw part, and the content of that."""
    with pytest.MonkeyPatch.context() as patch:
        raws.always_raw(patch)
        writer = store.CaptureWriter.create(path, frames.meta())
        writer.go_on = lambda _: False
        raws.append(writer, raws.records(0, 3))
        raws.append(writer, raws.records(3, 4))
        writer.close("complete", counts={"block_io": {"kept": 7, "lost": 0}})
    return path, (path / "block_io" / raw_name(1)).read_bytes()


def test_other_files_under_a_raw_name_are_refused(tmp_path: Path) -> None:
    path, content = raw_capture(tmp_path / "a.cwnd")
    other = content.replace(content[len(b"cwndtrace raw records 1\nblock_io\n") :][:64], b"0" * 64)
    huge = raw.header("block_io") + frame((1 << 32) - 1, bytes(SIZE))
    cases: dict[int, bytes] = {
        2: other, 3: b"PAR1" * 10, 4: bytes(1000), 5: b"", 6: huge,
        7: raw.header("block_io") + frame(0, b"") + frame(1, bytes(SIZE)), 8: raw.header("block_io") + bytes(100),
    }  # fmt: skip
    for number, bad in cases.items():
        (path / "block_io" / raw_name(number)).write_bytes(bad)
    (path / "block_io" / raw_name(9)).symlink_to("/etc/passwd")
    os.mkfifo(path / "block_io" / raw_name(10))
    (path / "connections").mkdir(exist_ok=True)
    (path / "connections" / raw_name(1)).write_bytes(content)
    capture = store.open_capture(path)
    assert capture.table("block_io")["sector"].to_pylist() == list(range(7))
    assert len(capture.table("connections")) == 0
    said = {line.split(" ")[0]: line.split("(")[1].rstrip(")") for line in capture.warnings}
    assert said == {
        f"block_io/{raw_name(2)}": "its records are laid out as in another version of cwndtrace; read it by that one",
        f"block_io/{raw_name(3)}": "it isn't a raw part of this table",
        f"block_io/{raw_name(4)}": "it isn't a raw part of this table",
        f"block_io/{raw_name(6)}": "it holds more than 1,048,576 rows, or too few in each frame",
        f"block_io/{raw_name(7)}": "it is damaged",
        f"block_io/{raw_name(8)}": "it is damaged",
        f"block_io/{raw_name(9)}": "it is a symbolic link",
        f"block_io/{raw_name(10)}": "it isn't a regular file",
        f"connections/{raw_name(1)}": "its table has no raw parts",
    }


def test_a_file_that_is_larger_than_any_raw_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "block_io" / raw_name(1)
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UnsafeFile, match="and a raw part has"):
        files.table(path)


def test_a_raw_part_takes_bounded_memory_and_time() -> None:
    single = frame(1, bytes(SIZE))
    sectors, footer = read(raw.header("block_io") + single * 5000)
    assert footer.damage.startswith("it holds more than")
    assert len(sectors) < 1100
    many = frame(MOST_PART_ROWS // 2 + 1, bytes(SIZE) * (MOST_PART_ROWS // 2 + 1))
    content = raw.header("block_io") + many + many
    assert raw.footer("block_io", io.BytesIO(content), len(content)).rows == MOST_PART_ROWS // 2 + 1


def test_codes_without_a_name_and_odd_bytes_are_read_as_from_parquet() -> None:
    rows = frames.block(op=251, error=255, comm=b"\xff\x00x", dev=0xFFFFFFFF)
    content = raw.header("block_io") + frame(1, rows.tobytes(), 7)
    table, _ = raw.read("block_io", io.BytesIO(content), len(content))
    assert table.equals(arrow.to_arrow("block_io", rows, 7))
    assert table["op"].to_pylist() == ["251"]


def test_a_disk_that_takes_a_part_of_a_frame_leaves_whole_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.writev

    def half(fd: int, pieces: list[Any]) -> int:
        whole = b"".join(pieces)
        return real(fd, [whole[: len(whole) // 2]])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (tmp_path / "raw").open("ab", buffering=0) as file:
        part = raw.RawPart("block_io", file)
        part.append([raws.records(0, 3)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "writev", half)
            part.append([raws.records(3, 1), raws.records(4, 2, 9)])
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space"):
                part.append([raws.records(6, 5)])
        part.append([raws.records(6, 1)])
    sectors, footer = read((tmp_path / "raw").read_bytes())
    assert sectors == list(range(7))
    assert footer.crc == part.part.footer_crc32


def test_names_of_raw_parts() -> None:
    assert final_name(raw_name(12)) == part_name(12) == "part-000012.parquet"
    assert final_name("x.parquet") == "x.parquet"
    for name in ("part-000001.raw", "_part-1.raw", "_part-000001.raw.tmp", "._part-000001.raw", "_part-000001.parquet"):
        assert not is_raw(name)
