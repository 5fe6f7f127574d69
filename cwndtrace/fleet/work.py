# SPDX-License-Identifier: Apache-2.0
"""What a worker does with one capture."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from cwndtrace.errors import CwndtraceError, for_lack_of_memory, out_of_memory
from cwndtrace.fleet import dataset, unpack
from cwndtrace.fleet.extract import extract, failed
from cwndtrace.fleet.places import Located
from cwndtrace.fleet.tables import Frames
from cwndtrace.format import clean

_CREDENTIALS: Final = re.compile(r"//[^/@\s]*@")


def work(found: Located, max_rows: int, scratch: str | None) -> dict[str, bytes]:
    """Return the tables of one capture as Parquet, whatever is wrong with it.

    What has to be unpacked goes to a folder of its own in ``scratch``, by default where temporary files go.
    """
    return dataset.pack(analysed(found, max_rows, scratch))


def analysed(found: Located, max_rows: int, scratch: str | None) -> Frames:
    """Return the frames of one capture, whatever is wrong with it."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="cwndtrace-", dir=scratch) as folder,
            unpack.opened(found, Path(folder)) as path,
        ):
            frames = extract(path, found.host, found.name, max_rows=max_rows)
            return _renamed(frames, str(path), found.name) if found.packed or found.place else frames
    except CwndtraceError as error:
        return failed(found.host, found.name, error)
    except Exception as error:  # the capture of another host must not end the whole run
        if for_lack_of_memory(error):
            return failed(found.host, found.name, out_of_memory())
        return failed(found.host, found.name, _odd(error))


def _odd(error: Exception) -> CwndtraceError:
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror  # without the name, which may be that of a temporary file
    else:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    # A library's error may name the URL with the password in it, and reports are passed on.
    text = _CREDENTIALS.sub("//", text)
    return CwndtraceError(f"It can't be read: {clean(text)}.", "Copy it again; if that doesn't help, report this line.")


def _renamed(frames: Frames, folder: str, name: str) -> Frames:
    """Return ``frames`` with the capture's name in place of the temporary folder."""
    texts = {
        column: frames.captures[column].str.replace(folder, name, regex=False) for column in ("reason", "warnings")
    }
    return replace(frames, captures=frames.captures.assign(**texts))
