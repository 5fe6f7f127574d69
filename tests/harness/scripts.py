# SPDX-License-Identifier: Apache-2.0
"""Scripts of the checkout, loaded as modules."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PATCHES = CHECKOUT / "kernel-patches"


def load_script(script: Path) -> ModuleType:
    """Return a script without a suffix as a module. Skips the test in a guest, since the host runs it."""
    if "CWNDTRACE_VM" in os.environ:
        pytest.skip("this is a guest; the host runs it: make vm-test")
    loader = importlib.machinery.SourceFileLoader(f"script_{script.name}", str(script))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module
