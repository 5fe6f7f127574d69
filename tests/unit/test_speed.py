# SPDX-License-Identifier: Apache-2.0
"""Properties that make tracing fast are tested by counting calls and imports; benchmarks/ measures time."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from cwndtrace import cli
from cwndtrace.capture import program_cache
from cwndtrace.capture.program_cache import Image, Map
from cwndtrace.capture.session import Batch
from cwndtrace.cli.live import BlockFigures
from cwndtrace.kernel import ladder, sockets
from cwndtrace.records import arrow, layout
from cwndtrace.store import CaptureWriter, open_capture
from tests.harness.loopback import need_loopback

ROOT = Path(__file__).parents[2]


def calls(work: Callable[[], object]) -> int:
    """Return how many calls of Python functions ``work`` makes."""
    number = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal number
        number += event == "call"

    # A collection of garbage from other tests would add its own calls.
    gc.collect()
    gc.disable()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return number


def requests(number: int) -> bytes:
    records = np.zeros(number, dtype=layout.event("block_io").dtype)
    records["start_ns"] = np.arange(number) * 1000
    records["done_ns"] = records["start_ns"] + 500
    records["sector"], records["tgid"], records["comm"] = np.arange(number) * 7919 % 65521, 7, b"fio"
    return records.tobytes()


def test_no_python_function_runs_for_each_event(tmp_path: Path) -> None:
    places = (tmp_path / f"{number}.cwnd" for number in count())

    def through(number: int) -> int:
        raw, figures = requests(number), BlockFigures()
        capture_writer = CaptureWriter.create(next(places), {})

        def work() -> None:
            rows = arrow.TimedRecords("block_io", raw, np.zeros(number, np.int64))
            figures.add(Batch("block_io", rows))
            figures.count()
            capture_writer.add("block_io", rows)
            capture_writer.flush(force=True)

        number_of_calls = calls(work)
        capture_writer.close()
        return number_of_calls

    through(64)  # imports and fills caches
    assert through(16_384) == through(64_000 + 1) == through(128_000)


def test_records_become_arrow_once_for_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[int] = []
    real = arrow.to_arrow

    def to_arrow(name: str, records: layout.Records, utc_offset_ns: np.ndarray) -> object:
        conversions.append(len(records))
        return real(name, records, utc_offset_ns)

    monkeypatch.setattr(arrow, "to_arrow", to_arrow)
    writer = CaptureWriter.create(tmp_path / "a.cwnd", {}, flush_seconds=0)
    before = layout.decode("block_io", requests(3))
    writer.add("block_io", real("block_io", before, 5_000))
    for number in (4, 1, 20):
        batch = Batch("block_io", arrow.TimedRecords("block_io", requests(number), np.full(number, number * 1000)))
        writer.add(batch.event, batch.rows)
    writer.flush()
    assert conversions == [25]
    (part,) = (tmp_path / "a.cwnd" / "block_io").iterdir()
    assert pq.read_metadata(part).row_group(0).column(0).compression == "UNCOMPRESSED"
    writer.add("block_io", batch.rows)
    writer.close()
    assert conversions == [25, 20]
    assert pq.read_metadata(part).row_group(0).column(0).compression == "ZSTD"
    table = open_capture(tmp_path / "a.cwnd").table("block_io")
    offsets = np.repeat([5, 4, 1, 20, 20], [3, 4, 1, 20, 20])
    assert table["time"].cast("int64").to_pylist() == (table["start_ns"].to_numpy() // 1000 + offsets).tolist()
    assert batch.table is batch.table
    with pytest.raises(ValueError, match="don't belong in table cwnd_reset"):
        writer.add("cwnd_reset", batch.rows)


def test_block_figures_equal_those_of_each_request() -> None:
    records = layout.decode("block_io", requests(300)).copy()
    records["dev"], records["op"] = np.arange(300) % 2 + (7 << 20), np.arange(300) // 2 % 2
    records["error"], records["bytes"] = np.arange(300) == 3, 512
    figures = BlockFigures()
    for some in np.split(records, [1, 50]):
        figures.add(Batch("block_io", arrow.TimedRecords("block_io", some.tobytes(), np.zeros(len(some), np.int64))))
    figures.count()
    pairs = {(f"7:{minor}", op) for minor in (0, 1) for op in ("read", "write")}
    assert figures.bytes == dict.fromkeys(pairs, 75 * 512)
    assert figures.errors == dict.fromkeys(pairs, 0) | {("7:1", "write"): 1}
    assert {pair: latency.count for pair, latency in figures.latency.items()} == dict.fromkeys(pairs, 75)
    assert (figures.all().count, figures.all().max_us) == (300, 0.5)


def test_reading_a_part_runs_no_python_function_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cwndtrace
    from cwndtrace.analysis import threads

    monkeypatch.setattr(threads, "roomy", lambda _size: False)  # only the calls of this thread are counted
    places = (tmp_path / f"{number}.cwnd" for number in count())

    def read(number: int) -> int:
        path = next(places)
        writer = CaptureWriter.create(path, {})
        writer.add("block_io", arrow.to_arrow("block_io", layout.decode("block_io", requests(number)), 0))
        writer.close()
        trace = cwndtrace.load(path)
        return calls(lambda: trace.block_columns("latency_us", "device"))

    read(64)
    # Python reads each page's header, and a page has all rows of a column. It would be 4,400 with pages of 20,000 rows.
    assert read(100_000) - read(64) < 1000


def test_only_the_columns_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cwndtrace

    asked: list[set[str]] = []
    real = pq.ParquetFile.read

    def read(self: pq.ParquetFile, columns: list[str], **options: Any) -> object:
        asked.append(set(columns))
        return real(self, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", read)
    writer = CaptureWriter.create(tmp_path / "a.cwnd", {})
    writer.add("block_io", arrow.to_arrow("block_io", layout.decode("block_io", requests(100)), 0))
    writer.close()
    frame = cwndtrace.load(tmp_path / "a.cwnd").block_columns("device", "latency_us")
    assert list(frame) == ["device", "latency_us"]
    assert asked == [{"start_ns", "done_ns", "dev"}]
    assert set(frame["latency_us"]) == {0.5}


def test_times_are_stored_as_differences(tmp_path: Path) -> None:
    writer = CaptureWriter.create(tmp_path / "a.cwnd", {})
    writer.add("block_io", arrow.to_arrow("block_io", layout.decode("block_io", requests(10_000)), 0))
    writer.close()
    (part,) = (tmp_path / "a.cwnd" / "block_io").iterdir()
    group = pq.read_metadata(part).row_group(0)
    encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
    for name in ("time", "start_ns", "issue_ns", "done_ns"):
        assert "DELTA_BINARY_PACKED" in encodings[name]
    assert not {"RLE_DICTIONARY", "PLAIN_DICTIONARY"} & set(encodings["sector"])
    assert open_capture(tmp_path / "a.cwnd").rows("block_io") == 10_000


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import cwndtrace.cli", "numpy pandas pyarrow pyroute2 matplotlib jinja2 bcc multiprocessing"),
        (
            "import cwndtrace.cli.run",
            "pandas pyarrow matplotlib jinja2 bcc prometheus_client opentelemetry requests http.server",
        ),
        (
            "from cwndtrace.capture.privsep import Helper; from cwndtrace.capture.source import Filters; "
            "helper = Helper(Filters()); helper.snapshot(); helper.settings(); helper.names([], [1])",
            "pandas pyarrow",
        ),
    ],
)
def test_starting_a_command_imports_no_heavy_library(code: str, heavy: str) -> None:
    code = f"import sys; {code}; print(sorted(set({heavy!r}.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


A_TRACE: Final = """
import os, socket, sys, numpy, pyarrow
from cwndtrace.records import arrow, layout
from cwndtrace.capture import connections
from cwndtrace.capture.names import ids
from cwndtrace.capture.privsep import Helper
from cwndtrace.capture.session import Batch
from cwndtrace.capture.source import Filters
from cwndtrace.cli.live import BlockFigures
from cwndtrace.store import CaptureWriter

listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
helper = Helper(Filters(port=listener.getsockname()[1], family=2, pid=os.getpid()))
writer, figures = CaptureWriter.create(sys.argv[1], {}), BlockFigures()
writer.add("connections", connections.table(helper.snapshot()[0], 0))
for name in ("cwnd_reset", "block_io"):
    records = numpy.zeros(300, layout.event(name).dtype).tobytes()
    batch = Batch(name, arrow.TimedRecords(name, records, numpy.zeros(300, numpy.int64)))
    writer.add(name, batch.rows)
    ids(batch.rows)
    if name == "cwnd_reset":
        batch.to_dicts()
    else:
        figures.add(batch)
        figures.count()
writer.close()
print(writer.capture().rows("connections"), *{"pandas", "numpy.ma"} & set(sys.modules))
"""


def test_a_trace_does_not_import_heavy_modules_before_its_summary(tmp_path: Path) -> None:
    """pyarrow imports pandas, which takes 0.1 s and 40 MB, when it converts untyped sequences or makes numpy arrays.

    numpy's unique() imports numpy.ma, which takes 2 MB.
    """
    need_loopback()
    command = [sys.executable, "-c", A_TRACE, str(tmp_path / "a.cwnd")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_the_list_of_commands_agrees_with_their_modules() -> None:
    listed = CliRunner().invoke(cli.main, ["--help"]).output
    for name, (_, text) in cli.COMMANDS.items():
        command = cli.main.get_command(cli.main.make_context("cwndtrace", [], resilient_parsing=True), name)
        assert command is not None
        assert command.name == name
        assert f"  {name} " in listed
        assert text in listed


def body(function: str, files: str = "*.[ch]") -> str:
    source = "".join(file.read_text(encoding="utf-8") for file in sorted(layout.bpf_dir().glob(files)))
    return re.split(rf"\w+ \*?{function}\(.*\)\n", source)[1].partition("\n}\n")[0]


def test_code_that_runs_for_every_packet_loads_members_without_calls() -> None:
    for function in ("idle_for_rto", "ends_flight", "holds", "update_record", "load_chrono", "add_waiting", "on_ack"):
        assert "LOAD(" in body(function)
        assert "READ(" not in body(function)
    for function, until in (
        ("find_followed", "followed.lookup"),
        ("on_write", "bpf_ktime_get_ns"),
        ("on_wrote", "if (!f)"),
        ("on_tcp_sendmsg_locked", "idle_for_rto(tp)"),
        ("on_tcp_probe", "idle_for_rto(tp)"),
        ("on_tcp_probe_ack", "ends_flight("),
        ("on_net_dev_queue_first", "windows.lookup"),
    ):
        before, separator, _ = body(function).partition(until)
        assert separator
        assert "READ(" not in before
        assert "argument(" not in before
    groups = [ladder.WRITES, *(group for probe in ladder.PROBES for group in probe.attachments.values())]
    kinds = {a.program: a.kind for group in groups for a in group}
    loading = ["sendmsg_locked", "probe", "probe_ack", "probe_follow"]
    programs = [f"on_tcp_{name}" for name in loading] + ["on_net_dev_queue_first", "on_write_follow", "on_wrote_follow"]
    assert {kinds[program] for program in programs} == {"tp_btf"}


def test_a_block_request_is_identified_without_a_call() -> None:
    for function in ("on_block_io_start", "on_block_rq_issue", "on_block_io_done"):
        code = body(function, "block_io.bpf.c")
        assert "key_of(request)" in code
        for call in ("argument(", "READ(", "bpf_get_current_cgroup_id("):
            assert call not in code
    assert "bpf_get_current_cgroup_id(" not in body("find_cgroups")


def test_probe_sendmsg_runs_nothing_for_each_packet() -> None:
    targets = {a.target for group in ladder.BY_NAME["sendmsg"].attachments.values() for a in group}
    assert {"tcp_sendmsg_locked", "tcp_probe"} <= targets
    assert not {"net_dev_queue", "napi_poll", "net_dev_xmit"} & targets


def test_block_io_submits_whole_slabs() -> None:
    source = (layout.bpf_dir() / "block.h").read_text(encoding="utf-8")
    # To the ring, and to the spare one while that is full.
    assert source.count("ringbuf_output(") == body("hand_on").count("ringbuf_output(slab, ") == 2
    assert source.count("hand_on(") == 3
    assert "hand_on(s, size, flags, " in source
    # The other call is for a request that completes while its CPU is submitting a slab.
    assert "hand_on(&one" in re.split(r"\n\tif \(s->busy\) {\n", source)[1].partition("\n\t}\n")[0]
    assert int(source.partition("#define SLAB_RECORDS ")[2].split()[0]) >= 64


def test_holders_are_looked_up_only_for_new_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: list[int] = []

    def lookup() -> dict[int, tuple[int, str]]:
        lookups.append(1)
        return {7: (1, "init")}

    monkeypatch.setattr(sockets, "holders", lookup)
    held = sockets.SocketHolders()
    assert held.of({7, 8, 0})[7] == (1, "init")
    assert held.of({8})[8] == (0, "")
    assert len(lookups) == 1
    held.of({7, 9})
    assert len(lookups) == 2


# ---- the cache of compiled programs ---------------------------------------------------------------

IMAGE = Image({"on_x": bytes(range(64))}, (Map("m", 1, 4, 8, 16, 0), Map("n", 1, 8, 12, 1, 0, (("a", "<u8"),))))


def test_a_cached_program_is_loaded_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    assert program_cache.load("a", folder) is None
    program_cache.keep("a", IMAGE, folder)
    assert program_cache.load("a", folder) == IMAGE
    assert program_cache.load("b", folder) is None
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "damage",
    ["cut", "changed", "folder writable by a group", "file writable by others", "somebody else's", "link", "nonsense"],
)
def test_a_cached_program_that_others_may_have_changed_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = tmp_path / "kept"
    program_cache.keep("a", IMAGE, folder)
    file = folder / "a.json"
    if damage == "cut":
        os.truncate(file, 100)
    elif damage == "changed":
        file.write_bytes(file.read_bytes().replace(b'"m"', b'"o"'))
    elif damage == "folder writable by a group":
        folder.chmod(0o770)
    elif damage == "file writable by others":
        file.chmod(0o602)
    elif damage == "somebody else's":
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
    elif damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_bytes(b"\xff\0")
    assert program_cache.load("a", folder) is None


def test_the_cache_key_depends_on_each_part() -> None:
    names = {
        program_cache.key(b"a", b"bc"),
        program_cache.key(b"ab", b"c"),
        program_cache.key(b"abc"),
        program_cache.key(b"a", b"bd"),
    }
    assert len(names) == 4


def test_a_cache_that_cannot_be_written_stays_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    program_cache.keep("a", IMAGE, tmp_path / "file")
    assert program_cache.load("a", tmp_path / "file") is None


def test_the_cache_has_a_limited_number_of_files(tmp_path: Path) -> None:
    for number in range(program_cache._KEPT + 5):
        program_cache.keep(str(number), IMAGE, tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == program_cache._KEPT
