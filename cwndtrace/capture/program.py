# SPDX-License-Identifier: Apache-2.0
"""A compiled BPF image in the kernel: its maps and programs, and their attachments."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from cwndtrace.capture import bpf_syscall as bpf
from cwndtrace.capture.program_cache import Image, Map
from cwndtrace.capture.ring import Ring
from cwndtrace.errors import KernelLacks
from cwndtrace.kernel import btf, ladder

_CPUS: Final = "SC_NPROCESSORS_CONF"
_LOAD_IMM64, _MAP_FD = 0x18, 1
_INSTRUCTION: Final = np.dtype([("code", "u1"), ("registers", "u1"), ("off", "<i2"), ("imm", "<i4")])


def map_uses(insns: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return a program's instructions, writable, and the indices of those whose ``imm`` is a map's descriptor."""
    code = np.frombuffer(bytearray(insns), _INSTRUCTION)
    return code, np.flatnonzero((code["code"] == _LOAD_IMM64) & (code["registers"] >> 4 == _MAP_FD))


class Program:
    """The maps of ``image``, and those of its programs that ``attach`` or ``load`` loaded."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._cpus = os.sysconf(_CPUS)  # reading it takes longer than all else in a turn of an idle trace
        self._maps: dict[str, tuple[int, Map]] = {}
        self._fds: list[int] = []
        self._loaded: dict[str, int] = {}
        self._attached: set[ladder.Attachment] = set()
        self._links: list[int] = []
        self._kprobes: list[int] = []
        self._kprobes_missed = 0
        self._held: dict[str, set[int]] = {}
        self._rings: list[tuple[Ring, Callable[[bytes], None]]] = []
        self.ring_fds: list[int] = []
        try:
            for m in image.maps:
                fd = bpf.create_map(m.name, m.kind, m.key_size, m.value_size, m.max_entries, m.flags)
                self._maps[m.name] = fd, m
                self._fds.append(fd)
        except OSError as e:
            self.close()
            raise KernelLacks(f"the BPF map {m.name} can't be created: {e.strerror}") from e

    def attach(self, attachments: tuple[ladder.Attachment, ...], kernel: btf.Btf) -> None:
        """Load and attach programs, except for those attached already.

        Raises KernelLacks, with the reason, where the kernel refuses one, and leaves none of them attached then.
        """
        links, kprobes = len(self._links), len(self._kprobes)
        new = [a for a in attachments if a not in self._attached]
        for a in new:
            try:
                self._attach(a, kernel)
            except OSError as e:
                self._detach(links, kprobes)
                policy = e.errno == errno.EPERM and os.geteuid() == 0
                why = f"refused by this system's policy ({e.strerror})" if policy else e.strerror
                raise KernelLacks(f"{a.kind} {a.target}: {why}") from e
        self._attached.update(new)

    def _attach(self, a: ladder.Attachment, kernel: btf.Btf) -> None:
        if a.kind == "raw_tracepoint":
            self._links.append(bpf.attach(self.load(a.program), a.target))
        elif a.kind == "tp_btf":
            target = kernel.tracepoint_id(a.target) or 0
            fd = self._load(a.program, self._image.programs[a.program], bpf.TRACING, bpf.TRACE_RAW_TP, target)
            self._links.append(bpf.attach(fd))
        elif a.kind in ("fentry", "fexit"):
            place = bpf.TRACE_FENTRY if a.kind == "fentry" else bpf.TRACE_FEXIT
            target = kernel.function_id(a.target) or 0
            # A program is loaded for one function, so that one which serves several is loaded for each.
            name = f"{a.program}_{a.target}"
            fd = self._load(name, self._image.programs[a.program], bpf.TRACING, place, target)
            self._links.append(bpf.attach(fd))
        else:
            # One kprobe program may serve several functions.
            fd = self._loaded.get(a.program) or self._load(a.program, self._image.programs[a.program], bpf.KPROBE)
            self._kprobes.append(bpf.attach_kprobe(fd, a.target, a.kind == "kretprobe"))

    def load(self, program: str) -> int:
        """Return the descriptor of a raw tracepoint program. The first call loads it; it needn't be attached."""
        if program not in self._loaded:
            self._load(program, self._image.programs[program], bpf.RAW_TRACEPOINT)
        return self._loaded[program]

    def _load(self, name: str, insns: bytes, prog_type: int, attach_type: int = 0, attach_btf_id: int = 0) -> int:
        code, uses = map_uses(insns)
        code["imm"][uses] = np.array(self._fds, dtype=np.int32)[code["imm"][uses]]
        fd = bpf.load_program(name, prog_type, code.tobytes(), attach_type, attach_btf_id)
        self._fds.append(fd)
        self._loaded[name] = fd
        return fd

    def open_ring(self, table: str, received: Callable[[bytes], None]) -> None:
        """Make ``consume`` call ``received`` for each entry of a ring buffer. Raises KernelLacks if mmap fails."""
        fd, m = self._maps[table]
        try:
            self._rings.append((Ring(fd, m.max_entries), received))
        except OSError as e:
            raise KernelLacks(f"the ring buffer {table} can't be read: {e.strerror}") from e
        self.ring_fds.append(fd)

    def consume(self, most: int) -> bool:
        """Pass entries of the open ring buffers to their functions, of each ring about ``most`` bytes at most.

        Return whether a ring may have more.
        """
        more = False
        for ring, received in self._rings:
            entries, cut = ring.read(most)
            more |= cut
            for entry in entries:
                received(entry)
        return more

    def run_everywhere(self, program: str) -> None:
        """Run a raw tracepoint program that isn't attached, once on each online CPU."""
        fd = self.load(program)
        for cpu in range(self._cpus):
            try:
                bpf.run_raw_tracepoint(fd, cpu)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise

    def run_for_keys(self, program: str, table: str) -> None:
        """Run a raw tracepoint program that isn't attached once for each key of a hash, which is its argument."""
        fd, (map_fd, m) = self.load(program), self._maps[table]
        # The program may delete its key.
        for key in list(bpf.keys(map_fd, m.key_size)):
            bpf.run_with_argument(fd, key)

    def each_cpu(self, table: str) -> list[bytes]:
        """Return the first entry of a per-CPU array for each CPU that the machine can have, offline CPUs included."""
        fd, m = self._maps[table]
        # The kernel pads each CPU's value to eight bytes.
        size = (m.value_size + 7) & ~7
        values = bpf.lookup(fd, bytes(4), size * bpf.possible_cpus()) or b""
        return [values[at : at + m.value_size] for at in range(0, len(values), size)]

    def totals(self) -> dict[str, int]:
        """Return the counters of bpf/counters.h by name, each summed over CPUs."""
        names = [name for name, kind in self._maps["counters"][1].fields]
        counters = np.frombuffer(b"".join(self.each_cpu("counters")), np.uint64)  # each of them is a u64
        return dict(zip(names, counters.reshape(-1, len(names)).sum(axis=0).tolist(), strict=True))

    def dtype(self, table: str) -> np.dtype[Any]:
        """Return the type of a map's values, a struct as C lays it out."""
        return np.dtype(list(self._maps[table][1].fields))

    def offset(self, table: str, member: str) -> int:
        """Return the offset of a member of that struct, in bytes."""
        fields = self.dtype(table).fields
        assert fields is not None
        return int(fields[member][1])

    def rows(self, table: str) -> list[tuple[int, Any]]:
        """Return key and value (a numpy record) of each entry of a hash or an array."""
        fd, m = self._maps[table]
        entries = [(key, bpf.lookup(fd, key, m.value_size)) for key in bpf.keys(fd, m.key_size)]
        dtype = self.dtype(table)
        return [(int.from_bytes(k, "little"), np.frombuffer(v, dtype)[0]) for k, v in entries if v is not None]

    def values(self, table: str) -> list[bytes]:
        """Return the value of each entry of a hash or an array."""
        fd, m = self._maps[table]
        found = (bpf.lookup(fd, key, m.value_size) for key in bpf.keys(fd, m.key_size))
        return [value for value in found if value is not None]

    def run_times(self) -> dict[str, tuple[int, int]]:
        """Return each loaded program's runs and nanoseconds, counted while kernel.bpf_stats_enabled is 1."""
        stats = {name: bpf.program_stats(fd) for name, fd in self._loaded.items()}
        return {name: (runs, spent) for name, (spent, runs, _) in stats.items()}

    def missed(self) -> dict[str, int]:
        """Return, by program, the runs that the kernel skipped because it was already running on that CPU.

        The entry "kprobe" counts the calls that no program saw, because another kprobe was running.
        """
        skipped = {name: bpf.program_stats(fd)[2] for name, fd in self._loaded.items()}
        return skipped | {"kprobe": self._kprobes_missed + sum(map(bpf.kprobe_missed, self._kprobes))}

    def sync_keys(self, table: str, keys: set[int]) -> int:
        """Make a hash of u64 keys hold ``keys`` and no others; return how many it had no room for.

        Keys that it holds already stay. The others are added in ascending order.
        """
        fd, m = self._maps[table]
        held = self._held.setdefault(table, set())
        for key in held - keys:
            bpf.delete(fd, key.to_bytes(8, "little"))
        held &= keys
        # The traced processes decide how many keys there are, so they may not all fit.
        for key in sorted(keys - held)[: m.max_entries - len(held)]:
            bpf.update(fd, key.to_bytes(8, "little"), b"\1")
            held.add(key)
        return len(keys) - len(held)

    def detach(self) -> None:
        """Detach all programs. Maps and counters stay readable."""
        self._detach(0, 0)
        self._attached.clear()

    def _detach(self, links: int, kprobes: int) -> None:
        """Detach programs until so many links and kprobes are left, the oldest."""
        while len(self._links) > links:
            os.close(self._links.pop())
        while len(self._kprobes) > kprobes:
            link = self._kprobes.pop()
            self._kprobes_missed += bpf.kprobe_missed(link)
            os.close(link)

    def close(self) -> None:
        """Detach all programs and free the maps."""
        self.detach()
        while self._rings:
            self._rings.pop()[0].close()
        while self._fds:
            os.close(self._fds.pop())
