# SPDX-License-Identifier: Apache-2.0
"""The distribution's bcc is found and distinguished from PyPI's package of that name; headers are expanded for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cwndtrace.capture import bcc, live
from cwndtrace.capture.block_program import RING_PAGES, spare_pages
from cwndtrace.capture.program_cache import Image
from cwndtrace.errors import BccError
from cwndtrace.records.layout import bpf_dir


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:  # noqa: ARG001
    """Make this process one that hasn't looked for bcc yet, on a machine without bcc.

    tmp_path is requested first, because pytest imports modules to name it after the user. Without sys.path these
    imports fail, and pytest falls back to a folder that another user may have created.
    """
    bcc.module.cache_clear()
    bcc._place.cache_clear()
    monkeypatch.setattr(bcc, "_DISTRIBUTION_PACKAGES", ())
    # sys.path may lead to another installation's bcc. The tests have already imported all modules that they need.
    monkeypatch.setattr(sys, "path", [])
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "bcc"}
    yield
    bcc.module.cache_clear()
    bcc._place.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "bcc"]:
        del sys.modules[name]
    sys.modules.update(kept)


def package(folder: Path, *, real: bool, text: str = "") -> Path:
    bcc_dir = folder / "bcc"
    bcc_dir.mkdir(parents=True)
    (bcc_dir / "__init__.py").write_text(text or "__version__ = '0.99.0'\nclass BPF: pass\n")
    if real:
        (bcc_dir / "libbcc.py").write_text("")
    return bcc_dir


def search_in(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(bcc, "_DISTRIBUTION_PACKAGES", tuple(str(folder) for folder in folders))


def test_bcc_is_found_in_the_distributions_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bcc_dir = package(tmp_path / "dist-packages", real=True)
    search_in(monkeypatch, tmp_path / "nothing", tmp_path / "dist-packages")
    assert Path(str(bcc.module().__file__)).parent == bcc_dir
    assert bcc.version() == "0.99.0"
    assert sys.modules["bcc"] is bcc.module()


def test_a_pattern_finds_bcc_of_any_python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "python3.13" / "site-packages", real=True)
    search_in(monkeypatch, tmp_path / "python3*" / "site-packages")
    assert bcc.version() == "0.99.0"


def test_bcc_is_found_on_sys_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, real=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert bcc.version() == "0.99.0"


def test_the_unrelated_package_is_skipped_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "venv", real=False, text="raise SystemExit('the unrelated package was imported')")
    package(tmp_path / "dist-packages", real=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "venv")])
    search_in(monkeypatch, tmp_path / "dist-packages")
    assert bcc.version() == "0.99.0"


def test_the_error_names_the_unrelated_package_if_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bcc_dir = package(tmp_path, real=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BccError) as caught:
        bcc.module()
    assert caught.value.cause == f"the bcc in {bcc_dir} is PyPI's unrelated package of that name"
    assert "python3-bpfcc" in caught.value.remedy


def test_the_error_without_bcc_names_the_packages_to_install() -> None:
    with pytest.raises(BccError, match="bcc isn't installed") as caught:
        bcc.module()
    assert "apt install python3-bpfcc" in caught.value.remedy
    assert "dnf install python3-bcc" in caught.value.remedy


def test_a_bcc_that_cannot_be_loaded_raises_bcc_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bcc_dir = package(tmp_path, real=True, text="raise OSError('libbcc.so.0: cannot open shared object file')")
    search_in(monkeypatch, tmp_path)
    with pytest.raises(BccError) as caught:
        bcc.module()
    assert caught.value.cause == f"bcc in {bcc_dir} can't be loaded: libbcc.so.0: cannot open shared object file"
    assert "bcc" not in sys.modules


def test_headers_are_expanded_once_and_lines_keep_their_numbers() -> None:
    for source in bpf_dir().glob("*.bpf.c"):
        text = bcc.expanded(source)
        assert '#include "' not in text
        assert text.count("#define CWNDTRACE_KERNEL_H") == 1
        name, number = "", 0
        for line in text.splitlines():
            if line.startswith("#line "):
                _, line_number, name = line.split()
                number = int(line_number)
                continue
            assert (bpf_dir() / name.strip('"')).read_text(encoding="utf-8").splitlines()[number - 1] == line
            number += 1


def test_what_a_library_writes_to_stderr_is_received_and_the_descriptor_is_put_back() -> None:
    before = os.fstat(2)
    with bcc._stderr_captured() as printed:
        os.write(2, b"error: no\xff\n\n")
    assert printed == ["error: no\ufffd"]
    assert os.path.samestat(os.fstat(2), before)


def test_what_the_kernel_reports_of_a_descriptor_is_a_number_and_else_0(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"12345")
        assert (bcc._fdinfo(file.fileno(), "pos"), bcc._fdinfo(file.fileno(), "map_type")) == (5, 0)


def test_each_ring_suits_a_kernel_with_pages_of_64_kib() -> None:
    # bpf/follow.h takes these shares of RESET_PAGES.
    for pages in (RING_PAGES, spare_pages(1 << 30), live._RESET_PAGES, live._RESET_PAGES // 2, live._RESET_PAGES // 4):
        size = 4096 * pages
        assert size & (size - 1) == 0
        assert size % 65536 == 0


@pytest.mark.parametrize(("patience_s", "lines"), [(0.0, 1), (60.0, 0)])
def test_a_slow_compilation_is_announced(monkeypatch: pytest.MonkeyPatch, patience_s: float, lines: int) -> None:
    image = Image({"f": b""}, ())
    reading, writing = os.pipe()
    said: list[str] = []

    def compiled(*_: object) -> Image:
        # The child is another process, which lasts until the line was said where one is due.
        if lines:
            os.read(reading, 1)
        return image

    def announce(line: str) -> None:
        said.append(line)
        os.write(writing, b"x")

    monkeypatch.setattr(bcc, "_PATIENCE_S", patience_s)
    monkeypatch.setattr(bcc, "_compile", compiled)
    assert bcc._compile_in_child("", [], "x.bpf.c", announce) == image
    os.close(reading)
    os.close(writing)
    assert [line.split(";")[0] for line in said] == ["compiling x.bpf.c for this kernel"] * lines
