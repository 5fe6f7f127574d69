# SPDX-License-Identifier: Apache-2.0
"""No source of this project uses a shell, runs text or counts without plural(). The tests read syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
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
LAST = {name.rpartition(".")[2] for name in SHELLS | RUNS_TEXT}
"""Their names without what is before the last dot, which are found without writing down each call of a source."""


def offences(text: str) -> Iterator[str]:
    """Yield the calls that could run text as a command or as a program, with their line."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        last = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        name = ast.unparse(node.func) if last in LAST else last
        if name in SHELLS | RUNS_TEXT:
            yield f"line {node.lineno}: {name}"
        for keyword in node.keywords:
            if keyword.arg == "shell" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield f"line {node.lineno}: {name} with a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_uses_a_shell_or_runs_text(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"))) == []


def test_offences_finds_each_forbidden_call() -> None:
    assert len(SOURCES) > 100
    assert {"vm", "build"} <= {path.name for path in SOURCES}
    text = "run(x, shell=True)\nrun(x, shell=y)\nrun(x, shell=False)\nos.system(x)\neval(x)\nliteral_eval(x)\n"
    assert [line.split(":")[0] for line in offences(text)] == ["line 1", "line 2", "line 4", "line 5"]


COUNTED = re.compile(
    r" (more |of )?(bursts|bytes|chunks|columns|connections|groups|lines|packets|parts|records|requests|resets|restarts"
    r"|rounds|rows|segments|sizes|snapshots|times|windows)\b"
)

NOT_NUMBERS = {"name", "reason"}
"""Names of values that aren't numbers."""


def counted_by_hand(text: str) -> Iterator[str]:
    """Yield the f-strings with a value right before a plural, as in "1 bursts". Constants, which are many, may be."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, after in pairwise(node.values):
            if not isinstance(value, ast.FormattedValue) or isinstance(value.value, ast.Call):
                continue
            name = ast.unparse(value.value).rpartition(".")[2]
            counts = isinstance(after, ast.Constant) and isinstance(after.value, str) and COUNTED.match(after.value)
            if counts and name not in NOT_NUMBERS and not name.isupper():
                yield f"line {node.lineno}: {{{name}}}{ast.literal_eval(after)}"


@pytest.mark.parametrize("path", sorted((ROOT / "cwndtrace").rglob("*.py")), ids=lambda path: path.name)
def test_counts_use_plural(path: Path) -> None:
    assert list(counted_by_hand(path.read_text(encoding="utf-8"))) == []


def test_counted_by_hand_finds_counts_without_plural() -> None:
    text = "f'{n} bursts'\nf'{n:,} of {m.of} records fit'\nf'{_MOST:,} rows'\nf'{plural(n, x)} bursts'\nf'{n} ms'\n"
    assert list(counted_by_hand(text)) == ["line 1: {n} bursts", "line 2: {of} records fit"]
