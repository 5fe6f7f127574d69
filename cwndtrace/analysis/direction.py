# SPDX-License-Identifier: Apache-2.0
"""The direction of connections: where one mostly receives, the windows that matter are kept at the other end.

Pandas isn't imported here, because ``run`` asks while it traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from cwndtrace.lazy import pa
from cwndtrace.records import arrow

if TYPE_CHECKING:
    import pandas as pd

LEAST_BYTES: Final = 10_000
"""Fewer bytes than this, such as those of a TLS handshake, don't show a direction."""
_RATIO: Final = 10
ENDS: Final = ["saddr", "sport", "daddr", "dport"]


def mostly_receives(sent: Any, received: Any) -> Any:
    """Return, for arrays or columns of bytes, where more than ``LEAST_BYTES`` came in, ten times what went out."""
    return (received > LEAST_BYTES) & (received >= _RATIO * sent)


def sender_elsewhere(rows: pd.DataFrame) -> pd.Series:
    """Return which connections of a ``summary`` mostly receive from a sender that isn't in the summary itself.

    Over loopback and between namespaces of one host a capture has both ends.
    """
    here = set(rows[["daddr", "dport", "saddr", "sport"]].itertuples(index=False, name=None))
    absent = [ends not in here for ends in rows[ENDS].itertuples(index=False, name=None)]
    return rows["mostly_receives"].fillna(value=False).astype(bool) & np.array(absent, dtype=bool)


def may_receive(rows: pd.DataFrame) -> pd.Series:
    """Return which connections of a ``summary`` sent little and received an unknown amount."""
    unknown = rows["bytes_received"].isna() & (rows["snapshots"] > 0)
    return unknown & (rows["sent_bytes"] < LEAST_BYTES)


def watched(snapshots: pd.DataFrame, counters: Sequence[str]) -> pd.DataFrame:
    """Return by how much counters of each connection, by its key, grew while it was watched.

    Takes the frame ``connections`` of a Trace. A connection is watched from its first snapshot on, or all its life if
    it appeared later than the first snapshots. The values are float64, and missing where the snapshots don't tell.
    """
    kinds = {"ts_ns": "int64"} | dict.fromkeys(counters, "float64")
    rows = snapshots[["connection", *kinds]].astype(kinds).sort_values("ts_ns", kind="stable")
    groups = rows.groupby("connection", sort=False)
    old = seen_from_the_start(rows)
    grown = groups[[*counters]].last() - groups[[*counters]].first().where(old, 0)
    # The counters of a socket that is closed by RST begin anew.
    return grown.clip(lower=0).where(~old | (groups.size() > 1))


def seen_from_the_start(snapshots: pd.DataFrame) -> pd.Series:
    """Return which connections, by their keys, the capture's first snapshots show: their counters are of before, too.

    The first snapshot of all connections takes less than a second, and the next one comes later.
    """
    first = snapshots.groupby("connection", sort=False)["ts_ns"].min()
    old: pd.Series = first <= first.min() + 1_000_000_000
    return old


class Receivers:
    """Finds out, snapshot by snapshot, whether all connections that move data mostly receive."""

    def __init__(self) -> None:
        self.sends = False
        """True once a connection has sent much, so that the question is answered."""
        self._keys: npt.NDArray[np.uint64] | None = None
        self._first: npt.NDArray[np.float64] = np.zeros((2, 0))

    def add(self, snapshot: pa.Table) -> pa.Table | None:
        """Take a snapshot. Returns the rows of the connections that mostly receive, if no other one moves data.

        The result is None where one does, or none has moved enough to tell. What a connection moves counts from the
        snapshot on that first showed it, or all its life if that wasn't the first one.
        """
        if self.sends:
            return None
        column = {
            name: arrow.values(snapshot[name].combine_chunks())
            for name in ("netns_ino", "sock_cookie", "bytes_sent", "bytes_received")
        }
        # A cookie is unique in its namespace only.
        keys = column["sock_cookie"] ^ (column["netns_ino"].astype(np.uint64) << np.uint64(32))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        counts = np.array([column["bytes_sent"], column["bytes_received"]], dtype=np.float64)[:, order]
        first = counts if self._keys is None else self._known(keys)
        self._keys, self._first = keys, first
        sent, received = np.maximum(counts - first, 0)
        mostly = mostly_receives(sent, received)
        self.sends = bool((~mostly & (sent + received > LEAST_BYTES)).any())
        if self.sends or not mostly.any():
            return None
        return snapshot.take(arrow.numbers(pa.int64(), np.sort(order[mostly])))

    def _known(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
        """Return the first counts of the connections with these keys; 0 for new ones."""
        assert self._keys is not None
        first = np.zeros((2, len(keys)))
        _, now, before = np.intersect1d(keys, self._keys, return_indices=True)
        first[:, now] = self._first[:, before]
        return first
