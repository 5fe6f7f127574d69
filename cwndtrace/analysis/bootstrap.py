# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals and effect sizes for the difference between two groups of values."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

RESAMPLES: Final = 10_000
CONFIDENCE: Final = 0.95
ENOUGH: Final = 3
"""The least number of values in a group for which an interval is computed."""

Values = npt.NDArray[np.float64]


def interval(
    first: Values,
    second: Values,
    seed: int = 1,
    resamples: int = RESAMPLES,
    of: Literal["median", "mean"] = "median",
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval (percentiles) of first's median less second's, in the unit of the values.

    ``of`` selects the mean in place of the median. Both groups are resampled with replacement, independently. Both ends
    are NaN if a group has fewer than three values, because that is too few to resample.
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
    """Return how often a value of ``first`` is above one of ``second``, less how often it is below.

    The result is from -1 to 1, and NaN if a group is empty.
    """
    if not len(first) or not len(second):
        return float("nan")
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, side="left").sum()
    not_above = np.searchsorted(ordered, first, side="right").sum()
    above = len(first) * len(second) - not_above
    return float((below - above) / (len(first) * len(second)))
