# SPDX-License-Identifier: Apache-2.0
"""Whatever a process is called, its name can be printed."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from cwndtrace import encoding

NAME = "日本é"


@pytest.mark.parametrize(
    ("codec", "shown"),
    [("utf-8", NAME.encode()), ("latin-1", b"??\xe9"), ("ascii", b"???"), ("ANSI_X3.4-1968", b"???")],
)
def test_characters_that_an_encoding_lacks_are_question_marks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codec: str, shown: bytes
) -> None:
    # As sys.__stdout__ does, something has to hold the first streams.
    first = {name: (tmp_path / name).open("w", encoding=codec, buffering=1) for name in ("stdout", "stderr")}
    for name, stream in first.items():
        monkeypatch.setattr(sys, name, stream)
    encoding.print_all()
    once = sys.stdout
    encoding.print_all()
    assert sys.stdout is once
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.write(f"{NAME}\n")
        assert stream.line_buffering
        assert (tmp_path / name).read_bytes() == shown + b"\n"
        # click writes UTF-8 to the buffer of a stream that is ASCII.
        assert (stream.buffer is None) == (shown == b"???")
        stream.close()
        first[name].close()


def test_a_stream_of_ascii_leaves_its_descriptor_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = (tmp_path / "out").open("w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", file)
    encoding.print_all()
    sys.stdout.close()
    os.fstat(file.fileno())
    file.close()


def test_another_kind_of_stream_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    encoding.print_all()
    assert sys.stdout is stream
