# SPDX-License-Identifier: Apache-2.0
"""Remedies and the audit are right for captures whose remedy is known: the action, its place and its saving."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

from cwndtrace import tcp
from cwndtrace.analysis import cost, remedy
from cwndtrace.errors import NotFound
from cwndtrace.present import text as in_words
from cwndtrace.trace import Trace
from tests.unit import frames

SENT = 40_100_000
POD = 4026532999


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
    return frames.capture(Path(mkdtemp(dir=path)) / "a.cwnd", **options)


def by_name(trace: Trace, connection: str | None = None) -> dict[str, dict[Any, Any]]:
    return {row["remedy"]: row for row in trace.remedies(connection).to_dict("records")}


def test_each_remedy_of_a_connection_has_an_action_and_a_saving(tmp_path: Path) -> None:
    trace = capture(tmp_path, 1_000_000)
    rows = by_name(trace)
    assert list(rows) == ["sysctl", "ping", "initcwnd", "bbr"]
    assert {row["saves_us"] for row in rows.values()} == {4 * 106_500}
    assert {row["connections"] for row in rows.values()} == {1}
    assert rows["sysctl"]["action"] == "sysctl -w net.ipv4.tcp_slow_start_after_idle=0"
    assert "every 240 ms" in rows["ping"]["action"]
    assert list(trace.remedies().columns) == list(in_words.REMEDY_COLUMNS)
    assert in_words.remedy(rows["sysctl"]).startswith(
        "sysctl -w net.ipv4.tcp_slow_start_after_idle=0: saves about 426 ms (estimated) on 1 connection. Risk low: "
    )


def test_the_initial_window_that_would_have_sufficed_is_proposed(tmp_path: Path) -> None:
    (row,) = (r for r in capture(tmp_path, 1_000_000).remedies().to_dict("records") if r["remedy"] == "initcwnd")
    # With the window from before the reset, all 691 segments took one round trip, so all must fit.
    assert "initcwnd 691 on the route to 10.2.0.9" in row["action"]
    assert (row["risk"], "far more than usual" in row["why_risk"]) == ("high", True)
    small = capture(tmp_path, 70_000, fields={"cwnd_after": 20}).remedies().set_index("remedy").loc["initcwnd"]
    assert "initcwnd 49 " in small["action"]
    assert small["risk"] == "medium"


def test_the_smallest_sufficient_initial_window_is_proposed(tmp_path: Path) -> None:
    fields = {"cwnd_before": 300, "cwnd_after": 10, "ssthresh_before": 225, "ssthresh_after": 225}
    rows = by_name(capture(tmp_path, 2_000_000, fields=fields))
    assert rows["initcwnd"]["saves_us"] == rows["bbr"]["saves_us"] > 0
    action = rows["initcwnd"]["action"]
    value = int(action.split("initcwnd ")[1].split()[0])

    def needed(window: int) -> int:
        one = {
            "burst": 2_000_000,
            "cwnd": window,
            "ssthresh": 225,
            "limit_bytes": 6_291_456,
            "mss": 1448,
            "target": 300,
        }
        return int(cost.rounds(**{k: np.array([v]) for k, v in one.items()}, reno=np.array([False]))[0])

    assert 10 < value < 300
    assert needed(value) == needed(300) < needed(value - 1)


def test_an_initial_window_does_not_save_the_cost_of_a_lower_ssthresh(tmp_path: Path) -> None:
    fields = {"cwnd_before": 300, "cwnd_after": 10, "ssthresh_after": 225}
    rows = by_name(capture(tmp_path, 2_000_000, fields=fields))
    # The 1382 segments are 300, 600 and 482 in slow start, but 300, 301, 302, 303 and 176 beyond ssthresh.
    assert rows["bbr"]["saves_us"] - rows["initcwnd"]["saves_us"] == 2 * 106_500


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
    assert by_name(trace)["sysctl"]["action"].startswith(command)


def test_the_sysctl_of_all_namespaces_is_one_remedy(tmp_path: Path) -> None:
    resets = [frames.reset(10, sock_cookie=n, netns_ino=n) for n in range(1, 6)]
    seen = [frames.snapshot(20, sock_cookie=n, netns_ino=n, bytes_sent=SENT + n * 200_000) for n in range(1, 6)]
    sysctls = {str(n): space(f"pod{n}") for n in range(1, 5)}
    options = {"resets": frames.table("cwnd_reset", *resets), "connections": frames.snapshots(*seen)}
    row = by_name(capture(tmp_path, sysctls=sysctls, **options))["sysctl"]
    assert (row["connections"], row["saves_us"]) == (5, by_name(capture(tmp_path, **options))["bbr"]["saves_us"])
    setting = "sysctl -w net.ipv4.tcp_slow_start_after_idle=0"
    assert row["action"].split("; ")[0] == f"in network namespace 5: {setting}"
    assert row["action"].split("; ")[1:] == [
        f"ip netns exec pod4 {setting}", f"ip netns exec pod3 {setting}", "and in 2 more namespaces"
    ]  # fmt: skip


def test_a_remedy_says_that_the_hosts_setting_does_not_apply_in_a_container(tmp_path: Path) -> None:
    sysctls = {"1": space("init", 0, host=True), str(POD): space("pod")}
    trace = capture(tmp_path, 1_000_000, netns=POD, sysctls=sysctls)
    assert by_name(trace)["sysctl"]["action"] == (
        "ip netns exec pod sysctl -w net.ipv4.tcp_slow_start_after_idle=0 "
        "(the host's own setting is 0, which doesn't apply in this namespace)"
    )


def test_remedies_are_for_the_host_or_for_one_connection(tmp_path: Path) -> None:
    trace = capture(tmp_path, 1_000_000, 300_000, 40)
    key = trace.summary()["connection"].iloc[1]
    whole, one = by_name(trace), by_name(trace, key)
    assert (whole["bbr"]["connections"], one["bbr"]["connections"]) == (2, 1)
    lost = trace.summary().set_index("connection")["lost_us"]
    assert (whole["bbr"]["saves_us"], one["bbr"]["saves_us"]) == (lost.sum(), lost[key])
    with pytest.raises(NotFound, match="no connection 9:9"):
        trace.remedies("9:9")


def test_a_capture_without_cost_has_nothing_to_do(tmp_path: Path) -> None:
    rows = by_name(capture(tmp_path, 2000))
    assert list(rows) == ["nothing"]
    assert in_words.remedy(rows["nothing"]) == "Nothing to do: no reset cost a round trip."
    assert list(by_name(capture(tmp_path))) == ["nothing"]


def test_missing_records_are_never_nothing_to_do(tmp_path: Path) -> None:
    trace = capture(tmp_path, 2000)
    rows = in_words.remedies(
        remedy.remedies(trace.verdicts, trace.summary()), trace.about, "5 of 8 resets are not in the capture"
    )
    (sentence,) = map(in_words.remedy, rows.to_dict("records"))
    assert sentence == "Trace again, or get the whole capture, because 5 of 8 resets are not in the capture."


def test_remedies_for_other_limits_have_no_saving(tmp_path: Path) -> None:
    trace = capture(tmp_path, 1_000_000, fields={"snd_wnd": 2000})
    (row,) = by_name(trace).values()
    assert (row["remedy"], math.isnan(row["saves_us"])) == ("receiver_window", True)
    assert "can't tell" in in_words.remedy(row)


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
    assert list(rows.columns) == [*remedy.AUDIT_COLUMNS, "note"]
    table = {row["netns_ino"]: row for row in rows.to_dict("records")}
    assert list(table) == [1, POD, 9, 55]
    pod = table[POD]
    assert (pod["live"], pod["touched"], pod["resets"], pod["lost_us"]) == (2, 1, 1, 426_000)
    assert pod["note"] == "net.ipv4.tcp_slow_start_after_idle is 1 here but 0 on the host"
    assert rows["slow_start_after_idle"].isna().tolist() == [False, False, True, True]
    assert (table[55]["live"], table[55]["name"], table[1]["host"], pod["host"]) == (1, "", True, False)


@pytest.mark.parametrize("sysctls", [None, 5, [], {"x": 1}, {"x": {"name": 5, "host": "yes"}}])
def test_the_audit_accepts_metadata_of_any_shape(tmp_path: Path, sysctls: object) -> None:
    trace = capture(tmp_path, 1_000_000, sysctls=sysctls)
    assert trace.audit()["resets"].sum() == 1
    assert "sysctl" in by_name(trace)
