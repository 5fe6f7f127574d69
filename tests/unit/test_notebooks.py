# SPDX-License-Identifier: Apache-2.0
"""The notebooks run on the sample capture, are stored with their output, and need no bcc."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

RUN = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, timeout=120).execute()
nbformat.write(book, sys.argv[2])
"""


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


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_gives_the_stored_output(file: Path, tmp_path: Path) -> None:
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


def test_loading_and_analysis_import_no_bcc_matplotlib_or_click() -> None:
    code = (
        "import sys, cwndtrace; t = cwndtrace.load('tests/data/sample.cwnd'); t.host(); t.remedies(); t.audit();"
        "t.compare(t); t.block_summary(); t._repr_html_();"
        "print(sorted({'bcc', 'matplotlib', 'click'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
