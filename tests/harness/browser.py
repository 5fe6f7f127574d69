# SPDX-License-Identifier: Apache-2.0
"""The distribution's Chromium, without a screen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield a browser, or skip the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((path for path in map(shutil.which, names) if path), None)
    if executable is None:
        pytest.skip("needs a browser without a screen: make develop, or sudo apt install chromium")
    quiet = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        # The browser's sandbox refuses to run as root.
        sandbox = os.geteuid() != 0
        started = playwright.chromium.launch(executable_path=executable, chromium_sandbox=sandbox, args=quiet)
        yield started
        started.close()
