# SPDX-License-Identifier: Apache-2.0
"""Tests of a user who may run only cwndtrace by sudo, in the roots of distributions, with sudo itself and such a rule.

The user must not be able to make, change, replace or read any file as root.
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
    """A root in which a user has such a rule."""

    root: chroot.Root
    uid: int
    home: Path
    """The user's folder, as a path in the root; it has a capture, a.cwnd, and link.html, a link to a file of root."""
    closed: Path
    """A folder that only root may read, as a path in the root; it has a capture, there.cwnd, and a file, victim."""

    def here(self, path: Path) -> Path:
        """Return a path in the root as a path of this machine."""
        return self.root.path / path.relative_to("/")

    def run(self, *arguments: str | Path, sudo: bool = True) -> tuple[int, str]:
        """Run cwndtrace by sudo, or without sudo another command as the user; return its exit code and output."""
        prefix = ["sudo", "-n", COMMAND] if sudo else []
        command = ["runuser", "-u", NAME, "--", *prefix, *map(str, arguments)]
        done = self.root.run(*command, cwd=str(self.home), timeout=120)
        return done.returncode, done.stdout

    def refused(self, *arguments: str | Path, code: int = 1) -> str:
        """Run cwndtrace by sudo, assert that it reports an error with this exit code, and return its output."""
        actual, output = self.run(*arguments)
        assert (actual, "cwndtrace: " in output, "Traceback" in output) == (code, True, False), output
        return output


def furnish(root: chroot.Root, uid: int, stack: ExitStack) -> Machine:
    """Give the user the rule and a capture, and make files of root that the tests attack."""
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
    for path in (capture, *capture.rglob("*")):
        os.chown(path, uid, -1)
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


def test_the_rule_allows_only_cwndtrace(machine: Machine) -> None:
    code, output = machine.run("sudo", "-n", "id", sudo=False)
    assert code != 0, output
    assert "uid=0" not in output


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("plot", "a.cwnd", "-o", "new.png"), "new.png"),
        (("report", "a.cwnd", "--html", "new.html"), "new.html"),
        (("export", "a.cwnd", "--jsonl", "connections=new.jsonl"), "new.jsonl"),
    ],
    ids=["plot", "report", "export"],
)
def test_new_files_belong_to_the_user(machine: Machine, arguments: tuple[str, ...], name: str) -> None:
    code, output = machine.run(*arguments)
    assert code == 0, output
    status = machine.here(machine.home / name).lstat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode), status.st_size > 10_000) == (machine.uid, 0o600, True)


def test_no_file_is_written_with_roots_privileges(machine: Machine) -> None:
    victim = machine.here(machine.closed / "victim")
    # A PostScript picture has its file name as the title, and this name is a line for sudoers.
    evil = f"x\n{LINE}\n.ps"
    for target in (evil, f"/etc/sudoers.d/{evil}", "/etc/nologin", "/etc/sudoers.d/x"):
        assert "doesn't end in .png, .svg or .pdf" in machine.refused("plot", "a.cwnd", "-o", target, code=2)
    for target in ("/etc/cwt.png", "/root/cwt.svg", "/etc/sudoers.d/cwt.pdf"):
        assert "can't be written: Permission denied" in machine.refused("plot", "a.cwnd", "-o", target)
        assert not machine.here(Path(target)).exists()
    for target in ("/etc/nologin", "/root/cwt", "/etc/sudoers.d/cwt", str(machine.closed / "victim"), "link.html"):
        assert "can't be written: Permission denied" in machine.refused("report", "a.cwnd", "--html", target)
        assert "can't be written: Permission denied" in machine.refused("export", "a.cwnd", "--csv", f"resets={target}")
    assert victim.read_text() == "root's"
    assert not machine.here(Path("/etc/nologin")).exists()
    assert {p.name for p in machine.here(Path("/etc/sudoers.d")).iterdir()} <= {"README", NAME}
    assert LINE not in "".join(p.name for p in machine.here(machine.home).iterdir())


@pytest.mark.parametrize("command", [("run",), ("run", "--stay-root"), ("reproduce",)], ids=" ".join)
def test_no_folder_is_made_with_roots_privileges(machine: Machine, command: tuple[str, ...]) -> None:
    targets = [Path(path) for path in ("/etc/nologin", "/etc/sudoers.d/x", "/run/netns/cwt-1-a-1", "/root/x")]
    machine.here(Path("/run/netns")).mkdir(parents=True, exist_ok=True)
    for target in (*targets, machine.closed / "x"):
        assert "can't be made: Permission denied" in machine.refused(*command, "-o", target)
        assert not machine.here(target).exists()


@pytest.mark.parametrize(
    "command",
    [
        ("report",), ("report", "--json"), ("plot",), ("compare", "a.cwnd"), ("dump",),
        ("export", "--csv", "resets=-"),
        ("fleet", "report"),
        ("run", "-o"), ("run", "--stay-root", "-o"), ("reproduce", "-o"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_errors_reveal_no_files_that_the_user_may_not_see(machine: Machine, command: tuple[str, ...]) -> None:
    errors = set()
    for name in ("there.cwnd", "missing.cwnd", "victim/below"):
        path = machine.closed / name
        assert machine.here(path).exists() is (name == "there.cwnd")
        errors.add(machine.refused(*command, path).replace(str(path), "PATH"))
    assert len(errors) == 1, errors
