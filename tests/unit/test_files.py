# SPDX-License-Identifier: Apache-2.0
"""The files of a capture are read within limits, which are checked before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwndtrace.store import files, parquet_limits
from cwndtrace.store.parquet_limits import UnsafeFile


def test_metadata_up_to_its_limits_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes(b'{"a": [1, 2, 3], "b": {"c": 4}}')
    monkeypatch.setattr(files, "MOST_META", path.stat().st_size)
    # Three commas, a bracket and two braces.
    monkeypatch.setattr(files, "MOST_VALUES", 6)
    assert files.meta(path) == path.read_bytes()
    monkeypatch.setattr(files, "MOST_VALUES", 5)
    with pytest.raises(UnsafeFile, match="it holds more than 5 values"):
        files.meta(path)
    monkeypatch.setattr(files, "MOST_META", 30)
    with pytest.raises(UnsafeFile, match="it has 31 bytes, and the limit is 30"):
        files.meta(path)


def test_the_parts_of_a_table_are_its_visible_parquet_files_in_order(tmp_path: Path) -> None:
    for name in ("part-2.parquet", "part-10.parquet", "part-1.parquet", ".hidden.parquet", "_x.parquet", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in files.parts(tmp_path)] == ["part-1.parquet", "part-10.parquet", "part-2.parquet"]
    (tmp_path / "link").symlink_to(tmp_path)
    assert files.parts(tmp_path / "link") == files.parts(tmp_path / "none") == files.parts(tmp_path / "notes.txt") == []


def test_a_folder_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (tmp_path / f"part-{number}.parquet").touch()
    monkeypatch.setattr(files, "MOST_PARTS", 3)
    assert len(files.parts(tmp_path)) == 3
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UnsafeFile, match="more than 3 parts are too many"):
        files.parts(tmp_path)


TEXT = "x" * 100
TABLE = pa.table(
    {
        "n": pa.array(range(10), pa.uint32()), "wide": pa.array(range(10), pa.int64()),
        "comm": pa.array([TEXT, "a"] * 5).dictionary_encode(),
    }
)  # fmt: skip


@pytest.fixture
def part(tmp_path: Path) -> Path:
    pq.write_table(TABLE, tmp_path / "part.parquet")
    return tmp_path / "part.parquet"


def read(part: Path, *columns: str) -> pa.Table:
    with files.parquet(part) as opened:
        return files.read(opened, columns or None)


def test_the_columns_that_are_there_are_read(part: Path) -> None:
    assert read(part).to_pydict() == TABLE.to_pydict()
    assert pa.types.is_dictionary(read(part).schema.field("comm").type)
    assert read(part, "wide", "none", "n").column_names == ["n", "wide"]


def test_a_column_without_values_is_read(part: Path) -> None:
    """It has no width of its own."""
    pq.write_table(TABLE.append_column("nothing", pa.nulls(10)), part)
    assert read(part, "n", "nothing").to_pydict() == {"n": list(range(10)), "nothing": [None] * 10}


@pytest.mark.parametrize(
    ("columns", "needed"), [(("n",), 40), (("wide",), 80), (("n", "wide"), 120), (("n", "comm"), 1000)]
)
def test_rows_that_take_too_much_memory_are_refused(
    part: Path, monkeypatch: pytest.MonkeyPatch, columns: tuple[str, ...], needed: int
) -> None:
    """A row has 4 or 8 bytes of a number, and in a DataFrame a text of up to 100."""
    with files.parquet(part) as opened:
        monkeypatch.setattr(parquet_limits, "MOST_BYTES", needed)
        assert len(files.read(opened, columns)) == 10
        monkeypatch.setattr(parquet_limits, "MOST_BYTES", needed - 1)
        with pytest.raises(UnsafeFile, match=f"take more than {needed - 1:,} bytes"):
            files.read(opened, columns)


def test_memory_that_is_not_there_is_refused_before_it_is_needed(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(files, "_need_memory", asked.append)
    read(part, "n", "wide")
    assert asked == [0, 2 * 120]


def test_no_more_than_so_many_files_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_CHECKED", 2)
    checked: dict[tuple[int, ...], list[str]] = {}
    monkeypatch.setattr(files, "_checked", checked)
    for number in range(5):
        pq.write_table(TABLE, tmp_path / f"{number}.parquet")
        assert read(tmp_path / f"{number}.parquet", "n").num_rows == 10
        assert 1 <= len(checked) <= 2


def test_a_need_for_memory_is_an_error_where_there_is_none() -> None:
    assert files.has_memory(1 << 20)
    assert not files.has_memory(1 << 60)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        files._need_memory(1 << 60)


def test_a_file_without_a_name_in_proc_is_read_too(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def __init__(self, path: str) -> None:
            assert path.startswith("/proc/self/fd/")

        def exists(self) -> bool:
            return False

    with files.plain(part) as (file, size):
        monkeypatch.setattr(files, "Path", Nowhere)
        with files.opened_parquet(file, size) as opened:
            assert files.read(opened, ["n"]).to_pydict() == {"n": list(range(10))}


def test_only_plain_files_are_opened(tmp_path: Path, part: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(part)
    other = "it isn't a regular file"
    for name, why in (("pipe", other), ("folder", other), ("link", "it is a symbolic link")):
        with pytest.raises(UnsafeFile, match=why), files.plain(tmp_path / name):
            pytest.fail(f"{name} was opened")
    with pytest.raises(FileNotFoundError), files.plain(tmp_path / "none"):
        pytest.fail("it was opened")
    with files.plain(part) as (file, size):
        assert (size, file.read(4)) == (part.stat().st_size, b"PAR1")
