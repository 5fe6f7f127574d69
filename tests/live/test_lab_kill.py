# SPDX-License-Identifier: Apache-2.0
"""Tests of killed labs: the next start removes their leftovers, and the host's settings are unchanged."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cwndtrace.lab import cleanup
from cwndtrace.lab.namespaces import namespace
from cwndtrace.lab.owner import Owner
from cwndtrace.store.layout import process_start
from tests.harness import tcp
from tests.harness.lab import leftovers_of, processes_of, tcp_sysctls

pytestmark = pytest.mark.live

RUN = """
import sys
from dataclasses import replace
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.link import Link
from cwndtrace.lab.scenario import PRESETS
print("begin", flush=True)
scenario = replace(PRESETS[sys.argv[1]], link=Link(rtt_ms=20), idle_times=(0.3,), bursts=(300_000,), rounds=100)
with Lab(scenario) as lab:
    for row in lab.rows():
        pass
"""


@pytest.mark.parametrize("preset", ["quick", "disk"])
def test_leftovers_of_a_lab_killed_at_a_random_moment_are_removed(preset: str) -> None:
    before = tcp_sysctls()
    seen = 0
    moments = random.Random(11)
    for _ in range(3):
        run = subprocess.Popen([sys.executable, "-c", RUN, preset], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert run.stdout is not None
        try:
            assert run.stdout.readline() == b"begin\n"
            # The kill comes at a random moment, so there is no event to wait for.
            time.sleep(moments.uniform(0, 3))
        finally:
            run.send_signal(signal.SIGKILL)
            run.wait()
            run.stdout.close()
        # The kernel kills the children with their parent, before any cleanup.
        tcp.until(lambda pid=run.pid: not processes_of(pid), 10, "the processes to end")  # type: ignore[misc]
        seen += bool(leftovers_of(run.pid))
        cleanup.sweep()
        tcp.until(lambda pid=run.pid: not leftovers_of(pid), 10, "the leftovers to go")  # type: ignore[misc]
        assert cleanup.sweep() == []
        assert tcp_sysctls() == before
    assert seen, "no kill came while a lab was running"


def test_objects_of_running_labs_and_of_others_stay() -> None:
    with namespace(Owner.new().name("test")) as mine:
        foreign = Path("/run/netns/cwt-foreign")
        foreign.touch()
        try:
            cleanup.sweep()
            assert mine.path.exists()
            assert foreign.exists()
        finally:
            foreign.unlink()


def test_a_leftover_process_is_killed() -> None:
    """A process may outlive its parent if the kernel's signal at the parent's death is lost."""
    gone = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    start = process_start(gone.pid)
    assert start is not None
    gone.communicate()
    dead = Owner(gone.pid, start, 1)
    with namespace(dead.name("server")) as where:
        stray = subprocess.Popen(
            [
                "nsenter",
                f"--net={where.path}",
                sys.executable,
                "-c",
                "print(flush=True); input()",
                "cwndtrace.lab.relay",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert stray.stdout is not None
            stray.stdout.readline()
            assert f"process {stray.pid}" in cleanup.sweep()
            assert stray.wait(10) == -signal.SIGKILL
            assert not where.path.exists()
        finally:
            stray.kill()
            stray.communicate()
