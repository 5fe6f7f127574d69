# SPDX-License-Identifier: Apache-2.0
"""Tests of kernel-patches/build on the host: the series and the sources that it chooses, and its errors."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

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


def test_a_tree_needs_only_what_configures_it(tmp_path: Path) -> None:
    done = run("--version", "6.12", "--target", "tree", "--cache", str(tmp_path / "cache"), PATH=str(tmp_path))
    assert done.returncode == 1
    packages = "apt binutils bison dpkg flex gcc make patch tar xz-utils"
    assert done.stderr == f"build: tools are missing; get them with: apt-get install {packages}\n"


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


# ---- the series, on small trees and patches that are made here ----

CODE = "net/ipv4/tcp.c"
TESTS = "tools/testing/selftests/net/Makefile"


def tree(folder: Path, version: str, code: str, tests: str = "tests") -> Path:
    """Make a source tree of which patches change two lines: one of the code and one of the selftests."""
    major, minor, patch = version.split(".")
    makefile = f"# SPDX\nVERSION = {major}\nPATCHLEVEL = {minor}\nSUBLEVEL = {patch}\nEXTRAVERSION =\n"
    for path, text in {"Makefile": makefile, CODE: f"{code}\n", TESTS: f"{tests}\n"}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def add_series(patches: Path, name: str, code: str, tests: str = "tests") -> None:
    """Add a series that changes those two lines."""
    (patches / name).mkdir()
    for patch, path, old in (("0001-tcp-add.patch", CODE, code), ("0002-selftests-net-add.patch", TESTS, tests)):
        text = f"--- a/{path}\n+++ b/{path}\n@@ -1 +1 @@\n-{old}\n+patched by {name}\n"
        (patches / name / patch).write_text(f"Subject: a patch\n\n{text}-- \n2.39.5\n")


@pytest.fixture
def script(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with a folder of series of its own; the rest of kernel-patches isn't there."""
    monkeypatch.setattr(build, "HERE", tmp_path / "patches")
    build.HERE.mkdir()
    (tmp_path / "cache").mkdir()
    return build


def fit(script: ModuleType, base: Path, series: str | None = None) -> Any:
    """Return what the script finds for a source, and check that it remembers the same."""
    key = script.tree_digest(base) if base.is_dir() else script.file_digest(base)
    cache = script.HERE.parent / "cache"
    found = script.find_fit(base, key, series, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "copy_files", None)  # calling it would be an error
        assert script.find_fit(base, key, series, cache) == found
    return found


@pytest.mark.parametrize(
    ("version", "order"),
    [
        ("5.4.1", ["5.15", "6.1", "6.12", "7.0"]),
        ("6.8.12", ["6.1", "5.15", "6.12", "7.0"]),
        ("6.12.0", ["6.12", "6.1", "5.15", "7.0"]),
        ("7.3.4", ["7.0", "6.12", "6.1", "5.15"]),
    ],
)
def test_the_nearest_older_series_is_tried_first(script: ModuleType, version: str, order: list[str]) -> None:
    for name in ("6.1", "6.12", "bare", "5.15", "7.0"):
        add_series(script.HERE, name, "code")
    assert script.by_nearness(version) == order


@pytest.mark.parametrize(
    ("version", "code", "series"),
    [("6.8.1", "old", "6.1"), ("6.8.1", "new", "6.12"), ("6.18.2", "old", "6.1"), ("6.18.2", "new", "6.12")],
)
def test_the_series_is_the_one_that_fits(
    script: ModuleType, tmp_path: Path, version: str, code: str, series: str
) -> None:
    add_series(script.HERE, "6.1", "old")
    add_series(script.HERE, "6.12", "new")
    base = tree(tmp_path / "linux", version, code)
    assert fit(script, base) == script.Fit(version, series, True, "")
    assert (base / CODE).read_text() == f"{code}\n"


def test_of_two_series_that_fit_the_one_not_newer_than_the_kernel_is_taken(script: ModuleType, tmp_path: Path) -> None:
    for name in ("6.1", "6.12", "6.18"):
        add_series(script.HERE, name, "code")
    assert fit(script, tree(tmp_path / "linux", "6.17.3", "code")).series == "6.12"


def test_a_selftest_that_does_not_fit_is_left_out(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_series(script.HERE, "6.1", "code", "other tests")
    (script.HERE / "6.1/0003-Documentation-net-add.patch").write_text(
        (script.HERE / "6.1/0001-tcp-add.patch")
        .read_text()
        .replace("-code", "-patched by 6.1")
        .replace("+patched", "+twice")
    )
    found = fit(script, tree(tmp_path / "linux", "6.8.1", "code"))
    misfit = f"6.1/0002-selftests-net-add.patch: {TESTS}: hunk 1 at line 1"
    assert found == script.Fit("6.8.1", "6.1", False, misfit)
    names = [patch.name for patch in found.patches()]
    assert names == ["0001-tcp-add.patch", "0003-Documentation-net-add.patch"]
    script.check_fit(script.parse_args(["--version", "6.8"]), found)
    assert "series 6.1 fits Linux 6.8.1\nwarning: its selftest doesn't fit" in capsys.readouterr().err


def test_a_source_that_no_series_fits_is_refused(script: ModuleType, tmp_path: Path) -> None:
    add_series(script.HERE, "6.1", "old")
    add_series(script.HERE, "6.12", "new")
    found = fit(script, tree(tmp_path / "linux", "5.15.167", "ancient"))
    with pytest.raises(script.UsageError) as caught:
        script.check_fit(script.parse_args([]), found)
    assert caught.value.exit_code == 2
    message = f"no series fits Linux 5.15.167; the nearest fails at 6.1/0001-tcp-add.patch: {CODE}: hunk 1 at line 1.\n"
    assert str(caught.value).startswith(message)
    assert "--series" in str(caught.value)


def test_the_source_of_another_version_is_refused(script: ModuleType) -> None:
    found = script.Fit("6.12.3", "6.12", True, "")
    for version in ("6.12", "6.12.3"):
        script.check_fit(script.parse_args(["--version", version]), found)
    for version in ("6.1", "6.12.30", "7.12.3"):
        with pytest.raises(script.UsageError, match=rf"the source is Linux 6[.]12[.]3, not {re.escape(version)}"):
            script.check_fit(script.parse_args(["--version", version]), found)


def test_a_series_without_a_version_is_taken_only_by_name(script: ModuleType, tmp_path: Path) -> None:
    add_series(script.HERE, "bare", "code")
    add_series(script.HERE, "6.1", "other")
    base = tree(tmp_path / "linux", "6.12.3", "code")
    assert fit(script, base).series is None
    assert fit(script, base, "bare") == script.Fit("6.12.3", "bare", True, "")


def test_a_cover_letter_is_no_patch_of_the_series(script: ModuleType, tmp_path: Path) -> None:
    add_series(script.HERE, "6.12", "code")
    (script.HERE / "6.12/0000-cover-letter.patch").write_text("Subject: [PATCH 0/2] a series\n\nno diff\n")
    found = fit(script, tree(tmp_path / "linux", "6.12.3", "code"))
    assert found == script.Fit("6.12.3", "6.12", True, "")
    assert len(found.patches()) == 2


def test_a_changed_series_is_tried_again(script: ModuleType, tmp_path: Path) -> None:
    add_series(script.HERE, "6.1", "other")
    base = tree(tmp_path / "linux", "6.1.3", "code")
    assert fit(script, base).series is None
    shutil.rmtree(script.HERE / "6.1")
    add_series(script.HERE, "6.1", "code")
    assert fit(script, base).series == "6.1"


@pytest.mark.parametrize("packed", ["linux-6.8.12.tar.xz", "linux-6.8.12.tar.gz", "ubuntu"])
def test_a_tarball_is_tried_without_unpacking_it_whole(script: ModuleType, tmp_path: Path, packed: str) -> None:
    add_series(script.HERE, "6.6", "code")
    tree(tmp_path / "linux", "6.8.12", "code")
    top = packed.partition(".tar")[0]
    if packed == "ubuntu":  # which has a link to a tarball in a folder of the same name
        top = "linux-source-6.8.0"
        packed = f"{top}.tar.bz2"
        (tmp_path / top).mkdir()
        (tmp_path / packed).symlink_to(f"{top}/{packed}")
    mode: Any = f"w:{packed.rpartition('.')[2]}"
    with tarfile.open((tmp_path / packed).resolve(), mode) as tarball:
        tarball.add(tmp_path / "linux", top)
    source = script.given_source(str(tmp_path / packed))
    assert source.package_version is None
    assert fit(script, source.path) == script.Fit("6.8.12", "6.6", True, "")


@pytest.mark.parametrize(
    ("damage", "why"),
    [("cut", "can't be unpacked: "), ("nothing", "it has no top folder with the Makefile of one")],
)
def test_a_tarball_of_no_kernel_is_refused(script: ModuleType, tmp_path: Path, damage: str, why: str) -> None:
    add_series(script.HERE, "6.6", "code")
    base = tmp_path / "linux.tar.gz"
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/noise").write_bytes(os.urandom(100_000))
    with tarfile.open(base, "w:gz") as tarball:
        tarball.add(tmp_path / "linux", "linux")
    if damage == "cut":
        base.write_bytes(base.read_bytes()[:50_000])
    with pytest.raises(script.UsageError, match=why):
        fit(script, base)
    assert list((tmp_path / "cache/fits").iterdir()) == []


def test_the_series_of_this_folder_touch_what_they_should(build: ModuleType) -> None:
    assert {"net/ipv4/tcp_input.c", "net/ipv4/tcp_output.c", "include/trace/events/tcp.h"} <= build.touched_files()
    for name in build.all_series():
        kernel, whole = build.series_patches(name, selftest=False), build.series_patches(name)
        assert kernel, name
        assert set(kernel) <= set(whole)


# ---- the command line ----


def test_a_source_without_a_fit_and_an_unknown_series_exit_with_2(tmp_path: Path) -> None:
    base = tree(tmp_path / "linux", "6.12.3", "int nothing;\n" * 400)
    (base / "net/ipv4/tcp_output.c").write_text("int nothing;\n" * 400)
    cache = tmp_path / "cache"
    done = run("--base", str(base), "--cache", str(cache), "--target", "tree")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no series fits Linux 6.12.3; the nearest fails at 6.12/0001-" in done.stderr
    assert ": no such file" in done.stderr
    assert list((cache / "kernels").iterdir()) == []
    done = run("--base", str(base), "--cache", str(cache), "--series", "5.4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no series 5.4; there are " in done.stderr


def test_a_source_must_be_named(tmp_path: Path) -> None:
    done = run("--cache", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "name a kernel line, such as --version 6.12, or a source with --base PATH." in done.stderr


# ---- Debian's source: apt-get, apt-cache and dpkg-deb are replaced by a script, which counts what it was asked ----

FAKE = """#!/bin/sh
cd "$(dirname "$0")" || exit 1
echo "${0##*/}" "$@" >>asked
case "${0##*/} $*" in
*" update") if [ -e no-network ]; then echo "E: Failed to fetch http://mirror.example/debian"; exit 100; fi ;;
*" madison "*) echo "N: a note"; cat madison ;;
*" search "*) printf 'linux-source-6.1 - source\\nlinux-source-7.3 - source\\n' ;;
*" download "*) [ ! -e no-network ] || { echo "E: 404 Not Found"; exit 100; }; : >"$OLDPWD/package.deb" ;;
"dpkg-deb -x "*) mkdir -p "$3/usr/src"; cp madison "$3/usr/src/linux-source-6.12.tar.xz" ;;
esac
"""


class FakeArchive:
    """The archive that the replaced programs show."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("apt-get", "apt-cache", "dpkg-deb"):
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)
        self.has()

    def has(self, *versions: str) -> None:
        """Let the archive have these versions of linux-source-6.12, the newest first."""
        lines = [f"linux-source-6.12 | {version} | http://mirror.example/debian sid/main\n" for version in versions]
        (self.folder / "madison").write_text("".join(lines))

    def cut_off(self, cut: bool) -> None:
        """Take the network away, or give it back."""
        if cut:
            (self.folder / "no-network").touch()
        else:
            (self.folder / "no-network").unlink()

    def asked(self, word: str) -> int:
        """Return how often a program was called with this word."""
        path = self.folder / "asked"
        return sum(word in line.split() for line in path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def archive(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeArchive:
    """A fake archive first on the PATH, and nothing installed in /usr/src."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "keyring").touch()
    monkeypatch.setattr(build, "KEYRING", tmp_path / "keyring")
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "src")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return FakeArchive(tmp_path / "bin")


def day_passes(cache: Path) -> None:
    """Let the lists be a day old."""
    stamp = cache / "apt/debian/updated"
    os.utime(stamp, (time.time() - 25 * 3600,) * 2)


def test_the_newest_source_is_fetched_once(build: ModuleType, archive: FakeArchive, tmp_path: Path) -> None:
    archive.has("6.12.118-1", "6.12.117-1~deb12u1")
    sources = [build.debian_source("6.12", tmp_path) for _ in range(2)]
    tarball = tmp_path / "sources/linux-source-6.12_6.12.118-1.tar.xz"
    assert sources == [build.Source(tarball, "6.12.118-1")] * 2
    assert (archive.asked("update"), archive.asked("linux-source-6.12=6.12.118-1")) == (1, 1)


def test_a_source_that_the_archive_replaced_is_fetched_anew_after_a_day(
    build: ModuleType, archive: FakeArchive, tmp_path: Path
) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources/linux-source-6.12.tar.xz").touch()  # of an unknown version
    (tmp_path / "sources/linux-source-6.1_6.1.1-1.tar.xz").touch()
    archive.has("6.12.117-1")
    assert build.debian_source("6.12", tmp_path).package_version == "6.12.117-1"
    day_passes(tmp_path)
    archive.has("6.12.118-1")
    source = build.debian_source("6.12", tmp_path)
    assert source.package_version == "6.12.118-1"
    assert source.path.read_text().startswith("linux-source-6.12 | 6.12.118-1 ")
    assert archive.asked("update") == 2
    names = sorted(path.name for path in (tmp_path / "sources").iterdir())
    assert names == ["linux-source-6.12_6.12.118-1.tar.xz", "linux-source-6.1_6.1.1-1.tar.xz"]


@pytest.mark.parametrize("newer", [False, True])
def test_without_a_network_the_kept_source_is_taken(
    build: ModuleType, archive: FakeArchive, tmp_path: Path, capsys: pytest.CaptureFixture[str], newer: bool
) -> None:
    archive.has("6.12.117-1")
    kept = build.debian_source("6.12", tmp_path)
    archive.cut_off(True)
    day_passes(tmp_path)
    if newer:
        archive.has("6.12.118-1")
    capsys.readouterr()
    assert build.debian_source("6.12", tmp_path) == kept
    assert kept.path.exists()
    assert "warning: apt-get update failed: E: Failed to fetch" in capsys.readouterr().err
    archive.cut_off(False)
    archive.has("6.12.118-1")
    assert build.debian_source("6.12", tmp_path).package_version == "6.12.118-1"


def test_without_a_network_and_a_kept_source_the_error_says_so(
    build: ModuleType, archive: FakeArchive, tmp_path: Path
) -> None:
    archive.cut_off(True)
    with pytest.raises(build.BuildError, match=r"Failed to fetch http://mirror[.]example.*\n.*--base") as caught:
        build.debian_source("6.12", tmp_path)
    assert caught.value.exit_code == 1


def test_lists_that_name_a_replaced_version_are_fetched_again_next_time(
    build: ModuleType, archive: FakeArchive, tmp_path: Path
) -> None:
    archive.has("6.12.117-1")
    build.debian_source("6.12", tmp_path)
    archive.has("6.12.118-1")
    archive.cut_off(True)
    assert build.debian_source("6.12", tmp_path).package_version == "6.12.117-1"
    archive.cut_off(False)
    assert build.debian_source("6.12", tmp_path).package_version == "6.12.118-1"
    assert archive.asked("update") == 2


def test_a_line_that_debian_does_not_have_is_refused(build: ModuleType, archive: FakeArchive, tmp_path: Path) -> None:
    with pytest.raises(
        build.UsageError, match=r"Debian has no linux-source-6[.]12; .* have 6[.]1, 7[.]3[.]\n"
    ) as caught:
        build.debian_source("6.12", tmp_path)
    assert caught.value.exit_code == 2
    assert archive.asked("update") == 1


def test_a_line_that_debian_has_no_longer_is_taken_from_the_cache(
    build: ModuleType, archive: FakeArchive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.has("6.12.117-1")
    kept = build.debian_source("6.12", tmp_path)
    archive.has()
    assert build.debian_source("6.12", tmp_path) == kept
    assert "warning: Debian has no linux-source-6.12;" in capsys.readouterr().err


def test_an_installed_source_is_taken_first(build: ModuleType, archive: FakeArchive, tmp_path: Path) -> None:
    tarball = tmp_path / "src/linux-source-6.12.tar.xz"
    tarball.touch()
    query = tmp_path / "bin/dpkg-query"
    for answer, version in (("echo dpkg: no package; exit 1", None), ("printf 6.12.117-1", "6.12.117-1")):
        query.write_text(f"#!/bin/sh\n{answer}\n")
        query.chmod(0o755)
        assert build.debian_source("6.12", tmp_path) == build.Source(tarball, version)
    assert archive.asked("update") == 0


# ---- what a result says of itself ----


def test_a_result_names_its_inputs(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Configuring would need a kernel's makefiles.
    monkeypatch.setattr(script, "configure", lambda *_: None)
    monkeypatch.setattr(script, "check_tools", lambda *_: None)
    monkeypatch.setattr(script, "fragments", lambda _: [])
    add_series(script.HERE, "6.1", "code", "other tests")
    base = tree(tmp_path / "linux", "6.8.1", "code")
    (base / ".git").mkdir()
    words = ["--base", str(base), "--target", "tree", "--cache", str(tmp_path / "cache")]
    out = script.build(script.parse_args(words))
    info = json.loads((out / "info.json").read_text())
    told = {"version": "6.8.1", "series": "6.1", "selftest": False, "base": "linux", "base_version": None}
    assert {key: info[key] for key in told} == told
    assert list(info["patches"]) == ["0001-tcp-add.patch"]
    assert (out / "linux" / CODE).read_text() == "patched by 6.1\n"
    assert not (out / "linux/.git").exists()
    assert script.build(script.parse_args(words)) == out
    plain = script.build(script.parse_args([*words, "--unpatched"]))
    assert plain.name.startswith("6.8-unpatched-")
    assert (plain / "linux" / CODE).read_text() == "code\n"


def test_it_starts_on_python_3_10_and_names_the_oldest_version(tmp_path: Path) -> None:
    source = (PATCHES / "build").read_text()
    compile(source, "build", "exec", dont_inherit=True)
    ast.parse(source, feature_version=(3, 8))
    hidden = tmp_path / "sitecustomize.py"
    # What Python 3.11 added is hidden, and the version is that of an older one.
    hidden.write_text(
        "import hashlib, os, sys\ndel hashlib.file_digest\nsys.modules['tomllib'] = None\n"
        "sys.version_info = tuple(int(part) for part in os.environ['PRETEND'].split('.'))\n"
    )
    words = ("--version", "newest", "--cache", str(tmp_path))
    done = run(*words, PYTHONPATH=str(tmp_path), PRETEND="3.10.12")
    assert (done.returncode, done.stderr[:36]) == (2, "build: 'newest' is not a kernel vers")
    done = run(*words, PYTHONPATH=str(tmp_path), PRETEND="3.8.18")
    assert done.returncode == 1
    assert done.stderr.startswith("build: Python 3.9 or newer is needed; this is ")
