# SPDX-License-Identifier: Apache-2.0
"""Tests of kernel-patches/build on the host: its errors for bad input, and the mirrors that it chooses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.harness.scripts import PATCHES, load_script

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """The script kernel-patches/build as a module."""
    return load_script(PATCHES / "build")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user starts it."""
    command = [sys.executable, str(PATCHES / "build"), *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)


def test_a_version_without_a_series_is_refused(tmp_path: Path) -> None:
    done = run("--version", "9.9", "--cache", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no series for Linux 9.9; there are 6.1, 6.12, 7.2." in done.stderr


@pytest.mark.parametrize(("version", "nearest"), [("5.15", "6.1"), ("6.16", "6.12"), ("6.19", "7.2"), ("7.0.3", "7.2")])
def test_the_nearest_series_is_named(version: str, nearest: str, build: ModuleType) -> None:
    all_series = build.parse_series((PATCHES / "series.toml").read_text())
    with pytest.raises(build.UsageError, match=rf"--version {nearest.replace('.', '[.]')} --base PATH"):
        build.find_series(all_series, version)


def test_a_built_in_option_satisfies_a_module(build: ModuleType) -> None:
    fragment = "CONFIG_VETH=m\nCONFIG_TUN=m\nCONFIG_IFB=m\nCONFIG_BPF=y\n"
    config = "CONFIG_VETH=y\nCONFIG_TUN=m\n# CONFIG_IFB is not set\nCONFIG_BPF=m\n"
    assert build.missing_options(fragment, config) == ["CONFIG_IFB=m", "CONFIG_BPF=y"]


@pytest.mark.parametrize(
    "failure",
    [
        "/bin/sh: 1: zstd: not found",
        "net/ipv4/tcp.c:12:3: error: 'cwnd' undeclared (first use in this function)",
        "dpkg-checkbuilddeps: error: unmet build dependencies: build-essential:native",
        "make[3]: *** [debian/rules:76: build-arch] Error 2",
    ],
)
def test_the_error_names_the_first_cause_of_a_failed_build(failure: str, build: ModuleType) -> None:
    output = f"  CC      tools/objtool/str_error_r.o\n  {failure}\nmake: *** [Makefile:236: __sub-make] Error 2\n"
    assert build.first_cause(output) == failure


def test_each_architecture_has_its_fragment(build: ModuleType) -> None:
    for name, arch in build.ARCHES.items():
        files = build.fragments(build.parse_args(["--version", "6.12", "--arch", name]))
        assert [file.name for file in files] == ["test.config", f"test.{name}.config"]
        assert all(file.exists() for file in files)
        native = arch.machine == os.uname().machine
        assert arch.environment(name) == ({} if native else {"ARCH": name, "CROSS_COMPILE": arch.cross})
        assert arch.tool("gcc") == ("gcc" if native else f"{arch.cross}gcc")


def test_another_architectures_kernel_is_not_made_from_this_ones_configuration(tmp_path: Path) -> None:
    other = "arm64" if os.uname().machine == "x86_64" else "x86"
    done = run("--version", "6.12", "--arch", other, "--config", "localmodconfig", "--cache", str(tmp_path))
    assert done.returncode == 2
    assert f"localmodconfig takes the configuration of the running kernel, which is no {other} kernel" in done.stderr


def test_an_invalid_version_is_refused(tmp_path: Path) -> None:
    done = run("--version", "newest", "--cache", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "'newest' is not a kernel version; write it like 6.12." in done.stderr


def test_a_folder_without_a_source_tree_is_refused(tmp_path: Path) -> None:
    done = run("--version", "6.12", "--base", str(tmp_path), "--cache", str(tmp_path / "cache"))
    assert done.returncode == 2
    assert "is neither a kernel's source tree nor a tarball of one" in done.stderr


def test_the_error_names_the_packages_of_missing_tools(tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    assert gcc
    (tmp_path / "gcc").symlink_to(gcc)
    done = run("--version", "6.12", "--cache", str(tmp_path / "cache"), PATH=str(tmp_path))
    assert done.returncode == 1
    assert "tools are missing; get them with: apt-get install " in done.stderr
    assert {"dwarves", "flex", "xz-utils"} <= set(done.stderr.split())
    assert "libelf-dev" not in done.stderr


def test_a_base_that_the_series_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "linux"
    (base / "net/ipv4").mkdir(parents=True)
    (base / "Kbuild").touch()
    (base / "net/ipv4/tcp_output.c").write_text("int nothing;\n" * 400)
    done = run("--version", "6.12", "--base", str(base), "--cache", str(tmp_path / "cache"), "--target", "tree")
    assert (done.returncode, done.stdout) == (1, "")
    assert "series 6.12 does not fit this source: 0001-tcp-add-tcp_cwnd_reset-tracepoint.patch: " in done.stderr
    assert "include/trace/events/tcp.h: no such file" in done.stderr
    assert "net/ipv4/tcp_output.c: hunk 1 at line " in done.stderr
    assert "It was made from linux-source-6.12 " in done.stderr
    assert [path.name for path in (tmp_path / "cache/kernels").iterdir() if not path.name.endswith(".lock")] == []


def test_a_disk_that_is_too_full_is_refused(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.DISK_NEEDED, "tree", 1 << 60)
    with pytest.raises(build.BuildError, match=r"1073741824 GiB are needed, .* GiB are free") as caught:
        build.check_disk(tmp_path, "tree")
    assert "--cache" in str(caught.value)


LISTS = """
# deb https://old.example/debian bookworm main
deb [arch=amd64] https://mirror.example/debian bookworm main
deb https://mirror.example/debian-security bookworm-security main
deb https://elsewhere.example/debian-tools any main
"""


@pytest.mark.parametrize(
    ("suite", "mirror", "without"),
    [
        ("bookworm", "https://mirror.example/debian", "http://deb.debian.org/debian"),
        ("bookworm-security", "https://mirror.example/debian-security", "http://deb.debian.org/debian-security"),
    ],
)
def test_the_mirror_of_a_suite_comes_from_the_sources_list(
    build: ModuleType, suite: str, mirror: str, without: str
) -> None:
    assert build.debian_mirror([LISTS], suite) == mirror
    assert build.debian_mirror(["deb https://elsewhere.example/debian-tools any main"], suite) == without
