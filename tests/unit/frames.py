# SPDX-License-Identifier: Apache-2.0
"""Realistic records for tests, built from the parsed layouts; nothing here needs root or BPF."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from cwndtrace import store
from cwndtrace.analysis import cost
from cwndtrace.records import arrow, layout
from cwndtrace.records import frames as records
from cwndtrace.store.meta import Meta
from cwndtrace.trace import Trace, load

MONO = 5_000_000_000_000
"""CLOCK_MONOTONIC at the start of each capture that is written here, in nanoseconds."""
OFFSET = 1_795_000_000_000_000_000
"""Nanoseconds that make UTC of CLOCK_MONOTONIC."""
NETNS = 4026531840
SECOND = 1_000_000_000


def packed(address: str) -> bytes:
    """Return an address as the 16 bytes of a record; IPv4 is mapped into IPv6."""
    ip = ipaddress.ip_address(address)
    return ipaddress.IPv6Address(f"::ffff:{ip}").packed if ip.version == 4 else ip.packed


def reset(at_s: float = 1.0, **fields: Any) -> layout.Records:
    """Return one cwnd_reset record, ``at_s`` seconds after the start; addresses and enums among ``fields`` are text."""
    record = np.zeros(1, dtype=layout.event("cwnd_reset").dtype)
    values: dict[str, Any] = {
        "ts_ns": MONO + int(at_s * SECOND), "sock_cookie": 0x5F, "skaddr": 0xFFFF888012345600, "cgroup_id": 1,
        "bytes_acked": 40_000_000, "bytes_sent": 40_100_000, "idle_us": 2_100_000, "last_rcv_us": 2_000_000,
        "rto_us": 308_000, "srtt_us": 107_000, "min_rtt_us": 106_500, "mss": 1448, "cwnd_before": 2827,
        "cwnd_after": 44, "ssthresh_before": 2_147_483_647, "ssthresh_after": 2120, "snd_wnd": 6_291_456,
        "init_cwnd": 10, "unsent_bytes": 0, "total_retrans": 0, "netns_ino": NETNS, "tgid": 4242, "tid": 4243,
        "ifindex": 3, "sport": 443, "dport": 51324, "reason": "idle", "probe": "sendmsg", "ca_state": "open",
        "tcp_state": "established", "unacked_bytes": 0,
        "saddr": "10.1.0.1", "daddr": "10.2.0.9", "comm": b"replica", "ca_name": b"cubic",
    }  # fmt: skip
    values |= fields
    values.setdefault("family", 10 if ":" in values["saddr"] else 2)
    return _filled("cwnd_reset", record, values)


def block(at_s: float = 1.0, latency_us: float = 250.0, **fields: Any) -> layout.Records:
    """Return one block_io record that starts ``at_s`` seconds after the start and takes ``latency_us``."""
    record = np.zeros(1, dtype=layout.event("block_io").dtype)
    start = MONO + int(at_s * SECOND)
    values: dict[str, Any] = {
        "start_ns": start, "issue_ns": start + 4_000, "done_ns": start + int(latency_us * 1000), "sector": 2048,
        "bytes": 4096, "dev": 7 << 20, "tgid": 777, "tid": 778, "op": "read", "error": "ok", "comm": b"fio",
    }  # fmt: skip
    values |= {"owner_cgroup_id": fields.get("cgroup_id", 0)}
    return _filled("block_io", record, values | fields)


def recovered(at_s: float = 1.0, took_s: float = 0.5, **fields: Any) -> layout.Records:
    """Return one cwnd_recovery record of ``reset(at_s)``, whose window was regained after ``took_s`` seconds."""
    record = np.zeros(1, dtype=layout.event("cwnd_recovery").dtype)
    began = MONO + int(at_s * SECOND)
    values: dict[str, Any] = {
        "reset_ts_ns": began, "end_ts_ns": began + int(took_s * SECOND), "sock_cookie": 0x5F,
        "skaddr": 0xFFFF888012345600, "bytes_acked": 3_000_000, "acks": 90, "target": 2827, "cwnd_start": 44,
        "cwnd_end": 2827, "srtt_us": 107_000, "netns_ino": NETNS, "ssthresh_end": 2_147_483_647, "reason": "idle",
        "outcome": "regained", "cost_us": 4 * 106_500, "first_cost_us": 4 * 106_500, "held_us": 4 * 106_500,
        "busy_us": 600_000,
        "chain_window": 2827, "chain_resets": 1, "waiting_bytes": 1_000_000, "bursts": 1,
        "bytes_received": 1_000, "data_segs_in": 10,
    }  # fmt: skip
    return _filled("cwnd_recovery", record, values | fields)


def followed(resets: pa.Table, connections: pa.Table | None = None, **fields: Any) -> pa.Table:
    """Return the table ``cwnd_recovery`` for idle resets, each before one burst that nothing but the window delayed.

    The burst is what was sent until the connection's next record; a reset without a later record isn't followed. The
    window doubles each round trip, so the cost is the number of round trips less one, in round trips of min_rtt_us.
    """
    known = [pandas(t).assign(connection=lambda f: f["sock_cookie"]) for t in (resets, connections or snapshots())]
    rows = []
    for row in known[0].assign(burst=cost.bursts(*known)).dropna(subset="burst").to_dict("records"):
        if row["reason"] != "idle":
            continue
        burst = int(row["burst"])
        need, sent, trips = min(-(-burst // row["mss"]), row["cwnd_before"]), row["cwnd_after"], 1
        while sent < need:
            sent, trips = sent + row["cwnd_after"] * 2**trips, trips + 1
        late = (trips - 1) * row["min_rtt_us"]
        shared = {name: row[name] for name in ("skaddr", "sock_cookie", "netns_ino", "srtt_us")}
        measured = {
            "reset_ts_ns": row["ts_ns"], "end_ts_ns": row["ts_ns"] + trips * row["min_rtt_us"] * 1000,
            "bytes_acked": burst, "cost_us": late, "first_cost_us": late, "held_us": late,
            "busy_us": trips * row["min_rtt_us"],
            "target": row["cwnd_before"], "chain_window": row["cwnd_before"], "cwnd_start": row["cwnd_after"],
            "cwnd_end": row["cwnd_before"], "waiting_bytes": min(burst, 2**32 - 1) if late else 0,
        }  # fmt: skip
        rows.append(recovered(**(shared | measured | fields)))
    return table("cwnd_recovery", *rows)


def _filled(name: str, record: layout.Records, values: dict[str, Any]) -> layout.Records:
    for member in layout.event(name).fields:
        if member.name not in values:
            continue
        value = values[member.name]
        if isinstance(value, str) and member.unit == "addr":
            value = packed(value)
        elif isinstance(value, str) and member.unit.startswith("enum "):
            value = layout.code(member.unit[5:], value)
        record[member.name] = value
    return record


def table(name: str, *records: layout.Records) -> pa.Table:
    """Return an Arrow table of one event from records."""
    empty = np.zeros(0, dtype=layout.event(name).dtype)
    return arrow.to_arrow(name, np.concatenate([empty, *records]), OFFSET)


def snapshot(at_s: float = 0.0, **fields: Any) -> dict[str, Any]:
    """Return one row of the table ``connections``, ``at_s`` seconds after the start."""
    ts_ns = MONO + int(at_s * SECOND)
    row: dict[str, Any] = dict.fromkeys(arrow.schema("connections").names, 0)
    row |= {
        "time": (ts_ns + OFFSET) // 1000, "ts_ns": ts_ns, "sock_cookie": 0x5F, "netns_ino": NETNS, "family": 2,
        "state": "ESTAB",
        "saddr": "10.1.0.1", "sport": 443, "daddr": "10.2.0.9", "dport": 51324, "inode": 91234, "pid": 4242,
        "comm": "replica", "ca_name": "cubic", "ca_state": "open", "cwnd": 2827, "ssthresh": 2_147_483_647,
        "mss": 1448, "rto_us": 308_000, "srtt_us": 107_000, "min_rtt_us": 106_500, "bytes_acked": 30_000_000,
        "bytes_sent": 30_100_000, "sock_cgroup_id": 1, "listener": "",
    }  # fmt: skip
    return row | fields


def snapshots(*rows: dict[str, Any]) -> pa.Table:
    """Return the table ``connections`` from rows."""
    return pa.Table.from_pylist(list(rows), schema=arrow.schema("connections"))


def workloads(*rows: dict[str, Any]) -> pa.Table:
    """Return the table ``workloads`` from rows, each of a container "web" in cgroup 1 but for the values given."""
    texts = {"path": f"/docker/{'ab' * 32}", "kind": "container", "unit": "", "container_id": "ab" * 32}
    texts |= {"container_name": "web", "image": "nginx:1", "runtime": "docker"}
    texts |= dict.fromkeys(("pod_namespace", "pod_name", "pod_uid"), "")
    seen = {"time": (MONO + OFFSET) // 1000, "first_ns": MONO, "last_ns": MONO + 60 * SECOND, "cgroup_id": 1}
    return pa.Table.from_pylist([seen | texts | row for row in rows], schema=arrow.schema("workloads"))


def processes(*rows: dict[str, Any]) -> pa.Table:
    """Return the table ``processes`` from rows, each of process 4242 of ``reset`` but for the values given."""
    seen = {"time": (MONO + OFFSET) // 1000, "first_ns": MONO, "last_ns": MONO + 60 * SECOND}
    what = {"pid": 4242, "start_ticks": 1, "netns_ino": NETNS, "comm": "replica", "cmdline": "/usr/bin/replica --all"}
    what["cgroup"] = f"/docker/{'ab' * 32}"
    return pa.Table.from_pylist([seen | what | row for row in rows], schema=arrow.schema("processes"))


def meta(**values: Any) -> dict[str, Any]:
    """Return a complete ``meta.json`` of a capture of 60 s."""
    return {
        "version": "0.1.0", "host": "web1", "kernel": "6.18.0", "machine": "x86_64", "hz": 250,
        "command": ["cwndtrace", "run", "--iface", "eth0"], "filters": {"iface": "eth0"},
        "started": "2026-11-18T12:30:00Z", "ended": "2026-11-18T12:31:00Z",
        "clock": {
            "start": {"mono_ns": MONO, "utc_offset_ns": OFFSET},
            "end": {"mono_ns": MONO + 60 * SECOND, "utc_offset_ns": OFFSET},
        },
        "sysctls": {str(NETNS): {"name": "this", "net.ipv4.tcp_slow_start_after_idle": 1}},
        "probes": {"idle": "sendmsg", "rto_loss": "sendmsg", "app_limited": None},
        "devices": {"7:0": "loop0"}, "interfaces": {"3": "eth0"},
        "counts": {t: {"kept": 0, "lost": 0} for t in arrow.TABLES}, "unchanged": 0, "lossy": [],
    } | values  # fmt: skip


def about(**values: Any) -> Meta:
    """Return the metadata of ``meta``, checked and typed."""
    return Meta.parse(meta(**values))


def capture(
    path: Path,
    *,
    resets: pa.Table | None = None,
    block_io: pa.Table | None = None,
    connections: pa.Table | None = None,
    recoveries: pa.Table | None = None,
    workloads: pa.Table | None = None,
    processes: pa.Table | None = None,
    **values: Any,
) -> Trace:
    """Write a complete capture to ``path`` and load it; ``values`` go into its metadata.

    Without ``recoveries``, the resets are ``followed``.
    """
    if recoveries is None and resets is not None:
        recoveries = followed(resets, connections)
    writer = store.CaptureWriter.create(path, meta(**values))
    tables = {
        "cwnd_reset": resets, "cwnd_recovery": recoveries, "block_io": block_io, "connections": connections,
        "workloads": workloads, "processes": processes,
    }  # fmt: skip
    for name, data in tables.items():
        if data is not None:
            writer.add(name, data)
    writer.close()
    return load(path)


def named(trace: Trace, *names: dict[str, Any]) -> Trace:
    """Return ``trace`` as if its records had ``names``, which go to its connections in turn, by their cookies.

    The names are columns of ``Trace.resets`` and ``Trace.connections``: workload, process, listener, listener_pid, ...
    """
    resets, connections = trace._identified
    cookies = sorted({*resets["sock_cookie"], *connections["sock_cookie"]})
    names = names or ({},)
    of = {cookie: names[number % len(names)] for number, cookie in enumerate(cookies)}
    columns = sorted({name for each in names for name in each})
    trace.__dict__["_identified"] = tuple(
        frame.assign(**{name: pd.Series([of[c].get(name) for c in frame["sock_cookie"]]) for name in columns})
        for frame in (resets, connections)
    )
    return trace


def story(
    seed: int = 1,
    *,
    seconds: float = 60.0,
    number: int = 1,
    peers: int = 1,
    ends: tuple[str, str] = ("10.1.0.1", "10.2.0.9"),
    comm: str = "replica",
) -> tuple[pa.Table, pa.Table]:
    """Return resets and snapshots of ``peers`` connections that send bursts of 1 MB after idle times of 0.5 to 5 s.

    As in the kernel, the window halves once for each RTO of idle time, from about 2800 segments down to 10.
    """
    rng = np.random.default_rng(seed)
    resets: list[layout.Records] = []
    rows: list[dict[str, Any]] = []
    for peer in range(peers):
        full, at = int(rng.integers(2650, 2900)), 0.4
        shared = {
            "sock_cookie": 0x5F + peer + 1000 * number, "saddr": ends[0], "daddr": ends[1],
            "dport": 20000 + peer, "skaddr": 0xFFFF888000000000 + 4096 * peer,
        }  # fmt: skip
        known = {k: v for k, v in shared.items() if k != "skaddr"} | {"comm": comm}
        idle_times: list[tuple[float, float]] = []
        while at < seconds:
            idle_s = float(np.exp(rng.uniform(np.log(0.5), np.log(5.0))))
            at += idle_s
            before, after = full - int(rng.integers(0, 90)), 0
            after = max(10, before >> int(idle_s / 0.308))
            if at > seconds:
                break
            idle_times.append((at - idle_s, at))
            idle_us = int(idle_s * 1e6)
            last_rcv = max(0, idle_us - 90_000)
            resets.append(
                reset(
                    at, cwnd_before=before, cwnd_after=after, idle_us=idle_us, last_rcv_us=last_rcv,
                    comm=comm.encode()[:16], bytes_sent=40_100_000 + 1_000_000 * (len(idle_times) - 1), **shared,
                )
            )  # fmt: skip
            at += float(rng.uniform(0.25, 0.9))
        for tick in np.arange(0.0, seconds, 5.0):
            is_idle = any(begin <= tick < end for begin, end in idle_times)
            cwnd = full if is_idle else int(rng.integers(300, full))
            sent = 40_100_000 + 1_000_000 * sum(end < tick for _, end in idle_times)
            rows.append(snapshot(float(tick), cwnd=cwnd, bytes_sent=sent, family=10 if ":" in ends[0] else 2, **known))
    return table("cwnd_reset", *resets), snapshots(*rows)


def disk(
    count: int = 3000, seed: int = 2, *, seconds: float = 60.0, slow: tuple[float, float] = (34.0, 39.0)
) -> pa.Table:
    """Return ``count`` reads and writes of 0.1 to 3 ms, 12 times as long during ``slow`` (seconds since the start)."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.uniform(0, seconds, count))
    latency = np.clip(rng.lognormal(np.log(400), 0.6, count), 90, 3000)
    latency[(at > slow[0]) & (at < slow[1])] *= 12
    records = np.repeat(block(), count)
    records["start_ns"] = MONO + (at * SECOND).astype(np.uint64)
    records["issue_ns"] = records["start_ns"] + 4000
    records["done_ns"] = records["start_ns"] + (latency * 1000).astype(np.uint64)
    records["op"] = rng.choice([0, 0, 0, 1], count)
    return table("block_io", records)


def pandas(data: pa.Table) -> pd.DataFrame:
    """Return a table as the DataFrame that a Trace makes of it, without computed columns."""
    return records.frame(data, data.schema.metadata[b"event"].decode())


def two_idle_connections(path: Path, **values: Any) -> Trace:
    """Write a capture of two connections whose application is idle, and block I/O."""
    resets, connections = story(peers=2, seconds=30)
    return capture(path, **({"resets": resets, "connections": connections, "block_io": disk(400, seconds=30)} | values))
