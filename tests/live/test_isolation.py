# SPDX-License-Identifier: Apache-2.0
"""Tests that no command, and no child of one, runs or reads files that others put into a folder or the environment.

The files are planted in the current folder, a home, and folders that variables name. The kernel reports by inotify
whether any of them was opened.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cwndtrace import isolated

pytestmark = pytest.mark.live

SAMPLE = Path(__file__).parents[1] / "data" / "sample.cwnd"
COMMAND = isolated.python("-m", "cwndtrace")
REPRODUCE = ("--rtt", "60ms", "--burst", "20k", "--idle", "300ms", "--rounds", "1")
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
MODULES = ("json.py", "typing.py", "sitecustomize.py", "usercustomize.py", "cwndtrace/__init__.py", "bcc/__init__.py")
COMMANDS = ("losetup", "fc-list", "modprobe", "ip", "tc", "mount", "gcc", "ldconfig")
_IN_OPEN = 0x20
_libc = ctypes.CDLL(None, use_errno=True)


class Opened:
    """Watched files, and those of them that a process has opened."""

    def __init__(self) -> None:
        self.fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self.fd >= 0
        self._names: dict[int, str] = {}

    def watch(self, file: Path) -> None:
        number = _libc.inotify_add_watch(self.fd, bytes(file), _IN_OPEN)
        assert number >= 0, os.strerror(ctypes.get_errno())
        self._names[number] = str(file)

    def take(self) -> set[str]:
        """Return the files that were opened since the last call."""
        names = set()
        while select.select([self.fd], [], [], 0)[0]:
            data = os.read(self.fd, 65536)
            while data:
                number, length = int.from_bytes(data[:4], sys.byteorder), int.from_bytes(data[12:16], sys.byteorder)
                names.add(self._names[number])
                data = data[16 + length :]
        return names


class Planted:
    """Folders with files that Python, matplotlib, a compiler and a search of PATH would use."""

    def __init__(self, root: Path) -> None:
        self.opened = Opened()
        self.folder, home, base, tools = (root / name for name in ("current", "home", "base", "bin"))
        site = f"lib/{PYTHON}/site-packages"
        for place in (self.folder, home, home / ".local" / site, base / site):
            for name in MODULES:
                self._plant(place / name, "")
        self._plant(root / "startup.py", "")
        rc = ".config/matplotlib/matplotlibrc"
        for name in ("current/matplotlibrc", f"home/{rc}", "config/matplotlib/matplotlibrc", "mpl/matplotlibrc", "rc"):
            self._plant(root / name, "axes.titlesize: 90\n")
        for name in COMMANDS:
            self._plant(tools / name, "#!/bin/sh\nexit 1\n")
            (tools / name).chmod(0o755)
        self._plant(root / "include/linux/types.h", "#error planted\n")
        self.environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(root / "config"),
            "MPLCONFIGDIR": str(root / "mpl"),
            "MATPLOTLIBRC": str(root / "rc"),
            "PYTHONPATH": str(self.folder),
            "PYTHONSTARTUP": str(root / "startup.py"),
            "PYTHONUSERBASE": str(base),
            "PYTHONINSPECT": "",
            "CPATH": str(root / "include"),
        }

    def _plant(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        self.opened.watch(file)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end in the planted folder, and assert that it opened no planted file."""
        self.opened.take()
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=200
        )
        assert self.opened.take() == set(), done.stderr
        return done


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    folders = Planted(tmp_path)
    yield folders
    os.close(folders.opened.fd)


def test_the_watch_sees_what_a_python_without_isolation_reads(planted: Planted) -> None:
    def read(code: str) -> set[str]:
        planted.opened.take()
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=planted.folder, env=planted.environment, capture_output=True, check=False)
        return {str(Path(name).relative_to(planted.folder.parent)) for name in planted.opened.take()}

    assert {"current/sitecustomize.py", "current/json.py"} <= read("import json")
    for name in MODULES:
        (planted.folder / name).unlink()
    opened = read("import matplotlib, subprocess; subprocess.run(['losetup'])")
    assert {"current/matplotlibrc", "bin/losetup"} <= opened
    (planted.folder / "matplotlibrc").unlink()
    assert "rc" in read("import matplotlib")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("doctor",),
        ("report", str(SAMPLE)),
        ("report", str(SAMPLE), "--html", "page.html"),
        ("plot", str(SAMPLE), "-o", "picture.svg"),
        ("compare", str(SAMPLE), str(SAMPLE)),
        ("dump", str(SAMPLE), "-o", "b.cwnd"),
        ("export", str(SAMPLE), "--csv", "summary=a.csv.gz"),
        ("fleet", "report", str(SAMPLE), "-o", "result"),
        ("run", "-d", "1s", "-o", "a.cwnd"),
        ("reproduce", *REPRODUCE, "--path", "relay", "-o", "out"),
    ],
    ids=lambda arguments: " ".join(a for a in arguments if "/" not in a),
)
def test_no_command_reads_what_is_planted(planted: Planted, arguments: tuple[str, ...]) -> None:
    done = planted.run(*COMMAND, *arguments)
    assert done.returncode == 0, done.stderr


def test_the_demo_reads_nothing_that_is_planted(planted: Planted) -> None:
    done = planted.run(*isolated.python("-m", "cwndtrace.lab.demo"), "--out", "out")
    assert done.returncode == 0, done.stderr
    assert list((planted.folder / "out").glob("*.png"))


def test_serve_reads_nothing_that_is_planted(planted: Planted) -> None:
    command = [*COMMAND, "serve", "--port", "0"]
    with subprocess.Popen(
        command, cwd=planted.folder, env=planted.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        try:
            assert server.stdout is not None
            assert select.select([server.stdout], [], [], 30)[0], "serve never reported that it listens"
            assert re.match(rb"Listening on 127\.0\.0\.1 ", server.stdout.readline())
        finally:
            server.terminate()
    assert planted.opened.take() == set()


def test_root_is_refused_where_python_would_take_modules_from_the_current_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cwndtrace", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 2
    assert f"{sys.executable} -I -m cwndtrace" in done.stderr
