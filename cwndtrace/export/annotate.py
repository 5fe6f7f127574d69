# SPDX-License-Identifier: Apache-2.0
"""Resets as comments in a file of captured packets, each on the first packet of its burst.

The file is read twice: once to find the packets, and once to copy it. All bytes but the comments stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

import pandas as pd

from cwndtrace.errors import making_sense
from cwndtrace.export import pcapng
from cwndtrace.export.bursts import Candidate, Flow, Reset, Spot
from cwndtrace.export.pcapng import Block, Damaged, Interface
from cwndtrace.export.segment import LINKS, device, flow, segment
from cwndtrace.export.text import Writable
from cwndtrace.format import clean, span, threshold
from cwndtrace.present import text as in_words
from cwndtrace.store.meta import Meta

WHY: Final = {
    "before": "came before the first packet of the file",
    "after": "came after the last packet of the file",
    "connection": "came on a connection of which the file has no packet",
    "packet": "came with no packet of data in the file within a round trip",
    "gap": "came where the file lacks packets, so that the first one that it has may not be the first one sent",
    "near": "came so close to several packets that the clocks don't tell which was the first after it",
    "several": "fit to different packets on several interfaces, or to a packet of another network namespace too",
}
"""Why a reset has no comment, in the order in which that is looked for."""

_NEEDS: Final = ["netns_ino", "ifindex", "saddr", "sport", "daddr", "dport", "reason", "srtt_us"]


@dataclass
class Annotations:
    """What was found in a file.

    ``comments`` has the comment of each block by its number, ``more`` the bytes that they add to each section, and
    ``left`` the number of resets without a packet for each reason of ``WHY``. ``strange_links`` counts packets by the
    type of their link where that isn't understood, ``untimed`` those without a time. ``blocks`` is the number of
    blocks.
    """

    comments: dict[int, str] = field(default_factory=dict)
    more: Counter[int] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    strange_links: Counter[int] = field(default_factory=Counter)
    untimed: int = 0
    blocks: int = 0


@making_sense()
def find(file: BinaryIO, verdicts: pd.DataFrame, about: Meta) -> Annotations:
    """Find the packets of the resets of a Trace in a file. Raises Damaged, and CaptureError."""
    search = _Search(verdicts, about)
    for number, block in enumerate(pcapng.blocks(file)):
        search.take(number, block)
    return search.result()


def copy(file: BinaryIO, found: Annotations, output: Writable) -> None:
    """Copy a file with the comments that ``find`` has found for it. Raises Damaged, and OSError for the output."""
    section, copied = -1, 0
    for number, read in enumerate(pcapng.blocks(file)):
        if number == found.blocks:  # the file has grown since
            break
        block = read
        if block.kind == pcapng.SECTION:
            section += 1
            block = pcapng.with_more(block, found.more[section])
        elif number in found.comments:
            block = pcapng.with_comment(block, pcapng.packet(block), found.comments[number])
        output.write(block.encode())
        copied += 1
    if copied < found.blocks:
        raise Damaged(0, "the file isn't what it was a moment ago")


def comment(row: Mapping[Any, Any]) -> str:
    """Return the comment for a reset, a row of ``Trace.verdicts``."""
    before, after = (
        threshold(at if at == at else float("inf")) for at in (row["ssthresh_before"], row["ssthresh_after"])
    )
    says = (
        f"cwndtrace: {row['reason']} reset, cwnd {in_words.reset(row)}; ssthresh {before} -> {after} (in segments), "
        f"srtt {span(row['srtt_us'])}"
    )
    if row["predicted_us"] == row["predicted_us"]:
        says += f"; cost by the kernel's growth rules {span(row['predicted_us'])} (estimated)"
    return clean(says)


class _Search:
    """Looks for the packets of resets, one block after the other."""

    def __init__(self, verdicts: pd.DataFrame, about: Meta) -> None:
        self._verdicts = verdicts
        self._flows: dict[bytes, Flow] = {}
        self._replies: dict[bytes, Flow] = {}
        self._section = -1
        self._interfaces: list[Interface] = []
        self._span_ns: tuple[int, int] | None = None
        self._found = Annotations()
        own = {inode for inode, each in about.namespaces.items() if each.name == "this"}
        times = verdicts["time"].dt.as_unit("ns").astype("int64")
        rows = verdicts[_NEEDS].fillna({"ifindex": 0}).assign(at_ns=times).sort_values("at_ns", kind="stable")
        row: Any
        for row in rows.itertuples():
            index = int(row.ifindex) if str(row.netns_ino) in own else 0
            self._flow(row).add(int(row.netns_ino), Reset.of(row, index, about.interfaces.get(str(index), "")))

    def _flow(self, row: Any) -> Flow:
        key = flow(row.saddr, row.sport, row.daddr, row.dport)
        if key not in self._flows:
            self._flows[key] = Flow()
            self._replies[flow(row.daddr, row.dport, row.saddr, row.sport)] = self._flows[key]
        return self._flows[key]

    def take(self, number: int, block: Block) -> None:
        """Look at the next block."""
        self._found.blocks = number + 1
        if block.kind == pcapng.SECTION:
            self._section += 1
            self._interfaces = []
        elif block.kind == pcapng.INTERFACE:
            if len(self._interfaces) == pcapng.MOST_INTERFACES:
                raise Damaged(block.offset, f"a section has more than {pcapng.MOST_INTERFACES:,} interfaces")
            self._interfaces.append(pcapng.interface(block))
        elif block.kind == pcapng.SIMPLE_PACKET:
            self._found.untimed += 1
        elif block.kind in (pcapng.PACKET, pcapng.OLD_PACKET):
            self._packet(number, block)

    def _packet(self, number: int, block: Block) -> None:
        packet = pcapng.packet(block)
        if packet.interface >= len(self._interfaces):
            raise Damaged(block.offset, f"a packet is of interface {packet.interface:,}, which isn't described")
        interface = self._interfaces[packet.interface]
        time_ns = interface.time_ns(packet.ticks)
        first, last = self._span_ns or (time_ns, time_ns)
        self._span_ns = min(first, time_ns), max(last, time_ns)
        if interface.link not in LINKS:
            self._found.strange_links[interface.link] += 1
            return
        data = packet.data(block)
        seen = segment(interface.link, data, packet.wire)
        if seen is None:
            return
        place = Spot(self._section, packet.interface, device(interface.link, data))
        # Both ends may be on this host, so that a segment may be what one sent and what the other was answered.
        if (replied := self._replies.get(seen.flow)) and seen.ack is not None:
            replied.state(place).acknowledge(seen.ack)
        connection = self._flows.get(seen.flow)
        if connection is None:
            return
        state = connection.state(place)
        if seen.payload:
            for reset in connection.waiting(time_ns, place):
                named = reset.named(place, interface.name)
                whole, clear = state.continues(reset.reason, seen), time_ns >= reset.clear_ns
                bare = packet.bare(block)
                reset.found[place] = Candidate(number, seen.seq, place, block.order, bare, named, whole, clear)
        state.send(seen)

    def result(self) -> Annotations:
        """Return what was found, once all blocks have been looked at."""
        found = self._found
        chosen: dict[int, list[tuple[Reset, Candidate]]] = {}
        for connection in self._flows.values():
            for reset in (reset for resets in connection.resets.values() for reset in resets):
                choice = self._choice(connection, reset)
                if isinstance(choice, str):
                    found.left[choice] += 1
                else:
                    chosen.setdefault(choice.number, []).append((reset, choice))
        for number, claims in sorted(chosen.items()):
            sure = claims if len(claims) == 1 else [claim for claim in claims if claim[1].named]
            if len(sure) == 1:
                reset, candidate = sure[0]
                text = found.comments[number] = comment(self._verdicts.loc[reset.row].to_dict())
                found.more[candidate.place.section] += len(pcapng.comment(candidate.order, text, bare=candidate.bare))
            found.left["several"] += len(claims) - (len(sure) == 1)
        return found

    def _choice(self, connection: Flow, reset: Reset) -> Candidate | str:
        """Return the packet of a reset, or why it has none."""
        if self._span_ns is None:
            return "connection"
        if reset.at_ns < self._span_ns[0]:
            return "before"
        if reset.start_ns > self._span_ns[1]:
            return "after"
        if not reset.found:
            return "packet" if connection.states else "connection"
        candidates = [each for each in reset.found.values() if each.named] or [*reset.found.values()]
        if len({each.seq for each in candidates}) > 1:
            return "several"
        if not any(each.whole for each in candidates):
            return "gap"
        first = min(candidates, key=lambda each: each.number)
        return first if first.clear else "near"
