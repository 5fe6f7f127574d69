# SPDX-License-Identifier: Apache-2.0
"""The project on a bare Debian 12 and a bare Debian 13, as a new user would try it.

bcc is another release in each (0.26 and 0.31), so this also shows that the BPF sources load with both. The
kernel is this machine's own.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import chroot

CHECKOUT = Path(__file__).resolve().parents[2]
CLONE = "/root/cwndtrace"
BCC = {"bookworm": "0.26.", "trixie": "0.31."}

pytestmark = [pytest.mark.chroot, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=sorted(BCC))
def root(request: pytest.FixtureRequest) -> Iterator[chroot.Root]:
    missing = chroot.missing_tools()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: sudo make test-distributions installs it")
    with chroot.unpacked(request.param) as made:
        chroot.clone_checkout(CHECKOUT, made, CLONE)
        yield made


def _make(root: chroot.Root, *goals: str) -> str:
    """Run make in the clone; it must succeed. Prints how long it took, for ``pytest -s``."""
    start = time.monotonic()
    done = root.run("make", *goals, cwd=CLONE, timeout=1500)
    print(f"{root.suite}: make {' '.join(goals)}: {time.monotonic() - start:.1f} s")
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_install_leaves_a_working_command(root: chroot.Root) -> None:
    _make(root, "install")
    done = root.run("cwndtrace", "--version")
    assert done.returncode == 0, done.stdout
    first = (root.path / "opt/cwndtrace/bin/cwndtrace").read_text(encoding="utf-8").splitlines()[0]
    assert first.endswith(" -I")


def test_install_changes_nothing_the_second_time(root: chroot.Root) -> None:
    start = time.monotonic()
    output = _make(root, "install")
    assert "installing" not in output
    assert time.monotonic() - start < 5


def test_bpf_sources_load_and_attach(root: chroot.Root) -> None:
    program = (
        "from cwndtrace.capture import bcc; kernel = bcc.Kernel(block=True); "
        "print(bcc.version(), kernel.rungs['idle'], *kernel.events); kernel.close()"
    )
    done = root.run("/opt/cwndtrace/bin/python", "-P", "-c", program)
    assert done.returncode == 0, done.stdout
    version, rung, *events = done.stdout.split()
    assert version.startswith(BCC[root.suite])
    assert rung != "None"
    assert {"cwnd_reset", "block_io"} <= set(events)


def test_doctor_finds_a_rung(root: chroot.Root) -> None:
    done = root.run("cwndtrace", "doctor", "--json")
    assert done.returncode == 0, done.stdout


def test_demo_does_the_main_job(root: chroot.Root) -> None:
    output = _make(root, "demo")
    folder = root.path / CLONE.lstrip("/")
    (capture,) = folder.glob("*.cwnd")
    (picture,) = folder.glob("*.png")
    assert {capture.name, picture.name} <= set(re.split(r"[\s/]+", output))
    assert list(capture.glob("cwnd_reset/*.parquet"))
    assert list(capture.glob("block_io/*.parquet"))
    assert picture.stat().st_size > 10_000


@pytest.mark.skipif(
    "CWNDTRACE_NEWCOMER" not in os.environ, reason="runs all tests again: CWNDTRACE_NEWCOMER=1 make test-distributions"
)
def test_newcomer_runs_the_tests(root: chroot.Root) -> None:
    _make(root, "test")


def test_uninstall_takes_it_away(root: chroot.Root) -> None:
    _make(root, "uninstall")
    assert not (root.path / "opt/cwndtrace").exists()
    assert root.run("sh", "-c", "command -v cwndtrace").returncode != 0
