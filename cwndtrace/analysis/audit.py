# SPDX-License-Identifier: Apache-2.0
"""The network namespaces of a capture, with their settings and the connections that these affect."""

from __future__ import annotations

from typing import Final

import pandas as pd

from cwndtrace import tcp
from cwndtrace.store.meta import Meta, NamespaceSettings

COLUMNS: Final = {
    "netns_ino": "inode of the network namespace",
    "name": "its name in ip netns, this for the one that cwndtrace ran in, or a process in it",
    "host": "whether it is the namespace of process 1",
    "slow_start_after_idle": "when the capture began, 1 if idle resets were on, 0 if off; missing where it couldn't be "
    "read, or where the namespace is younger",
    "slow_start_after_idle_end": "the same when the capture ended; missing also where the capture doesn't say",
    "congestion_control": "default for new connections, when the capture ended if that is known, else when it began; "
    "empty where it couldn't be read",
    "live": "connections in the namespace's last snapshot",
    "touched": "of these, those that slow_start_after_idle affects: their congestion control isn't exempt",
    "resets": "idle resets recorded in it",
    "lost_us": "cost of its harmful resets, us",
}
"""The columns of ``namespaces``."""

_UNKNOWN: Final = NamespaceSettings("", False, None, None)


def namespaces(judged: pd.DataFrame, snapshots: pd.DataFrame, about: Meta) -> pd.DataFrame:
    """Return one row per network namespace: its settings and the connections that they affect.

    The columns are ``COLUMNS``. A namespace whose settings nobody read has a row if a snapshot or a reset was in it.
    """
    spaces = about.namespaces
    last = snapshots[snapshots["ts_ns"] == snapshots.groupby("netns_ino")["ts_ns"].transform("max")]
    live = last.groupby("netns_ino").size()
    free = last[last["ca_name"].astype(str).isin(tcp.EXEMPT)].groupby("netns_ino").size()
    idle = judged[judged["reason"].astype(str) == "idle"].groupby("netns_ino").size()
    lost = judged.groupby("netns_ino")["lost_us"].sum()
    seen = {str(inode) for inode in (*live.index, *lost.index)}
    rows = []
    for inode in [*spaces, *sorted(seen - spaces.keys())]:
        number = int(inode) if inode.isdigit() else 0
        space = spaces.get(inode, _UNKNOWN)
        rows.append(
            {
                "netns_ino": number,
                "name": space.name,
                "host": space.host,
                "slow_start_after_idle": space.idle_start if space.idle_start in (0, 1) else None,
                "slow_start_after_idle_end": space.idle_end if space.idle_end in (0, 1) else None,
                "congestion_control": space.congestion_control_end or space.congestion_control or "",
                "live": int(live.get(number, 0)),
                "touched": int(live.get(number, 0)) - int(free.get(number, 0)),
                "resets": int(idle.get(number, 0)),
                "lost_us": float(lost.get(number, 0.0)),
            }
        )
    kinds = {"slow_start_after_idle": "Int64", "slow_start_after_idle_end": "Int64", "host": "bool"}
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(kinds)
