# SPDX-License-Identifier: Apache-2.0
"""What a kernel's type information says about the probes, without booting it."""

from __future__ import annotations

from typing import Final

from cwndtrace.capture import bcc, live
from cwndtrace.errors import KernelLacks
from cwndtrace.kernel import ladder, offsets
from cwndtrace.kernel.btf import Btf
from cwndtrace.records.layout import bpf_dir, code
from tests.kernels import vmlinuz
from tests.kernels.stock import Unpacked

HEAD: Final = ("kernel", "release", "HZ", *ladder.REASONS, "block I/O", "sources")
# With every filter, since the code of a filter reads members too.
_FILTERS: Final = {
    f"FILTER_{name}": 1 for name in ("IFINDEX", "NETNS", "PID", "PORT", "FAMILY", "MIN_IDLE_US", "CGROUP")
}


def facts_of(kernel: Btf, config: str) -> ladder.Facts:
    """Return the facts of a kernel that isn't running, which the ladder depends on."""
    return ladder.Facts(
        tracepoints=frozenset(t for t in ladder.tracepoints() if kernel.has_tracepoint(t)),
        functions=frozenset(f for f in ladder.FUNCTIONS.values() if kernel.has_function(f)),
        kprobes="CONFIG_KPROBE_EVENTS=y" in config.splitlines(),
    )


def examine(unpacked: Unpacked) -> tuple[list[str], list[str]]:
    """Return a kernel's row of the table, and what is missing although a probe that the ladder allows needs it."""
    kernel = Btf(vmlinuz.btf(vmlinuz.kernel(unpacked.vmlinuz.read_bytes())))
    known = facts_of(kernel, unpacked.config)
    hz = next(line.partition("=")[2] for line in unpacked.config.splitlines() if line.startswith("CONFIG_HZ="))
    seen: dict[str, list[str]] = {reason: [] for reason in ladder.REASONS}
    surprises, sources = [], set()
    for probe in ladder.PROBES:
        for reason in ladder.REASONS:
            if ladder.lacks(known, probe, reason) is not None:
                continue
            seen[reason].append(probe.name)
            targets = [a.target for a in ladder.attachments(known, probe, reason)]
            # As in live.Kernel.
            by_state = "tcp_cong_state_set" in targets
            name = f"cwnd_reset_{'cong_state' if by_state else probe.name}.bpf.c"
            defines = {"REASON": code("reason", reason), "PROBE": code("probe", probe.name), **_FILTERS}
            surprises += lacking(kernel, name, defines)
            sources.add(name)
    block = "no"
    for program in (each for each in vars(live).values() if isinstance(each, live.BlockProgram)):
        if all(kernel.has_tracepoint(a.target) for a in program.attachments):
            block = program.source.name.partition(".")[0]
            surprises += lacking(kernel, program.source.name, {**_FILTERS, **program.defines})
            sources.add(program.source.name)
            break
    cells = [unpacked.stock.name, unpacked.release, hz]
    return [*cells, *("/".join(seen[r]) or "no" for r in ladder.REASONS), block, str(len(sources))], surprises


def lacking(kernel: Btf, source: str, defines: dict[str, int]) -> list[str]:
    """Return what a kernel lacks of what a source reads, in a list of at most one line."""
    text = bcc.expanded(bpf_dir() / source)
    try:
        offsets.defines(kernel, offsets.active(text, defines))
    except KernelLacks as e:
        return [f"{source}: {e.cause}"]
    return []
