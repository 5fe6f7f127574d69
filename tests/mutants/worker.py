# SPDX-License-Identifier: Apache-2.0
"""The process in which mutants run: it imports large libraries once, and forks for each file of tests.

It reads a request as a line of JSON from stdin, and answers with one on stdout. ``driver.py`` starts it in a process
namespace of its own and without root, so that a mutant can neither end other processes nor change the checkout.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Final

import pytest

from tests.mutants import mistakes

MARKS: Final = "not chroot and not vm and not live and not long"
LIMITS: Final = {
    resource.RLIMIT_DATA: 3 << 30,
    resource.RLIMIT_FSIZE: 64 << 20,
    resource.RLIMIT_NPROC: 512,
    resource.RLIMIT_CORE: 0,
}
STARTUP: Final = Path(__file__).parent / "startup"
"""Its sitecustomize.py loads the mutant in this process, and in those that tests start."""
CPU_S: Final = 60
"""Seconds of CPU time that a file's tests may take. They may last three times as long."""
_LIBRARIES: Final = (
    "pandas pyarrow.parquet matplotlib.figure matplotlib.backends.backend_agg hypothesis.strategies click jinja2"
)


class Watch:
    """A plugin of pytest that leaves tests out, and notes the first that fails."""

    def __init__(self, without: list[str]) -> None:
        self._without = set(without)
        self.failed = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that say something."""
        items[:] = [item for item in items if item.nodeid not in self._without]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure."""
        if report.failed and not self.failed:
            self.failed = report.nodeid


def _load(module: str, index: int) -> None:
    text = Path(tempfile.gettempdir(), "mutant.py")
    text.write_text(ast.unparse(mistakes.mutated(Path(module).read_text(encoding="utf-8"), index)), encoding="utf-8")
    name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    os.environ["CWNDTRACE_MUTANT"] = f"{name}:{Path(module).resolve()}:{text}"
    runpy.run_path(str(STARTUP / "sitecustomize.py"))


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run a file's tests, or ``only`` one of them, with a mutant in a module or with none."""
    if request["module"]:
        _load(request["module"], request["index"])
    watch = Watch(request["without"])
    options = ["-q", "-x", "--no-summary", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", MARKS]
    # hypothesis was imported before pytest could look at its plugin.
    options += ["--hypothesis-seed=0", "-W", "ignore::pytest.PytestAssertRewriteWarning", f"--timeout={CPU_S}"]
    begin = time.process_time()
    status = int(pytest.main([*options, request["only"] or request["file"]], plugins=[watch]))
    passed = status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    seconds = time.process_time() - begin
    return {"status": "passed" if passed else "failed", "by": watch.failed, "seconds": seconds}


def _child(request: dict[str, Any], folder: str, answers: int) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["PYTHONPATH"] = str(STARTUP)
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["HOME"] = folder
    for kind, most in {**LIMITS, resource.RLIMIT_CPU: CPU_S}.items():
        resource.setrlimit(kind, (most, most))
    answer = run(request)
    with os.fdopen(answers, "w", encoding="utf-8") as file:
        json.dump(answer, file)


def supervised(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request in a child, and end all that it started. A child that doesn't answer in time is ended."""
    reading, writing = os.pipe()
    folder = tempfile.mkdtemp()
    pid = os.fork()
    if pid == 0:
        try:
            _child(request, folder, writing)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    text, end = b"", time.monotonic() + 3 * CPU_S
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
            if not (chunk := pipe.read(1 << 16)):
                break
            text += chunk
    # It is the first process of its namespace, or the kernel would end this one too: -1 is all others there.
    if os.getppid() == 0:
        os.kill(-1, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    output = Path(f"{folder}/output").read_text(encoding="utf-8", errors="replace")[-2000:]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return dict(json.loads(text))
    except ValueError:
        return {"status": "ended", "by": "", "output": output}


def main() -> None:
    """Answer requests until there are none."""
    for name in _LIBRARIES.split():
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        print(json.dumps(supervised(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
