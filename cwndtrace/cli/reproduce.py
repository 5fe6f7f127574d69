# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace reproduce`` and ``cwndtrace serve``, which measure the cost of resets over a made or a real path."""

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
from cwndtrace.format import clean, nominal_size, plural, signed, size
from cwndtrace.kernel import netns
from cwndtrace.lab import cleanup
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.measurement import Measurement, frame
from cwndtrace.lab.path import KINDS
from cwndtrace.lab.recording import Recording, costs, matched
from cwndtrace.lab.remote import Remote
from cwndtrace.lab.scenario import PRESETS
from cwndtrace.lab.serve import Server, ServerCounters, Settings
from cwndtrace.lab.statistics import overall, summarise
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
    """A number with a decimal prefix such as 100k, 2M or 1.5G, converted to a plain number."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the plain number."""
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kKMG]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is not an amount: write 300k, 2M or 1G", param, ctx)
        return float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]


class Size(Amount):
    """An amount that is converted to an integer."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the integer."""
        return int(super().convert(value, param, ctx))


class Milliseconds(options.Span):
    """A time span that is converted to milliseconds. A number without a unit is in seconds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the time span in milliseconds."""
        return 1e3 * super().convert(value, param, ctx)


class List(click.ParamType[tuple[float, ...]]):
    """A comma-separated list of values of another type."""

    def __init__(self, of: click.ParamType[float]) -> None:
        self.name = f"{of.name},..."
        self._of = of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the values as a tuple."""
        if isinstance(value, tuple):
            return value
        return tuple(self._of.convert(part.strip(), param, ctx) for part in str(value).split(","))


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{text!r} is not of the form HOST:PORT", "write example.org:5001 or [2001:db8::1]:5001")
    return host.strip("[]"), int(port)


def _check_together(against: str | None, path_options: dict[str, Any], server_options: dict[str, bool]) -> None:
    """Raise UsageError for options that have no effect together with the others."""
    for name, value in path_options.items():
        if against is not None and value is not None:
            raise UsageError(f"{name} can't change the real path to {against}", f"omit {name}")
    for name, wanted in server_options.items():
        if against is None and wanted:
            raise UsageError(f"{name} needs --against", f"omit {name}, or name the server: --against HOST:PORT")


@contextmanager
def _new_folder(path: Path) -> Iterator[Folder]:
    """Make a folder that belongs to the invoking user. It is removed at the end if it is empty."""
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
    "--preset",
    type=click.Choice(sorted(PRESETS)),
    default="quick",
    show_default=True,
    help="Use this preset's values for all options that aren't given.",
)
@click.option(
    "--rtt",
    "rtt_ms",
    type=Milliseconds(),
    metavar="TIME",
    help="Set the round-trip time of the path, for example 200ms.",
)
@click.option(
    "--rate", type=Amount(), metavar="BIT/S", help="Limit the rate each way, for example 100M (default: no limit)."
)
@click.option(
    "--loss",
    type=float,
    metavar="FRACTION",
    help="Drop this fraction of packets each way, for example 0.001 (default: 0).",
)
@click.option(
    "--burst", "bursts", type=List(Size()), metavar="BYTES,...", help="Send bursts of these sizes, for example 100k,1M."
)
@click.option(
    "--idle",
    "idle_times",
    type=List(options.Span()),
    metavar="TIME,...",
    help="Stay idle for these times before each burst, for example 500ms,2s.",
)
@click.option("--rounds", type=int, help="Measure each burst and idle time this many times with each setting.")
@click.option("--cc", metavar="NAME", help="Use this congestion control at the sender (default: cubic).")
@options.family("Use IPv4 (default).", "Use IPv6.")
@click.option(
    "--path",
    "kind",
    type=click.Choice(KINDS),
    help="Make the path with netem or with a relay in user space (default: netem if the kernel has it).",
)
@click.option("--against", metavar="HOST:PORT", help="Send over a real path to cwndtrace serve at this address.")
@click.option("--plain", is_flag=True, help="With --against: the server is a plain TCP sink that never answers.")
@click.option(
    "--allow-sysctl",
    is_flag=True,
    help="With --against: switch this machine's sysctl on and off, and restore it (default: leave it unchanged).",
)
@options.probe
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write everything to this new directory (default: reproduce-DATE-TIME).",
)
@click.option("--dark", is_flag=True, help="Draw for a dark background.")
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
    """Measure what tcp_slow_start_after_idle costs on a long path.

    Long-lived connections send bursts after idle times, with the sysctl on and off in turns, while cwndtrace traces
    them. Without --against this happens in separate network namespaces, so the host's interfaces and sysctls don't
    change. The capture, the measurements and the pictures are written to one directory.

    \b
    Examples:
      sudo cwndtrace reproduce
      sudo cwndtrace reproduce --preset blog
      sudo cwndtrace reproduce --rtt 150ms --burst 60k,1M --idle 300ms,2s --rounds 10 --cc reno
      sudo cwndtrace reproduce --against server.example.org:5001 --idle 1s,3s
    """
    target.need_root("reproducing")
    path_options = {f"--{name}": changes[name] for name in ("rate", "loss")}
    path_options |= {"--rtt": changes["rtt_ms"], "-4 or -6": changes["family"], "--path": kind}
    _check_together(against, path_options, {"--plain": plain, "--allow-sysctl": allow_sysctl})
    server = _endpoint(against) if against is not None else None
    scenario = PRESETS[preset].changed(**changes)
    scenario.check()
    folder = output or Path(time.strftime("reproduce-%Y%m%d-%H%M%S"))
    # This comes before anything that may fail, so that it is reported in any case.
    for line in cleanup.sweep():
        click.echo(f"cleaned up after an earlier run: {clean(line)}", err=True)
    with _new_folder(folder) as opened:
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
    """Trace while the lab measures, then write and show all results, even if the run broke off.

    ``path`` is the name of ``folder`` in messages.
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
    folder.write("measurements.parquet", frame(lab.taken).to_parquet)
    code = _run_report(path, folder, lab.notes(), dark=dark)
    if broken is not None:
        raise broken
    if code:
        sys.exit(code)


def _run_report(path: Path, folder: Folder, notes: list[str], *, dark: bool) -> int:
    """Run the report in a process without privileges, and return its exit code."""
    descriptor = folder.fileno()
    command = isolated.python("-m", "cwndtrace.cli.measured", *(["--dark"] if dark else []), "--", str(descriptor))
    process = subprocess.run(
        [*command, str(path)], env=isolated.environment(), pass_fds=[descriptor], input=json.dumps(notes).encode(),
        check=False,
    )  # fmt: skip
    if process.returncode < 0:
        cause = f"the process that writes the report was killed by signal {-process.returncode}"
        raise CwndtraceError(cause, f"the measurements are in {path}; run cwndtrace report on its capture.cwnd")
    return process.returncode


@click.command()
@click.argument("descriptor", type=int)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--dark", is_flag=True)
def measured(descriptor: int, path: Path, *, dark: bool) -> None:
    """Report the measurements in an open folder, which messages call PATH. Notes come on stdin as JSON.

    cli/measured.py runs this.
    """
    with Folder(descriptor, None) as folder:
        taken = pd.read_parquet(folder.path / "measurements.parquet")
        _report(taken, cwndtrace.load(folder.path / "capture.cwnd"), path, folder, json.load(sys.stdin), dark=dark)


def _line(row: Measurement) -> str:
    window = f"{row.cwnd_before} -> {row.cwnd_after}" if row.reset else f"{row.cwnd_before}"
    text = f"{row.round:>5}  {row.setting:<7}  {row.idle_s:>4.2f} s  {nominal_size(row.burst_bytes):>8}"
    return f"{text}  {row.latency_ms:>8.1f} ms   {window}"


def _report(taken: pd.DataFrame, trace: Trace, path: Path, folder: Folder, notes: list[str], *, dark: bool) -> None:
    if taken.empty:
        raise CwndtraceError("nothing was measured", "let it run until it prints the first measurement")
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
    priced = costs(taken, trace.resets, trace.recoveries)
    if len(priced):
        echo_prose(_agreement(priced))
    for note in notes:
        echo_prose(f"note: {clean(note)}")
    pictures = _draw(taken, summary, trace, priced, folder, dark=dark)
    click.echo(f"\nThe capture, the measurements and {len(pictures)} pictures are in {clean(str(path))}.", err=True)
    click.echo()
    echo_prose(f"Result: {overall(summary)}.")
    echo_prose(f"Picture: {clean(str(path / pictures[0]))}")


def _agreement(priced: pd.DataFrame) -> str:
    """Return how near recorded and predicted costs (see ``lab.recording.costs``) were to those of the receiver's clock.

    Means, because a burst's difference changes them by its share; medians of few bursts are those of two bursts, which
    needn't be the same one.
    """
    names = ("recorded_ms", "measured_ms", "predicted_ms")
    recorded, measured, predicted = (signed(priced[name].mean(), "{:.0f} ms".format) for name in names)
    error = (priced["recorded_ms"] - priced["measured_ms"]).abs()
    return (
        f"Cost by the records: {recorded} a burst on average, by the receiver's clock {measured}; of each burst the "
        f"two differ by {error.median():.0f} ms at the median and {error.max():.0f} ms at most. Predicted from the "
        f"windows alone (estimate): {predicted}."
    )


def costs_of(summary: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of a table of what ``summarise`` returns."""
    rows: list[tuple[str, ...]] = []
    for cell in summary.to_dict("records"):
        low, high = _difference("{:.0f}", cell["cost_low_ms"]), _difference("{:.0f} ms", cell["cost_high_ms"])
        rows.append(
            (
                nominal_size(int(cell["burst_bytes"])),
                f"{cell['idle_s']:g} s",
                *(_or_dash("{:.0f} ms", cell[c]) for c in ("median_on_ms", "p95_on_ms", "median_off_ms", "p95_off_ms")),
                _difference("{:.0f} ms", cell["cost_ms"]),
                "-" if low == "-" else f"{low} to {high}",
                _difference("{:.1f}", cell["cost_rtts"]),
                _or_dash("{:.0f} %", 100 * cell["resets_on"]),
            )
        )
    yield from table(_COLUMNS, rows)


def _or_dash(text: str, value: float) -> str:
    """Return a value formatted by ``text``, or a dash if it is unknown (NaN)."""
    return "-" if math.isnan(value) else text.format(value)


def _difference(text: str, value: float) -> str:
    """Return a difference with its sign, formatted by ``text``, or a dash if it is unknown (NaN)."""
    return "-" if math.isnan(value) else signed(value, text.format)


def _draw(
    taken: pd.DataFrame, summary: pd.DataFrame, trace: Trace, priced: pd.DataFrame, folder: Folder, *, dark: bool
) -> list[str]:
    """Draw all pictures into ``folder``; return their file names, the most informative first."""
    # This import is delayed, because matplotlib takes long to load.
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
    """Return the resets of the sockets in ``taken``, and all samples of their windows (columns ts_ns and cwnd)."""
    resets, snapshots, samples = trace.resets, trace.connections, trace.samples
    cookies = set(taken["sock_cookie"])
    known = (frame[frame["sock_cookie"].isin(cookies)]["connection"] for frame in (resets, snapshots))
    keys = {key for keys in known for key in keys}
    seen = [f[f["connection"].isin(keys)][["ts_ns", "cwnd"]].astype("int64") for f in (snapshots, samples)]
    observed = pd.concat(seen).sort_values("ts_ns", ignore_index=True)
    return resets[resets["connection"].isin(keys)], observed


class _Refusals:
    """A reporter of refused connections. Like ``run`` does with losses, it prints every ten seconds at most."""

    def __init__(self) -> None:
        self._reported = 0
        self._reported_at = -math.inf

    def tell(self, totals: ServerCounters, *, last: bool = False) -> None:
        """Print the number of refused connections if it has grown and a report is due; with ``last`` one is always due.

        A slow reader of stderr never blocks the server.
        """
        refused, now = totals.refused, time.monotonic()
        if refused == self._reported or not (last or now - self._reported_at >= _REFUSED_EVERY_S):
            return
        if select.select([], [2], [], 0)[1]:
            with suppress(OSError):
                click.echo(f"refused so far: {plural(refused, 'connection')} (too many at once)", err=True)
            self._reported, self._reported_at = refused, now


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Listen on this address; :: accepts every host that can reach this machine.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=5001,
    show_default=True,
    help="Listen on this port; 0 picks a free one.",
)
@click.option(
    "--cc", metavar="NAME", help="Use this congestion control for bursts sent from here (default: the system's)."
)
def serve(host: str, port: int, cc: str | None) -> None:
    """Serve as the far end of reproduce --against.

    The server receives bursts, or sends a burst for each request. It doesn't need root.

    \b
    Examples:
      cwndtrace serve --host ::
      cwndtrace serve --host 192.0.2.7 --port 5001
    """
    # SIGTERM, from systemd or kill, ends the server as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    refusals = _Refusals()
    with Server(host, port, Settings(cc=cc, on_turn=refusals.tell)) as server:
        try:
            click.echo(f"Listening on {clean(host)} port {server.port}; press Ctrl-C to stop.", err=True)
            server.run()
        except KeyboardInterrupt:
            click.echo(err=True)
        totals = server.totals
        refusals.tell(totals, last=True)
        click.echo(
            f"{plural(totals.connections, 'connection')}; received {plural(totals.bursts_taken, 'burst')} "
            f"({size(totals.bytes_taken)}), "
            f"sent {plural(totals.bursts_sent, 'burst')}"
        )
