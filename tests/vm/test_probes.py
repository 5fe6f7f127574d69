# SPDX-License-Identifier: Apache-2.0
"""The rungs side by side on the same connections: what one sees the others see, field by field.

The traffic forces each reason: idle time for idle, a link that drops everything for rto_loss, and for app_limited one
that holds ACKs back.
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
from tests.harness.netem import drop_until_a_timeout, leave_unused
from tests.harness.tcp import Connect
from tests.harness.tracing import EXACT, Tracer

pytestmark = pytest.mark.vm

LONG = 0.6

# What a rung that sees the window only with the first packet under way can't tell as the others do.
LATE = {"bytes_sent", "unsent_bytes", "sock_cookie"}
ALWAYS = {"ts_ns", "time", "probe", "idle_us", "last_rcv_us"}
# Each probe reads the clock when it is its turn, and an emulated machine takes a while from one to the next.
TURN_US = 300_000


@pytest.fixture(scope="module", autouse=True)
def in_the_vm() -> None:
    """These tests need the kernels of this project."""
    if not KERNEL:
        pytest.skip("needs one of the project's kernels: make vm-test")


@pytest.fixture(scope="module")
def tracers() -> Iterator[dict[str, Tracer]]:
    """A tracer on every rung that sees idle resets here, all at the same time."""
    here = facts.ladder_facts(btf.Btf.running())
    made: dict[str, Tracer] = {}
    try:
        for rung in ladder.RUNGS:
            if ladder.lacks(here, rung, "idle") is None:
                made[rung.name] = Tracer(rung.name)
        yield made
    finally:
        for tracer in made.values():
            tracer.close()


@pytest.fixture(scope="module")
def traffic(tracers: dict[str, Tracer], space: tcp.Space, drain: tcp.Drain) -> dict[str, list[tcp.Connection]]:
    """Connections on which each reason was forced, by reason."""
    kinds: list[dict[str, Any]] = [
        {"ca": "cubic"},
        {"ca": "reno"},
        {"ca": "cubic", "address": "::1"},
        {"ca": "cubic", "mapped": True},
    ]
    made = {reason: [tcp.connect(space, drain, **kind) for kind in kinds] for reason in ladder.REASONS}
    for connection in made["idle"]:
        connection.grow()
    for connection in made["idle"]:
        connection.idle(LONG)
    for connection in made["idle"]:
        connection.send()
    for connection in made["app_limited"]:
        leave_unused(space, connection)
    for connection in made["rto_loss"]:
        connection.grow()
    drop_until_a_timeout(space, made["rto_loss"])
    for tracer in tracers.values():
        tracer.settle()
    return made


def records(tracer: Tracer, connections: list[tcp.Connection], reason: str) -> list[dict[str, Any]]:
    """By connection: of two timeouts at the same moment either may come to a tracer first."""
    found = [r for r in tracer.of(*connections) if r["reason"] == reason]
    return sorted(found, key=lambda r: (r["skaddr"], r["ts_ns"]))


@pytest.mark.parametrize("reason", ladder.REASONS)
def test_all_rungs_see_the_same(
    tracers: dict[str, Tracer], traffic: dict[str, list[tcp.Connection]], reason: str
) -> None:
    seen = {n: records(t, traffic[reason], reason) for n, t in tracers.items() if t.sees(reason)}
    print({name: len(found) for name, found in seen.items()})
    if not seen:
        assert not PATCHED
        pytest.skip(f"no rung of {KERNEL} sees {reason}: a kernel with kernel-patches/ does")
    first = next(iter(seen))
    assert first in EXACT
    assert len(seen[first]) >= len(traffic[reason])
    for name, found in seen.items():
        assert len(found) == len(seen[first]), f"{name} against {first}"
        for mine, its in zip(found, seen[first], strict=True):
            ignored = ALWAYS | (LATE if name not in EXACT else set())
            if name not in EXACT and reason == "rto_loss":
                # prior_ssthresh is what tcp_current_ssthresh() gave: three quarters of the window where that is more.
                ignored |= {"ssthresh_before"}
            differing = {k: (mine[k], its[k]) for k in mine if k not in ignored and mine[k] != its[k]}
            assert not differing, f"{name} against {first}: {differing}"
            apart = {k: mine[k] - its[k] for k in ("idle_us", "last_rcv_us")}
            apart["ts_ns"] = (mine["ts_ns"] - its["ts_ns"]) // 1000
            assert all(abs(us) < TURN_US for us in apart.values()), f"{name} against {first}: {apart}"


@pytest.fixture(scope="module")
def findings() -> Findings:
    """What doctor says of this kernel."""
    return examine()


def test_the_best_rung_is_chosen(findings: Findings) -> None:
    expected = {"idle": "tracepoint", "rto_loss": "tracepoint", "app_limited": "tracepoint"}
    if not PATCHED:
        expected = {"idle": "fentry", "rto_loss": "fentry"}
    probes = findings.probes
    assert probes is not None
    assert {reason: probes[reason] for reason in expected} == expected


def test_doctor_says_what_is_inlined(findings: Findings) -> None:
    here = facts.ladder_facts(btf.Btf.running())
    inlined = "tcp_cwnd_application_limited" not in here.functions
    said = {f.name: f.value for f in findings.facts}
    for rung in ("fentry", "kprobe"):
        assert ("tcp_cwnd_application_limited() is inlined" in said[f"probe {rung}"]) == inlined


def test_a_forced_rung_that_is_missing_is_refused() -> None:
    missing = "sendmsg" if KERNEL.startswith("6.12") else None
    if missing is None:
        pytest.skip("this kernel has every rung; the 6.12 ones lack sendmsg")
    with pytest.raises(NoProbe, match="tcp_sendmsg_locked"):
        Tracer(missing)


def test_the_connections_close(traffic: dict[str, list[tcp.Connection]], connect: Connect) -> None:
    # Last in this file: what was opened for all of it is closed here, and a new connection still works.
    for each in traffic.values():
        for connection in each:
            connection.close()
    assert connect().send().reason is None


def test_calls_that_a_kprobe_missed() -> None:
    """A tick that comes upon another kprobe's run: its own is skipped, which is counted."""
    if ladder.lacks(facts.ladder_facts(btf.Btf.running()), ladder.BY_NAME["kprobe"], "idle"):
        pytest.skip("needs the rung kprobe: tools/vm test 6.12-unpatched")
    kernel = Kernel(probe="kprobe", block=False, reasons=("idle",))
    try:
        (program,) = kernel._resets
        fd = program._loaded["kprobe_in"]
        links = [attach_kprobe(fd, function, False) for function in ("__x64_sys_getppid", "update_process_times")]
        program._kprobes += links

        def missed() -> bool:
            for _ in range(10_000):
                os.getppid()
            return kprobe_missed(links[1]) > 0

        tcp.until(missed, 120, "a tick in the midst of another kprobe's run")
        kernel.stop()
        assert kernel.counts().lost["cwnd_reset"] > 0
    finally:
        kernel.close()
