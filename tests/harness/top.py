# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace top`` as a process that prints plain tables."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.command import COMMAND, ENVIRONMENT
from tests.harness.users import need_command


@contextmanager
def watching(*arguments: str | Path, before: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Start the command, with ``before`` in front, such as sudo; kill it on exit."""
    command = [*before, *COMMAND, "top", *map(str, arguments)]
    need_command()
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=ENVIRONMENT) as process:
        try:
            yield process
        finally:
            process.kill()


def next_table(process: subprocess.Popen[str]) -> list[str]:
    """Return the lines of the next table; none at the end."""
    assert process.stdout is not None
    lines = []
    while line := process.stdout.readline().rstrip("\n"):
        lines.append(line)
    return lines
