# SPDX-License-Identifier: Apache-2.0
"""What a user can do who may run nothing but cwndtrace by sudo, in the distributions' roots.

By sudo itself and a rule of its own: nothing of root's may be made, changed, replaced, or told.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import chroot

SAMPLE = chroot.CHECKOUT / "tests/data/sample.cwnd"
NAME = f"cwt-test-{os.getpid()}"
RULE = f"etc/sudoers.d/{NAME}"
COMMAND = "/usr/local/bin/cwndtrace"
LINE = "ALL ALL=(ALL) NOPASSWD: ALL"

pytestmark = [pytest.mark.chroot, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Machine:
    """A user with such a rule in a root."""

    root: chroot.Root
    uid: int
    home: Path
    """As seen there; it holds a capture, a.cwnd, and a link to a file of root's, link.html"""
    closed: Path
    """A folder of root's that nobody else may look into: there.cwnd is a capture, victim a file."""

    def here(self, path: Path) -> Path:
        """A path of the root's as it is seen from outside."""
        return self.root.path / path.relative_to("/")

    def run(self, *arguments: str | Path, sudo: bool = True) -> tuple[int, str]:
        """Run the command by sudo, or another one as the user; its exit code and all that it said."""
        prefix = ["sudo", "-n", COMMAND] if sudo else []
        command = ["runuser", "-u", NAME, "--", *prefix, *map(str, arguments)]
        done = self.root.run(*command, cwd=str(self.home), timeout=120)
        return done.returncode, done.stdout

    def refused(self, *arguments: str | Path, code: int = 1) -> str:
        """Run it; it must end with an error of its own. What it said."""
        found, said = self.run(*arguments)
        assert (found, "cwndtrace: " in said, "Traceback" in said) == (code, True, False), said
        return said


def furnish(root: chroot.Root, uid: int, stack: ExitStack) -> Machine:
    """Give the user their rule, a capture, and things of root's to aim at."""
    rule, home, closed = root.path / RULE, Path("/home", NAME), Path("/root", NAME)
    stack.callback(rule.unlink, missing_ok=True)
    rule.touch(mode=0o440)
    rule.write_text(f"{NAME} ALL=(root) NOPASSWD: {COMMAND}\n")
    machine = Machine(root, uid, home, closed)
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


@pytest.fixture(scope="module")
def machine(installed: chroot.Root) -> Iterator[Machine]:
    if not installed.has("sudo"):
        installed.add("sudo", "passwd")
    with ExitStack() as stack:
        installed.good("useradd", "--create-home", "--home-dir", f"/home/{NAME}", NAME)
        stack.callback(installed.good, "userdel", "--remove", NAME)
        line = next(x for x in (installed.path / "etc/passwd").read_text().splitlines() if x.startswith(f"{NAME}:"))
        yield furnish(installed, int(line.split(":")[2]), stack)


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
        assert "doesn't end in .png, .svg or .pdf" in machine.refused("plot", "a.cwnd", "-o", target, code=2)
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
