# SPDX-License-Identifier: Apache-2.0
"""The running kernel as a source: what is built and attached for which probe, what is read, counted and left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cwndtrace import privileges
from cwndtrace.capture import bcc, live
from cwndtrace.capture.block_program import BLOCK_IO
from cwndtrace.capture.source import Filters
from cwndtrace.errors import CwndtraceError, KernelLacks, NoProbe
from cwndtrace.kernel import facts, ladder
from cwndtrace.records import layout
from tests.unit import frames

ALL = ladder.Facts(ladder.tracepoints(), frozenset(ladder.FUNCTIONS.values()), True)
BEFORE_BLOCK = 16
"""Bytes of a slab before its records."""


class BuiltProgram:
    """It stands for compiled programs in the kernel."""

    def __init__(self, machine: MadeMachine, source: Path, defines: dict[str, int]) -> None:
        self.machine, self.name, self.defines = machine, source.name.removesuffix(".bpf.c"), defines
        self.attached: list[ladder.Attachment] = []
        self.did: list[str] = []
        self.rings: dict[str, Callable[[bytes], None]] = {}
        self.ring_fds: list[int] = []
        self.entries: list[tuple[str, bytes]] = []
        self.maps: dict[str, list[bytes]] = {"followed": [], "slabs": []}
        self.counters = dict.fromkeys(
            ("lost", "lost_recoveries", "lost_samples", "unchanged", "withdrawn", "guessed"), 0
        )
        self.skips: dict[str, int] = {}
        self.keys: dict[str, set[int]] = {}
        self.room = 10
        self.behind = False

    def attach(self, attachments: tuple[ladder.Attachment, ...], _: object) -> None:
        if why := self.machine.refuses.get(self.name):
            raise KernelLacks(why)
        self.attached += [a for a in attachments if a not in self.attached]

    def open_ring(self, table: str, received: Callable[[bytes], None]) -> None:
        reading, writing = os.pipe()
        os.close(writing)
        self.machine.pipes.append(reading)
        self.ring_fds.append(reading)
        self.rings[table] = received

    def load(self, program: str) -> int:
        self.did.append(f"load {program}")
        return 1

    def offset(self, table: str, member: str) -> int:
        assert (table, member) == ("slabs", "rec")
        return BEFORE_BLOCK

    def consume(self, most: int) -> bool:
        assert most > 0
        while self.entries:
            table, raw = self.entries.pop(0)
            self.rings[table](raw)
        return self.behind

    def run_everywhere(self, program: str) -> None:
        self.did.append(program)

    def run_for_keys(self, program: str, table: str) -> None:
        self.did.append(f"{program} {table}")

    def each_cpu(self, table: str) -> list[bytes]:
        return self.maps[table]

    def values(self, table: str) -> list[bytes]:
        return self.maps[table]

    def totals(self) -> dict[str, int]:
        return dict(self.counters)

    def missed(self) -> dict[str, int]:
        self.did.append("missed")
        return self.skips

    def run_times(self) -> dict[str, tuple[int, int]]:
        return {"shared": (2, 30), self.name: (1, 5)}

    def sync_keys(self, table: str, keys: set[int]) -> int:
        self.keys[table] = keys
        return max(len(keys) - self.room, 0)

    def detach(self) -> None:
        self.did.append("detach")

    def close(self) -> None:
        self.did.append("close")


class MadeMachine:
    """A kernel: its facts, the programs that were built for it, and what it refuses, by program."""

    def __init__(self) -> None:
        self.built: list[BuiltProgram] = []
        self.refuses: dict[str, str] = {}
        self.pipes: list[int] = []
        self.cgroups: tuple[set[int], int] | None = ({5}, 0)
        self.sockets: set[int] | None = {7}
        self.has_rings = True
        self.asked: list[str] = []

    def build(self, source: Path, types: object, hz: int, defines: dict[str, int], _: object) -> BuiltProgram:
        assert (types, hz) == (self, 250)
        self.built.append(BuiltProgram(self, source, defines))
        return self.built[-1]

    def enumerator(self, enum: str, name: str) -> int | None:
        assert (enum, name) == ("bpf_map_type", "BPF_MAP_TYPE_RINGBUF")
        return 27 if self.has_rings else None

    def has_tracepoint(self, name: str) -> bool:
        return name in {a.target for a in BLOCK_IO.attachments} and "block" not in self.refuses

    def cgroup_ids(self) -> tuple[set[int], int] | None:
        self.asked.append("cgroups")
        return self.cgroups

    def pid_sockets(self) -> set[int] | None:
        self.asked.append("sockets")
        return self.sockets

    def program(self, name: str) -> BuiltProgram:
        (found,) = (each for each in self.built if each.name == name)
        return found


class HandTime:
    """The time that the source sees, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = MadeMachine()
    monkeypatch.setattr(live, "check_privileges", lambda: None)
    monkeypatch.setattr(bcc, "build", made.build)
    monkeypatch.setattr(live, "has_compare_and_swap", lambda: True)
    monkeypatch.setattr(facts, "hz", lambda: 250)
    monkeypatch.setattr(facts, "ladder_facts", lambda _: ALL)
    monkeypatch.setattr(facts, "check_sock_cgroups", lambda _: None)
    yield made
    for descriptor in made.pipes:
        os.close(descriptor)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandTime:
    made = HandTime()
    monkeypatch.setattr(live, "time", made)
    return made


def source(machine: MadeMachine, filters: Filters = live.NO_FILTERS, **options: Any) -> live.Kernel:
    return live.Kernel(filters, helper=machine, types=machine, **options)  # type: ignore[arg-type]


def test_the_best_probe_is_built_once_for_all_reasons(machine: MadeMachine) -> None:
    kernel = source(machine)
    assert kernel.probes == dict.fromkeys(ladder.REASONS, "tracepoint")
    assert [each.name for each in machine.built] == ["cwnd_reset_tracepoint", "block_io"]
    resets, block = machine.built
    assert resets.defines == {"RESET_PAGES": 1024, "WINDOWS": 65536, "REASONS": 0b1111} | {
        "REASONS": sum(1 << layout.code("reason", reason) for reason in ladder.REASONS)
    }
    wanted = {a for reason in ladder.REASONS for a in ladder.attachments(ALL, ladder.PROBES[0], reason)}
    assert set(resets.attached) == wanted
    assert list(resets.rings) == ["cwnd_resets", "cwnd_recoveries", "cwnd_samples"]
    assert block.defines["RING_PAGES"] == 2048
    assert (block.defines["CPUS"], block.defines["COMPARE_AND_SWAP"]) == (os.sysconf("SC_NPROCESSORS_CONF"), 1)
    assert (block.attached, block.did) == (list(BLOCK_IO.attachments), ["load hand_over"])
    assert kernel.events == ("cwnd_reset", "cwnd_recovery", "cwnd_sample", "block_io")
    assert (kernel.block_probe, kernel.lacking, kernel.exhausted()) == ("block_io_start", None, False)
    kernel.close()
    assert [each.did[-1] for each in machine.built] == ["close", "close"]


def test_filters_are_compiled_in(machine: MadeMachine) -> None:
    filters = Filters(ifindex=3, netns=4, pid=5, port=6, family=2, min_idle_us=0, unit="nginx.service")
    source(machine, filters).close()
    chosen = {name: value for name, value in machine.built[0].defines.items() if name.startswith("FILTER")}
    assert chosen == {
        "FILTER_IFINDEX": 3, "FILTER_NETNS": 4, "FILTER_PID": 5, "FILTER_PORT": 6, "FILTER_FAMILY": 2,
        "FILTER_MIN_IDLE_US": 0, "FILTER_CGROUP": 1,
    }  # fmt: skip
    assert machine.built[0].defines.items() & machine.built[1].defines.items() >= chosen.items()


def test_a_probe_that_is_refused_leaves_the_next(machine: MadeMachine) -> None:
    machine.refuses = {
        "cwnd_reset_tracepoint": "no",
        "cwnd_reset_fentry": "refused by this system's policy",
        "cwnd_reset_kprobe": "no",
    }
    kernel = source(machine, reasons=("idle", "rto_loss"), block=False)
    assert kernel.probes == {"idle": "sendmsg", "rto_loss": "sendmsg"}
    assert kernel.tried["idle"] == {
        "tracepoint": "no", "fentry": "refused by this system's policy", "kprobe": "no",
    }  # fmt: skip
    # What a policy refuses isn't tried again for another reason, and what was built in vain is closed.
    built = [each.name.removeprefix("cwnd_reset_") for each in machine.built]
    assert built == ["tracepoint", "fentry", "kprobe", "sendmsg", "tracepoint", "kprobe"]
    assert [each.did for each in machine.built if each.name != "cwnd_reset_sendmsg"] == [["close"]] * 5
    assert (kernel.events, kernel.block_probe) == (("cwnd_reset", "cwnd_recovery", "cwnd_sample"), None)
    kernel.close()


def test_the_last_probe_is_refreshed(machine: MadeMachine, clock: HandTime) -> None:
    kernel = source(machine, probe="tcp_probe", block=False)
    program = machine.program("cwnd_reset_tcp_probe")
    assert program.did == ["load refresh"]
    kernel.poll(0)
    assert program.did.count("refresh") == 1
    clock.now += 0.001
    kernel.poll(0.01)
    assert program.did.count("refresh") == 1
    clock.now += 5
    kernel.poll(0.01)
    assert program.did.count("refresh") == 2
    kernel.close()


def test_what_sendmsg_has_not_settled_is_settled_in_the_end(machine: MadeMachine) -> None:
    kernel = source(machine, probe="sendmsg", block=False)
    program = machine.program("cwnd_reset_sendmsg")
    assert program.did == ["load settle_last"]
    kernel.stop()
    assert program.did[-2:] == ["detach", "settle_last pending"]
    kernel.close()


REFUSED = {f"cwnd_reset_{probe.name}": "no" for probe in ladder.PROBES}


def test_without_a_probe_block_io_is_traced_alone_unless_something_else_was_asked_for(machine: MadeMachine) -> None:
    machine.refuses = dict(REFUSED)
    kernel = source(machine)
    assert set(kernel.probes.values()) == {None}
    assert kernel.lacking is not None
    assert kernel.lacking.startswith("no probe can see idle resets on this kernel: tracepoint: no; ")
    assert kernel.lacking.endswith("; block I/O is traced")
    kernel.close()
    for options in ({"block": False}, {"probe": "fentry"}):
        with pytest.raises(NoProbe):
            source(machine, **options)
    machine.refuses["block"] = "no tracepoints"
    with pytest.raises(NoProbe):
        source(machine)
    assert all(each.did[-1] == "close" for each in machine.built)


def test_without_block_io_the_rest_is_traced_unless_it_was_asked_for(machine: MadeMachine) -> None:
    machine.refuses = {"block_io": "tp_btf block_io_start: no"}
    kernel = source(machine)
    assert kernel.lacking == "tp_btf block_io_start: no; the rest is traced"
    assert "block_io" not in kernel.events
    assert machine.program("block_io").did == ["close"]
    kernel.close()
    with pytest.raises(KernelLacks, match="tp_btf block_io_start: no"):
        source(machine, block=True)
    assert all(each.did[-1] == "close" for each in machine.built)


def test_a_kernel_without_ring_buffers_is_refused(machine: MadeMachine) -> None:
    machine.has_rings = False
    with pytest.raises(KernelLacks, match="this kernel has no BPF ring buffer") as caught:
        source(machine)
    assert caught.value.remedy == "boot Linux 5.8 or newer"
    assert machine.built == []


def test_records_from_before_the_begin_are_left_out(machine: MadeMachine) -> None:
    kernel = source(machine)
    kernel.begin(frames.MONO + 10 * frames.SECOND)
    resets, block = machine.built
    early, late = frames.reset(9.9).tobytes(), frames.reset(10).tobytes()
    resets.entries = [
        ("cwnd_resets", early),
        ("cwnd_resets", late),
        ("cwnd_recoveries", frames.recovered(9, 2).tobytes()),
    ]
    resets.entries.append(("cwnd_recoveries", frames.recovered(11).tobytes()))
    rows = [frames.block(at) for at in (9, 10, 12)]
    slab = (3).to_bytes(4, "little") + bytes(BEFORE_BLOCK - 4) + np.concatenate(rows).tobytes() + bytes(500)
    block.entries = [("block_slabs", slab)]
    taken = kernel.poll(0)
    assert taken == [
        ("cwnd_reset", late), ("cwnd_recovery", frames.recovered(11).tobytes()),
        ("block_io", np.concatenate(rows[1:]).tobytes()),
    ]  # fmt: skip
    assert kernel.poll(0) == []
    kernel.close()


def test_counts_are_those_since_the_begin(machine: MadeMachine, clock: HandTime) -> None:
    kernel = source(machine)
    resets, block = machine.built
    resets.counters |= {"lost": 3, "unchanged": 10, "withdrawn": 4, "lost_samples": 1}
    block.counters |= {"lost": 2, "guessed": 5}
    kernel.begin(0)
    assert (kernel.counts().unchanged, kernel.counts().guessed, set(kernel.counts().lost.values())) == (0, 0, {0})
    resets.counters |= {"lost": 7, "lost_recoveries": 2, "lost_samples": 2, "unchanged": 11, "withdrawn": 6}
    block.counters |= {"lost": 10, "guessed": 8}
    counts = kernel.counts()
    assert counts.lost == {"cwnd_reset": 4, "cwnd_recovery": 2, "cwnd_sample": 1, "block_io": 8}
    assert (counts.unchanged, counts.withdrawn, counts.guessed) == (1, 2, 3)
    # Skipped runs are asked for once a second: each may have been a record.
    resets.skips, block.skips = {"on_reset": 5, "on_tcp_probe_follow": 6, "kprobe": 1}, {"on_io": 7}
    assert kernel.counts().lost["block_io"] == 8
    clock.now += 1.1
    assert kernel.counts().lost == {"cwnd_reset": 10, "cwnd_recovery": 2, "cwnd_sample": 7, "block_io": 15}
    assert kernel.run_times() == {"shared": (4, 60), "cwnd_reset_tracepoint": (1, 5), "block_io": (1, 5)}
    kernel.close()


def test_the_cgroups_and_sockets_to_trace_are_looked_up_again(machine: MadeMachine, clock: HandTime) -> None:
    kernel = source(machine, Filters(pid=9, cgroup=Path("/web")))
    resets, block = machine.built
    assert resets.keys == {"cgroups": {5}, "pid_sockets": {7}}
    assert block.keys == {"cgroups": {5}}
    machine.cgroups, machine.sockets = (set(range(12)), 3), set(range(11))
    kernel.poll(0)
    assert resets.keys["cgroups"] == {5}
    clock.now += 1.1
    kernel.poll(0)
    assert resets.keys == {"cgroups": set(range(12)), "pid_sockets": set(range(11))}
    # Two had no room, and three weren't looked at.
    assert kernel.counts().left_out == {"cgroups": 5, "sockets": 1}
    machine.cgroups, machine.sockets = None, {1}
    clock.now += 1.1
    kernel.poll(0)
    assert resets.keys == {"cgroups": set(range(12)), "pid_sockets": {1}}
    assert kernel.counts().left_out == {"cgroups": 5, "sockets": 1}
    kernel.close()


def test_lookups_take_at_most_a_tenth_of_the_time(
    machine: MadeMachine, clock: HandTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = machine.cgroup_ids

    def slow() -> tuple[set[int], int] | None:
        clock.now += 2
        return real()

    monkeypatch.setattr(machine, "cgroup_ids", slow)
    kernel = source(machine, Filters(cgroup=Path("/web")))
    for wait, asked in ((19.9, 1), (0.2, 2), (19.9, 2), (0.2, 3)):
        clock.now += wait
        kernel.poll(0)
        assert len(machine.asked) == asked
    kernel.close()


@pytest.mark.parametrize(
    ("filters", "asked"),
    [({}, []), ({"port": 443}, []), ({"pid": 9}, ["sockets"]), ({"unit": "nginx.service"}, ["cgroups"])],
)
def test_only_what_a_filter_needs_is_looked_up(machine: MadeMachine, filters: dict[str, Any], asked: list[str]) -> None:
    source(machine, Filters(**filters)).close()
    assert machine.asked == asked


@pytest.mark.parametrize("missing", ["cgroups", "sockets"])
def test_a_filter_that_would_let_nothing_through_is_an_error(machine: MadeMachine, missing: str) -> None:
    setattr(machine, missing, None)
    with pytest.raises(CwndtraceError, match="the helper process didn't list the sockets or cgroups to trace"):
        source(machine, Filters(pid=9, cgroup=Path("/web")))
    assert all(each.did[-1] == "close" for each in machine.built)


def test_all_is_read_up_to_the_tick_before_a_turn_that_empties_the_rings(machine: MadeMachine, clock: HandTime) -> None:
    kernel = source(machine)
    _, block = machine.built
    kernel.poll(0)
    assert kernel.read_ns == 1_000_000_000_000
    clock.now += 0.001  # too early for another tick, so that records of this moment may be in a CPU's buffer
    kernel.poll(0.01)
    assert kernel.read_ns == 1_000_000_000_000
    block.behind = True
    for _ in range(2):
        clock.now += 5
        kernel.poll(0.01)
        assert kernel.read_ns == 1_000_000_000_000
    block.behind = False
    kernel.poll(0.01)
    assert kernel.read_ns == 1_010_001_000_000
    kernel.close()


def test_the_end_hands_over_what_is_under_way(machine: MadeMachine, clock: HandTime) -> None:
    kernel = source(machine)
    kernel.begin(frames.MONO + 10 * frames.SECOND)
    resets, block = machine.built
    resets.entries = [("cwnd_resets", frames.reset(11).tobytes())]
    size = layout.event("cwnd_recovery").size
    followed = [frames.recovered(at).tobytes() + bytes(40) for at in (9, 12)]
    resets.maps["followed"] = followed
    block.maps["slabs"] = [(1).to_bytes(4, "little") + bytes(BEFORE_BLOCK - 4) + frames.block(12).tobytes(), bytes(200)]
    clock.now = 7777.0
    records = kernel.stop()
    assert [name for name, _ in records if _] == ["block_io", "cwnd_reset", "cwnd_recovery"]
    assert [each.did for each in (resets, block)][1][-2:] == ["detach", "hand_over"]
    assert "detach" in resets.did
    name, raw = records[-1]
    (row,) = layout.decode(name, raw)
    assert len(raw) == size
    assert (row["reset_ts_ns"], row["end_ts_ns"]) == (frames.MONO + 12 * frames.SECOND, 7_777_000_000_000)
    # The counts at the end are whole.
    resets.skips = {"on_reset": 9}
    assert kernel.counts().lost["cwnd_reset"] == 9
    kernel.close()


def test_everything_that_is_still_to_come_is_tried_with_fewer_capabilities(
    machine: MadeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = source(machine, probe="tcp_probe")
    tried: list[Any] = []

    def least(work: Callable[[], None], _: object, choices: Any) -> frozenset[int]:
        work()
        tried.extend(choices)
        return frozenset({39})

    monkeypatch.setattr(privileges, "least", least)
    assert kernel.capabilities_needed(None) == {39}
    assert tried == [set(), {39}, {39, 2}, {21, 2}]
    assert "hand_over" in machine.program("block_io").did
    assert "refresh" in machine.program("cwnd_reset_tcp_probe").did
    kernel.close()
