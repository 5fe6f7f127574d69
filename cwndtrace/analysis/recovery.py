# SPDX-License-Identifier: Apache-2.0
"""The windows after their resets: the tables ``cwnd_recovery`` and ``cwnd_sample``, joined to the resets."""

from __future__ import annotations

from typing import Final

import pandas as pd

COLUMNS: Final = {
    "connection": "key, as in connections.COLUMNS; empty where the reset's own record was lost",
    "duration_us": "time from the reset until cwndtrace stopped following its window, us",
    "round_trips": "the same in round trips of srtt_us; missing where no round-trip time was ever measured",
}
"""The columns that ``with_duration`` adds to the table ``cwnd_recovery``."""


def identify(frame: pd.DataFrame, resets: pd.DataFrame) -> pd.DataFrame:
    """Return a table with ``skaddr`` and ``reset_ts_ns``, joined to the column ``connection`` of each row's reset."""
    keys = resets[["skaddr", "ts_ns", "connection"]].rename(columns={"ts_ns": "reset_ts_ns"})
    keys = keys.drop_duplicates(["skaddr", "reset_ts_ns"])  # a copied part has resets twice
    joined = frame[["skaddr", "reset_ts_ns"]].merge(keys, how="left", on=["skaddr", "reset_ts_ns"])
    return frame.assign(connection=joined["connection"].fillna("").to_numpy())


def with_duration(recoveries: pd.DataFrame, resets: pd.DataFrame) -> pd.DataFrame:
    """Return ``cwnd_recovery`` with ``COLUMNS``; ``resets`` are those of a Trace."""
    out = identify(recoveries, resets)
    us = (out["end_ts_ns"].astype("int64") - out["reset_ts_ns"].astype("int64")) / 1000
    srtt = out["srtt_us"].astype("float64")
    return out.assign(duration_us=us, round_trips=(us / srtt).where(srtt > 0))
