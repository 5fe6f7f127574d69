# SPDX-License-Identifier: Apache-2.0
"""Every command works under every locale with names that the locale can't print, which any user may choose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cwndtrace
from tests.harness.users import need_command
from tests.unit import frames

CHECKOUT = str(Path(cwndtrace.__file__).parents[1])
COMM = b"\xff\xfe\xff"
NAME = "é\u4e00\U0001f4a9"

DRIVER = """
import functools, os, sys
sys.path.insert(0, sys.argv.pop(1))
import cwndtrace
from cwndtrace.cli import main
from cwndtrace.report import page
# plot draws under each locale. Drawing twelve pictures more for the page would take longer than all the rest.
page._pair = lambda _: {"light": "data:,", "dark": "data:,"}
# All commands read one capture, which is analysed once.
cwndtrace.load = functools.cache(cwndtrace.load)
for line in os.fsencode(sys.argv.pop(1)).split(b"\\n"):
    try:
        main([os.fsdecode(word) for word in line.split(b"\\t")])
    except SystemExit as e:
        sys.stdout.flush()
        os.write(1, b"== %d\\n" % (e.code or 0))
"""
LATIN = "de_DE.ISO-8859-1"
"""A locale that the tests build, because few machines have it."""
OLD = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""Variables that keep Python from replacing the C locale by UTF-8; an isolated Python ignores them."""
SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "POSIX and nothing else": ({"LC_ALL": "POSIX", **OLD}, "ascii"),
    "latin-1": ({"LC_ALL": LATIN}, "latin-1"),
    "C": ({"LC_ALL": "C"}, "utf-8"),
    "C.UTF-8": ({"LC_ALL": "C.UTF-8"}, "utf-8"),
    "strict ascii": ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii:strict"}, "ascii"),
    "strict latin-1": ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1:strict"}, "latin-1"),
}


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the locale LATIN."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("needs localedef: apt install libc-bin")
    result = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / LATIN)], capture_output=True, check=False
    )
    # Without the sources, localedef creates an empty folder.
    if not (folder / LATIN / "LC_CTYPE").exists():
        pytest.skip(f"needs the sources of {LATIN}: apt install locales ({result.stderr!r})")
    return folder


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture whose names only UTF-8 can print, in a folder whose name isn't valid text."""
    folder = tmp_path_factory.mktemp("captures")
    resets = frames.table("cwnd_reset", frames.reset(5, comm=COMM), frames.reset(7, comm=NAME.encode()))
    seen = [frames.snapshot(t, bytes_sent=40_100_000 + t * 100_000, comm=NAME) for t in (0, 9)]
    blocks = frames.table("block_io", frames.block(1, comm=COMM), frames.block(2, comm=NAME.encode()))
    frames.capture(
        folder / "a.cwnd", resets=resets, connections=frames.snapshots(*seen), block_io=blocks, host=NAME,
        devices={"7:0": NAME}, filters={"iface": "\udcff"}, command=["cwndtrace", "\udcff"],
        sysctls={str(frames.NETNS): {"name": NAME}},
    )  # fmt: skip
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xc3\xa9.cwnd"))
    (folder / "a.cwnd").rename(odd)
    return odd


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "isolated"), [*((setting, False) for setting in SETTINGS), ("latin-1", True), ("strict ascii", True)]
)
def test_every_command_prints_names_as_the_locale_can(
    request: pytest.FixtureRequest, capture: Path, tmp_path: Path, setting: str, isolated: bool
) -> None:
    need_command()
    variables, encoding = SETTINGS[setting]
    if isolated and (OLD.items() <= variables.items() or "PYTHONIOENCODING" in variables):
        # An isolated Python ignores its variables.
        encoding = "utf-8"
    if variables["LC_ALL"] == LATIN:
        variables = {**variables, "LOCPATH": str(request.getfixturevalue("locales"))}
    name = str(capture)
    lines: list[tuple[int, list[str]]] = [
        (0, ["report", name, "--html", str(tmp_path / "\udcffé.html")]),
        (0, ["report", name, "--json"]),
        (0, ["compare", name, name]),
        (0, ["compare", name, name, "--json"]),
        (1, ["fleet", "report", str(tmp_path / "\udcffé")]),
        (0, ["dump", name, "-o", str(tmp_path / "\udcffé.cwnd")]),
        (0, ["export", name, "--jsonl", "summary=-", "--csv", f"resets={tmp_path}/\udcffé.csv"]),
        (0, ["plot", name, "-o", str(tmp_path / "\udcffé.svg")]),
        (1, ["report", str(tmp_path / "\udcffé")]),
        (1, ["plot", name, "-o", str(tmp_path / "\udcffé" / "a.png")]),
        (1, ["run", "--iface", "\udcffé"]),
        (2, ["run", "--probe", "\udcffé"]),
        (2, ["doctor", "\udcffé"]),
        (2, ["serve", "\udcffé"]),
        (2, ["reproduce", "--burst", "\udcffé"]),
        (2, ["\udcffé"]),
    ]
    command = [sys.executable, *(["-I"] if isolated else []), "-c", DRIVER, CHECKOUT]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(
        [*map(os.fsencode, command), b"\n".join(b"\t".join(map(os.fsencode, line)) for _, line in lines)],
        capture_output=True, check=False, timeout=300, env={**kept, **variables}, cwd=tmp_path,
    )  # fmt: skip
    stderr = done.stderr.decode(encoding)
    assert "Traceback" not in stderr, stderr
    assert done.returncode == 0, stderr
    texts: list[str] = []
    codes: list[int] = []
    for line in done.stdout.decode(encoding).split("\n"):
        if line.startswith("== "):
            codes.append(int(line.removeprefix("== ")))
        else:
            texts.append(line)
            assert line.isprintable()
    assert codes == [code for code, _ in lines], stderr
    assert [line for line in texts if line.startswith("{")]
    for line in texts:
        if line.startswith("{"):
            assert line.isascii()
            json.loads(line)
    printable = NAME.encode(encoding, "replace").decode(encoding)
    assert any(printable in line for line in texts if not line.startswith("{")), texts
    assert b"<svg" in (tmp_path / "\udcffé.svg").read_bytes()
    assert NAME in (tmp_path / "\udcffé.html").read_text("utf-8")
    assert NAME in (tmp_path / "\udcffé.csv").read_text("utf-8")
