# SPDX-License-Identifier: Apache-2.0
"""Labels of a bounded number, however many names come in from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from cwndtrace.format import clean

OTHER: Final = "other"
UNKNOWN: Final = "unknown"
_MOST_CHARACTERS: Final = 100
_UNUSED_S: Final = 3600.0
_HALF_S: Final = 3600.0
_MOST_CANDIDATES: Final = 1000
_AHEAD: Final = 2.0


class Slots:
    """At most ``most`` names that are labels of their own; all others are ``OTHER``.

    The names that come first get a label each. Later ones compete by their cost, which halves every hour: a name that
    costs more than twice what the cheapest label does takes its place. So does any name once a label hasn't been used
    for an hour. ``gone`` is then called with the label that was given up: what was counted for it has to be dropped.
    """

    def __init__(self, most: int, gone: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._gone = gone
        self._now = now
        self._used: dict[str, float] = {}
        self._cost: dict[str, float] = {}
        self._candidates: dict[str, float] = {}
        self._halved = now()

    def label(self, name: str, cost: float = 0.0) -> str:
        """Return the label of a name that has cost so much more; ``UNKNOWN`` for an empty name.

        The label is the name, cleaned and cut.
        """
        text = clean(name)[:_MOST_CHARACTERS] or UNKNOWN
        if text in (OTHER, UNKNOWN):
            return text
        self._halve()
        if text not in self._used and len(self._used) >= self._most and not self._make_room(text, cost):
            return OTHER
        self._used[text] = self._now()
        self._cost[text] = self._cost.get(text, 0.0) + self._candidates.pop(text, 0.0) + cost
        return text

    def _make_room(self, text: str, cost: float) -> bool:
        """Give up a label for a name that hasn't one, or note what the name costs and return false."""
        oldest = min(self._used, key=lambda label: self._used[label])
        cheapest = min(self._cost, key=lambda label: self._cost[label])
        if self._now() - self._used[oldest] >= _UNUSED_S:
            self._give_up(oldest)
        elif self._candidates.get(text, 0.0) + cost > _AHEAD * self._cost[cheapest]:
            self._give_up(cheapest)
        else:
            self._note(text, cost)
            return False
        return True

    def _give_up(self, label: str) -> None:
        del self._used[label]
        self._note(label, self._cost.pop(label))
        self._gone(label)

    def _note(self, text: str, cost: float) -> None:
        self._candidates[text] = self._candidates.get(text, 0.0) + cost
        if len(self._candidates) > _MOST_CANDIDATES:
            del self._candidates[min(self._candidates, key=lambda each: self._candidates[each])]

    def _halve(self) -> None:
        """Make past costs count less, so that a label isn't kept for what was long ago."""
        if self._now() - self._halved >= _HALF_S:
            self._halved = self._now()
            for costs in (self._cost, self._candidates):
                costs.update({name: cost / 2 for name, cost in costs.items()})
