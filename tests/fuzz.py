# SPDX-License-Identifier: Apache-2.0
"""A fuzzer of captures: opening a damaged capture may only raise CaptureError or return the readable rows.

``python -m tests.fuzz`` mutates more than 20,000 files and reads each capture, in processes that it starts, so that it
notices crashes too. It prints the outcomes, and how much memory and time the captures took. Case N is the same in each
run: ``--first N --count 1 --keep FOLDER`` keeps its capture.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import cwndtrace
from cwndtrace import store
from cwndtrace.cli.report import lines
from cwndtrace.errors import CaptureError
from cwndtrace.export import perfetto, text
from cwndtrace.records import arrow, layout
from cwndtrace.report import content
from cwndtrace.report.page import page
from cwndtrace.store import raw
from cwndtrace.store.dump import Moments, clock_column, dump
from cwndtrace.store.layout import raw_name
from tests.harness.replay import Replay
from tests.unit import frames

ROOT: Final = Path(__file__).resolve().parents[1]
SAMPLE: Final = ROOT / "tests/data/sample.cwnd"
RAW: Final = ROOT / "tests/data/trace.raw"
BATCH: Final = 200
MUTATED_PARTS: Final = {"parquet": 8, "plain parquet": 8, "values": 4}
"""The number of parts, of nine, that are mutated in one capture, by kind of case; other kinds mutate one file."""
SECONDS: Final = 10
"""The limit of CPU time of a case."""
PEAK: Final = 1 << 30
"""The limit of memory of a case, in bytes, in addition to the memory of its process at the start."""
MEMORY: Final = 3 << 30
"""The limit of address space of a process, in bytes, in addition to that at its start. It protects the machine."""

Files = dict[str, bytes]

TEXTS: Final = (
    "", "\0", "\x1b]0;x\x07\x1b[31m", "\u202egnp.exe", "<script>alert(1)</script>", "{{7*7}}", "%s%n%x", "{0}{a.b}",
    "$x^{", "\\frac{$", "=cmd|' /C calc'!A0", "é" * 128, "\U0001f4a9" * 64, "../../etc/passwd", "nan", "A" * 70_000,
    "\u2028\u2066\ufeff",
)  # fmt: skip
NUMBERS: Final = (0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**64 - 1)
ODD: Final[tuple[Any, ...]] = (
    None,
    True,
    0.5,
    float("nan"),
    float("inf"),
    10**40,
    -(10**18),
    [],
    {},
    [[]],
    *TEXTS,
    *NUMBERS,
)


@cache
def base(plain: bool) -> Files:
    """Return the files of a small capture; with ``plain`` no compression and no checksums hide a mutation."""
    files = {"meta.json": (SAMPLE / "meta.json").read_bytes()}
    for table in arrow.TABLES:
        for part in sorted((SAMPLE / table).glob("*.parquet"))[:2]:
            name = str(part.relative_to(SAMPLE))
            files[name] = packed(pq.ParquetFile(part).read()) if plain else part.read_bytes()
    # The sample has no names.
    for table, rows in (("workloads", frames.workloads({}, {"cgroup_id": 2})), ("processes", frames.processes({}))):
        files[f"{table}/part-000001.parquet"] = packed(rows, **({} if plain else {"compression": "zstd"}))
    return files


def packed(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **({"compression": "none"} | options))
    return out.getvalue()


# ---- shapes that ask for too much time or memory ---------------------------------------------------------------------


def compact(value: Any) -> bytes:
    """Return a struct (a dict by field number), list, text or number in Thrift's compact protocol; numbers are i32."""
    if isinstance(value, dict):
        fields, last = b"", 0
        for field, inner in value.items():
            fields += bytes([(field - last) << 4 | thrift_kind(inner)]) + compact(inner)
            last = field
        return fields + b"\0"
    if isinstance(value, list):
        head = bytes([0xF0 | thrift_kind(value[0])]) + varint(len(value))
        return head + b"".join(map(compact, value))
    return varint(len(value)) + value if isinstance(value, bytes) else varint(value << 1)


def thrift_kind(value: Any) -> int:
    return {dict: 12, list: 9, bytes: 8, int: 5}[type(value)]


def varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def shared_pages(columns: int, groups: int, pages: int, *, shared: bool = True) -> bytes:
    """Return a part whose columns consist of empty pages; if ``shared``, all columns share one run of pages."""
    header = compact({1: 0, 2: 0, 3: 0, 5: {1: 0, 2: 0, 3: 3, 4: 3}})
    run = len(header) * pages
    schema: list[Any] = [{4: b"schema", 5: columns}, *({1: 1, 3: 0, 4: b"c%d" % n} for n in range(columns))]
    places = iter(range(4, 1 << 31, run if not shared else 1 << 31))
    first = 4

    def chunk(column: int) -> dict[int, Any]:
        at = first if shared else next(places)
        return {2: 4, 3: {1: 1, 2: [0], 3: [b"c%d" % column], 4: 0, 5: 1, 6: run, 7: run, 9: at}}

    rows = [{1: [chunk(n) for n in range(columns)], 2: run, 3: 1} for _ in range(groups)]
    footer = compact({1: 1, 2: schema, 3: groups, 4: rows})
    body = header * (pages if shared else pages * columns * groups)
    return b"PAR1" + body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def equal_rows(count: int) -> bytes:
    """Return a part with equal rows, which takes a few bytes per column."""
    column = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["x" * 100])
    columns = {f.name: column if pa.types.is_dictionary(f.type) else None for f in arrow.schema("cwnd_reset")}
    numbers = {
        f.name: pa.array(np.ones(count, np.int64)).cast(f.type)
        for f in arrow.schema("cwnd_reset")
        if columns[f.name] is None
    }
    return packed(pa.table({name: numbers.get(name, column) for name in columns}), compression="zstd")


PART: Final = "cwnd_reset/part-000001.parquet"
SHAPES: Final[dict[str, Callable[[], tuple[str, bytes]]]] = {
    "shared pages": lambda: (PART, shared_pages(200, 200, 150_000)),
    "very many pages": lambda: (PART, shared_pages(20, 2, 10_000, shared=False)),
    "equal rows": lambda: (PART, equal_rows(5_000_000)),
    "as many equal rows as a part may have": lambda: (PART, equal_rows(1 << 20)),
    "metadata of nothing": lambda: ("meta.json", b'{"schema": 1, "a": [' + b"{}," * (20 << 20) + b"{}]}"),
    "as much metadata as may be": lambda: ("meta.json", b'{"schema": 1, "a": [' + b"{}," * 490_000 + b"{}]}"),
    "deep metadata": lambda: ("meta.json", b'{"schema": 1, "a": ' + b"[" * 900 + b"]" * 900 + b"}"),
}
"""The first cases: each is undamaged, but asks for much more time or memory than its size justifies."""


def shape(number: int) -> tuple[str, Files]:
    """Return the capture of one of ``SHAPES``, by number."""
    name, make = list(SHAPES.items())[number]
    where, raw = make()
    return name, {**base(True), where: raw}


# ---- mutations -------------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, raw: bytes, other: bytes = b"") -> bytes:
    """Return ``raw`` with a few changes, many of them in Parquet's footer."""
    data = bytearray(raw)
    footer = int.from_bytes(data[-8:-4], "little") if raw[-4:] == b"PAR1" else 0
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not data:
            break
        where = rng.random()
        if where < 0.5 and 0 < footer < len(data):
            at = len(data) - 8 - rng.randrange(footer)
        elif where < 0.6:
            at = len(data) - 1 - rng.randrange(min(12, len(data)))
        else:
            at = rng.randrange(len(data))
        at = max(0, at)
        kind = rng.randrange(9)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:
            data[at : at + 4] = rng.choice(NUMBERS).to_bytes(9, "little", signed=True)[:4]
        elif kind == 4:
            data[at:at] = b"\xff" * rng.randrange(1, 6) + bytes([rng.randrange(16)])
        elif kind == 5:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 6:
            length = rng.randrange(1, 64)
            data[at : at + length] = bytes(length)
        elif kind == 7 and other:
            start = rng.randrange(len(other))
            data[at : at + 32] = other[start : start + 32]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def mutate_json(rng: random.Random, raw: bytes) -> bytes:
    """Return meta.json with some values removed, or replaced by values of any type."""
    top = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        node, parent, key = top, cast(Any, None), cast(Any, None)
        while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.7):
            parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = parent[key]
        if parent is None or key == "schema":
            continue
        if rng.random() < 0.15:
            del parent[key]
        elif rng.random() < 0.15 and isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent.pop(key)
        else:
            parent[key] = rng.choice(ODD)
    return json.dumps(top).encode()


def mutate_table(rng: random.Random, raw: bytes) -> bytes:
    """Return an undamaged Parquet file with values that no kernel gives."""
    table = pq.ParquetFile(io.BytesIO(raw)).read()
    for _ in range(rng.choice((1, 1, 2, 4))):
        index = rng.randrange(table.num_columns)
        field, kind = table.schema.field(index), rng.randrange(8)
        count = len(table)
        if kind == 0:
            table = table.remove_column(index) if table.num_columns > 1 else table
        elif kind == 1:
            table = table.set_column(index, field.name, pa.array([rng.choice(TEXTS) for _ in range(count)]))
        elif kind == 2:
            table = table.set_column(index, field.name, pa.array([rng.choice((0.5, None, float("nan")))] * count))
        elif kind == 3:
            table = table.append_column(rng.choice(TEXTS[:8]), pa.array([rng.choice(NUMBERS[:7])] * count))
        elif kind == 4:
            table = table.slice(0, rng.choice((0, 1)))
        elif kind == 5:
            order = [rng.randrange(count) for _ in range(count * 2)] if count else []
            table = table.take(pa.array(order, type=pa.int64()))
        else:
            try:
                values = table.column(index).to_pylist()
            except OverflowError:  # an earlier change made a time too large for Python
                continue
            texts = pa.types.is_dictionary(field.type)
            for row in range(len(values)):
                if rng.random() < 0.5:
                    values[row] = rng.choice(TEXTS if texts else NUMBERS) if rng.random() < 0.9 else None
            try:
                column = pa.array(values, type=pa.string() if texts else field.type)
            except (pa.ArrowInvalid, OverflowError, TypeError):
                continue
            table = table.set_column(index, field.name, column)
    return packed(table, compression=rng.choice(("none", "zstd", "snappy")))


RAW_TABLES: Final = ("cwnd_reset", "block_io", "cwnd_recovery", "cwnd_sample")


@cache
def raw_part(table: str) -> bytes:
    """Return a raw part with three frames of records of the recording."""
    found = [records for name, records in Replay(RAW).stop() if name == table]
    size = layout.event(table).size
    records = (b"".join(found) or bytes(5 * size))[: 12 * size]
    third = len(records) // size // 3 * size
    return raw.header(table) + b"".join(
        raw_frame(offset_ns, records[begin : begin + third], size)
        for offset_ns, begin in ((0, 0), (frames.OFFSET, third), (5, 2 * third))
    )


def raw_frame(offset_ns: int, records: bytes, size: int) -> bytes:
    head = struct.pack("<qII", offset_ns, len(records) // size, zlib.crc32(records))
    return head + zlib.crc32(head).to_bytes(4, "little") + records


def mutate_raw(rng: random.Random, content: bytes) -> bytes:
    """Return a damaged raw part, or one with any values under right checksums."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, content)
    table = content.split(b"\n", 2)[1].decode()
    size, head = layout.event(table).size, raw.header(table)
    records = mutate_bytes(rng, content[len(head) + 20 :])
    whole = records[: len(records) // size * size]
    offset_ns = rng.choice((0, frames.OFFSET, -(1 << 63), (1 << 63) - 1))
    return head + raw_frame(offset_ns, whole, size) + content[len(head) :]


def case(number: int) -> tuple[str, Files]:
    """Return the kind and the files of a case, always the same for a number."""
    if number < len(SHAPES):
        return shape(number)
    rng = random.Random(number)
    kinds = "raw parts", "meta bytes", "meta values", "values", "raw", "shape"
    kind = rng.choice((*["parquet"] * 2, *["plain parquet"] * 3, *kinds))

    files = dict(base(kind != "parquet"))
    tables = [name for name in files if name.endswith(".parquet")]
    if kind == "raw":
        return kind, {"trace.raw": mutate_bytes(rng, RAW.read_bytes()[: rng.choice((400, 4000, 40_000))])}
    if kind == "shape":
        files[PART] = mutate_bytes(
            rng, shared_pages(rng.choice((1, 8)), rng.choice((1, 8)), 40, shared=rng.random() < 0.5)
        )
    elif kind == "raw parts":
        for table, number in zip(RAW_TABLES, (1, 9, 9, 9), strict=True):  # the first has a Parquet part beside it too
            files[f"{table}/{raw_name(number)}"] = mutate_raw(rng, raw_part(table))
    elif kind.startswith("meta"):
        mutate: Callable[[random.Random, bytes], bytes] = mutate_json if kind == "meta values" else mutate_bytes
        files["meta.json"] = mutate(rng, files["meta.json"])
    else:
        # Several parts are mutated, because each is read separately.
        for name in rng.sample(tables, MUTATED_PARTS[kind]):
            if kind == "values":
                files[name] = mutate_table(rng, files[name])
            else:
                files[name] = mutate_bytes(rng, files[name], files[rng.choice(tables)])
    return kind, files


def lay(files: Files, folder: Path) -> Path:
    """Write the files into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


TABLES, FRAMES, ALL, PAGE = range(4)
"""The levels of use of a case. The first meets damaged bytes, the others meet nonsensical values."""


def effort(number: int, kind: str, draw_every: int) -> int:
    """Return the level of use of a case."""
    if number < len(SHAPES):
        return TABLES if "rows" in kind else ALL
    if draw_every > 0 and number % draw_every == 0:
        return PAGE
    if "values" in kind or number % 20 == 0:
        return ALL
    return FRAMES if number % 5 == 0 else TABLES


def use(folder: Path, much: int) -> None:
    """Read the capture in ``folder``, and use it as a user can, up to level ``much``. Raises only CaptureError."""
    if (folder / "trace.raw").exists():
        source = Replay(folder / "trace.raw")
        for name, data in source.stop():
            table = arrow.to_arrow(name, layout.decode(name, data), 0)
            json.dumps(arrow.table_to_dicts(name, table))
        return
    capture = store.open_capture(folder)
    for table in arrow.TABLES:
        assert capture.table(table).num_rows <= capture.rows(table)
    if much == TABLES:
        return
    dumped(capture)
    trace = cwndtrace.load(folder)
    for frame in (trace.resets, trace.connections, trace.block_io, trace.samples, trace.recoveries):
        assert len(frame) >= 0
    repr(trace)
    if much == FRAMES:
        return
    trace._repr_html_()
    for frame in (trace.verdicts, trace.block_summary(), trace.compare(trace)):
        repr(frame)
    report = content.report(trace)
    list(lines(report))
    json.dumps(content.as_json(report), allow_nan=False)
    for key in trace.summary()["connection"].head(2):
        repr(trace.connection(key))
        trace.connection(key)._repr_html_()
    for table in text.TABLES:
        text.write(io.BytesIO(), trace, table, text.CSV)
        text.write(io.BytesIO(), trace, table, text.JSON_LINES)
    perfetto.write(trace, io.BytesIO())
    if much == PAGE:
        page(report)


def dumped(capture: store.Capture) -> None:
    """Dump the second half of a capture; what comes out of that can be read to its end."""
    opened = [pc.min_max(capture.table(table)[clock_column(table)]) for table in ("cwnd_reset", "block_io")]
    known = [(each["min"].as_py(), each["max"].as_py()) for each in opened if each["min"].is_valid]
    least, most = min((low for low, _ in known), default=0), max((high for _, high in known), default=2)
    output = capture.path.with_name(f"{capture.path.name}-dump.cwnd")
    try:
        made = dump(capture, output, Moments((least + most) // 2, most + 1))
        again = store.open_capture(output)
        for table in arrow.TABLES:
            assert again.table(table).num_rows <= made.rows[table]
    finally:
        shutil.rmtree(output, ignore_errors=True)


def peak_kb() -> int:
    """Return the peak memory of this process in KiB, since its last reset by /proc/self/clear_refs."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])


class Greedy(Exception):
    """A case took more memory than ``PEAK``."""


@dataclass
class Spent:
    """The cost of a case: seconds of CPU time, and memory in addition to that of its process before."""

    s: float = 0.0
    peak_kb: int = 0


def bound_process() -> None:
    """Limit the address space of this process, so that no case exhausts the machine's memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


@contextmanager
def bounded() -> Iterator[Spent]:
    """Apply the limits to a case and yield its cost. Raises TimeoutError within a slow case, Greedy at a case's end."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory
    spent, begun, begin = Spent(), peak_kb(), time.process_time()
    # The limit is of CPU time, so that a busy machine gives the same outcome.
    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield spent
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        spent.s, spent.peak_kb = time.process_time() - begin, peak_kb() - begun
        if spent.s > SECONDS:
            too_long()  # again: TimeoutError is an OSError, which readers take for an error of the file
        if spent.peak_kb * 1024 > PEAK:
            raise Greedy(f"took {spent.peak_kb >> 10:,} MiB")


def run(first: int, count: int, folder: Path, draw_every: int) -> None:
    """Run cases, and print two lines of JSON for each: the case and its outcome."""
    faulthandler.enable()
    bound_process()
    for number in range(first, first + count):
        kind, files = case(number)
        lay(files, folder)
        print(json.dumps({"case": number, "kind": kind}), flush=True)
        outcome, why, spent = "opened", "", Spent()
        try:
            with bounded() as spent:
                use(folder, effort(number, kind, draw_every))
        except CaptureError as e:
            outcome = "makes no sense" if "make no sense" in e.cause else "refused"
            why = e.cause
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)
            ours = [f for f in last if "cwndtrace" in f.filename and "site-packages" not in f.filename]
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
            outcome, why = "FAILED", f"{type(e).__name__} at {place}: {str(e)[:200]}"
        line = {"outcome": outcome, "why": why, "s": spent.s, "peak_kb": spent.peak_kb}
        print(json.dumps(line), flush=True)


@dataclass
class Results:
    """The results of many cases: outcomes by kind, failures as text, and the places where rows made no sense."""

    outcomes: Counter[str] = field(default_factory=Counter)
    nonsense: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    peak_kb: int = 0
    """The highest peak memory of a case, in KiB, in addition to that of its process before."""

    @property
    def files(self) -> int:
        """The number of files that were mutated."""
        return sum(number * MUTATED_PARTS.get(name.partition(":")[0], 1) for name, number in self.outcomes.items())

    def add(self, case: dict[str, Any], line: dict[str, Any]) -> None:
        """Count the outcome of a case."""
        self.outcomes[f"{case['kind']}: {line['outcome']}"] += 1
        self.longest_s, self.peak_kb = max(self.longest_s, line["s"]), max(self.peak_kb, line["peak_kb"])
        if line["outcome"] == "makes no sense":
            self.nonsense[line["why"].rpartition(": ")[2]] += 1
        elif line["outcome"] == "FAILED":
            self.failures.append(f"case {case['case']} ({case['kind']}): {line['why']}")


def batches(first: int, count: int, draw_every: int, keep: Path | None = None, into: Results | None = None) -> Results:
    """Run cases in child processes, ``BATCH`` cases in each."""
    results, number = Results() if into is None else into, first
    with tempfile.TemporaryDirectory(prefix="cwndtrace-fuzz-") as temporary:
        folder = keep or Path(temporary) / "case"
        while number < first + count:
            some = min(BATCH, first + count - number)
            command = [sys.executable, "-m", "tests.fuzz", "--child", "--first", str(number), "--count", str(some)]
            command += ["--keep", str(folder), "--draw-every", str(draw_every)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            case_now: dict[str, Any] = {"case": number, "kind": "start"}
            for line in map(json.loads, done.stdout.splitlines()):
                if "case" in line:
                    case_now = line
                else:
                    results.add(case_now, line)
                    number = case_now["case"] + 1
            if done.returncode:
                results.outcomes[f"{case_now['kind']}: CRASHED"] += 1
                which = f"case {case_now['case']} ({case_now['kind']})"
                results.failures.append(f"{which} ended with {done.returncode}: {done.stderr[-1500:]}")
                number = case_now["case"] + 1
    return results


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument(
        "--count", type=int, default=4_000, help="number of captures; half of them have eight mutated files"
    )
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--draw-every", type=int, default=100, help="draw the HTML page of each Nth case")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run(options.first, options.count, options.keep, options.draw_every)
        return
    begin = time.monotonic()
    results, finished = Results(), False
    # On SIGTERM it prints the results so far.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        batches(options.first, options.count, options.draw_every, options.keep, results)
        finished = True
    for counts in (results.outcomes, results.nonsense):
        for name, number in sorted(counts.items()):
            print(f"{number:>7,}  {name}")
    for line in results.failures[:200]:
        print(line)
    print(
        f"{results.files:,} mutated files in {results.outcomes.total():,} captures, {time.monotonic() - begin:.0f} s, "
        f"{len(results.failures)} failures; the longest capture took {results.longest_s:.2f} s, "
        f"the most memory was {results.peak_kb / 1024:.0f} MiB above the start"
    )
    sys.exit(bool(results.failures) or not finished)


if __name__ == "__main__":
    main()
