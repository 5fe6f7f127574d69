# SPDX-License-Identifier: Apache-2.0
"""The guided fuzzer starts from every shape of tests/fuzz.py, and applies the same limits to its inputs."""

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


def test_the_changes_of_a_shape_count_from_its_end(target: Any) -> None:
    first = bytes([len(target.names)])
    name, raw, _ = target.file(first)
    assert target.file(first + b"\x02\x00X") == (name, raw[:-3] + b"X" + raw[-2:], fuzz.ALL)


def test_each_input_starts_from_the_unchanged_capture(target: Any) -> None:
    shape = bytes([len(target.names)])
    for data in (
        shape,
        b"\x01no part",
        bytes([len(target.names) - 1]) + b"no stream",
        b"\x00" + target.base["meta.json"],
    ):
        target.run(data)
    files = {str(path.relative_to(target._folder)): path.read_bytes() for path in target._folder.rglob("*.*")}
    assert files == target.base


@pytest.mark.parametrize(("bound", "raised"), [("PEAK", fuzz.Greedy), ("SECONDS", TimeoutError)])
def test_an_input_that_exceeds_the_limits_of_a_case_raises(
    target: Any, monkeypatch: pytest.MonkeyPatch, bound: str, raised: type[Exception]
) -> None:
    data = bytes([len(target.names) + list(fuzz.SHAPES).index("as much metadata as may be")])
    monkeypatch.setattr(fuzz, bound, 1e-2)
    with pytest.raises(raised):
        target.run(data)
