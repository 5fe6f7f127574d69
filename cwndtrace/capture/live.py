# SPDX-License-Identifier: Apache-2.0
"""Traces the running kernel: loads and attaches the programs, and reads their maps and ring buffers."""

from __future__ import annotations

import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Final

import numpy as np

from cwndtrace import privileges
from cwndtrace.capture import bcc
from cwndtrace.capture.block_program import RING_PAGES, BlockProgram, choose, spare_pages
from cwndtrace.capture.bpf_syscall import has_compare_and_swap, try_map
from cwndtrace.capture.privsep import Helper
from cwndtrace.capture.program import Program
from cwndtrace.capture.source import IDLE_TICK_SECONDS, TICK_SECONDS, Counts, Filters, RawRecords
from cwndtrace.errors import CwndtraceError, KernelLacks, NoProbe
from cwndtrace.kernel import btf, facts, ladder, memory, permission
from cwndtrace.records.layout import bpf_dir, code, event

_POLICY_REMEDY: Final = "ask whoever set the policy that refuses it (lockdown, an LSM, a hypervisor)"
_HAND_OVER: Final = "hand_over"
_REFRESH: Final = "refresh"
_SETTLE: Final = "settle_last"
# Capabilities for using maps and programs that are already loaded, fewest first. Linux 5.19 and later need none; older
# kernels need CAP_BPF where unprivileged bpf(2) is disabled.
_CAPABILITY_CHOICES: Final = (
    frozenset[int](),
    frozenset({privileges.BPF}),
    frozenset({privileges.BPF, privileges.DAC_READ_SEARCH}),
    frozenset({privileges.SYS_ADMIN, privileges.DAC_READ_SEARCH}),
)
_RINGS: Final = {"cwnd_reset": "cwnd_resets", "cwnd_recovery": "cwnd_recoveries", "cwnd_sample": "cwnd_samples"}
NO_FILTERS: Final = Filters()
# 4 MiB in pages of 4 KiB (see RING_PAGES), room for one reset of each of 10,000 connections at once.
_RESET_PAGES: Final = 1024
# A full ring of any size is read in such pieces, in bytes, because rows in memory take three times their size.
_TURN: Final = 8 << 20
# The number of connections whose windows the probe tcp_probe can note.
_WINDOWS: Final = 65536
_CPUS: Final = "SC_NPROCESSORS_CONF"
# The cgroups below a traced one and the sockets of a traced process are looked up this often, and less often where the
# lookups would take more than _REFRESH_SHARE of the time.
REFRESH_SECONDS: Final = 1.0
_REFRESH_SHARE: Final = 0.1
_SETS: Final = {"cgroups": "cgroups", "pid_sockets": "sockets"}
"""The maps that a filter fills, and the users' name for their entries, as in ``Counts.left_out``."""


def _filter_defines(filters: Filters) -> dict[str, int]:
    chosen = {
        "FILTER_IFINDEX": filters.ifindex,
        "FILTER_NETNS": filters.netns,
        "FILTER_PID": filters.pid,
        "FILTER_PORT": filters.port,
        "FILTER_FAMILY": filters.family,
        "FILTER_MIN_IDLE_US": filters.min_idle_us,
        "FILTER_CGROUP": 1 if filters.by_cgroup else None,
    }
    return {name: value for name, value in chosen.items() if value is not None}


@cache
def _start_offset(name: str) -> int:
    """Return the offset of a record's start time. A recovery or a sample starts with its reset."""
    fields = event(name).fields
    return next((f.offset for f in fields if f.name == "reset_ts_ns"), fields[0].offset)


def _unfinished_records(followed: list[bytes]) -> bytes:
    """Return records of the recoveries that the end of the trace cuts short, from values of the map ``followed``."""
    kind = event("cwnd_recovery").dtype
    records = np.frombuffer(bytearray(b"".join(entry[: kind.itemsize] for entry in followed)), kind)
    records["end_ts_ns"] = time.monotonic_ns()
    return records.tobytes()


def check_privileges() -> None:
    """Raise CwndtraceError, with cause and remedy, where this process can't load programs."""
    permission.check()
    permission.check_files()
    try:
        try_map()
    except OSError as e:
        raise permission.refused() or KernelLacks(f"bpf(2) is refused: {e.strerror}", _POLICY_REMEDY) from e


class Kernel:
    """The running kernel as a source of records (see source.Source).

    The constructor loads and attaches the programs. It raises BccError, KernelLacks, NoProbe or the errors of
    ``check_privileges``, and leaves nothing attached then. ``block_program`` (default: the best for this kernel) traces
    block I/O: with ``block`` None if it can, with True in any case. Where no probe sees resets, block I/O is traced
    alone, unless ``probe`` or ``block`` asks for something else. ``helper`` looks up the sockets and cgroups that the
    filters name. ``types`` are the running kernel's, if they have been read already. ``announce`` is told what is
    being done if that takes more than a second.
    """

    def __init__(
        self,
        filters: Filters = NO_FILTERS,
        *,
        probe: str | None = None,
        block: bool | None = None,
        reasons: Iterable[str] = ladder.REASONS,
        helper: Helper | None = None,
        block_program: BlockProgram | None = None,
        types: btf.Btf | None = None,
        announce: Callable[[str], None] = bcc.silent,
    ) -> None:
        check_privileges()
        self._filters = filters
        self._helper = helper or Helper(filters)
        self._announce = announce
        self._btf = types or btf.Btf.running()
        if self._btf.enumerator("bpf_map_type", "BPF_MAP_TYPE_RINGBUF") is None:
            raise KernelLacks("this kernel has no BPF ring buffer", "boot Linux 5.8 or newer")
        if filters.by_cgroup:
            facts.check_sock_cgroups(self._btf)
        self._hz = facts.hz()
        self._resets: list[Program] = []
        self._of_probe: dict[str, Program] = {}
        self._refused: dict[str, str] = {}
        self.events: tuple[str, ...] = tuple(_RINGS)
        self.block_probe: str | None = None
        self.lacking: str | None = None
        self.longest_tick_s = IDLE_TICK_SECONDS
        self.read_ns = 0
        self._refreshed_here: list[Program] = []
        self._settled_last: list[Program] = []
        self._block: Program | None = None
        self._slab_header = 0
        self._read_so_far: list[RawRecords] = []
        self._behind = False
        self._epoll = select.epoll()
        self._refresh_at = self._ticked = 0.0
        self._left_out: dict[str, int] = {}
        self._begin_ns = 0
        self._before = Counts()
        self._missed = Counter[str]()
        self._missed_at = float("-inf")
        self._stopped = False
        try:
            self._facts = facts.ladder_facts(self._btf)
            self._reasons = tuple(reasons)
            chosen = ladder.choose(self._facts, self._try, probe, self._reasons)
            self.probes, self.tried = chosen.probes, chosen.tried
            unseen = chosen.unseen()
            if unseen is not None and (block is False or probe is not None):
                raise unseen
            if block is not False:
                self._begin_block(block_program, unseen, needed=block or unseen is not None or not self.probes)
            self._refresh_sets()
        except BaseException:
            self.close()
            raise
        finally:
            del self._btf  # frees some 15 MB

    def _try(self, probe: str, reason: str) -> str | None:
        if probe in self._refused:
            return self._refused[probe]
        attachments = ladder.attachments(self._facts, ladder.BY_NAME[probe], reason)
        program = self._of_probe.get(probe)
        try:
            if program is None:
                program = self._build(probe)
            program.attach(attachments, self._btf)
            if probe not in self._of_probe:
                for name, table in _RINGS.items():
                    self._open(program, table, partial(self._record, name))
        except KernelLacks as e:
            if program is not None and probe not in self._of_probe:
                program.close()
            if "policy" in e.cause:
                self._refused[probe] = e.cause
            return e.cause
        if probe not in self._of_probe:
            self._of_probe[probe] = program
            self._resets.append(program)
        if (probe, reason) == ("tcp_probe", "idle"):
            program.load(_REFRESH)
            self._refreshed_here.append(program)
            self.longest_tick_s = TICK_SECONDS
        if (probe, reason) == ("sendmsg", "idle"):
            program.load(_SETTLE)
            self._settled_last.append(program)
        return None

    def _build(self, probe: str) -> Program:
        """Return a probe's programs, for all reasons: compiling takes longer than all else."""
        defines = _filter_defines(self._filters) | {"RESET_PAGES": _RESET_PAGES, "WINDOWS": _WINDOWS}
        if probe == "tracepoint":
            defines["REASONS"] = sum(1 << code("reason", reason) for reason in self._reasons)
        source = bpf_dir() / f"cwnd_reset_{probe}.bpf.c"
        return bcc.build(source, self._btf, self._hz, defines, self._announce)

    def _begin_block(self, program: BlockProgram | None, unseen: NoProbe | None, *, needed: bool) -> None:
        """Load the block program, or set ``lacking``. ``unseen`` is the error if no reset can be seen either."""
        try:
            chosen = program or choose(self._btf)
            self._block = self._load_block(chosen)
        except KernelLacks as e:
            if needed:
                raise unseen or e from e
            self.lacking = f"{e.cause}; the rest is traced"
        else:
            self.block_probe, self.events = chosen.name, (*self.events, "block_io")
            if unseen is not None:
                self.lacking = f"{unseen.cause}; block I/O is traced"

    def _load_block(self, block: BlockProgram) -> Program:
        sizes = {"RING_PAGES": RING_PAGES, "CPUS": os.sysconf(_CPUS)}
        if spare := spare_pages(memory.limit()):
            sizes["SPARE_PAGES"] = spare
        defines = _filter_defines(self._filters) | sizes | dict(block.defines)
        if has_compare_and_swap():
            defines["COMPARE_AND_SWAP"] = 1
        program = bcc.build(block.source, self._btf, self._hz, defines, self._announce)
        self._slab_header = program.offset("slabs", "rec")
        self._open(program, "block_slabs", self._slab)
        if spare:
            self._open(program, "spare_slabs", self._slab)
        try:
            program.attach(block.attachments, self._btf)
            program.load(_HAND_OVER)
        except BaseException:
            program.close()
            raise
        return program

    def _open(self, program: Program, table: str, received: Callable[[bytes], None]) -> None:
        program.open_ring(table, received)
        # Edge-triggered, so that data written without a wakeup (submit() in bpf/block.h) doesn't end a wait.
        self._epoll.register(program.ring_fds[-1], select.EPOLLIN | select.EPOLLET)

    def begin(self, mono_ns: int) -> None:
        """Leave out records that began before ``mono_ns``, and counts from before this call.

        The programs are attached one after the other, which takes seconds.
        """
        self._before = self.counts()
        self._begin_ns = mono_ns

    def _record(self, name: str, raw: bytes) -> None:
        at = _start_offset(name)
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
        cgroups = self._helper.cgroup_ids() if self._filters.by_cgroup else (set(), 0)
        inodes = set() if self._filters.pid is None else self._helper.pid_sockets()
        if not self._refresh_at and (cgroups is None or inodes is None):
            # The filters would let through nothing, or only a part.
            cause = "the helper process didn't list the sockets or cgroups to trace"
            raise CwndtraceError(cause, "run the command again")
        if self._filters.by_cgroup and cgroups is not None:
            self._sync_set(self._programs(), "cgroups", *cgroups)
        if self._filters.pid is not None and inodes is not None:
            self._sync_set(self._resets, "pid_sockets", inodes, 0)
        end = time.monotonic()
        # The traced processes decide how much there is to look up, so the interval grows with it.
        self._refresh_at = end + max(REFRESH_SECONDS, (end - begin) / _REFRESH_SHARE)

    def _sync_set(self, programs: list[Program], table: str, keys: set[int], unseen: int) -> None:
        left_out = unseen + max((program.sync_keys(table, keys) for program in programs), default=0)
        name = _SETS[table]
        if left_out > self._left_out.get(name, 0):
            self._left_out[name] = left_out

    def capabilities_needed(self, user: privileges.User | None) -> frozenset[int]:
        """Return the fewest capabilities with which ``user`` can go on tracing, found by trying them in turn."""
        return privileges.least(self._use_all, user, _CAPABILITY_CHOICES)

    def _use_all(self) -> None:
        """Make each kind of system call that is still to come. Records that arrive stay in the ring buffers."""
        self.counts()
        self._refresh_sets()
        for program in self._resets:
            program.values("followed")
        if self._block is not None:
            self._block.run_everywhere(_HAND_OVER)
        for program in self._refreshed_here:
            program.run_everywhere(_REFRESH)
        for program in self._settled_last:
            program.run_for_keys(_SETTLE, "pending")

    def poll(self, timeout_s: float) -> list[RawRecords]:
        """Return the records that came in, after waiting at most ``timeout_s`` seconds for the first."""
        self._epoll.poll(0 if self._behind else timeout_s)
        now = time.monotonic()
        if now > self._refresh_at:
            self._refresh_sets()
        # Resets may end a thousand waits a second, and this runs on every CPU, so it is rate-limited.
        if now - self._ticked >= min(timeout_s, TICK_SECONDS):
            self._ticked = now
            if self._block is not None:
                self._block.run_everywhere(_HAND_OVER)
            for program in self._refreshed_here:
                program.run_everywhere(_REFRESH)
        return self._take()

    def _take(self) -> list[RawRecords]:
        """Return what came in, in one turn, and set ``_behind`` where that wasn't all."""
        self._behind = False
        for program in self._programs():
            self._behind |= program.consume(_TURN)
        if not self._behind:
            self.read_ns = int(self._ticked * 1e9)  # later records may still be in a CPU's buffer
        taken, self._read_so_far = self._read_so_far, []
        return taken

    def counts(self) -> Counts:
        """Return the counters. Runs that the kernel skipped count as lost, since each may have been a record."""
        counts = Counts(left_out=self._left_out.copy())
        # This makes a system call for each program. At every turn, it would be much of an idle trace's CPU time.
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
            total = self._block.totals()
            lost["block_io"] += total["lost"]
            counts.guessed = total["guessed"] - self._before.guessed
        counts.lost = {name: lost[name] - self._before.lost.get(name, 0) for name in self.events}
        counts.unchanged -= self._before.unchanged
        counts.withdrawn -= self._before.withdrawn
        return counts

    def skipped(self) -> Counter[str]:
        """Return the runs that the kernel skipped, by the event that each may have recorded (see Program.missed)."""
        skipped: Counter[str] = Counter()
        for program in self._programs():
            for name, runs in program.missed().items():
                # Programs that only follow windows record no resets.
                table = "cwnd_sample" if name.endswith("_follow") else "cwnd_reset"
                skipped["block_io" if program is self._block else table] += runs
        return skipped

    def run_times(self) -> dict[str, tuple[int, int]]:
        """Return runs and nanoseconds by name (see Program.run_times), summed over programs of the same name."""
        total: dict[str, tuple[int, int]] = {}
        for program in self._programs():
            for name, (runs, spent) in program.run_times().items():
                before = total.get(name, (0, 0))
                total[name] = (before[0] + runs, before[1] + spent)
        return total

    def exhausted(self) -> bool:
        """Return False: a running kernel always has more to trace."""
        return False

    def stop(self) -> list[RawRecords]:
        """Detach the programs and return the records that were still under way."""
        for program in self._programs():
            program.detach()
        self._stopped = True
        for program in self._settled_last:
            program.run_for_keys(_SETTLE, "pending")
        if self._block is not None:
            self._block.run_everywhere(_HAND_OVER)
            # Nothing writes to the slabs now. Only a CPU that went offline still has records: no program can run there.
            for slab in self._block.each_cpu("slabs"):
                self._slab(slab)
        records = self._take()
        while self._behind:
            records += self._take()
        entries = [entry for program in self._resets for entry in program.values("followed")]
        unfinished = [e for e in entries if int.from_bytes(e[:8], sys.byteorder) >= self._begin_ns]
        return [*records, ("cwnd_recovery", _unfinished_records(unfinished))]

    def close(self) -> None:
        """Detach the programs and free everything, the counters too."""
        for program in self._programs():
            program.close()
        self._epoll.close()
