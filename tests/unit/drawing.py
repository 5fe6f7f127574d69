# SPDX-License-Identifier: Apache-2.0
"""Figures drawn to pixels, and texts that matplotlib could take for markup."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

HOSTILE_TEXTS = [
    "a$b_c^{x}$", "$\\frac{1}{", r"\$x$", "$$", "\x1b[31mred\x07", "\u202eright", "长连接", "{}%s<b>", "$" * 15,
]  # fmt: skip


PICTURE = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4="
"""An empty picture, as a page has pictures."""


def leave_undrawn(patch: pytest.MonkeyPatch) -> None:
    """Let pages have empty pictures, for tests of what else is on a page: drawing takes most of a page's time."""
    patch.setattr("cwndtrace.report.page._pair", lambda _: {"light": PICTURE, "dark": PICTURE})


def draw(figure: Figure) -> np.ndarray:
    """Return the pixels of the figure as a PNG has them."""
    file = BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    pixels: np.ndarray = imread(file, format="png")
    return pixels


def texts(figure: Figure) -> list[str]:
    """Return all texts of the figure that aren't empty."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]
