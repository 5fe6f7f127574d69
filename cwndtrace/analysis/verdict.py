# SPDX-License-Identifier: Apache-2.0
"""Verdicts: whether a reset mattered, and if not, why not; for each reset, each connection and the whole host.

A verdict rests on what was measured while the window was followed after the reset: for how long unsent data waited, and
for what. A reset that wasn't followed is only judged where nothing can have waited. Otherwise the verdict is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace import tcp
from cwndtrace.analysis.cost import LOSSES
from cwndtrace.analysis.direction import may_receive, seen_from_the_start, sender_elsewhere, watched
from cwndtrace.analysis.peer_window import handshake, reopened, window_full, zero_window
from cwndtrace.store.meta import Meta

VERDICTS: Final = (
    "harmful",
    "slight",
    "nothing_waited",
    "as_before",
    "burst_fits",
    "receiver_window",
    "send_buffer",
    "paced",
    "loss",
    "handshake",
    "nothing_sent",
    "unknown",
    "other_end",
    "exempt",
    "sysctl_off",
    "no_reset",
)
"""The verdicts; those from ``other_end`` on apply to connections only. ``present.text.LABELS`` has their texts."""

COLUMNS: Final = {
    "verdict": "one of VERDICTS",
    "lost_us": "cost of the reset, us, measured: cost_us; missing where it isn't known, a lower bound where outcome is "
    "capture_end",
}
"""The columns that ``resets`` adds to priced resets."""

CONNECTION_COLUMNS: Final = {
    "bursts": "bursts that can be told apart: idle resets, and spans between snapshots that sent data without one; "
    "there may have been more",
    "after_reset_share": "share of these bursts that began with a reset",
    "idle_per_rto_p50": "median of the idle times that ended in an idle reset, in RTOs; missing where there was none",
    "idle_per_rto_max": "the longest of them in RTOs",
    "rtt_us": "round-trip time, us: the smallest that the kernel knew at its last reset; without one the smoothed one",
    "sent_bytes": "bytes sent while it was watched; a lower bound where only the bursts after its resets show them",
    "busy_us": "busy time (data queued or unacknowledged) while it was watched, us; a lower bound where only followed "
    "windows show it, missing where neither these nor two snapshots do",
    "rwnd_limited_share": "share of the busy time between its snapshots in which the peer's window held it back",
    "sndbuf_limited_share": "the same for the send buffer",
    "retrans_segments": "segments retransmitted while it was watched",
    "resets_harmful": "number of its resets that were harmful",
    "resets_unknown": "number of its resets of which the cost isn't known",
    "lost_us": "cost of its resets, sum, us, measured; without those that aren't known",
    "predicted_us": "cost of the resets that aren't known, sum, us, estimated",
    "verdict": "one of VERDICTS: harmful or slight if any reset was harmful, unknown if any is, else the most frequent "
    "one of its resets",
    "verdict_resets": "number of its resets with that verdict",
}
"""The columns that ``connections`` adds to ``analysis.connections.summary``."""

CANT_TELL: Final = ("unknown", "other_end")
"""The verdicts that leave the question open."""

LIMIT_SHARE: Final = 0.5
"""The share above which something that held a connection without resets back is taken for its limit."""
FLOOR_US: Final = 1000
"""The least cost of a harmful reset, us."""
FLOOR_SHARE: Final = 0.01
"""The least share of its busy time that the resets of a harmful connection cost it."""


@dataclass(frozen=True)
class Totals:
    """The resets of a whole capture. Costs are in us; ``busy_us`` is NaN where it is unknown.

    ``verdict`` is harmful, slight, unknown, or that of most resets, or of most connections where there was no reset.
    ``verdicts`` counts those verdicts, the most frequent one first. ``lost_us`` is measured, ``predicted_us`` estimated
    for the resets that are unknown. ``idle_only`` says that all harmful resets were idle resets.
    """

    verdict: str
    verdicts: dict[str, int]
    idle_only: bool
    resets: int
    harmful: int
    unknown: int
    connections: int
    connections_seen: int
    connections_unknown: int
    lost_us: float
    predicted_us: float
    busy_us: float


def resets(priced: pd.DataFrame) -> pd.DataFrame:
    """Return ``priced``, which has ``cost.COLUMNS`` and ``recovery.FOLLOWED``, with ``COLUMNS``."""
    cost = priced["cost_us"]
    # What was measured until the capture ended is a lower bound.
    known = cost.notna() & ((priced["outcome"] != "capture_end") | (cost >= FLOOR_US))
    lost = priced["reason"].isin(LOSSES)
    burst, fits = priced["burst_bytes"], priced["cwnd_after"] * priced["mss"].astype("float64")
    held = priced[list(_HELD)].rename(columns=_HELD)
    most = held.max(axis=1)
    waited_otherwise = pd.Series(held.columns.to_numpy()[held.fillna(0).to_numpy().argmax(axis=1)], index=priced.index)
    label = _first(
        [
            ("handshake", handshake(priced)),
            ("receiver_window", zero_window(priced)),
            ("loss", lost),
            ("harmful", known & (cost >= FLOOR_US)),
            # What waited after a loss isn't in the cost, so a small cost says nothing then.
            ("loss", known & (priced["after_loss_us"] >= FLOOR_US)),
            ("slight", known & (cost > 0)),
            ("receiver_window", known & (reopened(priced) | window_full(priced))),
            ("as_before", known & (priced["waiting_bytes"] > 0)),
            *((name, known & (most >= FLOOR_US) & (waited_otherwise == name)) for name in _HELD.values()),
            ("nothing_waited", known),
            ("nothing_sent", burst == 0),
            ("burst_fits", burst <= fits),
        ],
        "unknown",
    )
    # A loss has no cost of its own here. Nothing can have waited where all that was sent fits into the window.
    none = lost | np.isin(label, ("loss", "nothing_sent", "burst_fits"))
    return priced.assign(
        verdict=pd.Series(label, index=priced.index, dtype="str"), lost_us=cost.where(known).mask(none, 0.0)
    )[[*priced.columns, *COLUMNS]]


_HELD: Final = {
    "rwnd_limited_us": "receiver_window",
    "sndbuf_limited_us": "send_buffer",
    "other_us": "paced",
    "after_loss_us": "loss",
}
"""What else may have held data back, and the verdict where that was the most."""


def _first(rules: list[tuple[str, pd.Series]], otherwise: str) -> npt.NDArray[np.str_]:
    """Return, for each row, the label of the first rule whose condition holds."""
    return np.select(
        [condition.to_numpy(dtype=bool) for _, condition in rules], [label for label, _ in rules], otherwise
    )


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
    counts = ("retrans_segments", "resets_harmful", "resets_unknown")
    zeros = dict.fromkeys((*counts, "bursts", "sent_bytes", "lost_us", "predicted_us"), 0)
    out = out.fillna(zeros).astype(dict.fromkeys(counts, "int64"))
    out["busy_us"] = out[["busy_us", "followed_us"]].max(axis=1)
    out["rtt_us"] = out["round_us"].fillna(out["srtt_us"])
    out["sent_bytes"] = out[["sent_bytes", "burst_bytes"]].max(axis=1).astype("int64")
    out["bursts"] = (out["bursts"] + out["resets_idle"]).astype("int64")
    out["after_reset_share"] = out["resets_idle"] / out["bursts"].where(out["bursts"] > 0)
    out["verdict"] = _judge(out, about, whole=whole)
    own = np.where(out["verdict"] == "unknown", out["resets_unknown"], out["resets_harmful"])
    out["verdict_resets"] = out["common_count"].where(out["verdict"] == out["common"], own).fillna(0).astype("int64")
    out = out.sort_values("lost_us", ascending=False, kind="stable")
    return out.reset_index(drop=True)[[*summary.columns, *CONNECTION_COLUMNS]]


def _watched(judged: pd.DataFrame, snapshots: pd.DataFrame) -> pd.DataFrame:
    """Return totals for each connection while it was watched.

    That is from its first snapshot on, or all its life if it appeared later than the first snapshots.
    """
    clocks = ("busy_us", "rwnd_limited_us", "sndbuf_limited_us")
    totals = watched(snapshots, ("bytes_sent", "total_retrans", *clocks))
    kinds = {"ts_ns": "int64", "bytes_sent": "int64"}
    rows = snapshots[["connection", *kinds]].astype(kinds).sort_values("ts_ns", kind="stable", ignore_index=True)
    groups, old = rows.groupby("connection", sort=False), seen_from_the_start(rows)
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
    busy = totals["busy_us"]
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
    unknown, trips = judged["verdict"] == "unknown", judged[["ts_ns", "connection", "round_us"]]
    return pd.DataFrame(
        {
            "idle_per_rto_p50": groups.median(),
            "idle_per_rto_max": groups.max(),
            "round_us": trips.sort_values("ts_ns", kind="stable").groupby("connection")["round_us"].last(),
            "resets_harmful": (judged["verdict"] == "harmful").groupby(keys).sum(),
            "resets_unknown": unknown.groupby(keys).sum(),
            "lost_us": judged["lost_us"].groupby(keys).sum(),
            "predicted_us": judged["predicted_us"].where(unknown).groupby(keys).sum(),
            "followed_us": judged["busy_us"].groupby(keys).sum(min_count=1),
            "burst_bytes": judged["burst_bytes"].groupby(keys).sum(),
            "common": common.set_index("connection")["verdict"],
            "common_count": common.set_index("connection")["n"],
        }
    )


def _judge(rows: pd.DataFrame, about: Meta, *, whole: bool) -> pd.Series:
    off = [inode for inode, namespace in about.namespaces.items() if namespace.idle == 0]
    hidden = bool(about.probes) and not about.probes.get("idle")
    # A share of a busy time that isn't known can't be too small.
    much = ~(rows["lost_us"] < FLOOR_SHARE * rows["busy_us"])
    rules: list[tuple[str, pd.Series]] = [
        ("harmful", (rows["resets_harmful"] > 0) & much),
        ("unknown", rows["resets_unknown"] > 0),
        ("slight", rows["resets_harmful"] > 0),
        ("other_end", sender_elsewhere(rows)),
        ("common", rows["common"].notna()),
        ("exempt", rows["ca_name"].isin(tcp.EXEMPT)),
        ("sysctl_off", rows["netns_ino"].astype(str).isin(off)),
        ("unknown", pd.Series(not whole, index=rows.index)),
        ("unknown", may_receive(rows)),
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
    harmful, unknown = judged[judged["verdict"] == "harmful"], judged[judged["verdict"] == "unknown"]
    counts = (judged if len(judged) else rows)["verdict"].value_counts()
    verdicts = {str(label): int(number) for label, number in counts.items()}
    cant_tell = rows["verdict"].isin(CANT_TELL)
    # What holds for a few connections says nothing about a host most of whose connections it isn't known of.
    open_question = len(unknown) or 2 * int(cant_tell.sum()) > len(rows)
    common = next(iter(verdicts), "unknown")
    if (rows["verdict"] == "harmful").any():
        verdict = "harmful"
    elif open_question:
        verdict = "unknown"
    else:
        verdict = "slight" if len(harmful) else common
    return Totals(
        verdict=verdict,
        verdicts=verdicts,
        idle_only=bool((harmful["reason"].astype(str) == "idle").all()),
        resets=len(judged),
        harmful=len(harmful),
        unknown=len(unknown),
        connections=int(harmful["connection"].nunique()),
        connections_seen=len(rows),
        connections_unknown=int(cant_tell.sum()),
        lost_us=float(judged["lost_us"].sum()),
        predicted_us=float(unknown["predicted_us"].sum()),
        busy_us=float(rows["busy_us"].sum(min_count=1)),
    )
