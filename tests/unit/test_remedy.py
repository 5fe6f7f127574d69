# SPDX-License-Identifier: Apache-2.0
"""Remedies and the audit are right for captures whose remedy is known: the action, its place and its saving."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pandas as pd
import pytest

from cwndtrace import tcp
from cwndtrace.analysis import audit, remedy
from cwndtrace.errors import NotFound
from cwndtrace.present import remedies as in_words
from cwndtrace.trace import Trace
from tests.unit import frames

SENT = 40_100_000
POD = 4026532999
UNTOLD: dict[str, Any] = {"waiting_bytes": math.nan, "chain_window": math.nan}
"""Columns of verdicts where no record says how much data waited for the window."""
TOLD: dict[str, Any] = {"waiting_bytes": 30_000, "chain_window": 415}


def space(name: str, setting: int | None = 1, *, host: bool = False, control: str = "cubic") -> dict[str, Any]:
    return {"name": name, "host": host, tcp.IDLE_SYSCTL: setting, tcp.CONTROL_SYSCTL: control}


def capture(path: Path, *bursts: int, netns: int = frames.NETNS, **options: Any) -> Trace:
    """Write a capture with a connection for each burst (in bytes), and one reset of 2827 -> 44 segments on each."""
    fields = options.pop("fields", {})
    resets = [frames.reset(10, sock_cookie=n + 1, netns_ino=netns, **fields) for n, _ in enumerate(bursts)]
    seen = [
        frames.snapshot(at, sock_cookie=n + 1, netns_ino=netns, bytes_sent=SENT + burst)
        for n, burst in enumerate(bursts)
        for at in (20, 30)
    ]
    options = {"resets": frames.table("cwnd_reset", *resets), "connections": frames.snapshots(*seen)} | options
    judged = options.pop("judged", {})
    trace = frames.capture(Path(mkdtemp(dir=path)) / "a.cwnd", **options)
    trace._verdicts = trace._verdicts.assign(**UNTOLD | judged)
    return trace


def by_name(trace: Trace, connection: str | None = None) -> dict[str, dict[Any, Any]]:
    return {row["remedy"]: row for row in trace.remedies(connection).to_dict("records")}


def test_each_remedy_of_a_connection_has_an_action_and_a_saving(tmp_path: Path) -> None:
    trace = capture(tmp_path, 1_000_000, judged=TOLD)
    rows = by_name(trace)
    assert list(rows) == ["sysctl", "initcwnd", "ping", "bbr"]
    lost = trace._verdicts["lost_us"].sum()
    assert {row["saves_us"] for row in rows.values()} == {lost}
    assert {row["connections"] for row in rows.values()} == {1}
    assert rows["sysctl"]["action"] == rows["sysctl"]["command"] == "sysctl -w net.ipv4.tcp_slow_start_after_idle=0"
    assert "every 240 ms" in rows["ping"]["action"]
    assert list(trace.remedies().columns) == list(in_words.COLUMNS)
    assert in_words.remedy(rows["sysctl"]).startswith(
        "sysctl -w net.ipv4.tcp_slow_start_after_idle=0: saves 426 ms (measured) on 1 connection. Risk low: "
    )


# ---- initcwnd ---------------------------------------------------------------------------------------


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("waiting", "window", "segments", "risk"),
    [
        (30_000, 415, 21, "medium"),
        (21 * 1448, 415, 21, "medium"),
        (600_000, 415, 415, "high"),
        ([30_000, 2_000], [415, 415], 21, "medium"),
        (30_000, math.nan, 21, "medium"),
    ],
)
def test_the_initial_window_holds_what_waited_and_no_more(
    tmp_path: Path, waiting: Any, window: Any, segments: int, risk: str
) -> None:
    judged = {"waiting_bytes": waiting, "chain_window": window}
    row = by_name(capture(tmp_path, 1_000_000, 1_000_000, judged=judged))["initcwnd"]
    assert row["command"] == f"ip route change $(ip route get fibmatch 10.2.0.9) initcwnd {segments}"
    assert row["action"].startswith(f"{row['command']} (through eth0); ")
    assert (row["risk"], "far more than usual" in row["why_risk"]) == (risk, risk == "high")
    assert f"InitialCongestionWindow={segments} " in row["lasting"]


def test_no_initial_window_is_advised_where_nothing_says_how_much_waited(tmp_path: Path) -> None:
    row = by_name(capture(tmp_path, 1_000_000))["initcwnd"]
    assert math.isnan(row["saves_us"])
    assert row["command"] == row["lasting"] == ""
    assert "can't be told, because the capture doesn't say how much data waited" in in_words.remedy(row)
    some = by_name(capture(tmp_path, 1_000_000, 1_000_000, judged=TOLD | {"waiting_bytes": [30_000, math.nan]}))
    assert some["initcwnd"]["saves_us"] * 2 == some["sysctl"]["saves_us"]
    assert some["initcwnd"]["connections"] == 1
    assert "initcwnd 21 " in some["initcwnd"]["action"]
    assert some["initcwnd"]["action"].endswith("how much waited after 1 other reset isn't known")


def test_routes_of_other_namespaces_and_strange_peers_are_safe_to_paste(tmp_path: Path) -> None:
    trace = capture(tmp_path, 1_000_000, netns=POD, sysctls={str(POD): space("a b")}, judged=TOLD)
    trace._verdicts = trace._verdicts.assign(daddr="x; reboot")
    row = by_name(trace)["initcwnd"]
    inside = "ip netns exec 'a b' ip route"
    assert row["command"] == f"{inside} change $({inside} get fibmatch 'x; reboot') initcwnd 21"
    assert "eth0" not in row["action"]


def test_a_route_without_a_known_interface_names_none(tmp_path: Path) -> None:
    for judged in ({"ifindex": math.nan}, {"ifindex": 7}):
        row = by_name(capture(tmp_path, 1_000_000, judged=TOLD | judged))["initcwnd"]
        assert row["action"].startswith(f"{row['command']}; the inner command")


def test_systemd_networkd_takes_no_window_above_its_limit(tmp_path: Path) -> None:
    judged = {"waiting_bytes": 3_000_000, "chain_window": 2827}
    lasting = by_name(capture(tmp_path, 3_000_000, judged=judged))["initcwnd"]["lasting"]
    assert "takes at most 1023" in lasting
    assert "initcwnd=2072 among the attributes" in lasting


# ---- where and how it lasts -------------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("about", "command"),
    [
        (space("this"), "sysctl -w "),
        (space("init", host=True), "sysctl -w "),
        (space("blue"), "ip netns exec blue sysctl -w "),
        (space("a b;reboot"), "ip netns exec 'a b;reboot' sysctl -w "),
        (space("nginx[812]"), "nsenter -t 812 -n sysctl -w "),
    ],
)
def test_the_command_runs_in_the_right_namespace(tmp_path: Path, about: dict[str, Any], command: str) -> None:
    trace = capture(tmp_path, 1_000_000, netns=POD, sysctls={str(POD): about})
    row = by_name(trace)["sysctl"]
    assert row["action"].startswith(command)
    assert row["command"] == f"{command}net.ipv4.tcp_slow_start_after_idle=0"


def test_a_setting_lasts_otherwise_on_the_host_than_in_a_container(tmp_path: Path) -> None:
    def lasting(about: dict[str, Any]) -> tuple[str, dict[Any, Any]]:
        sysctls = {str(POD): about} | ({} if about["host"] else {"1": space("init", host=True)})
        rows = by_name(capture(tmp_path, 1_000_000, netns=POD, sysctls=sysctls))
        return rows["sysctl"]["lasting"], rows["bbr"]

    host, bbr = lasting(space("this", host=True))
    assert host == "/etc/sysctl.d/90-cwndtrace.conf with the line net.ipv4.tcp_slow_start_after_idle = 0"
    assert "allowed" not in bbr["action"] + bbr["lasting"]
    pod, bbr = lasting(space("nginx[812]"))
    assert "sysctl.d" not in pod
    assert "docker run --sysctl net.ipv4.tcp_slow_start_after_idle=0 " in pod
    assert "--allowed-unsafe-sysctls=net.ipv4.tcp_slow_start_after_idle" in pod
    assert "net.ipv4.tcp_allowed_congestion_control lists bbr" in bbr["action"]
    assert "on the host, net.ipv4.tcp_allowed_congestion_control" in bbr["lasting"]
    assert bbr["command"] == "nsenter -t 812 -n sysctl -w net.ipv4.tcp_congestion_control=bbr"


def test_the_sysctl_of_all_namespaces_is_one_remedy(tmp_path: Path) -> None:
    resets = [frames.reset(10, sock_cookie=n, netns_ino=n) for n in range(1, 6)]
    seen = [frames.snapshot(20, sock_cookie=n, netns_ino=n, bytes_sent=SENT + n * 200_000) for n in range(1, 6)]
    sysctls = {str(n): space(f"pod{n}") for n in range(1, 5)}
    options = {"resets": frames.table("cwnd_reset", *resets), "connections": frames.snapshots(*seen)}
    lost = [100_000.0 * n for n in range(1, 6)]
    judged = {"verdict": "harmful", "lost_us": lost}
    row = by_name(capture(tmp_path, sysctls=sysctls, judged=judged, **options))["sysctl"]
    assert (row["connections"], row["saves_us"]) == (5, sum(lost))
    setting = "sysctl -w net.ipv4.tcp_slow_start_after_idle=0"
    assert row["action"].split("; ")[0] == f"in network namespace 5: {setting}"
    assert row["action"].split("; ")[1:] == [
        f"ip netns exec pod4 {setting}", f"ip netns exec pod3 {setting}", "and for 2 more namespaces"
    ]  # fmt: skip
    assert row["command"] == f"ip netns exec pod4 {setting}; ip netns exec pod3 {setting}"


def test_a_remedy_says_that_the_hosts_setting_does_not_apply_in_a_container(tmp_path: Path) -> None:
    sysctls = {"1": space("init", 0, host=True), str(POD): space("pod")}
    trace = capture(tmp_path, 1_000_000, netns=POD, sysctls=sysctls)
    assert by_name(trace)["sysctl"]["action"] == (
        "ip netns exec pod sysctl -w net.ipv4.tcp_slow_start_after_idle=0 "
        "(the host's own setting is 0, which doesn't apply in this namespace)"
    )


def test_remedies_are_for_the_host_or_for_one_connection(tmp_path: Path) -> None:
    judged = {"verdict": ["harmful", "harmful", "burst_fits"], "lost_us": [400_000.0, 200_000.0, 0.0]}
    trace = capture(tmp_path, 1_000_000, 300_000, 40, judged=judged)
    whole, one = by_name(trace), by_name(trace, trace._verdicts["connection"].iloc[1])
    assert (whole["bbr"]["connections"], one["bbr"]["connections"]) == (2, 1)
    assert (whole["bbr"]["saves_us"], one["bbr"]["saves_us"]) == (600_000, 200_000)
    with pytest.raises(NotFound, match="no connection 9:9"):
        trace.remedies("9:9")


def test_a_capture_without_cost_has_nothing_to_do(tmp_path: Path) -> None:
    rows = by_name(capture(tmp_path, 2000))
    assert list(rows) == ["nothing"]
    assert in_words.remedy(rows["nothing"]) == "Nothing to do: no reset was harmful."
    unseen = by_name(capture(tmp_path))
    assert list(unseen) == ["nothing"]
    assert in_words.remedy(unseen["nothing"]) == (
        "Trace again while connections are open, with a filter that lets them through: none was seen."
    )


def test_a_cost_that_nobody_knows_is_never_nothing_to_do(tmp_path: Path) -> None:
    rows = by_name(capture(tmp_path, 2000, judged={"verdict": "unknown"}))
    assert list(rows) == ["nothing"]
    assert in_words.remedy(rows["nothing"]) == (
        "Trace again for longer, because the records of some connections can't tell."
    )


def test_missing_records_are_never_nothing_to_do(tmp_path: Path) -> None:
    trace = capture(tmp_path, 2000)
    rows = in_words.remedies(
        remedy.remedies(trace._verdicts, trace.summary(), trace.about),
        trace.about,
        "5 of 8 resets are not in the capture",
    )
    (sentence,) = map(in_words.remedy, rows.to_dict("records"))
    assert sentence == "Trace again, or get the whole capture, because 5 of 8 resets are not in the capture."


def test_remedies_for_other_limits_have_no_saving(tmp_path: Path) -> None:
    trace = capture(tmp_path, 1_000_000, judged={"verdict": "receiver_window", "lost_us": 0.0})
    rows = trace.summary().assign(verdict="receiver_window")
    found = in_words.remedies(remedy.remedies(trace._verdicts, rows, trace.about), trace.about)
    (row,) = found.to_dict("records")
    assert (row["remedy"], math.isnan(row["saves_us"])) == ("receiver_window", True)
    assert "can't tell" in in_words.remedy(row)


# ---- ping and disk ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_ping_is_for_connections_that_can_send_one(tmp_path: Path) -> None:
    judged = {"sport": [443, 8080, 443, 443], "comm": ["app", "app", "nginx", "app"], "cause": [*["peer"] * 3, "disk"]}
    judged |= {"reason": ["idle"] * 4}
    trace = capture(tmp_path, *[1_000_000] * 4, judged=judged)
    row = by_name(trace)["ping"]
    assert (row["connections"], row["saves_us"]) == (1, trace._verdicts["lost_us"].iloc[0])
    assert row["action"].endswith(
        "an HTTP/1 server can't (2 connections of what is one by its port or name and "
        "1 connection whose sender waits for a disk left out)"
    )
    assert "ping" not in by_name(capture(tmp_path, 1_000_000, judged={"comm": "nginx"}))
    assert "ping" not in by_name(capture(tmp_path, 1_000_000, judged={"cause": "disk"}))


def test_a_ping_saves_only_what_idle_resets_cost(tmp_path: Path) -> None:
    trace = capture(tmp_path, 1_000_000, 1_000_000, judged={"reason": ["idle", "app_limited"]})
    rows = by_name(trace)
    assert rows["ping"]["saves_us"] * 2 == rows["sysctl"]["saves_us"]


def test_a_disk_has_a_remedy_of_its_own(tmp_path: Path) -> None:
    judged = {"cause": "disk", "disk_device": ["sda", "sda", "sdb"], "disk_requests": 6, "comm": "replica"}
    # The idle time is 2.10 s and the RTO 308 ms; without the disk, only the first would have been shorter.
    judged |= {"disk_us": [2_000_000.0, 1_500_000.0, 1_500_000.0]}
    trace = capture(tmp_path, *[1_000_000] * 3, judged=judged)
    first, second = (r for r in trace.remedies().to_dict("records") if r["remedy"] == "disk")
    assert first["action"].startswith(
        "make replica wait less for sda: it waited 3.50 s for 12 requests before 2 harmful resets"
    )
    assert (first["command"], first["connections"]) == ("iostat -x 1 sda", 1)
    assert first["saves_us"] == trace._verdicts["lost_us"].iloc[0]
    assert math.isnan(second["saves_us"])
    assert "sdb" in second["action"]


# ---- settings that have changed ---------------------------------------------------------------------


def test_a_setting_that_is_0_by_now_is_not_proposed(tmp_path: Path) -> None:
    resets = [frames.reset(10, sock_cookie=n, netns_ino=n) for n in (1, 2)]
    seen = [frames.snapshot(20, sock_cookie=n, netns_ino=n, bytes_sent=SENT + 1_000_000) for n in (1, 2)]
    options = {"resets": frames.table("cwnd_reset", *resets), "connections": frames.snapshots(*seen)}
    sysctls = {"1": space("one"), "2": space("two")}
    rows = by_name(capture(tmp_path, sysctls=sysctls, sysctls_end=sysctls | {"1": space("one", 0)}, **options))
    assert rows["sysctl"]["command"] == "ip netns exec two sysctl -w net.ipv4.tcp_slow_start_after_idle=0"
    assert (rows["sysctl"]["connections"], rows["bbr"]["connections"], rows["ping"]["connections"]) == (1, 1, 1)
    assert in_words.remedy(rows["sysctl_done"]) == (
        "net.ipv4.tcp_slow_start_after_idle was set to 0 in one during the capture: nothing is left to do about the "
        "426 ms (measured) on 1 connection that resets cost before."
    )
    off = {inode: settings | {tcp.IDLE_SYSCTL: 0} for inode, settings in sysctls.items()}
    assert list(by_name(capture(tmp_path, sysctls=sysctls, sysctls_end=off, **options))) == ["sysctl_done"]


# ---- the audit --------------------------------------------------------------------------------------


def test_the_audit_lists_the_host_and_each_namespace(tmp_path: Path) -> None:
    sysctls = {"1": space("init", 0, host=True), str(POD): space("pod"), "9": space("shy", None), "7": "odd"}
    seen = [
        frames.snapshot(20, sock_cookie=1, netns_ino=POD, bytes_sent=SENT + 1_000_000),
        frames.snapshot(30, sock_cookie=1, netns_ino=POD, bytes_sent=SENT + 1_000_000),
        frames.snapshot(30, sock_cookie=2, netns_ino=POD, ca_name="bbr"),
        frames.snapshot(31, sock_cookie=3, netns_ino=55),
    ]
    trace = capture(tmp_path, 1_000_000, netns=POD, sysctls=sysctls, connections=frames.snapshots(*seen))
    rows = trace.audit()
    assert list(rows.columns) == [*audit.COLUMNS, "note"]
    table = {row["netns_ino"]: row for row in rows.to_dict("records")}
    assert list(table) == [1, POD, 9, 55]
    pod = table[POD]
    assert (pod["live"], pod["touched"], pod["resets"], pod["lost_us"]) == (2, 1, 1, 426_000)
    assert pod["note"] == "net.ipv4.tcp_slow_start_after_idle is 1 here but 0 on the host"
    assert rows["slow_start_after_idle"].isna().tolist() == [False, False, True, True]
    assert (table[55]["live"], table[55]["name"], table[1]["host"], pod["host"]) == (1, "", True, False)


@pytest.mark.quick(1)
@pytest.mark.parametrize("sysctls", [None, 5, [], {"x": 1}, {"x": {"name": 5, "host": "yes"}}])
def test_the_audit_accepts_metadata_of_any_shape(tmp_path: Path, sysctls: object) -> None:
    trace = capture(tmp_path, 1_000_000, sysctls=sysctls)
    assert trace.audit()["resets"].sum() == 1
    assert "sysctl" in by_name(trace)


def test_the_audit_says_what_a_setting_was_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    sysctls = {"1": space("init", host=True), str(POD): space("pod"), "7": space("young"), "8": space("gone")}
    end = {
        "1": space("init", 0, host=True),
        str(POD): space("pod"),
        "7": space("young", control="reno") | {"new": True},
    }
    trace = capture(tmp_path, sysctls=sysctls, sysctls_end=end)
    table = {row["netns_ino"]: row for row in trace.audit().to_dict("records")}
    columns = ("slow_start_after_idle", "slow_start_after_idle_end")
    values = {inode: [None if row[c] is pd.NA else row[c] for c in columns] for inode, row in table.items()}
    assert values == {1: [1, 0], POD: [1, 1], 7: [None, 1], 8: [1, None]}
    setting = "net.ipv4.tcp_slow_start_after_idle"
    assert table[1]["note"] == f"{setting} was 1 at the start of the capture and 0 at its end"
    assert table[POD]["note"] == f"{setting} is 1 here but 0 on the host"
    assert table[7]["note"].startswith("the namespace is younger than the trace; ")
    assert table[7]["congestion_control"] == "reno"


def test_pings_are_sent_before_the_shortest_timeout(tmp_path: Path) -> None:
    resets = [frames.reset(10, sock_cookie=n, rto_us=rto, idle_us=5_000_000) for n, rto in ((1, 900_000), (2, 300_000))]
    seen = [frames.snapshot(at, sock_cookie=n, bytes_sent=SENT + 10**6) for n in (1, 2) for at in (20, 30)]
    options = {"resets": frames.table("cwnd_reset", *resets), "connections": frames.snapshots(*seen)}
    ping = by_name(frames.capture(tmp_path / "a.cwnd", **options))["ping"]
    assert ping["connections"] == 2
    assert "every 240 ms" in ping["action"]
