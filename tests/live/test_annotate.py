# SPDX-License-Identifier: Apache-2.0
"""Tests of comments in files that tcpdump and dumpcap wrote at the same time: tshark sees one for each reset.

The frame of each is computed from tshark's fields alone: the first one with data that the connection sent after its
idle time.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import cwndtrace
from tests.harness import tcp
from tests.harness.command import Done, Running, call
from tests.harness.link import VethLink
from tests.harness.sniffer import LAST, Sniffer, fields, need
from tests.harness.tcp import Connect

pytestmark = pytest.mark.live

FIELDS = ("frame.number", "frame.time_epoch", "tcp.srcport", "tcp.dstport", "tcp.len", "tcp.seq_raw", "frame.comment")


def bursts(connections: list[tcp.TcpConnection], times: int = 3) -> None:
    """Let the connections send with idle time in between."""
    for _ in range(times):
        for connection in connections:
            connection.grow()
        for connection in connections:
            connection.idle(tcp.IDLE_S)
            connection.send()
    for connection in connections:
        connection.sock.send(LAST)


def data_frames(frames: list[dict[str, Any]], sport: int, dport: int) -> list[dict[str, Any]]:
    ports = {"tcp.srcport": str(sport), "tcp.dstport": str(dport)}
    return [f for f in frames if ports.items() <= f.items() and f["tcp.len"] not in ("", "0")]


def first_after_idle(frames: list[dict[str, Any]], reset: Any) -> dict[str, Any]:
    """Return the frame of a reset by tshark: the first with data after at least its idle time without any."""
    sent = data_frames(frames, reset["sport"], reset["dport"])
    at = reset["time"].timestamp()
    found = [
        later
        for earlier, later in pairwise(sent)
        # The idle time ends within this gap; the kernel tells it to one jiffy, 10 ms at most.
        if float(later["frame.time_epoch"]) - float(earlier["frame.time_epoch"]) >= reset["idle_us"] / 1e6 - 0.011
        and abs(float(later["frame.time_epoch"]) - at) < 0.05
    ]
    assert len(found) == 1, (reset, found)
    return found[0]


def annotate(capture: Path, packets: Path, output: Path) -> Done:
    done = call("export", capture, "--annotate", packets, "-o", output)
    assert done.returncode == 0, done.stderr
    return done


def check(capture: Path, output: Path, said: str) -> pd.DataFrame:
    """Assert that each idle reset comments exactly the frame that is its first after the idle time."""
    resets = cwndtrace.load(capture).verdicts
    assert set(resets["reason"]) == {"idle"}
    frames = fields(output, *FIELDS)
    commented = {frame["frame.number"]: frame["frame.comment"] for frame in frames if frame["frame.comment"]}
    expected = {first_after_idle(frames, reset)["frame.number"]: reset for reset in resets.to_dict("records")}
    assert len(expected) == len(resets)
    assert commented.keys() == expected.keys()
    for number, text in commented.items():
        reset = expected[number]
        assert text.startswith(f"cwndtrace: idle reset, cwnd {reset['cwnd_before']} -> {reset['cwnd_after']} segments")
    assert f"a comment for {len(resets)} of {len(resets)} resets" in said
    frames_late = [
        float(first_after_idle(frames, reset)["frame.time_epoch"]) - reset["time"].timestamp()
        for reset in expected.values()
    ]
    print(f"packets after their resets, us: {sorted(round(late * 1e6) for late in frames_late)}")
    return resets


def traced(space: tcp.Space, tmp_path: Path) -> Running:
    return Running("-n", space.name, "-o", tmp_path / "a.cwnd")


@pytest.mark.parametrize("program", ["tcpdump", "dumpcap"])
def test_each_reset_comments_the_first_frame_after_its_idle_time(
    space: tcp.Space, connect: Connect, tmp_path: Path, program: str
) -> None:
    need("tshark")
    with Sniffer(space, tmp_path / "in.pcap", program) as sniffer:
        running = traced(space, tmp_path)
        kinds: tuple[dict[str, Any], ...] = (
            {},
            {"address": "::1", "from_server": True},
            {"mapped": True, "ca": "reno"},
        )
        connections = [connect(**kind) for kind in kinds]
        bursts(connections)
        packets = sniffer.end()
        assert running.end()[0] == 0
    done = annotate(tmp_path / "a.cwnd", packets, tmp_path / "out.pcapng")
    resets = check(tmp_path / "a.cwnd", tmp_path / "out.pcapng", done.stderr)
    assert len(resets) >= 3 * len(connections)
    assert ("classic pcap" in done.stderr) == (program == "tcpdump")
    without = [{k: v for k, v in f.items() if k != "frame.comment"} for f in fields(tmp_path / "out.pcapng", *FIELDS)]
    assert without == [{k: v for k, v in f.items() if k != "frame.comment"} for f in fields(packets, *FIELDS)]


@pytest.fixture(scope="module")
def link(make_space: Callable[[], tcp.Space]) -> VethLink:
    return VethLink(make_space)


def test_both_ends_of_a_link_in_one_file(link: VethLink, connect: Connect, tmp_path: Path) -> None:
    """Each packet is in the file twice, as it left one namespace and as it came into the other."""
    need("mergecap", "tshark")
    with (
        Sniffer(link.a, tmp_path / "a.pcap", device="any") as here,
        Sniffer(link.b, tmp_path / "b.pcap", device="any") as there,
    ):
        running = traced(link.a, tmp_path)
        connections = [connect(link.a, to=link.b, address="10.9.0.2", device="cwt0", ca=ca) for ca in ("cubic", "reno")]
        bursts(connections)
        files = here.end(), there.end()
        assert running.end()[0] == 0
    both = tmp_path / "both.pcapng"
    subprocess.run(["mergecap", "-w", both, *files], check=True)
    done = annotate(tmp_path / "a.cwnd", both, tmp_path / "out.pcapng")
    resets = cwndtrace.load(tmp_path / "a.cwnd").verdicts
    frames = fields(tmp_path / "out.pcapng", *FIELDS, "sll.pkttype")
    commented = [frame for frame in frames if frame["frame.comment"]]
    assert len(commented) == len(resets) >= 6
    assert f"a comment for {len(resets)} of {len(resets)} resets" in done.stderr
    # Those that left are the earlier ones of the two copies.
    left = [frame for frame in frames if frame["sll.pkttype"] == "4"]
    assert {f["frame.number"] for f in commented} == {
        first_after_idle(left, reset)["frame.number"] for reset in resets.to_dict("records")
    }


def test_a_timeout_comments_what_is_sent_again(link: VethLink, connect: Connect, tmp_path: Path) -> None:
    """A tail loss probe sends the same segment before the timeout does, and isn't the packet after the reset."""
    need("tshark")
    with Sniffer(link.a, tmp_path / "in.pcap", device="cwt0") as sniffer:
        running = traced(link.a, tmp_path)
        connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0")
        connection.grow()
        with link.cut():
            before = link.timeouts()
            connection.sock.send(b"x" * 100)
            tcp.until(lambda: link.timeouts() > before, 20, "a retransmission timeout")
        connection.quiet()
        connection.sock.send(LAST)
        packets = sniffer.end()
        assert running.end()[0] == 0
    annotate(tmp_path / "a.cwnd", packets, tmp_path / "out.pcapng")
    resets = cwndtrace.load(tmp_path / "a.cwnd").verdicts
    (reset,) = resets[resets["reason"] == "rto_loss"].to_dict("records")
    frames = fields(tmp_path / "out.pcapng", *FIELDS, "tcp.analysis.retransmission")
    (commented,) = [frame for frame in frames if "rto_loss reset" in frame["frame.comment"]]
    again = [frame for frame in frames if frame["tcp.analysis.retransmission"]]
    late = [frame for frame in again if float(frame["frame.time_epoch"]) > reset["time"].timestamp() - 1e-4]
    assert commented == late[0]
