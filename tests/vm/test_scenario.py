# SPDX-License-Identifier: Apache-2.0
"""Tests of whole experiments that need netem or the tracepoint; tests/live has the others.

They don't run the commands, whose pictures tests/live checks, because drawing text takes minutes under software
emulation.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import cwndtrace
from cwndtrace.capture.source import Filters
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.measurement import frame
from cwndtrace.lab.recording import Recording, costs
from cwndtrace.lab.scenario import PRESETS
from tests.harness import tcp
from tests.harness.guest import KERNEL, PATCHED
from tests.harness.lab import unrecorded
from tests.harness.netem import leave_unused
from tests.harness.tcp import Connect

pytestmark = pytest.mark.vm

# The whole preset takes five minutes. These two sizes and this idle time show the cost, with two rounds each.
SHORT = PRESETS["blog"].changed(bursts=(300_000, 1_000_000), idle_times=(2.0,), rounds=2)


@pytest.mark.skipif(not KERNEL, reason="needs one of the project's kernels: make vm-test")
def test_a_long_path_by_netem_is_slow_and_all_resets_are_in_the_capture(tmp_path: Path) -> None:
    """This is a short form of ``reproduce --preset blog``."""
    with Lab(SHORT) as lab:
        assert (lab.path.kind, lab.path.why) == ("netem", "this kernel has netem")
        filters = Filters(netns=lab.path.server.namespace.inode)
        with Recording(tmp_path / "blog.cwnd", filters, cwndtrace.__version__) as recording:
            taken = frame(list(lab.rows()))
        trace = recording.trace()
    assert len(taken) == 2 * 2 * 2
    # Each idle time is longer than the RTO, which is 400 ms here.
    assert list(taken["cwnd_after"] < taken["cwnd_before"]) == list(taken["setting"] == "on")
    medians = taken[taken["burst_bytes"] == 1_000_000].groupby("setting")["latency_ms"].median()
    assert medians["on"] >= 2 * medians["off"]
    assert unrecorded(taken, trace.resets) == []
    assert set(trace.resets["probe"]) == {"tracepoint" if PATCHED else "fentry"}
    assert (trace.status, trace.warnings) == ("complete", [])
    priced = costs(taken, trace.resets, trace.recoveries)
    off_by = (priced["recorded_ms"] - priced["measured_ms"]).abs()
    assert len(priced) == 4
    # The median is compared, because an emulated machine may stall for a round trip.
    assert off_by.median() < SHORT.link.rtt_ms / 2


@pytest.mark.skipif(not PATCHED, reason="needs a kernel with kernel-patches/: make vm-test")
def test_an_unused_window_that_decays_is_harmless(tmp_path: Path, space: tcp.Space, connect: Connect) -> None:
    """The kernel takes back half of the window's unused part, which costs the application nothing."""
    with Recording(tmp_path / "a.cwnd", Filters(netns=space.inode), cwndtrace.__version__) as recording:
        connection = connect()
        leave_unused(space, connection)
        for _ in range(5):
            connection.send()
            connection.quiet()
    judged = recording.trace().verdicts
    (last,) = judged[judged["reason"] == "app_limited"].tail(1).to_dict("records")
    assert (last["probe"], last["lost_us"]) == ("tracepoint", 0)
    # The last piece may have been sent just before the window fell, and then no ACK shows what waited.
    assert last["verdict"] in ("nothing_waited", "burst_fits", "nothing_sent")
