# SPDX-License-Identifier: Apache-2.0
"""The report begins with the answer, and its page is harmless whatever a capture contains."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pyarrow as pa
import pytest
from click import unstyle
from click.testing import CliRunner, Result

import cwndtrace
from cwndtrace import format as fmt
from cwndtrace.cli import main, report
from cwndtrace.report import content
from cwndtrace.report.page import page
from cwndtrace.trace import Trace
from tests.unit import drawing, frames, hostile
from tests.unit.terminal import printed_lines

LOSSY = {"event": "block_io", "start_ns": frames.MONO, "end_ns": frames.MONO + 10**9, "lost": 1234}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.cwnd"


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A capture of two connections with idle resets, which no test changes."""
    return frames.two_idle_connections(tmp_path_factory.mktemp("idle") / "a.cwnd")


@pytest.fixture(scope="module")
def drawn(idle: Trace) -> str:
    """Its page, with pictures."""
    return page(content.report(idle))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing.leave_undrawn(monkeypatch)


def call(trace: Trace, *options: str) -> Result:
    """Report on a capture that is loaded, so that it isn't analysed again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cwndtrace, "load", lambda *_, **__: trace)
        return invoke(trace.path, *options)


def invoke(path: Path, *options: str) -> Result:
    result = CliRunner().invoke(main, ["report", str(path), *options])
    assert result.exit_code == 0, result.output
    return result


# ---- terminal and JSON ------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_the_text_begins_with_the_answer_and_ends_with_the_remedies(idle: Trace) -> None:
    lines = call(idle).stdout.splitlines()
    assert lines[0] == idle.host().text
    assert lines[0].startswith("Idle resets made ")
    assert len(lines) <= 40
    table = lines.index(next(line for line in lines if line.startswith("CONNECTION")))
    assert [line.split()[0] for line in lines[table + 1 : table + 3]] == ["10.1.0.1:443"] * 2
    assert any(line.startswith("Idle because of the application: ") for line in lines)
    assert any(line.startswith("loop0 ") for line in lines)
    last = lines.index("What to do")
    assert lines[last + 1].startswith("1. sysctl -w net.ipv4.tcp_slow_start_after_idle=0: saves ")
    assert "(measured)" in lines[last + 1]
    # Where a setting lasts takes more room than the screen has.
    assert "sysctl.d" not in "".join(lines)
    assert "/etc/sysctl.d/90-cwndtrace.conf" in page(content.report(idle))


@pytest.mark.usefixtures("undrawn")
def test_resets_to_come_are_named_on_the_screen_in_json_and_on_the_page(path: Path) -> None:
    windows = [(151, 75), (75, 37), (37, 18)]
    resets = [
        frames.reset(10 + n, cwnd_before=before, cwnd_after=after, idle_us=998_000, bytes_sent=40_000_000 + 20 * n)
        for n, (before, after) in enumerate(windows)
    ]
    seen = [frames.snapshot(60, sock_cookie=n, dport=n, last_snd_us=10_000_000) for n in (1, 2, 3)]
    tables = {"resets": frames.table("cwnd_reset", *resets), "connections": frames.snapshots(*seen)}
    trace = frames.capture(path, **tables)
    lines = call(trace).stdout.splitlines()
    at = lines.index("Will be reset, as of the last snapshot")
    assert [lines[at + 1].split(" (")[0], lines[at + 3]] == ["10.1.0.1:443 > 10.2.0.9:1", "and 1 more connection"]
    beat = lines[lines.index("Messages slower than the RTO") + 1]
    assert "about 20 B each 998 ms" in beat
    assert "from 151 to 18 segments" in beat
    report = json.loads(call(trace, "--json").stdout)
    assert [row["dport"] for row in report["due"]] == [1, 2, 3]
    assert report["heartbeats"][0]["resets"] == 3
    text = unescape(page(content.report(trace))).replace("\u00a0", " ")
    assert "about 20 B each 998 ms" in text
    assert text.count("idle for 10.0 s, longer than its RTO of 308 ms") == 3


def test_a_time_that_nothing_tells_is_a_dash(path: Path) -> None:
    never_issued = frames.table("block_io", frames.block(1, 1500, issue_ns=0), frames.block(2, 2500, issue_ns=0))
    (line,) = (line for line in screen(frames.capture(path, block_io=never_issued)) if line.startswith("loop0"))
    assert line.split() == "loop0 read 2 1.50 ms 2.50 ms 2.50 ms 2.50 ms - - 0".split()  # noqa: SIM905


def test_long_connections_are_shortened_before_columns_are_left_out(path: Path) -> None:
    ends = {"family": 10, "saddr": "2001:db8:1111:2222:3333:4444:5555:6666", "daddr": "2001:db8:a:b:c:d:e:ffff"}
    seen = [frames.snapshot(at, bytes_sent=at * 100_000, **ends) for at in (0, 9)]
    found = content.report(frames.capture(path, connections=frames.snapshots(*seen)))
    lines = printed_lines(140, lambda: click.echo("\n".join(report.lines(found))))
    at = next(number for number, line in enumerate(lines) if line.startswith("CONNECTION"))
    assert re.split(r"  +", lines[at]) == [
        "CONNECTION", "PROCESS", "CC", "RESETS", "HARMFUL", "COST", "LONGEST IDLE", "RTT", "VERDICT",
    ]  # fmt: skip
    assert re.match(r"\[2001:d\S*\.\.\S*6666\]:443 > \[2001:d\S*ffff\]:51324 ", lines[at + 1])


@pytest.mark.parametrize(("number", "more"), [(8, 0), (9, 1)])
def test_connections_beyond_the_first_eight_are_counted(path: Path, number: int, more: int) -> None:
    rows = [frames.snapshot(at, sock_cookie=n, dport=n, bytes_sent=at) for n in range(1, number + 1) for at in (1, 30)]
    text = "\n".join(screen(frames.capture(path, connections=frames.snapshots(*rows))))
    assert (text.count(" > 10.2.0.9:"), text.count(" more connection")) == (8, more)


def test_json_is_one_object_with_the_same_figures(idle: Trace) -> None:
    report = json.loads(call(idle, "--json").stdout, parse_constant=lambda text: pytest.fail(text))
    assert report["event"] == "report"
    assert report["answer"]["text"] == idle.host().text
    assert len(report["connections"]) == 2
    assert sum(row["lost_us"] for row in report["connections"]) == pytest.approx(report["answer"]["lost_us"])
    assert report["remedies"][0]["remedy"] == "sysctl"
    assert report["namespaces"][0]["slow_start_after_idle"] == 1
    assert report["connections"][0]["first_seen"].endswith("+00:00")
    assert sum(row["count"] for row in report["block_io_by_process"]) == 400


def test_json_has_the_verdict_on_each_reset_with_its_evidence(idle: Trace) -> None:
    resets = json.loads(call(idle, "--json").stdout)["resets"]
    assert len(resets) == len(idle.verdicts) > 9
    for row, judged in zip(resets, idle.verdicts.to_dict("records"), strict=True):
        assert row["why"] == idle.explain(row["row"]).text
        known = judged["lost_us"] == judged["lost_us"]
        assert (row["verdict"], row["lost_us"]) == (judged["verdict"], judged["lost_us"] if known else None)
        assert (row["cwnd_before"], row["cwnd_after"]) == (judged["cwnd_before"], judged["cwnd_after"])
        assert (row["connection"], row["cause"]) == (judged["connection"], "application")
        assert row["time"] == judged["time"].isoformat()
    assert {row["connection"] for row in resets} == {*idle.summary()["connection"]}


def test_json_of_a_reset_whose_burst_is_unknown_has_nulls(path: Path) -> None:
    trace = frames.capture(path, resets=frames.table("cwnd_reset", frames.reset(1)))
    (row,) = json.loads(call(trace, "--json").stdout)["resets"]
    assert (row["verdict"], row["burst_bytes"], row["predicted_us"]) == ("unknown", None, None)
    assert "its window wasn't followed" in row["why"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "caveat"),
    [
        ({"counts": {"block_io": {"kept": 1, "lost": 1234}}, "lossy": [LOSSY]}, "1,234 block requests were lost"),
        ({"counts": {"block_io": {"lost": 0}, "cwnd_reset": {"lost": 7}}}, "7 records of cwnd_reset were lost"),
        ({"probes": {"idle": "sendmsg", "app_limited": None}}, "reason app_limited couldn't be seen"),
        ({"block_io": None, "counts": {"cwnd_reset": {"kept": 5}}}, "Block I/O wasn't recorded"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_gaps_of_a_capture_are_in_the_text_in_json_and_on_the_page(
    path: Path, values: dict[str, Any], caveat: str
) -> None:
    trace = frames.two_idle_connections(path, **values)
    report = unescape(page(content.report(trace))).replace("\u00a0", " ")
    shown = call(trace).stdout
    assert f"! {caveat}" in shown.replace("! Resets of ", "! ")
    for text in (shown, " ".join(call(trace, "--json").stdout.split()), report):
        assert text.count(caveat) == 1
        assert text.lower().count("requests were lost") <= 1


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["empty", "block I/O only", "interrupted", "cut off"])
def test_incomplete_captures_are_reported(path: Path, kind: str) -> None:
    if kind == "empty":
        frames.capture(path)
    elif kind == "block I/O only":
        frames.capture(path, block_io=frames.disk(50))
    else:
        frames.two_idle_connections(path)
        if kind == "interrupted":
            meta = json.loads((path / "meta.json").read_text())
            (path / "meta.json").write_text(json.dumps(meta | {"status": "running", "ended": None, "pid": 0}))
        else:
            (part,) = (path / "cwnd_reset").glob("*.parquet")
            part.write_bytes(part.read_bytes()[:-50])
    result = invoke(path, "--html", str(path.parent / "a.html"))
    text = (path.parent / "a.html").read_text(encoding="utf-8")
    expected = {
        "empty": "No TCP connection was seen.", "block I/O only": "No TCP connection was seen.",
        "interrupted": "! The capture is interrupted", "cut off": "! cwnd_reset/part-000001.parquet is cut off",
    }[kind]  # fmt: skip
    assert expected in result.stdout
    assert expected.removeprefix("! ") in text
    assert ("1. Trace again while connections are open" in result.stdout) == expected.startswith("No TCP")
    assert ("Heat map" in text) == (kind != "empty")
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text)


def test_the_error_says_that_a_page_cannot_be_written(path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(frames.capture(path).path), "--html", str(path / "no" / "a.html")])
    assert result.exit_code == 1
    assert "can't be written" in result.stderr


# ---- the page ---------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """A parser that collects the tags and attributes that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def of(self, attribute: str) -> list[str]:
        """Return the values of an attribute, of all tags."""
        return [str(attrs[attribute]) for _, attrs in self.tags if attribute in attrs]


@pytest.mark.slow
def test_no_text_of_a_capture_is_taken_for_markup_or_controls_a_terminal(tmp_path: Path, drawn: str) -> None:
    # A file's name is bytes, and the locale may be unable to encode these characters.
    trace = hostile.everywhere(tmp_path / os.fsdecode("<b>\x1b[2J\u202e.cwnd".encode()))
    screen = call(trace).stdout
    assert all(line.isprintable() for line in screen.splitlines())
    assert "\u202e" not in json.loads(call(trace, "--json").stdout)["answer"]["text"]
    text = page(content.report(trace))
    plain, tags = Tags(drawn), Tags(text)
    assert {tag for tag, _ in tags.tags} <= {tag for tag, _ in plain.tags}
    assert {name for _, attrs in tags.tags for name in attrs} <= {name for _, attrs in plain.tags for name in attrs}
    assert sum(tag == "script" for tag, _ in tags.tags) == 1
    assert all(line.isprintable() for line in text.splitlines())
    assert "49" not in re.findall(r"owned.{0,12}", text)[0]
    for picture in (*tags.of("src"), *tags.of("srcset")):
        root = ElementTree.fromstring(base64.b64decode(picture.partition("base64,")[2]))
        assert not [e for e in root.iter() if e.tag.endswith(("script", "foreignObject", "}a"))]


def test_the_page_loads_nothing_from_outside(drawn: str) -> None:
    tags = Tags(drawn)
    asked = [value for name in ("src", "srcset", "href", "data", "action") for value in tags.of(name)]
    assert asked
    assert all(value.startswith(("data:image/svg+xml;base64,", "#")) for value in asked)
    anchors = {value[1:] for value in tags.of("href")}
    assert anchors <= set(tags.of("id"))
    assert {"t0", "t1", "connections"} <= anchors


def test_the_pages_policy_allows_only_its_own_script_and_styles(path: Path) -> None:
    tags = Tags(page(content.report(frames.capture(path))))
    (policy,) = (
        str(attrs["content"]) for _, attrs in tags.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert {name for name, value in rules.items() if value == "'none'"} == {"default-src", "base-uri", "form-action"}
    assert rules["img-src"] == "data:"
    assert all(rules[name].startswith("'sha256-") for name in ("style-src", "script-src"))
    assert len(rules) == 6


@pytest.mark.slow
def test_the_same_capture_gives_the_same_page(idle: Trace, drawn: str) -> None:
    assert page(content.report(idle)) == drawn


@pytest.mark.slow
def test_the_page_of_a_large_capture_stays_small(path: Path) -> None:
    resets, connections = frames.story(peers=210, seconds=10)
    trace = frames.capture(path, resets=resets, connections=connections, block_io=frames.disk(19_000))
    text = page(content.report(trace))
    assert len(text) < 8_000_000
    assert "And 10 more that their resets cost less." in text


# ---- groups of connections --------------------------------------------------------------------------


WEB = {"workload": "default/web-7d9c5b8f6d-x2x4q/nginx", "process": "nginx"}
NAMES: list[dict[str, Any]] = [
    WEB | {"listener": "nginx", "listener_pid": 7},
    WEB | {"listener": "", "listener_pid": 0},
    {"workload": "postgresql@15-main.service", "process": "postgres", "listener": "postgres", "listener_pid": 9},
    {"workload": "", "process": "curl"},
]


def sixty(path: Path, *names: dict[str, Any]) -> Trace:
    """Write a capture of 60 connections, and return it as if its records had ``names``."""
    resets, connections = frames.story(peers=60, seconds=8)
    # Each connection has a local address of its own, so that none has the service of another one.
    seen = connections.to_pandas()
    made = resets.to_pandas()
    for frame in (seen, made):
        frame["saddr"] = [f"10.1.0.{cookie % 250}" for cookie in frame["sock_cookie"]]
    tables = {
        "resets": pa.Table.from_pandas(made, schema=resets.schema, preserve_index=False),
        "connections": pa.Table.from_pandas(seen, schema=connections.schema, preserve_index=False),
    }
    return frames.named(frames.capture(path, **tables), *names)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Sixty connections with all names, which no test changes."""
    return sixty(tmp_path_factory.mktemp("sixty") / "a.cwnd", *NAMES)


def screen(trace: Trace, by: str | None = None, prefix: tuple[int, int] = (24, 48)) -> list[str]:
    return [unstyle(line) for line in report.lines(content.report(trace, by, prefix))]


def test_sixty_connections_have_a_row_for_each_service_of_a_workload(grouped: Trace, path: Path) -> None:
    lines = screen(grouped)
    at = next(number for number, line in enumerate(lines) if line.startswith("WORKLOAD"))
    heads = ["WORKLOAD", "SERVICE", "CONNECTIONS", "RESETS", "HARMFUL", "COST", "CAUSE", "WORST CONNECTION", "ITS COST"]
    assert re.split(r"  +", lines[at]) == [*heads, "VERDICT"]
    rows = [re.split(r"  +", line) for line in lines[at + 1 : at + 5]]
    assert {(row[0], row[1], row[2]) for row in rows} == {
        (WEB["workload"], "nginx:443", "15"), (WEB["workload"], "outgoing nginx", "15"),
        ("postgresql@15-main.service", "postgres:443", "15"), ("-", "curl", "15"),
    }  # fmt: skip
    assert all(row[-1].startswith("harmful: its burst was late") for row in rows)
    assert lines[at + 5] == ""
    assert lines[at + 6].startswith("CONNECTION ")
    left_out = next(line for line in lines if line.startswith("and 52 more connections: "))
    total = sixty(path.parent / "b.cwnd").summary().iloc[8:]
    assert f"{total['resets'].sum()} resets, {total['resets_harmful'].sum()} of them harmful" in left_out


def test_groups_that_the_screen_has_no_room_for_are_summed_up(path: Path) -> None:
    trace = sixty(path, *({"workload": f"{n}.service"} for n in range(12)))
    lines = screen(trace, "workload")
    rest = trace.groups("workload").iloc[8:]
    (line,) = (line for line in lines if line.startswith("and 4 more workloads with 20 connections: "))
    assert f"{rest['resets'].sum()} resets, " in line
    assert "; cost " in line


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("by", "first"),
    [("workload", "WORKLOAD"), ("service", "WORKLOAD"), ("peer", "PEERS"), ("connection", "CONNECTION")],
)
def test_the_groups_that_were_asked_for_come_first(grouped: Trace, by: str, first: str) -> None:
    heads = [line.split()[0] for line in screen(grouped, by) if line[:4].isupper()]
    assert heads[:2] == ([first, "CONNECTION"] if by != "connection" else ["CONNECTION", "and"])[: len(heads)]
    found = content.as_json(content.report(grouped, by))
    assert found["grouped_by"] == by
    assert sum(row["connections"] for row in found["groups"]) == len(found["connections"]) == 60
    for name in ("resets", "resets_harmful", "lost_us"):
        assert sum(row[name] for row in found["groups"]) == sum(row[name] for row in found["connections"])


@pytest.mark.slow
def test_no_table_of_groups_is_printed_that_tells_nothing(path: Path) -> None:
    nameless = screen(sixty(path))
    assert not [line for line in nameless if line.startswith(("WORKLOAD", "SERVICE", "All "))]
    # Whoever asks for it gets it.
    assert [line for line in screen(sixty(path.parent / "b.cwnd"), "service") if line.startswith("SERVICE")]
    same = screen(sixty(path.parent / "c.cwnd", NAMES[0]))
    assert f"All 60 connections are of nginx:443 in {WEB['workload']}." in same
    assert not [line for line in same if line.startswith("WORKLOAD")]


def test_a_prefix_is_for_peers_and_may_be_each_address(idle: Trace) -> None:
    assert any(
        line.startswith("10.2.0.0/16 ") for line in call(idle, "--by", "peer", "--prefix", "16").stdout.split("\n")
    )
    assert (
        json.loads(call(idle, "--by", "peer", "--prefix", "/32,/128", "--json").stdout)["groups"][0]["peer"]
        == "10.2.0.9"
    )
    for options, cause in (
        (("--prefix", "24"), "add --by peer"), (("--by", "peer", "--prefix", "33"), "write 16, or 24,64"),
        (("--by", "peer", "--prefix", "24,129"), "write 16"), (("--by", "peer", "--prefix", "x"), "isn't a prefix"),
        (("--by", "pod"), "is not one of"),
    ):  # fmt: skip
        result = CliRunner().invoke(main, ["report", str(idle.path), *options])
        assert (result.exit_code, cause in result.stderr) == (2, True), result.stderr


def unreset(path: Path, *names: dict[str, Any]) -> Trace:
    """Return a trace of four connections whose windows were never reset, so that their page has no pictures."""
    rows = [frames.snapshot(at, sock_cookie=n, saddr=f"10.1.0.{n}") for at in (0, 9) for n in (1, 2, 3, 4)]
    return frames.named(frames.capture(path, connections=frames.snapshots(*rows)), *names)


@pytest.mark.slow
def test_the_page_has_the_groups_before_the_connections(path: Path) -> None:
    text = page(content.report(unreset(path, *NAMES)))
    assert text.index('<section id="groups">') < text.index('<section id="connections">')
    assert text.count("<bdi>outgoing nginx</bdi>") == 1
    assert "Connections by workload and service" in text
    nameless, same = (page(content.report(unreset(path.parent / f"{n}.cwnd", *NAMES[:n]))) for n in (0, 1))
    assert '<section id="groups">' not in nameless + same
    assert f"All 4&nbsp;connections are of nginx:443 in {WEB['workload']}." in same


@pytest.mark.slow
def test_no_name_of_a_workload_is_taken_for_markup_or_controls_a_terminal(path: Path) -> None:
    # A Trace gives texts without control characters; nothing that shows them relies on that.
    evil = dict.fromkeys(("workload", "process", "cmdline", "listener"), hostile.TEXT)
    names = evil | {"listener_pid": 1}, evil | {"listener": "", "listener_pid": 0}
    traces = {
        number: [unreset(path.parent / f"{number}{n}.cwnd", *each[:number]) for n, each in enumerate((names, NAMES))]
        for number in (1, 2)
    }
    for number, by in itertools.product((1, 2), (None, "workload", "service")):
        trace, plain = traces[number]
        found = content.report(trace, by)
        text, harmless, lines = page(found), page(content.report(plain, by)), screen(trace, by)
        assert all(line.isprintable() for line in (*lines, *text.splitlines()))
        assert "owned" in " ".join(lines)
        assert {tag for tag, _ in Tags(text).tags} == {tag for tag, _ in Tags(harmless).tags}
        assert sum(tag == "script" for tag, _ in Tags(text).tags) == 1
        assert fmt.json_line(content.as_json(found)).isprintable()
