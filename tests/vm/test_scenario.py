# SPDX-License-Identifier: Apache-2.0
"""The story of ``reproduce --preset blog`` in short, over netem: as slow as told, and all of it in the capture."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pandas as pd
import pytest

from tests.live.test_reproduce import assert_opens, missing
from tests.live.test_run import call

pytestmark = pytest.mark.vm

KERNEL = os.environ.get("CWNDTRACE_VM", "")
# Of the preset's five minutes: no rest of 5 s, the two sizes that tell, twice each.
SHORT = ("--burst", "300k,1M", "--rest", "1s,2s", "--rounds", "2")


@pytest.mark.skipif(not KERNEL, reason="needs one of the project's kernels: make vm-test")
def test_a_long_path_by_netem(tmp_path: Path) -> None:
    done = call("reproduce", "--preset", "blog", *SHORT, "-o", tmp_path / "blog", seconds=1000)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "Path: RTT 200 ms, by netem (this kernel has netem).\n" in done.stderr
    rung = "fentry" if "unpatched" in KERNEL else "tracepoint"
    assert f"Tracing: idle by {rung}, " in done.stderr
    taken = pd.read_parquet(tmp_path / "blog" / "measurements.parquet")
    assert len(taken) == 2 * 2 * 2 * 2
    # Rests of more than one RTO, which is 400 ms here.
    assert list(taken["cwnd_after"] < taken["cwnd_before"]) == list(taken["setting"] == "on")
    long = taken[(taken["burst_bytes"] == 1_000_000) & (taken["rest_s"] == 2)]
    medians = long.groupby("setting")["latency_ms"].median()
    assert medians["on"] >= 2 * medians["off"]
    trace = assert_opens(tmp_path / "blog")
    assert missing(taken, trace.resets) == []
    assert set(trace.resets["probe"]) == {rung}
    assert re.search(r"^8 idle resets .*; 0 that TCP_INFO saw are missing", done.stdout, re.MULTILINE)
