# SPDX-License-Identifier: Apache-2.0
"""Block I/O that kernel threads submit has the cgroup for which they do, as far as the kernel tells."""

from __future__ import annotations

import os

import pytest

from cwndtrace.capture.block_program import BLOCK_PROGRAMS, BlockProgram
from cwndtrace.capture.source import Filters
from cwndtrace.kernel.btf import Btf
from tests.harness import owner
from tests.harness.disk import Traced, again_if_hidden, loop
from tests.harness.tcp import PREFIX

pytestmark = pytest.mark.live


@pytest.fixture(autouse=True, params=BLOCK_PROGRAMS, ids=lambda program: program.name)
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that traces block I/O in this test."""
    chosen: BlockProgram = request.param
    if lacks := chosen.lacks(Btf.running()):
        pytest.skip(f"this kernel has no tracepoint {lacks}: boot Linux 6.5 or newer")
    monkeypatch.setattr(Traced, "chosen", chosen)


@again_if_hidden
def test_what_kernel_threads_submit_has_its_owner() -> None:
    """On hosts with cgroup v1's blkio the kernel doesn't tell, and the owner is the submitter."""
    with owner.writes() as writes:
        with Traced() as traced:
            writes.make()
        assert not writes.wrong(traced.records(*writes.disks.values()))


@again_if_hidden
def test_a_filter_lets_the_write_back_of_its_cgroup_through() -> None:
    if not owner.told():
        pytest.skip("needs the controllers io and memory in cgroup v2: boot with systemd.unified_cgroup_hierarchy=1")
    with owner.writes() as writes, owner.made(f"{PREFIX}{os.getpid()}-other") as other, loop() as others:
        with Traced(Filters(cgroup=writes.cgroup)) as traced:
            owner.written(other, others.path)
            writes.make()
        assert not writes.wrong(traced.records(*writes.disks.values()))
        assert traced.records(others).empty
