# SPDX-License-Identifier: Apache-2.0
"""The command line without root: help, options, bad input and exit codes."""

from __future__ import annotations

import errno
import json
import os
import stat
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import click
import pytest
from click.testing import CliRunner, Result

import cwndtrace
from cwndtrace import errors
from cwndtrace.capture import target
from cwndtrace.cli import COMMANDS, exit_code, files, main
from cwndtrace.cli.options import Bytes, Span
from cwndtrace.cli.plot import ENDINGS
from cwndtrace.errors import CwndtraceError
from cwndtrace.lab.link import Link
from cwndtrace.lab.scenario import Scenario
from cwndtrace.records import arrow
from tests.unit import frames

RESETS = frames.table("cwnd_reset", frames.reset(1.0))
BLOCKS = frames.table("block_io", frames.block(1.5))
START_3 = arrow.iso_time(frames.MONO + frames.OFFSET + 3 * frames.SECOND).rstrip("Z")
"""Three seconds after the beginning of captures."""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command as a user who isn't root."""
    monkeypatch.setattr(os, "geteuid", lambda: 65534)


# ---- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_an_example(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    _, separator, examples = result.output.partition("Example")
    assert separator, result.output
    assert f"cwndtrace {name} " in f"{examples}".replace("\n", " ")
    assert call(name, "-h").output == result.output


def test_help_names_the_first_commands_to_run() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert "sudo cwndtrace doctor" in result.output
    assert "sudo cwndtrace run --iface eth0" in result.output


def test_version_names_the_program() -> None:
    assert call("--version").output.startswith("cwndtrace, version ")


# ---- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("2s", 2), ("2", 2), ("1.5m", 90), (".5", 0.5), ("10 min", 600), ("1h", 3600), ("250us", 0.00025)],
)
def test_time_spans_are_parsed(text: str, seconds: float) -> None:
    assert Span().convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1 fortnight", "1e3", "1.2.3s", "s"])
def test_other_texts_than_time_spans_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a time span: write 500ms, 2s or 10m"):
        Span().convert(text, None, None)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["run", "--probe", "crystal-ball"], "'crystal-ball' is not one of"),
        (["run", "-d", "soon"], "'soon' is not a time span"),
        (["run", "-p", "nginx"], "'nginx' is not a valid integer"),
        (["run", "--colour"], "No such option"),
        (["run", "-4", "-6"], "-4 and -6 exclude each other"),
        (["reproduce", "-6", "-4"], "-4 and -6 exclude each other"),
        (["reproduce", "--probe", "crystal-ball"], "'crystal-ball' is not one of"),
        (["reproduce", "--burst", "100k,much"], "'much' is not an amount: write 300k, 2M or 1G"),
        (["trace"], "No such command 'trace'"),
        (["plot"], "Missing argument"),
    ],
)
def test_usage_errors_exit_with_2_and_name_the_cause(arguments: list[str], cause: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert cause in result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("command", ["run", "doctor"])
def test_commands_that_need_root_say_so_without_it(command: str) -> None:
    result = call(command)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == ["  prefix the command with sudo"]
    assert "needs root" in result.stderr
    assert result.stdout == ""


# ---- reproduce -------------------------------------------------------------------------------------


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Skip the check for root, in an empty folder.

    os.geteuid stays, because files that a test creates still belong to the real user, and their owner is checked.
    """
    monkeypatch.setattr(target, "need_root", lambda _: None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--rtt", "0s"], "an RTT of 0 ms is out of range"),
        (["--rate", "1k"], "a rate of 1000 bit/s is out of range"),
        (["--burst", "3"], "a burst of 3 bytes is out of range"),
        (["--rounds", "0"], "0 rounds are out of range"),
        (["--against", "example.org"], "'example.org' is not of the form HOST:PORT"),
        (["--against", "example.org:0"], "'example.org:0' is not of the form HOST:PORT"),
        (["--against", "h:1", "--rtt", "5ms"], "--rtt can't change the real path to h:1"),
        (["--against", "h:1", "--loss", "0"], "--loss can't change the real path to h:1"),
        (["--against", "h:1", "-6"], "-4 or -6 can't change the real path to h:1"),
        (["--against", "h:1", "--path", "relay"], "--path can't change the real path to h:1"),
        (["--plain"], "--plain needs --against"),
        (["--allow-sysctl"], "--allow-sysctl needs --against"),
    ],
)
def test_reproduce_refuses_values_out_of_range_and_options_that_exclude_each_other(
    arguments: list[str], cause: str
) -> None:
    result = call("reproduce", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert cause in lines[0]
    assert not list(Path.cwd().iterdir())


@pytest.mark.usefixtures("root")
def test_reproduce_passes_its_options_to_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Scenario] = []

    def lab(scenario: Scenario, path: str | None) -> None:
        assert path == "relay"
        asked.append(scenario)
        raise errors.KernelLacks("no lab here")

    # import_module is needed because the package's attribute of this name is the command.
    monkeypatch.setattr(import_module("cwndtrace.cli.reproduce"), "Lab", lab)
    changes = ["--rtt", "150ms", "--rate", "20M", "--burst", "60k,1.5M", "--idle", "300ms,2s", "--cc", "reno", "-6"]
    result = call("reproduce", *changes, "--path", "relay", "-o", "new")
    assert result.exit_code == 77
    assert asked == [
        Scenario(
            link=Link(rtt_ms=150, rate=20e6),
            bursts=(60_000, 1_500_000),
            idle_times=(0.3, 2.0),
            rounds=4,
            cc="reno",
            family=6,
        )
    ]
    assert all(isinstance(burst, int) for burst in asked[0].bursts)
    assert not Path("new").exists()


# ---- exit codes ------------------------------------------------------------------------------------


def test_each_error_has_its_exit_code() -> None:
    assert exit_code(errors.NoProbe("x", "y", {})) == 77
    assert exit_code(errors.KernelLacks("x")) == 77
    assert exit_code(errors.UsageError("x")) == 2
    for error in (errors.CaptureError, errors.NotFound, errors.PermissionNeeded, errors.BccError):
        assert exit_code(error("x")) == 1


def test_an_error_is_two_lines_without_control_characters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(path: object, max_rows: int) -> None:  # noqa: ARG001
        raise errors.CaptureError("no \x1b[31mname\nof yours", "try \x07another")

    monkeypatch.setattr("cwndtrace.load", fail)
    result = call("plot", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "cwndtrace: no ?[31mname?of yours\n  try ?another\n"


# ---- plot ------------------------------------------------------------------------------------------


def test_plot_writes_and_names_its_file(tmp_path: Path) -> None:
    capture = frames.capture(tmp_path / "a.cwnd", resets=RESETS, block_io=BLOCKS)
    result = call("plot", capture.path, "-o", tmp_path / "a.svg")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path / 'a.svg'}\n", "")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_plot_refuses_other_paths_than_captures(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing", "\x1b[2J"):
        result = call("plot", tmp_path / name, "-o", tmp_path / "a.png")
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 2
        assert result.stderr.startswith("cwndtrace: ")
        assert "\x1b" not in result.stderr
        assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not (tmp_path / "a.png").exists()


def test_plot_of_a_newer_capture_asks_for_an_upgrade(tmp_path: Path) -> None:
    capture = frames.capture(tmp_path / "a.cwnd", resets=RESETS)
    meta = json.loads((capture.path / "meta.json").read_text())
    (capture.path / "meta.json").write_text(json.dumps(meta | {"schema": 999, "version": "9.9"}))
    result = call("plot", capture.path)
    assert result.exit_code == 1
    assert "has schema 999" in result.stderr
    assert "Upgrade cwndtrace" in result.stderr


def test_plot_of_a_damaged_capture_draws_the_other_records_and_warns(tmp_path: Path) -> None:
    capture = frames.capture(tmp_path / "a.cwnd", resets=RESETS, block_io=BLOCKS)
    (part,) = (capture.path / "block_io").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-100])
    result = call("plot", capture.path, "-o", tmp_path / "a.png")
    assert result.exit_code == 0
    assert "warning: block_io/part-000001.parquet is cut off or corrupt" in result.stderr
    assert (tmp_path / "a.png").exists()


def test_plot_names_the_reason_if_its_file_cannot_be_written(tmp_path: Path) -> None:
    capture = frames.capture(tmp_path / "a.cwnd", resets=RESETS)
    (tmp_path / "file").write_text("somebody's")
    (tmp_path / "link.png").symlink_to("file")
    (tmp_path / "dangling.png").symlink_to("new")
    reasons = {
        "missing/a.png": "No such file or directory",
        "link.png": "it is a symbolic link to a file",
        "dangling.png": "it is a dangling symbolic link",
        f"{'x' * 300}.png": "File name too long",
    }
    for name, reason in reasons.items():
        result = call("plot", capture.path, "-o", tmp_path / name)
        assert result.exit_code == 1
        assert result.stderr == f"cwndtrace: {tmp_path / name} can't be written: {reason}.\n  Choose another file.\n"
    assert (tmp_path / "file").read_text() == "somebody's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.cwnd", "dangling.png", "file", "link.png"]


@pytest.mark.parametrize("name", ["a.ps", "a.eps", "a.nonsense", "png", "a.png\n%!.ps"])
def test_plot_refuses_other_formats_than_png_svg_and_pdf(tmp_path: Path, name: str) -> None:
    capture = frames.capture(tmp_path / "a.cwnd", resets=RESETS)
    result = call("plot", capture.path, "-o", tmp_path / name)
    assert result.exit_code == 2
    assert "doesn't end in .png, .svg or .pdf." in result.stderr
    assert "Give it one of these endings with -o." in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.cwnd"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_picture_does_not_contain_its_file_name_and_replaces_the_old_file(tmp_path: Path, ending: str) -> None:
    capture = frames.capture(tmp_path / "a.cwnd", resets=RESETS, block_io=BLOCKS)
    file = tmp_path / f"x\nALL ALL=(ALL) NOPASSWD: ALL\ny.{ending.upper()}"
    file.write_text("the old one")
    file.chmod(0o644)
    assert call("plot", capture.path, "-o", file).exit_code == 0
    assert b"NOPASSWD" not in file.read_bytes()
    assert len(file.read_bytes()) > 5000
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("the old one")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        assert [p.name.startswith(".cwndtrace-") for p in tmp_path.iterdir() if p.name != "a"] == [True]
        raise OSError(errno.ENOSPC, "the disk is full")

    with pytest.raises(CwndtraceError, match="can't be written: the disk is full"):
        files.write(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "wb"):
        files.write(Path(f"/proc/self/fd/{writing}"), lambda file: file.write(b"a page"))
        assert os.read(pipe.fileno(), 100) == b"a page"
    with pytest.raises(CwndtraceError, match="Is a directory"):
        files.write(tmp_path, lambda file: file.write(b"a page"))


# ---- a window of the past --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "cause", "cure"),
    [
        (("--keep", "5s"), "--keep is 5 s, and a window takes at least 10 s", "write --keep 10s or more"),
        (("--keep-size", "1M"), "--keep-size is 1 MB, and a window takes at least 20 MB", "write --keep-size 20MB"),
    ],
)
def test_a_window_smaller_than_a_part_is_refused(option: tuple[str, str], cause: str, cure: str) -> None:
    result = call("run", *option)
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert first.startswith(f"cwndtrace: {cause}")
    assert second.startswith(f"  {cure}")


@pytest.mark.parametrize(
    ("text", "number"), [("2G", 2_000_000_000), ("500M", 500_000_000), ("1.5 GB", 1_500_000_000), ("9000", 9000)]
)
def test_sizes(text: str, number: int) -> None:
    assert Bytes().convert(text, None, None) == number


@pytest.mark.parametrize("text", ["", "G", "-1G", "1e9", "2 Gi", "1G2", "٣G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size: write 500M or 2G"):
        Bytes().convert(text, None, None)


def dumpable(path: Path, **meta: Any) -> Path:
    """Write a capture with a block request in each of ten seconds."""
    moment = {"mono_ns": frames.MONO, "utc_offset_ns": frames.OFFSET}
    end = {"mono_ns": frames.MONO + 10 * frames.SECOND, "utc_offset_ns": frames.OFFSET}
    requests = frames.table("block_io", *(frames.block(second + 0.5) for second in range(10)))
    clock = {"start": moment, "end": end, "segments": [moment]}
    return frames.capture(path, clock=clock, block_io=requests, **meta).path


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ((), 10),
        (("--last", "3s"), 3),
        (("--last", "1h"), 10),
        (("--from", START_3), 7),
        (("--to", START_3), 3),
        (("--from", f"{START_3}+00:00", "--to", "2027-01-01"), 7),
    ],
)
def test_dump_takes_what_is_asked_for(tmp_path: Path, options: tuple[str, ...], rows: int) -> None:
    result = call("dump", dumpable(tmp_path / "a.cwnd"), "-o", tmp_path / "b.cwnd", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"The dump is in {tmp_path / 'b.cwnd'}: 0 resets, {rows} block I/Os, 0 snapshots, ")
    dump = cwndtrace.load(tmp_path / "b.cwnd")
    assert len(dump.block_io) == rows
    assert dump.about.lacking == ()


@pytest.mark.parametrize(
    ("options", "code", "cause", "cure"),
    [
        (("--to", "2020-01-01"), 1, "The span until 2020-01-01 00:00:00 UTC is gone: the window of", "trace with a lo"),
        (("--from", "2030-01-01"), 1, "has nothing of this span: it goes from 20", "Give a span inside that"),
        (("--from", "2021-01-01", "--to", "2020-01-01"), 2, "the span is empty", "give a --to after --from"),
        (("--last", "5s", "--to", "2020-01-01"), 2, "--last and --from or --to exclude", "give one of them"),
    ],
)
def test_a_span_that_isnt_there_has_a_cause_and_a_cure(
    tmp_path: Path, options: tuple[str, ...], code: int, cause: str, cure: str
) -> None:
    capture = dumpable(tmp_path / "a.cwnd", kept_from=frames.MONO + 2 * frames.SECOND)
    result = call("dump", capture, "-o", tmp_path / "b.cwnd", *options)
    assert result.exit_code == code
    first, second = result.stderr.splitlines()
    assert cause in first
    assert cure in second
    assert not (tmp_path / "b.cwnd").exists()


def test_a_dump_warns_of_parts_that_it_cannot_read(tmp_path: Path) -> None:
    path = dumpable(tmp_path / "a.cwnd")
    (path / "block_io" / "part-000002.parquet").write_bytes(b"PAR1")
    result = call("dump", path, "-o", tmp_path / "b.cwnd")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert result.stderr.startswith(
        "warning: block_io/part-000002.parquet is cut off or corrupt, its rows are left out"
    )


def test_dump_needs_a_time_that_is_one(tmp_path: Path) -> None:
    result = call("dump", dumpable(tmp_path / "a.cwnd"), "--from", "yesterday")
    assert result.exit_code == 2
    assert "'yesterday' is not a time: write 2026-01-02T03:04:05, in UTC" in result.stderr


def test_an_interrupted_capture_ends_with_its_last_record(tmp_path: Path) -> None:
    path = dumpable(tmp_path / "a.cwnd")
    meta = json.loads((path / "meta.json").read_text())
    meta["clock"]["end"] = None
    (path / "meta.json").write_text(json.dumps({**meta, "status": "running", "boot_id": "another"}))
    assert call("dump", path, "--last", "2.5s", "-o", tmp_path / "b.cwnd").exit_code == 0
    assert len(cwndtrace.load(tmp_path / "b.cwnd").block_io) == 3


HUGE = 1 << 70


@pytest.mark.parametrize(
    "meta",
    [
        {"kept_from": HUGE},
        {"kept_from": (1 << 63) - 1},
        {"clock": {"start": {"mono_ns": 0, "utc_offset_ns": HUGE}, "end": {"mono_ns": HUGE, "utc_offset_ns": -HUGE}}},
        {"clock": {"start": {"mono_ns": -HUGE}, "end": {"mono_ns": HUGE}}},
        {"clock": {"start": {"mono_ns": 5, "utc_offset_ns": 1 << 62}, "segments": [{"mono_ns": -1}]}},
        {"deleted": {"block_io": {"parts": HUGE, "rows": HUGE}}, "kept_from": frames.MONO + 1},
    ],
)
@pytest.mark.parametrize("options", [(), ("--last", "2s"), ("--from", "2020-01-01"), ("--to", "9999-12-31")])
def test_impossible_times_give_a_dump_or_an_error(
    tmp_path: Path, meta: dict[str, Any], options: tuple[str, ...]
) -> None:
    path = dumpable(tmp_path / "a.cwnd")
    written = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**written, **meta}))
    result = call("dump", path, "-o", tmp_path / "b.cwnd", *options)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert (tmp_path / "b.cwnd").exists() is (result.exit_code == 0)
    for capture in (path, tmp_path / "b.cwnd"):
        if capture.exists():
            assert str(cwndtrace.load(capture))
