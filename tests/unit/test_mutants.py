# SPDX-License-Identifier: Apache-2.0
"""The mistakes that make mutants tries, its table, and the reasons of mutants that stay."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mutants import driver, mistakes, report

SOURCE = '''
"""Text."""
MOST: Final = 4
__all__ = ["one"]

def one(count: Literal["x"], *, flag: bool = False) -> int:
    """Return."""
    assert count < 9
    if count < MOST and flag:
        log.warning("two words", f"{count:x}")
        return min(count, 2)
    return sum(each // 2 for each in count if not each)
'''


def changes(source: str) -> list[str]:
    return [mutant.name.removeprefix("m.py ") for mutant in mistakes.mutants("m.py", source)]


def test_mistakes_are_made_in_what_code_does_and_named_by_their_function() -> None:
    assert sorted(changes(SOURCE)) == sorted([
        "-: 4 => 5",
        "one: False => True",
        "one: count < MOST and flag => False",
        "one: count < MOST and flag => True",
        "one: count < MOST and flag => count < MOST",
        "one: count < MOST and flag => flag",
        "one: count < MOST => count <= MOST",
        "one: count < MOST => count >= MOST",
        "one: log.warning('two words', f'{count:x}') => pass",
        "one: min => max",
        "one: 2 => 3",
        "one: each // 2 => each * 2",
        "one: 2 => 3 #2",
        "one: not each => True",
        "one: not each => each",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a | b", ["-: a | b => a", "-: a | b => b"]),
        ("x = f(key=y, strict=z)", ["-: f(key=y, strict=z) => f(strict=z)"]),
        ("x += 1", ["-: x += 1 => x -= 1", "-: 1 => 2"]),
        ("x |= y", ["-: x |= y => pass"]),
        ("while x:\n    break", ["-: x => False", "-: break => continue"]),
        ("x = 0.0", ["-: 0.0 => 1.0"]),
        ("x = 'key'", ["-: 'key' => 'keyX'"]),
        ("x = ''", []),
        ("x = cast('T', y)", []),
        ("if TYPE_CHECKING:\n    x = 1", []),
    ],
)
def test_each_kind_of_mistake(source: str, expected: list[str]) -> None:
    assert changes(source) == expected


def test_a_mutant_differs_from_its_module_in_one_place() -> None:
    original = ast.unparse(ast.parse(SOURCE))
    found = mistakes.mutants("m.py", SOURCE)
    texts = [ast.unparse(mistakes.mutated(SOURCE, mutant.index)) for mutant in found]
    assert len({original, *texts}) == len(found) + 1
    assert ast.unparse(mistakes.mutated("x = a < b", 0)) == "x = a <= b"
    assert ast.unparse(mistakes.mutated("if x:\n    f()", 2)) == "if x:\n    pass"


def test_a_mutant_has_the_line_of_what_is_changed() -> None:
    source = "if (\n    a\n    < b\n):\n    x = [\n        1,\n    ]\n"
    lines = {mutant.name: mutant.line for mutant in mistakes.mutants("m.py", source)}
    assert (lines["m.py -: a < b => a <= b"], lines["m.py -: 1 => 2"]) == (2, 6)


@pytest.mark.slow
def test_the_tests_of_a_module_begin_with_its_own() -> None:
    assert driver.files("cwndtrace/analysis/cost.py")[0] == "tests/unit/test_cost.py"
    assert driver.files("cwndtrace/cli/table.py")[0] == "tests/unit/test_table.py"
    writer = [path.removeprefix("tests/unit/test_") for path in driver.files("cwndtrace/store/writer.py")]
    assert {"writer_thread.py", "window.py", "spool.py", "store.py"} < {*writer}
    for module, stems in driver.ELSEWHERE.items():
        assert Path(module).exists()
        assert {f"tests/unit/{stem}.py" for stem in stems} <= {*driver.files(module)}
    assert all(driver.modules(package) and Path(driver.modules(package)[0]).exists() for package in driver.PACKAGES)


def test_a_process_that_a_test_starts_runs_the_mutant_too(tmp_path: Path) -> None:
    path = Path("cwndtrace/tcp.py").resolve()
    (tmp_path / "mutant.py").write_text("NAME = __file__\n")
    environment = {
        "PYTHONPATH": "tests/mutants/startup",
        "CWNDTRACE_MUTANT": f"cwndtrace.tcp:{path}:{tmp_path}/mutant.py",
    }
    script = "from cwndtrace import tcp; print(tcp.NAME)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}\n"


def test_a_result_is_kept_until_its_module_or_a_test_that_matters_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "CACHE", tmp_path)
    module, test = "cwndtrace/format.py", "tests/unit/test_format.py"
    mutant, other = driver.sample("format", 2)
    driver.MutantResults().add(mutant, "noticed", "a test", [test])
    driver.MutantResults().add(other, "survived", "", driver.files(module))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"mutant": "cut o')
    kept = driver.MutantResults()
    assert [str((kept.known(each) or {})["outcome"]) for each in (mutant, other)] == ["noticed", "survived"]
    current = driver.test_digest
    monkeypatch.setattr(driver, "test_digest", lambda path: current(path) if path == test else "changed")
    assert kept.known(mutant)
    assert not kept.known(other)
    monkeypatch.setattr(driver, "source", lambda _: "changed")
    assert not kept.known(mutant)


class Answers:
    """It stands for the process in which mutants run. Tests fail with the mutant or always; a file may never end."""

    def __init__(self, fail: str = "", broken: str = "", endless: str = "", stuck: str = "") -> None:
        self.asked: list[str] = []
        self._fail, self._broken, self._endless, self._stuck = fail, broken, endless, stuck

    def ask(self, **request: Any) -> dict[str, Any]:
        file, mutated = request["file"], bool(request["module"])
        self.asked.append(f"{file}{'!' if mutated else ''}")
        if file == self._stuck or (mutated and file == self._endless):
            return {"status": "ended", "by": ""}
        tests = [request["only"]] if request["only"] else [f"{file}::{number}" for number in (1, 2)]
        bad = [self._broken, *([self._fail] if mutated else [])]
        failed = next((test for test in tests if test in bad and test not in request["without"]), "")
        seconds = 20.0 if failed or file == "c" else 1.0
        return {"status": "failed" if failed else "passed", "by": failed, "seconds": seconds}


@pytest.mark.parametrize(
    ("answers", "outcome", "asked"),
    [
        ({}, "survived", "a! b! c!"),
        ({"fail": "a::2"}, "noticed", "a! a"),
        ({"fail": "c::1"}, "noticed", "a! b! c! c"),
        # A test that fails without the mutant says nothing, and the others are run again.
        ({"broken": "a::1"}, "survived", "a! a a! b! c!"),
        ({"broken": "a::1", "fail": "a::2"}, "noticed", "a! a a! a"),
        ({"endless": "b"}, "noticed", "a! b! b"),
        ({"stuck": "b"}, "survived", "a! b! b c!"),
    ],
)
def test_a_mutants_tests_are_run_until_one_notices_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], outcome: str, asked: str
) -> None:
    mutant, other = driver.sample("format", 2)
    monkeypatch.setattr(driver, "CACHE", tmp_path)
    monkeypatch.setattr(driver, "files", lambda _: ["a", "b", "c"])
    monkeypatch.setattr(driver, "test_digest", lambda file: f"digest of {file}")
    runner, results = Answers(**answers), driver.MutantResults()
    baseline = driver.Baseline(runner)  # type: ignore[arg-type]
    answer = driver.judge(baseline, mutant, results)
    assert (answer["outcome"], " ".join(runner.asked)) == (outcome, asked)
    assert list(answer["tests"]) == ([asked.split()[-1]] if outcome == "noticed" else ["a", "b", "c"])
    assert driver.MutantResults().known(mutant) == answer
    if not answers:  # c is slow, and isn't named after the module
        driver.judge(baseline, other, results)
        assert runner.asked == ["a!", "b!", "c!", "a!", "b!"]
    if answers == {"fail": "a::2"}:  # what took long is the mutant
        assert not baseline.slow("a")


def test_the_end_does_not_wait_for_a_mutant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = driver.MutantRunner(str(tmp_path))
    monkeypatch.setattr(runner, "_command", ["sh", "-c", "sleep 100 & echo '{}'; wait"])
    assert runner.ask() == {}
    begin = time.monotonic()
    runner.end()
    assert time.monotonic() - begin < 60


def test_a_sample_holds_each_smaller_one() -> None:
    assert driver.sample("format", 5) == driver.sample("format", 9)[:5]
    assert len(driver.sample("format", 0)) > 100


def test_the_interval_of_a_share() -> None:
    assert report.interval(0, 0) == (0, 100)
    assert report.interval(10, 10) == pytest.approx((72.2, 100), abs=0.1)
    assert report.interval(45, 50) == pytest.approx((78.6, 95.7), abs=0.1)


def test_a_row_leaves_out_equivalent_mutants_and_counts_reasons() -> None:
    reasons = report.Reasons(equivalent={"m.py f: a => b": "same"}, accepted={"m.py g *": "needs a kernel"})
    stayed = ["m.py f: a => b", "m.py f: a => c", "m.py g: a => b", "m.py g: a => c"]
    outcomes = dict.fromkeys(stayed, "survived") | {f"m.py h: {n}": "noticed" for n in range(6)}
    assert report.row("m", 1234, outcomes, reasons) == "| m | 1,234 | 10 | 1 | 6 | 67 % (35 to 88 %) | 2 of 3 |"


@pytest.mark.slow
def test_reasons_without_a_mutant_are_found_and_all_others_hold() -> None:
    reasons = report.Reasons(equivalent={"m.py f: a => b": ""}, accepted={"m.py g *": "", "m.py h *": ""})
    assert reasons.stale({"m.py f: a => b", "m.py g: a => c"}) == ["m.py h *"]
    names = {mutant.name for package in driver.PACKAGES for mutant in driver.sample(package, 0)}
    assert report.Reasons.load().stale(names) == []


def test_rows_of_packages_that_were_not_tried_stay() -> None:
    page = f"Text.\n{report.BEGIN}\n| package |\n|---|\n| a | 1 |\n| b | 2 |\n{report.END}\nMore.\n"
    updated = report.update({"b": "| b | 3 |", "c": "| c | 4 |"}, ("a", "b", "c"), page)
    assert [line[:7] for line in updated.splitlines()] == [
        "Text.", report.BEGIN[:7], "| packa", "|---|--", "| a | 1", "| b | 3", "| c | 4", report.END[:7], "More.",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="lacks the lines"):
        report.update({}, (), "Text.")
