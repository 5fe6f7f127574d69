# SPDX-License-Identifier: Apache-2.0
"""What a user can do who may run nothing but cwndtrace by sudo: on this machine, and in the distributions' roots.

By sudo itself and a rule of its own: nothing of root's may be made, changed, replaced, or told.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import chroot

SAMPLE = chroot.CHECKOUT / "tests/data/sample.cwnd"
NAME = f"cwt-test-{os.getpid()}"
RULE = f"etc/sudoers.d/{NAME}"
LINE = "ALL ALL=(ALL) NOPASSWD: ALL"

pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Machine:
    """A user with such a rule, on this machine or in a root; ``path`` is where its files lie as seen from here."""

    path: Path
    root: chroot.Root | None
    command: str
    uid: int
    home: Path
    """As seen there; it holds a capture, a.cwnd, and a link to a file of root's, link.html"""
    closed: Path
    """A folder of root's that nobody else may look into: there.cwnd is a capture, victim a file."""

    def here(self, path: Path) -> Path:
        return self.path / path.relative_to("/")

    def run(self, *arguments: str | Path, sudo: bool = True) -> tuple[int, str]:
        """Run the command by sudo, or another one as the user; its exit code and all that it said."""
        prefix = ["sudo", "-n", self.command] if sudo else []
        command = ["runuser", "-u", NAME, "--", *prefix, *map(str, arguments)]
        if self.root is not None:
            done = self.root.run(*command, cwd=str(self.home), timeout=120)
        else:
            done = subprocess.run(
                command, cwd=self.home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, check=False, timeout=120,
            )  # fmt: skip
        return done.returncode, done.stdout

    def refused(self, *arguments: str | Path, code: int = 1) -> str:
        """Run it; it must end with an error of its own. What it said."""
        found, said = self.run(*arguments)
        assert (found, "cwndtrace: " in said, "Traceback" in said) == (code, True, False), said
        return said


@contextmanager
def user_here() -> Iterator[Path]:
    """The user on this machine; their home."""
    home = Path("/home", NAME)
    subprocess.run(["useradd", "--create-home", "--home-dir", home, NAME], check=True, capture_output=True)
    try:
        yield home
    finally:
        subprocess.run(["userdel", "--remove", NAME], check=True, capture_output=True)


def furnish(path: Path, root: chroot.Root | None, command: str, uid: int, stack: ExitStack) -> Machine:
    """Give the user their rule, a capture, and things of root's to aim at."""
    rule, home, closed = path / RULE, Path("/home", NAME), Path("/root", NAME)
    stack.callback(rule.unlink, missing_ok=True)
    rule.touch(mode=0o440)
    rule.write_text(f"{NAME} ALL=(root) NOPASSWD: {command}\n")
    machine = Machine(path, root, command, uid, home, closed)
    stack.callback(shutil.rmtree, machine.here(closed), ignore_errors=True)
    machine.here(closed).mkdir(mode=0o700)
    shutil.copytree(SAMPLE, machine.here(closed / "there.cwnd"))
    machine.here(closed / "victim").write_text("root's")
    capture = machine.here(home / "a.cwnd")
    shutil.copytree(SAMPLE, capture)
    for each in (capture, *capture.rglob("*")):
        os.chown(each, uid, -1)
    link = machine.here(home / "link.html")
    link.symlink_to(closed / "victim")
    os.lchown(link, uid, -1)
    return machine


@contextmanager
def this_machine() -> Iterator[Machine]:
    missing = [tool for tool in ("sudo", "runuser", "useradd") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: sudo make test installs it")
    command = str(Path(sys.executable).with_name("cwndtrace"))
    with ExitStack() as stack:
        stack.enter_context(user_here())
        machine = furnish(Path("/"), None, command, pwd.getpwnam(NAME).pw_uid, stack)
        code, said = machine.run("--version")
        if code == 0:
            code, said = machine.run("report", "a.cwnd")
        if code and "a part of this installation" in said:
            pytest.skip("other users may not read this checkout: clone it where they may")
        yield machine


@contextmanager
def distribution(root: chroot.Root) -> Iterator[Machine]:
    root.make("install")
    if not root.has("sudo"):
        root.add("sudo", "passwd")
    with ExitStack() as stack:
        root.good("useradd", "--create-home", "--home-dir", f"/home/{NAME}", NAME)
        stack.callback(root.good, "userdel", "--remove", NAME)
        line = next(x for x in (root.path / "etc/passwd").read_text().splitlines() if x.startswith(f"{NAME}:"))
        yield furnish(root.path, root, "/usr/local/bin/cwndtrace", int(line.split(":")[2]), stack)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("here", marks=pytest.mark.live),
        *(pytest.param(suite, marks=pytest.mark.chroot) for suite in chroot.SUITES),
    ],
)
def machine(request: pytest.FixtureRequest, root_of: Callable[[str], chroot.Root]) -> Iterator[Machine]:
    with this_machine() if request.param == "here" else distribution(root_of(request.param)) as made:
        yield made


def test_the_rule_is_for_cwndtrace_alone(machine: Machine) -> None:
    code, said = machine.run("sudo", "-n", "id", sudo=False)
    assert code != 0, said
    assert "uid=0" not in said


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("plot", "a.cwnd", "-o", "new.png"), "new.png"),
        (("report", "a.cwnd", "--html", "new.html"), "new.html"),
    ],
    ids=["plot", "report"],
)
def test_what_is_the_users_stays_the_users(machine: Machine, arguments: tuple[str, ...], name: str) -> None:
    code, said = machine.run(*arguments)
    assert code == 0, said
    found = machine.here(machine.home / name).lstat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode), found.st_size > 10_000) == (machine.uid, 0o600, True)


def test_no_file_is_written_by_roots_power(machine: Machine) -> None:
    victim = machine.here(machine.closed / "victim")
    # The old way in: a name that is a line for sudoers in the title of a PostScript picture.
    evil = f"x\n{LINE}\n.ps"
    for target in (evil, f"/etc/sudoers.d/{evil}", "/etc/nologin", "/etc/sudoers.d/x"):
        assert "ends in none of .png, .svg and .pdf" in machine.refused("plot", "a.cwnd", "-o", target, code=2)
    for target in ("/etc/cwt.png", "/root/cwt.svg", "/etc/sudoers.d/cwt.pdf"):
        assert "can't be written: Permission denied" in machine.refused("plot", "a.cwnd", "-o", target)
        assert not machine.here(Path(target)).exists()
    for target in ("/etc/nologin", "/root/cwt", "/etc/sudoers.d/cwt", str(machine.closed / "victim"), "link.html"):
        assert "can't be written: Permission denied" in machine.refused("report", "a.cwnd", "--html", target)
    assert victim.read_text() == "root's"
    assert not machine.here(Path("/etc/nologin")).exists()
    assert {p.name for p in machine.here(Path("/etc/sudoers.d")).iterdir()} <= {"README", NAME}
    assert LINE not in "".join(p.name for p in machine.here(machine.home).iterdir())


@pytest.mark.parametrize("command", [("run",), ("run", "--stay-root"), ("reproduce",)], ids=" ".join)
def test_no_folder_is_made_by_roots_power(machine: Machine, command: tuple[str, ...]) -> None:
    targets = [Path(each) for each in ("/etc/nologin", "/etc/sudoers.d/x", "/run/netns/cwt-1-a-1", "/root/x")]
    machine.here(Path("/run/netns")).mkdir(parents=True, exist_ok=True)
    for target in (*targets, machine.closed / "x"):
        assert "can't be made: Permission denied" in machine.refused(*command, "-o", target)
        assert not machine.here(target).exists()


@pytest.mark.parametrize(
    "command",
    [
        ("report",), ("report", "--json"), ("plot",), ("compare", "a.cwnd"),
        ("run", "-o"), ("run", "--stay-root", "-o"), ("reproduce", "-o"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_nothing_is_told_of_what_the_user_may_not_see(machine: Machine, command: tuple[str, ...]) -> None:
    said = set()
    for name in ("there.cwnd", "missing.cwnd", "victim/below"):
        path = machine.closed / name
        assert machine.here(path).exists() is (name == "there.cwnd")
        said.add(machine.refused(*command, path).replace(str(path), "PATH"))
    assert len(said) == 1, said
