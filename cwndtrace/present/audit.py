# SPDX-License-Identifier: Apache-2.0
"""Network namespaces in words: what is unlike the host's, and what has changed."""

from __future__ import annotations

import pandas as pd

from cwndtrace import tcp
from cwndtrace.present import remedies
from cwndtrace.store.meta import Meta, NamespaceSettings


def namespaces(rows: pd.DataFrame, about: Meta) -> pd.DataFrame:
    """Return the rows of ``analysis.audit.namespaces`` with ``note``: changes, and settings unlike the host's."""
    host = remedies.host(about)
    return rows.assign(note=[_note(about.namespaces.get(str(inode)), host) for inode in rows["netns_ino"]])


def _note(space: NamespaceSettings | None, host: NamespaceSettings | None) -> str:
    if space is None:
        return ""
    notes = ["the namespace is younger than the trace"] if space.new else []
    if None not in (space.idle_start, space.idle_end) and space.idle_start != space.idle_end:
        notes.append(
            f"{tcp.IDLE_SYSCTL} was {space.idle_start} at the start of the capture and {space.idle_end} at its end"
        )
    if host is None:
        return "; ".join(notes)
    settings = {
        tcp.IDLE_SYSCTL: (space.idle_last, host.idle_last),
        tcp.CONTROL_SYSCTL: (_control(space), _control(host)),
    }
    notes += [
        f"{name} is {here} here but {there} on the host"
        for name, (here, there) in settings.items()
        if here is not None and there is not None and here != there
    ]
    return "; ".join(notes)


def _control(space: NamespaceSettings) -> str | None:
    return space.congestion_control_end or space.congestion_control
