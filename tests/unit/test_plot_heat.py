# SPDX-License-Identifier: Apache-2.0
"""The heat map draws every request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cwndtrace.plot.heat import heat
from tests.unit import drawing, frames
from tests.unit.drawing import LOSSY, story


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.cwnd"


def test_the_heat_map_draws_every_request_and_hatches_losses(path: Path) -> None:
    trace = story(path, lossy=LOSSY)
    figure = heat(trace.block_heat_map(), zero_ns=frames.MONO, about=trace.about)
    drawing.draw(figure)
    (mesh,) = figure.axes[0].collections
    assert np.ma.sum(np.ma.asarray(mesh.get_array())) == len(trace.block_io) == 3000
    assert figure.axes[0].get_xlim()[0] == pytest.approx((trace.block_io["start_ns"].min() - frames.MONO) / 1e9)
    assert any("3,000 requests" in text for text in drawing.texts(figure))
    assert any("1,234 requests lost" in text for text in drawing.texts(figure))


def test_a_heat_map_without_requests_says_so(path: Path) -> None:
    trace = frames.capture(path, host="<b>\x1b[1m$x^2$")
    figure = heat(trace.block_heat_map(), zero_ns=0, about=trace.about)
    drawing.draw(figure)
    assert "no block I/O recorded" in drawing.texts(figure)
    assert any(r"on <b>?[1m\$x^2\$" in text for text in drawing.texts(figure))
