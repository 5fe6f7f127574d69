# SPDX-License-Identifier: Apache-2.0
"""The wheel is complete and works on its own, each file has its licence, and documented commands and links exist.

The wheel is built from this checkout and installed by pip into an empty environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_NO_NETWORK = re.compile(r"NewConnectionError|ConnectTimeout|ProxyError|name resolution|Network is unreachable")


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # The environment that runs the tests must not provide anything that the wheel lacks.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert done.returncode == 0, done.stdout
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Iterator[Path]:
    """A virtual environment with only the wheel and its dependencies."""
    # pytest keeps its temporary folders of the last runs, and this one has half a gigabyte.
    with tempfile.TemporaryDirectory(prefix="cwndtrace-wheel-") as name:
        folder = Path(name)
        created = _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
        assert created.returncode == 0, created.stdout
        # Only a small part is run, so compiling everything would take most of the time.
        into = ("--python", folder / "bin" / "python", "install", "--no-input", "--no-compile")
        done = _run(sys.executable, "-m", "pip", *into, wheel, cwd=folder)
        if done.returncode != 0 and _NO_NETWORK.search(done.stdout):
            pytest.skip("needs a package index that can be reached: pip could not connect to one")
        assert done.returncode == 0, done.stdout
        yield folder


def test_the_wheel_has_every_source_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = [p for p in (ROOT / "cwndtrace").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    python = {p.relative_to(ROOT).as_posix() for p in package}
    assert "cwndtrace/report/page.css" in python
    bpf = {f"cwndtrace/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "bpf").rglob("*") if p.is_file()}
    assert "cwndtrace/bpf/events.h" in bpf
    assert not (python | bpf | {"cwndtrace/py.typed"}) - names


def test_the_wheel_has_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cwndtrace"}


def test_the_wheel_has_its_licences(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: Apache-2.0 AND GPL-2.0-only\n" in archive.read(metadata).decode()
    licences = {Path(name).name for name in archive.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "Apache-2.0.txt", "GPL-2.0.txt"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--version"], "0.1.0"), (["run", "--help"], "--iface"), (["doctor", "--help"], "--json")],
)
def test_the_command_works_with_only_the_wheel_installed(
    environment: Path, arguments: list[str], expected: str
) -> None:
    done = _run(environment / "bin" / "cwndtrace", *arguments, cwd=environment)
    assert (done.returncode, expected in done.stdout) == (0, True), done.stdout


@pytest.mark.slow
def test_the_installed_package_finds_its_own_bpf_folder(environment: Path) -> None:
    program = "from cwndtrace.records import layout; print(layout.bpf_dir()); layout.header()"
    done = _run(environment / "bin" / "python", "-c", program, cwd=environment)
    assert done.returncode == 0, done.stdout
    assert Path(done.stdout.strip()).is_relative_to(environment)


def _sources() -> Iterator[Path]:
    """Yield the source files that are written by hand; scripts without a suffix are recognised by their first line."""
    for top in ("cwndtrace", "bpf", "kernel-patches", "vagrant", "tests", "tools", "benchmarks", "contrib", ".ci"):
        for path in sorted((ROOT / top).rglob("*")):
            suffixes = {".py", ".c", ".h", ".sh", ".toml", ".yaml", ".service"}
            if path.is_file() and (path.suffix in suffixes or _is_script(path)):
                yield path
    yield from (ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "contrib/docker/Containerfile")


def _is_script(path: Path) -> bool:
    with path.open("rb") as file:
        return not path.suffix and file.read(2) == b"#!"


def _has_right_licence(path: Path) -> bool:
    head = "\n".join(path.read_text(encoding="utf-8").splitlines()[:3])
    kernel = path.relative_to(ROOT).parts[0] in {"bpf", "kernel-patches"} or path.name.endswith(".bpf.c")
    expected = r"GPL-2\.0(-only)?( WITH Linux-syscall-note)?" if kernel else r"Apache-2\.0"
    return bool(re.search(rf"SPDX-License-Identifier: {expected}( \*/)?$", head, re.MULTILINE))


def test_each_source_file_names_its_licence() -> None:
    written = [path for path in _sources() if path.stat().st_size]
    assert len(written) > 10
    assert [str(path.relative_to(ROOT)) for path in written if not _has_right_licence(path)] == []


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_pages_name_only_make_targets_that_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)$", text.replace("`", "\n"), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert not named - targets


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
)
def test_links_between_pages_resolve(page: str) -> None:
    """Each relative link of a page leads to a file, and its anchor to a heading of that file."""
    here = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", here.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = here.parent / path if path else here
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link
