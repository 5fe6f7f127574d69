# SPDX-License-Identifier: Apache-2.0
"""The notebooks run on the sample and on any other capture, are stored with their output, and need no bcc."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cwndtrace.lab.measurement import Measurement
from tests.harness.loopback import need_loopback
from tests.unit import frames

ROOT = Path(__file__).parents[2]
SAMPLE, MEASUREMENTS = "../tests/data/sample.cwnd", "../tests/data/sample-measurements.parquet"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

RUN = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, timeout=120).execute()
nbformat.write(book, sys.argv[2])
"""


OTHERS = ("heartbeats", "closed-by-rst", "receiver-side", "stale-send-buffer")
"""Captures of tests/data for which the notebooks weren't written."""


def cells(file: Path) -> list[dict[str, Any]]:
    all_cells: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in all_cells if cell["cell_type"] == "code"]


def kinds(cell: dict[str, Any]) -> set[str]:
    """Return the kinds of a cell's output: text, tables, pictures."""
    return {media_type for output in cell["outputs"] for media_type in output.get("data", {"stream": ""})}


def estimates(cell: dict[str, Any]) -> list[str]:
    """Return the lines of a cell's text output that have an estimate."""
    lines = (line for output in cell["outputs"] for line in output.get("data", {}).get("text/plain", []))
    return [line for line in lines if "(estimated)" in line and "..." not in line]


def test_there_are_three_notebooks() -> None:
    assert [file.name[:2] for file in NOTEBOOKS] == ["01", "02", "03"]


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_gives_the_stored_output(file: Path, tmp_path: Path) -> None:
    need_loopback()
    for name in ("nbclient", "ipykernel", "duckdb", "polars"):
        pytest.importorskip(name, reason=f"needs {name}: make develop")
    out = tmp_path / file.name
    result = subprocess.run(
        [sys.executable, "-c", RUN, file, out],
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    stored, fresh = cells(file), cells(out)
    assert [kinds(cell) for cell in stored] == [kinds(cell) for cell in fresh]
    assert [cell["source"] for cell in stored] == [cell["source"] for cell in fresh]
    assert any("text/html" in kinds(cell) for cell in stored)
    # The answer is a sentence, so it is the same even if another pandas formats tables differently.
    assert [estimates(cell) for cell in stored] == [estimates(cell) for cell in fresh]


LACKING = ("without idle resets", "without resets and with block I/O", "empty")
MEASURED = "measured"
HEAD = "==== "


def lacking(folder: Path, kind: str) -> Path:
    """Write a capture that lacks rows, and return its path."""
    tables: dict[str, Any] = {}
    if kind != "empty":
        tables["connections"] = frames.snapshots(
            *(frames.snapshot(at, bytes_sent=at * 10**6) for at in range(0, 60, 5))
        )
    if kind == "without idle resets":
        tables["resets"] = frames.table("cwnd_reset", *(frames.reset(at, reason="rto_loss") for at in (10, 50)))
    if "block" in kind:
        tables["block_io"] = frames.disk(50)
    return frames.capture(folder / f"{LACKING.index(kind)}.cwnd", **tables).path


def own_measurements(folder: Path) -> Path:
    """Write measurements as ``reproduce`` writes them. The sample's have a column more, for its two experiments."""
    measured = pd.read_parquet(ROOT / "tests/data/sample-measurements.parquet")
    measured[[field.name for field in dataclasses.fields(Measurement)]].to_parquet(folder / "measurements.parquet")
    return folder / "measurements.parquet"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What all notebooks print on other captures, by the name of the capture.

    One process runs them all, because its libraries take longer to import than a notebook takes to run.
    """
    need_loopback()
    for name in ("ipykernel", "duckdb", "polars"):
        pytest.importorskip(name, reason=f"needs {name}: make develop")
    folder = tmp_path_factory.mktemp("notebooks")
    captures = {name: ROOT / "tests/data" / f"{name}.cwnd" for name in OTHERS}
    captures |= {kind: lacking(folder, kind) for kind in LACKING}
    runs = {f"{HEAD}{name}": {SAMPLE: str(path)} for name, path in captures.items()}
    runs[f"{HEAD}{MEASURED}"] = {MEASUREMENTS: str(own_measurements(folder))}
    for name in (SAMPLE, MEASUREMENTS):
        assert any(name in "".join(cell["source"]) for file in NOTEBOOKS for cell in cells(file))
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_notebooks.py"), json.dumps(runs), *NOTEBOOKS],
        cwd=ROOT / "notebooks", env={**os.environ, "IPYTHONDIR": str(folder)}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    texts = re.split(f"^{HEAD}", result.stdout, flags=re.MULTILINE)[1:]
    return {name: text for name, _, text in (each.partition("\n") for each in texts)}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_notebooks_run_on_other_captures_and_show_their_resets(name: str, printed: dict[str, str]) -> None:
    shown = re.findall(r"^(\S+): (\d+) resets shown, (\d+) in all$", printed[name], re.MULTILINE)
    assert [stem for stem, _, _ in shown] == ["01-first-look", "02-was-it-the-window"]
    for _, seen, of in shown:
        assert (int(seen) > 0) == (int(of) > 0) == (name != "receiver-side")
    assert "none of these bursts began with a reset of this capture" in printed[name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", LACKING)
def test_the_notebooks_run_on_a_capture_that_lacks_rows(kind: str, printed: dict[str, str]) -> None:
    assert ("2 in all" in printed[kind]) == (kind == "without idle resets")
    assert ("no capture has a reset" in printed[kind]) == (kind != "without idle resets")


@pytest.mark.slow
def test_measurements_as_reproduce_writes_them_are_compared(printed: dict[str, str]) -> None:
    (stored,) = (
        "".join(output["text"])
        for cell in cells(NOTEBOOKS[1])
        for output in cell["outputs"]
        if "median error" in "".join(output.get("text", []))
    )
    assert stored.strip() in printed[MEASURED]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_stored_output_has_no_path_of_a_machine_and_no_errors(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert "/tmp/" not in text
    assert str(ROOT) not in text
    assert all(cell["execution_count"] for cell in cells(file))
    assert not [
        o for cell in cells(file) for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"
    ]


@pytest.mark.slow
def test_loading_and_analysis_import_no_bcc_matplotlib_or_click() -> None:
    code = (
        "import sys, cwndtrace; t = cwndtrace.load('tests/data/sample.cwnd'); t.host(); t.remedies(); t.audit();"
        "t.compare(t); t.block_summary(); t._repr_html_();"
        "print(sorted({'bcc', 'matplotlib', 'click'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
