# SPDX-License-Identifier: Apache-2.0
"""How sure a difference is, and how large."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

RESAMPLES: Final = 10_000
CONFIDENCE: Final = 0.95
ENOUGH: Final = 3
"""Values that a group needs for anything to be sure."""

Values = npt.NDArray[np.float64]


def interval(
    first: Values,
    second: Values,
    seed: int = 1,
    resamples: int = RESAMPLES,
    of: Literal["median", "mean"] = "median",
) -> tuple[float, float]:
    """The 95 % bootstrap interval (percentiles) of first's median less second's, in the unit of the values.

    Both groups are resampled with replacement, independently. With fewer than three values in a group there is
    nothing to resample: both ends are NaN.
    """
    if len(first) < ENOUGH or len(second) < ENOUGH:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    centre = np.median if of == "median" else np.mean
    middles = [centre(random.choice(group, (resamples, len(group))), axis=1) for group in (first, second)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(middles[0] - middles[1], (tail, 1 - tail))
    return float(low), float(high)


def cliffs_delta(first: Values, second: Values) -> float:
    """How often a value of ``first`` is above one of ``second``, less how often below: -1 to 1; NaN if one is empty."""
    if not len(first) or not len(second):
        return float("nan")
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, side="left").sum()
    not_above = np.searchsorted(ordered, first, side="right").sum()
    above = len(first) * len(second) - not_above
    return float((below - above) / (len(first) * len(second)))
