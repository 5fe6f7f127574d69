# SPDX-License-Identifier: Apache-2.0
"""Untrusted captures raise only CaptureError, and take no more memory and time than their size justifies.

``python -m tests.fuzz`` is the long form of the first test.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cwndtrace
from cwndtrace import store
from cwndtrace.errors import CaptureError
from cwndtrace.export import perfetto, text
from cwndtrace.plot import staircase, timeline
from cwndtrace.records import arrow, layout
from cwndtrace.report import content
from cwndtrace.store import files, parquet_limits
from tests import fuzz
from tests.harness.replay import Replay
from tests.harness.users import need_command
from tests.unit import frames
from tests.unit.examples import FEWEST

SOME = settings(FEWEST, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
def test_mutated_files_and_shapes_that_ask_for_too_much_are_read_or_refused(tmp_path: Path) -> None:
    """One process runs the shapes, and then the first cases that have a mutation of each kind."""
    cases = len(fuzz.SHAPES) + 18
    summary = fuzz.batches(0, cases, draw_every=17, keep=tmp_path / "case")
    assert summary.failures == []
    assert summary.outcomes.total() == cases
    assert summary.outcomes["metadata of nothing: refused"] == 1
    assert {name.partition(":")[0] for name in summary.outcomes} == {
        "parquet", "plain parquet", "raw parts", "meta bytes", "meta values", "values", "raw", "shape", *fuzz.SHAPES,
    }  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
META = {name: JSON for name in frames.meta() if name != "schema"} | dict.fromkeys(("unwritten", "pid"), JSON)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture whose meta.json tests may overwrite."""
    resets, connections = frames.story(seconds=10)
    path = tmp_path_factory.mktemp("hostile") / "a.cwnd"
    return frames.capture(path, resets=resets, connections=connections, block_io=frames.disk(20)).path


@pytest.mark.slow
@SOME
@given(st.fixed_dictionaries({}, optional=META))
def test_any_values_in_metadata_are_read_or_refused(sample: Path, meta: dict[str, Any]) -> None:
    (sample / "meta.json").write_text(json.dumps({**frames.meta(), **meta, "schema": 1}))
    use(sample)


@SOME
@given(st.binary(max_size=300))
def test_any_bytes_in_place_of_a_file_are_read_or_refused(sample: Path, raw: bytes) -> None:
    (sample / "meta.json").write_bytes(raw)
    use(sample)
    part = next((sample / "cwnd_reset").glob("*.parquet"))
    kept = part.read_bytes()
    (sample / "meta.json").write_text(json.dumps({**frames.meta(), "schema": 1}))
    try:
        for wrapped in (raw, b"PAR1" + raw + len(raw).to_bytes(4, "little") + b"PAR1", kept[: len(kept) // 2] + raw):
            part.write_bytes(wrapped)
            trace = cwndtrace.load(sample)
            assert trace.resets.empty
            assert len(trace.warnings) == 1
    finally:
        part.write_bytes(kept)


def use(path: Path) -> None:
    """Do with a capture what every command does; only a printable CaptureError may be raised."""
    try:
        trace = cwndtrace.load(path)
        repr(trace)
        trace._repr_html_()
        for table in text.TABLES:
            text.write(BytesIO(), trace, table, text.CSV)
        perfetto.write(trace, BytesIO())
        trace.summary()
        trace.audit()
        trace.remedies()
        json.dumps(content.as_json(content.report(trace)), allow_nan=False)
    except CaptureError as e:
        readable = e.cause.isprintable() and e.remedy != ""
    else:
        readable = True
    assert readable


@SOME
@given(st.binary(max_size=200), st.integers(0, 40_000))
def test_any_stream_of_raw_records_is_read_or_refused(tmp_path: Path, raw: bytes, at: int) -> None:
    whole = fuzz.RAW.read_bytes()
    at = min(at, len(whole))
    file = tmp_path / "trace.raw"
    file.write_bytes(whole[:at] + raw + whole[at + len(raw) :])
    try:
        chunks = Replay(file).stop()
    except CaptureError:
        pass
    else:
        for name, data in chunks:
            arrow.table_to_dicts(name, arrow.to_arrow(name, layout.decode(name, data), 0))


# ---- links, devices, names --------------------------------------------------------------------------


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    resets, connections = frames.story(seconds=10)
    return frames.capture(tmp_path / "a.cwnd", resets=resets, connections=connections).path


def in_place(path: Path, make: Callable[[Path], object]) -> None:
    path.rename(path.with_name(f"{path.name}.aside"))
    make(path)


ODD: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to the original": lambda path: path.symlink_to(f"{path.name}.aside"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to a device without end": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("odd", ODD)
def test_a_part_that_is_no_regular_file_is_left_out(capture: Path, odd: str) -> None:
    part = next((capture / "cwnd_reset").glob("*.parquet"))
    in_place(part, ODD[odd])
    begin = time.process_time()
    trace = cwndtrace.load(capture)
    assert trace.resets.empty
    assert len(trace.connections)
    assert trace.host().text.startswith("Can't tell whether window resets delayed anything, because ")
    missing, line = trace.warnings
    assert missing.endswith(f"records of cwnd_reset are not in the capture; missing: cwnd_reset/{part.name}")
    assert line.startswith(f"cwnd_reset/{part.name} is cut off or corrupt")
    assert "root:" not in line
    # This is CPU time, because other processes may use the CPUs. pytest's timeout ends a read that waits forever.
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("odd", ODD)
def test_metadata_that_is_no_regular_file_is_refused(capture: Path, odd: str) -> None:
    in_place(capture / "meta.json", ODD[odd])
    with pytest.raises(CaptureError):
        cwndtrace.load(capture)


def test_a_table_that_is_a_symbolic_link_is_left_out(capture: Path, tmp_path: Path) -> None:
    (capture / "cwnd_reset").rename(tmp_path / "elsewhere")
    (capture / "cwnd_reset").symlink_to(tmp_path / "elsewhere")
    trace = cwndtrace.load(capture)
    assert trace.resets.empty
    assert trace.warnings[1:] == ["cwnd_reset is cut off or corrupt, its rows are left out (it is a symbolic link)"]


@pytest.mark.parametrize("name", ["../b.cwnd/cwnd_reset", "/etc", "..", ".", "", "cwnd_reset/../cwnd_reset", "a\0b"])
def test_table_names_that_lead_out_of_the_capture_are_refused(capture: Path, name: str) -> None:
    with pytest.raises(KeyError):
        store.open_capture(capture).table(name)


# ---- sizes ------------------------------------------------------------------------------------------


def write(capture: Path, table: pa.Table, **options: Any) -> Path:
    part = next((capture / "cwnd_reset").glob("*.parquet"))
    pq.write_table(table, part, **options)
    return part


def refused(capture: Path) -> list[str]:
    """Return the reasons why a capture's resets are left out. It must warn that they are missing and take < 200 MB."""
    trace = cwndtrace.load(capture)
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert trace.resets.empty
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun < 200_000
    missing, *reasons = trace.warnings
    assert "records of cwnd_reset are not in the capture; missing: cwnd_reset/part-000001.parquet" in missing
    assert len(reasons) == 1
    return reasons


@pytest.mark.slow
def test_too_many_rows_of_a_small_file_are_refused(capture: Path) -> None:
    count = 150_000_000
    batch = pa.table({name: pa.array([1] * 1_000_000, pa.int8()) for name in ("tgid", "tid")})
    part = next((capture / "cwnd_reset").glob("*.parquet"))
    with pq.ParquetWriter(part, batch.schema, compression="zstd") as writer:
        for _ in range(count // len(batch)):
            writer.write_table(batch)
    assert part.stat().st_size < 2_000_000
    assert f"it says that it holds {count:,} rows" in refused(capture)[0]


@pytest.mark.slow
def test_a_page_that_unpacks_to_far_more_is_refused(capture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_limits, "MOST_BYTES", 100 << 20)
    part = write(capture, pa.table({"comm": [b"\0" * (40 << 20)] * 3}), use_dictionary=False, compression="zstd")
    assert part.stat().st_size < 100_000
    assert "its pages would unpack to more than" in refused(capture)[0]


def test_a_page_with_a_wrong_size_is_refused(capture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = write(capture, pa.table({"tgid": list(range(100_000))}), use_dictionary=False, compression="none")
    monkeypatch.setattr(parquet_limits, "MOST_BYTES", 1_000_000)
    with files.parquet(part):
        pass
    raw = bytearray(part.read_bytes())
    # PageHeader: i32 type, then i32 uncompressed_page_size, here a varint of three bytes.
    assert (raw[4], raw[6], raw[7] & raw[8] & 0x80) == (0x15, 0x15, 0x80)
    raw[7:10] = b"\xfe\xff\x7f"
    part.write_bytes(raw)
    with pytest.raises(parquet_limits.UnsafeFile, match="its pages would unpack to more than"), files.parquet(part):
        pass


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (pa.table({"a": [[1, 2]]}), "its columns are nested"),
        (pa.table({"a": [{"b": 1}]}), "its columns are nested"),
        (pa.table({"a": pa.array([b"x" * 100], pa.binary(100))}), "column a is of type FIXED_LEN_BYTE_ARRAY"),
        (pa.table({f"c{n}": [1] for n in range(300)}), "300 columns in 1 group are too many"),
    ],
)
def test_columns_that_no_capture_has_are_refused(capture: Path, table: pa.Table, why: str) -> None:
    write(capture, table)
    assert why in refused(capture)[0]


def test_metadata_without_limit_is_refused(capture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (capture / "meta.json").open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file: it takes no space on the disk
    with pytest.raises(CaptureError, match=r"it has 1,099,511,627,776 bytes"):
        cwndtrace.load(capture)
    (capture / "meta.json").write_text("[" * 100_000)
    with pytest.raises(CaptureError):
        cwndtrace.load(capture)
    monkeypatch.setattr(files, "MOST_PARTS", 0)
    (capture / "meta.json").write_text('{"schema": 1}')
    with pytest.raises(CaptureError, match="more than 0 parts are too many"):
        repr(cwndtrace.load(capture))


@pytest.mark.parametrize("seed", range(200))
def test_any_bytes_parse_as_thrift_or_are_refused(seed: int) -> None:
    rng = random.Random(seed)
    thrift = parquet_limits.Thrift(rng.randbytes(rng.randrange(200)))
    with suppress(parquet_limits.UnsafeFile):
        assert isinstance(thrift.struct(), dict)
        assert thrift.at <= 200


def test_the_page_headers_of_pyarrow_are_read_to_the_last(capture: Path) -> None:
    for options in ({}, {"data_page_version": "2.0"}, {"compression": "none", "write_page_checksum": True}):
        table = frames.disk(5000)
        part = write(capture, table, data_page_size=1000, **options)
        meta = pq.read_metadata(part)
        with files.plain(part) as (file, size):
            footer = parquet_limits.Thrift(parquet_limits._footer(file, size)).struct()
            for index, chunk in enumerate(footer[4][0][1]):
                known = meta.row_group(0).column(index)
                assert (chunk[3][9], chunk[3][7]) == (known.data_page_offset, known.total_compressed_size)
                # The footer's size includes the headers, so it is a little larger.
                work = parquet_limits._Work()
                parquet_limits._unpacked(file, *parquet_limits._place(size, chunk[3]), work)
                assert 0 <= known.total_uncompressed_size - work.unpacked < known.total_uncompressed_size * 0.5 + 200
            names = [name for name, _ in parquet_limits._columns(footer)]
            assert (names, footer[3]) == (meta.schema.names, meta.num_rows)


def test_text_that_is_not_utf_8_is_left_out(capture: Path) -> None:
    """A column of type string holds bytes that aren't UTF-8."""
    column = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    write(capture, pa.table({"comm": column}))
    assert "UTF" in refused(capture)[0]


FLIP = """
import sys
from pathlib import Path
from cwndtrace.store import files
from cwndtrace.store.reader import read_errors
part = Path(sys.argv[1])
whole = part.read_bytes()
footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
read = 0
for at in range(footer, len(whole)):
    damaged = bytearray(whole)
    damaged[at] ^= 1 << at % 8
    part.write_bytes(damaged)
    try:
        with files.parquet(part) as file:
            files.read(file)
            file.metadata.num_rows
        read += 1
    except read_errors():
        pass
print(read, len(whole) - footer)
"""


@pytest.mark.slow
def test_no_flipped_bit_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    """pyarrow's metadata of a row group isn't used: its C++ exception ends it if a statistic has a wrong length."""
    part = tmp_path / "part-000001.parquet"
    raw = next(raw for name, raw in fuzz.base(True).items() if "cwnd_sample" in name)
    # All columns of numbers are described alike, so a few of them will do.
    few = pq.ParquetFile(BytesIO(raw)).read(["time", "ts_ns", "cwnd"])
    part.write_bytes(fuzz.packed(few))
    done = subprocess.run(
        [sys.executable, "-c", FLIP, str(part)], cwd=fuzz.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read, flipped = map(int, done.stdout.split())
    assert 0 < read < flipped


_JUDGED: Final = ("cwnd_reset", "connections", "cwnd_recovery")
"""The tables whose rows a verdict needs in full."""


@pytest.mark.slow
@pytest.mark.parametrize("table", arrow.TABLES)
def test_a_part_without_one_column_opens_and_gives_no_verdict(harmful: Path, tmp_path: Path, table: str) -> None:
    """A recording of an older version may lack it. Its values are missing then, and the answer names the column."""
    path = tmp_path / "a.cwnd"
    part, whole = one_part(harmful, path, table)
    attribute = {"cwnd_reset": "resets", "cwnd_recovery": "recoveries", "cwnd_sample": "samples"}.get(table, table)
    for number, name in enumerate(whole.column_names):
        pq.write_table(whole.drop_columns([name]), part)
        trace = cwndtrace.load(path)
        if number % 5 == 0:  # building a frame analyses all tables, which is slow
            frame = getattr(trace, attribute)
            missing = (frame[name] == 0) if name in arrow.IDS_OF_LATER_VERSIONS else frame[name].isna()
            assert (len(frame), missing.sum()) == (len(whole), len(whole))
        why = trace._lacking()
        assert (f" ({name})" in why) == (name in arrow.needed(table) and table in _JUDGED)
        assert (f": {name}" in "".join(trace.gaps())) == (name in arrow.needed(table))
    if table in _JUDGED:
        pq.write_table(whole.drop_columns(["srtt_us"]), part)
        assert cwndtrace.load(path).host().verdict == "unknown"


@pytest.mark.quick(1)
@pytest.mark.parametrize("table", arrow.TABLES)
def test_a_column_that_no_verdict_needs_may_be_missing(
    harmful: Path, reported: dict[str, Any], tmp_path: Path, table: str
) -> None:
    path = tmp_path / "a.cwnd"
    part, whole = one_part(harmful, path, table)
    # Without these a remedy names no interface, and a group no workload and service.
    kept = {*arrow.needed(table), *arrow.MAY_BE_NULL, "ifindex", "sock_cgroup_id", "listener", "listener_pid"}
    pq.write_table(whole.select([name for name in whole.column_names if name in kept]), part)
    after = content.as_json(content.report(cwndtrace.load(path)))
    assert {**after, "caveats": []} == {**reported, "caveats": [], "capture": str(path)}


@pytest.mark.quick(1)
@pytest.mark.parametrize("table", arrow.TABLES)
def test_every_command_accepts_a_part_of_an_older_recording(harmful: Path, tmp_path: Path, table: str) -> None:
    """A second part has all columns, and is reported."""
    path = tmp_path / "a.cwnd"
    part, whole = one_part(harmful, path, table)
    lacks = {"cwnd_reset": "mss", "connections": "bytes_sent", "block_io": "done_ns", "cwnd_recovery": "srtt_us"}
    lacks |= {"workloads": "path", "processes": "pid"}
    half = len(whole) // 2
    pq.write_table(whole.slice(half), part)
    pq.write_table(whole.slice(0, half).drop_columns([lacks.get(table, "cwnd")]), part.with_name("part-000002.parquet"))
    trace = cwndtrace.load(path)
    report = content.report(trace)
    assert report.caveats["missing"]
    json.dumps(content.as_json(report), allow_nan=False)
    assert len(trace.compare(trace))
    assert str(trace.conclude(trace)).isprintable()
    timeline.timeline(trace.resets, trace.connections, trace.block_io, about=trace.about, samples=trace.samples)
    staircase.staircase(trace.resets)


def test_a_time_that_pandas_cannot_represent_makes_a_part_unreadable(harmful: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    part, whole = one_part(harmful, path, "cwnd_reset")
    times = whole.column("time").cast(pa.int64()).to_pylist()
    times[0] = 10**18
    late = pa.array(times, whole.schema.field("time").type)
    pq.write_table(whole.set_column(whole.schema.get_field_index("time"), "time", late), part)
    trace = cwndtrace.load(path)
    repr(trace.verdicts)
    assert len(trace.resets) == 0
    assert any("cut off or corrupt" in line for line in trace.warnings)


@pytest.fixture(scope="module")
def harmful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture whose resets are harmful, with one part of each table."""
    path = tmp_path_factory.mktemp("harmful") / "a.cwnd"
    resets, connections = frames.story(seconds=8)
    recoveries = frames.table("cwnd_recovery", frames.recovered(), frames.recovered(2))
    frames.capture(
        path,
        resets=resets,
        connections=connections,
        block_io=frames.disk(5),
        recoveries=recoveries,
        workloads=frames.workloads({}, {"cgroup_id": 2}),
        processes=frames.processes({}, {"pid": 5}),
    )
    (path / "cwnd_sample").mkdir()
    rows = np.ones(4, layout.event("cwnd_sample").dtype)
    pq.write_table(frames.table("cwnd_sample", rows), path / "cwnd_sample" / "part-000001.parquet")
    return path


@pytest.fixture(scope="module")
def reported(harmful: Path) -> dict[str, Any]:
    return content.as_json(content.report(cwndtrace.load(harmful)))


def one_part(harmful: Path, path: Path, table: str) -> tuple[Path, pa.Table]:
    """Copy a capture to ``path``; return the only part of a table, and its rows."""
    shutil.copytree(harmful, path)
    (part,) = path.glob(f"{table}/*.parquet")
    return part, pq.ParquetFile(part).read()


def test_a_lack_of_memory_raises_an_error_that_says_so(capture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(files, "read", none_left)
    with pytest.raises(CaptureError, match="Memory ran out") as caught:
        content.report(cwndtrace.load(capture))
    assert "report this line" not in str(caught.value)


LIBRARIES = (
    "import cwndtrace.cli.report, pyarrow.compute, pyarrow.parquet, numpy.random\n"
    "print(next(line for line in open('/proc/self/status') if line.startswith('VmPeak')).split()[1])"
)


@pytest.mark.slow
def test_a_report_without_enough_memory_says_so(tmp_path: Path) -> None:
    """The address space is limited to what the libraries need and a little more, from 8 MiB to enough for all rows."""
    need_command()
    rows = np.repeat(frames.block(), 600_000)
    rows["done_ns"] += np.arange(len(rows), dtype=np.uint64)
    resets, connections = frames.story(seconds=8)
    path = tmp_path / "a.cwnd"
    frames.capture(path, resets=resets, connections=connections, block_io=frames.table("block_io", rows))
    python = [sys.executable, "-I"]
    libraries = int(subprocess.run([*python, "-c", LIBRARIES], capture_output=True, text=True, check=True).stdout) << 10
    for more, enough in ((8, False), (24, False), (64, None), (4096, True)):
        limit = ["prlimit", f"--as={libraries + (more << 20)}"]
        done = subprocess.run(
            [*limit, *python, "-m", "cwndtrace", "report", str(path)], capture_output=True, text=True, check=False
        )
        stderr = done.stderr.splitlines()
        assert done.returncode == bool(stderr), (more, done)
        assert not stderr or (len(stderr) == 2 and stderr[0].startswith("cwndtrace: Memory ran out")), (more, done)
        assert enough in (None, not stderr), (more, done)
