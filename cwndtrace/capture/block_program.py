# SPDX-License-Identifier: Apache-2.0
"""The BPF programs that record block I/O, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cwndtrace.errors import KernelLacks
from cwndtrace.kernel.btf import Btf
from cwndtrace.kernel.ladder import Attachment
from cwndtrace.records.layout import bpf_dir

RING_PAGES: Final = 2048
"""The size of the ring of block requests: 8 MiB.

Rings are counted in pages of 4 KiB on each machine (bpf/compat). The kernel wants a power of two that is a multiple of
its own pages, which may have 64 KiB on arm64.
"""
_LEAST_SPARE, _MOST_SPARE = 256, 16384
_SHARE: Final = 100


def spare_pages(memory: int) -> int:
    """Return the size of the ring for times when that one is full, 1 to 64 MiB, or 0 for none, by bytes of memory.

    Both together take at most a hundredth of memory, if there is a spare ring.
    """
    pages = min(memory // _SHARE // 4096 - RING_PAGES, _MOST_SPARE)
    return 0 if pages < _LEAST_SPARE else 1 << pages.bit_length() - 1


@dataclass(frozen=True)
class BlockProgram:
    """A BPF source that records block I/O, with its attachments and the macros that it is compiled with.

    ``name`` is the tracepoint at which a request begins.
    """

    name: str
    source: Path
    attachments: tuple[Attachment, ...]
    defines: Mapping[str, int] = field(default_factory=dict)

    def lacks(self, kernel: Btf) -> str | None:
        """Return the first tracepoint that it needs and the kernel doesn't have, or None."""
        return next((a.target for a in self.attachments if not kernel.has_tracepoint(a.target)), None)


def _program(source: str, *tracepoints: str) -> BlockProgram:
    """Return the program that attaches ``on_NAME`` to each tracepoint NAME, the one where a request begins last."""
    attachments = tuple(Attachment("tp_btf", name, f"on_{name}") for name in tracepoints)
    return BlockProgram(tracepoints[-1], bpf_dir() / source, attachments)


BLOCK_IO: Final = _program("block_io.bpf.c", "block_io_done", "block_rq_error", "block_rq_issue", "block_io_start")
BLOCK_IO_OLD: Final = _program(
    "block_io_old.bpf.c", "block_rq_complete", "block_rq_merge", "block_rq_issue", "block_rq_insert", "block_getrq"
)
BLOCK_PROGRAMS: Final = (BLOCK_IO, BLOCK_IO_OLD)
"""The programs, best first."""


def choose(kernel: Btf) -> BlockProgram:
    """Return the best program that the kernel has all tracepoints for. Raises KernelLacks where there is none."""
    lacking = []
    for program in BLOCK_PROGRAMS:
        tracepoint = program.lacks(kernel)
        if tracepoint is None:
            return program
        lacking.append(tracepoint)
    raise KernelLacks(
        f"this kernel can't time block I/O: it has no tracepoint {' and no '.join(lacking)}",
        "trace without --block; the rest doesn't need it",
    )
