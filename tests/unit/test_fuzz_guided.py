# SPDX-License-Identifier: Apache-2.0
"""The guided fuzzer begins with all that tests/fuzz.py has, and holds an input to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import fuzz

pytest.importorskip("atheris", reason="needs atheris: make fuzz-guided")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests import fuzz_guided

    return fuzz_guided.Target(tmp_path_factory.mktemp("fuzz") / "case")


def test_every_shape_is_a_seed(target: Any, tmp_path: Path) -> None:
    seeds = [path.read_bytes() for path in target.seeds(tmp_path / "corpus").iterdir()]
    files = [target.file(seed)[:2] for seed in seeds]
    assert [kind for kind, *_ in target.shapes] == list(fuzz.SHAPES)
    assert len(files) == len(target.base) + 1 + len(fuzz.SHAPES)
    assert all((name, raw) in files for _, name, raw in target.shapes)


def test_a_shape_is_changed_near_its_end(target: Any) -> None:
    first = bytes([len(target.names)])
    name, raw, _ = target.file(first)
    assert target.file(first + b"\x02\x00X") == (name, raw[:-3] + b"X" + raw[-2:], fuzz.ALL)


def test_what_an_input_put_there_is_gone_in_the_next(target: Any) -> None:
    shape = bytes([len(target.names)])
    for data in (
        shape,
        b"\x01no part",
        bytes([len(target.names) - 1]) + b"no stream",
        b"\x00" + target.base["meta.json"],
    ):
        target.run(data)
    found = {str(path.relative_to(target._folder)): path.read_bytes() for path in target._folder.rglob("*.*")}
    assert found == target.base


@pytest.mark.parametrize(("bound", "raised"), [("PEAK", fuzz.Greedy), ("SECONDS", TimeoutError)])
def test_an_input_has_the_bounds_of_a_case(
    target: Any, monkeypatch: pytest.MonkeyPatch, bound: str, raised: type[Exception]
) -> None:
    data = bytes([len(target.names) + list(fuzz.SHAPES).index("as much metadata as may be")])
    monkeypatch.setattr(fuzz, bound, 1e-2)
    with pytest.raises(raised):
        target.run(data)
