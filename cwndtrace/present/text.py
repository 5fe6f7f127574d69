# SPDX-License-Identifier: Apache-2.0
"""Verdicts and their evidence in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cwndtrace import format as fmt
from cwndtrace import tcp
from cwndtrace.analysis import peer_window
from cwndtrace.analysis.verdict import CANT_TELL, FLOOR_SHARE, Totals
from cwndtrace.format import plural, size, span, threshold
from cwndtrace.present import html
from cwndtrace.store.meta import Meta

LABELS: Final = {
    "harmful": "harmful: its burst was late",
    "slight": "harmless: late by too little to matter",
    "nothing_waited": "harmless: nothing that was sent waited",
    "as_before": "harmless: the window before would have been as slow",
    "burst_fits": "harmless: the burst fits into the window after the reset",
    "receiver_window": "not the reset: the receiver's window was the limit",
    "send_buffer": "not the reset: the send buffer was the limit",
    "paced": "not the reset: pacing, Nagle or small queues held the data back",
    "loss": "loss, not idle time",
    "handshake": "a lost SYN, not idle time",
    "nothing_sent": "harmless: nothing was sent",
    "unknown": "can't tell",
    "other_end": "can't tell: its sender is the other end",
    "exempt": "its congestion control is exempt from idle resets",
    "sysctl_off": "idle resets are off in its network namespace",
    "no_reset": "its window was never reset",
}
"""The verdicts with their texts; those from ``other_end`` on apply to connections only."""

_BRIEF: Final = {
    "other_end": "sent by the other end",
    "exempt": "exempt",
    "sysctl_off": "resets are off",
    "no_reset": "never reset",
}
"""Short labels for a table that is too narrow for ``LABELS``. Any other label is cut at its colon."""

OPEN: Final = "Can't tell whether window resets delayed anything"
"""The beginning of an answer that isn't one."""


def brief(verdict: str) -> str:
    """Return the short label of a verdict."""
    return _BRIEF.get(verdict, LABELS[verdict].partition(":")[0])


@dataclass(frozen=True)
class Verdict:
    """A verdict: one of ``LABELS`` as ``verdict``, and its evidence as ``text``, for a terminal and Jupyter."""

    verdict: str
    text: str

    def __str__(self) -> str:
        return fmt.clean(f"{LABELS[self.verdict]}. {self.text}")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        known = self.verdict not in CANT_TELL
        return html.verdict(LABELS[self.verdict], self.text, harmful=self.verdict == "harmful", known=known)


@dataclass(frozen=True, repr=False)
class Host(Verdict):
    """The cost of the resets of a whole capture, in us.

    ``lost_us`` is measured; ``predicted_us`` is estimated, for the ``unknown`` resets, whose cost wasn't measured.
    ``busy_us`` is NaN where it is unknown.
    """

    resets: int
    harmful: int
    unknown: int
    connections: int
    connections_seen: int
    lost_us: float
    predicted_us: float
    busy_us: float

    def __str__(self) -> str:
        return fmt.clean(self.text)

    __repr__ = __str__


# ---- resets and connections --------------------------------------------------------------------------


def reset(row: Mapping[Any, Any]) -> str:
    """Return the evidence for the verdict of one reset, a row of ``resets``, in words."""
    cwnd = f"{row['cwnd_before']} -> {row['cwnd_after']} {'segment' if row['cwnd_after'] == 1 else 'segments'}"
    if row["reason"] == "idle":
        cwnd += f" after {span(row['idle_us'])} of idle time (RTO {span(row['rto_us'])})"
    if row["chain_resets"] > 1:
        cwnd += f", reset {row['chain_resets']:.0f} of a chain from {plural(int(row['chain_window']), 'segment')}"
    burst = size(row["burst_bytes"]) if row["burst_bytes"] == row["burst_bytes"] else "an unknown number of bytes"
    least = "at least " if row["outcome"] == "capture_end" else ""
    reasons: dict[str, Callable[[], str]] = {
        "harmful": lambda: (
            f"the window made what was sent late by {least}{span(row['lost_us'])} (measured), "
            f"{_trips(row)}; up to {size(row['waiting_bytes'])} waited for it"
        ),
        "slight": lambda: f"the window made what was sent late by {span(row['lost_us'])} (measured)",
        "nothing_waited": lambda: f"{_acked(row)} in {_bursts(row)}, and nothing of it waited",
        "as_before": lambda: (
            f"up to {size(row['waiting_bytes'])} waited for the window, as long as for "
            f"{plural(int(row['chain_window']), 'segment')}"
        ),
        "burst_fits": lambda: (
            f"all that was sent until the next record ({burst}) fits into the window after the reset "
            f"({size(row['cwnd_after'] * row['mss'])})"
        ),
        "receiver_window": lambda: _receiver_window(row),
        "send_buffer": lambda: _held(row, "the send buffer", "sndbuf_limited_us"),
        "paced": lambda: _held(row, "pacing, Nagle's algorithm or a small queue", "other_us"),
        "loss": lambda: _loss(row),
        "handshake": lambda: (
            f"the SYN or SYN-ACK was sent again after {span(row['rto_us'])}; the connection then begins with its "
            "initial window, or with 1 segment after more than one such timeout"
        ),
        "nothing_sent": lambda: "no data was sent between the reset and the connection's next record",
        "unknown": lambda: _unknown(row, burst),
    }
    return f"{cwnd}: {reasons[row['verdict']]()}"


def _trips(row: Mapping[Any, Any]) -> str:
    if not row["round_us"] > 0:
        return "with no round-trip time known"
    trips = row["lost_us"] / row["round_us"]
    return f"{trips:.1f} {'round trip' if trips == 1 else 'round trips'} of {span(row['round_us'])}"


def _acked(row: Mapping[Any, Any]) -> str:
    return f"{size(row['acked_bytes'])} {'was' if row['acked_bytes'] == 1 else 'were'} acknowledged"


def _bursts(row: Mapping[Any, Any]) -> str:
    return plural(int(row["bursts"]), "burst") if row["bursts"] == row["bursts"] else "an unknown number of bursts"


def _held(row: Mapping[Any, Any], what: str, times: str) -> str:
    return (
        f"nothing waited for the congestion window; {what} held data back for {span(row[times])} of "
        f"{span(row['busy_us'])} of busy time (measured)"
    )


def _loss(row: Mapping[Any, Any]) -> str:
    causes = {"rto_loss": "a retransmission timeout", "tlp_loss": "a loss that a tail loss probe repaired"}
    if row["reason"] not in causes:
        return _held(row, "a loss", "after_loss_us")
    return (
        f"{causes[row['reason']]} caused the reset, not idle time; ssthresh was "
        f"{threshold(row['ssthresh_after'])} segments after it"
    )


def _receiver_window(row: Mapping[Any, Any]) -> str:
    if peer_window.reopened(row):
        return f"the peer's window was closed, and {size(row['unsent_bytes'])} waited for it to open"
    if peer_window.zero_window(row):
        return (
            f"the peer closed its window while {size(row['unacked_bytes'])} were unacknowledged, and the timeout was a "
            "probe of that window; nothing need have been lost"
        )
    if peer_window.window_full(row):
        return f"the peer's window was full, and {size(row['unsent_bytes'])} waited for room in it"
    return _held(row, "the peer's window", "rwnd_limited_us")


def _unknown(row: Mapping[Any, Any], burst: str) -> str:
    """Return why the cost of a reset isn't known, and the estimate where there is one."""
    if row["outcome"] == "capture_end":
        why = "the capture ended before all that was sent had been acknowledged"
    elif not row["outcome"]:
        why = "its window wasn't followed, or the record of that was lost"
    else:
        why = "an older version recorded it, which didn't measure what waited"
    if not row["predicted_us"] >= 0:
        return f"{why}, and {burst} followed"
    return (
        f"{why}. If the {burst} that followed were one burst, and nothing else held it back, it was late by about "
        f"{span(row['predicted_us'])} (estimated)"
    )


def chain(row: Mapping[Any, Any]) -> str:
    """Return a row of ``analysis.recovery.chains`` in words."""
    late = f"what was sent was late by {span(row['lost_us'])} (measured)" if row["lost_us"] else "nothing was late"
    return (
        f"{plural(row['resets'], 'reset')} in a row on {fmt.connection(row)}, {row['window_segments']:.0f} -> "
        f"{plural(row['least_segments'], 'segment')}, by sends {span(row['every_us'])} apart at the median; {late}"
    )


def connection(row: Mapping[Any, Any]) -> str:
    """Return the evidence for the verdict of one connection, a row of ``connections``, in words."""
    number = plural(row["resets"], "reset")
    label = row["verdict"]
    if label in ("harmful", "slight") and row["resets_harmful"]:
        which = "its reset" if row["resets"] == 1 else f"{row['resets_harmful']} of {number}"
        # Snapshots may have missed some of the bursts, so that the busy time is too short to give a share of.
        whole = row["busy_us"] >= row["lost_us"]
        share = f", {percent(row['lost_us'] / row['busy_us'])} of the connection's busy time" if whole else ""
        return f"{which} made what was sent late, by {span(row['lost_us'])} in all (measured){share}"
    if label == "unknown" and row["resets_unknown"]:
        which = "its reset" if row["resets"] == 1 else f"{row['resets_unknown']} of {number}"
        return f"the cost of {which} wasn't measured; about {span(row['predicted_us'])} (estimated)"
    if label == "other_end":
        return "it mostly receives: the window that delays what it waits for is kept at the other end"
    if row["resets"]:
        return LABELS[label] + (f" ({row['verdict_resets']} of {number})" if row["resets"] > 1 else "")
    reasons = {
        "exempt": f"{row['ca_name']} never resets its window after idle time",
        "sysctl_off": f"{tcp.IDLE_SYSCTL} was 0 in namespace {row['netns_ino']} when the capture began",
        "nothing_sent": f"no data was sent in the {row['seen_s']:.0f} s that it was watched",
        "send_buffer": f"no reset; the send buffer held it back for {percent(row['sndbuf_limited_share'])} of "
        f"its {span(row['busy_us'])} of busy time",
        "receiver_window": f"no reset; the peer's window held it back for {percent(row['rwnd_limited_share'])} of "
        f"its {span(row['busy_us'])} of busy time",
        "loss": f"no reset, but {plural(row['retrans_segments'], 'retransmitted segment')}",
        "unknown": "only one snapshot shows it, no probe could see idle resets, some of its records are missing, or it "
        "sent little and nothing says how much it received",
    }
    return reasons.get(label, f"no reset while it sent {size(row['sent_bytes'])}")


def window(about: Meta) -> str:
    """Return since when a capture is complete, where that isn't the whole trace; empty where it is."""
    if about.kept_from is None:
        return f"the capture is a dump of {about.dumped}" if about.dumped else ""
    since = about.utc_ns(about.kept_from)
    clock = f"{about.kept_from / 1e9:,.1f} s of CLOCK_MONOTONIC" if since is None else fmt.moment(since)
    return f"The capture holds a window of the trace, from {clock} on; older records were deleted"


def percent(share: float) -> str:
    """Return a share as text, with two digits where it is small."""
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


# ---- the whole capture -------------------------------------------------------------------------------


def cost(row: Mapping[Any, Any]) -> str:
    """Return the cost of a connection's resets for a table: measured, a lower bound (>), or unknown."""
    if not row["resets_unknown"]:
        return span(row["lost_us"])
    return f">{span(row['lost_us'])}" if row["lost_us"] else "unknown"


def _counted(verdicts: Mapping[str, int]) -> str:
    return ", ".join(f'{plural(n, "time")} "{LABELS[label]}"' for label, n in verdicts.items())


def host(totals: Totals, lacking: str = "", hidden: str = "") -> Host:
    """Return the verdict on a whole capture.

    ``lacking`` names the records that the trace kept and the capture doesn't have. If there are any, the records that
    are there allow no verdict on the whole. ``hidden`` says which resets the trace itself may not have seen. Then it
    can't be told that no reset delayed anything.
    """
    verdict = totals.verdict
    what = "Idle resets" if totals.idle_only else "Window resets"
    number = plural(totals.connections_seen, "connection")
    if not totals.connections_seen:
        verdict, text = "unknown", "No TCP connection was seen."
    elif verdict in ("harmful", "slight") and totals.harmful:
        text = (
            f"{what} made {plural(totals.harmful, 'burst')} late on {totals.connections} of {number}, by "
            f"{span(totals.lost_us)} in all (measured){of_busy(totals.lost_us, totals.busy_us)}."
        )
        if verdict == "slight":
            text += f" That is too little to matter: less than {FLOOR_SHARE:.0%} of each connection's busy time."
        if totals.unknown:
            text += f" The cost of {plural(totals.unknown, 'more reset')} isn't known."
    elif verdict == "unknown":
        text = f"{OPEN}, because {_open_question(totals)}."
    elif totals.resets:
        text = (
            f"No reset delayed anything: {plural(totals.resets, 'reset')}, each followed to its end or too small to "
            f"matter ({_counted(totals.verdicts)})."
        )
    else:
        text = f"No window was reset on {number} ({_counted(totals.verdicts)})."
    seen = f"{text[0].lower()}{text[1:]}"
    if lacking:
        there = f" By the records that are there, {seen}" if totals.harmful else ""
        verdict, text = "unknown", f"{OPEN}, because {lacking}.{there}"
    elif hidden and totals.connections_seen and verdict not in ("harmful", "unknown"):
        verdict, text = "unknown", f"{OPEN}, because {hidden}. Of those that were seen, {seen}"
    numbers = (totals.resets, totals.harmful, totals.unknown, totals.connections, totals.connections_seen)
    return Host(verdict, text, *numbers, totals.lost_us, totals.predicted_us, totals.busy_us)


def of_busy(lost_us: float, busy_us: float) -> str:
    """Return which share of the busy time a cost is, to follow it; empty where the busy time isn't known in full."""
    if not busy_us >= lost_us:
        return ""
    return f", {percent(lost_us / busy_us)} of the {span(busy_us)} of busy time"


def _open_question(totals: Totals) -> str:
    if totals.unknown:
        text = f"the cost of {totals.unknown} of {plural(totals.resets, 'reset')} wasn't measured"
        estimate = f" (about {span(totals.predicted_us)}, estimated)" if totals.predicted_us > 0 else ""
        known = f"; {span(totals.lost_us)} were measured for the others" if totals.lost_us > 0 else ""
        return text + estimate + known
    return (
        f"it can't be told for {totals.connections_unknown} of {plural(totals.connections_seen, 'connection')} "
        f"({_counted(totals.verdicts)})"
    )
