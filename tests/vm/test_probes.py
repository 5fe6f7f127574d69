# SPDX-License-Identifier: Apache-2.0
"""Comparisons of all probes on the same connections: each record must be the same, field by field.

The traffic forces each reason: idle time causes idle, a link that drops all packets rto_loss, one that delays ACKs
app_limited, and one that drops a single packet tlp_loss.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from cwndtrace.capture.bpf_syscall import attach_kprobe, kprobe_missed
from cwndtrace.capture.live import Kernel
from cwndtrace.cli.doctor import Findings, examine
from cwndtrace.errors import NoProbe
from cwndtrace.kernel import btf, facts, ladder
from tests.harness import tcp
from tests.harness.guest import KERNEL, PATCHED
from tests.harness.netem import drop_until_a_timeout, leave_unused, repair_tails
from tests.harness.tcp import Connect
from tests.harness.tracing import EXACT, Tracer

pytestmark = pytest.mark.vm

LONG = 0.6

# These fields differ for a probe that sees the window only when the first packet is under way.
LATE = {"bytes_sent", "sock_cookie"}
ALWAYS = {"ts_ns", "time", "probe", "idle_us", "last_rcv_us"}
# The probes read the clock one after the other, and an emulated machine takes some time from one to the next.
TURN_US = 300_000


@pytest.fixture(scope="module", autouse=True)
def in_the_vm() -> None:
    """Skip the tests unless the kernel is one of the project's."""
    if not KERNEL:
        pytest.skip("needs one of the project's kernels: make vm-test")


@pytest.fixture(scope="module")
def tracers() -> Iterator[dict[str, Tracer]]:
    """Tracers with every probe that sees idle resets here, all at the same time."""
    here = facts.ladder_facts(btf.Btf.running())
    running: dict[str, Tracer] = {}
    try:
        for probe in ladder.PROBES:
            if ladder.lacks(here, probe, "idle") is None:
                running[probe.name] = Tracer(probe.name)
        yield running
    finally:
        for tracer in running.values():
            tracer.close()


@pytest.fixture(scope="module")
def traffic(tracers: dict[str, Tracer], space: tcp.Space, drain: tcp.Drain) -> dict[str, list[tcp.TcpConnection]]:
    """Connections by the reason that was forced on them."""
    kinds: list[dict[str, Any]] = [
        {"ca": "cubic"},
        {"ca": "reno"},
        {"ca": "cubic", "address": "::1"},
        {"ca": "cubic", "mapped": True},
    ]
    connections = {reason: [tcp.connect(space, drain, **kind) for kind in kinds] for reason in ladder.REASONS}
    for connection in connections["idle"]:
        connection.grow()
    for connection in connections["idle"]:
        connection.idle(LONG)
    for connection in connections["idle"]:
        connection.send()
    for connection in connections["app_limited"]:
        leave_unused(space, connection)
    for connection in connections["rto_loss"]:
        connection.grow()
    drop_until_a_timeout(space, connections["rto_loss"])
    for connection in connections["tlp_loss"]:
        connection.grow()
    repair_tails(space, connections["tlp_loss"])
    for tracer in tracers.values():
        tracer.settle()
    return connections


def records(tracer: Tracer, connections: list[tcp.TcpConnection], reason: str) -> list[dict[str, Any]]:
    """Return the records by connection, because two timeouts at the same moment may come in either order."""
    own = [r for r in tracer.of(*connections) if r["reason"] == reason]
    return sorted(own, key=lambda r: (r["skaddr"], r["ts_ns"]))


@pytest.mark.parametrize("reason", ladder.REASONS)
def test_all_probes_record_the_same_resets(
    tracers: dict[str, Tracer], traffic: dict[str, list[tcp.TcpConnection]], reason: str
) -> None:
    seen = {n: records(t, traffic[reason], reason) for n, t in tracers.items() if t.sees(reason)}
    print({name: len(rows) for name, rows in seen.items()})
    if not seen:
        assert not PATCHED
        pytest.skip(f"no probe of {KERNEL} sees {reason}: a kernel with kernel-patches/ does")
    first = next(iter(seen))
    assert first in EXACT
    assert len(seen[first]) >= len(traffic[reason])
    for name, rows in seen.items():
        assert len(rows) == len(seen[first]), f"{name} against {first}"
        for mine, its in zip(rows, seen[first], strict=True):
            ignored = ALWAYS | (LATE if name not in EXACT else set())
            if name not in EXACT and reason == "rto_loss":
                # prior_ssthresh comes from tcp_current_ssthresh(): at least three quarters of the window.
                ignored |= {"ssthresh_before"}
            differing = {k: (mine[k], its[k]) for k in mine if k not in ignored and mine[k] != its[k]}
            assert not differing, f"{name} against {first}: {differing}"
            gaps = {k: mine[k] - its[k] for k in ("idle_us", "last_rcv_us")}
            gaps["ts_ns"] = (mine["ts_ns"] - its["ts_ns"]) // 1000
            assert all(abs(us) < TURN_US for us in gaps.values()), f"{name} against {first}: {gaps}"


@pytest.fixture(scope="module")
def findings() -> Findings:
    """The findings of doctor on this kernel."""
    return examine()


def test_the_best_probe_is_chosen(findings: Findings) -> None:
    expected = dict.fromkeys(ladder.REASONS, "tracepoint")
    if not PATCHED:
        expected = dict.fromkeys(("idle", "rto_loss", "tlp_loss"), "fentry")
    probes = findings.probes
    assert probes is not None
    assert {reason: probes[reason] for reason in expected} == expected


def test_doctor_reports_an_inlined_function(findings: Findings) -> None:
    here = facts.ladder_facts(btf.Btf.running())
    inlined = "tcp_cwnd_application_limited" not in here.functions
    values = {f.name: f.value for f in findings.facts}
    for probe in ("fentry", "kprobe"):
        assert ("tcp_cwnd_application_limited() is inlined" in values[f"probe {probe}"]) == inlined


def test_a_requested_probe_that_is_missing_is_refused() -> None:
    missing = "sendmsg" if KERNEL.partition("-")[0] in ("6.1", "6.12") else None
    if missing is None:
        pytest.skip("this kernel has every probe; those before 6.16 lack sendmsg")
    with pytest.raises(NoProbe, match="tcp_sendmsg_locked"):
        Tracer(missing)


def test_a_new_connection_works_after_all_are_closed(
    traffic: dict[str, list[tcp.TcpConnection]], connect: Connect
) -> None:
    # This closes the connections of all tests above, so it comes after them.
    for connections in traffic.values():
        for connection in connections:
            connection.close()
    assert connect().send().reason is None


def test_calls_that_a_kprobe_missed_count_as_lost() -> None:
    """The kernel skips the kprobe of a timer tick that interrupts the run of another kprobe."""
    if ladder.lacks(facts.ladder_facts(btf.Btf.running()), ladder.BY_NAME["kprobe"], "idle"):
        pytest.skip("needs probe kprobe: tools/vm test 6.12-unpatched")
    kernel = Kernel(probe="kprobe", block=False, reasons=("idle",))
    try:
        (program,) = kernel._resets
        fd = program._loaded["kprobe_in_idle"]
        links = [attach_kprobe(fd, function, False) for function in ("__x64_sys_getppid", "update_process_times")]
        program._kprobes += links

        def missed() -> bool:
            for _ in range(10_000):
                os.getppid()
            return kprobe_missed(links[1]) > 0

        tcp.until(missed, 120, "a tick during another kprobe's run")
        kernel.stop()
        assert kernel.counts().lost["cwnd_reset"] > 0
    finally:
        kernel.close()
