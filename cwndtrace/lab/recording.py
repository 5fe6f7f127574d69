# SPDX-License-Identifier: Apache-2.0
"""A capture that a separate thread takes while the lab runs on this one, and its comparison with the lab's bursts."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import pandas as pd

from cwndtrace import privileges
from cwndtrace.analysis import cost
from cwndtrace.capture import stream
from cwndtrace.capture.session import Session, describe
from cwndtrace.capture.source import Filters
from cwndtrace.errors import KernelLacks
from cwndtrace.recorder import Observer, Recorder
from cwndtrace.store import CaptureWriter
from cwndtrace.trace import Trace

# Windows that differ by at most this factor count as alike.
_LIKE: Final = 1.1


class Recording:
    """A context manager that traces into ``path``; ``trace`` opens the capture afterwards.

    On entry it raises the errors of opening a session or a capture, and on exit the error that ended the thread.
    """

    def __init__(self, path: Path, filters: Filters, version: str, *, probe: str | None = None) -> None:
        self._path = path
        self._filters = filters
        self._version = version
        self._probe = probe
        self._stop = threading.Event()
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        self.session: Session = stream.open_session(self._filters, probe=self._probe)
        try:
            if not self.session.source.probes["idle"]:
                raise KernelLacks(str(self.session.source.lacking), "cwndtrace doctor lists what is missing")
            about = describe(self.session, self._filters, self._version)
            self._writer = CaptureWriter.create(self._path, about, user=privileges.invoking_user())
        except BaseException:
            self.session.close()
            raise
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            Recorder(self.session, self._writer, Observer()).run(self._stop.is_set)
        except Exception as e:
            self._error = e

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.session.close()
        if self._error is not None and error is None:
            raise self._error

    def trace(self) -> Trace:
        """Return the capture as a Trace."""
        return Trace(self._writer.capture())


def matched(measurements: pd.DataFrame, resets: pd.DataFrame) -> pd.DataFrame:
    """Return one row per measured burst that began with a recorded idle reset: the columns of the reset and the burst.

    ``measurements`` is a frame of lab.measurement.frame, ``resets`` that of a Trace. A reset belongs to the burst of
    the same socket during which it happened. ``missing`` in the result's ``attrs`` counts the bursts whose window fell
    by TCP_INFO and for which there is no record.
    """
    idle = resets[resets["reason"] == "idle"]
    # Both connections of a lab have the server's port. The time distinguishes them, since they take turns.
    keys = ["netns_ino", "sport"]
    joined = measurements.reset_index(names="burst").merge(idle, on=keys, suffixes=("_info", ""))
    during = joined[(joined["ts_ns"] >= joined["start_ns"]) & (joined["ts_ns"] <= joined["end_ns"])].copy()
    fell = measurements.index[measurements["cwnd_after"] < measurements["cwnd_before"]]
    during.attrs["missing"] = len(set(fell) - set(during["burst"]))
    return during


def beside_baseline(measurements: pd.DataFrame, resets: pd.DataFrame) -> pd.DataFrame:
    """Return ``matched`` for the bursts with the setting on, with ``baseline_ms``: the latency without the reset.

    The baseline is the median latency of the bursts of the same size with the setting off that began with a window like
    the one before the reset; without such bursts it is NaN. The window has to be alike because losses at a bottleneck
    cut the windows of the two connections at different times. The idle time doesn't have to be, because it doesn't
    change a window that isn't reset.
    """
    on = matched(measurements[measurements["setting"] == "on"], resets)
    off = measurements[measurements["setting"] == "off"]
    keys = off[["burst_bytes", "latency_ms"]].assign(window=_usable(off))
    pairs = on[["burst", "burst_bytes"]].assign(window=_usable(on)).merge(keys, on="burst_bytes", suffixes=("", "_off"))
    like = pairs[np.abs(np.log(pairs["window_off"] / pairs["window"])) <= np.log(_LIKE)]
    return on.join(like.groupby("burst")["latency_ms"].median().rename("baseline_ms"), on="burst")


def _usable(bursts: pd.DataFrame) -> pd.Series:
    """Return the window before each burst in bytes, at most the size of the burst."""
    return (bursts["cwnd_before"] * bursts["mss"]).clip(upper=bursts["burst_bytes"])


def costs(measurements: pd.DataFrame, resets: pd.DataFrame, recoveries: pd.DataFrame) -> pd.DataFrame:
    """Return what resets cost by the records and by the receiver's clock, one row per burst with the setting on.

    Takes measurements as ``matched`` does, and frames of a Trace; bursts without a recorded reset are left out.
    Columns: ``burst_bytes``, ``idle_s``, ``ca_name``, ``rtt_ms``, ``recorded_ms`` (``first_cost_us`` of
    analysis.recovery), ``predicted_ms`` (analysis.cost.price), and ``measured_ms``: the burst's latency minus its
    baseline with the setting off.
    """
    rows = cost.price(beside_baseline(measurements, resets), recoveries)
    return pd.DataFrame(
        {
            "burst_bytes": rows["burst_bytes"],
            "idle_s": rows["idle_s"],
            "ca_name": rows["ca_name"].astype(str),
            "rtt_ms": rows["round_us"] / 1000,
            "recorded_ms": rows["first_cost_us"] / 1000,
            "predicted_ms": rows["predicted_us"] / 1000,
            "measured_ms": rows["latency_ms"] - rows["baseline_ms"],
        }
    ).dropna(ignore_index=True)
