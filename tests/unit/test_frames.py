# SPDX-License-Identifier: Apache-2.0
"""The frames of a Trace: numbers that can be subtracted, missing values, units, and nothing that leaks back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import cwndtrace
from cwndtrace.analysis import (
    ahead,
    audit,
    block_io,
    compare,
    connections,
    cost,
    groups,
    idle_cause,
    recovery,
    units,
    verdict,
)
from cwndtrace.capture.session import Batch
from cwndtrace.present import remedies
from cwndtrace.records import arrow, layout
from cwndtrace.records import frames as records
from cwndtrace.trace import Trace
from tests.unit import frames

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
NEVER, NONE = 2_147_483_647, 4_294_967_295


def sample_table(*rows: dict[str, Any]) -> pa.Table:
    out = np.zeros(len(rows), dtype=layout.event("cwnd_sample").dtype)
    for number, row in enumerate(rows):
        for name, value in {"ts_ns": frames.MONO + 2 * 10**9, "cwnd": 44, "srtt_us": 107_000, **row}.items():
            out[name][number] = value
    return arrow.to_arrow("cwnd_sample", out, frames.OFFSET)


def capture(path: Path, **fields: Any) -> Trace:
    """Write a capture with rows in all tables; ``fields`` are those of its one reset."""
    made = frames.reset(1, **fields)
    trace = frames.capture(
        path, resets=frames.table("cwnd_reset", made), recoveries=frames.table("cwnd_recovery", frames.recovered(1)),
        connections=frames.snapshots(*(frames.snapshot(at, bytes_sent=40_100_000 + at * 10**5) for at in (0, 30))),
        block_io=frames.disk(50), workloads=frames.workloads({}), processes=frames.processes({}),
    )  # fmt: skip
    at = {name: int(made[name][0]) for name in ("skaddr", "sock_cookie")}
    (path / "cwnd_sample").mkdir()
    rows = sample_table({**at, "reset_ts_ns": int(made["ts_ns"][0]), "ssthresh": NEVER})
    pq.write_table(rows, path / "cwnd_sample" / "part-000001.parquet")
    return trace


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return capture(tmp_path / "a.cwnd")


def public(trace: Trace) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield every frame that a trace gives, by the member that gives it."""
    one = trace.connection(trace.summary()["connection"].iloc[0])
    yield from ((name, getattr(trace, name)) for name in TABLES)
    yield from (("connection", frame) for frame in (one.resets, one.snapshots, one.recoveries))
    yield "block_columns", trace.block_columns("device", "bytes", "latency_us", "start_ns", "sector")
    calls = ("costs", "summary", "groups", "remedies", "audit", "block_summary", "block_submitters", "block_owners")
    yield from ((name, getattr(trace, name)()) for name in calls)
    yield "verdicts", trace.verdicts
    yield "compare", trace.compare(trace)


TABLES = {
    "resets": "cwnd_reset", "recoveries": "cwnd_recovery", "samples": "cwnd_sample", "block_io": "block_io",
    "connections": "connections", "workloads": "workloads", "processes": "processes",
}  # fmt: skip


# ---- numbers ----------------------------------------------------------------------------------------


def test_the_difference_of_two_windows_has_a_sign(trace: Trace) -> None:
    (row,) = trace.resets.to_dict("records")
    assert (trace.resets["cwnd_after"] - trace.resets["cwnd_before"]).tolist() == [44 - 2827]
    assert row["cwnd_after"] - row["cwnd_before"] == 44 - 2827
    assert (trace.recoveries["reset_ts_ns"] - trace.recoveries["end_ts_ns"]).tolist() == [-500_000_000]
    assert (trace.block_io["start_ns"] - trace.block_io["done_ns"]).max() < 0
    assert trace.block_io["bytes"].diff().min() <= 0


def test_all_quantities_are_signed_and_ids_are_as_recorded(trace: Trace) -> None:
    for member, table in TABLES.items():
        frame = getattr(trace, member)
        assert len(frame)
        for column in arrow.schema(table):
            kind, unit = frame[column.name].dtype, column.metadata[b"unit"].decode()
            if unit in ("ns", "us", "bytes", "segments", "count", "sectors of 512 bytes"):
                missing = column.name in {*records.PLACEHOLDERS, *arrow.MAY_BE_NULL, *arrow.OF_LATER_VERSIONS}
                small = (table, column.name) == ("block_io", "bytes")
                assert kind == ("float64" if missing else "int32" if small else "int64"), (table, column.name)
            elif pa.types.is_integer(column.type):
                missing = column.name in arrow.OF_LATER_VERSIONS
                assert kind == ("float64" if missing else column.type.to_pandas_dtype()), (table, column.name)
    for name, frame in public(trace):
        assert not [c for c in frame if units.of(str(c)) in ("us", "ns", "segments") and frame[c].dtype.kind == "u"], (
            name
        )


def test_types_do_not_depend_on_the_rows(trace: Trace, tmp_path: Path) -> None:
    empty = frames.capture(tmp_path / "empty.cwnd")
    for member in (*TABLES, "verdicts"):
        full, bare = getattr(trace, member).dtypes, getattr(empty, member).dtypes
        assert full[full.map(lambda kind: kind.kind in "iuf")].equals(bare[full.map(lambda kind: kind.kind in "iuf")])


def test_a_request_of_two_gibibytes_has_its_length(tmp_path: Path) -> None:
    large = frames.table("block_io", frames.block(1, bytes=2**32 - 512), frames.block(2, bytes=512))
    trace = frames.capture(tmp_path / "a.cwnd", block_io=large)
    for frame in (trace.block_io, trace.block_columns("bytes")):
        assert frame["bytes"].diff().tolist()[1:] == [1024 - 2**32]
    assert trace.block_summary()["bytes"].tolist() == [2**32]


def test_requests_of_different_parts_have_one_type(tmp_path: Path) -> None:
    trace = frames.capture(tmp_path / "a.cwnd", block_io=frames.table("block_io", frames.block(1)))
    part = trace.path / "block_io" / "part-000001.parquet"
    whole = frames.table("block_io", frames.block(2, bytes=2**31))
    pq.write_table(whole, part.with_name("part-000002.parquet"))
    assert cwndtrace.load(trace.path).block_columns("bytes")["bytes"].tolist() == [4096, 2**31]


def test_making_a_frame_starts_no_thread() -> None:
    """Where memory for another thread is lacking, Arrow frees memory that its earlier threads still use."""
    script = (
        "import os\n"
        "from cwndtrace.records import frames as records\n"
        "from tests.unit import frames\n"
        "table, before = frames.table('cwnd_reset', frames.reset(1)), os.listdir('/proc/self/task')\n"
        "records.frame(table, 'cwnd_reset')\n"
        "print(len(os.listdir('/proc/self/task')) - len(before))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "0\n"


def test_requests_of_older_parts_lack_their_owner(tmp_path: Path) -> None:
    trace = frames.capture(tmp_path / "a.cwnd", block_io=frames.table("block_io", frames.block(1, cgroup_id=77)))
    part = trace.path / "block_io" / "part-000001.parquet"
    older = frames.table("block_io", frames.block(2, cgroup_id=78)).drop_columns(["owner_cgroup_id"])
    pq.write_table(older, part.with_name("part-000002.parquet"))
    trace = cwndtrace.load(trace.path)
    for frame in (trace.block_io, trace.block_columns("cgroup_id", "owner_cgroup_id")):
        assert frame["cgroup_id"].tolist() == [77, 78]
        assert frame["owner_cgroup_id"].isna().tolist() == [False, True]
        assert frame["owner_cgroup_id"].iloc[0] == 77


def test_a_batch_of_a_stream_has_the_same_numbers() -> None:
    frame = Batch("cwnd_reset", frames.table("cwnd_reset", frames.reset(1, min_rtt_us=NONE))).to_pandas()
    assert (frame["cwnd_after"] - frame["cwnd_before"]).tolist() == [44 - 2827]
    assert frame[["ssthresh_before", "min_rtt_us"]].isna().all(axis=None)


# ---- missing values ---------------------------------------------------------------------------------


def test_what_the_kernel_never_set_is_missing_in_frames_and_as_it_was_in_parquet(tmp_path: Path) -> None:
    trace = capture(tmp_path / "a.cwnd", min_rtt_us=NONE)
    assert trace.resets[["ssthresh_before", "min_rtt_us"]].isna().all(axis=None)
    assert trace.resets["ssthresh_after"].tolist() == [2120.0]
    for frame, name in (
        (trace.connections, "ssthresh"), (trace.samples, "ssthresh"), (trace.recoveries, "ssthresh_end"),
        (trace.verdicts, "ssthresh_before"), (trace.costs(), "min_rtt_us"),
    ):  # fmt: skip
        assert len(frame)
        assert frame[name].isna().all(), name
    stored = pq.read_table(trace.path / "cwnd_reset").to_pylist()[0]
    assert (stored["ssthresh_before"], stored["min_rtt_us"]) == (NEVER, NONE)
    assert (
        arrow.table_to_dicts("cwnd_reset", frames.table("cwnd_reset", frames.reset(1)))[0]["ssthresh_before"] == NEVER
    )
    about = {field.name: field.metadata[b"description"].decode() for field in arrow.schema("connections")}
    assert str(NEVER) in about["ssthresh"]
    assert str(NONE) in about["min_rtt_us"]


def test_a_cost_without_least_round_trip_uses_the_smoothed_one(tmp_path: Path) -> None:
    trace = capture(tmp_path / "a.cwnd", min_rtt_us=NONE)
    assert trace.costs()["round_us"].tolist() == [107_000]


def test_a_window_below_a_threshold_that_was_never_set_is_in_slow_start(tmp_path: Path) -> None:
    never, low = (capture(tmp_path / f"{n}.cwnd", ssthresh_after=n) for n in (NEVER, 45))
    # From 44 segments, 2000 need 44 + 88 + 176 + 352 + 704 + 636 in slow start.
    assert never.costs()["rounds_after"].tolist() == [6]
    assert low.costs()["rounds_after"].item() > 6


def test_the_threshold_after_a_timeout_is_in_words(tmp_path: Path) -> None:
    for value, words in ((NEVER, "inf segments"), (2120, "2120 segments")):
        trace = capture(tmp_path / f"{value}.cwnd", reason="rto_loss", ssthresh_after=value)
        assert f"ssthresh was {words}" in str(trace.explain(0))


@pytest.mark.parametrize("column", ["ssthresh_before", "min_rtt_us", "mss"])
def test_a_reset_without_a_recorded_threshold_is_not_taken_for_one_that_was_never_set(
    trace: Trace, column: str
) -> None:
    part = trace.path / "cwnd_reset" / "part-000001.parquet"
    rows = pq.read_table(part)
    pq.write_table(rows.drop_columns([column]), part.with_name("part-000002.parquet"))
    again = cwndtrace.load(trace.path)
    assert len(again.resets) == 2
    assert len(again.verdicts) == 1


def test_a_counter_that_went_below_zero_is_no_burst(tmp_path: Path) -> None:
    """Older versions read a socket after a reset by its peer had zeroed its counters."""
    followed = frames.table(
        "cwnd_recovery", frames.recovered(1, outcome="capture_end", cost_us=0, bytes_acked=2**64 - 2_500_001)
    )
    trace = frames.capture(tmp_path / "a.cwnd", resets=frames.table("cwnd_reset", frames.reset(1)), recoveries=followed)
    assert trace.recoveries["bytes_acked"].tolist() == [-2_500_001]
    assert trace.verdicts["burst_bytes"].isna().all()
    assert trace.verdicts["verdict"].tolist() == ["unknown"]


# ---- units ------------------------------------------------------------------------------------------


def test_every_column_of_every_frame_has_a_unit(trace: Trace, tmp_path: Path) -> None:
    for made in (trace, frames.capture(tmp_path / "empty.cwnd", connections=frames.snapshots(frames.snapshot()))):
        for name, frame in public(made):
            assert set(frame.attrs["units"]) == set(frame.columns), name
    assert trace.block_heat_map().attrs["units"] == {"latency_us": "us", "start_ns": "ns"}
    frame = trace.verdicts
    assert {name: frame.attrs["units"][name] for name in ("cwnd_before", "lost_us", "rounds_lost", "verdict")} == {
        "cwnd_before": "segments", "lost_us": "us", "rounds_lost": "round trips", "verdict": "text",
    }  # fmt: skip
    assert frame[frame["lost_us"] > 0].assign(x=1).attrs["units"]["lost_us"] == "us"


def test_every_documented_column_has_a_unit() -> None:
    documented: tuple[dict[str, str], ...] = (
        block_io.COLUMNS, block_io.SUBMITTER_COLUMNS, block_io.OWNER_COLUMNS, compare.COLUMNS, connections.COLUMNS,
        cost.COLUMNS, ahead.DUE, ahead.BEATS, audit.COLUMNS, idle_cause.COLUMNS, idle_cause.SUMMARY_COLUMNS,
        recovery.COLUMNS, recovery.FOLLOWED, recovery.CHAIN_COLUMNS, remedies.COLUMNS, verdict.COLUMNS,
        verdict.CONNECTION_COLUMNS, groups.COLUMNS,
    )  # fmt: skip
    assert [name for columns in documented for name in columns if units.of(name) is None] == []
    assert units.of("nonsense") is None


# ---- what a user does to a frame --------------------------------------------------------------------


def scribble(frame: pd.DataFrame) -> None:
    frame["connection"] = "mine"
    frame["lost_us"] = -1.0
    frame["x"] = 1
    for name in frame.select_dtypes("number"):
        frame.loc[:, name] = frame[name].iloc[0] if name == "x" else 0


def erase(frame: pd.DataFrame) -> None:
    for name in [*frame]:
        del frame[name]
    frame.attrs.clear()


def results(trace: Trace) -> dict[str, pd.DataFrame | str]:
    """Return the frames and texts that a trace computes."""
    names = ("costs", "summary", "remedies", "audit", "block_summary", "block_submitters")
    found: dict[str, pd.DataFrame | str] = {name: getattr(trace, name)() for name in names}
    found |= {"verdicts": trace.verdicts, "host": str(trace.host()), "explain": str(trace.explain(0))}
    key = trace.summary()["connection"].iloc[0]
    return found | {"connection": repr(trace.connection(key)), "compare": trace.compare(trace)}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame | str]:
    """The results of a trace whose frames nobody changed."""
    return results(capture(tmp_path_factory.mktemp("untouched") / "a.cwnd"))


@pytest.mark.slow
@pytest.mark.parametrize("change", [scribble, erase])
@pytest.mark.parametrize("members", [(*TABLES,), ("verdicts", "costs", "summary", "remedies", "audit")])
def test_no_change_to_a_frame_reaches_another(
    tmp_path: Path,
    untouched: dict[str, pd.DataFrame | str],
    members: tuple[str, ...],
    change: Callable[[pd.DataFrame], None],
) -> None:
    other = capture(tmp_path / "a.cwnd")
    for member in members:
        taken = getattr(other, member)
        change(taken() if callable(taken) else taken)
    for name, found in results(other).items():
        expected = untouched[name]
        if isinstance(found, str) or isinstance(expected, str):
            assert found == expected, name
        elif name != "verdicts" or "verdicts" not in members:
            pd.testing.assert_frame_equal(found, expected)


def test_a_users_column_stays_in_the_frame(trace: Trace) -> None:
    trace.resets["x"] = 1
    assert trace.resets["x"].tolist() == [1]
    assert "x" not in trace.costs()
    assert "x" not in trace.verdicts


@pytest.mark.parametrize("sizes", [(), (3,), (0, 2, 5), (2, 150)])
def test_block_requests_become_the_frame_that_pyarrow_makes(sizes: tuple[int, ...]) -> None:
    """In several chunks with dictionaries of their own, with missing values, and with many texts."""
    parts = [
        frames.table("block_io", *(frames.block(at, comm=f"fio{size * at}".encode()) for at in range(size)))
        for size in sizes
    ]
    whole = pa.concat_tables([frames.table("block_io"), *parts, *([parts[0][1:]] if parts else [])])
    some = pa.array([row % 4 != 1 for row in range(len(whole))])
    for name in ("tgid", "comm"):
        at = whole.schema.get_field_index(name)
        lacking = pc.if_else(some, whole.column(at).combine_chunks(), None)
        for table in (whole, whole.set_column(at, whole.schema.field(at), lacking)):
            found, truth = records._of_many(table), table.unify_dictionaries().to_pandas()
            pd.testing.assert_frame_equal(found, truth, check_dtype=len(table) > 0, check_categorical=len(table) > 0)
            found.loc[:, "start_ns"] = np.uint64(7)
            assert (found["start_ns"] == 7).all()
