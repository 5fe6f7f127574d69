# SPDX-License-Identifier: Apache-2.0
"""A fleet's result in Python."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from cwndtrace.errors import UsageError, need
from cwndtrace.fleet.dataset import Dataset
from cwndtrace.fleet.extract import MOST_ROWS
from cwndtrace.fleet.tables import Frames
from cwndtrace.format import clean


class Fleet:
    """The tables of many captures; each is a DataFrame, which is read when it is first used.

    ``result`` is the folder that they are read from; a ``temporary`` one lasts as long as this object.
    ``attrs["units"]`` of a frame has the unit of each column, and ``fleet.tables.COLUMNS`` what they mean.
    """

    def __init__(self, result: Dataset, *, temporary: bool = False) -> None:
        self.result = result
        if temporary:
            weakref.finalize(self, shutil.rmtree, result.path, ignore_errors=True)

    @property
    def path(self) -> Path:
        """The folder of the result."""
        return self.result.path

    @cached_property
    def captures(self) -> pd.DataFrame:
        """One row per capture, also for those that couldn't be read: ``status`` and ``reason`` say so."""
        return self.result.read("captures")

    @cached_property
    def connections(self) -> pd.DataFrame:
        """One row per connection: the columns of ``Trace.summary()``, and its host, capture and network."""
        return self.result.read("connections")

    @cached_property
    def workloads(self) -> pd.DataFrame:
        """One row per service of a workload in a capture: the columns of ``Trace.groups()``."""
        return self.result.read("workloads")

    @cached_property
    def devices(self) -> pd.DataFrame:
        """One row per device and operation in a capture: those of ``Trace.block_summary()``, and a histogram."""
        return self.result.read("devices")

    @cached_property
    def settings(self) -> pd.DataFrame:
        """One row per network namespace in a capture, with its settings when the capture began and ended."""
        return self.result.read("settings")

    def frames(self) -> Frames:
        """Return all tables."""
        return Frames(self.captures, self.connections, self.workloads, self.devices, self.settings)

    def __repr__(self) -> str:
        return f"cwndtrace fleet {self.path}"


def fleet(
    *places: str | os.PathLike[str],
    result: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    resume: bool = False,
    max_rows: int = MOST_ROWS,
) -> Fleet:
    """Open the result of ``cwndtrace fleet report -o``, or compute one of the captures below ``places``.

    A place is a folder, a glob or a URL. ``result`` is the folder to write to, by default a temporary one; ``workers``
    is the number of processes, by default that of CPUs; ``scheduler`` the address of a Dask scheduler to use instead.
    With ``resume``, captures that are in ``result`` already and didn't change aren't computed again. Raises
    CwndtraceError, with a cause and a remedy.
    """
    texts = [os.fspath(place) for place in places]
    folder = None if result is None else Path(result)
    return stored(texts, folder) or compute(
        texts, folder, workers=workers, scheduler=scheduler, resume=resume, max_rows=max_rows
    )


def stored(places: Sequence[str], folder: Path | None) -> Fleet | None:
    """Return the result that the only place is; None where it is none.

    Raises UsageError where a ``folder`` to write to is given too, because nothing would be written there.
    """
    if len(places) != 1 or not Dataset.is_one(Path(places[0])):
        return None
    if folder is not None:
        raise UsageError(
            f"{clean(places[0])} is a result, and has no captures to compute another one from",
            "leave out -o to show its report, or give the place of the captures",
        )
    return Fleet(Dataset(Path(places[0])))


def compute(places: Sequence[str], folder: Path | None, *, resume: bool = False, **options: Any) -> Fleet:
    """Compute a result; ``options`` are those of ``engine.run``. Raises CwndtraceError."""
    for module in ("distributed", "fsspec", "cryptography"):
        need(module, "fleet", "cwndtrace fleet")
    from cwndtrace.fleet import engine  # Dask takes a second to load, and a result needs none to be read
    from cwndtrace.fleet.places import find

    found = find(places)
    path = folder or Path(tempfile.mkdtemp(prefix="cwndtrace-result-"))
    made = Fleet(Dataset.create(path, resume=resume), temporary=folder is None)
    engine.run(found, made.result, resume=resume, **options)
    return made
