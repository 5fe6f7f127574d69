# SPDX-License-Identifier: Apache-2.0
"""Verdicts: whether a reset mattered, and if not, why not; for each reset, each connection and the whole host.

A reset is harmful if it cost its burst at least one round trip. Any other reset is harmless for a reason that the
records show. How long the receiver's window and the send buffer held a connection back comes from the kernel's own
clocks in the snapshots (tcp_chrono_*() in net/ipv4/tcp_output.c).
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace import format as fmt
from cwndtrace import tcp
from cwndtrace.analysis.idle_cause import reopened
from cwndtrace.format import plural, size, span, threshold
from cwndtrace.store.meta import Meta

LABELS: Final = {
    "harmful": "harmful: cost at least one round trip",
    "burst_fits": "harmless: the burst fits into the window after the reset",
    "same_rounds": "harmless: the burst needs as many round trips from either window",
    "never_full": "harmless: the window was never used up after the reset",
    "receiver_window": "not the window: the receiver's window was the limit",
    "send_buffer": "not the window: the send buffer was the limit",
    "loss": "loss, not idle time",
    "nothing_sent": "harmless: nothing was sent",
    "unknown": "not enough data to say",
    "exempt": "its congestion control is exempt from idle resets",
    "sysctl_off": "idle resets are off in its network namespace",
    "no_reset": "its window was never reset",
}
"""The verdicts with their texts; those from ``exempt`` on apply to connections only."""

COLUMNS: Final = {
    "verdict": "one of LABELS",
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
    "verdict": "one of LABELS: harmful if any reset was, else the most frequent one of its resets",
    "why": "the evidence for the verdict, in words",
}
"""The columns that ``connections`` adds to ``analysis.connections.summary``."""

_MOST: Final = 0.5
"""The share above which something that held a connection back is taken for its limit."""
_UNCLEAR: Final = "It is unclear whether the congestion window is the cause"


@dataclass(frozen=True)
class Verdict:
    """A verdict: one of ``LABELS`` as ``verdict``, and its evidence as ``text``, for a terminal and Jupyter."""

    verdict: str
    text: str

    def __str__(self) -> str:
        return fmt.clean(f"{LABELS[self.verdict]}. {self.text}")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        colour = "#c04a00" if self.verdict == "harmful" else "#00805a"
        label, text = (html.escape(fmt.clean(part)) for part in (LABELS[self.verdict], self.text))
        return f"<div><b style='color:{colour}'>{label}</b><br><bdi>{text}</bdi></div>"


@dataclass(frozen=True, repr=False)
class Host(Verdict):
    """The cost of the resets of a whole capture. Costs are in us, estimated; ``busy_us`` is NaN where it is unknown."""

    resets: int
    harmful: int
    connections: int
    connections_seen: int
    lost_us: float
    busy_us: float

    def __str__(self) -> str:
        return fmt.clean(self.text)

    __repr__ = __str__


def resets(priced: pd.DataFrame, snapshots: pd.DataFrame) -> pd.DataFrame:
    """Return ``priced``, which has ``cost.COLUMNS``, with ``COLUMNS``; ``snapshots`` is a Trace's ``connections``."""
    out = priced.join(_limited(priced, snapshots))
    burst, mss = out["burst_bytes"], out["mss"].astype("float64")
    # A limit below both the window before the reset and the burst, which caused most of the round trips.
    narrow = out["limit_bytes"] < np.minimum(out["cwnd_before"].astype("float64") * mss, burst)
    narrow &= out["rounds_lost"] < _MOST * out["rounds_after"]
    buffer = out["limit_bytes"] < out["snd_wnd"]
    limits = {
        "rwnd": (out["rwnd_limited_share"] > _MOST) | (narrow & ~buffer),
        "sndbuf": (out["sndbuf_limited_share"] > _MOST) | (narrow & buffer),
    }
    closed = pd.Series(reopened(out), index=out.index)
    rules = {
        "loss": out["reason"].astype(str) == "rto_loss",
        "unknown": burst.isna() | (mss == 0) | (out["srtt_us"] == 0),
        "nothing_sent": burst == 0,
        "receiver_window": closed,
        "burst_fits": burst <= out["cwnd_after"] * mss,
        "send_buffer": limits["sndbuf"],
        " receiver_window": limits["rwnd"],
        "harmful": out["rounds_lost"] >= 1,
        "never_full": out["grew_rounds"] == 0,
    }
    label = np.select([rule.to_numpy(dtype=bool) for rule in rules.values()], [n.strip() for n in rules], "same_rounds")
    return out.assign(
        verdict=pd.Series(label, index=out.index, dtype="str"),
        lost_us=out["predicted_us"].where(label == "harmful", 0.0),
    )[[*priced.columns, *COLUMNS]]


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
    out["why"] = pd.Series([explain_connection(row) for row in out.to_dict("records")], index=out.index, dtype="str")
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
    # The first condition that holds gives the verdict.
    rules: list[tuple[str, Any]] = [
        ("harmful", rows["resets_harmful"] > 0),
        ("common", rows["common"].notna()),
        ("exempt", rows["ca_name"].isin(tcp.EXEMPT)),
        ("sysctl_off", rows["netns_ino"].astype(str).isin(off)),
        ("unknown", pd.Series(not whole, index=rows.index)),
        ("nothing_sent", (rows["sent_bytes"] == 0) & (rows["snapshots"] > 1)),
        ("send_buffer", rows["sndbuf_limited_share"] > _MOST),
        ("receiver_window", rows["rwnd_limited_share"] > _MOST),
        ("loss", rows["retrans_segments"] > 0),
        ("unknown", pd.Series(hidden, index=rows.index) | ((rows["snapshots"] < 2) & (rows["sent_bytes"] == 0))),
    ]
    conditions = [condition.to_numpy(dtype=bool) for _, condition in rules]
    label = np.select(conditions, [name for name, _ in rules], "no_reset")
    return pd.Series(np.where(label == "common", rows["common"], label), index=rows.index, dtype="str")


def explain(row: Mapping[Any, Any]) -> str:
    """Return the evidence for the verdict of one reset, a row of ``resets``, in words."""
    cwnd = f"{row['cwnd_before']} -> {row['cwnd_after']} {'segment' if row['cwnd_after'] == 1 else 'segments'}"
    if row["reason"] == "idle":
        cwnd += f" after {span(row['idle_us'])} of idle time (RTO {span(row['rto_us'])})"
    burst = size(row["burst_bytes"]) if row["burst_bytes"] == row["burst_bytes"] else "an unknown number of bytes"
    fits = size(row["cwnd_after"] * row["mss"])
    reasons: dict[str, str] = {
        "harmful": f"the burst of {burst} needs about {_trips(row['rounds_lost'])} more, "
        f"{span(row['lost_us'])} in all at {span(row['round_us'])} each (estimated)",
        "burst_fits": f"the burst of {burst} fits into the window after the reset ({fits})",
        "same_rounds": f"the burst of {burst} needs {_trips(row['rounds_after'])} from either window",
        "never_full": f"the burst of {burst} came in pieces that never used up the window, which didn't grow",
        "receiver_window": _narrow(row, burst),
        "send_buffer": f"the send buffer of {size(row['limit_bytes'])} is smaller than the window was, and the burst "
        f"is {burst}; at most {_share_of_rounds(row)}",
        "loss": "a retransmission timeout caused the reset, not idle time; ssthresh was "
        f"{threshold(row['ssthresh_after'])} segments after it",
        "nothing_sent": "no data was sent between the reset and the connection's next record",
        "unknown": "no later record says how much was sent, or no round-trip time was ever measured",
    }
    return f"{cwnd}: {reasons[row['verdict']]}"


def _narrow(row: Mapping[Any, Any], burst: str) -> str:
    if row["tgid"] == 0 and row["unsent_bytes"] > 0:
        return f"the peer's window was closed, and {size(row['unsent_bytes'])} waited for it to open"
    if row["rwnd_limited_share"] > _MOST:
        return (
            f"the peer's window held the sender back for {_percent(row['rwnd_limited_share'])} of its busy time; "
            f"at most {_share_of_rounds(row)}"
        )
    return (
        f"the peer offered a window of {size(row['snd_wnd'])}, less than the congestion window was, for a burst of "
        f"{burst}; {_share_of_rounds(row)}"
    )


def _trips(number: float) -> str:
    return plural(round(number), "round trip") if number == number else "an unknown number of round trips"


def _share_of_rounds(row: Mapping[Any, Any]) -> str:
    return f"{row['rounds_lost']:.0f} of {row['rounds_after']:.0f} round trips are due to the reset"


def explain_connection(row: Mapping[Any, Any]) -> str:
    """Return the evidence for the verdict of one connection, a row of ``connections``, in words."""
    number = plural(row["resets"], "reset")
    label = row["verdict"]
    if label == "harmful":
        many = f"{row['resets_harmful']} of {number} cost their bursts {span(row['lost_us'])} in all (estimated)"
        cost = many if row["resets"] > 1 else f"its reset cost its burst {span(row['lost_us'])} (estimated)"
        # Snapshots may have missed some of the bursts, so that the busy time is too short to give a share of.
        whole = row["busy_us"] >= row["lost_us"]
        return cost + (f", {_percent(row['lost_us'] / row['busy_us'])} of the connection's busy time" if whole else "")
    if row["resets"]:
        return LABELS[label] + (f" ({row['common_count']:.0f} of {number})" if row["resets"] > 1 else "")
    reasons = {
        "exempt": f"{row['ca_name']} never resets its window after idle time",
        "sysctl_off": f"{tcp.IDLE_SYSCTL} was 0 in namespace {row['netns_ino']} when the capture began",
        "nothing_sent": f"no data was sent in the {row['seen_s']:.0f} s that it was watched",
        "send_buffer": f"no reset; the send buffer held it back for {_percent(row['sndbuf_limited_share'])} of "
        f"its {span(row['busy_us'])} of busy time",
        "receiver_window": f"no reset; the peer's window held it back for {_percent(row['rwnd_limited_share'])} of "
        f"its {span(row['busy_us'])} of busy time",
        "loss": f"no reset, but {plural(row['retrans_segments'], 'retransmitted segment')}",
        "unknown": "only one snapshot shows it, no probe could see idle resets, or some of its records are missing",
    }
    return reasons.get(label, f"no reset while it sent {size(row['sent_bytes'])}")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


def _not_the_window(labels: pd.Series, what: str) -> tuple[str, str]:
    """Return the most frequent of the labels, and a sentence that names all of them."""
    common = labels.value_counts()
    verdict = str(common.index[0])
    claim = _UNCLEAR if verdict == "unknown" else "The congestion window is not the cause"
    reasons = ", ".join(f'{plural(n, "time")} "{LABELS[str(label)]}"' for label, n in common.items())
    return verdict, f"{claim}: {what} ({reasons})."


def host(rows: pd.DataFrame, judged: pd.DataFrame, lacking: str = "") -> Host:
    """Return the verdict on a whole capture: ``rows`` are those of ``connections``, ``judged`` those of ``resets``.

    ``lacking`` names the records that the trace kept and the capture doesn't have. If there are any, the records that
    are there allow no verdict on the whole.
    """
    harmful = judged[judged["verdict"] == "harmful"]
    touched = int(harmful["connection"].nunique())
    lost, busy = float(harmful["lost_us"].sum()), float(rows["busy_us"].sum(min_count=1))
    if len(harmful):
        idle = harmful["reason"].astype(str) == "idle"
        what = "Idle resets" if idle.all() else "Window resets"
        text = (
            f"{what} cost {span(lost)} (estimated) over {plural(len(harmful), 'burst')} on {touched} of "
            f"{plural(len(rows), 'connection')}"
        )
        text += f", {_percent(lost / busy)} of the {span(busy)} of busy time." if busy >= lost else "."
        verdict = "harmful"
    elif len(judged):
        what = f"{plural(len(judged), 'reset')}, none known to have cost a round trip"
        verdict, text = _not_the_window(judged["verdict"], what)
    elif len(rows):
        verdict, text = _not_the_window(rows["verdict"], f"no reset on {plural(len(rows), 'connection')}")
    else:
        verdict, text = "unknown", "No TCP connection was seen."
    if lacking:
        known = f" By the records that are there, {text[0].lower()}{text[1:]}" if len(harmful) else ""
        verdict, text = "unknown", f"{_UNCLEAR}, because {lacking}.{known}"
    return Host(verdict, text, len(judged), len(harmful), touched, len(rows), lost, busy)
