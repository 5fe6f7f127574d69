# SPDX-License-Identifier: Apache-2.0
"""The report of a fleet as text, JSON and HTML: its words, its widths, and hostile names in it."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cwndtrace.cli import fleet_report
from cwndtrace.cli.table import cells
from cwndtrace.fleet import summary
from cwndtrace.fleet.tables import Frames
from cwndtrace.format import plural
from cwndtrace.present import fleet as in_words
from cwndtrace.present import fleet_limits
from cwndtrace.report import fleet as content
from tests.unit import fleets, hostile, reviewed
from tests.unit.fleets import AFTER, BEFORE, SINCE, capture, connection, fleet, harmful, setting

DATA = Path(__file__).parents[1] / "data"
DOCS = Path(__file__).parents[2] / "docs" / "fleet.md"
WHEN = SINCE.to_pydatetime()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Frames:
    return fleets.written(tmp_path_factory.mktemp("fleet"))


def call(frames: Frames, *arguments: str, since: datetime | None = WHEN) -> Result:
    """Run a command that shows ``frames`` with the report's own options."""

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    @click.option("--html", type=click.Path(path_type=Path))
    @fleet_report.options
    def report(**options: Any) -> None:
        fleet_report.show(frames, since=since, **options)

    return CliRunner().invoke(report, list(arguments))


def printed(frames: Frames, columns: int | None, monkeypatch: pytest.MonkeyPatch, by: str | None = None) -> list[str]:
    """Return the lines of a report; see ``shown``."""
    return shown(summary.report(frames, by or "service", SINCE), columns, monkeypatch, by)


def shown(
    found: summary.FleetReport, columns: int | None, monkeypatch: pytest.MonkeyPatch, by: str | None = None
) -> list[str]:
    """Return the lines for a terminal of this width, or for a pipe; assert that none is wider."""
    for name in ("cwndtrace.cli.table.room", "cwndtrace.cli.fleet_report.room"):
        monkeypatch.setattr(name, lambda: columns)
    lines = [click.unstyle(line) for line in fleet_report.lines(found, by, fleet_report.TOP)]
    assert [line for line in lines if columns and cells(line) > columns] == []
    assert [line for line in lines if not line.isprintable()] == []
    return lines


# ---- text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 140])
def test_the_report_is_as_it_was_reviewed(
    columns: int, written: Frames, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    text = "".join(f"{line}\n" for line in printed(written, columns, monkeypatch))
    reviewed.check(pytestconfig, f"fleet-{columns}", text)


def test_the_docs_show_that_report() -> None:
    assert (reviewed.FOLDER / "fleet-140.txt").read_text(encoding="utf-8") in DOCS.read_text(encoding="utf-8")


def test_names_and_costs_stay_in_a_narrow_terminal(written: Frames, monkeypatch: pytest.MonkeyPatch) -> None:
    found = summary.report(written, "service", SINCE)
    for columns in (40, 60, 80, 100, 200):
        lines = shown(found, columns, monkeypatch, "service")
        assert sum(line.startswith("WORKLOAD") for line in lines) == 2
        assert not any(re.match(r"(HOST|PEERS|KERNEL)  ", line) for line in lines)
        if columns >= 80:
            (line,) = [line for line in lines if " >49.1 s " in line]
            assert line.startswith("nginx.service  nginx:443 ")
            assert "  web7 (11.5 s)" in line


def test_a_table_has_so_many_rows_and_says_what_is_left_out(written: Frames) -> None:
    text = call(written, "--by", "host", "--top", "2").stdout
    assert len(re.findall(r"^web\d", text, re.MULTILINE)) == 4
    assert "and 5 more hosts with " in text
    assert "\nand 5 more hosts\n" in text
    assert "can't tell, because only 1 host shows it before and only 1 host shows it after" in text


def test_the_prefix_sets_what_a_network_is(written: Frames) -> None:
    assert "10.2.0.0/24" in call(written, "--by", "peer").stdout
    wide = call(written, "--by", "peer", "--prefix", "16").stdout
    assert "10.2.0.0/16" in wide
    assert "10.2.0.0/24" not in wide


def test_workloads_are_shown_only_where_they_say_more_than_services(monkeypatch: pytest.MonkeyPatch) -> None:
    one = [connection(), connection(service="nginx:80")]
    assert not any(line.startswith("Cost by workload") and "service" not in line for line in printed(
        fleet([capture()], one), None, monkeypatch
    ))  # fmt: skip
    more = [*one, connection(workload="db", service="")]
    assert "Cost by workload" in printed(fleet([capture()], more), None, monkeypatch)


# ---- the answer -------------------------------------------------------------------------------------


def answer(captures: list[dict[str, Any]], connections: list[dict[str, Any]] | None = None) -> tuple[str, str]:
    found = summary.report(fleet(captures, connections))
    return in_words.answer(found.connections, found.captures)


FAILED = capture("web9", status="failed", reason="It is empty.", whole=False)
OPEN = "Can't tell whether window resets delayed anything"


def test_the_answer_of_a_fleet_without_connections() -> None:
    assert answer([]) == ("unknown", f"{OPEN}, because there is no capture.")
    assert answer([FAILED]) == ("unknown", f"{OPEN}, because no capture could be read.")
    assert answer([capture()]) == ("unknown", "No TCP connection was seen in 1 capture.")


def test_the_answer_of_resets_that_cost_time() -> None:
    rows = [harmful("web1"), harmful("web1"), connection("web2")]
    late = "made 2 bursts late on 2 of 3 connections, on 1 of 2 hosts, by 2.00 s in all (measured), 6.7 % of the 30.0 s"
    assert answer([capture("web1"), capture("web2"), FAILED], rows) == ("harmful", f"Idle resets {late} of busy time.")
    rows[0] |= {"resets": 2, "resets_rto_loss": 1, "resets_unknown": 1}
    verdict, text = answer([capture("web1"), capture("web2")], rows)
    assert (verdict, text) == ("harmful", f"Window resets {late} of busy time. The cost of 1 more reset isn't known.")
    slight = [harmful(lost_us=2000.0, verdict="slight")]
    verdict, text = answer([capture()], slight)
    assert verdict == "slight"
    assert text.endswith("That is too little to matter: less than 1% of each connection's busy time.")


@pytest.mark.slow
def test_no_reset_delayed_anything_only_where_all_that_could_be_seen_was() -> None:
    rows = [connection(resets=3, resets_idle=3, verdict="nothing_waited"), connection("web2")]
    both = [capture("web1"), capture("web2")]
    seen = "reset delayed anything: 3 resets on 2 connections of 2 hosts."
    assert answer(both, rows) == ("nothing_waited", f"No {seen}")
    assert answer(both, rows[1:]) == ("no_reset", "No window was reset on 1 connection of 2 hosts.")
    assert answer([*both, FAILED], rows) == (
        "unknown", f"{OPEN}, because 1 capture couldn't be read. By what is there, no {seen}",
    )  # fmt: skip
    lossy = [both[0], both[1] | {"whole": False}]
    assert answer(lossy, rows)[1] == f"{OPEN}, because 1 capture is not whole. By what is there, no {seen}"
    blind = [both[0], both[1] | {"can_see_idle": False}]
    assert f"{OPEN}, because no probe could see idle resets in 1 capture." in answer(blind, rows)[1]
    unknown = [connection(resets=2, resets_unknown=2, predicted_us=3e6, verdict="unknown")]
    assert answer(both, unknown) == (
        "unknown", f"{OPEN}, because the cost of 2 of 2 resets wasn't measured (about 3.00 s, estimated).",
    )  # fmt: skip
    mostly = [connection(verdict="other_end"), connection(verdict="other_end"), connection()]
    assert answer(both, mostly)[1] == f"{OPEN}, because it can't be told for 2 of 3 connections of 2 hosts."


def test_failed_captures_are_counted_and_listed_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [FAILED | {"capture": f"{n}.cwnd"} for n in range(7)]
    frames = fleet([capture(), *broken], [connection()])
    lines = printed(frames, None, monkeypatch)
    assert lines[:2] == [
        "! 7 of 8 captures couldn't be read, so no figure here has what is in them.",
        "! 0.cwnd of web9: It is empty.",
    ]
    assert lines[6] == "! and 2 more captures that couldn't be read; --json has them all."
    assert lines[7].startswith(OPEN)
    found = json.loads(call(frames, "--json").stdout)
    assert sum("It is empty." in line for line in found["caveats"]) == 7


def test_captures_that_are_not_whole_or_were_filtered_differently_are_said() -> None:
    rows = [
        capture("a", state="interrupted", whole=False), capture("b", whole=False, lost_records=12),
        capture("c", whole=False, absent_records=1), capture("d", can_see_idle=False),
    ]  # fmt: skip
    limits = fleet_limits.limits(fleet(rows).captures)
    assert limits == [
        "3 of 4 captures aren't whole, so figures may be too low: a.cwnd of a (it is interrupted); a.cwnd of b (12 "
        "records were lost); a.cwnd of c (1 record missing or lacking values).",
        "No probe could see idle resets in 1 of 4 captures: a.cwnd of d.",
    ]
    filtered = fleet([capture("a"), capture("b", filters="port=443")])
    assert fleet_limits.limits(filtered.captures) == [
        "Captures were filtered in different ways, so their figures can't be compared: no filter in 1; port=443 in 1."
    ]


# ---- JSON -------------------------------------------------------------------------------------------


def test_json_has_all_rows_and_no_missing_figure_is_a_number(written: Frames) -> None:
    result = call(written, "--json", "--top", "1")
    assert result.exit_code == 0
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    assert len(found["captures"]) == 14
    assert len(found["by_host"]) == 7
    assert [row["setting"] for row in found["settings"]] == ["net.ipv4.tcp_slow_start_after_idle"] * 2
    assert found["change"][0]["text"] == "costs less"
    assert found["captures"][4]["started"] is None
    assert found["since"] == "2026-11-18T00:00:00+00:00"
    bare = json.loads(call(written, "--json", since=None).stdout)
    assert (bare["since"], bare["change"]) == (None, None)
    assert "side" not in bare["captures"][0]


@pytest.mark.slow
@pytest.mark.parametrize("captures", [[], [FAILED], [capture()]])
def test_a_fleet_with_nothing_in_it_has_a_report(captures: list[dict[str, Any]], tmp_path: Path) -> None:
    for since in (WHEN, None):
        for option in ("--json", "--by=service"):
            result = call(fleet(captures), option, "--html", str(tmp_path / "a.html"), since=since)
            assert result.exit_code == 0, result.output
            page = (tmp_path / "a.html").read_text()
            assert page.count("<table") == 0
            assert f"a fleet of {plural(len(captures), 'host')}<" in page


# ---- hostile names ----------------------------------------------------------------------------------


def attacked(text: str) -> Frames:
    """Return a fleet in which all that a capture can name is ``text``."""
    names: dict[str, Any] = {"workload": text, "service": text, "process": text, "ca_name": text, "kernel": text}
    hosts = [f"{text}{n}" for n in range(6)]
    captures = [
        capture(host, f"{text}{day}", day, kernel=text, clock_steps=1, clock_shift_s=5.0, ahead_s=9.0, state=text)
        for host in hosts
        for day in (BEFORE, AFTER)
    ]
    for row in captures:
        row |= {"whole": False, "can_see_idle": False}
    captures.append(capture(text, text, status="failed", reason=text, whole=False))
    rows = [harmful(row["host"], row["capture"], daddr=text, saddr=text, **names) for row in captures[:-1]]
    spaces = [setting(row["host"], row["capture"], n % 2) for n, row in enumerate(captures[:-1])]
    return fleet(captures, rows, spaces)


@pytest.fixture(scope="module")
def markup() -> set[tuple[str, str]]:
    """The tags and attributes on the page of a harmless fleet."""
    return hostile.Markup(content.page(summary.report(attacked("nginx"), since=SINCE))).found


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", [*hostile.NAMES, "everything"])
def test_hostile_names_are_harmless_everywhere(
    name: str, markup: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = hostile.NAMES.get(name, hostile.TEXT)
    frames = attacked(text)
    found = summary.report(frames, since=SINCE)
    for columns in (80, 140):
        assert len(shown(found, columns, monkeypatch)) > 30
    monkeypatch.setattr(summary, "report", lambda *_: found)
    line = call(frames, "--json").stdout
    assert line.isascii()
    assert line.rstrip("\n").isprintable()
    assert json.loads(line)["by_kernel"][0]["kernel"] == text
    html = content.page(found)
    assert [part for part in html.split("\n") if not part.isprintable()] == []
    assert hostile.Markup(html).found <= markup
    assert "49$" not in html


# ---- the page ---------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_has_all_that_the_screen_has(written: Frames, tmp_path: Path) -> None:
    result = call(written, "--html", str(tmp_path / "a.html"))
    assert result.stderr == f"The page is in {tmp_path / 'a.html'}.\n"
    assert (tmp_path / "a.html").stat().st_mode & 0o777 == 0o600
    html = (tmp_path / "a.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    assert "default-src 'none'" in html
    for title in ("workload and service", "host", "network of the peer", "kernel"):
        assert f"<h2>Cost by {title}</h2>" in html
    assert re.search(r"web7 \([\d.]+&nbsp;s\), ", html)
    assert "costs less" in html
    assert "couldn&#39;t be read" in html
    assert html.count("<table") == html.count('class="scroll" role="region" tabindex="0" aria-label="') == 6
    # An unknown figure sorts below all others, and no cell says nan.
    assert "nan" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.DOTALL)
