# SPDX-License-Identifier: Apache-2.0
"""Each command of the README, as a user with sudo pastes it, on a bare Debian 12 and a bare Debian 13."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator

import pytest

from tests import chroot
from tests.live.test_distributions import BCC, CHECKOUT

USER = "newcomer"
CLONE = f"/home/{USER}/cwndtrace"
PIPX = "sudo env PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/usr/local/bin pipx install ."

# What stands in the README, what is typed for it, and what it says then. The order counts.
TABLE = [
    ("sudo cwndtrace doctor", "", "will work here."),
    ("sudo cwndtrace reproduce", "", "The picture:"),
    ("cwndtrace run --help", "", "--iface"),
    ("cwndtrace report CAPTURE", "cwndtrace report demo-*.cwnd", "idle"),
    ("cwndtrace plot CAPTURE", "cwndtrace plot demo-*.cwnd", ""),
    ("cwndtrace compare A B", "cwndtrace compare demo-*.cwnd demo-*.cwnd", ""),
    # timeout(1) ends with 124 where it had to end it: serve goes on until then.
    ("cwndtrace serve --host ::", "timeout -s INT 5 cwndtrace serve --host :: || test $? = 124", ""),
]
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
    # It would serve until it is ended.
    ("~/cwndtrace-jupyter/bin/jupyter lab notebooks", "~/cwndtrace-jupyter/bin/jupyter lab --version", ""),
]
RUN = "sudo cwndtrace run --iface eth0"
INSTALL = "sudo make install"
ELSEWHERE = {
    "make test": "in test_distributions_user.py",
    "make bench": "measures for twenty minutes",
    "sudo make vm-shell": "builds a kernel; tests/vm does",
    "cd vagrant && vagrant up && vagrant ssh -c 'sudo cwndtrace reproduce'": "make vagrant-test does",
}

pytestmark = [pytest.mark.chroot, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=sorted(BCC))
def root(request: pytest.FixtureRequest) -> Iterator[chroot.Root]:
    missing = chroot.missing_tools()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: sudo make test-distributions installs it")
    with chroot.unpacked(request.param) as made:
        good(made.run("useradd", "--create-home", "--shell", "/bin/bash", USER))
        chroot.clone_checkout(CHECKOUT, made, CLONE)
        good(made.run("chown", "-R", f"{USER}:", CLONE))
        yield made


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout
    return done.stdout


def type_in(root: chroot.Root, line: str, *, before: tuple[str, ...] = ()) -> str:
    """Run a line in the clone as the user, who comes with root's variables only where they name a proxy."""
    as_user = (
        "setpriv",
        f"--reuid={USER}",
        f"--regid={USER}",
        "--init-groups",
        "env",
        f"HOME=/home/{USER}",
        f"USER={USER}",
    )
    return good(root.run(*before, *as_user, "bash", "-c", line, cwd=CLONE, timeout=1500))


def test_the_readme_has_no_other_command() -> None:
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    fenced = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    found = {line for kind, block in fenced.findall(text) if kind == "sh" for line in block.splitlines()}
    found |= set(re.findall(r"`((?:sudo|make|pip|pipx|python3|cwndtrace|~\S*) (?!-E)[^`]+)`", fenced.sub("", text)))
    tried = {command for command, *_ in TABLE + PIPX_STEPS + JUPYTER_STEPS} | {"make demo", INSTALL, RUN}
    assert found == tried | set(ELSEWHERE)


def test_without_sudo_the_demo_says_how_to_become_root(root: chroot.Root) -> None:
    done = root.run("setpriv", f"--reuid={USER}", "--clear-groups", "make", "demo", cwd=CLONE)
    assert done.returncode != 0
    assert "make demo needs root" in done.stdout
    assert "There is no sudo here. Run, with root's password: su -c 'make demo'" in done.stdout


def test_without_a_network_the_demo_ends_soon(root: chroot.Root) -> None:
    done = root.run("unshare", "--net", "make", "demo", cwd=CLONE, timeout=60)
    assert done.returncode != 0
    assert "set-up: apt-get update" in done.stdout
    assert "Check that the network and the package mirror can be reached" in done.stdout


def test_the_demo_as_a_user_with_sudo(root: chroot.Root) -> None:
    good(root.run("apt-get", "-q", "update"))
    good(root.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "install", "sudo"))
    (root.path / f"etc/sudoers.d/{USER}").write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
    output = type_in(root, "umask 077; make demo")
    print(output)
    for step in ("apt-get install", "installing Python packages into /opt/cwndtrace", "compiling them"):
        assert re.search(rf"^set-up: {step} \.\.\. \d+ s$", output, re.MULTILINE)
    # Whatever root made of it is the user's who asked for it.
    home = root.path / f"home/{USER}"
    uid = home.stat().st_uid
    assert [str(path) for path in home.rglob("*") if path.lstat().st_uid != uid] == []
    (picture,) = (home / "cwndtrace").glob("demo-*.png")
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    assert "installing" not in type_in(root, INSTALL)


def test_an_interface_called_eth0(root: chroot.Root) -> None:
    veth = "ip link add eth0 type veth peer name eth1; ip link set lo up; ip link set eth0 up; ip link set eth1 up"
    before = ("unshare", "--net", "sh", "-ec", f'{veth}; exec "$@"', "sh")
    output = type_in(root, f"{RUN} -d 2s -o eth0.cwnd", before=before)
    assert "Tracing eth0" in output
    assert "The capture is in eth0.cwnd." in output


@pytest.mark.parametrize(("command", "typed", "said"), TABLE, ids=[command for command, *_ in TABLE])
def test_the_table(root: chroot.Root, command: str, typed: str, said: str) -> None:
    assert said in type_in(root, typed or command)


def only_in(suite: str, root: chroot.Root) -> None:
    """Leave the other root out: each of these takes minutes, and pip does the same in both."""
    if root.suite != suite and "CWNDTRACE_NEWCOMER" not in os.environ:
        pytest.skip(f"runs in {suite}; in both by CWNDTRACE_NEWCOMER=1 make test-distributions")


def test_jupyter(root: chroot.Root) -> None:
    only_in("trixie", root)
    for command, typed, said in JUPYTER_STEPS:
        assert said in type_in(root, typed or command)


def test_pipx(root: chroot.Root) -> None:
    only_in("bookworm", root)
    for command, typed, said in PIPX_STEPS:
        assert said in type_in(root, typed or command)
