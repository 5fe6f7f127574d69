# SPDX-License-Identifier: Apache-2.0
"""Tests of each command in the README and the pages on installing and Python, on a bare Debian 12 and 13.

A user with sudo types the commands as they are in the pages.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator

import pytest

from tests.harness import chroot
from tests.harness.chroot import CHECKOUT

USER = "newcomer"
CLONE = f"/home/{USER}/cwndtrace"
PAGES = ("README.md", "docs/start.md", "docs/python.md")
PIPX = "sudo env PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/usr/local/bin pipx install ."

# Each command of the pages, the line that is typed for it ("" for the command itself), and a part of its output.
TABLE = [
    ("sudo cwndtrace doctor", "", "will work here."),
    # One round is enough, because the demo measures in full.
    ("sudo cwndtrace reproduce", "sudo cwndtrace reproduce --rounds 1", "Picture:"),
    ("cwndtrace run --help", "", "--iface"),
    ("cwndtrace report CAPTURE", "cwndtrace report demo-*.cwnd", "LONGEST IDLE"),
    ("cwndtrace report CAPTURE --by peer", "cwndtrace report demo-*.cwnd --by peer", "PEERS"),
    ("cwndtrace top CAPTURE", "cwndtrace top demo-*.cwnd --once", "RESETS"),
    ("sudo cwndtrace top", "sudo cwndtrace top --duration 2s", "CONNECTION"),
    ("cwndtrace plot CAPTURE", "cwndtrace plot demo-*.cwnd", ""),
    ("cwndtrace fleet report PLACE", "cwndtrace fleet report --help", "--scheduler"),
    ("cwndtrace dump CAPTURE --last 5m", "cwndtrace dump demo-*.cwnd --last 5m -o dump.cwnd", "The dump is in"),
    ("cwndtrace export CAPTURE --csv summary=-", "cwndtrace export demo-*.cwnd --csv summary=-", "connection,"),
    ("cwndtrace compare A B", "cwndtrace compare demo-*.cwnd demo-*.cwnd", ""),
]
# These depend on their order.
PIPX_STEPS = [
    ("sudo make uninstall", "", "removed /opt/cwndtrace"),
    ("sudo apt install pipx python3-bpfcc", "sudo apt -y install pipx python3-bpfcc", ""),
    (PIPX, "", "installed package cwndtrace"),
    ("sudo cwndtrace doctor", "", "will work here."),
    ("pipx install .", "", "installed package cwndtrace"),
    ("sudo ~/.local/bin/cwndtrace doctor", "", "will work here."),
]
JUPYTER_STEPS = [
    ("python3 -m venv ~/cwndtrace-jupyter", "", ""),
    ("~/cwndtrace-jupyter/bin/pip install '.[jupyter]'", "", "Successfully installed"),
    # Jupyter Lab itself would run until it is ended.
    ("~/cwndtrace-jupyter/bin/jupyter lab notebooks", "~/cwndtrace-jupyter/bin/jupyter lab --version", ""),
]
RUN = "sudo cwndtrace run --iface eth0"
SERVE = "cwndtrace serve --host ::"
INSTALL = "sudo make install"
ELSEWHERE = {
    "make test": "test_distributions_user.py runs it",
    "make test-slow": ".ci/run runs it",
    "make bench": "it measures for twenty minutes",
    "sudo make vm-shell": "it builds a kernel; tests/vm tests that",
    "cd vagrant && vagrant up && vagrant ssh -c 'sudo cwndtrace reproduce'": "make vagrant-test tests it",
}

pytestmark = [pytest.mark.chroot, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def with_user(root: chroot.Root) -> Iterator[chroot.Root]:
    """A root with a user who has sudo and a clone of the checkout; the user is removed at the end."""
    rule = root.path / f"etc/sudoers.d/{USER}"
    if not root.has("sudo"):
        root.add("sudo")
    try:
        root.good("useradd", "--create-home", "--shell", "/bin/bash", USER)
        chroot.clone(root, CLONE, USER)
        rule.write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
        yield root
    finally:
        rule.unlink(missing_ok=True)
        root.good("userdel", "--remove", USER)


@pytest.fixture(scope="module")
def demo(with_user: chroot.Root) -> str:
    """The output of ``make demo`` in a root without cwndtrace and bcc's Python package."""
    with_user.make("uninstall")
    with_user.good("dpkg", "--remove", "python3-bpfcc")
    return type_in(with_user, "umask 077; make demo")


@pytest.fixture(scope="module")
def demo_root(with_user: chroot.Root, demo: str) -> chroot.Root:
    """A root in which the demo has run."""
    assert demo
    return with_user


def type_in(root: chroot.Root, line: str, *, before: tuple[str, ...] = ()) -> str:
    """Run a line in the clone as the user, who gets only the proxy variables of root, and return its output."""
    as_user = (
        "setpriv",
        f"--reuid={USER}",
        f"--regid={USER}",
        "--init-groups",
        "env",
        f"HOME=/home/{USER}",
        f"USER={USER}",
    )
    return root.good(*before, *as_user, "bash", "-c", line, cwd=CLONE)


def own_network(*set_up: str) -> tuple[str, ...]:
    """Return the beginning of a command that runs in a network namespace of its own, after ``set_up`` there."""
    return ("unshare", "--net", "sh", "-ec", "; ".join(("ip link set lo up", *set_up, 'exec "$@"')), "sh")


def test_the_pages_have_no_untested_command() -> None:
    text = "\n".join((CHECKOUT / page).read_text(encoding="utf-8") for page in PAGES)
    fenced = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    commands = {line for kind, block in fenced.findall(text) if kind == "sh" for line in block.splitlines()}
    # A command in the text may be wrapped like the words beside it.
    prose = " ".join(fenced.sub("", text).split())
    commands |= set(re.findall(r"`((?:sudo|make|pip|pipx|python3|cwndtrace|~\S*) (?!-E)[^`]+)`", prose))
    tried = {command for command, *_ in TABLE + PIPX_STEPS + JUPYTER_STEPS} | {"make demo", INSTALL, RUN, SERVE}
    assert commands == tried | set(ELSEWHERE)


def test_the_demo_works_for_a_user_with_sudo(demo_root: chroot.Root, demo: str) -> None:
    for step in ("apt-get install", "installing Python packages into /opt/cwndtrace", "compiling them"):
        assert re.search(rf"^set-up: {step} \.\.\. \d+ s$", demo, re.MULTILINE)
    # All files that root made belong to the user.
    home = demo_root.path / f"home/{USER}"
    uid = home.stat().st_uid
    assert [str(path) for path in home.rglob("*") if path.lstat().st_uid != uid] == []
    (capture,) = (home / "cwndtrace").glob("demo-*.cwnd")
    (picture,) = (home / "cwndtrace").glob("demo-*.png")
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    assert picture.stat().st_size > 10_000
    assert {capture.name, picture.name} <= set(re.split(r"[\s/]+", demo))
    assert list(capture.glob("cwnd_reset/*.parquet"))
    assert list(capture.glob("block_io/*.parquet"))


def test_the_set_up_changes_nothing_after_the_demo(demo_root: chroot.Root) -> None:
    assert "installing" not in type_in(demo_root, INSTALL)


def test_an_interface_called_eth0_is_traced(demo_root: chroot.Root) -> None:
    veth = ("ip link add eth0 type veth peer name eth1", "ip link set eth0 up", "ip link set eth1 up")
    output = type_in(demo_root, f"{RUN} -d 2s -o eth0.cwnd", before=own_network(*veth))
    assert "Tracing eth0" in output
    assert "The capture is in eth0.cwnd." in output


def test_the_server_listens(demo_root: chroot.Root) -> None:
    # It runs until timeout(1) ends it, with exit code 124. Its port is a fixed one, and the other root may use it now.
    output = type_in(demo_root, f"timeout -s INT 5 {SERVE} || test $? = 124", before=own_network())
    assert "Listening on :: port 5001;" in output


@pytest.mark.parametrize(("command", "typed", "expected"), TABLE, ids=[command for command, *_ in TABLE])
def test_a_command_works_as_typed(demo_root: chroot.Root, command: str, typed: str, expected: str) -> None:
    assert expected in type_in(demo_root, typed or command)


def only_in(suite: str, root: chroot.Root) -> None:
    """Skip the test in the other root, because it takes minutes and pip does the same in both."""
    if root.suite != suite and "CWNDTRACE_NEWCOMER" not in os.environ:
        pytest.skip(f"runs in {suite}; in both by CWNDTRACE_NEWCOMER=1 make test-distributions")


def test_the_jupyter_steps_work(demo_root: chroot.Root) -> None:
    only_in("trixie", demo_root)
    for command, typed, expected in JUPYTER_STEPS:
        assert expected in type_in(demo_root, typed or command)


def test_the_pipx_steps_work(demo_root: chroot.Root) -> None:
    only_in("bookworm", demo_root)
    try:
        for command, typed, expected in PIPX_STEPS:
            assert expected in type_in(demo_root, typed or command)
    finally:
        demo_root.good("rm", "-rf", "/opt/pipx", "/usr/local/bin/cwndtrace")
