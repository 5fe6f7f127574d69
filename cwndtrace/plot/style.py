# SPDX-License-Identifier: Apache-2.0
"""The look of the pictures: one light and one dark palette, and the cleaning of text from outside.

The hues are those of Okabe and Ito, which people with any common kind of colour blindness can tell apart. Elements
that differ by hue differ by shape as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.font_manager import findfont, get_font

from cwndtrace import format as fmt

_FONT: Final = "DejaVu Sans"  # ships with matplotlib and has the arrows


@dataclass(frozen=True)
class Palette:
    """A set of colours, named by their meaning."""

    paper: str
    ink: str
    faint: str
    grid: str
    window: str
    idle_shade: str
    idle: str
    rto_loss: str
    app_limited: str
    tlp_loss: str
    read: str
    write: str
    other: str
    error: str
    lost: str
    ramp: tuple[float, float]
    """the part of matplotlib's viridis that stands out from the paper, for ordered values"""

    def steps(self, number: int) -> list[str]:
        """Return ``number`` colours in order, which lightness alone tells apart."""
        low, high = self.ramp
        shares = [low + (high - low) * n / max(number - 1, 1) for n in range(number)]
        return [to_hex(colormaps["viridis"](share)) for share in shares]

    def reason(self, label: str) -> str:
        """Return the colour of a reset with this reason; unknown reasons have the colour of faint text."""
        known = {
            "idle": self.idle,
            "rto_loss": self.rto_loss,
            "app_limited": self.app_limited,
            "tlp_loss": self.tlp_loss,
        }
        return known.get(label, self.faint)


LIGHT: Final = Palette(
    paper="#ffffff",
    ink="#1c1e22",
    faint="#62666d",
    grid="#e4e6ea",
    window="#0072b2",
    idle_shade="#eceef2",
    idle="#d55e00",
    rto_loss="#a0307a",
    app_limited="#a67c00",
    tlp_loss="#00704f",
    read="#009e73",
    write="#e69f00",
    other="#7a7f87",
    error="#d40000",
    lost="#8a8f98",
    ramp=(0.0, 0.86),
)
DARK: Final = Palette(
    paper="#15171c",
    ink="#eceef1",
    faint="#a4a9b2",
    grid="#2b2f37",
    window="#56b4e9",
    idle_shade="#252932",
    idle="#ff8a3d",
    rto_loss="#e08cc0",
    app_limited="#f0e442",
    tlp_loss="#7be0b8",
    read="#2fc79a",
    write="#e6a817",
    other="#9aa0aa",
    error="#ff5c5c",
    lost="#7d838d",
    ramp=(0.36, 1.0),
)

_palette: ContextVar[Palette] = ContextVar("palette", default=LIGHT)


@contextmanager
def use(dark: bool = False) -> Iterator[Palette]:
    """Draw figures that are made inside the ``with`` in the dark or the light palette."""
    token = _palette.set(DARK if dark else LIGHT)
    try:
        yield _palette.get()
    finally:
        _palette.reset(token)


def palette() -> Palette:
    """Return the palette in use: the light one, unless ``use`` selects another."""
    return _palette.get()


@contextmanager
def drawing() -> Iterator[Palette]:
    """Set matplotlib up for the palette and yield it; the user's own rc settings are restored afterwards."""
    colours = palette()
    settings: Any = {
        "text.usetex": False,
        "font.family": _FONT,
        "font.size": 9,
        "text.color": colours.ink,
        "axes.labelcolor": colours.ink,
        "axes.edgecolor": colours.faint,
        "axes.facecolor": colours.paper,
        "axes.linewidth": 0.7,
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "xtick.color": colours.faint,
        "ytick.color": colours.faint,
        "xtick.labelcolor": colours.ink,
        "ytick.labelcolor": colours.ink,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "grid.color": colours.grid,
        "grid.linewidth": 0.6,
        "figure.facecolor": colours.paper,
        "figure.edgecolor": colours.paper,
        "hatch.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }
    with mpl.rc_context(settings):
        yield colours


@cache
def _drawable() -> frozenset[int]:
    font: Any = get_font(findfont(_FONT))
    return frozenset(font.get_charmap())


def plain(text: object, limit: int = 200) -> str:
    """Return text from outside in a form that matplotlib draws literally: no control characters, no mathtext.

    It is cut off after ``limit`` characters. A character that the font can't draw becomes ``?``.
    """
    line = "".join(c if ord(c) in _drawable() else "?" for c in fmt.clean(str(text)))
    line = line if len(line) <= limit else f"{line[: limit - 1]}…"
    return line.replace("$", r"\$")
