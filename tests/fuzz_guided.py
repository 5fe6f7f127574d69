# SPDX-License-Identifier: Apache-2.0
"""A fuzzer of captures that is guided by coverage (atheris). Its inputs have the limits of the cases of tests/fuzz.py.

``python -m tests.fuzz_guided`` runs until another exception than CaptureError is raised, or for --seconds. The input
that raised it is stored in --keep; if it is given as an argument, it is run again. Each input is one file of a small
capture: its first byte selects the file, and the other bytes are its content, or the changes in it for one of
``fuzz.SHAPES``.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["cwndtrace"]):
    from cwndtrace.errors import CaptureError
    from cwndtrace.records import arrow
    from tests import fuzz

LONGEST: Final = 64 << 10
STUCK_S: Final = 120
"""The limit of wall-clock time, after which the fuzzer ends an input that hangs in C, where Python gets no signal."""
STREAM: Final = "trace.raw"


def small() -> fuzz.Files:
    """Return meta.json and one part of each table, uncompressed."""
    whole = fuzz.base(plain=True)
    parts = {table: next(name for name in whole if name.startswith(f"{table}/")) for table in arrow.TABLES}
    return {name: whole[name] for name in ("meta.json", *parts.values())}


def effort(data: bytes) -> int:
    """Return the level of use of an input, always the same for it. Reading takes 20 ms, a whole report 200 ms."""
    chance = zlib.crc32(data)
    return fuzz.ALL if chance % 16 == 0 else fuzz.FRAMES if chance % 4 == 0 else fuzz.TABLES


def changed(raw: bytes, changes: bytes) -> bytes:
    """Return ``raw`` with changes near its end, each from three bytes: two of distance from the end, and the value."""
    data = bytearray(raw)
    for at in range(0, len(changes) - 2, 3):
        distance = int.from_bytes(changes[at : at + 2], "little") % len(data)
        data[-1 - distance] = changes[at + 2]
    return bytes(data)


class Target:
    """The target that the fuzzer calls: it writes a capture with one file from the input, and reads it."""

    def __init__(self, folder: Path) -> None:
        self.base = small()
        self.names = (*self.base, STREAM)
        # Shapes are much longer than an input may be, so an input contains only changes.
        self.shapes = [(kind, *make()) for kind, make in fuzz.SHAPES.items()]
        self._folder = fuzz.lay(self.base, folder)
        self._stream = Path(tempfile.mkdtemp(dir=folder.parent)) / STREAM
        self._written = "meta.json"

    def seeds(self, folder: Path) -> Path:
        """Write the unchanged files as the inputs with which the fuzzer begins, and return their folder."""
        folder.mkdir()
        for number, name in enumerate(self.names):
            raw = fuzz.RAW.read_bytes()[:4000] if name == STREAM else self.base[name]
            (folder / str(number)).write_bytes(bytes([number]) + raw)
        for number in range(len(self.names), len(self.names) + len(self.shapes)):
            (folder / str(number)).write_bytes(bytes([number]))
        return folder

    def file(self, data: bytes) -> tuple[str, bytes, int]:
        """Return an input's file, the content of that file, and the level of use."""
        number = data[0] % (len(self.names) + len(self.shapes))
        if number < len(self.names):
            return self.names[number], data[1:], effort(data)
        number -= len(self.names)
        kind, name, raw = self.shapes[number]
        return name, changed(raw, data[1:]), fuzz.effort(number, kind, 0)

    def run(self, data: bytes) -> None:
        """Run one input. Raises every exception but CaptureError."""
        if not data:
            return
        name, raw, much = self.file(data)
        if name == STREAM:
            self._stream.write_bytes(raw)
            with suppress(CaptureError), fuzz.bounded():
                fuzz.use(self._stream.parent, fuzz.TABLES)
            return
        if self._written in self.base:
            (self._folder / self._written).write_bytes(self.base[self._written])
        else:
            (self._folder / self._written).unlink()
        (self._folder / name).write_bytes(raw)
        self._written = name
        with suppress(CaptureError), fuzz.bounded():
            fuzz.use(self._folder, much)

    def mutate(self, data: bytes, most: int, seed: int) -> bytes:
        """Mutate an input, half of the time as atheris does, otherwise as tests/fuzz.py mutates this file."""
        rng = random.Random(seed)
        number = data[0] % (len(self.names) + len(self.shapes)) if data else 0
        if len(data) < 2 or number >= len(self.names) or rng.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        name, raw = self.names[number], data[1:]
        with suppress(Exception):
            if name == "meta.json":
                raw = fuzz.mutate_json(rng, raw)
            elif name != STREAM and rng.random() < 0.5:
                raw = fuzz.mutate_table(rng, raw)
            else:
                raw = fuzz.mutate_bytes(rng, raw)
        return (data[:1] + raw)[:most]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_guided", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument(
        "--keep", type=Path, default=Path(tempfile.gettempdir()), help="folder for the input that failed"
    )
    parser.add_argument("inputs", nargs="*", type=Path, help="run only these inputs")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.folder:
        # The fuzzer exits its process directly, which would leave the folder behind.
        with tempfile.TemporaryDirectory(prefix="cwndtrace-fuzz-") as folder:
            command = [sys.executable, "-m", "tests.fuzz_guided", *sys.argv[1:], "--folder", folder]
            sys.exit(subprocess.run(command, check=False).returncode)
    target = Target(options.folder / "case")
    fuzz.bound_process()
    for path in options.inputs:
        target.run(path.read_bytes())
    if options.inputs:
        return
    flags = [f"-max_total_time={options.seconds}", f"-max_len={LONGEST}", f"-timeout={STUCK_S}"]
    flags += ["-rss_limit_mb=0", f"-artifact_prefix={options.keep}/", "-print_final_stats=1"]
    corpus = target.seeds(options.folder / "corpus")
    atheris.Setup([sys.argv[0], *flags, str(corpus)], target.run, custom_mutator=target.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
