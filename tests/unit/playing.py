# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace run`` on a source other than the kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cwndtrace
from cwndtrace.capture.session import Session
from cwndtrace.capture.source import Filters, Source
from cwndtrace.cli.console import Console, InterfaceWatch
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.summary import print_summary, summary_object
from cwndtrace.recorder import Recorder
from cwndtrace.store import CaptureWriter
from tests.unit.fake_source import session_of

Played = tuple[cwndtrace.Trace, Session]


def start_of(session: Session) -> dict[str, Any]:
    """Return a capture's metadata without the values that only root can read."""
    started = session.start["mono_ns"] + session.start["utc_offset_ns"]
    return {
        "version": cwndtrace.__version__,
        "host": "test",
        "kernel": "0",
        "started": cwndtrace.records.arrow.iso_time(started),
        "clock": {"start": session.start, "end": None},
        "probes": session.source.probes,
        "devices": {},
        **session.tally.meta(),
    }


def played(source: Source, folder: Path, *, as_json: bool, print_block: bool = False) -> Played:
    """Run ``cwndtrace run`` on ``source``, from the first record to the summary."""
    with session_of(source) as session:
        writer = CaptureWriter.create(folder / "x.cwnd", start_of(session))
        view: TextView | JsonView
        if as_json:
            view = JsonView(session, print_block=print_block)
        else:
            view = TextView(session, print_block=print_block, quiet=True)
        watch = InterfaceWatch(session, Filters(), None)
        console = Console(view, session, watch, what="a recording", quiet=True, stop_when_refused=False)
        console.begin(writer.path)
        Recorder(session, writer, console).run(lambda: False)
    capture = cwndtrace.load(folder / "x.cwnd")
    if as_json:
        JsonView.write(summary_object(capture, session, view.block))
    else:
        print_summary(capture, session, view.block)
    return capture, session
