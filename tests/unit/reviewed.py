# SPDX-License-Identifier: Apache-2.0
"""Texts that somebody has reviewed, in tests/data/texts.

``pytest --renew-texts`` writes them anew and shows what changed.
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Final

import pytest

FOLDER: Final = Path(__file__).parents[1] / "data" / "texts"


def check(config: pytest.Config, name: str, text: str) -> None:
    """Compare a text with the reviewed one of this name, but for the ends of intervals."""
    file = FOLDER / f"{name}.txt"
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    if _kept(old) == _kept(text):
        return
    lines = difflib.unified_diff(old.splitlines(), text.splitlines(), "reviewed", "printed", lineterm="")
    difference = f"{file.name}\n" + "\n".join(lines)
    if not config.getoption("--renew-texts"):
        pytest.fail(f"{difference}\nIf it should be so: pytest --renew-texts tests/unit/test_texts.py", pytrace=False)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(difference, file=sys.__stderr__)


def _kept(text: str) -> list[str]:
    """Return the lines without the ends of intervals, which another version of numpy may draw otherwise."""
    kept = []
    for line in text.splitlines():
        shown = re.sub(r"[+-]?[\d.]+(?: \S+)? to [+-]?[\d.]+(?= )", "LOW to HIGH", line)
        kept.append(re.sub(" +", " ", shown) if shown != line or "95 % INTERVAL" in line else line)
    return kept
