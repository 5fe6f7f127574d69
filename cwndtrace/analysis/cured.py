# SPDX-License-Identifier: Apache-2.0
"""Whether a change between two captures cured idle resets: what each shows of the same programs, and the settings.

A window that isn't reset leaves no record, so that no record means something only where there was a reason for one: the
connection was idle for longer than its RTO, with a window above the initial one, and then sent. Snapshots show that.
And it means a cure only where a setting explains it; else the records of the second capture might lack something that
nobody knows of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

import pandas as pd

from cwndtrace import tcp
from cwndtrace.store.meta import Meta, NamespaceSettings

Outcome = Literal["cured", "not_cured", "unknown_cost", "smaller_bursts", "unexplained", "not_idle"]
"""What became of one program's costly resets; all but the first two mean that it can't be told."""

_CHANCE: Final = 0.05
"""The most that the probability may be that as few resets cost time by chance."""


@dataclass(frozen=True)
class Evidence:
    """One capture: resets with their verdicts (``verdicts`` of a Trace), snapshots (``connections``) and metadata.

    ``gaps`` are clauses, such as "3 records were lost", on what the capture lacks; empty if it has everything.
    """

    judged: pd.DataFrame
    snapshots: pd.DataFrame
    about: Meta
    gaps: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """What one capture shows: idle resets, and idle periods longer than the RTO that ended without one (a lower bound).

    ``costly`` resets cost ``lost_us`` in all, measured. ``unknown`` is the number of those whose cost isn't known.
    ``explained`` are the idle periods of ``quiet`` that had to end without a reset, by the settings.
    """

    resets: int = 0
    costly: int = 0
    unknown: int = 0
    lost_us: float = 0.0
    quiet: int = 0
    explained: int = 0

    def __add__(self, other: Side) -> Side:
        return Side(**{name: value + getattr(other, name) for name, value in self.__dict__.items()})


@dataclass(frozen=True)
class Change:
    """A setting that differs; ``where`` says in which namespace, on which route or on which connections."""

    setting: str
    where: str
    before: str
    after: str


@dataclass(frozen=True)
class Affected:
    """A program that had costly resets in the first capture. ``still_on`` are its namespaces that have the sysctl on.

    Its name is that of the process, or the peer's address where no process is known.
    """

    name: str
    outcome: Outcome
    before: Side
    after: Side
    changes: tuple[Change, ...] = ()
    still_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What became of the programs whose resets cost time before, those that lost most first.

    ``nothing`` sums up the first capture, and ``others`` the other programs in the second one.
    """

    programs: tuple[Affected, ...]
    whole: Side
    others: Side = field(default_factory=Side)


def compared(before: Evidence, after: Evidence) -> Finding:
    """Return what became of the idle resets that cost time in ``before``."""
    sides = [_Capture(*pair) for pair in ((before, after), (after, before))]
    lost = sides[0].resets[sides[0].resets["costly"]].groupby("program")["lost_us"].sum()
    keys = [str(key) for key in lost.sort_values(ascending=False, kind="stable").index]
    programs = tuple(_program(key, *sides) for key in keys)
    rest = sides[1].resets
    return Finding(programs, _side(sides[0].resets, None), _side(rest[~rest["program"].isin(keys)], None))


class _Capture:
    """The idle resets and the quiet idle periods of a capture, each with the ``program`` that it belongs to.

    A program is a process's name in one network namespace. A container that was made anew has another namespace, so
    namespaces that only one of the captures knows count as one.
    """

    def __init__(self, evidence: Evidence, other: Evidence) -> None:
        self.about = evidence.about
        judged, snapshots = evidence.judged, evidence.snapshots
        ends = pd.concat([_ends(judged), _ends(snapshots)], ignore_index=True)
        names = ends[ends["comm"] != ""].groupby("connection")["comm"].last()
        programs = ends.drop_duplicates("connection").set_index("connection")
        named = names.reindex(programs.index).fillna(programs["daddr"])
        known = set(evidence.about.namespaces) & set(other.about.namespaces)
        place = programs["netns_ino"].where(programs["netns_ino"].isin(known), "")
        self._programs = named + "@" + place
        self.resets = self._of_programs(_idle_resets(judged))
        both = pd.concat([evidence.judged, other.judged])
        floors = both["init_cwnd"].astype("float64").groupby(both["daddr"].astype(str)).max()
        quiet = _quiet(snapshots, self.resets, floors)
        off = {inode for inode, space in self.about.namespaces.items() if space.idle == space.idle_last == 0}
        explained = quiet["netns_ino"].astype(str).isin(off) | quiet["ca_name"].astype(str).isin(tcp.EXEMPT)
        self.quiet = self._of_programs(quiet.assign(explained=explained))

    def _of_programs(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(program=frame["connection"].map(self._programs).astype(str))

    def of(self, program: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return a program's resets and quiet idle periods."""
        return self.resets[self.resets["program"] == program], self.quiet[self.quiet["program"] == program]


def _ends(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[["connection", "comm", "netns_ino", "daddr"]].astype(str)


def _idle_resets(judged: pd.DataFrame) -> pd.DataFrame:
    """Return idle resets with ``costly`` and ``unknown``."""
    idle = judged[judged["reason"].astype(str) == "idle"]
    return idle.assign(costly=idle["verdict"] == "harmful", unknown=idle["verdict"] == "unknown")


def _quiet(snapshots: pd.DataFrame, resets: pd.DataFrame, floors: pd.Series) -> pd.DataFrame:
    """Return the snapshots of idle periods longer than the RTO at whose end data was sent, and no window was reset.

    Each idle period has one row at most. Those whose window was no larger than the initial one aren't among them: a
    restart leaves such a window as it is.
    """
    numbers = ["ts_ns", "rto_us", "last_snd_us", "bytes_sent", "cwnd", "unacked"]
    rows = snapshots[["connection", "netns_ino", "daddr", "ca_name", *numbers]]
    rows = rows.astype(dict.fromkeys(numbers, "float64")).assign(ts_ns=snapshots["ts_ns"].astype("int64"))
    rows = rows.sort_values("ts_ns", kind="stable")
    later = rows.groupby("connection")[["ts_ns", "bytes_sent"]].shift(-1)
    # Without a reset to the same peer, the largest initial window of any route is the safe one.
    floor = (
        rows["daddr"].astype(str).map(floors).astype("float64").fillna(floors.max() if len(floors) else tcp.INIT_CWND)
    )
    # With nothing under way nothing is sent again, so that what is sent next begins a burst.
    idle = (rows["last_snd_us"] > rows["rto_us"]) & (rows["unacked"] == 0) & (rows["cwnd"] > floor)
    sent = later["bytes_sent"] > rows["bytes_sent"]
    rows = rows.assign(began=rows["ts_ns"] - rows["last_snd_us"] * 1000, ts_ns=later["ts_ns"])[idle & sent]
    rows = rows.astype({"ts_ns": "int64"}).sort_values("ts_ns", kind="stable")
    # The last reset before the next snapshot ended this idle period, unless it is older than the period.
    at = pd.DataFrame({"connection": resets["connection"], "ts_ns": resets["ts_ns"].astype("int64")})
    at = at.assign(reset=at["ts_ns"]).sort_values("ts_ns", kind="stable")
    last = pd.merge_asof(rows, at.astype({"connection": rows["connection"].dtype}), on="ts_ns", by="connection")
    return last[~(last["reset"] > last["began"])]


def _side(resets: pd.DataFrame, quiet: pd.DataFrame | None) -> Side:
    costly = resets[resets["costly"]]
    return Side(
        resets=len(resets),
        costly=len(costly),
        unknown=int(resets["unknown"].sum()),
        lost_us=float(costly["lost_us"].sum()),
        quiet=0 if quiet is None else len(quiet),
        explained=0 if quiet is None else int(quiet["explained"].sum()),
    )


def _program(key: str, before: _Capture, after: _Capture) -> Affected:
    (resets, quiet), (left, left_quiet) = before.of(key), after.of(key)
    sides = _side(resets, quiet), _side(left, left_quiet)
    costly, name = resets[resets["costly"]], key.rpartition("@")[0]
    changes = [*_namespaces(costly, pd.concat([left, left_quiet]), before.about, after.about), *_routes(costly, left)]
    controls = [sorted(set(frame["ca_name"].astype(str))) for frame in (costly, pd.concat([left, left_quiet]))]
    if all(len(each) == 1 for each in controls) and controls[0] != controls[1]:
        changes.append(Change("congestion control", f"on connections of {name}", controls[0][0], controls[1][0]))
    spaces = {str(inode) for inode in left.loc[left["costly"], "netns_ino"]}
    on = tuple(_name(inode, after.about) for inode in sorted(spaces) if _idle(inode, after.about) == 1)
    return Affected(name, _outcome(sides[1], resets, left), *sides, tuple(changes), on)


def _outcome(after: Side, resets: pd.DataFrame, left: pd.DataFrame) -> Outcome:
    if after.costly:
        return "not_cured"
    if after.unknown:
        return "unknown_cost"
    if after.resets:
        raised = [change for change in _routes(resets, left) if int(change.after) > int(change.before)]
        return "cured" if raised and _chance(resets, left) <= _CHANCE else "smaller_bursts"
    if after.explained:
        return "cured"
    return "unexplained" if after.quiet else "not_idle"


def _chance(resets: pd.DataFrame, left: pd.DataFrame) -> float:
    """Return the probability that by chance no reset of ``left`` was costly, if they were as likely to be as before.

    Only resets before bursts as large as the smallest that was costly are compared (Fisher's exact test, one-sided).
    """
    least = resets.loc[resets["costly"], "burst_bytes"].min()
    number, others = (int((frame["burst_bytes"] >= least).sum()) for frame in (resets, left))
    costly = int(resets["costly"].sum())
    return math.comb(number, costly) / math.comb(number + others, costly)


def _namespaces(costly: pd.DataFrame, left: pd.DataFrame, before: Meta, after: Meta) -> Iterator[Change]:
    """Yield the settings that differ in the namespaces of a program."""
    inodes = [sorted(set(frame["netns_ino"].astype(str))) for frame in (costly, left)]
    pairs = [(inode, inode) for inode in inodes[0] if inode in after.namespaces]
    if not pairs and all(inodes):
        pairs = [(inodes[0][0], inode) for inode in inodes[1]]
    for old, new in pairs:
        where = f"in namespace {_name(new, after)}"
        here, there = _settings(old, before), _settings(new, after)
        for setting, name in ((tcp.IDLE_SYSCTL, "idle"), (tcp.CONTROL_SYSCTL, "congestion_control")):
            values = _over_time(here, name), _over_time(there, name)
            if all(values) and values[0] != values[1]:
                yield Change(setting, where, *values)


def _over_time(space: NamespaceSettings, name: str) -> str:
    """Return a setting's value in a capture, or its first and its last value; empty where it is unknown."""
    begin, end = getattr(space, name), getattr(space, f"{name}_end")
    if begin is None:
        return ""
    return f"{begin}" if end in (None, begin) else f"{begin}, then {end},"


def _routes(costly: pd.DataFrame, left: pd.DataFrame) -> list[Change]:
    """Return the routes whose initial windows differ."""
    old, new = (frame.groupby(frame["daddr"].astype(str))["init_cwnd"].last() for frame in (costly, left))
    return [
        Change("initcwnd", f"on the route to {peer}", str(old[peer]), str(new[peer]))
        for peer in sorted(set(old.index) & set(new.index))
        if old[peer] != new[peer]
    ]


def _settings(inode: str, about: Meta) -> NamespaceSettings:
    return about.namespaces.get(inode, NamespaceSettings("", host=False, idle=None, congestion_control=None))


def _idle(inode: str, about: Meta) -> int | None:
    return _settings(inode, about).idle


def _name(inode: str, about: Meta) -> str:
    return _settings(inode, about).name or inode
