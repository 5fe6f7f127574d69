# SPDX-License-Identifier: Apache-2.0
"""Tests of the project on a bare Debian 12 and a bare Debian 13, as a new user would try it.

They have different releases of bcc (0.26 and 0.31), so the tests also show that the BPF sources load with both. The
kernel is this machine's. test_readme.py tests the demo there, as a user with sudo.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.harness import chroot

BCC = {"bookworm": "0.26.", "trixie": "0.31."}
NOBODY = "nobody"

pytestmark = [pytest.mark.chroot, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def bare(root: chroot.Root) -> Iterator[chroot.Root]:
    """A root without Python, bcc and sudo: the shared one, or a separate one if another test has installed them."""
    if not (root.has("python3") or root.has("sudo")):
        yield root
    else:
        with chroot.cloned(root.suite) as another:
            yield another


def test_without_sudo_the_demo_explains_how_to_become_root(bare: chroot.Root) -> None:
    clone = "/tmp/clone"  # users may not enter /root
    chroot.clone(bare, clone, NOBODY)
    done = bare.run("setpriv", f"--reuid={NOBODY}", "--clear-groups", "make", "demo", cwd=clone)
    assert done.returncode != 0
    assert "make demo needs root" in done.stdout
    assert "There is no sudo here. Run, with root's password: su -c 'make demo'" in done.stdout


def test_without_a_network_the_demo_ends_soon(bare: chroot.Root) -> None:
    done = bare.run("unshare", "--net", "make", "demo", cwd=chroot.CLONE, timeout=60)
    assert done.returncode != 0
    assert "set-up: apt-get update" in done.stdout
    assert "Check that the network and the package mirror can be reached" in done.stdout


def test_install_leaves_a_working_command(bare: chroot.Root) -> None:
    bare.make("install")
    bare.good("cwndtrace", "--version")
    first = (bare.path / "opt/cwndtrace/bin/cwndtrace").read_text(encoding="utf-8").splitlines()[0]
    assert first.endswith(" -I")


def test_install_changes_nothing_the_second_time(installed: chroot.Root) -> None:
    start = time.monotonic()
    output = installed.make("install")
    assert "installing" not in output
    assert time.monotonic() - start < 5


def test_the_bpf_sources_load_and_attach(installed: chroot.Root) -> None:
    program = (
        "from cwndtrace.capture import bcc, live; kernel = live.Kernel(block=True); "
        "print(bcc.version(), kernel.probes['idle'], *kernel.events); kernel.close()"
    )
    version, probe, *events = installed.good("/opt/cwndtrace/bin/python", "-P", "-c", program).split()
    assert version.startswith(BCC[installed.suite])
    assert probe != "None"
    assert {"cwnd_reset", "block_io"} <= set(events)


def test_doctor_finds_a_probe(installed: chroot.Root) -> None:
    installed.good("cwndtrace", "doctor", "--json")


@pytest.mark.skipif(
    "CWNDTRACE_NEWCOMER" not in os.environ, reason="runs all tests again: CWNDTRACE_NEWCOMER=1 make test-distributions"
)
@pytest.mark.timeout(3600)
def test_the_tests_pass_there(installed: chroot.Root) -> None:
    print(installed.good("make", "test", cwd=chroot.CLONE, timeout=3500))


def test_uninstall_removes_everything(installed: chroot.Root) -> None:
    installed.make("uninstall")
    assert not (installed.path / "opt/cwndtrace").exists()
    assert installed.run("sh", "-c", "command -v cwndtrace").returncode != 0
