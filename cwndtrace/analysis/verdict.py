# SPDX-License-Identifier: Apache-2.0
"""Verdicts: whether a reset mattered, and if not, why not; for each reset, each connection and the whole host.

A reset is harmful if it cost its burst at least one round trip. Any other reset is harmless for a reason that the
records show. How long the receiver's window and the send buffer held a connection back comes from the kernel's own
clocks in the snapshots (tcp_chrono_*() in net/ipv4/tcp_output.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace import tcp
from cwndtrace.analysis.idle_cause import reopened
from cwndtrace.store.meta import Meta

VERDICTS: Final = (
    "harmful",
    "burst_fits",
    "same_rounds",
    "never_full",
    "receiver_window",
    "send_buffer",
    "loss",
    "nothing_sent",
    "unknown",
    "exempt",
    "sysctl_off",
    "no_reset",
)
"""The verdicts; those from ``exempt`` on apply to connections only. ``present.text.LABELS`` has their texts."""

COLUMNS: Final = {
    "verdict": "one of VERDICTS",
    "lost_us": "cost of the reset, us, estimated: predicted_us where it was harmful, else 0",
    "rwnd_limited_share": "share of the busy time (data queued or unacknowledged) between the snapshots around the "
    "reset in which the peer's window held the sender back; missing where no snapshot tells",
    "sndbuf_limited_share": "the same for the send buffer",
}
"""The columns that ``resets`` adds to priced resets."""

CONNECTION_COLUMNS: Final = {
    "bursts": "bursts that can be told apart: idle resets, and spans between snapshots that sent data without one; "
    "there may have been more",
    "after_reset_share": "share of these bursts that began with a reset",
    "idle_per_rto_p50": "median of the idle times that ended in an idle reset, in RTOs; missing where there was none",
    "idle_per_rto_max": "the longest of them in RTOs",
    "sent_bytes": "bytes sent while it was watched; a lower bound where only the bursts after its resets show them",
    "busy_us": "busy time (data queued or unacknowledged) while it was watched, us; missing without two snapshots",
    "rwnd_limited_share": "share of busy_us in which the peer's window held it back",
    "sndbuf_limited_share": "share of busy_us in which the send buffer held it back",
    "retrans_segments": "segments retransmitted while it was watched",
    "resets_harmful": "number of its resets that were harmful",
    "lost_us": "cost of its resets, sum, us, estimated",
    "measured_us": "time that its followed windows took to grow back, less the time that their bytes needed at least, "
    "sum, us: an upper bound of the cost",
    "verdict": "one of VERDICTS: harmful if any reset was, else the most frequent one of its resets",
    "verdict_resets": "number of its resets with that verdict",
}
"""The columns that ``connections`` adds to ``analysis.connections.summary``."""

LIMIT_SHARE: Final = 0.5
"""The share above which something that held a connection back is taken for its limit."""


@dataclass(frozen=True)
class Totals:
    """The resets of a whole capture. ``lost_us`` is estimated, in us; ``busy_us`` is NaN where it is unknown.

    ``verdicts`` counts the verdicts of the resets, or those of the connections where there was no reset; the most
    frequent one comes first. ``idle_only`` says that all harmful resets were idle resets.
    """

    verdicts: dict[str, int]
    idle_only: bool
    resets: int
    harmful: int
    connections: int
    connections_seen: int
    lost_us: float
    busy_us: float


def resets(priced: pd.DataFrame, snapshots: pd.DataFrame) -> pd.DataFrame:
    """Return ``priced``, which has ``cost.COLUMNS``, with ``COLUMNS``; ``snapshots`` is a Trace's ``connections``."""
    out = priced.join(_limited(priced, snapshots))
    burst, mss = out["burst_bytes"], out["mss"].astype("float64")
    # A limit below both the window before the reset and the burst, which caused most of the round trips.
    narrow = out["limit_bytes"] < np.minimum(out["cwnd_before"].astype("float64") * mss, burst)
    narrow &= out["rounds_lost"] < LIMIT_SHARE * out["rounds_after"]
    buffer = out["limit_bytes"] < out["snd_wnd"]
    limits = {
        "rwnd": (out["rwnd_limited_share"] > LIMIT_SHARE) | (narrow & ~buffer),
        "sndbuf": (out["sndbuf_limited_share"] > LIMIT_SHARE) | (narrow & buffer),
    }
    closed = pd.Series(reopened(out), index=out.index)
    label = _first(
        [
            ("loss", out["reason"].astype(str) == "rto_loss"),
            ("unknown", burst.isna() | (mss == 0) | (out["srtt_us"] == 0)),
            ("nothing_sent", burst == 0),
            ("receiver_window", closed),
            ("burst_fits", burst <= out["cwnd_after"] * mss),
            ("send_buffer", limits["sndbuf"]),
            ("receiver_window", limits["rwnd"]),
            ("harmful", out["rounds_lost"] >= 1),
            ("never_full", out["grew_rounds"] == 0),
        ],
        "same_rounds",
    )
    return out.assign(
        verdict=pd.Series(label, index=out.index, dtype="str"),
        lost_us=out["predicted_us"].where(label == "harmful", 0.0),
    )[[*priced.columns, *COLUMNS]]


def _first(rules: list[tuple[str, pd.Series]], otherwise: str) -> npt.NDArray[np.str_]:
    """Return, for each row, the label of the first rule whose condition holds."""
    return np.select(
        [condition.to_numpy(dtype=bool) for _, condition in rules], [label for label, _ in rules], otherwise
    )


def _limited(resets: pd.DataFrame, snapshots: pd.DataFrame) -> pd.DataFrame:
    """Return the shares of ``COLUMNS``, from the snapshot before each reset to the one after it."""
    clocks = ["busy_us", "rwnd_limited_us", "sndbuf_limited_us"]
    moments = resets[["connection"]].assign(ts_ns=resets["ts_ns"].astype("int64"), row=np.arange(len(resets)))
    moments = moments.sort_values("ts_ns", kind="stable")
    readings = snapshots[["connection", *clocks]].astype(dict.fromkeys(clocks, "float64"))
    readings = readings.assign(ts_ns=snapshots["ts_ns"].astype("int64")).sort_values("ts_ns", kind="stable")
    around = [
        pd.merge_asof(moments, readings, on="ts_ns", by="connection", direction=direction).set_index("row")[clocks]
        for direction in ("backward", "forward")
    ]
    spent = around[1] - around[0]
    busy = spent["busy_us"].where(spent["busy_us"] > 0)
    shares = {name: spent[f"{name}_us"] / busy for name in ("rwnd_limited", "sndbuf_limited")}
    frame = pd.DataFrame({f"{name}_share": share.sort_index() for name, share in shares.items()})
    return frame.set_index(resets.index)


def connections(
    summary: pd.DataFrame,
    judged: pd.DataFrame,
    snapshots: pd.DataFrame,
    about: Meta,
    *,
    whole: bool = True,
) -> pd.DataFrame:
    """Return ``summary`` (of analysis.connections) with ``CONNECTION_COLUMNS``, those that lost most first.

    ``judged`` holds the resets with ``COLUMNS``, ``snapshots`` is ``connections`` of a Trace, ``about`` its metadata.
    ``whole`` says that none of these rows are missing; otherwise a connection without a reset may have had one.
    """
    out = summary.set_index("connection", drop=False).rename_axis(None)
    out = out.join(_watched(judged, snapshots)).join(_of_resets(judged))
    zeros = dict.fromkeys(("bursts", "sent_bytes", "retrans_segments", "resets_harmful", "lost_us"), 0)
    out = out.fillna(zeros).astype(dict.fromkeys(("retrans_segments", "resets_harmful"), "int64"))
    out["sent_bytes"] = out[["sent_bytes", "burst_bytes"]].max(axis=1).astype("int64")
    out["bursts"] = (out["bursts"] + out["resets_idle"]).astype("int64")
    out["after_reset_share"] = out["resets_idle"] / out["bursts"].where(out["bursts"] > 0)
    out["verdict"] = _judge(out, about, whole=whole)
    out["verdict_resets"] = out["common_count"].where(out["verdict"] == out["common"], out["resets_harmful"])
    out["verdict_resets"] = out["verdict_resets"].fillna(0).astype("int64")
    out = out.sort_values("lost_us", ascending=False, kind="stable")
    return out.reset_index(drop=True)[[*summary.columns, *CONNECTION_COLUMNS]]


def _watched(judged: pd.DataFrame, snapshots: pd.DataFrame) -> pd.DataFrame:
    """Return totals for each connection while it was watched.

    That is from its first snapshot on, or all its life if it appeared later than the first snapshots.
    """
    clocks = ["busy_us", "rwnd_limited_us", "sndbuf_limited_us"]
    kinds = {"ts_ns": "int64", "bytes_sent": "int64", "total_retrans": "int64"} | dict.fromkeys(clocks, "float64")
    rows = snapshots[["connection", *kinds]].astype(kinds).sort_values("ts_ns", kind="stable", ignore_index=True)
    groups = rows.groupby("connection", sort=False)
    totals = groups[["bytes_sent", "total_retrans", *clocks]].last()
    # The first snapshot of all connections takes less than a second, and the next one comes later.
    old = groups["ts_ns"].first() <= rows["ts_ns"].min() + 1_000_000_000
    totals -= groups[["bytes_sent", "total_retrans", *clocks]].first().where(old, 0)
    # A span between two snapshots counts as a burst if data was sent in it and no reset began a burst there.
    known = rows["connection"].map(old).astype(bool) | rows.duplicated("connection")
    sent = groups["bytes_sent"].diff().where(known, rows["bytes_sent"]) > 0
    seen = judged.loc[judged["reason"].astype(str) == "idle", ["connection"]].assign(
        ts_ns=judged["ts_ns"].astype("int64")
    )
    ends = pd.merge_asof(
        seen.sort_values("ts_ns", kind="stable"),
        rows[["ts_ns", "connection"]].assign(row=rows.index),
        on="ts_ns",
        by="connection",
        direction="forward",
    )["row"].dropna()
    sent[ends.astype("int64").unique()] = False
    busy = totals["busy_us"].where(~old | (groups.size() > 1))
    return pd.DataFrame(
        {
            "bursts": sent.groupby(rows["connection"], sort=False).sum(),
            "sent_bytes": totals["bytes_sent"],
            "retrans_segments": totals["total_retrans"],
            "busy_us": busy,
            "rwnd_limited_share": totals["rwnd_limited_us"] / busy.where(busy > 0),
            "sndbuf_limited_share": totals["sndbuf_limited_us"] / busy.where(busy > 0),
        }
    )


def _of_resets(judged: pd.DataFrame) -> pd.DataFrame:
    """Return totals over the resets of each connection; ``common`` is their most frequent verdict."""
    keys = judged["connection"]
    per_rto = (judged["idle_us"] / judged["rto_us"].where(judged["rto_us"] > 0)).where(judged["reason"] == "idle")
    groups = per_rto.groupby(keys)
    counts = judged.groupby(["connection", "verdict"]).size().rename("n").reset_index()
    common = counts.sort_values("n", kind="stable").drop_duplicates("connection", keep="last")
    return pd.DataFrame(
        {
            "idle_per_rto_p50": groups.median(),
            "idle_per_rto_max": groups.max(),
            "resets_harmful": (judged["verdict"] == "harmful").groupby(keys).sum(),
            "lost_us": judged["lost_us"].groupby(keys).sum(),
            "burst_bytes": judged["burst_bytes"].groupby(keys).sum(),
            "measured_us": judged["measured_us"].groupby(keys).sum(min_count=1),
            "common": common.set_index("connection")["verdict"],
            "common_count": common.set_index("connection")["n"],
        }
    )


def _judge(rows: pd.DataFrame, about: Meta, *, whole: bool) -> pd.Series:
    off = [inode for inode, namespace in about.namespaces.items() if namespace.idle == 0]
    hidden = bool(about.probes) and not about.probes.get("idle")
    rules: list[tuple[str, pd.Series]] = [
        ("harmful", rows["resets_harmful"] > 0),
        ("common", rows["common"].notna()),
        ("exempt", rows["ca_name"].isin(tcp.EXEMPT)),
        ("sysctl_off", rows["netns_ino"].astype(str).isin(off)),
        ("unknown", pd.Series(not whole, index=rows.index)),
        ("nothing_sent", (rows["sent_bytes"] == 0) & (rows["snapshots"] > 1)),
        ("send_buffer", rows["sndbuf_limited_share"] > LIMIT_SHARE),
        ("receiver_window", rows["rwnd_limited_share"] > LIMIT_SHARE),
        ("loss", rows["retrans_segments"] > 0),
        ("unknown", pd.Series(hidden, index=rows.index) | ((rows["snapshots"] < 2) & (rows["sent_bytes"] == 0))),
    ]
    label = _first(rules, "no_reset")
    return pd.Series(np.where(label == "common", rows["common"], label), index=rows.index, dtype="str")


def host(rows: pd.DataFrame, judged: pd.DataFrame) -> Totals:
    """Return the totals of a whole capture: ``rows`` are those of ``connections``, ``judged`` those of ``resets``."""
    harmful = judged[judged["verdict"] == "harmful"]
    counts = (judged if len(judged) else rows)["verdict"].value_counts()
    return Totals(
        verdicts={str(label): int(number) for label, number in counts.items()},
        idle_only=bool((harmful["reason"].astype(str) == "idle").all()),
        resets=len(judged),
        harmful=len(harmful),
        connections=int(harmful["connection"].nunique()),
        connections_seen=len(rows),
        lost_us=float(harmful["lost_us"].sum()),
        busy_us=float(rows["busy_us"].sum(min_count=1)),
    )
