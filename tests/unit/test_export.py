# SPDX-License-Identifier: Apache-2.0
"""Tables as CSV and JSON lines: other programs read back what the Parquet files have, and a spreadsheet no formula."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import cwndtrace
from cwndtrace.cli import export as command
from cwndtrace.cli import main
from cwndtrace.errors import UsageError
from cwndtrace.export import text
from cwndtrace.records import arrow, layout
from cwndtrace.records.frames import PLACEHOLDERS
from tests.unit import frames, packet_files

Rows = list[Any]

SAMPLE = Path(__file__).parents[1] / "data" / "sample.cwnd"
PARTS = {
    "resets": "cwnd_reset",
    "recoveries": "cwnd_recovery",
    "samples": "cwnd_sample",
    "connections": "connections",
    "block_io": "block_io",
    "workloads": "workloads",
    "processes": "processes",
}


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def exported(capture: Path, table: str, file: Path) -> Path:
    """Return a file with a table in the format of its name."""
    form = "csv" if ".csv" in file.name else "jsonl"
    done = export(capture, f"--{form}", f"{table}={file}")
    assert done.exit_code == 0, done.output
    return file


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture with rows in each table, numbers of 64 bits and missing values."""
    folder = tmp_path_factory.mktemp("captures")
    resets = frames.table(
        "cwnd_reset", *(frames.reset(at, cgroup_id=2**63 + at, process=b"replica") for at in (5, 7, 11))
    )
    seen = [frames.snapshot(t, bytes_sent=40_100_000 + t * 100_000) for t in (0, 9, 12)]
    blocks = [frames.block(at / 100, latency_us=at, owner_cgroup_id=2**53 + at) for at in range(10, 400)]
    where = folder / "a.cwnd"
    frames.capture(
        where, resets=resets, connections=frames.snapshots(*seen), block_io=frames.table("block_io", *blocks),
        workloads=frames.workloads({}), processes=frames.processes({}),
    )  # fmt: skip
    return where


@pytest.fixture(scope="module")
def files(capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """Return a file with a table in a format, and its capture. Each is written once."""
    folder = tmp_path_factory.mktemp("files")

    @functools.cache
    def write(table: str, form: str) -> tuple[Path, Path]:
        source = SAMPLE if table == "samples" else capture
        return exported(source, table, folder / f"{table}.{form}"), source

    return write


def parquet(capture: Path, table: str) -> Rows:
    """Return the rows of a table's Parquet files in order, with None in place of the kernel's placeholders."""
    name = PARTS[table]
    files = sorted((capture / name).glob("part-*.parquet"))
    rows = pa.concat_tables([pq.read_table(file) for file in files]).to_pylist() if files else []
    rows.sort(key=lambda row: next(value for key, value in row.items() if key.endswith("_ns")))
    limits = PLACEHOLDERS.items()
    return [row | {n: None for n, least in limits if n in row and row[n] >= least} for row in rows]


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, pd.Timestamp) or hasattr(wanted, "timestamp"):
        return bool(pd.Timestamp(found).tz_convert("UTC") == pd.Timestamp(wanted))
    return bool(found == wanted) or (wanted in (None, "") and (found in (None, "") or found != found))


def assert_same(found: Rows, wanted: Rows) -> None:
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        differing = {n: (mine[n], value) for n, value in theirs.items() if not same(mine[n], value)}
        assert differing == {}


READ: dict[str, Callable[[Path, str], Rows]] = {
    "pandas.csv": lambda file, _: pd.read_csv(file, parse_dates=["time"]).to_dict("records"),
    "duckdb.csv": lambda file, table: by_duckdb(f"read_csv('{file}', types={types(table)})"),
    "polars.csv": lambda file, _: pl.read_csv(file, infer_schema_length=None).to_dicts(),
    "json.jsonl": lambda file, _: [json.loads(line) for line in file.read_text("ascii").splitlines()],
    "pandas.jsonl": lambda file, _: pd.read_json(file, lines=True, precise_float=True).to_dict("records"),
    "duckdb.jsonl": lambda file, table: by_duckdb(f"read_json('{file}', columns={types(table)})"),
    "polars.jsonl": lambda file, _: pl.read_ndjson(file, infer_schema_length=None).to_dicts(),
}


def by_duckdb(source: str) -> Rows:
    with duckdb.connect() as database:
        database.sql("set timezone='UTC'")
        rows: Rows = database.sql(f"from {source}").df().to_dict("records")
        return rows


def types(table: str) -> dict[str, str]:
    """Return the types of a table's columns: by itself, duckdb takes a number above 2**63 for a DOUBLE."""
    kinds = {"uint64": "UBIGINT", "timestamp[us, tz=UTC]": "TIMESTAMPTZ"}
    schema = arrow.schema(PARTS[table])
    shown = {f.name: "VARCHAR" if pa.types.is_dictionary(f.type) else kinds.get(str(f.type), "BIGINT") for f in schema}
    return {n: "DOUBLE" if n in PLACEHOLDERS else kind for n, kind in shown.items()}


@pytest.mark.quick(14)
@pytest.mark.parametrize("table", [*PARTS])
@pytest.mark.parametrize("reader", [*READ])
def test_other_programs_read_back_what_the_parquet_files_have(
    files: Callable[[str, str], tuple[Path, Path]], reader: str, table: str
) -> None:
    file, capture = files(table, reader.split(".")[1])
    assert_same(READ[reader](file, table), parquet(capture, table))


@pytest.mark.quick(1)
@pytest.mark.parametrize("table", ["verdicts", "summary"])
def test_computed_tables_are_the_frames(capture: Path, tmp_path: Path, table: str) -> None:
    trace = cwndtrace.load(capture)
    frame = trace.summary() if table == "summary" else trace.verdicts
    file = exported(capture, table, tmp_path / "a.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [*found[0]] == [*frame.columns]
    assert_same(found, frame.astype(object).where(frame.notna(), None).to_dict("records"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_name_that_ends_in_gz_is_compressed(capture: Path, tmp_path: Path, name: str) -> None:
    plain, packed = exported(capture, "resets", tmp_path / name), exported(capture, "resets", tmp_path / f"{name}.gz")
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert name.encode() not in packed.read_bytes()
    assert packed.stat().st_mode & 0o777 == 0o600


def test_a_dash_is_stdout(capture: Path) -> None:
    done = export(capture, "--csv", "resets=-")
    assert done.stdout.startswith("time,")
    assert done.stdout.count("\n") == 4
    assert done.stderr == "stdout has 3 rows of resets.\n"


def test_an_empty_table_has_its_columns(tmp_path: Path) -> None:
    frames.capture(tmp_path / "a.cwnd")
    assert exported(tmp_path / "a.cwnd", "block_io", tmp_path / "a.csv").read_text().count("\n") == 1
    assert exported(tmp_path / "a.cwnd", "resets", tmp_path / "b.csv").read_text().startswith("time,")
    assert exported(tmp_path / "a.cwnd", "resets", tmp_path / "a.jsonl").read_text() == ""


FORMULAS = (
    "  =1+1",
    "\uff1d1+1",
    "\n=1",
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "'=1",
    '=HYPERLINK("http://a")',
    '",=1+1,"',
    "\t=1",
    "\r=1",
    "a\n=1",
)


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", FORMULAS)
def test_no_cell_of_text_begins_like_a_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    resets = frames.table("cwnd_reset", frames.reset(5, comm=name.encode()[:16], process=name.encode()[:16]))
    workloads = frames.workloads({"image": name, "container_name": name})
    trace = frames.capture(tmp_path / "a.cwnd", resets=resets, workloads=workloads, devices={"7:0": name})
    monkeypatch.setattr(cwndtrace, "load", lambda *_, **__: trace)
    for table in ("resets", "verdicts", "summary", "workloads"):
        file = exported(tmp_path / "a.cwnd", table, tmp_path / f"{table}.csv")
        with file.open(newline="", encoding="utf-8") as opened:
            cells = [cell for row in csv.reader(opened) for cell in row]
        assert any(name[-3:].strip() in cell for cell in cells)
        risky = [c for c in cells if c.lstrip().startswith(tuple("=+-@\uff1d")) and not is_number(c)]
        assert risky == []
        assert all(cell.isprintable() for cell in cells)


def is_number(cell: str) -> bool:
    try:
        return bool(float(cell) or True)
    except ValueError:
        return False


def written(table: pa.Table, form: text.Form) -> str:
    return bytes(text.lines(table, form)).decode()


def test_numbers_are_left_as_they_are() -> None:
    table = pa.table({"a": [-1, 2**62], "b": [-0.1, 1e300], "c": [float("nan"), float("inf")], "d": ["-1", "x"]})
    assert written(table, text.CSV) == f'-1,-0.1,,"\'-1"\n{2**62},1e+300,,"x"\n'
    assert written(table, text.JSON_LINES).splitlines() == [
        '{"a":-1,"b":-0.1,"c":null,"d":"-1"}',
        f'{{"a":{2**62},"b":1e+300,"c":null,"d":"x"}}',
    ]


@given(st.lists(st.tuples(st.text(), st.none() | st.floats(allow_nan=False, allow_infinity=False)), min_size=1))
def test_any_text_and_number_come_back(rows: list[tuple[str, float | None]]) -> None:
    rows = [(t.encode("utf-8", "replace").decode(), n) for t, n in rows]
    table = pa.table(
        {"t": pa.array([t for t, _ in rows], pa.string()), "n": pa.array([n for _, n in rows], pa.float64())}
    )
    found = [json.loads(line) for line in written(table, text.JSON_LINES).split("\n")[:-1]]
    assert [(row["t"], row["n"]) for row in found] == rows
    cells = [*csv.reader(written(table, text.CSV).splitlines(keepends=True))]
    if all("\0" not in t and "\r" not in t for t, _ in rows):
        plain = [t.removeprefix("'") if t.startswith("'") else t for t, _ in cells]
        assert plain == [t for t, _ in rows]
    assert not [t for t, _ in cells if t.lstrip(" ").startswith(text.FORMULA[:-1])]


@pytest.mark.slow
def test_block_requests_go_out_in_bounded_memory(tmp_path: Path) -> None:
    """Three times the rows take no more memory, which is that of one part."""
    peaks = []
    for parts in (2, 6):
        rows = np.zeros(30_000, dtype=layout.event("block_io").dtype)
        rows["start_ns"] = frames.MONO + np.arange(len(rows)) * 1000
        rows["done_ns"] = rows["start_ns"] + 5000
        where = tmp_path / f"{parts}.cwnd"
        frames.capture(where, block_io=arrow.to_arrow("block_io", rows, frames.OFFSET))
        first = next((where / "block_io").glob("part-*.parquet"))
        for n in range(2, parts + 1):
            first.with_name(f"part-{n:06}.parquet").write_bytes(first.read_bytes())
        trace = cwndtrace.load(where)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        with (tmp_path / "a.csv").open("wb") as file:
            assert text.write(file, trace, "block_io", text.CSV) == parts * len(rows)
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A symbolic link to itself."""
    link = tmp_path_factory.mktemp("link") / "loop"
    link.symlink_to("loop")
    return link


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "there is nothing to write"),
        (("--csv", "resets"), 2, "names no file"),
        (("--csv", "foo=a.csv"), 2, "there is no table 'foo'"),
        (("--csv", "resets=a.csv", "--jsonl", "summary=a.csv"), 2, "Two outputs would go to one file"),
        (("--csv", "resets=-", "--csv", "summary=-"), 2, "Two outputs would go to one file"),
        (("--csv", "resets={capture}/meta.json"), 2, "is in the capture itself"),
        (("--csv", "resets=none/a.csv"), 1, "can't be written: No such file or directory"),
        (("--annotate", "a.pcap"), 2, "--annotate and -o need each other"),
        (("-o", "a.pcap", "--csv", "resets=-"), 2, "--annotate and -o need each other"),
        (("--annotate", "none.pcap", "-o", "b.pcapng"), 1, "none.pcap can't be read: No such file or directory"),
        (("--annotate", "/dev/null", "-o", "b.pcapng"), 1, "isn't a regular file"),
        (("--annotate", "/proc/self/mem", "-o", "b.pcapng"), 1, "/proc/self/mem can't be read: Input/output error"),
        (("--annotate", "/proc/self/stat", "-o", "b" * 300), 1, "can't be read: at byte 0"),
        (("--csv", f"resets={'b' * 300}"), 1, "can't be written: File name too long"),
        (("--csv", "resets={loop}"), 1, "can't be written: Too many levels of symbolic links"),
    ],
)
def test_what_makes_no_sense_is_refused(
    capture: Path,
    loop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in capture.rglob("*") if file.is_file()}
    done = export(capture, *(a.format(capture=capture, loop=loop) for a in arguments))
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert before == {file: file.read_bytes() for file in capture.rglob("*") if file.is_file()}


@pytest.mark.parametrize("option", ["--perfetto", "-o"])
@pytest.mark.parametrize("named", [False, True])
def test_bytes_from_outside_never_reach_a_terminal(
    capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, named: bool
) -> None:
    packets = tmp_path / "in.pcapng"
    packets.write_bytes(packet_files.section() + packet_files.interface())
    more = ("--annotate", str(packets)) if option == "-o" else ()
    group = main.make_context("cwndtrace", [], resilient_parsing=True)
    reader, terminal = os.openpty()
    try:
        arguments = [str(capture), *more, option, os.ttyname(terminal) if named else "-"]
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(open(terminal, "wb", closefd=False)))  # noqa: SIM115
        with pytest.raises(UsageError, match="would go to a terminal"):
            # Click keeps the option for help of a command, and without the group it would lack -h for all later tests.
            command.export.main(arguments, standalone_mode=False, parent=group)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        os.close(reader)
        os.close(terminal)
