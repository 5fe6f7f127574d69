# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace reproduce`` and ``cwndtrace serve``: the story told on one machine, or over a path of the user's own."""

from __future__ import annotations

import json
import math
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import click
import pandas as pd

import cwndtrace
from cwndtrace import isolated, privileges
from cwndtrace.capture import target
from cwndtrace.capture.source import Filters
from cwndtrace.cli import options, user
from cwndtrace.cli.interrupt import Interrupt
from cwndtrace.cli.table import Column, echo_prose, table
from cwndtrace.errors import CaptureError, CwndtraceError, UsageError
from cwndtrace.format import clean, plural
from cwndtrace.kernel import netns
from cwndtrace.kernel.ladder import RUNGS
from cwndtrace.lab import cleanup
from cwndtrace.lab import serve as servers
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.measurement import Measurement, frame
from cwndtrace.lab.path import KINDS
from cwndtrace.lab.recording import Recording, costs, matched
from cwndtrace.lab.remote import Remote
from cwndtrace.lab.scenario import PRESETS
from cwndtrace.lab.statistics import overall, size, summarise
from cwndtrace.store.folder import Folder
from cwndtrace.trace import Trace

_COLUMNS: Final = (
    Column("BURST", right=True),
    Column("IDLE", right=True),
    Column("ON median", right=True),
    Column("ON p95", 4, right=True),
    Column("OFF median", right=True),
    Column("OFF p95", 5, right=True),
    Column("COST", right=True),
    Column("95 % interval", 1, right=True),
    Column("ROUND TRIPS", 3, right=True),
    Column("RESETS", 2, right=True),
)
_REFUSED_EVERY_S: Final = 10.0


class Amount(click.ParamType[float]):
    """A number with a decimal unit: 100k, 2M, 1.5G. Gives the plain number."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The plain number from the text."""
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kKMG]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is no amount: write 300k, 2M, 1G", param, ctx)
        return float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]


class Size(Amount):
    """An amount that is a whole number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The whole number from the text."""
        return int(super().convert(value, param, ctx))


class Milliseconds(options.Span):
    """A time span as elsewhere; gives milliseconds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Milliseconds from the text."""
        return 1e3 * super().convert(value, param, ctx)


class List(click.ParamType[tuple[float, ...]]):
    """Values of another type with commas between them."""

    def __init__(self, of: click.ParamType[float]) -> None:
        self.name = f"{of.name},..."
        self._of = of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """A tuple of what the other type gives."""
        if isinstance(value, tuple):
            return value
        return tuple(self._of.convert(part.strip(), param, ctx) for part in str(value).split(","))


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{text!r} is no HOST:PORT", "write example.org:5001 or [2001:db8::1]:5001")
    return host.strip("[]"), int(port)


def _check_together(against: str | None, of_the_path: dict[str, Any], of_the_server: dict[str, bool]) -> None:
    """Raise UsageError for options that would have no effect beside the others."""
    for name, value in of_the_path.items():
        if against is not None and value is not None:
            raise UsageError(f"{name} is for a path made here, and the one to {against} is as it is", f"omit {name}")
    for name, wanted in of_the_server.items():
        if against is None and wanted:
            raise UsageError(f"{name} goes with --against", f"omit {name}, or name the server: --against HOST:PORT")


@contextmanager
def _new(path: Path) -> Iterator[Folder]:
    """Make a folder for whom sudo works for; it goes again if nothing was put into it."""
    owner = user.invoking()
    try:
        folder = Folder.make(path, owner)
    except OSError as e:
        raise CaptureError(f"{clean(str(path))} can't be made: {e.strerror}", "choose another folder with -o") from e
    try:
        with folder:
            yield folder
    finally:
        with suppress(OSError), privileges.acting_as(folder.user):
            path.rmdir()


@click.command()
@click.option(
    "--preset", type=click.Choice(sorted(PRESETS)), default="quick", show_default=True, help="Where to start."
)
@click.option("--rtt", "rtt_ms", type=Milliseconds(), metavar="TIME", help="Round-trip time of the path, as 200ms.")
@click.option("--rate", type=Amount(), metavar="BIT/S", help="Bottleneck each way, as 100M; none if left out.")
@click.option("--loss", type=float, metavar="FRACTION", help="Packets lost each way, as 0.001.")
@click.option("--burst", "bursts", type=List(Size()), metavar="BYTES,...", help="Sizes of bursts, as 100k,1M.")
@click.option(
    "--idle", "idle_times", type=List(options.Span()), metavar="TIME,...", help="Idle times before them, as 500ms,2s."
)
@click.option("--rounds", type=int, help="How often each is measured with each setting.")
@click.option("--cc", metavar="NAME", help="Congestion control of the sender.")
@options.family("Over IPv4.", "Over IPv6.")
@click.option("--path", "kind", type=click.Choice(KINDS), help="Force what makes the path long.")
@click.option("--against", metavar="HOST:PORT", help="Over a real path, to cwndtrace serve there.")
@click.option("--plain", is_flag=True, help="With --against: the server is a sink that never answers.")
@click.option("--allow-sysctl", is_flag=True, help="With --against: switch this machine's sysctl, and put it back.")
@click.option("--probe", type=click.Choice([r.name for r in RUNGS]), help="Use this probe alone.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Where all of it goes.")
@click.option("--dark", is_flag=True, help="Pictures for a dark background.")
def reproduce(
    *,
    preset: str,
    kind: Literal["netem", "relay"] | None,
    against: str | None,
    plain: bool,
    allow_sysctl: bool,
    probe: str | None,
    output: Path | None,
    dark: bool,
    **changes: Any,
) -> None:
    """Measure what tcp_slow_start_after_idle costs on a long path, trace it, and draw it.

    A long-lived connection sends bursts after idle times, with the sysctl on and off in turns, in network namespaces
    of its own: the host's interfaces and sysctls stay as they are.

    \b
    Examples:
      sudo cwndtrace reproduce
      sudo cwndtrace reproduce --preset blog
      sudo cwndtrace reproduce --rtt 150ms --burst 60k,1M --idle 300ms,2s --rounds 10 --cc reno
      sudo cwndtrace reproduce --against server.example.org:5001 --idle 1s,3s
    """
    target.need_root("reproducing")
    of_the_path = {f"--{name}": changes[name] for name in ("rate", "loss")}
    of_the_path |= {"--rtt": changes["rtt_ms"], "-4 or -6": changes["family"], "--path": kind}
    _check_together(against, of_the_path, {"--plain": plain, "--allow-sysctl": allow_sysctl})
    server = _endpoint(against) if against is not None else None
    scenario = PRESETS[preset].changed(**changes)
    scenario.check()
    folder = output or Path(time.strftime("reproduce-%Y%m%d-%H%M%S"))
    # Before anything that may fail: then it is said too.
    for line in cleanup.sweep():
        click.echo(f"cleaned up what an earlier run left: {clean(line)}", err=True)
    with _new(folder) as opened:
        if server is not None:
            with Remote(*server, scenario, plain=plain, allow_sysctl=allow_sysctl) as remote:
                click.echo(f"Sending to {clean(str(against))}; only this side is traced.", err=True)
                filters = Filters(netns=netns.own().inode, port=server[1])
                _measure(remote, filters, folder, opened, probe=probe, dark=dark)
        else:
            with Lab(scenario, kind) as lab:
                link = scenario.link
                rate_text = f", {link.rate / 1e6:g} Mbit/s" if link.rate else ""
                click.echo(f"Path: RTT {link.rtt_ms:g} ms{rate_text}, by {lab.path.kind} ({lab.path.why}).", err=True)
                click.echo(f"This takes about {lab.expected_s:.0f} s.", err=True)
                filters = Filters(netns=lab.path.server.namespace.inode)
                _measure(lab, filters, folder, opened, probe=probe, dark=dark)


def _measure(lab: Lab | Remote, filters: Filters, path: Path, folder: Folder, *, probe: str | None, dark: bool) -> None:
    """Trace while the lab measures; write and show everything, also of a run that broke off.

    ``path`` names ``folder`` for people.
    """
    capture = path / "capture.cwnd"
    broken: CwndtraceError | None = None
    with Interrupt() as interrupt, Recording(capture, filters, cwndtrace.__version__, probe=probe) as recording:
        seen = ", ".join(f"{reason} by {probe}" for reason, probe in recording.session.source.probes.items() if probe)
        click.echo(f"Tracing: {seen}.", err=True)
        click.echo(click.style("ROUND  SETTING   IDLE     BURST      LATENCY   CWND (segments)", bold=True))
        try:
            for row in lab.rows():
                click.echo(_line(row))
                if interrupt.requested:
                    break
        except CwndtraceError as e:
            broken = e
    if broken is not None and not lab.taken:
        raise broken
    taken = frame(lab.taken)
    folder.write("measurements.parquet", taken.to_parquet)
    code = _report_apart(path, folder, lab.notes(), dark=dark)
    if broken is not None:
        raise broken
    if code:
        sys.exit(code)


def _report_apart(path: Path, folder: Folder, notes: list[str], *, dark: bool) -> int:
    """Have it all reported by a process that has no power; its exit code."""
    descriptor = folder.fileno()
    command = isolated.python("-m", "cwndtrace.cli.measured", *(["--dark"] if dark else []), "--", str(descriptor))
    done = subprocess.run(
        [*command, str(path)], env=isolated.environment(), pass_fds=[descriptor], input=json.dumps(notes).encode(),
        check=False,
    )  # fmt: skip
    if done.returncode < 0:
        cause = f"the process that reports was ended from outside, by signal {-done.returncode}"
        raise CwndtraceError(cause, f"what was measured is in {path}: try cwndtrace report on its capture.cwnd")
    return done.returncode


@click.command()
@click.argument("descriptor", type=int)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--dark", is_flag=True)
def measured(descriptor: int, path: Path, *, dark: bool) -> None:
    """Report what lies in an open folder that people know as PATH; notes come on stdin (see cli/measured.py)."""
    with Folder(descriptor, None) as folder:
        taken = pd.read_parquet(folder.path / "measurements.parquet")
        _report(taken, cwndtrace.load(folder.path / "capture.cwnd"), path, folder, json.load(sys.stdin), dark=dark)


def _line(row: Measurement) -> str:
    fell = f"{row.cwnd_before} -> {row.cwnd_after}" if row.reset else f"{row.cwnd_before}"
    text = f"{row.round:>5}  {row.setting:<7}  {row.idle_s:>4.2f} s  {size(row.burst_bytes):>8}"
    return f"{text}  {row.latency_ms:>8.1f} ms   {fell}"


def _report(taken: pd.DataFrame, trace: Trace, path: Path, folder: Folder, notes: list[str], *, dark: bool) -> None:
    if taken.empty:
        raise CwndtraceError("nothing was measured", "let it run until the first line of a round is there")
    summary = summarise(taken)
    click.echo()
    for line in costs_of(summary):
        click.echo(line)
    during = matched(taken, trace.resets)
    click.echo()
    missing = during.attrs["missing"]
    echo_prose(
        f"{plural(len(during), 'idle reset')} recorded during these bursts; "
        f"{missing:,} that TCP_INFO saw {'is' if missing == 1 else 'are'} missing from the capture."
    )
    priced = costs(taken, trace.resets)
    if len(priced):
        off = (priced["predicted_ms"] - priced["measured_ms"]).abs()
        echo_prose(
            f"Predicted from the records alone (estimate): median {priced['predicted_ms'].median():.0f} ms extra, "
            f"measured {priced['measured_ms'].median():.0f} ms; off by {off.median():.0f} ms at the median."
        )
    for note in notes:
        echo_prose(f"note: {clean(note)}")
    pictures = _draw(taken, summary, trace, priced, folder, dark=dark)
    click.echo(f"\nThe capture, the measurements and {len(pictures)} pictures are in {clean(str(path))}.", err=True)
    click.echo()
    echo_prose(f"What it cost: {overall(summary)}.")
    echo_prose(f"The picture:  {clean(str(path / pictures[0]))}")


def costs_of(summary: pd.DataFrame) -> Iterator[str]:
    """What ``summarise`` gives, as a table."""
    rows: list[tuple[str, ...]] = []
    for cell in summary.to_dict("records"):
        rows.append(
            (
                size(int(cell["burst_bytes"])),
                f"{cell['idle_s']:g} s",
                *(_known("{:.0f} ms", cell[c]) for c in ("median_on_ms", "p95_on_ms", "median_off_ms", "p95_off_ms")),
                _known("{:+.0f} ms", cell["cost_ms"]),
                _known("{:+.0f} to {:+.0f} ms", cell["cost_low_ms"], cell["cost_high_ms"]),
                _known("{:+.1f}", cell["cost_rtts"]),
                _known("{:.0f} %", 100 * cell["resets_on"]),
            )
        )
    yield from table(_COLUMNS, rows)


def _known(text: str, *values: float) -> str:
    """Values as text; a dash where one is unknown."""
    return "-" if any(math.isnan(v) for v in values) else text.format(*values)


def _draw(
    taken: pd.DataFrame, summary: pd.DataFrame, trace: Trace, priced: pd.DataFrame, folder: Folder, *, dark: bool
) -> list[str]:
    """The pictures, as names of files; the one that tells most first."""
    # Only here, because matplotlib takes long to load.
    from cwndtrace.plot import cost, latency, sawtooth, staircase, style

    on, off = (trace_of(trace, taken[taken["setting"] == setting]) for setting in ("on", "off"))
    drawings: dict[str, Callable[[], Any]] = {
        "latency": lambda: latency.latency(taken, summary),
        "sawtooth": lambda: sawtooth.sawtooth(*on, *off, about=trace.about, measurements=taken),
        "staircase": lambda: staircase.staircase(trace.resets),
        "cost": lambda: cost.cost(priced),
    }
    written = []
    with style.use(dark=dark):
        for name, draw in drawings.items():
            written.append(f"{name}.png")
            folder.write(written[-1], partial(draw().savefig, format="png"))
    return written


def trace_of(trace: Trace, taken: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The resets of the sockets that some measurements used, and what was seen of their windows (ts_ns, cwnd)."""
    resets, snapshots, samples = trace.resets, trace.connections, trace.samples
    cookies = set(taken["sock_cookie"])
    known = (frame[frame["sock_cookie"].isin(cookies)]["connection"] for frame in (resets, snapshots))
    keys = {key for keys in known for key in keys}
    seen = [f[f["connection"].isin(keys)][["ts_ns", "cwnd"]].astype("int64") for f in (snapshots, samples)]
    observed = pd.concat(seen).sort_values("ts_ns", ignore_index=True)
    return resets[resets["connection"].isin(keys)], observed


class _Refusals:
    """Says that connections were refused, as ``run`` does of losses: every ten seconds at most, and at the end."""

    def __init__(self) -> None:
        self._told = 0
        self._told_at = -math.inf

    def tell(self, totals: servers.Totals, *, last: bool = False) -> None:
        """Say it, if there is something new and it is time. Who reads stderr slowly, or not at all, holds nobody up."""
        refused, now = totals.refused, time.monotonic()
        if refused == self._told or not (last or now - self._told_at >= _REFUSED_EVERY_S):
            return
        if select.select([], [2], [], 0)[1]:
            with suppress(OSError):
                click.echo(f"refused so far: {plural(refused, 'connection')} (no room for so many)", err=True)
            self._told, self._told_at = refused, now


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; :: lets in whoever can reach this machine.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=5001, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--cc", metavar="NAME", help="Congestion control of what is sent from here.")
def serve(host: str, port: int, cc: str | None) -> None:
    """Be the other end for reproduce --against: take in bursts, or answer requests with them. Needs no root.

    \b
    Examples:
      cwndtrace serve --host ::
      cwndtrace serve --host 192.0.2.7 --port 5001
    """
    # What systemd or kill sends ends it as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    refusals = _Refusals()
    with servers.Server(host, port, servers.Settings(cc=cc, on_turn=refusals.tell)) as server:
        click.echo(f"Listening on {clean(host)} port {server.port}; Ctrl-C ends.", err=True)
        try:
            server.run()
        except KeyboardInterrupt:
            click.echo(err=True)
        totals = server.totals
        refusals.tell(totals, last=True)
        click.echo(
            f"{plural(totals.connections, 'connection')}; took in {plural(totals.bursts_taken, 'burst')} "
            f"({size(totals.bytes_taken)}), "
            f"sent {totals.bursts_sent}"
        )
