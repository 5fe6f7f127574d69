# SPDX-License-Identifier: Apache-2.0
"""Tables as DataFrames: numbers that can be subtracted, and missing values in place of the kernel's placeholders."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cwndtrace.records import arrow

PLACEHOLDERS: Final = {
    "ssthresh": 2**31 - 1,
    "ssthresh_before": 2**31 - 1,
    "ssthresh_after": 2**31 - 1,
    "ssthresh_end": 2**31 - 1,
    "min_rtt_us": 2**32 - 1,
}
"""The columns in which the kernel writes a number for "never set" or "none", each with the least such number."""

_QUANTITIES: Final = frozenset({"ns", "us", "bytes", "segments", "count", "sectors of 512 bytes"})
"""The units of numbers with which one calculates; the others are names of things: ids, ports, pids, flags."""


def frame(table: pa.Table, name: str) -> pd.DataFrame:
    """Return rows of a capture's table ``name`` as a DataFrame, by the rule that ``Trace`` states."""
    return without_placeholders(raw(table, name))


def raw(table: pa.Table, name: str) -> pd.DataFrame:
    """Return the same with the kernel's placeholders, so that a missing value is one that wasn't recorded."""
    for index, column in enumerate(table.schema):
        if column.name in _quantities(name):
            table = table.set_column(index, column.name, _signed(table.column(index), name))
        elif column.name in arrow.IDS_OF_LATER_VERSIONS and table.column(index).null_count:
            table = table.set_column(index, column.name, pc.fill_null(table.column(index), 0))
    return _of_many(table) if name == "block_io" else _pandas(table)


def _pandas(data: Any) -> Any:
    """Return a table as a frame, or a column as a series."""
    return data.to_pandas(use_threads=False)  # for the reason given in store.files.read


def _of_many(table: pa.Table) -> pd.DataFrame:
    """Return what ``_pandas`` does. For hundreds of thousands of rows this takes half of its time."""
    table = table.unify_dictionaries()
    columns: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        text = pa.types.is_dictionary(kind) and kind.index_type == pa.int32()
        if column.null_count or not column.num_chunks or not (text or pa.types.is_integer(kind)):
            columns[name] = _pandas(column)
        elif not text:
            columns[name] = np.concatenate([arrow.values(chunk) for chunk in column.chunks])
        else:
            labels = pd.Index(_pandas(column.chunk(0).dictionary))
            small: Any = np.int8 if len(labels) < 128 else np.int32
            codes: Any = np.concatenate([arrow.values(c.indices) for c in column.chunks], dtype=small, casting="unsafe")
            columns[name] = pd.Categorical.from_codes(codes, labels, validate=False)
    return pd.DataFrame(columns, copy=False)


def without_placeholders(frame: pd.DataFrame) -> pd.DataFrame:
    """Return ``frame`` with missing values in place of placeholders, and columns that may have any as float64."""
    may_be_missing = frame.columns.intersection([*arrow.MAY_BE_NULL, *arrow.OF_LATER_VERSIONS])
    new = {n: frame[n].astype("float64") for n in may_be_missing if pd.api.types.is_numeric_dtype(frame[n])}
    for name, least in PLACEHOLDERS.items():
        if name in frame:
            number = frame[name].astype("float64")
            new[name] = number.mask(number >= least)
    return frame.assign(**new) if new else frame


def whole(frame: pd.DataFrame, name: str, *, placeholders: bool = False) -> pd.DataFrame:
    """Return the rows of a table that have values in all ``arrow.needed`` columns of the frame.

    ``placeholders`` says that the frame is one of ``raw``. In any other frame a column of ``PLACEHOLDERS`` may lack
    values in rows that have been recorded in full.
    """
    wanted = [column for column in arrow.needed(name) if placeholders or column not in PLACEHOLDERS]
    partly = [column for column in wanted if column in frame and frame[column].hasnans]
    if not partly:
        return frame
    numbers = {column: kind for column, kind in _kinds(name).items() if column in partly}
    return frame.dropna(subset=partly).reset_index(drop=True).astype(numbers)


@cache
def _kinds(name: str) -> dict[str, np.dtype[np.generic]]:
    """Return the types that the integers of a table have in a frame without missing values."""
    integers = [column for column in arrow.schema(name) if pa.types.is_integer(column.type)]
    return {
        column.name: np.dtype(np.int64 if column.name in _quantities(name) else column.type.to_pandas_dtype())
        for column in integers
    }


@cache
def _quantities(name: str) -> frozenset[str]:
    return frozenset(f.name for f in arrow.schema(name) if f.metadata[b"unit"].decode() in _QUANTITIES)


def _signed(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Return unsigned integers of table ``name`` as signed ones."""
    kind = pa.int64()
    if name == "block_io" and column.type == pa.uint32() and (pc.max(column).as_py() or 0) < 1 << 31:
        kind = pa.int32()  # four bytes a row less, of which there may be millions
    if column.type.bit_width != kind.bit_width:
        return column.cast(kind)
    # Without a copy; no number of 64 bits that was recorded right is above 2**63.
    return pa.chunked_array([chunk.view(kind) for chunk in column.chunks], type=kind)
