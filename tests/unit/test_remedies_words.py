# SPDX-License-Identifier: Apache-2.0
"""Remedies are put into words for the namespaces and workloads that they are for, with commands that can be pasted."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from cwndtrace import tcp
from cwndtrace.analysis.remedy import InitialWindow, Ping, Route, SlowDisk
from cwndtrace.present import remedies as in_words
from tests.unit import frames

HOST, OTHERS = "1", ("2", "3", "4", "5", "6")
SYSCTL = "net.ipv4.tcp_slow_start_after_idle"
CONTROL = "net.ipv4.tcp_congestion_control"


def space(name: str, *, host: bool = False, idle: int = 1) -> dict[str, Any]:
    return {"name": name, "host": host, tcp.IDLE_SYSCTL: idle, tcp.CONTROL_SYSCTL: "cubic"}


SPACES = {HOST: space("init", host=True)} | {inode: space(f"nginx[{inode}00]") for inode in OTHERS}


def workload(name: str, kind: str, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(("pod_name", "pod_namespace", "pod_uid", "runtime", "unit"), "") | {
        "workload": name, "kind": kind, **values,
    }  # fmt: skip


def told(remedy: str, detail: Any = None, *, owners: Any = None, lacking: str = "", **about: Any) -> dict[Any, Any]:
    """Return a remedy in words that would have saved 426 ms on two connections, at a low risk."""
    found = pd.DataFrame([{"remedy": remedy, "saves_us": 426_000.0, "risk": "low", "connections": 2, "detail": detail}])
    (row,) = in_words.remedies(found, frames.about(**{"sysctls": SPACES} | about), lacking, owners or {}).to_dict(
        "records"
    )
    return row


# ---- where a setting is made, and how it lasts --------------------------------------------------------


def test_the_host_takes_a_file_and_a_namespace_of_nobody_all_that_may_be() -> None:
    assert told("sysctl", (HOST,))["lasting"] == f"/etc/sysctl.d/90-cwndtrace.conf with the line {SYSCTL} = 0"
    assert told("sysctl", (HOST,))["command"] == told("sysctl", (HOST,))["action"] == f"sysctl -w {SYSCTL}=0"
    assert told("sysctl", ("2",))["lasting"] == (
        f"docker run --sysctl {SYSCTL}=0 for a container, and the same option of podman; "
        f'securityContext.sysctls with name: {SYSCTL} and value: "0" for a pod, once the kubelet of its node runs with '
        f"--allowed-unsafe-sysctls={SYSCTL}; the command, whenever it is made, for a namespace made by hand"
    )


ONCE = f"once the kubelet of its node runs with --allowed-unsafe-sysctls={SYSCTL}"


@pytest.mark.parametrize(
    ("owner", "remark", "lasting"),
    [
        (workload("web", "container", runtime="docker"), "for container web: ",
         f"docker run --sysctl {SYSCTL}=0 for container web"),
        (workload("web", "container", runtime="podman"), "for container web: ",
         f"podman run --sysctl {SYSCTL}=0 for container web"),
        (workload("web", "container", runtime="containerd"), "for container web: ",
         f"docker run --sysctl {SYSCTL}=0, or the same of its runtime, for container web"),
        (workload("shop/web-1/nginx", "container", pod_namespace="shop", pod_name="web-1"),
         "for pod shop/web-1/nginx: ",
         f'securityContext.sysctls with name: {SYSCTL} and value: "0" for pod shop/web-1, {ONCE}'),
        (workload("pod 77", "pod", pod_uid="77"), "for pod 77: ",
         f'securityContext.sysctls with name: {SYSCTL} and value: "0" for pod 77, {ONCE}'),
        (workload("db.service", "unit", unit="db.service"), "for db.service: ",
         f"ExecStartPre=!sysctl -w {SYSCTL}=0 in the [Service] section of db.service"),
        (workload("/job", "cgroup"), "for cgroup /job: ", "the command, whenever the namespace of /job is made"),
    ],
)  # fmt: skip
def test_a_setting_is_for_a_workload_and_lasts_as_its_kind_does(
    owner: dict[str, Any], remark: str, lasting: str
) -> None:
    row = told("sysctl", ("2",), owners={"2": (owner,)})
    command = f"nsenter -t 200 -n sysctl -w {SYSCTL}=0"
    elsewhere = " (the host's own setting is 1, which doesn't apply in this namespace)"
    assert (row["action"], row["command"]) == (f"{remark}{command}{elsewhere}", command)
    assert row["lasting"] == lasting


def test_several_workloads_and_namespaces_are_named_in_part() -> None:
    owners: dict[str, tuple[dict[str, Any], ...]] = {
        inode: (workload(f"w{inode}", "container", runtime="docker"),) for inode in OTHERS
    }
    owners["2"] += (workload("side", "container", runtime="docker"),)
    row = told("sysctl", OTHERS, owners=owners)
    assert row["command"].count("nsenter") == 3
    assert row["action"].startswith("for container w2 and 1 other workload: nsenter -t 200 -n ")
    assert row["action"].endswith("; and for 2 more namespaces")
    assert [form.rpartition(" ")[2] for form in row["lasting"].split("; ")] == ["w2", "side", "w3", "workloads"]
    assert row["lasting"].endswith("; and for 3 more workloads")


def test_a_namespace_of_nobody_beside_one_of_a_workload_has_all_forms() -> None:
    owners = {"2": (workload("web", "container", runtime="docker"),)}
    own, *others = told("sysctl", ("2", "3"), owners=owners)["lasting"].split("; ")
    assert own == f"docker run --sysctl {SYSCTL}=0 for container web"
    assert others == told("sysctl", ("3",))["lasting"].split("; ")


def test_a_namespace_that_no_command_enters_is_named_by_its_number() -> None:
    row = told("sysctl", ("9",))
    assert row["command"] == ""
    assert row["action"] == f"in network namespace 9: sysctl -w {SYSCTL}=0"


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("this", ""), ("blue", "ip netns exec blue "), ("a[1", "ip netns exec 'a[1' "), ("x]", "ip netns exec 'x]' ")],
)
def test_only_a_name_with_a_process_is_entered_by_its_process(name: str, prefix: str) -> None:
    assert told("sysctl", ("2",), sysctls={"2": space(name)})["command"] == f"{prefix}sysctl -w {SYSCTL}=0"


def test_this_namespace_is_the_hosts_where_the_capture_does_not_say_which_is() -> None:
    etc = "/etc/sysctl.d/90-cwndtrace.conf"
    assert told("sysctl", ("2",), sysctls={"2": space("this")})["lasting"].startswith(etc)
    both = SPACES | {"2": space("this")}
    assert etc not in told("sysctl", ("2",), sysctls=both)["lasting"]
    assert etc not in told("sysctl", ("2",), sysctls={"2": space("blue")})["lasting"]


def test_bbr_may_be_refused_in_a_container() -> None:
    host, both = told("bbr", (HOST,)), told("bbr", (HOST, "2"))
    assert host["action"] == f"use BBR: sysctl -w {CONTROL}=bbr (or TCP_CONGESTION in the program)"
    assert host["lasting"] == f"/etc/sysctl.d/90-cwndtrace.conf with the line {CONTROL} = bbr"
    assert both["action"].endswith(
        "(or TCP_CONGESTION in the program); in a container this is refused unless "
        "net.ipv4.tcp_allowed_congestion_control lists bbr, which only the host can change"
    )
    assert both["command"] == f"sysctl -w {CONTROL}=bbr; nsenter -t 200 -n sysctl -w {CONTROL}=bbr"
    assert both["lasting"].startswith(host["lasting"])
    assert both["lasting"].endswith(
        "; on the host, net.ipv4.tcp_allowed_congestion_control = its present value and bbr"
    )


def test_a_setting_that_was_made_is_told_with_its_namespaces() -> None:
    ended = {inode: {tcp.IDLE_SYSCTL: 0} for inode in OTHERS}
    row = told("sysctl_done", OTHERS[:2], sysctls_end=ended)
    assert row["action"] == f"{SYSCTL} was set to 0 in nginx[200], nginx[300] during the capture"
    assert in_words.remedy(row) == (
        f"{row['action']}: nothing is left to do about the 426 ms (measured) on 2 connections that resets cost before."
    )
    row = told("sysctl_done", OTHERS[::-1], sysctls=SPACES | {"6": space("", idle=0)}, sysctls_end=ended)
    names = "network namespace 6, nginx[500], nginx[400], and for 2 more namespaces"
    assert row["action"] == f"{SYSCTL} is 0 in {names}, by the last that the capture knows"


# ---- an initial window, pings, a disk, and what is left -------------------------------------------------


def routes(number: int, netns: str = HOST) -> tuple[Route, ...]:
    return tuple(Route(netns, 3, f"10.2.0.{n}") for n in range(1, number + 1))


def route_command(peer: str, segments: int, inside: str = "") -> str:
    return f"{inside}ip route change $({inside}ip route get fibmatch {peer}) initcwnd {segments}"


def test_an_initial_window_is_set_on_the_first_routes() -> None:
    row = told("initcwnd", InitialWindow(64, routes(5), 1))
    shown = [route_command(f"10.2.0.{n}", 64) for n in (1, 2, 3)]
    assert row["command"] == "; ".join(shown)
    assert row["action"] == (
        f"{'; '.join(shown)}; and for 2 more routes; the inner command prints the route with all that it keeps; how "
        "much waited after 1 other reset isn't known"
    )
    assert row["why_risk"] == "new connections also begin with 64 segments at once"
    assert row["lasting"].startswith(
        "in the network configuration of the distribution: InitialCongestionWindow=64 in the [Route] section of "
        "systemd-networkd, which netplan writes for congestion-window: 64 on a route; initcwnd=64 among the attributes "
    )
    wide = told("initcwnd", InitialWindow(65, routes(1), 0))
    assert wide["why_risk"] == "new connections also begin with 65 segments at once, far more than usual"
    assert wide["action"].endswith("; the inner command prints the route with all that it keeps")


@pytest.mark.parametrize(("segments", "takes"), [(1023, True), (1024, False)])
def test_networkd_has_a_largest_initial_window(segments: int, takes: bool) -> None:
    lasting = told("initcwnd", InitialWindow(segments, routes(1), 0))["lasting"]
    assert (f"InitialCongestionWindow={segments} in" in lasting) is takes
    assert ("(systemd-networkd's InitialCongestionWindow= takes at most 1023)" in lasting) is not takes


def test_the_interface_of_a_route_is_named_where_the_capture_was_made() -> None:
    this = told("initcwnd", InitialWindow(20, routes(1), 0), sysctls={HOST: space("this")})
    assert this["action"].startswith(f"{route_command('10.2.0.1', 20)} (through eth0); ")
    other = told("initcwnd", InitialWindow(20, routes(1, "2"), 0))
    assert other["action"].startswith(f"{route_command('10.2.0.1', 20, 'nsenter -t 200 -n ')}; the inner")
    nowhere = told("initcwnd", InitialWindow(20, routes(1, "9"), 0))
    assert nowhere["action"].startswith(f"in network namespace 9: {route_command('10.2.0.1', 20)}; ")
    assert nowhere["command"] == ""


@pytest.mark.parametrize(("number", "others"), [(1, ""), (2, " and 1 other"), (3, " and 2 others")])
def test_an_initial_window_that_no_record_tells_has_no_command(number: int, others: str) -> None:
    row = told("initcwnd", InitialWindow(None, routes(number), 0))
    assert row["action"] == (
        f"a larger initcwnd on the route to 10.2.0.1{others} might help, but how large can't be told, because the "
        "capture doesn't say how much data waited for the window"
    )
    assert row["command"] == row["lasting"] == ""


@pytest.mark.parametrize(
    ("http", "disk", "without"),
    [
        (0, 0, ""),
        (1, 0, " (1 connection of what is one by its port or name left out)"),
        (0, 2, " (2 connections whose sender waits for a disk left out)"),
        (1, 2, " (1 connection of what is one by its port or name and 2 connections whose sender waits for a disk left "
         "out)"),
    ],
)  # fmt: skip
def test_a_ping_leaves_out_who_can_not_send_one(http: int, disk: int, without: str) -> None:
    assert told("ping", Ping(240_000, 300_000, http, disk))["action"] == (
        "if the protocol allows it, have the application send a small message at least every 240 ms while it is idle "
        "(the shortest RTO was 300 ms; TCP keepalive carries no data and doesn't count); an HTTP/1 server "
        f"can't{without}"
    )


def test_a_disk_is_named_with_who_waits_for_it() -> None:
    row = told("disk", SlowDisk("s da", "postgres", 2_100_000, 1, 2))
    assert row["command"] == "iostat -x 1 's da'"
    assert row["action"] == (
        "make postgres wait less for s da: it waited 2.10 s for 1 request before 2 harmful resets (read ahead, cache "
        "more, or look for what else keeps it busy)"
    )
    unnamed = told("disk", SlowDisk("", "", 2_100_000, 3, 1))
    assert unnamed["command"] == ""
    assert unnamed["action"].startswith(
        "make the sender wait less for the disk: it waited 2.10 s for 3 requests before"
    )


@pytest.mark.parametrize(
    ("why", "line"),
    [
        ("none", "Nothing to do: no reset was harmful."),
        ("unseen", "Trace again while connections are open, with a filter that lets them through: none was seen."),
        ("other_end",
         "Trace at the other end too, because some connections mostly receive, and their senders are there."),
        ("unknown", "Trace again for longer, because the records of some connections can't tell."),
    ],
)  # fmt: skip
def test_without_a_remedy_it_is_said_what_to_do_next(why: str, line: str) -> None:
    assert in_words.remedy(told("nothing", why)) == line
    lacking = told("nothing", why, lacking="one part is gone")
    assert in_words.remedy(lacking) == "Trace again, or get the whole capture, because one part is gone."


def test_a_remedy_is_a_line_with_its_saving_and_its_risk() -> None:
    row = told("receiver_window")
    assert in_words.remedy(row) == (
        "let the receiver offer more (net.ipv4.tcp_rmem there, or its SO_RCVBUF): saves 426 ms (measured) on 2 "
        "connections. Risk low: more memory on every such connection."
    )
    assert in_words.remedy(told("send_buffer") | {"saves_us": math.nan, "connections": 1}) == (
        "let the sender buffer more (net.ipv4.tcp_wmem, or the program's SO_SNDBUF): the records can't tell what it "
        "saves on 1 connection. Risk low: more memory on every such connection."
    )
    loss = told("loss")
    assert loss["why_risk"] == "none"
    assert loss["action"].startswith("look for packet loss on the path")
