# SPDX-License-Identifier: Apache-2.0
"""Tests that a capture has exactly the resets that the sender's TCP_INFO shows, with the same windows.

They use the best probe of this kernel, and run in namespaces that they make.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from cwndtrace.capture.live import Kernel
from cwndtrace.capture.session import Batch
from cwndtrace.capture.source import Filters
from cwndtrace.capture.stream import open_session
from cwndtrace.errors import BccError, KernelLacks, NoProbe
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.scenario import PRESETS

pytestmark = pytest.mark.live


def test_the_capture_has_the_resets_that_tcp_info_shows() -> None:
    scenario = replace(PRESETS["quick"], bursts=(100_000, 1_000_000), idle_times=(0.1, 0.6), rounds=2)
    batches: list[Batch] = []
    with Lab(scenario) as lab:
        try:
            session = open_session(Filters(netns=lab.path.server.namespace.inode), block=False, connections=False)
        except (BccError, NoProbe) as e:
            pytest.skip(e.cause)
        with session:
            for _ in lab.rows():
                batches += session.step(0)
            batches += session.finish()
            assert isinstance(session.source, Kernel)
            assert session.tally.lost["cwnd_reset"] <= session.source.skipped()["cwnd_reset"]
        rows = lab.taken
    records = pd.concat([b.to_pandas() for b in batches if b.event == "cwnd_reset"])
    assert [row.reset for row in rows] == [row.setting == "on" and row.idle_s > 0.3 for row in rows]
    for row in rows:
        mine = records[(records["ts_ns"] >= row.start_ns) & (records["ts_ns"] <= row.end_ns)]
        assert len(mine) == row.reset, row
        if not row.reset:
            continue
        record = mine.iloc[0]
        assert record["sport"] == row.sport
        assert record["sock_cookie"] in (row.sock_cookie, 0)
        assert (record["cwnd_before"], record["cwnd_after"]) == (row.cwnd_before, row.cwnd_after)
        assert record["ssthresh_after"] == row.ssthresh_after or pd.isna(record["ssthresh_after"])
        # TCP_INFO has idle times in milliseconds, records in jiffies.
        assert abs(record["idle_us"] / 1e3 - row.idle_ms) < 12


def test_idle_time_by_a_slow_disk_is_covered_by_the_servers_block_io() -> None:
    batches: list[Batch] = []
    try:
        with Lab(replace(PRESETS["disk"], rounds=1)) as lab:
            server = lab.server.child.pid
            with open_session(Filters(), connections=False) as session:
                for _ in lab.rows():
                    batches += session.step(0)
                batches += session.finish()
            rows = lab.taken
    except (BccError, KernelLacks) as e:
        pytest.skip(e.cause)
    reads = pd.concat([b.to_pandas() for b in batches if b.event == "block_io"])
    mine = reads[(reads["tgid"] == server) & (reads["op"] == "read")]
    for row in rows:
        idle = mine[(mine["done_ns"] <= row.start_ns) & (mine["start_ns"] >= row.start_ns - (row.idle_s + 0.3) * 1e9)]
        covered = (idle["done_ns"] - idle["start_ns"]).sum() / 1e9
        assert covered > 0.8 * row.idle_s
        assert (idle["bytes"] == 4096).all()
