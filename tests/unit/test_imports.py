# SPDX-License-Identifier: Apache-2.0
"""Modules import only those that they may, and the package exports only its public names.

The tests read syntax trees, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import cwndtrace
from cwndtrace import errors

PACKAGE = Path(cwndtrace.__file__).parent
LEAVES = {"_libc", "encoding", "errors", "format", "isolated", "lazy", "privileges", "records", "tcp"}
BELOW = {
    "_libc": set[str](),
    "encoding": set[str](),
    "errors": set[str](),
    "format": set[str](),
    "isolated": set[str](),
    "lazy": set[str](),
    "privileges": {"_libc"},
    "records": {"format", "lazy"},
    "tcp": set[str](),
    "kernel": LEAVES,
    "store": LEAVES,
    "analysis": LEAVES | {"store"},
    "present": LEAVES | {"store", "analysis"},
    "plot": LEAVES | {"store"},
    "names": LEAVES | {"kernel"},
    "capture": LEAVES | {"kernel", "names", "store"},
    "trace": LEAVES | {"store", "analysis", "present"},
    "top": LEAVES | {"store", "analysis"},
    "recorder": LEAVES | {"capture", "store"},
    "metrics": LEAVES | {"store", "analysis", "capture"},
    "export": LEAVES | {"store", "analysis", "present", "trace"},
    "fleet": LEAVES | {"store", "analysis", "present", "trace"},
    "lab": LEAVES | {"recorder"} | {"kernel", "store", "analysis", "plot", "capture", "trace", ""},
    "report": LEAVES | {"store", "analysis", "present", "plot", "trace", "fleet", ""},
    # The package itself only exports the public names; the commands connect all parts.
    "": LEAVES | {"capture", "fleet", "trace"},
    "cli": LEAVES
    | {"kernel", "names", "store", "analysis", "present", "plot", "capture", "trace", "lab", "report", "recorder"}
    | {"export", "fleet", "metrics", "top"}
    | {""},
    "__main__": {"cli", "isolated"},
}
"""The parts of the package that each part may import besides itself; '' is ``cwndtrace/__init__.py``."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def part(module: str) -> str:
    """Return the part of the package to which a dotted name belongs."""
    return module.split(".")[1] if "." in module else ""


def name_of(path: Path) -> str:
    pieces = ["cwndtrace", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Return each module that a file imports, by its full dotted name, with the line."""
    return [*_imports(path)]


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(piece for piece in (base, node.module or "") if piece)
            for alias in node.names:
                # "from cwndtrace import store" imports a module, "from cwndtrace import load" a name of the package.
                inner = PACKAGE.parent.joinpath(*source.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield (f"{source}.{alias.name}" if is_module else source), node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            yield from (
                (a.value, node.lineno) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_import_only_the_parts_below_them(path: Path) -> None:
    me = part(name_of(path))
    assert me in BELOW, f"{me} is new: add to BELOW what it may import"
    wrong = [
        f"line {line}: {module}"
        for module, line in imports(path)
        if module.split(".")[0] == "cwndtrace" and part(module) not in BELOW[me] | {me}
    ]
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_one_file_imports_bcc(path: Path) -> None:
    lines = [line for module, line in imports(path) if module.split(".")[0] == "bcc"]
    assert not lines or name_of(path) == "cwndtrace.capture.bcc"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_commands_print_and_exit(path: Path) -> None:
    # A command is a module of cli, or the function main of a module that can be run with -m.
    if part(name_of(path)) in ("cli", "__main__"):
        return
    body = ast.parse(path.read_text(encoding="utf-8")).body
    runnable = any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in body)
    checked = [node for node in body if not (runnable and isinstance(node, ast.FunctionDef) and node.name == "main")]
    calls = [node for top in checked for node in ast.walk(top) if isinstance(node, ast.Call)]
    names = ("print", "exit", "quit", "sys.exit", "os._exit")
    lines = [f"line {call.lineno}: {ast.unparse(call.func)}" for call in calls if ast.unparse(call.func) in names]
    assert lines == []


def test_plot_does_not_import_pyplot() -> None:
    for path in (PACKAGE / "plot").glob("*.py"):
        assert not [module for module, _ in imports(path) if module.startswith("matplotlib.pyplot")]


def test_no_two_parts_may_import_each_other() -> None:
    for me, below in BELOW.items():
        for other in below - {""}:
            assert me not in BELOW[other], f"{me} and {other} may import each other"


def test_imports_sees_every_way_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cwndtrace" / "plot"
    folder.mkdir(parents=True)
    for name in ("__init__", "events", "trace", "plot/__init__", "plot/style"):
        (tmp_path / "cwndtrace" / f"{name}.py").write_text("")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "cwndtrace")
    file = folder / "odd.py"
    file.write_text(
        "import cwndtrace.trace\nfrom cwndtrace import events, load\nfrom .. import trace\nfrom . import style\n"
        "from .style import use\ndef f():\n    from cwndtrace.trace import load\n    importlib.import_module('bcc')\n"
    )
    assert [module for module, _ in imports(file)] == [
        "cwndtrace.trace", "cwndtrace.events", "cwndtrace", "cwndtrace.trace", "cwndtrace.plot.style",
        "cwndtrace.plot.style", "cwndtrace.trace", "bcc",
    ]  # fmt: skip


def test_the_package_exports_only_its_public_names() -> None:
    hierarchy = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert set(cwndtrace.__all__) == {"Batch", "Stream", "Trace", "fleet", "load", "stream"} | hierarchy
    assert cwndtrace.__all__ == sorted(cwndtrace.__all__)
    for name in cwndtrace.__all__:
        assert getattr(cwndtrace, name).__doc__
    modules = {name for name in vars(cwndtrace) if f"cwndtrace.{name}" in sys.modules and name not in cwndtrace.__all__}
    public = {name for name in dir(cwndtrace) if not name.startswith("_")}
    lazy = {"Any", "TYPE_CHECKING", "annotations", "import_module"}
    assert public - modules - lazy == set(cwndtrace.__all__)


def test_importing_the_package_imports_no_bcc_matplotlib_or_click() -> None:
    code = "import sys, cwndtrace; print(sorted({'bcc', 'matplotlib', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_test_imports_another() -> None:
    """Code that tests share is in tests/harness or in a module of tests/unit that has no tests."""
    tests = Path(__file__).parents[1]
    found = [f"{path.relative_to(tests)}: {name}" for path in tests.rglob("*.py") for name in imports_of_tests(path)]
    assert found == []


def imports_of_tests(path: Path) -> list[str]:
    """Return the names that a file imports from files of tests."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names = [f"{getattr(node, 'module', '')}.{alias.name}" for node in nodes for alias in node.names]
    return [name for name in (*modules, *names) if any(part.startswith("test_") for part in name.split("."))]


def test_no_two_classes_share_a_name() -> None:
    root = PACKAGE.parent
    files = sorted(file for folder in ("cwndtrace", "tests", "benchmarks") for file in (root / folder).rglob("*.py"))
    names = [name for file in files for name in re.findall(r"^ *class (\w+)[(:]", file.read_text(), re.MULTILINE)]
    assert sorted(name for name, number in Counter(names).items() if number > 1) == []
