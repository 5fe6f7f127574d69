# SPDX-License-Identifier: Apache-2.0
"""Fleets for tests: rows made by hand, and captures written as a trace writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from cwndtrace.fleet import tables
from cwndtrace.fleet.extract import extract
from cwndtrace.fleet.tables import Frames
from cwndtrace.records import arrow
from tests.unit import frames

SINCE = pd.Timestamp("2026-11-18T00:00:00Z")
BEFORE, AFTER = "2026-11-17", "2026-11-18"
_EMPTY: dict[str, Any] = {"text": "", "count": 0, "float": float("nan"), "UTC": None, "id": 0, "cookie": 0}


def _rows(table: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    empty = {name: _EMPTY.get(kind) for name, (kind, _) in tables.COLUMNS[table].items()}
    return tables.conform(table, pd.DataFrame([empty | row for row in rows], columns=list(empty)))


def capture(host: str = "web1", name: str = "a.cwnd", day: str = BEFORE, **values: Any) -> dict[str, Any]:
    """Return a row of ``captures``: one whole hour at noon of a day, by default the one before ``SINCE``."""
    started = pd.Timestamp(f"{day}T12:00:00Z")
    whole = {
        "host": host, "capture": name, "status": "ok", "state": "complete", "kernel": "6.12.0", "started": started,
        "ended": started + pd.Timedelta(hours=1), "seconds": 3600.0, "whole": True, "can_see_idle": True,
    }  # fmt: skip
    return whole | values


def connection(host: str = "web1", name: str = "a.cwnd", **values: Any) -> dict[str, Any]:
    """Return a row of ``connections``: one of nginx that was never reset, if ``values`` don't say more."""
    known = {
        "host": host, "capture": name, "kernel": "6.12.0", "connection": "1:5f", "netns_ino": 1, "workload":
        "nginx.service", "service": "nginx:443", "outgoing": False, "process": "nginx", "saddr": "10.1.0.1",
        "sport": 443, "daddr": "10.2.0.9", "dport": 51324, "ca_name": "cubic", "busy_us": 10_000_000.0,
        "lost_us": 0.0, "predicted_us": 0.0, "verdict": "no_reset", "sent_bytes": 1_000_000,
        "first_seen": pd.Timestamp(f"{BEFORE}T12:00:00Z"), "last_seen": pd.Timestamp(f"{BEFORE}T12:59:00Z"),
    }  # fmt: skip
    return known | values


def harmful(host: str = "web1", name: str = "a.cwnd", lost_us: float = 1e6, **values: Any) -> dict[str, Any]:
    """Return a row of ``connections`` whose only reset, after idle time, cost so much."""
    reset = {"resets": 1, "resets_idle": 1, "resets_harmful": 1, "lost_us": lost_us, "verdict": "harmful"}
    return connection(host, name, **(reset | values))


def setting(host: str = "web1", name: str = "a.cwnd", idle: int | None = 1, **values: Any) -> dict[str, Any]:
    """Return a row of ``settings`` of the connections' network namespace."""
    known = {"host": host, "capture": name, "netns_ino": 1, "slow_start_after_idle": idle, "lost_us": 0.0}
    return known | values


def fleet(
    captures: list[dict[str, Any]],
    connections: list[dict[str, Any]] | None = None,
    settings: list[dict[str, Any]] | None = None,
) -> Frames:
    """Return the tables of a fleet from rows."""
    made = {"captures": captures, "connections": connections or [], "settings": settings or []}
    return Frames(**{name: _rows(name, made.get(name, [])) for name in tables.COLUMNS})


def extracted(captures: dict[Path, tuple[str, str]]) -> Frames:
    """Return the tables of captures, by path: the name of the host, and what the capture is called."""
    parts = [extract(path, host, name).named() for path, (host, name) in captures.items()]
    return Frames(**{name: tables.combined(name, [part[name] for part in parts]) for name in tables.COLUMNS})


def written(folder: Path) -> Frames:
    """Write the captures of seven hosts before and after tcp_slow_start_after_idle was set to 0 on most of them.

    One is broken, one was cut short, and one host kept its setting.
    """
    names: dict[Path, tuple[str, str]] = {}
    for number in range(1, 8):
        for day in (BEFORE, AFTER):
            host, name = f"web{number}", f"host=web{number}/{day}.cwnd"
            path = folder / f"host=web{number}" / f"{day}.cwnd"
            path.parent.mkdir(exist_ok=True)
            _write(path, number, day, changed=day == AFTER and number != 7)
            names[path] = host, name
    (folder / "host=web3" / f"{BEFORE}.cwnd" / "meta.json").write_text("{")
    found = extracted(names)
    # The folder's name is another one each time.
    found.captures["reason"] = found.captures["reason"].str.replace(f"{folder}/", "", regex=False)
    return found


def _write(path: Path, number: int, day: str, *, changed: bool) -> None:
    resets, seen = frames.story(number, seconds=30, peers=2, ends=(f"10.1.0.{number}", f"10.2.{number % 2}.9"))
    rows = [row | {"listener": "nginx", "listener_pid": 4242} for row in seen.to_pylist()]
    connections = frames.snapshots(*rows)
    # The first two resets were before the setting was changed on that day.
    kept = resets.slice(0, 2) if changed else resets
    frames.capture(
        path, resets=kept, connections=connections, recoveries=frames.followed(resets, connections),
        workloads=frames.workloads({"kind": "unit", "unit": "nginx.service", "container_id": "", "container_name": ""}),
        processes=frames.processes({"comm": "nginx", "cgroup": "/system.slice/nginx.service"}),
        host=f"web{number}", started=f"{day}T12:00:00Z", ended=f"{day}T12:01:00Z",
        kernel="6.12.0" if number < 6 else "6.18.0",
        sysctls={
            str(frames.NETNS): {
                "name": "this", "host": True, "net.ipv4.tcp_slow_start_after_idle": 0 if changed else 1,
                "net.ipv4.tcp_congestion_control": "cubic",
            }
        },
        counts={each: {"kept": 0, "lost": 7 if number == 2 and each == "cwnd_sample" else 0} for each in arrow.TABLES},
    )  # fmt: skip
