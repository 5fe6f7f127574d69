# SPDX-License-Identifier: Apache-2.0
"""``export --perfetto`` writes what the capture has: by decoding, and by Perfetto's own trace processor."""

from __future__ import annotations

import gzip
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser

import cwndtrace
from cwndtrace import store
from cwndtrace.analysis.idle_cause import COLUMNS as CAUSE
from cwndtrace.cli import main
from cwndtrace.errors import CaptureError
from cwndtrace.export import packets, perfetto
from cwndtrace.records import arrow, layout
from cwndtrace.records import frames as records
from cwndtrace.trace import Trace
from tests.harness.browser import chromium
from tests.harness.loopback import need_loopback
from tests.harness.perfetto_trace import Decoded, decode
from tests.harness.replay import Replay
from tests.harness.trace_processor import TraceProcessor, served
from tests.record import FILE
from tests.unit import frames, hostile, playing

ROOT = Path(cwndtrace.__file__).parents[1]


def exported(trace: Trace, folder: Path) -> Path:
    file = folder / "a.pftrace"
    with file.open("wb") as opened:
        perfetto.write(trace, opened)
    return file


def decoded(trace: Trace, folder: Path) -> Decoded:
    return decode(exported(trace, folder))


def in_parts(path: Path, *block_io: pa.Table, **tables: pa.Table) -> Trace:
    """Write a capture whose block requests are in parts of their own."""
    writer = store.CaptureWriter.create(path, frames.meta())
    for name, table in tables.items():
        writer.add(name, table)
    for table in block_io:
        writer.add("block_io", table)
        writer.flush(force=True)
    writer.close()
    trace = cwndtrace.load(path)
    assert len(list((path / "block_io").iterdir())) == len(block_io)
    return trace


def parquet(trace: Trace, table: str) -> list[dict[str, Any]]:
    """Return the rows of a table as its Parquet files have them."""
    parts = [pq.read_table(part) for part in sorted((trace.path / table).glob("*.parquet"))]
    return [row for part in parts for row in part.to_pylist()]


def depths(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return each moment at which the number of requests in flight changes, with that number."""
    steps = Counter(row["start_ns"] for row in rows)
    steps.subtract(Counter(row["done_ns"] for row in rows))
    out, depth = [], 0
    for at, step in sorted(steps.items()):
        depth += step
        if step:
            out.append((at, depth))
    return out


# ---- by decoding -------------------------------------------------------------------------------------


def test_each_request_is_a_slice_whatever_part_it_is_in(tmp_path: Path) -> None:
    whole = frames.disk(3000)
    # The parts overlap in time, and no part is in order.
    order = np.random.default_rng(1).permutation(3000)
    order = np.concatenate([order[order < 1600], order[order >= 1400][:1200]])
    order = np.concatenate([order, np.setdiff1d(np.arange(3000), order)])
    _, first = np.unique(order, return_index=True)
    order = order[np.sort(first)]
    shuffled = whole.take(order)
    trace = in_parts(tmp_path / "a.cwnd", *(shuffled.slice(at, 1000) for at in (0, 1000, 2000)))
    found, rows = decoded(trace, tmp_path), parquet(trace, "block_io")
    slices = [e for e in found.on("block device loop0") if e.kind == "SLICE_BEGIN"]
    names = ("bytes", "sector", "issue_ns", "error", "comm", "tgid", "tid")
    assert Counter((e.start_ns, e.end_ns, e.name, *(e.args[n] for n in names)) for e in slices) == Counter(
        (row["start_ns"], row["done_ns"], row["op"], *(row[n] for n in names)) for row in rows
    )
    counted = [(e.start_ns, e.value) for e in found.on("requests in flight")]
    assert counted == depths(rows)


def test_a_request_that_the_send_waited_for_leads_to_it(tmp_path: Path) -> None:
    own = {"tgid": 4242, "tid": 4243}
    blocks = [frames.block(8 + at, 400_000, **own) for at in (0, 0.5, 1.0, 1.5)]
    blocks += [frames.block(9.9, 50_000), frames.block(10.5, 1000, **own)]
    resets = [frames.reset(10, idle_us=2_000_000, last_rcv_us=9_000_000), frames.reset(20, sport=80, sock_cookie=7)]
    trace = frames.capture(
        tmp_path / "a.cwnd", resets=frames.table("cwnd_reset", *resets), block_io=frames.table("block_io", *blocks)
    )
    found = decoded(trace, tmp_path)
    flows = {flow: [e for e in found.events if flow in e.flows] for e in found.events for flow in e.flows}
    ((request, reset),) = (sorted(both, key=lambda e: e.kind == "INSTANT") for both in flows.values())
    assert (request.start_ns, request.kind) == (int(blocks[3]["start_ns"][0]), "SLICE_BEGIN")
    assert (reset.start_ns, reset.kind) == (int(resets[0]["ts_ns"][0]), "INSTANT")
    assert reset.args["cause"] == "disk"


@pytest.mark.slow
def test_idle_causes_from_few_requests_are_those_from_all(tmp_path: Path) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for seed in range(16):
        trace = random_causes(tmp_path / f"{seed}.cwnd", seed)
        batches = (b.assign(row=b["start_ns"].to_numpy()) for b in trace.block_batches(*perfetto._READ))
        few, whole = trace.verdicts_by(batches), trace.verdicts
        pd.testing.assert_frame_equal(few.drop(columns="disk_last"), whole.drop(columns="disk_last"))
        started = [-1 if row < 0 else trace.block_io["start_ns"][row] for row in whole["disk_last"]]
        assert few["disk_last"].tolist() == started
        seen += Counter(zip(whole["cause"], whole["disk_of"], strict=True))
    named = {of for cause, of in seen if cause in ("disk", "probably disk")}
    assert named == {"thread", "process", "journal", "cgroup"}
    assert set(CAUSE) <= set(few.columns)


def random_causes(path: Path, seed: int) -> Trace:
    """Write a capture in which sends waited for block I/O of many kinds, or didn't."""
    rng = np.random.default_rng(seed)
    resets, blocks, at = list[Any](), list[Any](), 1.0
    for _ in range(12):
        at += float(rng.uniform(0.6, 3))
        idle = float(rng.uniform(0.3, 2))
        sender = {"tgid": 10 + int(rng.integers(3)), "cgroup_id": int(rng.integers(1, 4))}
        last = int(rng.choice([idle * 2e6, idle * 5e5, 1000]))
        values = sender | {"idle_us": int(idle * 1e6), "last_rcv_us": last, "rto_us": 204_000}
        resets.append(frames.reset(at, tid=sender["tgid"] * 10, sport=1000 + len(resets) % 3, **values))
        kinds: list[dict[str, Any]] = [
            {"tgid": sender["tgid"], "tid": sender["tgid"] * 10},
            {"tgid": sender["tgid"], "tid": sender["tgid"] * 10 + 1},
            {"tgid": 99, "cgroup_id": sender["cgroup_id"]},
            {"tgid": 7, "comm": b"kworker/1:2", "op": "write", "owner_cgroup_id": sender["cgroup_id"], "cgroup_id": 0},
            {"tgid": 8, "comm": b"jbd2/sda1-8", "op": "write"},
            {"tgid": 98, "tid": 980},
        ]
        whose = kinds[int(rng.integers(6))]
        if whose["tgid"] == 8:
            blocks.append(frames.block(at - idle + 0.001, 300, op="write", tgid=sender["tgid"], tid=1, dev=8 << 20))
        dev = (8 if whose["tgid"] == 8 else int(rng.choice([7, 8]))) << 20
        step = idle / int(rng.integers(1, 9))
        for number in range(int(rng.integers(1, 9))):
            begin = at - idle + number * step + 0.002
            blocks.append(frames.block(begin, float(rng.uniform(0.4, 0.999)) * step * 1e6, dev=dev, **whose))
    return frames.capture(
        path, resets=frames.table("cwnd_reset", *resets), block_io=frames.table("block_io", *blocks),
        devices={"7:0": "loop0", "8:0": "sda"},
    )  # fmt: skip


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", hostile.NAMES)
def test_no_text_has_control_characters(tmp_path: Path, name: str) -> None:
    found = decoded(hostile.named(tmp_path / "a.cwnd", hostile.NAMES[name]), tmp_path)
    assert all(text.isprintable() for text in found.texts)
    assert len(found.on("connections whose resets were lost")) == 0


def test_texts_that_never_repeat_are_forgotten_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packets, "_MOST_TEXTS", 100)
    blocks = [frames.block(at / 100, comm=f"name{at}".encode()) for at in range(500)]
    found = decoded(frames.capture(tmp_path / "a.cwnd", block_io=frames.table("block_io", *blocks)), tmp_path)
    assert found.cleared > 3
    names = [e.args["comm"] for e in found.on("block device loop0") if e.kind == "SLICE_BEGIN"]
    assert names == [f"name{at}" for at in range(500)]


def test_long_texts_are_held_no_longer_than_they_are_written(tmp_path: Path) -> None:
    """A capture may have millions of them."""
    with (tmp_path / "a").open("wb") as file:
        out = packets.Packets(file)
        track = out.track("track")
        for end in range(3):
            out.instant(track, f"{'x' * 10_000_000}{end}", end, {})
        held = [text for texts in out._texts.values() for text in texts]
    assert {event.name for event in decode(tmp_path / "a").events} == {*held}
    assert sum(map(len, held)) == 1000


def test_a_pid_that_another_process_has_later_keeps_the_names_apart(tmp_path: Path) -> None:
    resets = [frames.reset(5, process=b"first"), frames.reset(9, process=b"second", sport=80, sock_cookie=7)]
    found = decoded(frames.capture(tmp_path / "a.cwnd", resets=frames.table("cwnd_reset", *resets)), tmp_path)
    instants = [event for event in found.events if event.kind == "INSTANT"]
    tgid = instants[0].args["tgid"]
    assert [event.track[0] for event in instants] == ["first", f"second[{tgid}]"]


def test_connections_of_one_name_keep_their_own_tracks(tmp_path: Path) -> None:
    resets = frames.table("cwnd_reset", frames.reset(5), frames.reset(5.5, netns_ino=77, sock_cookie=3, skaddr=1))
    found = decoded(frames.capture(tmp_path / "a.cwnd", resets=resets), tmp_path)
    instants = [e for e in found.events if e.kind == "INSTANT"]
    assert len({e.track for e in instants}) == 2
    assert {e.track[:-1] for e in instants} == {("replica", "10.1.0.1:443 > 10.2.0.9:51324")}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    spans = [("cwnd_reset", 5, 9, 3), ("cwnd_reset", 8, 10, 1), ("block_io", 20, 21, 1000)]
    moments = [[frames.MONO + at * frames.SECOND for at in span[1:3]] for span in spans]
    lossy = [
        {"event": event, "start_ns": start, "end_ns": end, "lost": number}
        for (event, *_, number), (start, end) in zip(spans, moments, strict=True)
    ]
    counts = {table: {"kept": 0, "lost": 0} for table in arrow.TABLES} | {"cwnd_reset": {"kept": 0, "lost": 4}}
    trace = frames.capture(
        tmp_path / "a.cwnd", lossy=lossy, counts=counts, filters={"port": 443}, left_out={"sockets": 2},
        lacking=["nothing named x was there"],
    )  # fmt: skip
    found = decoded(trace, tmp_path)
    assert [(e.name, e.start_ns, e.end_ns, e.args["lost"]) for e in found.on("losses")] == [
        ("3 records of cwnd_reset were lost", lossy[0]["start_ns"], lossy[0]["end_ns"], 3),
        ("1 record of cwnd_reset was lost", lossy[1]["start_ns"], lossy[1]["end_ns"], 1),
        ("1,000 records of block_io were lost", lossy[2]["start_ns"], lossy[2]["end_ns"], 1000),
    ]
    said = [e.name for e in found.on("missing or incomplete")]
    for line in ("4 resets were lost", "nothing named x was there", "filtered: only port=443"):
        assert line in said
    assert any("2 requested sockets aren't traced" in line for line in said)
    assert len(said) == len(set(said))


def test_steps_of_the_wall_clock_are_kept(tmp_path: Path) -> None:
    later = frames.MONO + 30 * frames.SECOND
    clock = frames.meta()["clock"] | {
        "segments": [
            {"mono_ns": frames.MONO, "utc_offset_ns": frames.OFFSET},
            {"mono_ns": later, "utc_offset_ns": frames.OFFSET - 5},
        ]
    }
    found = decoded(frames.capture(tmp_path / "a.cwnd", clock=clock), tmp_path)
    assert found.clocks == [
        {3: frames.MONO, 1: frames.MONO + frames.OFFSET},
        {3: later, 1: later + frames.OFFSET - 5},
        {3: later + 30 * frames.SECOND, 1: later + 30 * frames.SECOND + frames.OFFSET - 5},
    ]


@pytest.mark.slow
def test_a_trace_that_goes_on_is_written_as_it_was(tmp_path: Path) -> None:
    writer = store.CaptureWriter.create(tmp_path / "a.cwnd", frames.meta())
    writer.add("block_io", frames.disk(100, seconds=10))
    writer.flush(force=True)
    file = tmp_path / "a.pftrace"
    with file.open("wb") as opened:
        requests, out = perfetto._Requests(cwndtrace.load(tmp_path / "a.cwnd")), packets.Packets(opened)
        assert sum(len(batch) for batch in requests.survey()) == 100
        writer.add("block_io", frames.disk(50, seconds=5))
        writer.flush(force=True)
        requests.write(out, {})
    writer.close()
    assert sum(e.kind == "SLICE_BEGIN" for e in decode(file).events) == 100


def test_requests_keep_their_flows_where_a_window_has_moved_on(tmp_path: Path) -> None:
    whole = frames.disk(300)
    trace = in_parts(tmp_path / "a.cwnd", *(whole.slice(at, 100) for at in (0, 100, 200)))
    file = tmp_path / "a.pftrace"
    with file.open("wb") as opened:
        requests, out = perfetto._Requests(trace), packets.Packets(opened)
        seen = pd.concat(requests.survey()).set_index("start_ns")["row"]
        (trace.path / "block_io" / "part-000001.parquet").unlink()
        left = parquet(trace, "block_io")
        requests.write(out, {int(seen[row["start_ns"]]): [number] for number, row in enumerate(left, start=1)})
    found = decode(file)
    slices = [e for e in found.events if e.kind == "SLICE_BEGIN"]
    assert sorted((e.start_ns, e.flows) for e in slices) == sorted((r["start_ns"], [n]) for n, r in enumerate(left, 1))
    assert [(e.start_ns, e.value) for e in found.on("requests in flight")] == depths(left)


def test_rows_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    blocks = frames.table("block_io", frames.block(1), frames.block(2, -5))
    frames.capture(tmp_path / "a.cwnd", block_io=blocks)
    (tmp_path / "out").write_bytes(b"old")
    done = CliRunner().invoke(main, ["export", f"{tmp_path / 'a.cwnd'}", "--perfetto", f"{tmp_path / 'out'}"])
    assert done.exit_code == 1
    assert "make no sense together" in done.output
    assert (tmp_path / "out").read_bytes() == b"old"
    with pytest.raises(CaptureError), (tmp_path / "b").open("wb") as file:
        perfetto.write(cwndtrace.load(tmp_path / "a.cwnd"), file)


@pytest.mark.slow
def test_the_command_compresses_by_the_name(tmp_path: Path) -> None:
    trace = frames.two_idle_connections(tmp_path / "a.cwnd")
    plain, zipped = tmp_path / "a.pftrace", tmp_path / "a.pftrace.gz"
    for file in (plain, zipped):
        done = CliRunner().invoke(main, ["export", str(trace.path), "--perfetto", str(file)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert file.stat().st_mode & 0o777 == 0o600
    assert gzip.decompress(zipped.read_bytes()) == plain.read_bytes() == exported(trace, tmp_path).read_bytes()
    events = len(decode(plain).events)
    assert f"{plain} has {events:,} events." in CliRunner().invoke(
        main, ["export", str(trace.path), "--perfetto", str(plain)]
    ).output.replace("\n", " ")


def test_a_missing_package_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames.two_idle_connections(tmp_path / "a.cwnd")
    monkeypatch.setitem(sys.modules, "perfetto.trace_builder", None)
    done = CliRunner().invoke(main, ["export", str(tmp_path / "a.cwnd"), "--perfetto", str(tmp_path / "b")])
    assert done.exit_code == 1
    assert "--perfetto needs Python packages that aren't installed" in done.output
    assert "EXTRAS=perfetto" in done.output
    assert "cwndtrace[perfetto]" in done.output
    assert not (tmp_path / "b").exists()


# ---- by Perfetto's trace processor -------------------------------------------------------------------


def recorded(folder: Path) -> Trace:
    """Return the capture of a real trace."""
    return playing.played(Replay(FILE), folder, as_json=True)[0]


def made(folder: Path) -> Trace:
    """Return a capture with many requests, of which some delayed sends, and with all that a trace shows."""
    resets, connections = frames.story(peers=3)
    own = frames.disk(21_000, seconds=60)
    slow = [frames.block(at, 900_000, tgid=4242, tid=4243, dev=8 << 20) for at in np.arange(0.5, 59, 1)]
    samples = np.zeros(200, dtype=layout.event("cwnd_sample").dtype)
    first = records.frame(resets, "cwnd_reset").iloc[0]
    samples["ts_ns"] = first["ts_ns"] + np.arange(1, 201) * 1_000_003
    samples["reset_ts_ns"], samples["skaddr"] = first["ts_ns"], first["skaddr"]
    samples["cwnd"], samples["ssthresh"] = np.arange(200) + 44, 2**31 - 1
    samples["ssthresh"][100:] = 2120
    return in_parts(
        folder / "a.cwnd", *(own.slice(at, 7_000) for at in range(0, 21_000, 7_000)),
        frames.table("block_io", *slow), cwnd_reset=resets, connections=connections,
        cwnd_recovery=frames.followed(resets, connections), cwnd_sample=frames.table("cwnd_sample", samples),
    )  # fmt: skip


def real(_: Path) -> Trace:
    """Return a capture with real flows and snapshots, in which a window is followed until the next reset."""
    return cwndtrace.load(Path(__file__).parents[1] / "data" / "sample.cwnd")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module", params=[recorded, real, made])
def loaded(
    request: pytest.FixtureRequest, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Trace, TraceProcessor]]:
    need_loopback()
    folder = tmp_path_factory.mktemp("trace")
    trace = request.param(folder)
    with served() as place, browser.new_page() as page:
        engine = TraceProcessor(page, place)
        engine.load(exported(trace, folder))
        yield trace, engine


SLICES = "slice s JOIN track t ON t.id = s.track_id"
COUNTERS = "counter c JOIN track t ON t.id = c.track_id JOIN track up ON up.id = t.parent_id"


def args_of(engine: TraceProcessor, which: str) -> list[dict[str, Any]]:
    """Return the slices that a condition chooses: their times and names, and their arguments."""
    rows = engine.query(f"SELECT s.id, s.ts, s.dur, s.name FROM {SLICES} WHERE {which}")
    out = {row.pop("id"): row for row in rows}
    for row in engine.query(
        "SELECT s.id, a.flat_key, coalesce(a.int_value, a.real_value, a.string_value) value "
        f"FROM {SLICES} JOIN args a USING (arg_set_id) WHERE {which}"
    ):
        out[row["id"]][row["flat_key"].removeprefix("debug.")] = row["value"]
    return list(out.values())


def plain(row: dict[Any, Any]) -> dict[str, Any]:
    """Return what Perfetto has of a row: signed integers, and nothing for what isn't known."""
    known = {str(name): value for name, value in row.items() if value is not None and value != "" and value == value}
    return {n: v - (1 << 64) if isinstance(v, int) and v >= 1 << 63 else v for n, v in known.items() if n != "time"}


def recorded_part(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what slices have of the columns of ``rows``, with the types of these: floats are columns with gaps."""
    kinds = {name: type(value) for row in rows for name, value in row.items()}
    return [{name: kinds[name](value) for name, value in row.items() if name in kinds} for row in found]


def in_order(rows: list[dict[str, Any]]) -> list[str]:
    # repr() of a number has all of its digits.
    return sorted(repr(sorted(row.items())) for row in rows)


@pytest.mark.slow
def test_the_engine_finds_no_fault(loaded: tuple[Trace, TraceProcessor]) -> None:
    _, engine = loaded
    assert engine.query("SELECT name, value FROM stats WHERE severity IN ('error', 'data_loss') AND value > 0") == []
    assert engine.query("SELECT id FROM slice WHERE dur < 0 OR depth > 0") == []


@pytest.mark.slow
def test_requests_equal_the_parquet(loaded: tuple[Trace, TraceProcessor]) -> None:
    trace, engine = loaded
    rows = parquet(trace, "block_io")
    names = ("bytes", "sector", "issue_ns", "error", "comm", "tgid", "tid")
    found = [
        {"device": row["device"], "start_ns": row["ts"], "done_ns": row["ts"] + row["dur"], "op": row["name"]}
        | {name: row[name] for name in names}
        for row in engine.query(
            "SELECT up.name device, s.ts, s.dur, s.name, "
            + ", ".join(f"EXTRACT_ARG(s.arg_set_id, 'debug.{name}') {name}" for name in names)
            + " FROM slice s JOIN track t ON t.id = s.track_id JOIN track up ON up.id = t.parent_id "
            "WHERE t.name GLOB 'lane *'"
        )
    ]
    devices = trace.about.devices
    expected = [
        {"device": f"block device {devices.get(row['dev'], row['dev'])}"}
        | {name: row[name] for name in ("start_ns", "done_ns", "op", *names)}
        for row in rows
    ]
    assert len(expected) >= 100
    assert in_order(found) == in_order(expected)


@pytest.mark.slow
def test_depths_equal_the_parquet(loaded: tuple[Trace, TraceProcessor]) -> None:
    trace, engine = loaded
    rows = parquet(trace, "block_io")
    for dev in {row["dev"] for row in rows}:
        name = trace.about.devices.get(dev, dev)
        found = engine.query(
            f"SELECT c.ts, c.value FROM {COUNTERS} "
            f"WHERE t.name = 'requests in flight' AND up.name = 'block device {name}' ORDER BY c.ts"
        )
        assert [(row["ts"], row["value"]) for row in found] == depths([row for row in rows if row["dev"] == dev])


@pytest.mark.slow
def test_resets_equal_the_parquet_and_the_verdicts(loaded: tuple[Trace, TraceProcessor]) -> None:
    trace, engine = loaded
    found = args_of(engine, "s.name GLOB '* reset: *'")
    rows = [plain(row) for row in parquet(trace, "cwnd_reset")]
    assert rows
    for row in rows:
        for name, least in records.PLACEHOLDERS.items():
            if row.get(name, 0) >= least:
                del row[name]
    assert in_order(recorded_part(found, rows)) == in_order(rows)
    judged = [plain(row) for row in trace.verdicts.drop(columns="disk_last").to_dict("records")]
    times = [{n: v for n, v in row.items() if n not in ("ts", "dur", "name")} for row in found]
    assert in_order(times) == in_order(judged)
    assert all(row["ts"] == row["ts_ns"] and row["dur"] == 0 for row in found)
    assert {row["name"] for row in found} == {f"{r['reason']} reset: {r['verdict']}" for r in judged}


@pytest.mark.slow
def test_idle_periods_and_followed_windows_equal_the_parquet(loaded: tuple[Trace, TraceProcessor]) -> None:
    trace, engine = loaded
    idle = args_of(engine, "t.name = 'idle'")
    resets = [row for row in parquet(trace, "cwnd_reset") if row["reason"] == "idle"]
    assert Counter((row["ts"], row["dur"], row["idle_us"]) for row in idle) == Counter(
        (row["ts_ns"] - row["idle_us"] * 1000, row["idle_us"] * 1000, row["idle_us"]) for row in resets
    )
    waited = args_of(engine, "t.name = 'followed window'")
    rows = [plain(row) for row in parquet(trace, "cwnd_recovery")]
    assert rows
    for row in rows:
        if row["ssthresh_end"] >= 2**31 - 1:
            del row["ssthresh_end"]
    assert in_order(recorded_part(waited, rows)) == in_order(rows)
    assert all(row["ts"] == row["reset_ts_ns"] and row["dur"] == row["end_ts_ns"] - row["ts"] for row in waited)


@pytest.mark.slow
def test_windows_equal_the_parquet(loaded: tuple[Trace, TraceProcessor]) -> None:
    trace, engine = loaded
    for name in ("cwnd", "ssthresh"):
        points = [(row["ts_ns"], row[name]) for row in parquet(trace, "connections") + parquet(trace, "cwnd_sample")]
        for row in parquet(trace, "cwnd_reset"):
            points += [(row["ts_ns"], row[f"{name}_before"]), (row["ts_ns"], row[f"{name}_after"])]
        points += [(row["end_ts_ns"], row[f"{name}_end"]) for row in parquet(trace, "cwnd_recovery")]
        found = engine.query(
            f"SELECT c.ts, c.value, up.name connection FROM {COUNTERS} WHERE t.name = '{name}' ORDER BY c.id"
        )
        assert Counter((row["ts"], row["value"]) for row in found) == Counter(p for p in points if p[1] < 2**31 - 1)
        # The window after a reset holds from then on.
        for key, rows in pd.DataFrame(found).groupby("connection") if found else ():
            last = rows.groupby("ts")["value"].last()
            for reset in trace.resets.to_dict("records"):
                after = reset[f"{name}_after"]
                if str(key).startswith(cwndtrace.format.connection(reset)) and not math.isnan(after):
                    assert last[reset["ts_ns"]] == after


@pytest.mark.slow
def test_processes_and_connections_are_there(loaded: tuple[Trace, TraceProcessor]) -> None:
    trace, engine = loaded
    found = engine.query(
        "SELECT p.pid, p.name process, t.name FROM process_track t JOIN process p USING (upid) "
        "WHERE t.name GLOB '* > *'"
    )
    known = trace.summary().to_dict("records")
    assert Counter((row["pid"], row["process"], row["name"]) for row in found) == Counter(
        (row["pid"], row["process"], cwndtrace.format.connection(row)) for row in known
    )


@pytest.mark.slow
def test_flows_lead_from_requests_to_the_sends_that_waited_for_them(loaded: tuple[Trace, TraceProcessor]) -> None:
    trace, engine = loaded
    found = engine.query(
        "SELECT o.ts start_ns, o.ts + o.dur done_ns, i.ts ts_ns, EXTRACT_ARG(i.arg_set_id, 'debug.skaddr') skaddr "
        "FROM flow f JOIN slice o ON o.id = f.slice_out JOIN slice i ON i.id = f.slice_in"
    )
    requests = trace.block_io
    rows = trace.verdicts[trace.verdicts["disk_last"] >= 0].to_dict("records")
    expected = [
        {name: int(requests[name][row["disk_last"]]) for name in ("start_ns", "done_ns")}
        | plain({name: row[name] for name in ("ts_ns", "skaddr")})
        for row in rows
    ]
    assert in_order(found) == in_order(expected)
    assert bool(rows) == (trace.about.host != "test")


@pytest.mark.slow
def test_both_clocks_are_right(loaded: tuple[Trace, TraceProcessor]) -> None:
    trace, engine = loaded
    rows = engine.query("SELECT ts, to_monotonic(ts) mono, to_realtime(ts) utc FROM slice WHERE ts > 0")
    assert rows
    for row in rows:
        assert row["mono"] == row["ts"]
        assert row["utc"] == trace.about.utc_ns(row["ts"])


@pytest.mark.slow
def test_the_query_in_the_documentation_answers(loaded: tuple[Trace, TraceProcessor]) -> None:
    trace, engine = loaded
    (query,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    lost = trace.verdicts.query("verdict == 'harmful'")["lost_us"].sort_values(ascending=False)
    assert [row["lost_ms"] for row in engine.query(query)] == (lost / 1000).tolist()


# ---- many requests -----------------------------------------------------------------------------------

MEASURED = """
import json, sys
from pathlib import Path
import cwndtrace
from cwndtrace.export import perfetto
with open(sys.argv[2], "wb") as file:
    events = perfetto.write(cwndtrace.load(sys.argv[1]), file)
# ru_maxrss would be that of the process that started this one, if that was larger.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(json.dumps([events, int(peak.split()[1]) << 10]))
"""


def peak_bytes(folder: Path, number: int) -> int:
    """Export a capture of so many requests, and return the most memory that this took."""
    resets, connections = frames.story(peers=3)
    whole = frames.disk(number)
    parts = [whole.slice(at, 65_536) for at in range(0, number, 65_536)]
    trace = in_parts(folder / f"{number}.cwnd", *parts, cwnd_reset=resets, connections=connections)
    command = [sys.executable, "-c", MEASURED, str(trace.path), str(folder / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    events, peak = json.loads(done.stdout)
    assert events > 2.5 * number
    return int(peak)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_million_requests_take_no_more_memory_than_a_tenth_of_them(tmp_path: Path) -> None:
    few, many = (peak_bytes(tmp_path, number) for number in (131_072, 1_000_000))
    print(f"{few / 1e6:.0f} MB for 131,072 requests, {many / 1e6:.0f} MB for 1,000,000")
    assert many < few + 40e6
