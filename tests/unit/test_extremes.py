# SPDX-License-Identifier: Apache-2.0
"""Values at the ends of their ranges give right figures, complete pages and no warning of numpy's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cwndtrace
from cwndtrace import store
from cwndtrace.cli import main
from cwndtrace.records.frames import PLACEHOLDERS
from tests.unit import frames
from tests.unit.fake_source import FakeSource, session_of

U32 = (1 << 32) - 1
EXTREMES: dict[str, dict[str, Any]] = {
    "no sample of the round-trip time": {"srtt_us": 0, "min_rtt_us": U32},
    "a timeout of its SYN": {
        "srtt_us": 0, "min_rtt_us": U32, "reason": "rto_loss", "cwnd_before": 10, "cwnd_after": 1, "idle_us": 0,
        "bytes_acked": 0, "bytes_sent": 0, "rto_us": 1_000_000, "last_rcv_us": 0,
    },
    "an RTO above two minutes": {"rto_us": 240_000_000, "idle_us": 600_000_000, "srtt_us": 60_000_000},
    "the largest RTO": {"rto_us": U32, "idle_us": U32 * 2},
    "idle time of 24 days": {"idle_us": 24 * 86_400 * 1_000_000, "last_rcv_us": 24 * 86_400 * 1_000_000},
    "a window at its clamp": {"cwnd_before": U32, "cwnd_after": U32 >> 1, "ssthresh_after": U32},
    "a window of one": {"cwnd_before": 2, "cwnd_after": 1, "init_cwnd": 1, "ssthresh_before": 2, "ssthresh_after": 2},
    "jiffies that wrap: idle time of all but a tick": {"idle_us": U32 * 1000, "last_rcv_us": U32 * 1000},
    "nothing offered, all queued": {"snd_wnd": 0, "unsent_bytes": U32},
    "sequence numbers that have wrapped often": {"bytes_sent": (1 << 62) + 5, "bytes_acked": (1 << 62)},
    "no MSS": {"mss": 0},
}  # fmt: skip


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", EXTREMES)
def test_an_extreme_value_is_kept_and_reported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = EXTREMES[name]
    path = tmp_path / "a.cwnd"
    writer = store.CaptureWriter.create(path, frames.meta())
    records = [frames.reset(1.0), frames.reset(2.0, **fields), frames.reset(700.0, sock_cookie=0, **fields)]
    writer.add("cwnd_reset", frames.table("cwnd_reset", *records))
    writer.add("connections", frames.snapshots(frames.snapshot(0.5), frames.snapshot(705.0)))
    writer.close()
    trace = cwndtrace.load(path)
    row = trace.verdicts.iloc[1]
    for field, value in fields.items():
        assert row[field] == value or (math.isnan(row[field]) and value >= PLACEHOLDERS[field]), field
    assert all(not math.isinf(x) and not x < 0 for x in trace.verdicts["lost_us"].dropna().astype(float))
    assert len(trace.summary()) >= 1
    assert str(trace.host())
    trace.remedies()
    monkeypatch.setattr(cwndtrace, "load", lambda *_, **__: trace)
    result = CliRunner().invoke(main, ["report", str(path)])
    assert result.exit_code == 0, (result.output, result.exception)


@pytest.mark.slow
def test_extreme_values_are_shown_on_a_page_and_in_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [frames.reset(n, **fields) for n, fields in enumerate(EXTREMES.values(), start=1)]
    trace = frames.capture(tmp_path / "a.cwnd", resets=frames.table("cwnd_reset", *rows))
    path = trace.path
    monkeypatch.setattr(cwndtrace, "load", lambda *_, **__: trace)
    page, picture = tmp_path / "page.html", tmp_path / "a.png"
    for arguments in (["report", str(path), "--json"], ["report", str(path), "--html", str(page)]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        if "--json" in arguments:
            json.loads(result.stdout, parse_constant=pytest.fail)
    result = CliRunner().invoke(main, ["plot", str(path), "-o", str(picture)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert page.stat().st_size > 10_000
    assert picture.stat().st_size > 10_000


def test_extreme_values_pass_through_a_session() -> None:
    raw = b"".join(frames.reset(n, **fields).tobytes() for n, fields in enumerate(EXTREMES.values(), start=1))
    session = session_of(FakeSource([("cwnd_reset", raw)]))
    (batch,) = (batch for batch in session.step() if batch.event == "cwnd_reset")
    for row, fields in zip(batch.to_dicts(), EXTREMES.values(), strict=True):
        assert {name: row[name] for name in fields} == fields
