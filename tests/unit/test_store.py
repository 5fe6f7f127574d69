# SPDX-License-Identifier: Apache-2.0
"""A capture on disk stays consistent and readable, whatever happens to its writer or its disk.

The tests really kill writers, fill disks and damage files. No step depends on timing: each waits for the one before.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwndtrace import store
from cwndtrace.cli.report import lines
from cwndtrace.errors import CaptureError
from cwndtrace.records import arrow, layout
from cwndtrace.report import content
from cwndtrace.store import writer as writer_module
from cwndtrace.store.layout import WHOLE_SCHEMA
from cwndtrace.trace import load
from tests.unit import frames

ROOT = Path(__file__).resolve().parents[2]


def some(first: int, count: int = 3) -> pa.Table:
    """Return rows whose ``sector`` counts up from ``first``."""
    return frames.table("block_io", *(frames.block(n / 1000, sector=n) for n in range(first, first + count)))


def sectors(path: Path) -> list[int]:
    values: list[int] = store.open_capture(path).table("block_io").column("sector").to_pylist()
    return values


def make(path: Path, **values: Any) -> store.CaptureWriter:
    return store.CaptureWriter.create(path, frames.meta(**values))


def hidden(path: Path) -> list[str]:
    return [p.name for p in path.rglob(".*")]


# ---- tables ---------------------------------------------------------------------------------------


def test_every_table_is_read_with_its_schema_and_units(tmp_path: Path) -> None:
    resets, connections = frames.story(seconds=20)
    writer = make(tmp_path / "a.cwnd", host="web1")
    writer.add("cwnd_reset", resets)
    writer.add("connections", connections)
    writer.add("block_io", some(0))
    writer.close(ended="2026-11-18T12:31:00Z")
    capture = store.open_capture(tmp_path / "a.cwnd")
    assert (capture.status, capture.warnings) == ("complete", [])
    assert (capture.meta["host"], capture.meta["ended"]) == ("web1", "2026-11-18T12:31:00Z")
    assert capture.meta["schema"] == WHOLE_SCHEMA
    for name, written in (("cwnd_reset", resets), ("connections", connections), ("block_io", some(0))):
        table = capture.table(name)
        assert table.schema.equals(arrow.schema(name), check_metadata=True)
        assert table.equals(written)
        assert capture.rows(name) == len(written)
    assert hidden(tmp_path) == []


def test_numbers_and_texts_of_an_enum_are_read_together(tmp_path: Path) -> None:
    """Captures of schema 1 have numbers in ca_state of connections."""
    rows = frames.snapshots(frames.snapshot(0, ca_state="recovery"), frames.snapshot(1))
    part = frames.capture(tmp_path / "a.cwnd", connections=rows).path / "connections" / "part-000002.parquet"
    numbers = rows.set_column(rows.schema.get_field_index("ca_state"), "ca_state", pa.array([4, 9], pa.uint8()))
    pq.write_table(numbers, part)
    capture = store.open_capture(tmp_path / "a.cwnd")
    assert capture.table("connections")["ca_state"].to_pylist() == ["recovery", "open", "loss", "9"]
    assert capture.warnings == []
    without = pa.array([None, 1], pa.uint8())
    pq.write_table(rows.set_column(rows.schema.get_field_index("ca_state"), "ca_state", without), part)
    capture = store.open_capture(tmp_path / "a.cwnd")
    assert len(capture.table("connections")) == 2
    assert "values of ca_state are missing" in capture.warnings[0]


def test_pandas_and_pyarrow_open_a_table(tmp_path: Path) -> None:
    frames.capture(tmp_path / "host=web1.cwnd", block_io=some(0, 5))
    frame = pd.read_parquet(tmp_path / "host=web1.cwnd" / "block_io")
    assert frame["sector"].tolist() == [0, 1, 2, 3, 4]
    assert str(frame["time"].dtype) == "datetime64[us, UTC]"
    assert list(frame.columns) == arrow.schema("block_io").names
    (part,) = (tmp_path / "host=web1.cwnd" / "block_io").iterdir()
    assert pq.read_schema(part).field("bytes").metadata[b"unit"] == b"bytes"


def test_clocks_are_stored_as_differences_and_what_repeats_once(tmp_path: Path) -> None:
    frames.capture(tmp_path / "a.cwnd", block_io=some(0, 5))
    (part,) = (tmp_path / "a.cwnd" / "block_io").iterdir()
    group = pq.read_metadata(part).row_group(0)
    encodings = {column.path_in_schema: column.encodings for column in map(group.column, range(group.num_columns))}
    differences = {name for name, used in encodings.items() if "DELTA_BINARY_PACKED" in used}
    assert differences == {"time", "start_ns", "issue_ns", "done_ns"}
    by_dictionary = {name for name, used in encodings.items() if {"PLAIN_DICTIONARY", "RLE_DICTIONARY"} & {*used}}
    assert by_dictionary == encodings.keys() - differences - {"sector"}


def test_a_table_without_parts_is_empty_with_its_schema(tmp_path: Path) -> None:
    make(tmp_path / "a.cwnd").close()
    capture = store.open_capture(tmp_path / "a.cwnd")
    for name in arrow.TABLES:
        assert capture.table(name).schema.equals(arrow.schema(name), check_metadata=True)
        assert (len(capture.table(name)), capture.rows(name)) == (0, 0)
    with pytest.raises(KeyError):
        capture.table("boredom")


def test_parts_with_different_texts_become_one_table(tmp_path: Path) -> None:
    writer = make(tmp_path / "a.cwnd")
    for comm in (b"fio", b"postgres", b"fio"):
        writer.add("block_io", frames.table("block_io", frames.block(comm=comm)))
        writer.flush(force=True)
    writer.close()
    assert len(list((tmp_path / "a.cwnd" / "block_io").iterdir())) == 3
    table = store.open_capture(tmp_path / "a.cwnd").table("block_io")
    assert table.column("comm").to_pylist() == ["fio", "postgres", "fio"]
    assert table.to_pandas()["comm"].tolist() == ["fio", "postgres", "fio"]


def test_rows_of_another_table_or_schema_are_refused(tmp_path: Path) -> None:
    writer = make(tmp_path / "a.cwnd")
    with pytest.raises(ValueError, match="isn't a table"):
        writer.add("gossip", some(0))
    with pytest.raises(ValueError, match="schema differs"):
        writer.add("cwnd_reset", some(0))
    with pytest.raises(ValueError, match="schema differs"):
        writer.add("block_io", some(0).drop_columns(["cpu"]))


# ---- when parts are written -----------------------------------------------------------------------


def test_a_part_is_written_by_age_by_size_or_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(writer_module, "PART_ROWS", 10)
    path = tmp_path / "a.cwnd"
    writer = make(path)
    assert writer.due_s() == math.inf
    writer.add("block_io", some(0))
    now += 0.25
    writer.add("block_io", some(3))
    writer.flush()
    assert sectors(path) == []
    assert writer.due_s() == 0.25
    now += 0.25  # half a second after the first row, not after the last
    writer.flush()
    assert sectors(path) == list(range(6))
    assert writer.due_s() == math.inf
    writer.add("block_io", some(6, 9))
    writer.flush()
    assert len(sectors(path)) == 6
    writer.add("block_io", some(15, 1))
    writer.flush()
    assert sectors(path) == list(range(16))
    writer.add("block_io", some(16))
    writer.flush(force=True)
    assert sectors(path) == list(range(19))


def test_requests_of_the_tracer_itself_are_written_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an idle trace would write twice a second, only to record its own last write."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    writer = make(tmp_path / "a.cwnd")

    def add(record: layout.Records, tgid: int, event: str = "block_io") -> int:
        record["tgid"] = tgid
        writer.add(event, arrow.TimedRecords(event, record.tobytes(), np.zeros(1, np.int64)))
        return on_disk(event)

    def on_disk(event: str = "block_io") -> int:
        writer.flush()
        return len(store.open_capture(tmp_path / "a.cwnd").table(event))

    assert add(frames.block(), os.getpid()) == 0
    now += writer_module.OWN_SECONDS - 0.1
    assert add(frames.block(), os.getpid()) == 0
    now += 0.2
    assert on_disk() == 2
    assert add(frames.block(), os.getpid()) == add(frames.block(), 7) == 2
    assert add(frames.reset(), os.getpid(), "cwnd_reset") == 0
    now += writer_module.FLUSH_SECONDS
    assert (on_disk(), on_disk("cwnd_reset")) == (4, 1)
    writer.close()


def test_a_part_grows_until_it_is_large_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(writer_module, "SEAL_ROWS", 7)
    writer = make(tmp_path / "a.cwnd")
    parts = []
    for first, wait in ((0, 1.0), (3, 1.0), (6, 1.0), (9, 30.0), (12, 40.0), (15, 1.0)):
        writer.add("block_io", some(first))
        now += wait
        writer.flush()
        parts.append(len(list((tmp_path / "a.cwnd" / "block_io").iterdir())))
        assert sectors(tmp_path / "a.cwnd") == list(range(first + 3))
    # The third flush exceeds seven rows, so the fourth begins a part, which is 70 s old at the fifth.
    assert parts == [1, 1, 1, 2, 2, 3]


def test_metadata_is_replaced_atomically(tmp_path: Path) -> None:
    writer = make(tmp_path / "a.cwnd", command=["run", "\udcff\n"])
    writer.update_meta(counts={"block_io": {"kept": 3}}, hz=1000)
    before = (tmp_path / "a.cwnd" / "meta.json").read_bytes()
    for bad in (object(), float("nan")):
        with pytest.raises((TypeError, ValueError)):
            writer.update_meta(hz=250, host=bad)
    assert (tmp_path / "a.cwnd" / "meta.json").read_bytes() == before
    assert hidden(tmp_path) == []
    meta = store.open_capture(tmp_path / "a.cwnd").meta
    assert (meta["hz"], meta["counts"], meta["command"]) == (1000, {"block_io": {"kept": 3}}, ["run", "\udcff\n"])


def test_closing_twice_has_no_effect(tmp_path: Path) -> None:
    writer = make(tmp_path / "a.cwnd")
    writer.close()
    writer.close(status="failed")
    assert store.open_capture(tmp_path / "a.cwnd").status == "complete"


# ---- killed writers -------------------------------------------------------------------------------

WRITER = """
import sys
from cwndtrace import store
from tests.unit import frames, test_store
writer = store.CaptureWriter.create(sys.argv[1], frames.meta(), flush_seconds=0.0)
print("ready", flush=True)
for first in range(0, 7 * int(sys.argv[2]), 7):
    writer.add("block_io", test_store.some(first, 7))
    writer.flush()
    writer.update_meta(counts={"block_io": {"kept": first + 7}})
    print(first + 7, flush=True)
sys.stdin.read()
"""


def start(path: Path, batches: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, path, str(batches)],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_a_capture_whose_writer_is_alive_is_running_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    with start(path, 2) as child:
        assert child.stdout
        assert [child.stdout.readline() for _ in range(3)] == ["ready\n", "7\n", "14\n"]
        assert store.open_capture(path).status == "running"
        assert sectors(path) == list(range(14))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        # The child is a zombie, so its /proc entry still exists.
        assert Path(f"/proc/{child.pid}/stat").exists()
        assert store.open_capture(path).status == "interrupted"
    assert store.open_capture(path).status == "interrupted"


@pytest.mark.quick(1)
@pytest.mark.parametrize("seed", range(4))
def test_a_writer_killed_at_any_moment_leaves_whole_batches(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.cwnd"
    chance = random.Random(seed)
    with start(path, 1_000_000) as child:
        assert child.stdout
        reported = 0
        for _ in range(chance.randrange(1, 12)):
            line = child.stdout.readline()
            reported = int(line) if line != "ready\n" else 0
        deadline = time.perf_counter() + chance.random() * 0.02
        while time.perf_counter() < deadline:
            pass
        child.send_signal(signal.SIGKILL)
        remaining = child.stdout.read().split()
        reported = max([reported, *map(int, remaining)])
    capture = store.open_capture(path)
    assert capture.status == "interrupted"
    numbers = capture.table("block_io").column("sector").to_pylist()
    assert numbers == list(range(len(numbers)))
    assert len(numbers) % 7 == 0
    assert reported <= len(numbers) <= reported + 7
    assert capture.warnings == []
    kept = capture.meta["counts"]["block_io"]["kept"]
    assert len(numbers) - 7 <= kept <= len(numbers)
    if numbers:
        assert pd.read_parquet(path / "block_io")["sector"].tolist() == numbers


def test_another_process_with_the_writers_pid_is_not_the_writer(tmp_path: Path) -> None:
    make(tmp_path / "a.cwnd")
    file = tmp_path / "a.cwnd" / "meta.json"
    meta = json.loads(file.read_text())
    assert store.open_capture(tmp_path / "a.cwnd").status == "running"
    for change in ({"pid_start": meta["pid_start"] - 1}, {"boot_id": "another"}, {"pid": "1"}, {"pid": 2**40}):
        file.write_text(json.dumps(meta | change))
        assert store.open_capture(tmp_path / "a.cwnd").status == "interrupted"
    for missing in ("pid", "pid_start", "boot_id", "status"):
        file.write_text(json.dumps({k: v for k, v in meta.items() if k != missing}))
        expected = "running" if missing == "status" else "interrupted"
        assert store.open_capture(tmp_path / "a.cwnd").status == expected


def test_a_capture_that_closes_while_it_is_opened_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make(tmp_path / "a.cwnd")

    def gone(_: int) -> None:
        writer.close()

    monkeypatch.setattr(store.reader, "process_start", gone)
    assert store.open_capture(tmp_path / "a.cwnd").status == "complete"


# ---- full disks -----------------------------------------------------------------------------------

FULL = """
import json, sys
from pathlib import Path
from cwndtrace import store
from cwndtrace.errors import CaptureError
from tests.unit import frames, test_store
path, filler = Path(sys.argv[1]) / "a.cwnd", Path(sys.argv[1]) / "filler"
writer = store.CaptureWriter.create(path, frames.meta())
writer.add("block_io", test_store.some(0))
writer.flush(force=True)
with filler.open("wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
writer.add("block_io", test_store.some(3))
failures = []
for step in (lambda: writer.flush(force=True), lambda: writer.update_meta(hz=1)):
    try:
        step()
    except CaptureError as error:
        failures.append([error.cause, error.remedy])
full = test_store.sectors(path), test_store.hidden(path), store.open_capture(path).meta["hz"]
filler.unlink()
writer.add("block_io", test_store.some(6))
writer.close()
print(json.dumps([failures, full, test_store.sectors(path), store.open_capture(path).status, writer.lost]))
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, to mount a small tmpfs: sudo make test"
)
def test_a_full_disk_is_named_and_rows_are_written_once_it_has_room(tmp_path: Path) -> None:
    # A separate mount namespace ensures that no mount is left behind.
    script = f'mount -t tmpfs -o size=256k none "{tmp_path}" && exec "$0" -c "$1" "{tmp_path}"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, FULL], cwd=ROOT, text=True, capture_output=True
    )
    if done.returncode and ("mount:" in done.stderr or "unshare:" in done.stderr):
        pytest.skip(f"needs a machine where root may mount a tmpfs: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    failures, (there, temporary, hz), after, status, lost = json.loads(done.stdout)
    (flush_cause, flush_remedy), (meta_cause, _) = failures
    assert "No space left on device" in flush_cause
    assert "3 rows wait in memory" in flush_cause
    assert "Free some space" in flush_remedy
    assert "No space left on device" in meta_cause
    assert (there, temporary, hz) == ([0, 1, 2], [], 250)
    assert (after, status, lost) == (list(range(9)), "complete", {})


LIMITED = """
import resource, sys
from cwndtrace import store
from cwndtrace.errors import CaptureError
from tests.unit import frames, test_store
writer = store.CaptureWriter.create(sys.argv[1], frames.meta())
writer.add("block_io", test_store.some(0))
writer.flush(force=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
writer.add("block_io", test_store.some(3))
try:
    writer.close()
except CaptureError as error:
    print(error)
"""


def test_rows_that_cannot_be_written_at_the_end_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    done = subprocess.run([sys.executable, "-c", LIMITED, path], cwd=ROOT, text=True, capture_output=True, check=True)
    assert "File too large" in done.stdout
    assert "ulimit -f" in done.stdout
    assert sectors(path) == [0, 1, 2]
    assert hidden(path) == []
    capture = store.open_capture(path)
    assert (capture.status, capture.meta["unwritten"]) == ("failed", {"block_io": 3})
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("broken", ["write_table", "fsync", "rename", "sync_directory"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_flush_that_fails_at_any_step_writes_each_row_once_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, error: type[BaseException]
) -> None:
    path = tmp_path / "a.cwnd"
    writer = make(path)
    writer.add("block_io", some(0))
    writer.flush(force=True)
    writer.add("block_io", some(3))

    fsync = os.fsync

    def fail(*_: object, **__: object) -> None:
        raise error(errno.EIO, os.strerror(errno.EIO))

    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            fail()
        fsync(descriptor)

    with monkeypatch.context() as patch:
        target: tuple[Any, str, Any] = {
            "write_table": (pq, "write_table", fail),
            "fsync": (os, "fsync", fail),
            "rename": (os, "rename", fail),
            "sync_directory": (os, "fsync", fail_for_folders),
        }[broken]
        patch.setattr(*target)
        with pytest.raises(CaptureError if error is OSError else error, match="Input/output error"):
            writer.flush(force=True)
    assert sectors(path) == [0, 1, 2]
    assert hidden(path) == []
    writer.close()
    assert sectors(path) == list(range(6))


def test_each_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, steps = tmp_path / "a.cwnd", list[str]()
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def record_rename(source: str, target: str, **folders: int) -> None:
        steps.append(f"name {target}")
        rename(source, target, **folders)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    writer = make(path)
    assert steps == [f"sync {tmp_path.name}", "sync .meta.json.tmp", "name meta.json", "sync a.cwnd"]
    steps.clear()
    writer.add("block_io", some(0))
    writer.flush(force=True)
    part = "part-000001.parquet"
    assert steps == ["sync a.cwnd", f"sync .{part}.tmp", f"name {part}", "sync block_io"]


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "Free some space"), (errno.EDQUOT, "your quota"), (errno.EROFS, "with -o")]
)
def test_a_failed_flush_is_tried_again_only_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    now, tries = 1000.0, 0

    def fail(*_: object, **__: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(time, "monotonic", lambda: now)
    writer = make(tmp_path / "a.cwnd")
    monkeypatch.setattr(pq, "write_table", fail)
    writer.add("block_io", some(0))
    now += 0.5
    with pytest.raises(CaptureError, match=remedy):
        writer.flush()
    writer.flush()
    assert tries == 1
    now += 0.5
    with pytest.raises(CaptureError):
        writer.flush()
    assert tries == 2


def test_rows_beyond_the_buffer_are_counted_as_unwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BUFFER_ROWS", 10)
    writer = make(tmp_path / "a.cwnd")
    for first in range(0, 15, 3):
        writer.add("block_io", some(first))
    writer.close()
    assert writer.lost == {"block_io": 6}
    assert sectors(tmp_path / "a.cwnd") == list(range(9))
    capture = store.open_capture(tmp_path / "a.cwnd")
    assert (capture.status, capture.meta["unwritten"]) == ("complete", {"block_io": 6})


# ---- damaged and foreign captures -----------------------------------------------------------------


def three_parts(path: Path) -> list[Path]:
    writer = make(path)
    for first in (0, 3, 6):
        writer.add("block_io", some(first))
        writer.flush(force=True)
    writer.close()
    return sorted((path / "block_io").iterdir())


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_a_damaged_part_is_named_and_the_others_are_read(tmp_path: Path, damage: bytes | None) -> None:
    parts = three_parts(tmp_path / "a.cwnd")
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    capture = store.open_capture(tmp_path / "a.cwnd")
    assert capture.rows("block_io") == 6
    for _ in range(2):
        assert capture.table("block_io").column("sector").to_pylist() == [0, 1, 2, 6, 7, 8]
    (warning,) = capture.warnings
    assert warning.startswith("block_io/part-000002.parquet is cut off or corrupt")


@pytest.mark.parametrize("region", ["pages", "footer"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_damages_only_its_part(tmp_path: Path, region: str, data: st.DataObject) -> None:
    path = tmp_path / "a.cwnd"
    parts = [path / "block_io" / f"part-{n:06}.parquet" for n in (1, 2, 3)] if path.exists() else three_parts(path)
    whole = parts[1].read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    at = data.draw(st.integers(0, footer - 1) if region == "pages" else st.integers(footer, len(whole) - 1))
    damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    try:
        parts[1].write_bytes(damaged)
        capture = store.open_capture(path)
        rows = capture.table("block_io").column("sector").to_pylist()
        assert (rows[:3], rows[-3:]) == ([0, 1, 2], [6, 7, 8])
        assert bool(capture.warnings) == (len(rows) == 6)
        if region == "pages":  # pages have checksums; a damaged footer may still change a column's name
            assert rows[3:-3] in ([], [3, 4, 5])
    finally:
        parts[1].write_bytes(whole)


def test_no_changed_byte_of_a_column_changes_its_values(tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    parts = three_parts(path)
    whole = parts[1].read_bytes()
    columns = pq.read_metadata(parts[1]).row_group(0)
    (column,) = (c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema == "sector")
    begin = column.dictionary_page_offset or column.data_page_offset
    for at in range(begin, begin + column.total_compressed_size):
        parts[1].write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert sectors(path) in ([0, 1, 2, 6, 7, 8], list(range(9)))


def test_columns_of_a_later_version_are_kept_and_absent_ones_are_null(tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    parts = three_parts(path)
    table = pq.ParquetFile(parts[0]).read()
    pq.write_table(table.append_column("mood", pa.array(["good"] * 3)), parts[0])
    pq.write_table(table.drop_columns(["cpu", "comm"]), parts[1])
    (path / "gossip").mkdir()
    pq.write_table(pa.table({"word": ["x"]}), path / "gossip" / "part-000001.parquet")
    (path / "block_io" / ".part-000009.parquet.tmp").write_bytes(b"half")
    capture = store.open_capture(path)
    table_read = capture.table("block_io")
    assert table_read.column_names == [*arrow.schema("block_io").names, "mood"]
    assert table_read.column("mood").to_pylist() == ["good"] * 3 + [None] * 6
    assert table_read.column("comm").to_pylist() == ["fio"] * 3 + [None] * 3 + ["fio"] * 3
    assert capture.table("gossip").to_pydict() == {"word": ["x"]}
    assert capture.warnings == []


def refusal(path: str | Path) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        store.open_capture(path)
    assert len(str(caught.value).splitlines()) <= 2
    assert str(caught.value).replace("\n", "").isprintable()
    return caught.value


def test_other_paths_than_captures_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    frames.capture(tmp_path / "a.cwnd", block_io=some(0))
    (tmp_path / "fleet").mkdir()
    frames.capture(tmp_path / "fleet" / "b.cwnd")
    assert "There is no" in refusal(tmp_path / "nothing").cause
    assert refusal(tmp_path / "a").remedy == f"Did you mean {tmp_path / 'a.cwnd'}?"
    for part in ("block_io/part-000001.parquet", "block_io", "meta.json"):
        error = refusal(tmp_path / "a.cwnd" / part)
        assert "part of a capture" in error.cause
        assert error.remedy == f"Open {tmp_path / 'a.cwnd'}."
    error = refusal(tmp_path)
    assert "holds 2 captures" in error.cause
    assert str(tmp_path / "a.cwnd") in error.remedy
    assert str(tmp_path / "fleet" / "b.cwnd") in error.remedy
    (tmp_path / "empty").mkdir()
    assert "no meta.json" in refusal(tmp_path / "empty").cause
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file").cause
    assert "\x1b" not in str(refusal(tmp_path / "\x1b[2J"))


def test_a_search_for_captures_stops_after_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        for below in range(10):
            (tmp_path / f"{number}").mkdir(exist_ok=True)
            frames.capture(tmp_path / f"{number}" / f"{below}.cwnd")
    assert "holds 100 captures" in refusal(tmp_path).cause
    monkeypatch.setattr("cwndtrace.store.reader._MOST_LOOKED_AT", 50)
    count = re.search(r"holds (\d+) captures", refusal(tmp_path).cause)
    assert count is not None
    assert 30 <= int(count[1]) <= 40


def test_a_part_is_recognised_by_its_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames.capture(tmp_path / "a.cwnd", block_io=some(0))
    monkeypatch.chdir(tmp_path / "a.cwnd" / "block_io")
    assert refusal("part-000001.parquet").remedy == f"Open {tmp_path / 'a.cwnd'}."
    assert refusal(".").remedy == f"Open {tmp_path / 'a.cwnd'}."


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"", "can't be read"),
        (b"{", "can't be read"),
        (b'{"schema": 1', "can't be read"),
        (b"\xff\xfe\x00", "can't be read"),
        (b"[" * 100_000, "can't be read"),
        (b"[1]", "no schema number"),
        (b"{}", "no schema number"),
        (b'{"schema": true}', "no schema number"),
        (b'{"schema": "1"}', "no schema number"),
        (b'{"schema": 0}', "no schema number"),
    ],
)
def test_bad_metadata_is_refused(tmp_path: Path, text: bytes, cause: str) -> None:
    make(tmp_path / "a.cwnd")
    (tmp_path / "a.cwnd" / "meta.json").write_bytes(text)
    assert cause in refusal(tmp_path / "a.cwnd").cause


def test_a_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    make(tmp_path / "a.cwnd")
    (tmp_path / "a.cwnd" / "meta.json").write_text('{"schema": 99, "version": "9.0\\u001b[2J"}')
    error = refusal(tmp_path / "a.cwnd")
    assert "schema 99" in error.cause
    assert "Upgrade" in error.remedy
    assert "9.0" in error.remedy


def create_refusal(path: Path) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        make(path)
    assert len(str(caught.value).splitlines()) == 2
    return caught.value


def test_a_capture_that_cannot_be_created_names_the_reason(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    assert "exists already" in create_refusal(tmp_path / "there").cause
    assert "exists already" in create_refusal(tmp_path / "file").cause
    assert f"folder {tmp_path / 'no'} doesn't exist" in create_refusal(tmp_path / "no" / "a.cwnd").cause
    assert "Not a directory" in create_refusal(tmp_path / "file" / "a.cwnd").cause
    assert "shorter name" in create_refusal(tmp_path / ("x" * 300)).remedy
    for path in (Path(), tmp_path / ".."):
        assert "exists already" in create_refusal(path).cause
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


def test_a_capture_whose_metadata_cannot_be_written_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    assert "No space left" in create_refusal(tmp_path / "a.cwnd").cause
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def as_nobody() -> Callable[[Callable[[], None]], None]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user: sudo make test")

    def run(step: Callable[[], None]) -> None:
        os.seteuid(65534)
        try:
            step()
        finally:
            os.seteuid(0)

    return run


def test_missing_permission_is_named(tmp_path: Path, as_nobody: Callable[[Callable[[], None]], None]) -> None:
    for folder in [tmp_path, *tmp_path.parents[:-2]]:
        folder.chmod(0o755)
    frames.capture(tmp_path / "a.cwnd")
    (tmp_path / "a.cwnd").chmod(0o700)

    def step() -> None:
        assert refusal(tmp_path / "a.cwnd").remedy == "Read it as the user who wrote it."
        error = create_refusal(tmp_path / "b.cwnd")
        assert "Permission denied" in error.cause
        assert "may write" in error.remedy

    as_nobody(step)


# ---- parts that are missing -----------------------------------------------------------------------


@pytest.fixture
def resets_in_parts(tmp_path: Path) -> Path:
    """A capture of 3 connections whose resets lie in parts of five rows."""
    resets, connections = frames.story(seconds=30, peers=3)
    writer = make(tmp_path / "a.cwnd")
    writer.add("connections", connections)
    for first in range(0, len(resets), 5):
        writer.add("cwnd_reset", resets.slice(first, 5))
        writer.flush(force=True)
    writer.close(counts={"cwnd_reset": {"kept": len(resets)}, "connections": {"kept": len(connections)}})
    return tmp_path / "a.cwnd"


def cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-100])


def shorten(part: Path) -> None:
    pq.write_table(pq.ParquetFile(part).read().slice(0, 2), part)


@pytest.mark.quick(2)
@pytest.mark.parametrize("old", [False, True], ids=["", "without a list of parts"])
@pytest.mark.parametrize(
    ("damage", "lacking"),
    [(Path.unlink, 5), (cut, 5), (shorten, 3), (lambda part: shutil.rmtree(part.parent), -1)],
    ids=["one is deleted", "one is cut off", "one has fewer rows", "the folder is gone"],
)
def test_missing_records_are_the_first_warning_and_no_verdict_is_given(
    resets_in_parts: Path, damage: Callable[[Path], object], lacking: int, old: bool
) -> None:
    meta = json.loads((resets_in_parts / "meta.json").read_text())
    kept = meta["counts"]["cwnd_reset"]["kept"]
    assert sum(meta["parts"]["cwnd_reset"]["rows"]) == kept
    if old:
        del meta["parts"]
        (resets_in_parts / "meta.json").write_text(json.dumps(meta))
    assert load(resets_in_parts).warnings == []
    damage(resets_in_parts / "cwnd_reset" / "part-000002.parquet")
    trace = load(resets_in_parts)
    report = content.report(trace)
    warnings, answer = trace.warnings, report.host.text
    number = kept if lacking < 0 else lacking
    assert warnings[0].startswith(f"{number} of {kept} records of cwnd_reset are not in the capture")
    assert click.unstyle(lines(report)[0]) == f"! {warnings[0]}."
    claim = "Can't tell whether window resets delayed anything"
    assert answer.startswith(f"{claim}, because {number} of {kept} resets are not in")
    assert "No reset delayed anything" not in answer
    assert "No window was reset" not in answer
    assert report.host.verdict == "unknown"
    assert "no_reset" not in set(report.connections["verdict"])
    if not old and damage is Path.unlink:
        assert warnings[0].endswith("; missing: cwnd_reset/part-000002.parquet")


def test_replaced_and_added_parts_are_named(resets_in_parts: Path) -> None:
    parts = [resets_in_parts / "cwnd_reset" / f"part-{number:06}.parquet" for number in (1, 2)]
    shutil.copy(parts[0], parts[1])  # the same number of rows, but other ones
    shutil.copy(parts[0], resets_in_parts / "cwnd_reset" / "part-000099.parquet")
    assert load(resets_in_parts).warnings == [
        "these parts aren't as the trace wrote them: cwnd_reset/part-000002.parquet and 1 other part"
    ]


def test_running_traces_and_unwritten_rows_miss_no_records(tmp_path: Path) -> None:
    writer = make(tmp_path / "a.cwnd")
    writer.update_meta(counts={"block_io": {"kept": 9}})
    writer.add("block_io", some(0))
    writer.flush(force=True)
    assert (load(tmp_path / "a.cwnd").status, load(tmp_path / "a.cwnd").warnings) == ("running", [])
    writer.lost["block_io"] = 6
    writer.close()
    assert load(tmp_path / "a.cwnd").warnings == []


def test_more_rows_than_max_rows_are_refused(resets_in_parts: Path) -> None:
    rows = sum(store.open_capture(resets_in_parts).rows(name) for name in arrow.TABLES)
    assert len(load(resets_in_parts, max_rows=rows).resets)
    with pytest.raises(CaptureError, match=f"holds {rows} rows, and the limit is {rows - 1}") as caught:
        load(resets_in_parts, max_rows=rows - 1).resets  # noqa: B018
    assert "--max-rows" in caught.value.remedy
