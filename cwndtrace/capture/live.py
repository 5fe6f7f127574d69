# SPDX-License-Identifier: Apache-2.0
"""The running kernel as a source of records: what is loaded and attached, its maps and its rings."""

from __future__ import annotations

import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from cwndtrace import privileges
from cwndtrace.capture import bcc
from cwndtrace.capture.bpf_syscall import try_map
from cwndtrace.capture.privsep import Helper
from cwndtrace.capture.program import Program
from cwndtrace.capture.source import TICK_SECONDS, Counts, Filters, RawRecords
from cwndtrace.errors import CwndtraceError, KernelLacks
from cwndtrace.kernel import btf, facts, ladder, permission
from cwndtrace.records.layout import bpf_dir, code, event


@dataclass(frozen=True)
class BlockProgram:
    """The BPF source that records block I/O, its programs and where they attach, and what it is compiled with."""

    source: Path
    attachments: tuple[ladder.Attachment, ...]
    defines: Mapping[str, int] = field(default_factory=dict)


BLOCK_IO: Final = BlockProgram(
    bpf_dir() / "block_io.bpf.c",
    (
        ladder.Attachment("tp_btf", "block_io_done", "on_block_io_done"),
        ladder.Attachment("tp_btf", "block_rq_error", "on_block_rq_error"),
        ladder.Attachment("tp_btf", "block_rq_issue", "on_block_rq_issue"),
        ladder.Attachment("tp_btf", "block_io_start", "on_block_io_start"),
    ),
)
_ASK: Final = "ask whoever set the policy that refuses it (lockdown, an LSM, a hypervisor)"
_HAND_OVER: Final = "hand_over"
_REFRESH: Final = "refresh"
# What using maps and programs that are loaded may take: nothing since 5.19, CAP_BPF before, if that is shut off.
_POWERS: Final = (
    frozenset[int](),
    frozenset({privileges.BPF}),
    frozenset({privileges.BPF, privileges.DAC_READ_SEARCH}),
    frozenset({privileges.SYS_ADMIN, privileges.DAC_READ_SEARCH}),
)
_RINGS: Final = {"cwnd_reset": "cwnd_resets", "cwnd_recovery": "cwnd_recoveries", "cwnd_sample": "cwnd_samples"}
NO_FILTERS: Final = Filters()
_RING_PAGES: Final = 2048
# 4 MiB: a reset of each of 10,000 connections at once.
_RESET_PAGES: Final = 1024
# Of connections, noted by the probe tcp_probe.
_WINDOWS: Final = 65536
_CPUS: Final = "SC_NPROCESSORS_CONF"
# What is new below a cgroup, and which sockets a process holds, is looked up again this often, and less often where
# that would take more than this share of the time.
REFRESH_SECONDS: Final = 1.0
_REFRESH_SHARE: Final = 0.1
_SETS: Final = {"cgroups": "cgroups", "pid_sockets": "sockets"}
"""The maps that a filter fills, and what people call what they hold."""


def _filter_defines(filters: Filters) -> dict[str, int]:
    chosen = {
        "FILTER_IFINDEX": filters.ifindex,
        "FILTER_NETNS": filters.netns,
        "FILTER_PID": filters.pid,
        "FILTER_PORT": filters.port,
        "FILTER_FAMILY": filters.family,
        "FILTER_MIN_IDLE_US": filters.min_idle_us,
        "FILTER_CGROUP": None if filters.cgroup is None else 1,
    }
    return {name: value for name, value in chosen.items() if value is not None}


@cache
def _began_at(name: str) -> int:
    """Where a record says when what it tells of began: of a window on its way back that is the reset."""
    fields = event(name).fields
    return next((f.offset for f in fields if f.name == "reset_ts_ns"), fields[0].offset)


def _cut_short(followed: list[tuple[int, Any]]) -> bytes:
    """Recoveries that the end of the trace cut short, as records."""
    records = np.zeros(len(followed), dtype=event("cwnd_recovery").dtype)
    records["end_ts_ns"] = time.monotonic_ns()
    records["outcome"] = code("outcome", "capture_end")
    for record, (skaddr, f) in zip(records, followed, strict=True):
        record["skaddr"], record["reset_ts_ns"], record["acks"] = skaddr, f["reset_ts_ns"], f["acks"]
        record["target"], record["cwnd_start"], record["cwnd_end"] = f["target"], f["cwnd_start"], f["cwnd"]
        record["sock_cookie"], record["netns_ino"], record["reason"] = f["sock_cookie"], f["netns_ino"], f["reason"]
    return records.tobytes()


def check_power() -> None:
    """Raise CwndtraceError, with cause and cure, where this process can't load programs."""
    permission.check()
    permission.check_files()
    try:
        try_map()
    except OSError as e:
        raise permission.refused() or KernelLacks(f"bpf(2) is refused: {e.strerror}", _ASK) from e


class Kernel:
    """The running kernel as a source of records (see source.Source).

    Loads and attaches on construction. Raises BccError, KernelLacks or NoProbe; nothing is left attached then.
    ``block`` says whether block I/O is traced as well, which ``block_program`` does; ``helper`` reads what other
    processes hold.
    """

    def __init__(
        self,
        filters: Filters = NO_FILTERS,
        *,
        probe: str | None = None,
        block: bool = True,
        reasons: Iterable[str] = ladder.REASONS,
        helper: Helper | None = None,
        block_program: BlockProgram = BLOCK_IO,
    ) -> None:
        check_power()
        self._filters = filters
        self._helper = helper or Helper(filters)
        self._btf = btf.Btf.running()
        if self._btf.enumerator("bpf_map_type", "BPF_MAP_TYPE_RINGBUF") is None:
            raise KernelLacks("this kernel has no BPF ring buffer", "boot Linux 5.8 or newer")
        self._hz = facts.hz()
        self._resets: list[Program] = []
        self._refused: dict[str, str] = {}
        self._refreshed_here: list[Program] = []
        self._block: Program | None = None
        self._slab_header = 0
        self._read_so_far: list[RawRecords] = []
        self._epoll = select.epoll()
        self._refresh_at = self._ticked = 0.0
        self._left_out: dict[str, int] = {}
        self._begin_ns = 0
        self._before = Counts()
        self._missed = Counter[str]()
        self._missed_at = float("-inf")
        self._stopped = False
        try:
            chosen = ladder.choose(facts.ladder_facts(self._btf), self._try, probe, reasons)
            self.probes, self.tried = chosen.probes, chosen.tried
            if block:
                self._block = self._load_block(block_program)
            self._refresh_sets()
        except BaseException:
            self.close()
            raise
        finally:
            del self._btf  # some 15 MB
        self.events: tuple[str, ...] = (*_RINGS, *(("block_io",) if block else ()))

    def _try(self, probe: str, reason: str) -> str | None:
        if probe in self._refused:
            return self._refused[probe]
        sizes = {"RESET_PAGES": _RESET_PAGES, "WINDOWS": _WINDOWS}
        defines = _filter_defines(self._filters) | {"REASON": code("reason", reason)} | sizes
        defines["PROBE"] = code("probe", probe)
        attachments = ladder.BY_NAME[probe].attachments[reason]
        by_state = any(a.target == "tcp_cong_state_set" for a in attachments)
        source = bpf_dir() / f"cwnd_reset_{'cong_state' if by_state else probe}.bpf.c"
        program = None
        try:
            program = bcc.build(source, self._btf, self._hz, defines)
            program.attach(attachments, self._btf)
            for name, table in _RINGS.items():
                self._open(program, table, partial(self._record, name))
        except KernelLacks as e:
            if program is not None:
                program.close()
            if "policy" in e.cause:
                self._refused[probe] = e.cause
            return e.cause
        self._resets.append(program)
        if (probe, reason) == ("tcp_probe", "idle"):
            program.load(_REFRESH)
            self._refreshed_here.append(program)
        return None

    def _load_block(self, block: BlockProgram) -> Program:
        lacking = [a.target for a in block.attachments if not self._btf.has_tracepoint(a.target)]
        if lacking:
            raise KernelLacks(
                f"this kernel can't time block I/O: no tracepoint {lacking[0]} (Linux 6.5 has it)",
                "trace without block I/O: --no-block",
            )
        sizes = {"RING_PAGES": _RING_PAGES, "CPUS": os.sysconf(_CPUS)}
        defines = _filter_defines(self._filters) | sizes | dict(block.defines)
        program = bcc.build(block.source, self._btf, self._hz, defines)
        self._slab_header = program.offset("slabs", "rec")
        self._open(program, "block_slabs", self._slab)
        try:
            program.attach(block.attachments, self._btf)
            program.load(_HAND_OVER)
        except BaseException:
            program.close()
            raise
        return program

    def _open(self, program: Program, table: str, received: Callable[[bytes], None]) -> None:
        program.open_ring(table, received)
        # By edge: data that nobody was woken for (block I/O: submit() in bpf/block_io.bpf.c) must not end a wait.
        self._epoll.register(program.ring_fds[-1], select.EPOLLIN | select.EPOLLET)

    def begin(self, mono_ns: int) -> None:
        """Give and count nothing that began before: programs are attached one after the other, which takes seconds."""
        self._before = self.counts()
        self._begin_ns = mono_ns

    def _record(self, name: str, raw: bytes) -> None:
        at = _began_at(name)
        if int.from_bytes(raw[at : at + 8], sys.byteorder) >= self._begin_ns:
            self._read_so_far.append((name, raw))

    def _slab(self, raw: bytes) -> None:
        count = int.from_bytes(raw[:4], sys.byteorder)
        rows = np.frombuffer(raw, event("block_io").dtype, count, self._slab_header)
        late = rows["start_ns"] >= self._begin_ns
        self._read_so_far.append(("block_io", (rows if late.all() else rows[late]).tobytes()))

    def _programs(self) -> list[Program]:
        return [*self._resets, *([self._block] if self._block else [])]

    def _refresh_sets(self) -> None:
        begin = time.monotonic()
        cgroups = (set(), 0) if self._filters.cgroup is None else self._helper.cgroup_ids()
        inodes = set() if self._filters.pid is None else self._helper.pid_sockets()
        if not self._refresh_at and (cgroups is None or inodes is None):
            # Without them it would see nothing, or not all.
            raise CwndtraceError("what is to be traced can't be found: its finder was ended", "start once more")
        if self._filters.cgroup is not None and cgroups is not None:
            self._hold(self._programs(), "cgroups", *cgroups)
        if self._filters.pid is not None and inodes is not None:
            self._hold(self._resets, "pid_sockets", inodes, 0)
        end = time.monotonic()
        # Whoever is traced decides how much there is to look at.
        self._refresh_at = end + max(REFRESH_SECONDS, (end - begin) / _REFRESH_SHARE)

    def _hold(self, programs: list[Program], table: str, keys: set[int], unseen: int) -> None:
        lacking = unseen + max((program.sync_keys(table, keys) for program in programs), default=0)
        kind = _SETS[table]
        if lacking > self._left_out.get(kind, 0):
            self._left_out[kind] = lacking

    def power_needed(self, user: privileges.User | None) -> frozenset[int]:
        """The least capabilities with which ``user`` can go on tracing, found by trying."""
        return privileges.least(self._use_all, user, _POWERS)

    def _use_all(self) -> None:
        """Each kind of system call that is still to come; what comes in is kept."""
        self.counts()
        self._refresh_sets()
        for program in self._resets:
            program.rows("followed")
        if self._block is not None:
            self._block.run_everywhere(_HAND_OVER)
        for program in self._refreshed_here:
            program.run_everywhere(_REFRESH)

    def poll(self, timeout_s: float) -> list[RawRecords]:
        """What came in, waiting at most ``timeout_s`` seconds for the first of it."""
        self._epoll.poll(timeout_s)
        now = time.monotonic()
        if now > self._refresh_at:
            self._refresh_sets()
        # Not each time: resets may end a thousand waits a second, and this goes to every CPU.
        if now - self._ticked >= min(timeout_s, TICK_SECONDS):
            self._ticked = now
            if self._block is not None:
                self._block.run_everywhere(_HAND_OVER)
            for program in self._refreshed_here:
                program.run_everywhere(_REFRESH)
        return self._take()

    def _take(self) -> list[RawRecords]:
        for program in self._programs():
            program.consume()
        taken, self._read_so_far = self._read_so_far, []
        return taken

    def counts(self) -> Counts:
        """The counters now; runs that the kernel skipped count as lost, since each may have been a record."""
        counts = Counts(left_out=self._left_out.copy())
        # The kernel is asked for each program, which at each turn would be much of what an idle trace takes.
        if time.monotonic() - self._missed_at > REFRESH_SECONDS or self._stopped:
            self._missed_at = time.monotonic()
            self._missed = self.skipped()
        lost = self._missed.copy()
        for program in self._resets:
            total = program.totals()
            lost.update(
                cwnd_reset=total["lost"], cwnd_recovery=total["lost_recoveries"], cwnd_sample=total["lost_samples"]
            )
            counts.unchanged += total["unchanged"]
            counts.withdrawn += total["withdrawn"]
        if self._block is not None:
            lost["block_io"] += self._block.totals()["lost"]
        counts.lost = {name: lost[name] - self._before.lost.get(name, 0) for name in self.events}
        counts.unchanged -= self._before.unchanged
        counts.withdrawn -= self._before.withdrawn
        return counts

    def skipped(self) -> Counter[str]:
        """Runs that the kernel skipped, by the event of which each may have been a record (see Program.missed)."""
        skipped: Counter[str] = Counter()
        for program in self._programs():
            for name, runs in program.missed().items():
                # One that only follows windows makes no record of a reset.
                table = "cwnd_sample" if name.endswith("_follow") else "cwnd_reset"
                skipped["block_io" if program is self._block else table] += runs
        return skipped

    def run_times(self) -> dict[str, tuple[int, int]]:
        """Runs and nanoseconds by program (see Program.run_times); those of one name are added up."""
        total: dict[str, tuple[int, int]] = {}
        for program in self._programs():
            for name, (runs, spent) in program.run_times().items():
                before = total.get(name, (0, 0))
                total[name] = (before[0] + runs, before[1] + spent)
        return total

    def exhausted(self) -> bool:
        """Never: a kernel goes on."""
        return False

    def stop(self) -> list[RawRecords]:
        """Detach and return what was still under way."""
        for program in self._programs():
            program.detach()
        self._stopped = True
        if self._block is not None:
            self._block.run_everywhere(_HAND_OVER)
            # Nothing writes there any more. Only a CPU that went offline, where nothing can be run, still has some.
            for slab in self._block.each_cpu("slabs"):
                self._slab(slab)
        found = self._take()
        rows = (row for program in self._resets for row in program.rows("followed"))
        unfinished = [(sk, f) for sk, f in rows if f["reset_ts_ns"] >= self._begin_ns]
        return [*found, ("cwnd_recovery", _cut_short(unfinished))]

    def close(self) -> None:
        """Detach and free everything; the counters are gone."""
        for program in self._programs():
            program.close()
        self._epoll.close()
