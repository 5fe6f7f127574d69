# SPDX-License-Identifier: Apache-2.0
"""tools/vm itself, on the host: a guest that dies or hangs fails, with the end of its console."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/vm as a module."""
    if "CWNDTRACE_VM" in os.environ:
        pytest.skip("this is a guest; it boots none itself")
    loader = importlib.machinery.SourceFileLoader("vm", str(Path(__file__).parents[2] / "tools/vm"))
    spec = importlib.util.spec_from_loader("vm", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vm"] = module
    loader.exec_module(module)
    return module


def test_a_guest_that_panics_fails(tool: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    guest = replace(tool.GUESTS[0], append="panic=-1 init=/dev/null rootfstype=ext4", deadline_s=300)
    assert not tool.test(guest, tool.kernel(guest))
    said = capfd.readouterr().out
    assert "6.12: FAILED" in said
    assert "the kernel panicked" in said
    assert "end of 6.12's console" in said
    assert "Kernel panic - not syncing" in said


def test_a_guest_that_hangs_fails(tool: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    # Five seconds are less than it takes to boot.
    guest = replace(tool.GUESTS[0], deadline_s=5)
    assert not tool.test(guest, tool.kernel(guest))
    said = capfd.readouterr().out
    assert "not done in time" in said
    assert "end of 6.12's console" in said
