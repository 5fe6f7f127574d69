# SPDX-License-Identifier: Apache-2.0
"""Comments in files of packets: on the right packet, with all other bytes as they were, whatever the file is."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import CookedLinux, CookedLinuxV2, Dot1AD, Dot1Q, Ether, Loopback
from scapy.utils import RawPcapNgReader

import cwndtrace
from cwndtrace.cli import main
from cwndtrace.export import annotate, pcapng
from cwndtrace.export.pcapng import Damaged
from cwndtrace.export.segment import segment as parsed
from cwndtrace.trace import Trace
from tests.unit import frames
from tests.unit import packet_files as made
from tests.unit.examples import MANY
from tests.unit.packet_files import commented, interface, packet, section, segment, ticks

LINKS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "Ethernet": (1, lambda ip: Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / ip),
    "VLAN": (1, lambda ip: Ether(dst="02:00:00:00:00:02") / Dot1Q(vlan=7) / ip),
    "two VLANs": (1, lambda ip: Ether(dst="02:00:00:00:00:02") / Dot1AD(vlan=3) / Dot1Q(vlan=7) / ip),
    "cooked": (113, lambda ip: CookedLinux(pkttype=4) / ip),
    "cooked 2": (276, lambda ip: CookedLinuxV2(ifindex=3) / ip),
    "raw": (101, lambda ip: ip),
    "IPv4": (228, lambda ip: ip),
    "loopback": (0, lambda ip: Loopback() / ip),
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A capture with one idle reset, 5 s after its start, of a round trip of 107 ms. No test changes it."""
    return captured(tmp_path_factory.mktemp("trace"), frames.reset(5))


def captured(folder: Path, *resets: Any, **values: Any) -> Trace:
    return frames.capture(folder / "a.cwnd", resets=frames.table("cwnd_reset", *resets), **values)


def annotated(trace: Trace, raw: bytes) -> tuple[bytes, annotate.Annotations]:
    """Return a file with comments, and what was found."""
    file, output = io.BytesIO(raw), io.BytesIO()
    found = annotate.find(file, trace.verdicts, trace.about)
    annotate.copy(file, found, output)
    return output.getvalue(), found


def comment_of(trace: Trace, row: int = 0) -> str:
    return annotate.comment(trace.verdicts.loc[row].to_dict())


def by_scapy(raw: bytes) -> list[tuple[bytes, Any]]:
    """Return the bytes of each packet, and what its block says, as scapy reads them."""
    reader: Any = RawPcapNgReader
    return [*reader(io.BytesIO(raw))]


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.fixture
def loaded(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Let the command take this capture with its verdicts, so that they aren't computed again for each file."""
    monkeypatch.setattr(cwndtrace, "load", lambda *_, **__: trace)
    return trace


TALK = (
    (3.0, segment(1000, 1000)),
    (3.1, segment(1, 0, reply=True, ack=2000)),
    (4.0, segment(1999, 0)),
    (5.00002, segment(2000, 0)),
    (5.00003, segment(2000, 1000)),
    (5.00004, segment(3000, 1000)),
    (5.2, segment(1, 0, reply=True, ack=4000)),
)
"""A burst, its ACK, a keepalive, and after the reset an ACK and the next burst, whose first packet is ``FIRST``."""
FIRST = 4


def talk(
    order: str = "<",
    link: str = "Ethernet",
    extra: tuple[made.Option, ...] = (),
    per_second: int = 1_000_000,
    old: bool = False,
) -> list[bytes]:
    """Return the blocks of the packets of TALK."""
    wrap = LINKS[link][1]
    return [packet(order, ticks(at, per_second), bytes(wrap(ip)), *extra, old=old) for at, ip in TALK]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_first_packet_with_data_gets_the_comment(trace: Trace, link: str, order: str) -> None:
    head, blocks = [section(order), interface(order, LINKS[link][0])], talk(order, link)
    output, found = annotated(trace, b"".join(head + blocks))
    length = len(bytes(LINKS[link][1](TALK[FIRST][1])))
    blocks[FIRST] = commented(order, blocks[FIRST], comment_of(trace), length)
    assert output == b"".join(head + blocks)
    assert found.comments.keys() == {2 + FIRST}
    assert not +found.left
    comments = [about.comments for _, about in by_scapy(output)]
    assert [n for n, comment in enumerate(comments) if comment] == [FIRST]
    assert comments[FIRST] == [comment_of(trace).encode()]


def test_the_comment_says_what_is_known(trace: Trace) -> None:
    text = comment_of(trace)
    assert text.startswith("cwndtrace: idle reset, cwnd 2827 -> 44 segments after 2.10 s of idle time (RTO 308 ms)")
    assert "ssthresh inf -> 2120 (in segments), srtt 107 ms" in text
    assert text.count("(estimated)") <= 1


@pytest.mark.parametrize("old", [False, True])
def test_options_and_other_blocks_stay(trace: Trace, old: bool) -> None:
    extra: tuple[made.Option, ...] = ((1, b"mine"), (2, bytes(4)), (2988, b"\0\1\2\3custom"))
    head = [section("<", -1, (4, b"a program"), (2989, b"xy")), interface("<", 1, (2, b"eth0"), (9, b"\x06"))]
    secret = struct.pack("<II", 0x5A4E4B4B, 8) + b"a secret"
    kinds = ((4, b"name resolution "), (5, bytes(12)), (10, secret), (0xBAD, b"own block..."), (0x40000BAD, b""))
    others = [made.block("<", kind, body) for kind, body in kinds]
    blocks = talk("<", extra=extra, old=old)
    output, _ = annotated(trace, b"".join([*head, *others, *blocks, *others]))
    blocks[FIRST] = commented("<", blocks[FIRST], comment_of(trace), len(bytes(LINKS["Ethernet"][1](TALK[FIRST][1]))))
    assert output == b"".join([*head, *others, *blocks, *others])
    if not old:
        comments = [about.comments for _, about in by_scapy(output) if about.comments]
        assert comments[FIRST] == [comment_of(trace).encode(), b"mine"]


@pytest.mark.parametrize(
    ("given", "per_second", "offset_s"),
    [
        (((9, b"\x06"),), 10**6, 0),
        (((9, b"\x09"),), 10**9, 0),
        (((9, b"\x9e"),), 2**30, 0),
        (((9, b"\x09"), (14, struct.pack(">q", 1_000_000_000))), 10**9, 1_000_000_000),
        (((14, struct.pack(">q", -3600)),), 10**6, -3600),
    ],
)
def test_clocks_of_interfaces(trace: Trace, given: Any, per_second: int, offset_s: int) -> None:
    head = section(">") + interface(">", 1, *given)
    back = offset_s * per_second
    blocks = [packet(">", ticks(at, per_second) - back, bytes(Ether() / ip)) for at, ip in TALK]
    _, found = annotated(trace, head + b"".join(blocks))
    assert found.comments.keys() == {2 + FIRST}


def test_sections_have_their_own_order_interfaces_and_length(tmp_path: Path) -> None:
    trace = captured(tmp_path, frames.reset(5), frames.reset(15))
    first = [interface("<", 101), *talk("<", "raw")]
    later = [packet(">", ticks(at + 10), bytes(LINKS["cooked"][1](ip)), number=1) for at, ip in TALK]
    second = [interface(">", 147), interface(">", 113), *later]
    lengths = [len(b"".join(blocks)) for blocks in (first, second)]
    output, found = annotated(
        trace, section("<", lengths[0]) + b"".join(first) + section(">", lengths[1]) + b"".join(second)
    )
    assert len(found.comments) == 2
    first[1 + FIRST] = commented("<", first[1 + FIRST], comment_of(trace, 0), len(bytes(TALK[FIRST][1])))
    second[2 + FIRST] = commented(">", second[2 + FIRST], comment_of(trace, 1), 16 + len(bytes(TALK[FIRST][1])))
    grown = [len(b"".join(blocks)) for blocks in (first, second)]
    assert output == section("<", grown[0]) + b"".join(first) + section(">", grown[1]) + b"".join(second)


def test_files_one_after_the_other_have_many_interfaces(trace: Trace) -> None:
    """Each section has its own, and the packet may be in the last one."""
    one = section() + interface()
    before = [one + packet("<", ticks(3 + n / 100), bytes(Ether() / segment(1000, 1000))) for n in range(70)]
    _, found = annotated(trace, b"".join([*before, one, *talk()]))
    assert found.comments.keys() == {3 * 70 + 2 + FIRST}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("per_second", [10**6, 10**9])
def test_classic_pcap_becomes_pcapng(trace: Trace, order: str, per_second: int) -> None:
    packets = [(at, bytes(Ether() / ip)) for at, ip in TALK]
    output, _ = annotated(trace, made.classic(order, per_second, 1, packets))
    found = by_scapy(output)
    assert [data for data, _ in found] == [data for _, data in packets]
    assert [(a.tshigh << 32 | a.tslow, a.tsresol) for _, a in found] == [
        (ticks(at, per_second), per_second) for at, _ in packets
    ]
    assert [n for n, (_, about) in enumerate(found) if about.comments] == [FIRST]


@pytest.mark.parametrize(
    "ends",
    [
        {},
        {"saddr": "2001:db8::1", "daddr": "2001:db8::2"},
        {"saddr": "::ffff:10.1.0.1", "daddr": "::ffff:10.2.0.9", "family": 2},
    ],
)
def test_addresses(tmp_path: Path, ends: dict[str, Any]) -> None:
    trace = captured(tmp_path, frames.reset(5, **ends))
    plain = {n: v.removeprefix("::ffff:") for n, v in ends.items() if n != "family"}
    wrong = segment(7, 1000, **{n: v[:-1] + "7" for n, v in plain.items()} or {"saddr": "10.1.0.7"})
    blocks = [packet("<", ticks(4), bytes(wrong)), packet("<", ticks(5.00001), bytes(wrong))]
    blocks += [packet("<", ticks(5.00002), bytes(segment(7, 9, reply=True, ack=7, **plain)))]
    blocks += [packet("<", ticks(5.00003), bytes(segment(7, 1000, ack=10, **plain)))]
    _, found = annotated(trace, section() + interface("<", 101) + b"".join(blocks))
    assert found.comments.keys() == {5}


@pytest.mark.parametrize(
    "headers",
    [(), (IPv6ExtHdrHopByHop(),), (IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrFragment(offset=0))],
)
def test_headers_before_tcp_are_skipped(headers: tuple[Any, ...]) -> None:
    data: Any = IPv6(src="2001:db8::1", dst="2001:db8::2")
    for header in headers:
        data = data / header
    data = bytes(data / TCP(sport=1, dport=2, seq=7, options=[("Timestamp", (1, 2))]) / b"12345")
    found = parsed(101, data, len(data))
    assert found is not None
    assert (found.seq, found.payload) == (7, 5)
    assert parsed(101, data[: len(data) - 25], len(data)) is None


def test_what_is_not_a_segment_is_left_alone() -> None:
    whole = bytes(Ether() / IP(frag=3) / (b"x" * 40))
    for link in (1, 113, 276, 101, 0, 999):
        for end in range(len(whole)):
            assert parsed(link, whole[:end], len(whole)) is None
    assert parsed(101, bytes(IPv6() / IPv6ExtHdrFragment(offset=9) / TCP()), 80) is None


CASES: dict[str, list[tuple[float, Any]]] = {
    "before": [(5.1, segment(2000, 10)), (9, segment(2010, 10))],
    "after": [(1, segment(2000, 10)), (2, segment(2010, 10))],
    "connection": [(1, segment(2000, 10, sport=1)), (5.01, segment(1, 10, sport=1)), (9, segment(5, 10, sport=1))],
    "packet": [(1, segment(2000, 10)), (5.001, segment(2010, 0)), (5.2, segment(2010, 10))],
    "gap": [(1, segment(2000, 10)), (1.1, segment(1, 0, reply=True, ack=2010)), (5.001, segment(3458, 10))],
}


@pytest.mark.parametrize("why", CASES)
def test_a_reset_without_its_packet_is_left_out(tmp_path: Path, loaded: Trace, why: str) -> None:
    raw = section() + interface() + b"".join(packet("<", ticks(at), bytes(Ether() / ip)) for at, ip in CASES[why])
    output, found = annotated(loaded, raw)
    assert output == raw
    assert +found.left == {why: 1}
    (tmp_path / "in.pcapng").write_bytes(raw)
    done = export(loaded.path, "--annotate", tmp_path / "in.pcapng", "-o", tmp_path / "out.pcapng")
    assert "a comment for 0 of 1 reset, each on" in done.stderr
    assert f"1 reset without one {annotate.WHY[why]}." in done.stderr


def test_a_timeout_is_known_by_the_number_that_is_sent_again(tmp_path: Path) -> None:
    trace = captured(tmp_path, frames.reset(5, reason="rto_loss"), recoveries=frames.table("cwnd_recovery"))
    before = [(4.6, segment(1, 0, reply=True, ack=2000)), (4.7, segment(2000, 1000)), (4.9, segment(3000, 1000))]
    for seq, expected in ((2000, {5}), (4000, set())):
        packets = [*before, (5.0001, segment(seq, 1000))]
        raw = section() + interface() + b"".join(packet("<", ticks(at), bytes(Ether() / ip)) for at, ip in packets)
        _, found = annotated(trace, raw)
        assert found.comments.keys() == expected


@pytest.mark.parametrize(
    ("late_us", "seq", "why"),
    [(-20, 2000, "near"), (20, 2000, "near"), (300, 2000, ""), (300, 1500, ""), (300, 2100, "gap")],
)
def test_a_packet_at_the_moment_of_an_unused_window_is_left_alone(
    tmp_path: Path, late_us: int, seq: int, why: str
) -> None:
    """The window falls right after a packet was sent, and the next one may follow at once."""
    trace = captured(tmp_path, frames.reset(5, reason="app_limited"), recoveries=frames.table("cwnd_recovery"))
    packets = [
        (4.0, segment(1, 0, reply=True, ack=1500)),
        (4.5, segment(1500, 500)),
        (5 + late_us / 1e6, segment(seq, 9)),
    ]
    raw = section() + interface() + b"".join(packet("<", ticks(at), bytes(Ether() / ip)) for at, ip in packets)
    _, found = annotated(trace, raw)
    assert +found.left == ({why: 1} if why else {})


def on_two(first: list[tuple[float, Any]], second: list[tuple[float, Any]], *names: bytes) -> bytes:
    """Return a file of packets on two interfaces."""
    raw = section() + b"".join(interface("<", 1, (2, name)) for name in names)
    both = sorted([(at, 0, ip) for at, ip in first] + [(at, 1, ip) for at, ip in second], key=lambda each: each[:2])
    return raw + b"".join(packet("<", ticks(at), bytes(Ether() / ip), number=n) for at, n, ip in both)


def test_copies_of_one_packet_get_one_comment(trace: Trace) -> None:
    copies = [(at + 5e-6, ip) for at, ip in TALK]
    _, found = annotated(trace, on_two([*TALK], copies, b"veth1", b"br0"))
    assert found.comments.keys() == {3 + 2 * FIRST}
    assert not +found.left


def test_two_namespaces_with_the_same_addresses(tmp_path: Path) -> None:
    """Their packets can't be told apart but by the name of an interface of cwndtrace's own namespace."""
    other = [(at + 2e-6, segment(ip[TCP].seq + 70_000, len(ip[TCP].payload))) for at, ip in TALK if IP in ip]
    for names, written in (((b"veth0", b"veth1"), 0), ((b"veth0", b"eth0"), 1)):
        folder = tmp_path / names[1].decode()
        folder.mkdir()
        trace = captured(folder, frames.reset(5), frames.reset(5, netns_ino=7, sock_cookie=9))
        output, found = annotated(trace, on_two([*TALK], other, *names))
        assert len(found.comments) == written
        assert +found.left == {"several": 2 - written}
        assert [comment_of(trace)] * written == [*found.comments.values()]
        if written:
            (number,) = found.comments
            block = [*pcapng.blocks(io.BytesIO(output))][number]
            assert pcapng.packet(block).interface == 1


def test_packets_that_name_their_interface_tell_namespaces_apart(tmp_path: Path) -> None:
    """A capture of ``any`` has one interface, and the second kind of cooked packets has the number of the real one."""
    other = [(at + 2e-6, segment(ip[TCP].seq + 70_000, len(ip[TCP].payload))) for at, ip in TALK]
    both = sorted([(at, 7, ip) for at, ip in other] + [(at, 3, ip) for at, ip in TALK], key=lambda each: each[:2])
    raw = [packet("<", ticks(at), bytes(CookedLinuxV2(ifindex=index) / ip)) for at, index, ip in both]
    trace = captured(tmp_path, frames.reset(5), frames.reset(5, netns_ino=7, sock_cookie=9))
    _, found = annotated(trace, section() + interface("<", 276, (2, b"any")) + b"".join(raw))
    assert found.comments == {2 + 2 * FIRST: comment_of(trace)}
    assert +found.left == {"several": 1}


def test_a_burst_belongs_to_the_last_reset_before_it(tmp_path: Path) -> None:
    trace = captured(tmp_path, frames.reset(4.95), frames.reset(5))
    raw = section() + interface() + b"".join(talk())
    _, found = annotated(trace, raw)
    assert [*found.comments.values()] == [comment_of(trace, 1)]
    assert +found.left == {"packet": 1}


@pytest.mark.parametrize("name", ["in.pcapng", "in.pcapng.gz"])
def test_the_command(tmp_path: Path, trace: Trace, name: str) -> None:
    raw = section() + interface() + interface("<", 147) + b"".join(talk())
    raw += packet("<", ticks(6), b"user", number=1) + made.block("<", 3, struct.pack("<I", 4) + b"data")
    source = tmp_path / name
    source.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    done = export(trace.path, "--annotate", source, "-o", tmp_path / "out.pcapng")
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    assert lines[0].endswith("out.pcapng has a comment for 1 of 1 reset, each on the first packet after it.")
    assert lines[1:3] == [
        "1 packet only copied: links of type 147 aren't understood.",
        "1 packet only copied: simple packet blocks have no time.",
    ]
    assert (tmp_path / "out.pcapng").read_bytes() == annotated(trace, raw)[0]
    assert (tmp_path / "out.pcapng").stat().st_mode & 0o777 == 0o600
    export(trace.path, "--annotate", source, "-o", tmp_path / "out.pcapng.gz")
    assert gzip.decompress((tmp_path / "out.pcapng.gz").read_bytes()) == annotated(trace, raw)[0]


def test_it_never_writes_onto_its_input(tmp_path: Path, trace: Trace) -> None:
    source = tmp_path / "in.pcapng"
    source.write_bytes(section() + interface() + b"".join(talk()))
    os.link(source, tmp_path / "same.pcapng")
    before = source.read_bytes()
    for target in (source, tmp_path / "same.pcapng", tmp_path / "." / "in.pcapng", trace.path / "meta.json"):
        done = export(trace.path, "--annotate", source, "-o", target)
        assert done.exit_code == 2, done.output
    assert source.read_bytes() == before


CLASSIC = made.classic(">", 10**9, 113, [(at, bytes(CookedLinux() / ip)) for at, ip in TALK])
WHOLE = section() + interface("<", 1, (2, b"eth0")) + b"".join(talk())


@pytest.mark.quick(6)
@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "at byte 0 it begins neither as pcapng nor as pcap"),
        (b"PK\3\4 an archive", "at byte 0 it begins neither as pcapng nor as pcap"),
        (WHOLE + b"\6\0\0\0", f"at byte {len(WHOLE):,} the file ends inside a block"),
        (WHOLE[:-30], "and the file ends inside it"),
        (
            WHOLE + struct.pack("<III", 6, 2**32 - 4, 0),
            f"at byte {len(WHOLE):,} a block claims to have 4,294,967,292 by",
        ),
        (WHOLE + struct.pack("<III", 6, 8, 0), "a block claims to have 8 bytes"),
        (WHOLE + struct.pack("<III", 6, 13, 0) + b"x", "a block claims to have 13 bytes"),
        (WHOLE[:-4] + b"\1\0\0\0", "the two lengths of a block differ"),
        (b"\n\r\r\n" + bytes(24), "a section has no valid byte order"),
        (section()[:12] + b"\2" + section()[13:], "a section isn't of version 1"),
        (WHOLE + made.block("<", 6, bytes(16)), "a packet's block is too short"),
        (WHOLE + made.block("<", 1, bytes(4)), "the description of an interface is too short"),
        (WHOLE + interface("<", 1, (2, b"x"))[:16] + b"\2\0\xff\0", "and the file ends inside it"),
        (WHOLE + made.block("<", 1, bytes(8) + b"\2\0\xff\0"), "an option claims to have 255 bytes"),
        (WHOLE + packet("<", 0, b"", number=9), "a packet is of interface 9, which isn't described"),
        (WHOLE + made.block("<", 6, struct.pack("<5I", 0, 0, 0, 2**32 - 1, 4)), "a packet claims to have 4,294,967,29"),
        (section() + interface() * 65_537, "a section has more than 65,536 interfaces"),
        (made.classic("<", 10**6, 1, [])[:23], "the file ends inside its head"),
        (made.classic("<", 10**6, 1, []) + bytes(15), "at byte 24 the file ends inside a packet's head"),
        (made.classic("<", 10**6, 1, []) + struct.pack("<4I", 0, 0, 2**32 - 1, 1), "a packet claims to have 4,294,967"),
        (made.classic("<", 10**6, 1, []) + struct.pack("<4I", 0, 0, 9, 9) + b"x", "and the file ends inside it"),
        (gzip.compress(WHOLE)[:-20], "its compression is damaged"),
        (gzip.compress(WHOLE)[:-8] + bytes(8), "its compression is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_refused(tmp_path: Path, loaded: Trace, raw: bytes, said: str) -> None:
    (tmp_path / "in.pcapng").write_bytes(raw)
    tracemalloc.start()
    done = export(loaded.path, "--annotate", tmp_path / "in.pcapng", "-o", tmp_path / "out.pcapng")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.exit_code == 1, done.output
    assert said in done.stderr
    assert "can't be read: " in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) == 2
    assert not (tmp_path / "out.pcapng").exists()
    assert peak < 100e6


Changes = list[tuple[int, int]]


def changed(raw: bytes, changes: Changes, cut: int) -> bytes:
    """Return bytes with other values at some places, without the last ``cut`` ones."""
    out = bytearray(raw)
    for at, value in changes:
        out[at] = value
    return bytes(out[: len(out) - cut])


@MANY
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(WHOLE)))
def test_a_changed_file_is_copied_or_refused(trace: Trace, changes: Changes, cut: int) -> None:
    raw = changed(WHOLE, changes, cut)
    try:
        output, found = annotated(trace, raw)
    except Damaged:
        return
    if not found.comments:
        assert output == raw
    assert len(found.comments) + found.left.total() == 1


@MANY
@given(st.lists(st.tuples(st.integers(0, len(CLASSIC) - 1), st.integers(0, 255)), max_size=4), st.integers(0, 200))
def test_a_changed_classic_file_is_converted_or_refused(trace: Trace, changes: Changes, cut: int) -> None:
    try:
        output, found = annotated(trace, changed(CLASSIC, changes, cut))
    except Damaged:
        return
    assert len(found.comments) + found.left.total() == 1
    # What comes out is sound, and has all packets.
    assert len([*pcapng.blocks(io.BytesIO(output))]) == found.blocks


def test_a_file_that_grows_or_shrinks_meanwhile(trace: Trace) -> None:
    found = annotate.find(io.BytesIO(WHOLE), trace.verdicts, trace.about)
    output = io.BytesIO()
    annotate.copy(io.BytesIO(WHOLE + WHOLE), found, output)
    assert output.getvalue() == annotated(trace, WHOLE)[0]
    with pytest.raises(Damaged, match="isn't what it was"):
        annotate.copy(io.BytesIO(section()), found, io.BytesIO())


def test_times_that_make_no_sense_are_no_times_of_resets(trace: Trace) -> None:
    for option in ((9, b"\xff"), (9, b"\x7f"), (14, struct.pack("<q", -(2**63)))):
        raw = section() + interface("<", 1, option) + b"".join(talk())
        assert annotated(trace, raw)[0] == raw


@pytest.mark.slow
def test_the_description_of_an_interface_takes_little_memory() -> None:
    """It may have 16 MB and compress to a few kB, and a section may have 65,536 of them. This one has 0.3 MB."""
    many = struct.pack("<HH", 5, 0) * (1 << 16) + struct.pack("<HH", 2, 65_532) + b"x" * 65_532
    block = pcapng.Block(0, pcapng.INTERFACE, "<", bytes(8) + many)
    tracemalloc.start()
    name = pcapng.interface(block).name
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert name == "x" * len(name)
    assert len(name) < 100
    assert peak < 1e6
