# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace doctor``: what this kernel offers, which probe is used, and what mends what is missing."""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click

from cwndtrace.capture import bcc, live, target
from cwndtrace.capture.connections import snapshot
from cwndtrace.capture.source import Filters
from cwndtrace.cli.table import cells, prose, room
from cwndtrace.errors import CwndtraceError, KernelLacks, NoProbe
from cwndtrace.format import clean
from cwndtrace.kernel import btf, facts, ladder, netns
from cwndtrace.tcp import IDLE_SYSCTL

OK, LACK, BAD = "ok", "lack", "bad"
_NAME: Final = 24
"""Cells of a terminal for a fact's name; a longer one takes more lines."""
_MARK: Final = {OK: ("ok", "green"), LACK: ("-", "yellow"), BAD: ("BAD", "red")}


@dataclass(frozen=True)
class Fact:
    """One line: ``state`` is ok, lack (something better is missing) or bad (tracing fails), ``remedy`` may be empty."""

    name: str
    value: str
    state: str = OK
    remedy: str = ""


@dataclass
class Findings:
    """All that doctor found; ``probes`` is None where nothing can trace idle resets here."""

    facts: list[Fact]
    probes: dict[str, str | None] | None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(*, as_json: bool) -> None:
    """Tell what this kernel offers, which probe is used for what, and what mends each lack.

    Every probe is tried by really loading it. Exits with 77 where nothing can trace here.

    \b
    Examples:
      sudo cwndtrace doctor
      sudo cwndtrace doctor --json | jq .probes
    """
    target.need_root("loading probes")
    findings = examine()
    if as_json:
        click.echo(json.dumps({"facts": [asdict(f) for f in findings.facts], "probes": findings.probes}))
    else:
        _print(findings)
    if findings.probes is None or any(f.state == BAD for f in findings.facts):
        sys.exit(77)


def examine() -> Findings:
    """Look at the machine and try every probe; nothing stays loaded."""
    found = [
        Fact("kernel", f"Linux {platform.release()} {platform.machine()}"),
        _tracefs(),
        Fact("lockdown", facts.lockdown()),
    ]
    allowed = _power(found)
    kernel = _btf(found)
    bcc_works = _bcc(found)
    probes = _ladder(found, kernel) if kernel is not None and bcc_works and allowed else None
    found += _sysctls()
    found += _congestion_controls()
    return Findings(found, probes)


def _tracefs() -> Fact:
    if facts.tracefs_mounted():
        return Fact("tracefs", f"mounted on {facts.TRACEFS}")
    return Fact("tracefs", "not mounted; cwndtrace needs none")


def _power(found: list[Fact]) -> bool:
    try:
        live.check_power()
    except CwndtraceError as e:
        found.append(Fact("permission", e.cause, BAD, e.remedy))
        return False
    found.append(Fact("permission", "BPF programs that trace may be loaded"))
    return True


def _btf(found: list[Fact]) -> btf.Btf | None:
    try:
        kernel = btf.Btf.running()
        found.append(Fact("BTF", f"{btf.VMLINUX}, HZ={facts.hz()}"))
    except KernelLacks as e:
        found.append(Fact("BTF", e.cause, BAD, e.remedy))
        return None
    return kernel


def _bcc(found: list[Fact]) -> bool:
    try:
        found.append(Fact("bcc", f"{bcc.version()} from {Path(str(bcc.module().__file__)).parent}"))
    except CwndtraceError as e:
        found.append(Fact("bcc", e.cause, BAD, e.remedy))
        return False
    return True


def _ladder(found: list[Fact], kernel: btf.Btf) -> dict[str, str | None] | None:
    """A line for each probe and reason, tried one by one."""
    here = facts.ladder_facts(kernel)
    worked: dict[str, str | None] = dict.fromkeys(ladder.REASONS)
    for probe in ladder.RUNGS:
        results = {r: ladder.lacks(here, probe, r) or _try(probe.name, r) for r in ladder.REASONS}
        for reason, why in results.items():
            if why is None and worked[reason] is None:
                worked[reason] = probe.name
        seen = [reason for reason, why in results.items() if why is None]
        if seen:
            missing = "; ".join(f"{reason}: {why}" for reason, why in results.items() if why is not None)
            text = f"sees {', '.join(seen)} ({probe.exactness})" + (f"; {missing}" if missing else "")
            found.append(Fact(f"probe {probe.name}", text))
        else:
            found.append(
                Fact(f"probe {probe.name}", str(results["idle"]), LACK, _remedy(probe.name, str(results["idle"])))
            )
    try:
        live.Kernel(reasons=()).close()
        found.append(Fact("block I/O", "block_io_start and block_io_done load"))
    except CwndtraceError as e:
        found.append(Fact("block I/O", e.cause, LACK, e.remedy))
    for reason, used in worked.items():
        if used:
            found.append(Fact(f"reason {reason}", f"traced by {used}"))
        else:
            found.append(Fact(f"reason {reason}", "no probe sees it here", LACK, _remedy("tracepoint", "")))
    return worked if worked["idle"] else None


def _try(probe: str, reason: str) -> str | None:
    try:
        live.Kernel(probe=probe, block=False, reasons=(reason,)).close()
    except NoProbe as e:
        return e.tried[probe]
    except CwndtraceError as e:
        return e.cause
    return None


def _remedy(probe: str, why: str) -> str:
    if probe == "tracepoint":
        return "boot a kernel built by kernel-patches/build"
    if "policy" in why:
        return "ask whoever set the policy that refuses this program type (lockdown, an LSM, a hypervisor)"
    if probe == "kprobe":
        return "boot a kernel with CONFIG_KPROBE_EVENTS=y, as the distributions' are"
    if probe == "sendmsg":
        return "boot Linux 6.16 or newer"
    return ""


def _sysctls() -> list[Fact]:
    lines = []
    for namespace in netns.all_reachable():
        value = netns.idle_sysctl(namespace)
        name = f"sysctl in {namespace.name}"
        if value is None:
            lines.append(Fact(name, "can't be read", LACK))
        elif value:
            lines.append(Fact(name, f"{IDLE_SYSCTL} = {value}: windows are reset after idle time"))
        else:
            lines.append(Fact(name, f"{IDLE_SYSCTL} = 0: no window is reset after idle time"))
    return lines


def _congestion_controls() -> list[Fact]:
    def read(name: str) -> str:
        return Path("/proc/sys/net/ipv4", name).read_text().strip()

    used = Counter(snapshot(Filters(), 0)["ca_name"].to_pylist())
    in_use = ", ".join(f"{name} by {n:,}" for name, n in used.most_common()) or "no connection"
    return [
        Fact("congestion control", f"default {read('tcp_congestion_control')}; in use: {in_use}"),
        Fact("there are", read("tcp_available_congestion_control")),
    ]


def _print(findings: Findings) -> None:
    most = room()
    width = max(cells(clean(fact.name)) for fact in findings.facts)
    width = width if most is None else min(width, _NAME)
    indent = " " * (5 + width + 2)
    click.echo(click.style(f"{'':<5}{'FACT':<{width}}  WHAT THERE IS", bold=True))
    for fact in findings.facts:
        mark, colour = _MARK[fact.state]
        *above, name = prose(clean(fact.name), most and width)
        # Every word counts here: what is too long for its column goes on below.
        first, *below = prose(clean(fact.value), most and most - len(indent))
        for part in above:
            click.echo(f"{'':<5}{part}")
        padding = " " * (width - cells(name))
        click.echo(f"{click.style(f'{mark:<5}', fg=colour)}{name}{padding}  {first}")
        for part in below:
            click.echo(indent + part)
        if fact.remedy:
            for part in prose(f"{'':<8}mend: {clean(fact.remedy)}", most, indent=14):
                click.echo(part)
    if findings.probes is None:
        click.echo("\nNothing here can trace idle resets.")
    else:
        click.echo("\nsudo cwndtrace run --iface NAME will work here.")
