# SPDX-License-Identifier: Apache-2.0
"""Presets are valid, and scenarios that can't be run are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cwndtrace.errors import UsageError
from cwndtrace.lab.scenario import PRESETS, Scenario


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    PRESETS[name].check()


@pytest.mark.parametrize(
    "change",
    [
        {"bursts": ()}, {"idle_times": ()}, {"bursts": (1,)}, {"bursts": (10**12,)}, {"idle_times": (-1.0,)},
        {"idle_times": (1e9,)}, {"rounds": 0}, {"rounds": 10**6}, {"family": 5}, {"cc": ""}, {"cc": "cu bic"},
        {"sndbuf": 1},
    ],
)  # fmt: skip
def test_invalid_scenarios_are_refused_with_a_remedy(change: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        replace(Scenario(), **change).check()  # type: ignore[arg-type]
    assert caught.value.remedy
