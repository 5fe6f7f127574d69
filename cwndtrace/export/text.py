# SPDX-License-Identifier: Apache-2.0
"""The tables of a trace as CSV and as JSON lines.

The rows are made column by column in Arrow, so that a million of them take seconds, and a piece of them at a time, so
that they take no more memory than a piece.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cwndtrace.analysis.block_io import NEEDS, WORKLOADS
from cwndtrace.errors import making_sense
from cwndtrace.records import arrow
from cwndtrace.trace import Trace

TABLES: Final = (
    *("summary", "verdicts", "resets", "recoveries", "samples", "connections", "block_io", "workloads", "processes"),
)
"""The tables that can be written: the members of ``Trace`` with these names."""

FORMULA: Final = (*"=+-@\t\r\n", *"\uff1d\uff0b\uff0d\uff20", "'")
"""What a text begins with, after spaces, that is written with an apostrophe in front. A spreadsheet may take all but
the last for the beginning of a formula, some by their wide forms; the apostrophe is one of them so that a reader can
take one away from each text that has it."""

_PIECE_ROWS: Final = 1 << 15


class Writable(Protocol):
    """A binary file, compressed or not."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Write all of ``data``."""


@dataclass(frozen=True)
class Form:
    """How rows are written: what is before, between and after the values, and how a text and a missing value are."""

    head: Callable[[list[str]], str]
    before: Callable[[list[str]], list[str]]
    after: str
    text: Callable[[str], str]
    time: str
    missing: str


def _quoted(text: str) -> str:
    """Return a cell with a text in CSV."""
    inner = text.replace('"', '""')
    return f'"{chr(39) if text.lstrip(" ").startswith(FORMULA) else ""}{inner}"'


CSV: Final = Form(
    head=lambda names: ",".join(names) + "\n",
    before=lambda names: ["", *("," for _ in names[1:])],
    after="\n",
    text=_quoted,
    time="",
    missing="",
)
"""RFC 4180 with a line of names, and with texts in quotation marks. A missing value is an empty cell."""

JSON_LINES: Final = Form(
    head=lambda _: "",
    before=lambda names: [f"{'{' if n == 0 else ','}{json.dumps(name)}:" for n, name in enumerate(names)],
    after="}\n",
    text=json.dumps,
    time='"',
    missing="null",
)
"""One object a row, in ASCII. A missing value is null."""


@making_sense()
def write(file: Writable, trace: Trace, table: str, form: Form) -> int:
    """Write one of ``TABLES`` to a binary file, and return the number of its rows.

    The columns are those of the frame, in its order. A time is ISO 8601 in UTC. A number is written so that it reads
    back as the same number. Texts have no control characters, as in the frames. Raises CaptureError.
    """
    rows, head = 0, True
    for frame in pieces(trace, table):
        whole = pa.Table.from_pandas(frame, preserve_index=False)
        if head:
            file.write(form.head(whole.column_names).encode())
            head = False
        for start in range(0, len(whole), _PIECE_ROWS):
            file.write(lines(whole.slice(start, _PIECE_ROWS).combine_chunks(), form))
        rows += len(whole)
    return rows


def pieces(trace: Trace, table: str) -> Iterator[pd.DataFrame]:
    """Yield the rows of one of ``TABLES`` as frames with the same columns, at least one."""
    if table == "block_io":
        yield from trace.block_batches(*arrow.schema(table).names, *NEEDS, *WORKLOADS)
        return
    frame: pd.DataFrame = trace.summary() if table == "summary" else getattr(trace, table)
    yield frame


def lines(table: pa.Table, form: Form) -> memoryview:
    """Return rows, which are one chunk, as UTF-8."""
    if not len(table):
        return memoryview(b"")
    parts: list[Any] = []
    for before, column in zip(form.before(table.column_names), table.columns, strict=True):
        parts += [before, _shown(column.chunk(0), form)]
    rows = pc.binary_join_element_wise(*parts, form.after, "", null_handling="replace", null_replacement=form.missing)
    ends = np.frombuffer(rows.buffers()[1], np.int32, len(rows) + 1, rows.offset * 4)
    return memoryview(rows.buffers()[2])[ends[0] : ends[-1]]


def _shown(column: pa.Array, form: Form) -> pa.StringArray:
    """Return the values of a column as they are written; null where they are missing."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.dictionary_encode()
    if pa.types.is_dictionary(column.type):
        # A dictionary has each text once, so that each is looked at once.
        texts = pa.array([None if t is None else form.text(t) for t in column.dictionary.to_pylist()], pa.string())
        return texts.take(column.indices)
    if pa.types.is_timestamp(kind):
        times = np.datetime_as_string(column.cast(pa.timestamp(kind.unit)).to_numpy(zero_copy_only=False))
        texts = pa.array([f"{form.time}{time}Z{form.time}" for time in times.tolist()], pa.string())
        return pc.if_else(column.is_valid(), texts, None)
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_finite(column), column, None)
    return column.cast(pa.string())
