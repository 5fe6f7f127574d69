# SPDX-License-Identifier: Apache-2.0
"""Guests that QEMU runs in software emulation: starting one, watching it, and ending it.

tools/vm boots this project's kernels with it, and tools/kernels those of Debian.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import IO, Any, Final

PANIC: Final = "the kernel panicked"
CONSOLE_LINES: Final = 40
"""The number of lines of a console's end that are shown."""
# QEMU 7.2 sometimes loses the event that wakes a guest with a counted clock while both of its CPUs are idle: one of
# about a dozen boots stood still, with all of QEMU's threads asleep and no timer set.
STALLED_LOOKS: Final = 12
BOOTS_OF_STALLED: Final = 3
# With a thread per CPU, software emulation conflicts with the kernel's patching of its own code, and a guest panics
# (int3 in __schedule) soon after a tracepoint is switched.
ACCEL: Final = "-no-reboot -accel tcg,thread=single"
# AVX2 is off for the reason in vagrant/Vagrantfile.
X86_CPU: Final = "-cpu max,avx2=off"
# The guest's clock counts its instructions, 2 ns each, while it has any to run, so that other load on the machine
# doesn't affect what a test measures. It is several times slower than the machine's, except while the guest waits.
COUNTED_CLOCK: Final = "-icount shift=1"
# tsc=nowatchdog: the kernel compares the TSC with the HPET. If QEMU has no CPU between the two readings, they differ,
# and the kernel switches to the HPET, of which each reading is emulated.
APPEND: Final = "panic=-1 tsc=nowatchdog"

_running: set[int] = set()
"""Process groups of the running guests."""


def end_guests(number: int, frame: object) -> None:  # noqa: ARG001
    """Kill the guests and exit. They run in separate sessions, so a signal at the terminal doesn't reach them."""
    for group in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    sys.exit(128 + number)


def end_guests_on_signals() -> None:
    """Make the signals that end this process end the guests too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_guests)


class Stalled(Exception):
    """QEMU has stopped running a guest."""


def group_state(group: int) -> tuple[set[str], int]:
    """Return the states of all threads of a process group, and their CPU time in clock ticks."""
    states, ticks = set(), 0
    # Path.glob() would fail where a process ends meanwhile; glob() leaves it out.
    for stat in glob("/proc/[0-9]*/task/[0-9]*/stat"):  # noqa: PTH207
        with suppress(OSError):
            # A thread's name, up to the last bracket, may be any bytes.
            fields = Path(stat).read_bytes().rpartition(b") ")[2].split()
            if int(fields[2]) == group:
                states.add(fields[0].decode())
                ticks += int(fields[11]) + int(fields[12])
    return states, ticks


def wait(process: subprocess.Popen[Any], deadline_s: float, look_s: float = 5) -> int | None:
    """Return the exit code of a guest, or None if it still runs after the deadline.

    Raises Stalled if all of QEMU's threads sleep and use no CPU in STALLED_LOOKS looks in a row.
    """
    deadline, looks, before = time.monotonic() + deadline_s, 0, -1
    while time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(look_s)
        states, ticks = group_state(process.pid)
        looks = looks + 1 if ticks == before and states == {"S"} else 0
        if looks == STALLED_LOOKS:
            raise Stalled
        before = ticks
    return None


def boot_once(
    command: list[str], deadline_s: float, show: Callable[[str], None], env: Mapping[str, str] | None = None
) -> tuple[int | None, list[str]]:
    """Boot a guest, call ``show`` for each line of its stdout, and return its exit code and its stderr's lines.

    stderr is the guest's console. The exit code is None if the guest was killed at its deadline. Raises Stalled.
    """

    def forward(output: IO[str]) -> None:
        for line in output:
            show(line.rstrip())

    with (
        tempfile.TemporaryFile("w+", errors="replace") as console,
        # The output goes through a pipe, because QEMU reopens its output and would truncate a file.
        subprocess.Popen(
            command,
            cwd="/",
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=console,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        thread = threading.Thread(target=forward, args=(process.stdout,))
        thread.start()
        _running.add(process.pid)
        try:
            code = wait(process, deadline_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            _running.discard(process.pid)
            thread.join()
        console.seek(0)
        return code, console.read().splitlines()


def failure(code: int | None, console: list[str]) -> str | None:
    """Return why a guest with this exit code (None: killed) and console has failed, or None if it hasn't."""
    if any("Kernel panic" in line for line in console):
        return PANIC
    if code is None:
        return "not done in time"
    return f"exit code {code}" if code else None
