# SPDX-License-Identifier: Apache-2.0
"""Each command of the README and of the pages on installing and Python runs on a bare Debian 12 and a bare Debian 13.

It is typed as a user with sudo pastes it.
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

# Each command of the pages, what is typed for it ("" where that is the command itself), and what it says then.
TABLE = [
    ("sudo cwndtrace doctor", "", "will work here."),
    # The demo has just measured in full.
    ("sudo cwndtrace reproduce", "sudo cwndtrace reproduce --rounds 1", "Picture:"),
    ("cwndtrace run --help", "", "--iface"),
    ("cwndtrace report CAPTURE", "cwndtrace report demo-*.cwnd", "idle"),
    ("cwndtrace plot CAPTURE", "cwndtrace plot demo-*.cwnd", ""),
    ("cwndtrace compare A B", "cwndtrace compare demo-*.cwnd demo-*.cwnd", ""),
    # timeout(1) ends with 124 where it had to end it: serve goes on until then.
    ("cwndtrace serve --host ::", "timeout -s INT 5 cwndtrace serve --host :: || test $? = 124", ""),
]
# The order of these counts.
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


@pytest.fixture(scope="module")
def with_user(root: chroot.Root) -> Iterator[chroot.Root]:
    """A root with a user who may become root by sudo, and has a clone of the checkout; both are gone at the end."""
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
    """What ``make demo`` says where cwndtrace isn't installed, nor a package that it needs."""
    with_user.make("uninstall")
    with_user.good("dpkg", "--remove", "python3-bpfcc")
    return type_in(with_user, "umask 077; make demo")


@pytest.fixture(scope="module")
def shown(with_user: chroot.Root, demo: str) -> chroot.Root:
    """A root in which the demo was made."""
    assert demo
    return with_user


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
    return root.good(*before, *as_user, "bash", "-c", line, cwd=CLONE)


def test_the_readme_has_no_other_command() -> None:
    text = "\n".join((CHECKOUT / page).read_text(encoding="utf-8") for page in PAGES)
    fenced = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    found = {line for kind, block in fenced.findall(text) if kind == "sh" for line in block.splitlines()}
    found |= set(re.findall(r"`((?:sudo|make|pip|pipx|python3|cwndtrace|~\S*) (?!-E)[^`]+)`", fenced.sub("", text)))
    tried = {command for command, *_ in TABLE + PIPX_STEPS + JUPYTER_STEPS} | {"make demo", INSTALL, RUN}
    assert found == tried | set(ELSEWHERE)


def test_the_demo_as_a_user_with_sudo(shown: chroot.Root, demo: str) -> None:
    for step in ("apt-get install", "installing Python packages into /opt/cwndtrace", "compiling them"):
        assert re.search(rf"^set-up: {step} \.\.\. \d+ s$", demo, re.MULTILINE)
    # Whatever root made of it is the user's who asked for it.
    home = shown.path / f"home/{USER}"
    uid = home.stat().st_uid
    assert [str(path) for path in home.rglob("*") if path.lstat().st_uid != uid] == []
    (capture,) = (home / "cwndtrace").glob("demo-*.cwnd")
    (picture,) = (home / "cwndtrace").glob("demo-*.png")
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    assert picture.stat().st_size > 10_000
    assert {capture.name, picture.name} <= set(re.split(r"[\s/]+", demo))
    assert list(capture.glob("cwnd_reset/*.parquet"))
    assert list(capture.glob("block_io/*.parquet"))


def test_the_set_up_changes_nothing_after_the_demo(shown: chroot.Root) -> None:
    assert "installing" not in type_in(shown, INSTALL)


def test_an_interface_called_eth0(shown: chroot.Root) -> None:
    veth = "ip link add eth0 type veth peer name eth1; ip link set lo up; ip link set eth0 up; ip link set eth1 up"
    before = ("unshare", "--net", "sh", "-ec", f'{veth}; exec "$@"', "sh")
    output = type_in(shown, f"{RUN} -d 2s -o eth0.cwnd", before=before)
    assert "Tracing eth0" in output
    assert "The capture is in eth0.cwnd." in output


@pytest.mark.parametrize(("command", "typed", "said"), TABLE, ids=[command for command, *_ in TABLE])
def test_the_table(shown: chroot.Root, command: str, typed: str, said: str) -> None:
    assert said in type_in(shown, typed or command)


def only_in(suite: str, root: chroot.Root) -> None:
    """Leave the other root out: each of these takes minutes, and pip does the same in both."""
    if root.suite != suite and "CWNDTRACE_NEWCOMER" not in os.environ:
        pytest.skip(f"runs in {suite}; in both by CWNDTRACE_NEWCOMER=1 make test-distributions")


def test_jupyter(shown: chroot.Root) -> None:
    only_in("trixie", shown)
    for command, typed, said in JUPYTER_STEPS:
        assert said in type_in(shown, typed or command)


def test_pipx(shown: chroot.Root) -> None:
    only_in("bookworm", shown)
    try:
        for command, typed, said in PIPX_STEPS:
            assert said in type_in(shown, typed or command)
    finally:
        shown.good("rm", "-rf", "/opt/pipx", "/usr/local/bin/cwndtrace")
