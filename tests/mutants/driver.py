# SPDX-License-Identifier: Apache-2.0
"""Put mistakes into the modules of cwndtrace one at a time, and see whether the unit tests notice.

``python -m tests.mutants`` does that for make mutants. It keeps each result, so a run that was ended goes on where it
was, and repeats only what a change of a module or of its tests makes necessary. docs/testing.md explains the table.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from tests.mutants import mistakes
from tests.mutants.mistakes import Mutant

PACKAGES: Final = (
    "analysis", "records", "store", "kernel", "privileges", "capture", "present", "cli", "plot", "encoding", "format",
)  # fmt: skip
UNIT: Final = Path("tests/unit")
TEXTS: Final = {"cli": "test_texts", "present": "test_texts"}
"""Files that test packages by what commands print. Commands are imported by their names, which no import shows."""
ELSEWHERE: Final[dict[str, tuple[str, ...]]] = {
    "cwndtrace/cli/fleet.py": ("test_texts", "test_fleet"),
    "cwndtrace/cli/plot.py": ("test_cli",),
    "cwndtrace/cli/reproduce.py": ("test_serve",),
    "cwndtrace/cli/top_feed.py": ("test_top",),
    "cwndtrace/store/dump.py": ("test_spool",),
    "cwndtrace/store/writer.py": ("test_window", "test_spool"),
}
"""Files that test a module though they are named after something else, or import it by its command's name alone."""
CACHE: Final = Path(os.environ.get("CWNDTRACE_CACHE") or Path.home() / ".cache/cwndtrace") / "mutants"
MOST_FILES: Final = 3
MOST_S: Final = 15.0
"""Seconds that a file's tests may take, unless it is named after the module."""
NOBODY: Final = 65534

Answer = dict[str, Any]
Outcome = Literal["noticed", "survived"]


class WorkerError(Exception):
    """The process in which mutants run can't be started."""


def digest(*texts: str) -> str:
    """Return a short digest of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


@cache
def source(path: str) -> str:
    """Return a file's text."""
    return Path(path).read_text(encoding="utf-8")


def modules(package: str) -> list[str]:
    """Return the paths of a package's modules, or of the module with that name."""
    folder = Path("cwndtrace", package)
    return sorted(map(str, folder.rglob("*.py"))) if folder.is_dir() else [f"{folder}.py"]


@contextmanager
def runner() -> Iterator[MutantRunner]:
    """Run the process in which mutants run, and end it."""
    folder = tempfile.mkdtemp(prefix="cwndtrace-mutants-")
    try:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        running = MutantRunner(folder)
        try:
            yield running
        finally:
            running.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class MutantRunner:
    """The process in which mutants run, without root and in a process namespace of its own."""

    def __init__(self, folder: str) -> None:
        namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        drop = ["setpriv", "--no-new-privs"]
        if os.geteuid() == 0:
            drop += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all"]
        else:
            namespaces += ["--user", "--map-current-user"]
        self._command = [*namespaces, *drop, sys.executable, "-m", "tests.mutants.worker"]
        self._environment = os.environ | {
            "TMPDIR": folder, "HOME": folder, "PYTHONPYCACHEPREFIX": f"{folder}/cache", "OPENBLAS_NUM_THREADS": "1",
        }  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self._answered = False

    def _started(self) -> subprocess.Popen[str]:
        if not self._process:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen(self._command, env=self._environment, start_new_session=True, **pipes)
        return self._process

    def ask(self, **request: object) -> Answer:
        """Return the answer to a request. A mutant may end the worker, which is then started again."""
        process = self._started()
        assert process.stdin
        assert process.stdout
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        if line := process.stdout.readline():
            self._answered = True
            return dict(json.loads(line))
        self.end()
        if not self._answered:
            raise WorkerError("The worker can't be started: it needs root, or user namespaces and a readable checkout.")
        return {"status": "ended", "by": ""}

    def end(self) -> None:
        """End the process and all in its namespace."""
        if self._process:
            # unshare doesn't end its child where that has changed its user, which ends only after its mutant.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


@cache
def imported(name: str) -> frozenset[str]:
    """Return the modules of cwndtrace and of tests that a module imports, and what it imports from them."""
    path = Path(name.replace(".", "/"))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = set()
    for node in ast.walk(ast.parse(source(str(path)))) if path.exists() else ():
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return frozenset(each for each in names if each.startswith(("cwndtrace.", "tests.")))


@cache
def distances(name: str) -> dict[str, int]:
    """Return how many imports away each module is."""
    found, step = {name: 0}, {name}
    while step:
        step = {each for one in step for each in imported(one)} - found.keys()
        found |= dict.fromkeys(step, max(found.values()) + 1)
    return found


@cache
def test_digest(path: str) -> str:
    """Return the digest of a file of tests with all of tests/ that it imports, or that pytest loads for it."""
    name = path.removesuffix(".py").replace("/", ".")
    shared = (Path(f"{each.replace('.', '/')}.py") for each in sorted(distances(name)) if each.startswith("tests."))
    loaded = [*(each for each in shared if each.exists()), *sorted(Path("tests").glob("**/conftest.py"))]
    return digest(source(path), *map(source, map(str, loaded)))


def files(module: str) -> list[str]:
    """Return the files of tests for a module: those named after it, then after its package, then those that import it.

    Of these, those that import it directly come first, and then those that import less. Those of ``ELSEWHERE`` are
    before all others.
    """
    name = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    package = name.split(".")[1]
    words = f"_{Path(module).stem}_", f"_{package}_"
    elsewhere = ELSEWHERE.get(module, ())
    ranked: list[tuple[bool, bool, bool, int, int, str]] = []
    for path in sorted(UNIT.glob("test_*.py")):
        test = f"tests.unit.{path.stem}"
        named = [word not in f"{path.stem}_" for word in words]
        named[1] &= path.stem != TEXTS.get(package)
        other = path.stem not in elsewhere
        if distances(test).get(name, 99) <= 3 or not all(named) or not other:
            ranked.append((other, named[0], named[1], distances(test).get(name, 99), len(imported(test)), str(path)))
    return [path for *_, path in sorted(ranked)[: MOST_FILES + len(elsewhere)]]


class MutantResults:
    """What was found out, in a file to which each result is added at once."""

    def __init__(self) -> None:
        self._path = CACHE / "results.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        self._kept: dict[str, Answer] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the last one may be cut off
                entry = json.loads(line)
                self._kept[entry["mutant"]] = entry

    def known(self, mutant: Mutant) -> Answer | None:
        """Return the result for a mutant, if its module is as it was, and so are the tests that matter for it."""
        entry = self._kept.get(mutant.name)
        if not entry or entry["module"] != digest(source(mutant.module)):
            return None
        current = {file: test_digest(file) for file in files(mutant.module)}
        if entry["outcome"] == "noticed":
            return entry if entry["tests"].items() <= current.items() else None
        return entry if entry["tests"] == current else None

    def add(self, mutant: Mutant, outcome: Outcome, by: str, tests: list[str]) -> Answer:
        """Keep a result. ``tests`` are the file that noticed the mutant, or all those for its module."""
        entry = {"mutant": mutant.name, "module": digest(source(mutant.module)), "outcome": outcome, "by": by}
        self._kept[mutant.name] = entry | {"tests": {file: test_digest(file) for file in tests}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._kept[mutant.name]) + "\n")
        return self._kept[mutant.name]


class Baseline:
    """What the tests do without a mutant: those that fail then say nothing. Each is asked at most once."""

    def __init__(self, ask: MutantRunner) -> None:
        self._ask = ask
        self._passes: dict[str, bool] = {}
        self._seconds: dict[str, float] = {}

    def passes(self, file: str, test: str = "") -> bool:
        """Return whether a test, or without its name a whole file, passes in time."""
        name = test or file
        if name not in self._passes:
            answer = self._ask.ask(module="", index=0, file=file, only=test, without=[])
            self._passes[name] = answer["status"] == "passed"
        return self._passes[name]

    def run(self, mutant: Mutant, file: str) -> Answer:
        """Run a file's tests on a mutant until one fails that passes without it."""
        while True:
            without = [name for name, passes in self._passes.items() if not passes]
            answer = self._ask.ask(module=mutant.module, index=mutant.index, file=file, only="", without=without)
            if answer["status"] == "passed":  # else the mutant may be what takes long
                self._seconds[file] = max(self._seconds.get(file, 0.0), answer["seconds"])
                return answer
            if self.passes(file, answer["by"]):
                return answer
            if not answer["by"]:
                return answer | {"status": "passed"}  # the file takes too long, or fails as a whole, without it too

    def slow(self, file: str) -> bool:
        """Return whether a file's tests are known to take long."""
        return self._seconds.get(file, 0.0) > MOST_S


def judge(baseline: Baseline, mutant: Mutant, results: MutantResults) -> Answer:
    """Run the tests for a mutant's module, those of one file after the other, until one notices it."""
    words = f"_{Path(mutant.module).stem}_"
    for file in files(mutant.module):
        if baseline.slow(file) and words not in f"{Path(file).stem}_":
            continue
        answer = baseline.run(mutant, file)
        if answer["status"] == "passed":
            continue
        return results.add(mutant, "noticed", str(answer["by"]), [file])
    return results.add(mutant, "survived", "", files(mutant.module))


def sample(package: str, size: int) -> list[Mutant]:
    """Return a package's mutants, or as many of them: those with the smallest digests, whichever others there are."""
    found = [mutant for module in modules(package) for mutant in mistakes.mutants(module, source(module))]
    return sorted(found, key=lambda mutant: digest(mutant.name))[: size or None]


def try_all(packages: Iterable[str], size: int, seconds: float) -> dict[str, list[tuple[Mutant, Answer]]]:
    """Return what became of each package's mutants. After ``seconds`` no further one is run."""
    results, end = MutantResults(), time.monotonic() + seconds
    found: dict[str, list[tuple[Mutant, Answer]]] = defaultdict(list)
    with runner() as ask:
        baseline = Baseline(ask)
        for package in packages:
            for mutant in sample(package, size):
                answer = results.known(mutant)
                if not answer and time.monotonic() < end:
                    answer = judge(baseline, mutant, results)
                    print(f"{answer['outcome']:8}  {mutant.name}", flush=True)
                found[package] += [(mutant, answer)] if answer else []
    return found
