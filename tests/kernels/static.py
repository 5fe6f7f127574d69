# SPDX-License-Identifier: Apache-2.0
"""What a kernel's type information says about the probes, without booting it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cwndtrace.analysis.idle_disk import REQ_SYNC
from cwndtrace.capture import bcc
from cwndtrace.capture.block_program import BLOCK_PROGRAMS
from cwndtrace.errors import KernelLacks
from cwndtrace.kernel import ladder, offsets
from cwndtrace.kernel.btf import Btf
from cwndtrace.records.layout import bpf_dir
from tests.kernels import vmlinuz
from tests.kernels.stock import Unpacked

HEAD: Final = ("kernel", "release", "HZ", *ladder.REASONS, "block I/O", "sources")
# With every filter, since the code of a filter reads members too.
_FILTERS: Final = {
    f"FILTER_{name}": 1 for name in ("IFINDEX", "NETNS", "PID", "PORT", "FAMILY", "MIN_IDLE_US", "CGROUP")
}

# The way from a bio to its cgroup, which a kernel needn't have.
_OWNER: Final = ("bio.bi_blkg", "blkcg_gq.blkcg", "blkcg.css.cgroup", "cgroup.root", "cgroup_root.hierarchy_id")


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
    surprises: list[str] = []
    sources = set()
    for probe in ladder.PROBES:
        possible = [reason for reason in ladder.REASONS if ladder.lacks(known, probe, reason) is None]
        for reason in possible:
            seen[reason].append(probe.name)
        if possible:
            # As in live.Kernel: one source for all reasons of a probe.
            surprises += lacking(kernel, bpf_dir() / f"cwnd_reset_{probe.name}.bpf.c", _FILTERS)
            sources.add(probe.name)
    block = next((each for each in BLOCK_PROGRAMS if each.lacks(kernel) is None), None)
    if block is None:
        surprises.append("no way to time block I/O")
    else:
        for atomic in ({}, {"COMPARE_AND_SWAP": 1}):
            surprises += lacking(kernel, block.source, {**_FILTERS, **block.defines, **atomic})
        sources.add(block.name)
    surprises += [f"no {path}, so no owner of block I/O" for path in _OWNER if not kernel.member(*path.split(".", 1))]
    if 1 << (kernel.enumerator("req_flag_bits", "__REQ_SYNC") or 0) != REQ_SYNC << 8:
        surprises.append("another number of REQ_SYNC")
    cells = [unpacked.stock.name, unpacked.release, hz]
    return [
        *cells,
        *("/".join(seen[r]) or "no" for r in ladder.REASONS),
        block.name if block else "no",
        str(len(sources)),
    ], surprises


def lacking(kernel: Btf, source: Path, defines: dict[str, int]) -> list[str]:
    """Return what a kernel lacks of what a source reads, in a list of at most one line."""
    text = bcc.expanded(source)
    try:
        offsets.defines(kernel, offsets.active(text, defines))
    except KernelLacks as e:
        return [f"{source.name}: {e.cause}"]
    return []
