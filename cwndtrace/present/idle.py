# SPDX-License-Identifier: Apache-2.0
"""The causes of idle time in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cwndtrace import format as fmt
from cwndtrace.format import clean

LABELS: Final = {
    "peer": "Idle because of the peer",
    "disk": "Idle because of the disk",
    "probably disk": "Idle probably because of the disk (inferred)",
    "application": "Idle because of the application",
    "peer or application": "Idle because of the peer or the application (can't tell)",
    "disk or application": "Idle because of the disk or the application (can't tell)",
    "unknown": "Idle, cause unknown",
}
"""The causes of ``analysis.idle_cause.CAUSES``, to begin a line with."""

_WHOSE: Final = {
    "thread": "{comm}",
    "process": "the process of {comm}",
    "cgroup": "the cgroup of {comm}",
    "journal": "{comm} and the file system's journal",
}


def because(row: Mapping[str, Any]) -> str:
    """Return why a connection was idle before a reset, a row of ``Trace.verdicts``, to follow its verdict."""
    disk = _disk(row)
    words = {
        "peer": f"the connection waited {fmt.span(row['peer_us'])} for its peer",
        "disk": disk,
        "probably disk": f"{disk}, until shortly before the send, so it was probably waited for (inferred)",
        "application": f"{fmt.span(row['application_us'])} of the idle time was the application's own",
        "peer or application": "what came in meanwhile may have been requests, or chatter that needs no answer, "
        f"so {fmt.span(row['unclear_us'])} of the idle time may be the peer's or the application's",
        "disk or application": f"{disk}; whether {clean(row['comm'])} waited for it isn't known",
        "unknown": "block I/O wasn't recorded in all of the idle time, so a disk may have been the cause",
    }
    return f"; {words[row['cause']]}" if row["cause"] else ""


def _disk(row: Mapping[str, Any]) -> str:
    whose = _WHOSE.get(row["disk_of"], "{comm}").replace("{comm}", clean(row["comm"]))
    idle_us = row["peer_us"] + row["unclear_us"] + row["disk_us"] + row["application_us"]
    share = f"{row['disk_us'] / idle_us:.0%}".replace("%", " %") if idle_us else "none"
    return (
        f"block I/O of {whose} ({fmt.plural(row['disk_requests'], 'request')}) was in flight on "
        f"{clean(row['disk_device'])} for {fmt.span(row['disk_us'])} ({share}) of the idle time"
    )
