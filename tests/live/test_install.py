# SPDX-License-Identifier: Apache-2.0
"""Tests of what `make install` refuses: unusable paths, folders that it didn't make, and a missing network.

test_distributions.py tests successful installations in bare roots.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.live

# Packets over this route are lost without an error.
BLACK_HOLE = """
ip link add here type veth peer name there
ip address add 192.0.2.1/24 dev here
ip link set here up
ip link set there up
ip neighbour add 192.0.2.2 lladdr 02:00:00:00:00:01 dev here
ip route add default via 192.0.2.2
exec "$@"
"""
NO_ROUTE = ("unshare", "--net")
NO_ANSWER = ("unshare", "--net", "sh", "-ec", BLACK_HOLE, "sh")


def make(
    goal: str, prefix: str | Path, bindir: str | Path, before: tuple[str, ...] = NO_ROUTE, *more: str
) -> subprocess.CompletedProcess[str]:
    """Run a make goal, by default without a network, so nothing can be installed."""
    # This machine's pip settings are ignored, because they may name an index on its disk.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env["PIP_CONFIG_FILE"] = os.devnull
    env["LC_ALL"] = "C.UTF-8"
    return subprocess.run(
        [*before, "make", "--silent", goal, "PACKAGES=no", f"PREFIX={prefix}", f"BINDIR={bindir}", *more],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(autouse=True)
def logs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the set-up write the logs of failed steps into a folder of the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("logs")))


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "prefix", tmp_path / "bin"


@pytest.mark.parametrize("goal", ["install", "uninstall", "demo"])
@pytest.mark.parametrize("name", ["relp", "./relp", "two words", "-rf", "", "/tmp/a\nb", "it's relative"])
def test_a_relative_path_or_one_with_a_line_break_is_refused(tmp_path: Path, goal: str, name: str) -> None:
    for prefix, bindir in ((name, str(tmp_path / "bin")), (str(tmp_path / "prefix"), name)):
        done = make(goal, prefix, bindir)
        assert done.returncode != 0
        if "\n" in name:
            assert "has a line break or another control character in it." in done.stdout
        else:
            assert f"={name} doesn't begin at /." in done.stdout
            assert f"{ROOT}/{name.removeprefix('./')}'" in done.stdout or not name
        assert "Error" not in done.stdout.replace("Error 1", "")
        assert list(tmp_path.iterdir()) == []
    assert not (ROOT / "relp").exists()


@pytest.mark.parametrize("name", ["/", "/etc"])
@pytest.mark.parametrize("goal", ["install", "uninstall"])
def test_a_folder_that_make_install_did_not_make_is_refused(places: tuple[Path, Path], goal: str, name: str) -> None:
    done = make(goal, name, places[1])
    assert done.returncode != 0
    assert "it stays untouched" in done.stdout


def test_the_python_of_another_environment_never_runs(places: tuple[Path, Path]) -> None:
    prefix, bindir = places
    (prefix / "bin").mkdir(parents=True)
    ran = prefix / "ran"
    python = prefix / "bin" / "python"
    python.write_text(f"#!/bin/sh\n: >{ran}\n")
    python.chmod(0o755)
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin\n")
    for stamp in (False, True):
        if stamp:  # another user made it, to look like root's
            (prefix / ".cwndtrace-setup").touch()
            os.chown(prefix, 65534, 65534)
        before = sorted(prefix.rglob("*"))
        for goal in ("install", "uninstall"):
            done = make(goal, prefix, bindir)
            assert done.returncode != 0
            assert "it stays untouched" in done.stdout
            assert sorted(prefix.rglob("*")) == before
    assert not ran.exists()


@pytest.mark.parametrize("before", [NO_ROUTE, NO_ANSWER], ids=["no route", "no answer"])
def test_without_a_network_it_ends_within_15_s(places: tuple[Path, Path], before: tuple[str, ...]) -> None:
    # It runs at real-time priority, because the limit is meant for a machine that isn't busy.
    begin = time.monotonic()
    done = make("install", *places, before=("chrt", "--rr", "1", *before))
    assert time.monotonic() - begin < 15
    assert done.returncode != 0
    assert "set-up: asking the package index" in done.stdout
    assert "Check that the network and the package index can be reached" in done.stdout
    assert f"this runs the code in {ROOT} as root" in done.stdout
    assert not any(place.exists() for place in places)


@pytest.mark.parametrize("name", ["it's", 'a "b', "`touch ran`", "; touch ran", "a b*"])
def test_no_character_has_a_meaning_in_the_shell(places: tuple[Path, Path], name: str) -> None:
    done = make("install", *places, NO_ROUTE, f"PYTHON={name}")
    assert f"no Python 3.11 or newer with venv is here ({name} is none)." in done.stdout
    # With any value but "no", make asks the package manager, which has no network here.
    assert "unexpected EOF" not in make("uninstall", *places, NO_ROUTE, f"PACKAGES={name}").stdout
    assert not (ROOT / "ran").exists()
    assert not any(place.exists() for place in places)


# Each folder is a separate tmpfs; the last line of the output lists their contents.
INSTALLED = """
mount -t tmpfs none /opt
mount -t tmpfs none /var/cache
mkdir -p /opt/cwndtrace /opt/other /var/cache/cwndtrace/kernels
touch /opt/cwndtrace/.cwndtrace-setup /opt/other/.cwndtrace-setup /var/cache/cwndtrace/0123abcd.json
"$@"
echo left: /opt/* /var/cache/cwndtrace/*
"""


@pytest.mark.parametrize(
    ("prefix", "left"),
    [
        ("/opt/other", "/opt/cwndtrace /var/cache/cwndtrace/0123abcd.json /var/cache/cwndtrace/kernels"),
        ("/opt/cwndtrace", "/opt/other /var/cache/cwndtrace/kernels"),
    ],
)
def test_uninstall_removes_only_its_own_files(tmp_path: Path, prefix: str, left: str) -> None:
    done = make("uninstall", prefix, tmp_path / "bin", ("unshare", "--mount", "sh", "-ec", INSTALLED, "sh"))
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == f"left: {left}"


def test_help_warns_that_root_runs_this_checkouts_code() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("make install "))
    assert "runs this checkout's code as root" in line
