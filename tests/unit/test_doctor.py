# SPDX-License-Identifier: Apache-2.0
"""doctor tries each probe on a machine that the test makes, unloads it again, and says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from cwndtrace.capture import bcc, clocks, live, target
from cwndtrace.cli import doctor, main
from cwndtrace.cli.doctor import BAD, LACK, OK, Fact
from cwndtrace.errors import BccError, KernelLacks, NoProbe, PermissionNeeded
from cwndtrace.kernel import btf, facts, host, ladder, netns, permission
from cwndtrace.kernel.netns import Namespace
from tests.unit import frames

HERE, POD = Namespace(frames.NETNS, "this", Path("/a")), Namespace(7, "web[9]", Path("/b"))
POLICY = "fentry tcp_cwnd_restart: refused by this system's policy"
IDLE: dict[str, Any] = {
    "last_snd_us": 700_000,
    "rto_us": 300_000,
    "srtt_us": 100_000,
    "cwnd": 160,
    "bytes_sent": 900_000,
}


class Doctored:
    """A machine. ``refuses`` has the probes and reasons, or "block", that its kernel doesn't load, and why."""

    def __init__(self) -> None:
        stock = ladder.tracepoints() - {"tcp_cwnd_reset", "tcp_cwnd_reset_tp"}
        self.facts = ladder.Facts(stock, frozenset(ladder.FUNCTIONS.values()), True)
        self.refuses: dict[tuple[str, str] | str, str] = {}
        self.loaded: list[tuple[str | None, tuple[str, ...]]] = []
        self.closed = 0
        self.snapshots = [frames.snapshots(frames.snapshot(**IDLE)), frames.snapshots(frames.snapshot(**IDLE))]
        self.settings: dict[Namespace, int | None] = {HERE: 1, POD: 0}

    def kernel(self, *, reasons: Any, probe: str | None = None, block: bool | None = None, **_: Any) -> Any:
        self.loaded.append((probe, tuple(reasons)))
        if probe is None:
            if "block" in self.refuses:
                raise KernelLacks(self.refuses["block"], "trace without it")
            return SimpleNamespace(close=self.close, block_probe="block_io_start")
        assert block is False
        tried = {reason: {probe: why} if (why := self.refuses.get((probe, reason))) else {} for reason in reasons}
        if tried[reasons[0]]:
            raise NoProbe("no probe can see it", "", tried[reasons[0]])
        return SimpleNamespace(close=self.close, tried=tried)

    def close(self) -> None:
        self.closed += 1

    def snapshot(self, *_: object) -> Any:
        return self.snapshots.pop(0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Doctored:
    made = Doctored()
    monkeypatch.setattr(target, "need_root", lambda _: None)
    monkeypatch.setattr(host, "enter_cgroup_namespace", lambda: True)
    monkeypatch.setattr(host, "in_container", lambda: False)
    monkeypatch.setattr(clocks, "refuse_other_time", lambda: None)
    monkeypatch.setattr(live, "check_privileges", lambda: None)
    monkeypatch.setattr(live, "Kernel", made.kernel)
    monkeypatch.setattr(permission, "perf_events", lambda: (2, True))
    monkeypatch.setattr(btf.Btf, "running", lambda: "types")
    monkeypatch.setattr(bcc, "version", lambda: "0.26")
    monkeypatch.setattr(bcc, "module", lambda: SimpleNamespace(__file__="/dist/bcc/__init__.py"))
    for name, value in (("hz", 250), ("lockdown", "none"), ("tracefs_mounted", True)):
        monkeypatch.setattr(facts, name, lambda value=value: value)
    monkeypatch.setattr(facts, "ladder_facts", lambda _: made.facts)
    monkeypatch.setattr(doctor, "snapshot", made.snapshot)
    monkeypatch.setattr(netns, "all_reachable", lambda: iter(made.settings))
    monkeypatch.setattr(netns, "idle_sysctl", lambda namespace: made.settings[namespace])
    return made


def states(found: doctor.Findings) -> dict[str, str]:
    return {fact.name: fact.state for fact in found.facts}


def fact(found: doctor.Findings, name: str) -> Fact:
    (only,) = (fact for fact in found.facts if fact.name == name)
    return only


def test_everything_is_looked_at_and_nothing_stays_loaded(machine: Doctored) -> None:
    found = doctor.examine()
    assert states(found) == {
        "kernel": OK, "tracefs": OK, "lockdown": OK, "permission": OK, "perf_event_paranoid": OK, "BTF": OK, "bcc": OK,
        "probe tracepoint": LACK, "probe fentry": OK, "probe kprobe": OK, "probe sendmsg": OK, "probe tcp_probe": OK,
        "reason idle": OK, "reason rto_loss": OK, "reason app_limited": OK, "reason tlp_loss": OK, "block I/O": OK,
        "sysctl in this": OK, "sysctl in web[9]": OK, "congestion control": OK, "available controls": OK,
        "will be reset": LACK,
    }  # fmt: skip
    assert found.probes == dict.fromkeys(ladder.REASONS, "fentry")
    assert fact(found, "probe fentry").value == "sees idle, rto_loss, app_limited, tlp_loss (exact)"
    assert fact(found, "probe tracepoint") == Fact(
        "probe tracepoint", "this kernel has no tracepoint tcp_cwnd_reset", LACK,
        "boot a kernel built by kernel-patches/build",
    )  # fmt: skip
    assert fact(found, "bcc").value == "0.26 from /dist/bcc"
    assert fact(found, "block I/O").value == "timed from block_io_start on"
    assert fact(found, "congestion control").value.endswith("; in use: cubic by 1 connection")
    assert fact(found, "sysctl in this").value.endswith("= 1: windows are reset after idle time")
    assert fact(found, "sysctl in web[9]").value.endswith("= 0: no window is reset after idle time")
    assert found.block
    assert len(machine.loaded) == machine.closed == 5
    assert machine.loaded[0] == ("fentry", ladder.REASONS)


def test_connections_that_the_next_burst_resets_and_slow_ones_are_named(machine: Doctored) -> None:
    machine.snapshots[1] = frames.snapshots(
        frames.snapshot(**IDLE | {"bytes_sent": 900_040}), frames.snapshot(**IDLE | {"sock_cookie": 9, "netns_ino": 7})
    )
    found = doctor.examine()
    assert found.due["netns_ino"].tolist() == found.heartbeats["netns_ino"].tolist() == [frames.NETNS]
    assert fact(found, "will be reset").value.startswith(
        "10.1.0.1:443 > 10.2.0.9:51324 (replica[4242]): idle for 700 ms"
    )
    slow = fact(found, "slow messages")
    assert slow.value.startswith("10.1.0.1:443 > 10.2.0.9:51324 (replica[4242]): sent 40 B while it was watched")
    assert slow.state == LACK


def test_a_probe_is_tried_for_each_reason_and_the_best_one_that_works_is_named(machine: Doctored) -> None:
    machine.refuses = {("fentry", "idle"): POLICY, ("fentry", "app_limited"): "inlined", ("kprobe", "idle"): "no"}
    found = doctor.examine()
    assert found.probes == {
        "idle": "sendmsg", "rto_loss": "fentry", "app_limited": "kprobe", "tlp_loss": "fentry",
    }  # fmt: skip
    value = fact(found, "probe fentry").value
    assert value == f"sees rto_loss, tlp_loss (exact); idle: {POLICY}; app_limited: inlined"
    assert machine.loaded[:2] == [("fentry", ladder.REASONS), ("fentry", ladder.REASONS[1:])]


def test_without_idle_resets_nothing_is_promised(machine: Doctored) -> None:
    machine.facts = ladder.Facts(frozenset(), frozenset(), False)
    machine.refuses["block"] = "this kernel can't time block I/O"
    found = doctor.examine()
    assert found.probes is None
    assert not found.block
    assert fact(found, "block I/O") == Fact("block I/O", "this kernel can't time block I/O", LACK, "trace without it")
    assert fact(found, "probe fentry").value == "tcp_cwnd_restart() is inlined in this kernel"
    assert fact(found, "reason idle").value == "no probe sees it on this kernel"
    assert [probe for probe, _ in machine.loaded] == [None]


@pytest.mark.parametrize("missing", ["permission", "BTF", "bcc"])
def test_what_tracing_cannot_do_without_is_bad_and_the_rest_is_told(
    machine: Doctored, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def refuse() -> None:
        error = {"permission": PermissionNeeded, "BTF": KernelLacks, "bcc": BccError}[missing]
        raise error(f"no {missing}", f"get {missing}")

    place: tuple[Any, str] = {
        "permission": (live, "check_privileges"), "BTF": (btf.Btf, "running"), "bcc": (bcc, "version"),
    }[missing]  # fmt: skip
    monkeypatch.setattr(*place, refuse)
    found = doctor.examine()
    assert {name for name, state in states(found).items() if state == BAD} == {missing}
    assert fact(found, missing) == Fact(missing, f"no {missing}", BAD, f"get {missing}")
    assert (found.probes, found.block, machine.loaded) == (None, False, [])
    assert "sysctl in this" in states(found)
    assert not found.due.empty


@pytest.mark.parametrize(("refused", "status"), [({}, 0), ({(p.name, "idle"): "no" for p in ladder.PROBES}, 77)])
def test_the_exit_status_tells_whether_tracing_is_possible(
    machine: Doctored, refused: dict[tuple[str, str] | str, str], status: int
) -> None:
    machine.refuses = refused
    # By itself it would keep a help option without -h, which main gives it.
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == status, result.output
    printed = json.loads(result.stdout)
    assert printed["probes"] == (None if status else dict.fromkeys(ladder.REASONS, "fentry"))
    assert pd.DataFrame(printed["due"])["cwnd_next"].tolist() == [40]
    assert printed["heartbeats"] == []
    assert {"name": "tracefs", "value": "mounted on /sys/kernel/tracing", "state": "ok", "remedy": ""} in printed[
        "facts"
    ]
