# SPDX-License-Identifier: Apache-2.0
"""Block I/O: how long requests took, by device and operation and by who submitted them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pandas as pd

_FIGURES: Final = {
    "count": "finished requests",
    "bytes": "bytes, summed",
    "errors": "requests that finished with another status than ok",
    "latency_p50_us": "us from entering the block layer to finished, median",
    "latency_p95_us": "us, 95th percentile",
    "latency_p99_us": "us, 99th percentile",
    "latency_max_us": "us, the slowest",
    "latency_total_us": "us, summed over requests; they may overlap",
}

COLUMNS: Final = {"device": "disk", "op": "operation", **_FIGURES}
"""The columns of ``summary``, in order, with what they hold and in which unit."""

SUBMITTER_COLUMNS: Final = {"comm": "name of the submitter", "tgid": "its process", **_FIGURES}
"""The columns of ``by_submitter``."""


def with_latency(block_io: pd.DataFrame, devices: Mapping[str, str]) -> pd.DataFrame:
    """The table ``block_io`` with three more columns.

    ``device`` is the disk's name from ``devices`` (``{"7:0": "loop0"}``), or major:minor where it has none;
    ``latency_us`` is done - start, ``queue_us`` issue - start, in microseconds with their fraction, the
    latter missing where the request never reached a driver.
    """
    start, issue, done = (block_io[name].astype("int64") for name in ("start_ns", "issue_ns", "done_ns"))
    return block_io.assign(
        device=block_io["dev"].astype(str).map(lambda dev: devices.get(dev, dev)).astype("category"),
        latency_us=(done - start) / 1000,
        queue_us=((issue - start) / 1000).where(issue != 0),
    )


def summary(block_io: pd.DataFrame) -> pd.DataFrame:
    """One row a device and operation, the slowest in sum first; the columns are ``COLUMNS``.

    Takes a frame from ``with_latency``.
    """
    return _figures(block_io, ["device", "op"])[list(COLUMNS)]


def by_submitter(block_io: pd.DataFrame) -> pd.DataFrame:
    """One row a submitting process and name, the slowest in sum first; the columns are ``SUBMITTER_COLUMNS``.

    Takes a frame from ``with_latency``. Write-back is shown under the kernel thread that did it.
    """
    return _figures(block_io, ["comm", "tgid"])[list(SUBMITTER_COLUMNS)]


def _figures(block_io: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    rows = block_io[[*keys, "latency_us", "bytes"]].assign(errors=(block_io["error"] != "ok").astype("int64"))
    groups = rows.groupby(keys, observed=True, sort=False)
    latency = groups["latency_us"]
    out = pd.DataFrame(
        {
            "count": groups.size(),
            "bytes": groups["bytes"].sum(),
            "errors": groups["errors"].sum(),
            "latency_p50_us": latency.quantile(0.50),
            "latency_p95_us": latency.quantile(0.95),
            "latency_p99_us": latency.quantile(0.99),
            "latency_max_us": latency.max(),
            "latency_total_us": latency.sum(),
        }
    ).reset_index()
    for key in keys:
        if isinstance(out[key].dtype, pd.CategoricalDtype):
            out[key] = out[key].astype(str)
    out = out.astype({"count": "int64", "bytes": "int64", "errors": "int64"})
    return out.sort_values(["latency_total_us", *keys], ascending=[False, True, True], ignore_index=True)
