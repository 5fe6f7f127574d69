# SPDX-License-Identifier: Apache-2.0
"""The notebooks run on the sample capture, are stored with what they show, and need no bcc."""

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
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def kinds(cell: dict[str, Any]) -> set[str]:
    """What a cell shows: text, tables, pictures."""
    return {kind for output in cell["outputs"] for kind in output.get("data", {"stream": ""})}


def said(cell: dict[str, Any]) -> list[str]:
    """The lines with an estimate among the text that a cell shows."""
    lines = (line for output in cell["outputs"] for line in output.get("data", {}).get("text/plain", []))
    return [line for line in lines if "(estimated)" in line and "..." not in line]


def test_there_are_three() -> None:
    assert [file.name[:2] for file in NOTEBOOKS] == ["01", "02", "03"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_and_shows_what_is_stored(file: Path, tmp_path: Path) -> None:
    for name in ("nbclient", "ipykernel", "duckdb", "polars"):
        pytest.importorskip(name, reason=f"needs {name}: make develop")
    out = tmp_path / file.name
    done = subprocess.run(
        [sys.executable, "-c", RUN, file, out],
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stored, fresh = cells(file), cells(out)
    assert [kinds(cell) for cell in stored] == [kinds(cell) for cell in fresh]
    assert [cell["source"] for cell in stored] == [cell["source"] for cell in fresh]
    assert any("text/html" in kinds(cell) for cell in stored)
    # The answer is a sentence of its own, the same wherever tables are drawn otherwise.
    assert [said(cell) for cell in stored] == [said(cell) for cell in fresh]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_what_is_stored_names_no_ones_machine(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert "/tmp/" not in text
    assert str(ROOT) not in text
    assert all(cell["execution_count"] for cell in cells(file))
    assert not [
        o for cell in cells(file) for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"
    ]


def test_loading_and_analysis_need_no_bcc_and_no_pictures() -> None:
    code = (
        "import sys, cwndtrace; t = cwndtrace.load('tests/data/sample.cwnd'); t.host(); t.remedies(); t.audit();"
        "t.compare(t); t.block_summary(); t._repr_html_();"
        "print(sorted({'bcc', 'matplotlib', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
