# SPDX-License-Identifier: Apache-2.0
"""Falls of the window that the peer's window or a handshake explains, and not what their reason says.

Each function takes resets, as a frame or as one row by name, and returns a boolean column or a boolean. What a capture
of an older version didn't record is missing there, and then the answer is false, but as ``reopened`` says. The tracer
uses this for its lines, so nothing here imports pandas.
"""

from __future__ import annotations

from typing import Any


def reopened(resets: Any) -> Any:
    """Return true for idle resets before which data waited for the peer's closed window.

    Nothing was in flight, and data was queued. A closed window leaves that; TCP_CORK and MSG_MORE do too, for up to
    200 ms or an RTO, but only with less than a segment. So a process's write with less queued than that, which fits
    into the peer's window, doesn't count, and an ACK that comes while data is corked is taken for one that opened the
    window. In captures of older versions only resets by ACKs count, because ``unsent_bytes`` of probe tcp_probe was the
    new data then.
    """
    unsent, by_ack = resets["unsent_bytes"], resets["tgid"] == 0
    not_corked = (unsent >= resets["mss"]) | (resets["snd_wnd"] < unsent)
    return (resets["reason"] == "idle") & (unsent > 0) & (by_ack | (_recorded(resets) & not_corked))


def window_full(resets: Any) -> Any:
    """Return true for application-limited resets at which the peer's window had no room for the next segment."""
    room = resets["snd_wnd"] - resets["unacked_bytes"]
    return (resets["reason"] == "app_limited") & (resets["unsent_bytes"] > 0) & (room < resets["mss"])


def zero_window(resets: Any) -> Any:
    """Return true for timeouts with a closed window: retransmissions are probes of the window then, and no loss."""
    connected = (resets["tcp_state"] != "syn_sent") & (resets["tcp_state"] != "syn_recv")
    return (resets["reason"] == "rto_loss") & _recorded(resets) & (resets["snd_wnd"] == 0) & connected


def handshake(resets: Any) -> Any:
    """Return true for timeouts of a SYN or a SYN-ACK."""
    shaking = (resets["tcp_state"] == "syn_sent") | (resets["tcp_state"] == "syn_recv")
    return (resets["reason"] == "rto_loss") & shaking


def reason(row: dict[str, Any]) -> str:
    """Return the reason of a reset for people, or what explains it better."""
    if handshake(row):
        return "lost SYN"
    return "peer window" if reopened(row) or window_full(row) or zero_window(row) else str(row["reason"])


def _recorded(resets: Any) -> Any:
    # Older versions recorded neither this nor tcp_state.
    return resets["unacked_bytes"] >= 0
