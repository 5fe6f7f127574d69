# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace doctor``, which shows what this kernel supports, which probes work, and how to fix what is missing."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import click
import pandas as pd

from cwndtrace.analysis import ahead
from cwndtrace.capture import bcc, clocks, live, target
from cwndtrace.capture.connections import snapshot
from cwndtrace.capture.source import Filters
from cwndtrace.cli import preflight
from cwndtrace.cli.output import OutputError, printing
from cwndtrace.cli.table import cells, prose, room
from cwndtrace.errors import CwndtraceError, KernelLacks, NoProbe
from cwndtrace.format import clean, plural
from cwndtrace.kernel import btf, facts, host, ladder, netns, permission
from cwndtrace.present import ahead as ahead_in_words
from cwndtrace.tcp import IDLE_SYSCTL

OK, LACK, BAD = "ok", "lack", "bad"
_PATIENCE_S: Final = 3.0
_NAME_CELLS: Final = 24
"""Terminal cells for the name of a fact. A longer name takes several lines."""
_CONNECTIONS: Final = 3
"""The most connections that are named for each reason."""
_MARK: Final = {OK: ("ok", "green"), LACK: ("-", "yellow"), BAD: ("BAD", "red")}


@dataclass(frozen=True)
class Fact:
    """One line of the report.

    ``state`` is "ok", "lack" (something is worse than it could be) or "bad" (tracing fails). ``remedy`` may be empty.
    """

    name: str
    value: str
    state: str = OK
    remedy: str = ""


@dataclass
class Findings:
    """The result of all checks.

    ``probes`` maps each reason to a probe, or to None. It is None as a whole if nothing can trace idle resets here.
    ``due`` and ``heartbeats`` are frames of ``analysis.ahead``: connections that the next burst will reset, and those
    whose messages are slower than the RTO. ``block`` is true if block I/O can be traced.
    """

    facts: list[Fact]
    probes: dict[str, str | None] | None
    due: pd.DataFrame = field(default_factory=pd.DataFrame)
    heartbeats: pd.DataFrame = field(default_factory=pd.DataFrame)
    block: bool = False


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def doctor(*, as_json: bool) -> None:
    """Check what this kernel supports, which probes work, and how to fix what is missing.

    The command loads each probe to test it, and unloads it again. It also names connections that are idle and whose
    windows the next burst will reset. It exits with status 77 if tracing isn't possible.

    \b
    Examples:
      sudo cwndtrace doctor
      sudo cwndtrace doctor --json | jq .probes
    """
    target.need_root("loading probes")
    host.enter_cgroup_namespace()
    findings = examine()
    if as_json:
        frames = {name: json.loads(getattr(findings, name).to_json(orient="records")) for name in ("due", "heartbeats")}
        click.echo(json.dumps({"facts": [asdict(f) for f in findings.facts], "probes": findings.probes, **frames}))
    else:
        _print(findings)
    if findings.probes is None or any(f.state == BAD for f in findings.facts):
        sys.exit(77)


class _Steps:
    """Prints each step on stderr: on a terminal all of them, else those that begin after a few seconds."""

    def __init__(self) -> None:
        self._quiet_until = 0.0 if sys.stderr.isatty() else time.monotonic() + _PATIENCE_S

    def begin(self, what: str) -> None:
        if time.monotonic() >= self._quiet_until:
            with suppress(OutputError), printing():
                click.echo(f"{what} ...", err=True)


def examine() -> Findings:
    """Check the machine and try every probe. Nothing stays loaded."""
    steps = _Steps()
    rows = [
        Fact("kernel", f"Linux {platform.release()} {platform.machine()}"),
        _tracefs(),
        Fact("lockdown", facts.lockdown()),
    ]
    rows += _container()
    first = _connections()
    allowed = _may_load(rows)
    rows.append(_perf_events())
    kernel = _read_btf(rows)
    bcc_works = _bcc_works(rows)
    probes, block = None, False
    if kernel is not None and bcc_works and allowed:
        probes = _try_probes(rows, kernel, steps)
        block = _try_block(rows, kernel, steps)
    steps.begin("looking at network namespaces and connections")
    settings = {namespace: netns.idle_sysctl(namespace) for namespace in netns.all_reachable()}
    rows += _sysctls(settings)
    last = _connections()
    rows += _congestion_controls(last)
    by_inode = {namespace.inode: value for namespace, value in settings.items()}
    due, beats = ahead.due(last, by_inode), ahead.live_beats(first, last, by_inode)
    rows += [Fact("will be reset", line, LACK) for line in ahead_in_words.due(due, _CONNECTIONS)]
    rows += [Fact("slow messages", line, LACK) for line in ahead_in_words.beats(beats, _CONNECTIONS)]
    return Findings(rows, probes, due, beats, block)


def _tracefs() -> Fact:
    if facts.tracefs_mounted():
        return Fact("tracefs", f"mounted on {facts.TRACEFS}")
    return Fact("tracefs", "not mounted; cwndtrace doesn't need it")


def _container() -> list[Fact]:
    """Return what this process sees of the host from inside a container; nothing outside of containers."""
    if not host.in_container():
        return []
    lacking = [Fact("container", cause, LACK, remedy) for cause, remedy in preflight.container()]
    seen = f"this process runs in one; it sees the host's processes and cgroups, and its files below {host.root()}"
    return [*(lacking or [Fact("container", seen)]), *_network()]


def _network() -> list[Fact]:
    if (hosts := netns.hosts_inode()) is None or netns.own().inode == hosts:
        return []
    text = "--iface, and doctor's \"this\", mean the container's network namespace, not the host's"
    return [Fact("container", text, LACK, "start the container with --network=host, or name one by --netns 1")]


def _may_load(rows: list[Fact]) -> bool:
    try:
        clocks.refuse_other_time()
        live.check_privileges()
    except CwndtraceError as e:
        rows.append(Fact("permission", e.cause, BAD, e.remedy))
        return False
    rows.append(Fact("permission", "this process may load BPF programs for tracing"))
    return True


def _perf_events() -> Fact:
    """Return what kernel.perf_event_paranoid means for the probe kprobe. The others don't use perf_event_open(2)."""
    name = "perf_event_paranoid"
    level, allowed = permission.perf_events()
    if level is None:
        return Fact(name, "this kernel has no perf events, so no kprobes", LACK)
    if not allowed:
        cause = "with Debian's and Ubuntu's kernels, kprobes need CAP_SYS_ADMIN then, which this process lacks"
        return Fact(name, f"{level}: {cause}", LACK, "run as root, or: sysctl kernel.perf_event_paranoid=2")
    return Fact(name, f"{level}: allows this process perf_event_open(2), with which kprobes are made")


def _read_btf(rows: list[Fact]) -> btf.Btf | None:
    try:
        kernel = btf.Btf.running()
        rows.append(Fact("BTF", f"{btf.VMLINUX}, HZ={facts.hz()}"))
    except KernelLacks as e:
        rows.append(Fact("BTF", e.cause, BAD, e.remedy))
        return None
    return kernel


def _bcc_works(rows: list[Fact]) -> bool:
    try:
        rows.append(Fact("bcc", f"{bcc.version()} from {Path(str(bcc.module().__file__)).parent}"))
    except CwndtraceError as e:
        rows.append(Fact("bcc", e.cause, BAD, e.remedy))
        return False
    return True


def _try_probes(rows: list[Fact], kernel: btf.Btf, steps: _Steps) -> dict[str, str | None] | None:
    """Try each probe for each reason, one by one, and add the results to ``rows``.

    Return the best probe that works for each reason, or None if none sees idle resets.
    """
    here = facts.ladder_facts(kernel)
    worked: dict[str, str | None] = dict.fromkeys(ladder.REASONS)
    for probe in ladder.PROBES:
        results = _try_probe(kernel, here, probe, steps)
        for reason, why in results.items():
            if why is None and worked[reason] is None:
                worked[reason] = probe.name
        seen = [reason for reason, why in results.items() if why is None]
        if seen:
            missing = "; ".join(f"{reason}: {why}" for reason, why in results.items() if why is not None)
            text = f"sees {', '.join(seen)} ({probe.exactness})" + (f"; {missing}" if missing else "")
            rows.append(Fact(f"probe {probe.name}", text))
        else:
            rows.append(
                Fact(f"probe {probe.name}", str(results["idle"]), LACK, _remedy(probe.name, str(results["idle"])))
            )
    for reason, used in worked.items():
        if used:
            rows.append(Fact(f"reason {reason}", f"traced by {used}"))
        else:
            rows.append(Fact(f"reason {reason}", "no probe sees it on this kernel", LACK, _remedy("tracepoint", "")))
    return worked if worked["idle"] else None


def _try_block(rows: list[Fact], kernel: btf.Btf, steps: _Steps) -> bool:
    """Return whether block I/O can be traced, and add that to ``rows``."""
    steps.begin("trying to time block I/O")
    try:
        tracer = live.Kernel(reasons=(), types=kernel, announce=steps.begin)
    except CwndtraceError as e:
        rows.append(Fact("block I/O", e.cause, LACK, e.remedy))
        return False
    tracer.close()
    rows.append(Fact("block I/O", f"timed from {tracer.block_probe} on"))
    return True


def _try_probe(types: btf.Btf, here: ladder.Facts, probe: ladder.Probe, steps: _Steps) -> dict[str, str | None]:
    """Return for each reason why the probe doesn't see it, or None where it does."""
    results = {reason: ladder.lacks(here, probe, reason) for reason in ladder.REASONS}
    untried = [reason for reason, why in results.items() if why is None]
    # Usually one Kernel tries all of them. Where it ends with the first that fails, the next one tries the others.
    if untried:
        steps.begin(f"trying the probe {probe.name}")
    while untried:
        try:
            kernel = live.Kernel(probe=probe.name, block=False, reasons=untried, types=types, announce=steps.begin)
        except NoProbe as e:
            results[untried[0]] = e.tried[probe.name]
            untried = untried[1:]
        except CwndtraceError as e:
            return results | dict.fromkeys(untried, e.cause)
        else:
            kernel.close()
            return results | {reason: kernel.tried[reason].get(probe.name) for reason in untried}
    return results


def _remedy(probe: str, why: str) -> str:
    if probe == "tracepoint":
        return "boot a kernel built by kernel-patches/build"
    if "policy" in why:
        return "ask the administrator of the policy that refuses this program type (lockdown, an LSM, a hypervisor)"
    if probe == "kprobe":
        return "boot a kernel with CONFIG_KPROBE_EVENTS=y, as distributions build it"
    if probe == "sendmsg":
        return "boot Linux 6.16 or newer"
    return ""


def _connections() -> pd.DataFrame:
    """Return all connections of all reachable namespaces as they are now."""
    frame: pd.DataFrame = snapshot(Filters(), 0).to_pandas()
    return frame


def _sysctls(settings: dict[netns.Namespace, int | None]) -> list[Fact]:
    lines = []
    for namespace, value in settings.items():
        name = f"sysctl in {namespace.name}"
        if value is None:
            lines.append(Fact(name, "can't be read", LACK))
        elif value:
            lines.append(Fact(name, f"{IDLE_SYSCTL} = {value}: windows are reset after idle time"))
        else:
            lines.append(Fact(name, f"{IDLE_SYSCTL} = 0: no window is reset after idle time"))
    return lines


def _congestion_controls(connections: pd.DataFrame) -> list[Fact]:
    def read(name: str) -> str:
        return Path("/proc/sys/net/ipv4", name).read_text().strip()

    used = Counter(connections["ca_name"].astype(str))
    in_use = ", ".join(f"{name} by {plural(n, 'connection')}" for name, n in used.most_common()) or "none"
    return [
        Fact("congestion control", f"default {read('tcp_congestion_control')}; in use: {in_use}"),
        Fact("available controls", read("tcp_available_congestion_control")),
    ]


def _print(findings: Findings) -> None:
    columns = room()
    width = max(cells(clean(fact.name)) for fact in findings.facts)
    width = width if columns is None else min(width, _NAME_CELLS)
    indent = " " * (5 + width + 2)
    click.echo(click.style(f"{'':<5}{'FACT':<{width}}  VALUE", bold=True))
    for fact in findings.facts:
        mark, colour = _MARK[fact.state]
        *above, name = prose(clean(fact.name), columns and width)
        # No text is shortened here. A text that is too long for its column continues on the next line.
        first, *below = prose(clean(fact.value), columns and columns - len(indent))
        for part in above:
            click.echo(f"{'':<5}{part}")
        padding = " " * (width - cells(name))
        click.echo(f"{click.style(f'{mark:<5}', fg=colour)}{name}{padding}  {first}")
        for part in below:
            click.echo(indent + part)
        if fact.remedy:
            for part in prose(f"{'':<8}fix: {clean(fact.remedy)}", columns, indent=13):
                click.echo(part)
    click.echo(f"\n{_conclusion(findings)}")


def _conclusion(findings: Findings) -> str:
    if findings.probes is None:
        rest = "; sudo cwndtrace run traces block I/O alone" if findings.block else ""
        return f"Nothing here can trace idle resets{rest}."
    rest = "" if findings.block else ", without block I/O"
    return f"sudo cwndtrace run --iface NAME will work here{rest}."
