# SPDX-License-Identifier: Apache-2.0
"""Untrusted names (of processes, devices, namespaces, cgroups, hosts) do no harm wherever they are shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

import cwndtrace
from cwndtrace import format as fmt
from cwndtrace.capture.session import Batch
from cwndtrace.cli import main
from cwndtrace.report import content
from cwndtrace.report.page import page
from cwndtrace.trace import Trace
from tests.unit import drawing, frames, hostile

DRAWN = ("control characters", "HTML", "mathtext", "256 bytes of UTF-8")
"""Names that a page or a picture could misread. Drawing is slow, so only these are drawn."""


def call(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def assert_harmless(text: str) -> None:
    """Assert that ``text`` has no control or bidi characters."""
    assert [line for line in text.split("\n") if not line.isprintable()] == []


@pytest.fixture(scope="module", params=hostile.NAMES)
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A capture that no test changes."""
    return hostile.named(tmp_path_factory.mktemp("hostile") / "a.cwnd", hostile.NAMES[request.param])


@pytest.fixture
def loaded(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Let commands take this capture as it is, so that each doesn't analyse it again."""
    monkeypatch.setattr(cwndtrace, "load", lambda *_, **__: trace)
    return trace


@pytest.mark.quick(1)
def test_hostile_names_are_harmless_in_a_terminal(loaded: Trace, tmp_path: Path) -> None:
    path = str(loaded.path)
    assert_harmless(call("report", path))
    assert_harmless(call("compare", path, path))
    assert_harmless(call("dump", path, "-o", str(tmp_path / "b.cwnd")))
    assert_harmless(call("export", path, "--csv", "verdicts=-", "--csv", f"resets={tmp_path / 'a.csv'}"))


@pytest.mark.quick(1)
def test_json_of_hostile_names_is_printable_ascii(loaded: Trace) -> None:
    trace = loaded
    for output in (
        call("report", str(trace.path), "--json"),
        call("compare", str(trace.path), str(trace.path), "--json"),
        CliRunner().invoke(main, ["export", str(trace.path), "--jsonl", "verdicts=-"]).stdout,
    ):
        assert output.isascii()
        assert_harmless(output)
        assert all(isinstance(json.loads(line), dict) for line in output.splitlines())


def test_json_keeps_each_character_of_a_name() -> None:
    for name in hostile.NAMES.values():
        line = fmt.json_line({"comm": name})
        assert_harmless(line)
        assert json.loads(line) == {"comm": name}


@pytest.mark.quick(1)
def test_reprs_and_frames_are_harmless(trace: Trace) -> None:
    key = trace.summary()["connection"].iloc[0]
    objects: list[Any] = [trace, trace.connection(key), trace.connection(key).verdict, trace.host(), trace.explain(0)]
    for item in objects:
        assert_harmless(repr(item))
        assert_harmless(str(item))
        if html := getattr(item, "_repr_html_", lambda: "")():
            assert_harmless(html)
            assert "<img" not in html
    frames_of = (trace.resets, trace.connections, trace.block_io, trace.summary(), trace.verdicts, trace.remedies())
    with pd.option_context("display.max_columns", None, "display.width", 10_000, "display.max_colwidth", None):
        for frame in (*frames_of, trace.audit(), trace.block_summary(), trace.costs(), trace.recoveries):
            assert_harmless(repr(frame))
            assert_harmless(frame.to_csv())
            assert_harmless(frame.to_html())


def test_live_batches_are_harmless() -> None:
    for name in hostile.NAMES.values():
        table = frames.table("cwnd_reset", frames.reset(5, comm=name.encode()[:16]), frames.reset(6, comm=b"a\x01"))
        batch = Batch("cwnd_reset", table)
        assert_harmless(batch.to_pandas().to_csv())
        # JSON keeps control characters, and escapes them.
        assert batch.to_dicts()[1]["comm"] == "a\x01"
        assert_harmless("".join(fmt.json_line(row) for row in batch.to_dicts()))


def test_two_names_that_look_alike_when_clean_are_one_category() -> None:
    table = frames.table("block_io", frames.block(1, comm=b"a\x01"), frames.block(2, comm=b"a\x02"))
    frame = Batch("block_io", table).to_pandas()
    assert list(frame["comm"]) == ["a?", "a?"]
    assert list(frame["comm"].cat.categories) == ["a?"]


@pytest.fixture(scope="module")
def markup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[tuple[str, str]]]:
    """The tags and attributes on the page of a harmless capture. From then on, this module's pages have empty pictures.

    A picture is one attribute of a page, and other tests draw the names.
    """
    with pytest.MonkeyPatch.context() as patch:
        drawing.leave_undrawn(patch)
        yield hostile.Markup(
            page(content.report(hostile.named(tmp_path_factory.mktemp("plain") / "a.cwnd", "nginx")))
        ).found


@pytest.mark.quick(1)
def test_the_page_has_no_other_markup_than_that_of_a_harmless_capture(
    trace: Trace, markup: set[tuple[str, str]]
) -> None:
    text = page(content.report(trace))
    assert_harmless(text)
    assert hostile.Markup(text).found <= markup
    # The template in the name isn't evaluated.
    assert "{0}{a.b}49" not in text


@pytest.mark.quick(1)
@pytest.mark.parametrize(("name", "ending"), list(zip(DRAWN, ("svg", "png", "pdf", "png"), strict=True)))
def test_pictures_of_hostile_names_are_drawn(name: str, ending: str, tmp_path: Path) -> None:
    # A file's name is bytes, and the locale may be unable to encode these characters.
    folder = os.fsdecode(hostile.NAMES[name].replace("/", "")[:40].encode()) + ".cwnd"
    trace = hostile.named(tmp_path / folder, hostile.NAMES[name])
    output = call("plot", str(trace.path), "-o", str(tmp_path / f"{folder}.{ending}"))
    assert_harmless(output)
    assert (tmp_path / f"{folder}.{ending}").stat().st_size > 1000
