# SPDX-License-Identifier: Apache-2.0
"""Runs notebooks on another capture in one process, without a kernel: run_notebooks.py REPLACEMENTS NOTEBOOK...

REPLACEMENTS is JSON that maps texts of the cells to those that take their place. Prints what the cells print, and after
each notebook how many resets its picture shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell


class Shell(InteractiveShell):
    """A shell that draws pictures as Jupyter does, and has no window to show them in."""

    def enable_gui(self, gui: str | None = None) -> None:
        """Do nothing, because ``%matplotlib inline`` needs no event loop."""


def main(replacements: str, *notebooks: str) -> None:
    """Run the notebooks, and end with the first error."""
    make_shell: Any = Shell  # IPython has no hints for it
    for file in notebooks:
        shell = make_shell()
        for cell in json.loads(Path(file).read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            for old, new in json.loads(replacements).items():
                source = source.replace(old, new)
            if cell["cell_type"] == "code":
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
