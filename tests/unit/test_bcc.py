# SPDX-License-Identifier: Apache-2.0
"""Finding the distribution's bcc, telling it from PyPI's package of that name, and the text that it compiles."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cwndtrace.capture import bcc
from cwndtrace.errors import BccError
from cwndtrace.records.layout import bpf_dir


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:  # noqa: ARG001
    """As in a process that hasn't looked for bcc yet, on a machine without it.

    tmp_path comes first: to name it after the user pytest imports what it can't find without a path, and would fall
    back to a folder that another user may have made.
    """
    bcc.module.cache_clear()
    bcc._place.cache_clear()
    monkeypatch.setattr(bcc, "_DISTRIBUTION_PACKAGES", ())
    # Another installation's packages may hold one; what the tests need is imported already.
    monkeypatch.setattr(sys, "path", [])
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "bcc"}
    yield
    bcc.module.cache_clear()
    bcc._place.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "bcc"]:
        del sys.modules[name]
    sys.modules.update(kept)


def package(folder: Path, *, real: bool, text: str = "") -> Path:
    made = folder / "bcc"
    made.mkdir(parents=True)
    (made / "__init__.py").write_text(text or "__version__ = '0.99.0'\nclass BPF: pass\n")
    if real:
        (made / "libbcc.py").write_text("")
    return made


def found(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(bcc, "_DISTRIBUTION_PACKAGES", tuple(str(folder) for folder in folders))


def test_by_path_in_the_distributions_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = package(tmp_path / "dist-packages", real=True)
    found(monkeypatch, tmp_path / "nothing", tmp_path / "dist-packages")
    assert Path(str(bcc.module().__file__)).parent == made
    assert bcc.version() == "0.99.0"
    assert sys.modules["bcc"] is bcc.module()


def test_a_pattern_of_several_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "python3.13" / "site-packages", real=True)
    found(monkeypatch, tmp_path / "python3*" / "site-packages")
    assert bcc.version() == "0.99.0"


def test_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, real=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert bcc.version() == "0.99.0"


def test_the_unrelated_package_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "venv", real=False, text="raise SystemExit('the unrelated package was imported')")
    package(tmp_path / "dist-packages", real=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "venv")])
    found(monkeypatch, tmp_path / "dist-packages")
    assert bcc.version() == "0.99.0"


def test_the_unrelated_package_alone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = package(tmp_path, real=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BccError) as caught:
        bcc.module()
    assert caught.value.cause == f"the bcc in {made} is PyPI's unrelated package of that name"
    assert "python3-bpfcc" in caught.value.remedy


def test_none_at_all() -> None:
    with pytest.raises(BccError, match="bcc isn't installed") as caught:
        bcc.module()
    assert "apt install python3-bpfcc" in caught.value.remedy
    assert "dnf install python3-bcc" in caught.value.remedy


def test_one_that_can_not_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = package(tmp_path, real=True, text="raise OSError('libbcc.so.0: cannot open shared object file')")
    found(monkeypatch, tmp_path)
    with pytest.raises(BccError) as caught:
        bcc.module()
    assert caught.value.cause == f"bcc in {made} can't be loaded: libbcc.so.0: cannot open shared object file"
    assert "bcc" not in sys.modules


def test_headers_stand_in_the_text_once_and_lines_keep_their_numbers() -> None:
    for source in bpf_dir().glob("*.bpf.c"):
        text = bcc.expanded(source)
        assert '#include "' not in text
        assert text.count("#define CWNDTRACE_KERNEL_H") == 1
        name, number = "", 0
        for line in text.splitlines():
            if line.startswith("#line "):
                _, said, name = line.split()
                number = int(said)
                continue
            assert (bpf_dir() / name.strip('"')).read_text(encoding="utf-8").splitlines()[number - 1] == line
            number += 1
