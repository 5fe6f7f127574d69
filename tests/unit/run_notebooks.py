# SPDX-License-Identifier: Apache-2.0
"""Runs notebooks on other captures in one process, without a kernel: run_notebooks.py RUNS NOTEBOOK...

RUNS is JSON: for the first line that each run prints, which texts of the cells are replaced by which. A notebook with
none of them isn't run. Prints what the cells print, and after each notebook how many resets its picture shows.
"""

from __future__ import annotations

import functools
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

import cwndtrace
from cwndtrace.fleet import engine
from cwndtrace.fleet.work import work


class Shell(InteractiveShell):
    """A shell that draws pictures as Jupyter does, and has no window to show them in."""

    def enable_gui(self, gui: str | None = None) -> None:
        """Do nothing, because ``%matplotlib inline`` needs no event loop."""


def main(runs: str, *notebooks: str) -> None:
    """Run the notebooks once for each run, and end with the first error."""
    # Fleets are analysed here, because a worker process takes longer to start than a notebook takes to run.
    engine._own = lambda *_: nullcontext()  # type: ignore[assignment]
    engine._computed = lambda _client, found, max_rows, scratch, _most: (  # type: ignore[assignment]
        (each, work(each, max_rows, scratch)) for each in found
    )
    # The notebooks of a run read one capture, which is analysed once.
    cwndtrace.load = functools.cache(cwndtrace.load)  # type: ignore[assignment]
    for head, replacements in json.loads(runs).items():
        print(head)
        for file in notebooks:
            _run(file, replacements)


def _run(file: str, replacements: dict[str, str]) -> None:
    cells = json.loads(Path(file).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    if not any(old in source for old in replacements for source in sources):
        return
    make_shell: Any = Shell  # IPython has no hints for it
    shell = make_shell()
    for source in sources:
        for old, new in replacements.items():
            source = source.replace(old, new)
        shell.run_cell(source).raise_error()
    if "span" in shell.user_ns:
        print(f"{Path(file).stem}: {_shown(**{name: shell.user_ns[name] for name in ('trace', 'key', 'span')})}")


def _shown(trace: Any, key: str | None, span: tuple[float, float] | None) -> str:
    """Return how many resets a picture of this connection and span shows, of how many."""
    resets = trace.resets
    at = (resets.loc[resets["connection"] == key, "ts_ns"] - trace.started_ns) / 1e9
    inside = at if span is None else at[at.between(*span)]
    return f"{len(inside)} resets shown, {len(resets)} in all"


if __name__ == "__main__":
    main(*sys.argv[1:])
