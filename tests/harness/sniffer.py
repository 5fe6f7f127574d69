# SPDX-License-Identifier: Apache-2.0
"""tcpdump and dumpcap in a network namespace, and what tshark says about the files that they write."""

from __future__ import annotations

import csv
import io
import re
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Final, Self

import pytest

from tests.harness import tcp

LAST: Final = b"these are the last bytes that the sniffer has to see"
_LISTENING: Final = re.compile(rb"listening on|^File: ", re.MULTILINE)


def need(*programs: str) -> None:
    """Skip the test where a program is missing."""
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}: sudo make develop installs it")


class Sniffer:
    """A program that captures packets of an interface of a namespace into ``file``, from construction on."""

    def __init__(self, space: tcp.Space, file: Path, program: str = "tcpdump", device: str = "lo") -> None:
        need(program)
        self.file = file
        options = {"tcpdump": ["-U", "--immediate-mode", "-Z", "root", "-n"], "dumpcap": ["-q"]}[program]
        # With its usual room for whole packets, a buffer has only a few, and packets are dropped.
        options += ["-s", "200", "-B", "32768" if program == "tcpdump" else "32"]
        command = ["ip", "netns", "exec", space.name, program, *options, "-i", device, "-w", str(file)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said, deadline = b"", time.monotonic() + 20
        assert self._process.stderr is not None
        while not _LISTENING.search(said):
            ready, _, _ = select.select([self._process.stderr], [], [], max(0.0, deadline - time.monotonic()))
            more = self._process.stderr.read1(65536) if ready else b""  # type: ignore[attr-defined]
            assert more, f"{program} doesn't listen: {said!r}"
            said += more

    def end(self) -> Path:
        """Wait until ``LAST`` is in the file, end the program, and return the file."""
        tcp.until(lambda: LAST in self.file.read_bytes(), 20, f"the last packet in {self.file}")
        self.close()
        return self.file

    def close(self) -> None:
        """End the program; a second call does nothing."""
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def fields(file: Path, *names: str) -> list[dict[str, Any]]:
    """Return these fields of each frame by tshark, as text; a field that occurs twice has both, with a comma."""
    need("tshark")
    command = ["tshark", "-r", str(file), "-T", "fields", "-E", "separator=,", "-E", "quote=d", "-E", "occurrence=a"]
    for name in names:
        command += ["-e", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [dict(zip(names, row, strict=True)) for row in csv.reader(io.StringIO(done.stdout))]
