# SPDX-License-Identifier: Apache-2.0
"""Load one module of cwndtrace with a mistake in it; its file stays as it is.

Each Python that a test starts imports this, because its folder is in PYTHONPATH, but for isolated ones (-I).
``CWNDTRACE_MUTANT`` has the module's name, its file, and the file with the text to load, with colons between.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType


class Mutated(SourceFileLoader, MetaPathFinder):  # type: ignore[misc]
    """The finder and the loader of that module."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self._text = Path(text)

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """Return where the module is, if it is the one with the mistake."""
        return (
            importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None
        )

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        """Return the module's code."""
        with warnings.catch_warnings(action="ignore"):
            return compile(self._text.read_text(encoding="utf-8"), self.path, "exec")


if "CWNDTRACE_MUTANT" in os.environ:
    sys.meta_path.insert(0, Mutated(*os.environ["CWNDTRACE_MUTANT"].split(":")))
