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

    ``of`` selects the mean in place of the median. Both groups are resampled with replacement, independently, from all
    of their values, however many these are. The interval holds the difference of the two medians or means: an end that
    lies beyond it, which takes an extreme group or the rounding of a sum, is moved to it. Both ends are NaN if a group
    has fewer than three values, because that is too few to resample.
    """
    if len(first) < ENOUGH or len(second) < ENOUGH:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    centre, resampled = (np.median, _medians) if of == "median" else (np.mean, _means)
    estimate = float(centre(first) - centre(second))
    drawn = resampled(first, resamples, random) - resampled(second, resamples, random)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return min(float(low), estimate), max(float(high), estimate)


def _means(values: Values, resamples: int, random: np.random.Generator) -> Values:
    means: Values = random.choice(values, (resamples, len(values))).mean(axis=1)
    return means


def _medians(values: Values, resamples: int, random: np.random.Generator) -> Values:
    """Return the medians of resamples of ``values``, drawn without drawing the resamples.

    A resample of n values has the ranks floor(n * u) for n uniform numbers u, so the rank of its k-th value is that of
    the k-th of these numbers, which is distributed as Beta(k, n + 1 - k). One draw gives one median, by the same
    distribution as with resamples in full, so that a million values take no sample of them and little more time than to
    sort them.
    """
    ordered, n = np.sort(values), len(values)
    k = (n + 1) // 2
    uniform = random.beta(k, n + 1 - k, resamples)
    middle: Values = ordered[_ranks(uniform, n)]
    if n % 2:
        return middle
    # Of the n - k numbers above the k-th, the least one is the next.
    following = uniform + (1 - uniform) * random.beta(1, n - k, resamples)
    return (middle + ordered[_ranks(following, n)]) / 2


def _ranks(uniform: Values, n: int) -> npt.NDArray[np.int64]:
    return np.minimum(n * uniform, n - 1).astype(np.int64)


def cliffs_delta(first: Values, second: Values) -> float:
    """Return how often a value of ``first`` is above one of ``second``, less how often it is below.

    The result is from -1 to 1, and NaN if a group is empty.
    """
    if not len(first) or not len(second):
        return float("nan")
    # Sorted values are found several times as fast, because the search stays in the cache.
    first, ordered = np.sort(first), np.sort(second)
    below = np.searchsorted(ordered, first, side="left").sum()
    not_above = np.searchsorted(ordered, first, side="right").sum()
    above = len(first) * len(second) - not_above
    return float((below - above) / (len(first) * len(second)))
