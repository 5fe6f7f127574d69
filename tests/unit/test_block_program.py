# SPDX-License-Identifier: Apache-2.0
"""The programs for block I/O are chosen by the tracepoints of the kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cwndtrace.capture import block_program
from cwndtrace.errors import KernelLacks

NEW = ["block_io_done", "block_rq_error", "block_rq_issue", "block_io_start"]
OLD = ["block_rq_complete", "block_rq_merge", "block_rq_issue", "block_rq_insert", "block_getrq"]


def kernel(*tracepoints: str) -> Any:
    return SimpleNamespace(has_tracepoint=lambda name: name in tracepoints)


@pytest.mark.parametrize(
    ("there", "name"), [(NEW, "block_io_start"), (OLD, "block_getrq"), (NEW + OLD, "block_io_start")]
)
def test_the_best_program_of_which_the_kernel_has_all_tracepoints(there: list[str], name: str) -> None:
    chosen = block_program.choose(kernel(*there))
    assert chosen.name == name
    assert {a.target for a in chosen.attachments} <= set(there)
    assert [(a.kind, a.program) for a in chosen.attachments] == [
        ("tp_btf", f"on_{a.target}") for a in chosen.attachments
    ]
    source = chosen.source.read_text(encoding="utf-8")
    assert all(f"{a.program}" in source or f"{a.target}" in source for a in chosen.attachments)


@pytest.mark.parametrize("missing", NEW)
def test_one_missing_tracepoint_leaves_the_older_programs(missing: str) -> None:
    there = set(NEW + OLD) - ({missing} - set(OLD))
    expected = "block_getrq" if missing not in OLD else "block_io_start"
    assert block_program.choose(kernel(*there)).name == expected


def test_a_kernel_with_neither_is_told_what_it_lacks() -> None:
    with pytest.raises(KernelLacks) as caught:
        block_program.choose(kernel(*NEW[:-1]))
    assert str(caught.value.cause) == (
        "this kernel can't time block I/O: it has no tracepoint block_io_start and no block_rq_complete"
    )
    assert caught.value.remedy == "trace without --block; the rest doesn't need it"
