# SPDX-License-Identifier: Apache-2.0
"""The frames of one capture of a fleet: the figures of ``report``, in fixed types."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cwndtrace.analysis.histogram import LatencyHistogram
from cwndtrace.fleet import summary, tables
from cwndtrace.fleet.extract import extract
from cwndtrace.present import fleet as in_words
from cwndtrace.report import content
from cwndtrace.trace import load
from tests.unit import frames, hostile

DATA = Path(__file__).parents[1] / "data"
CAPTURES = sorted(path.name for path in DATA.glob("*.cwnd"))


def plain(frame: pd.DataFrame, columns: list[str]) -> list[dict[str, Any]]:
    """Return rows as JSON has them."""
    times = {name: frame[name].map(pd.Timestamp.isoformat) for name in ("first_seen", "last_seen") if name in frame}
    return content.records(frame.assign(**times)[columns])


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", CAPTURES)
def test_the_figures_are_those_of_the_report(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = load(DATA / name)
    monkeypatch.setattr("cwndtrace.fleet.extract.load", lambda *_, **__: trace)
    found, json = extract(DATA / name, "", name), content.as_json(content.report(trace))
    for table, key in (("connections", "connections"), ("workloads", "groups"), ("devices", "block_io_by_device")):
        rows = json[key]
        assert plain(found.named()[table], [*rows[0]] if rows else []) == rows or not rows
        assert len(found.named()[table]) == len(rows)
    same = ["netns_ino", "name", "slow_start_after_idle", "slow_start_after_idle_end", "live", "touched", "resets"]
    assert plain(found.settings, [*same, "lost_us"]) == [
        {column: row[column] for column in (*same, "lost_us")} for row in json["namespaces"]
    ]
    about, answer = found.captures.iloc[0], json["answer"]
    assert (about["status"], about["state"], about["verdict"]) == ("ok", json["status"], answer["verdict"])
    numbers = ("resets", "harmful", "unknown", "lost_us", "predicted_us")
    own = ("resets", "resets_harmful", "resets_unknown", "lost_us", "predicted_us")
    assert [about[column] for column in own] == [answer[column] for column in numbers]


def test_every_column_has_a_unit_and_a_meaning_and_survives_parquet(tmp_path: Path) -> None:
    for found in (extract(DATA / "sample.cwnd", "", "a"), extract(tmp_path / "none.cwnd", "h", "none.cwnd")):
        for name, frame in found.named().items():
            assert list(frame.columns) == tables.schema(name).names
            assert all(field.metadata[b"unit"] and field.metadata[b"description"] for field in tables.schema(name))
            assert set(frame.attrs["units"]) == set(frame.columns)
            pd.testing.assert_frame_equal(tables.to_frame(name, tables.to_arrow(name, frame)), frame)


def test_histograms_of_two_captures_add_up_to_that_of_all_requests(tmp_path: Path) -> None:
    both, added = LatencyHistogram(), LatencyHistogram()
    for seed in (1, 2):
        trace = frames.capture(tmp_path / f"{seed}.cwnd", block_io=frames.disk(500, seed))
        both.add(trace.block_io[trace.block_io["op"] == "read"]["latency_us"].to_numpy())
        rows = extract(trace.path, "", str(seed)).devices
        row = rows[rows["op"] == "read"].iloc[0]
        added.join(row["latency_histogram"], row["latency_total_us"], row["latency_max_us"])
    assert [added.percentile(p) for p in (50, 95, 99)] == [both.percentile(p) for p in (50, 95, 99)]
    assert (added.count, added.max_us) == (both.count, both.max_us)
    assert math.isclose(added.total_us, both.total_us)
    for odd in ("1", "1:2:3", "1:x", "-1:5", "5:-1", "3100:1"):
        with pytest.raises((ValueError, IndexError)):
            added.join(odd, 0.0, 0.0)


def test_a_capture_that_cannot_be_read_is_a_row_with_its_reason(tmp_path: Path) -> None:
    damaged = frames.two_idle_connections(tmp_path / "damaged.cwnd").path
    (damaged / "meta.json").write_text("{")
    odd = tmp_path / "a file.cwnd"
    odd.write_text("")
    for path in (tmp_path / "none.cwnd", damaged, odd, Path("/dev/null")):
        found = extract(path, "web1", path.name)
        assert found.captures[["host", "capture", "status"]].to_dict("records") == [
            {"host": "web1", "capture": path.name, "status": "failed"}
        ]
        assert found.captures["reason"].iloc[0]
        assert all(frame.empty for name, frame in found.named().items() if name != "captures")


def test_too_many_rows_are_a_reason(tmp_path: Path) -> None:
    path = frames.two_idle_connections(tmp_path / "a.cwnd").path
    assert "the limit is 10" in extract(path, "", "a", max_rows=10).captures["reason"].iloc[0]


def test_clocks_that_disagree_are_told(tmp_path: Path) -> None:
    start = {"mono_ns": frames.MONO, "utc_offset_ns": frames.OFFSET}
    later = {"mono_ns": frames.MONO + 9 * frames.SECOND, "utc_offset_ns": frames.OFFSET - 3600 * frames.SECOND}
    clock = {"start": start, "end": later | {"mono_ns": frames.MONO + 60 * frames.SECOND}, "segments": [start, later]}
    path = frames.two_idle_connections(tmp_path / "a.cwnd", clock=clock, ended="2126-01-01T00:00:00Z").path
    row = extract(path, "", "a").captures.iloc[0]
    assert (row["clock_steps"], row["clock_shift_s"], row["seconds"]) == (1, -3600.0, 60.0)
    assert row["ahead_s"] > 0


@pytest.mark.quick(1)
@pytest.mark.parametrize("far_s", [10**31, 10**10, -(10**31)])
def test_impossible_times_are_unknown_and_end_no_report(tmp_path: Path, far_s: int) -> None:
    start = {"mono_ns": frames.MONO, "utc_offset_ns": frames.OFFSET}
    end = {"mono_ns": frames.MONO + far_s * frames.SECOND, "utc_offset_ns": frames.OFFSET + far_s * frames.SECOND}
    times = {"started": "0001-01-01T00:00:00Z", "ended": "9999-12-31T23:59:59Z"}
    clock = {"start": start, "end": end, "segments": [start, end]}
    found = extract(frames.two_idle_connections(tmp_path / "a.cwnd", clock=clock, **times).path, "", "a")
    row = found.captures.iloc[0]
    assert (row["status"], math.isnan(row["seconds"]), math.isnan(row["clock_shift_s"])) == ("ok", True, True)
    assert row["clock_steps"] == 1
    since = pd.Timestamp("9999-12-31T00:00:00Z")
    report = summary.report(found, since=since)
    assert report.captures["side"].iloc[0] in ("undated", "spans", "unsure")
    assert in_words.sides(report.captures, since)[0].startswith("9999-12-31 00:00:00 UTC: ")


def test_lost_and_absent_records_are_told(tmp_path: Path) -> None:
    counts = {"cwnd_reset": {"kept": 0, "lost": 7}}
    trace = frames.two_idle_connections(tmp_path / "a.cwnd", counts=counts)
    part = next((trace.path / "connections").glob("*.parquet"))
    rows = len(trace.connections)
    part.unlink()
    row = extract(trace.path, "", "a").captures.iloc[0]
    assert (row["lost_records"], row["absent_records"], row["whole"]) == (7, rows, False)
    assert "are not in the capture" in row["warnings"]


def test_hostile_texts_are_cleaned_and_cut(tmp_path: Path) -> None:
    path = hostile.everywhere(tmp_path / "a.cwnd").path
    found = extract(path, "", "\x1b[2J" + "n" * 5000)
    for frame in found.named().values():
        texts = [value for row in frame.to_dict("records") for value in row.values() if isinstance(value, str)]
        assert all(text.isprintable() and len(text) <= 1000 for text in texts)


def test_a_capture_that_was_cut_short_traced_until_its_last_record(tmp_path: Path) -> None:
    start = {"mono_ns": frames.MONO, "utc_offset_ns": frames.OFFSET}
    seen = frames.snapshots(frames.snapshot(2.0), frames.snapshot(42.5))
    values: dict[str, Any] = {"ended": None, "clock": {"start": start}, "boot_id": "b00t", "filters": {"port": 443}}
    frames.capture(tmp_path / "a.cwnd", connections=seen, **values)
    row = extract(tmp_path / "a.cwnd", "", "a").captures.iloc[0]
    assert (row["seconds"], row["begin_ns"], math.isnan(row["end_ns"])) == (42.5, frames.MONO, True)
    assert row["filters"] == "port=443"
    # Without a record it can't be told.
    frames.capture(tmp_path / "b.cwnd", **(values | {"clock": {"start": start}, "filters": {}}))
    row = extract(tmp_path / "b.cwnd", "", "b").captures.iloc[0]
    assert (math.isnan(row["seconds"]), row["filters"]) == (True, "")


@pytest.mark.slow
def test_the_boot_is_known_unless_the_metadata_has_something_else(tmp_path: Path) -> None:
    for name, value in (("b00t", "b00t"), ("", 7), ("", {"a": "b"})):
        path = tmp_path / f"{type(value).__name__}.cwnd"
        frames.capture(path)
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps(meta | {"boot_id": value}))
        assert extract(path, "", "a").captures["boot_id"].iloc[0] == name
