# SPDX-License-Identifier: Apache-2.0
"""Runs the live tests in a guest of another architecture. tests/vm runs them on x86-64."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Final

PACKAGES: Final = ("hypothesis", "pytest", "pytest-timeout")
"""What the tests need beside the project."""
TESTS: Final = (
    "tests/live/test_block_io.py",
    "tests/live/test_resets.py",
    "tests/live/test_filters.py",
    "tests/live/test_endings.py",
    "tests/live/test_kinds.py",
)
"""Those that depend on the kernel and can be run at a tenth of a machine's speed."""
PROBES: Final = "fentry tcp_probe"
"""One that sees the kernel's own change and one that infers it, so that the guest's time is enough."""
WHEELS: Final = Path("/wheels")
_INSTALLED: Final = Path("/run/pytest")


def run(checkout: Path) -> tuple[bool, str]:
    """Install pytest from WHEELS and run TESTS; return whether none failed, and how many passed and didn't."""
    python, report = sys.executable, Path("/run/live.xml")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(WHEELS)]
    subprocess.run([*pip, "--target", str(_INSTALLED), *PACKAGES], check=True, stdout=sys.stderr)
    pytest = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "live", "--timeout=1200"]
    pytest += ["--durations=15", f"--junit-xml={report}", *TESTS]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    environment |= {"PYTHONPATH": str(_INSTALLED), "CWNDTRACE_VM": "stock", "CWNDTRACE_PROBES": PROBES}
    done = subprocess.run(pytest, cwd=checkout, env=environment, check=False, stdout=sys.stderr)
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    bad = [case for case in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in case}]
    said = f"{passed} passed, {counts['skipped']} skipped, {failed} failed"
    return done.returncode == 0 and passed > 0, "; ".join([said, *(case.attrib["name"] for case in bad)])
