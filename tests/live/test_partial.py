# SPDX-License-Identifier: Apache-2.0
"""A kernel that can't time block I/O, or show resets, is traced for the rest, which the command says once.

Such kernels can't run here. Tracepoints that don't exist, or no probes, take the place of what they lack.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cwndtrace
from cwndtrace.report import content
from tests.harness import tcp
from tests.harness.command import ENVIRONMENT, Running, running, send_after_idle
from tests.harness.tcp import Connect

pytestmark = pytest.mark.live

_NO_BLOCK = """
from dataclasses import replace
from cwndtrace.capture import block_program
def gone(program):
    first, *others = program.attachments
    return replace(program, attachments=(replace(first, target=f"no_{first.target}"), *others))
block_program.BLOCK_PROGRAMS = tuple(map(gone, block_program.BLOCK_PROGRAMS))
"""
_NO_RESETS = """
from cwndtrace.kernel import ladder
ladder.PROBES = tuple(probe for probe in ladder.PROBES if probe.name == "tracepoint")
"""
_MAIN = "from cwndtrace.cli import main\nmain()"
BLOCK_LACKS = "this kernel can't time block I/O: it has no tracepoint no_block_io_done and no no_block_rq_complete"
RESETS_LACK = "no probe can see idle resets on this kernel: tracepoint: this kernel has no tracepoint tcp_cwnd_reset"


def lacking(*what: str) -> tuple[str, ...]:
    """Return the arguments for Python that run the command on such a kernel."""
    return ("-P", "-c", "".join((*what, _MAIN)))


def refused(*what: str, arguments: tuple[str, ...] = ()) -> str:
    """Return what ``run`` prints on a kernel without ``what``, where it must exit with 77."""
    run = Running(*arguments, wait=False, python=lacking(*what))
    code, out, err = run.end(None)
    assert (code, out) == (77, "")
    return err


def test_resets_are_traced_without_block_io(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    with running("-n", space.name, "-o", path, python=lacking(_NO_BLOCK)) as run:
        send_after_idle(connect(space))
        code, out, err = run.end()
    assert code == 0
    assert err.count(f"warning: {BLOCK_LACKS}; the rest is traced\n") == 1
    assert "kept 1 reset; lost 0 resets; " in out
    trace = cwndtrace.load(path)
    assert len(trace.resets) == 1
    assert not trace.block_recorded
    # Nothing shows that it wasn't a disk.
    assert list(trace.verdicts["cause"]) == ["unknown"]
    limits = content.report(trace).caveats["limits"]
    assert f"{BLOCK_LACKS}; the rest is traced." in limits
    assert any(line.startswith("Block I/O wasn't recorded") for line in limits)


def test_block_io_is_traced_without_resets(space: tcp.Space, tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    arguments = ("-n", space.name, "-o", path, "-d", "1s", "--json")
    code, out, err = Running(*arguments, wait=False, python=lacking(_NO_RESETS)).end(None)
    assert code == 0
    assert "block I/O alone; idle, rto_loss, app_limited, tlp_loss can't be seen on this kernel." in err
    assert err.count(f"warning: {RESETS_LACK}; block I/O is traced\n") == 1
    started = json.loads(out.splitlines()[0])
    assert set(started["probes"].values()) == {None}
    assert started["block_probe"] in ("block_io_start", "block_getrq")
    trace = cwndtrace.load(path)
    assert trace.block_recorded
    assert trace.host().verdict == "unknown"


def test_a_trace_of_nothing_is_refused(tmp_path: Path) -> None:
    arguments = ("-o", str(tmp_path / "a.cwnd"))
    assert RESETS_LACK in refused(_NO_BLOCK, _NO_RESETS, arguments=arguments)
    assert RESETS_LACK in refused(_NO_RESETS, arguments=(*arguments, "--no-block"))
    assert not (tmp_path / "a.cwnd").exists()


def test_what_was_asked_for_by_name_is_refused(tmp_path: Path) -> None:
    arguments = ("-o", str(tmp_path / "a.cwnd"))
    assert BLOCK_LACKS in refused(_NO_BLOCK, arguments=(*arguments, "--block"))
    assert RESETS_LACK in refused(_NO_RESETS, arguments=(*arguments, "--probe", "tracepoint"))
    assert not (tmp_path / "a.cwnd").exists()


def test_the_lab_needs_resets_and_no_block_io(tmp_path: Path) -> None:
    def reproduce(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *lacking(what), "reproduce", "--rounds", "1", "--idle", "0.3s", "--burst", "100k"]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env=ENVIRONMENT, cwd=tmp_path
        )

    done = reproduce(_NO_RESETS)
    assert done.returncode == 77
    assert RESETS_LACK in done.stderr
    done = reproduce(_NO_BLOCK)
    assert done.returncode == 0, done.stderr
    assert "Picture:" in done.stdout
