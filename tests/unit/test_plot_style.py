# SPDX-License-Identifier: Apache-2.0
"""Each palette has colours, and texts from outside are drawn as they are."""

from __future__ import annotations

import dataclasses

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from cwndtrace.plot import style


@pytest.mark.parametrize("palette", [style.LIGHT, style.DARK])
def test_the_colours_of_a_palette_stand_out_from_its_paper(palette: style.Palette) -> None:
    def lightness(colour: str) -> float:
        return float(np.dot(mpl.colors.to_rgb(colour), (0.2126, 0.7152, 0.0722)))

    for name, colour in dataclasses.asdict(palette).items():
        if name not in ("paper", "ramp"):
            contrast = abs(lightness(colour) - lightness(palette.paper))
            assert contrast > (0.05 if name in ("grid", "idle_shade") else 0.2), name


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=300))
def test_plain_text_is_never_mathtext_and_has_a_limited_length(text: str) -> None:
    line = style.plain(text, 50)
    shown, math = Text()._preprocess_math(line)  # type: ignore[attr-defined]
    assert math is False
    assert len(shown) <= 50
    assert len(shown) == min(len(text), 50)
    ascii_only = "".join(c if c.isprintable() else "?" for c in text if c.isascii())
    if text.isascii():
        assert shown in (ascii_only, ascii_only[:49] + "…")
