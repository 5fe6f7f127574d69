# SPDX-License-Identifier: Apache-2.0
"""The windows after their resets: the tables ``cwnd_recovery`` and ``cwnd_sample``, joined to the resets.

Resets of a connection that hasn't regained its window in between are a chain. What the window cost a burst belongs to
the reset before that burst, the last of its chain so far.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

COLUMNS: Final = {
    "connection": "key, as in connections.COLUMNS; empty where the reset's own record was lost",
    "duration_us": "time from the reset until cwndtrace stopped following its window, us",
    "round_trips": "the same in round trips of srtt_us; missing where no round-trip time was ever measured",
}
"""The columns that ``with_duration`` adds to the table ``cwnd_recovery``."""


FOLLOWED: Final = {
    "outcome": "how following the window ended, as in cwnd_recovery; empty where it wasn't followed",
    "cost_us": "time by which the window delayed what was sent, compared with the window before the chain of resets, "
    "us, measured; a lower bound where outcome is capture_end, missing where the window wasn't followed",
    "first_cost_us": "the part of cost_us by which the first burst after the reset was late, us",
    "held_us": "time that unsent data waited for the window while the one before the chain had room for all of it, us",
    "short_us": "time by which the window delayed data that wasn't all queued, or that exceeded the window before, us",
    "after_loss_us": "time that unsent data waited after a loss, us",
    "other_us": "time that unsent data waited though both windows had room (pacing, Nagle, small queues), us",
    "busy_us": "time with data queued or unacknowledged while the window was followed, us",
    "rwnd_limited_us": "part of it in which the peer's window held data back, us",
    "sndbuf_limited_us": "part of it in which the send buffer held data back, us",
    "waiting_bytes": "most data unsent and in flight while some of it waited for the window, bytes",
    "acked_bytes": "bytes acknowledged while the window was followed",
    "bursts": "bursts that were sent to their end while the window was followed",
    "chain_window": "window before the first reset of the chain, segments",
    "chain_resets": "resets of the chain so far, this one included",
    "chain": "ts_ns of the chain's first reset in the capture",
    "regained_us": "time until the window was what it was before the chain, us; missing where it never was",
}
"""The columns that ``of_resets`` returns; all but ``chain`` are missing where the window wasn't followed."""

_WAITED: Final = ("cost_us", "first_cost_us", "held_us", "short_us", "after_loss_us", "other_us")
_COPIED: Final = (
    *(*_WAITED, "busy_us", "rwnd_limited_us", "sndbuf_limited_us", "waiting_bytes", "bursts"),
    *("chain_window", "chain_resets"),
)


def of_resets(resets: pd.DataFrame, recoveries: pd.DataFrame | None) -> pd.DataFrame:
    """Return the columns ``FOLLOWED``, indexed as ``resets``. Takes frames of a Trace.

    Idle resets and resets of other reasons are followed separately. Where two followed spans of a socket overlap, the
    same waiting was measured twice, and the cost is that of the span that began first.
    """
    out = pd.DataFrame(np.nan, index=resets.index, columns=list(FOLLOWED)).astype({"outcome": object})
    if recoveries is not None and len(recoveries):
        keys = resets[["skaddr", "ts_ns"]].rename(columns={"ts_ns": "reset_ts_ns"})
        row = keys.merge(_counted_once(recoveries), how="left", on=list(keys.columns)).set_index(resets.index)
        there = [name for name in _COPIED if name in row]  # captures of older versions lack most of them
        out[there] = row[there].astype("float64")
        out["outcome"] = row["outcome"].astype(object)
        acked = row["bytes_acked"].astype("float64")
        # Where an RST closed the connection, older versions recorded a number below 0.
        out["acked_bytes"] = acked.where(acked >= 0)
        out["regained_us"] = row["duration_us"].where(row["outcome"].astype(object) == "regained")
    out["outcome"] = out["outcome"].fillna("").astype("str")
    return out.assign(chain=_chains(resets, out["chain_resets"]))


def _counted_once(recoveries: pd.DataFrame) -> pd.DataFrame:
    """Return ``recoveries``, each once, without the times of those that began while another one was under way."""
    rows = recoveries.drop_duplicates(["skaddr", "reset_ts_ns"])
    rows = rows.sort_values(["skaddr", "reset_ts_ns"], kind="stable")
    end = rows["end_ts_ns"].astype("int64").groupby(rows["skaddr"]).cummax().groupby(rows["skaddr"]).shift()
    twice = (rows["reset_ts_ns"].astype("float64") < end).to_numpy()
    names = [name for name in _WAITED if name in rows]
    return rows.assign(**{name: rows[name].astype("float64").mask(twice & rows[name].notna(), 0.0) for name in names})


def _chains(resets: pd.DataFrame, number: pd.Series) -> pd.Series:
    """Return the ``ts_ns`` of the first reset of each one's chain; a reset that wasn't followed is a chain of one."""
    rows = pd.DataFrame({"ts_ns": resets["ts_ns"].astype("int64"), "key": resets["skaddr"]})
    rows["reason"], rows["first"] = resets["reason"].astype(str), ~(number > 1)
    rows = rows.sort_values("ts_ns", kind="stable")
    # The first recorded reset of a socket may continue a chain that began before the capture.
    rows["first"] |= ~rows.duplicated(["key", "reason"])
    began = rows["ts_ns"].where(rows["first"]).groupby([rows["key"], rows["reason"]]).ffill()
    return began.reindex(resets.index).astype("int64")


CHAIN_COLUMNS: Final = {
    "connection": "key, as in connections.COLUMNS",
    "saddr": "local address",
    "sport": "local port",
    "daddr": "remote address",
    "dport": "remote port",
    "resets": "number of recorded resets of the chain",
    "window_segments": "window before the chain, segments",
    "least_segments": "smallest window that one of its resets left, segments",
    "every_us": "median time from one of its resets to the next, us",
    "lost_us": "cost of its resets, sum, us, measured",
}
"""The columns of ``chains``."""


def chains(judged: pd.DataFrame) -> pd.DataFrame:
    """Return one row per chain of several resets, the largest cost first; ``judged`` are ``verdicts`` of a Trace."""
    keys = ["skaddr", "reason", "chain"]
    needs = [*keys, "ts_ns", "connection", "saddr", "sport", "daddr", "dport", "chain_window", "cwnd_after", "lost_us"]
    ordered = judged[needs].sort_values("ts_ns", kind="stable")
    gaps = ordered.groupby(keys, sort=False)["ts_ns"].diff() / 1000
    groups = ordered.assign(resets=1, every_us=gaps).groupby(keys, sort=False)
    columns = {
        **{name: (name, "last") for name in ("connection", "saddr", "sport", "daddr", "dport")},
        "resets": ("resets", "sum"),
        "window_segments": ("chain_window", "last"),
        "least_segments": ("cwnd_after", "min"),
        "every_us": ("every_us", "median"),
        "lost_us": ("lost_us", "sum"),
    }
    out = groups.agg(**columns).reset_index(drop=True)
    out = out[out["resets"] > 1].sort_values(["lost_us", "resets"], ascending=False, kind="stable", ignore_index=True)
    return out[list(CHAIN_COLUMNS)]


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
