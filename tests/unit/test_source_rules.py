# SPDX-License-Identifier: Apache-2.0
"""What no source of this project may do, read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("cwndtrace", "tests", "benchmarks", "tools", "kernel-patches", "notebooks")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
    and (path.suffix == ".py" or (path.read_bytes()[:2] == b"#!" and b"python" in path.read_bytes()[:60]))
)
SHELLS = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "pty.spawn",
}  # fmt: skip
RUNS_TEXT = {"eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "yaml.load"}


def offences(text: str) -> Iterator[str]:
    """Calls by which text could become a command or a program, with their line."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in SHELLS | RUNS_TEXT:
            yield f"line {node.lineno}: {name}"
        for keyword in node.keywords:
            if keyword.arg == "shell" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield f"line {node.lineno}: {name} with a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_and_nothing_that_runs_text(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"))) == []


def test_the_rule_sees_what_it_forbids() -> None:
    assert len(SOURCES) > 100
    assert {"vm", "build"} <= {path.name for path in SOURCES}
    text = "run(x, shell=True)\nrun(x, shell=y)\nrun(x, shell=False)\nos.system(x)\neval(x)\nliteral_eval(x)\n"
    assert [line.split(":")[0] for line in offences(text)] == ["line 1", "line 2", "line 4", "line 5"]
