# SPDX-License-Identifier: Apache-2.0
"""Tests of a trace's privileges once it is attached, of the owner of its capture, and that it still sees everything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import cwndtrace
from cwndtrace import privileges
from cwndtrace.capture import priority
from cwndtrace.cli import COMMANDS, NEED_ROOT
from cwndtrace.kernel import ladder
from cwndtrace.records.layout import bpf_dir
from tests.harness import tcp
from tests.harness.command import CHECKOUT, COMMAND, ENVIRONMENT, call, running, send_after_idle
from tests.harness.processes import children
from tests.harness.tcp import Connect, listening, until
from tests.harness.tracing import left_out
from tests.harness.users import BY_ROOT, BY_SUDO, GID, UID, assert_owned, assert_privileges, helper_of, thread_status

pytestmark = pytest.mark.live


def threads_of(pid: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


def test_privileges_are_dropped_after_attaching_and_nothing_is_missed(
    connect: Connect, space: tcp.Space, make_space: Callable[[], tcp.Space], home: Path
) -> None:
    capture, before = home / "a.cwnd", listening()
    with running("-n", space.name, "-o", capture, before=BY_SUDO) as run:
        # The trace talks to the helper over a socket pair, so nothing listens.
        assert listening() <= before
        assert_privileges(run.process.pid, UID, GID, frozenset())
        helper = helper_of(run)
        assert_privileges(helper, UID, GID, privileges.LOOKING)
        # The helper has no descriptor of a BPF object.
        links = {str(fd.readlink()) for fd in Path(f"/proc/{helper}/fd").iterdir()}
        assert not [link for link in links if "bpf" in link or "anon" in link]
        later = make_space()
        connection = connect()
        send = send_after_idle(connection)
        # Writing and reading may have started more threads by now.
        until(lambda: (capture / "cwnd_reset").exists(), 20, "the first part")
        assert_privileges(run.process.pid, UID, GID, frozenset())
        code, stdout, stderr = run.end()
    assert code == 0, stderr
    assert "Traceback" not in stderr
    assert_owned(capture, UID, GID)
    assert not Path(f"/proc/{helper}").exists()
    trace = cwndtrace.load(capture)
    assert trace.status == "complete"
    mine = trace.resets[trace.resets["sport"] == connection.sport].to_dict("records")
    assert [(r["cwnd_before"], r["cwnd_after"]) for r in mine] == [(send.before.cwnd, send.after.cwnd)]
    # Snapshots have the connection in another namespace, and the process of another user that holds its socket. The
    # capture has the settings of a namespace that was made later.
    seen = trace.connections[trace.connections["sport"] == connection.sport]
    assert len(seen) >= 1
    assert set(seen["pid"]) == {os.getpid()}
    assert str(later.inode) in trace.meta["sysctls"]
    assert trace.meta["sysctls"][str(later.inode)]["net.ipv4.tcp_slow_start_after_idle"] == 1
    assert f":{connection.sport}" in stdout


def test_new_sockets_of_a_process_are_found_without_privileges(connect: Connect, home: Path) -> None:
    """Only the helper may read them from /proc, and they are opened after privileges are dropped."""
    with running("-p", str(os.getpid()), "-o", home / "a.cwnd", "--json", before=BY_SUDO) as run:
        assert_privileges(run.process.pid, UID, GID, frozenset())
        connection = connect()
        send_after_idle(connection)
        code, stdout, stderr = run.end()
    assert code == 0, stderr
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert [r["sport"] for r in rows if r["event"] == "cwnd_reset"] == [connection.sport]
    assert rows[-1]["event"] == "summary"
    assert rows[-1]["capture"] == str(home / "a.cwnd")


@pytest.mark.parametrize("probe", ladder.BY_NAME)
def test_each_probe_works_without_privileges(probe: str, space: tcp.Space, connect: Connect, home: Path) -> None:
    """Reading maps, running programs and detaching need no privileges that were dropped."""
    if probe in left_out():
        pytest.skip(f"this kernel has no probe {probe} ({left_out()[probe]}): make vm-test has one")
    with running("-n", space.name, "--probe", probe, "-o", home / "a.cwnd", before=BY_SUDO) as run:
        assert_privileges(run.process.pid, UID, GID, frozenset())
        send_after_idle(connect())
        code, _, stderr = run.end()
    assert (code, "Traceback" in stderr) == (0, False), stderr
    assert len(cwndtrace.load(home / "a.cwnd").resets) >= 1


def test_root_without_sudo_keeps_its_uid_and_no_capabilities(
    connect: Connect, space: tcp.Space, tmp_path: Path
) -> None:
    with running("-n", space.name, "-o", tmp_path / "a.cwnd", before=BY_ROOT) as run:
        assert_privileges(run.process.pid, 0, 0, frozenset())
        assert_privileges(helper_of(run), 0, 0, privileges.LOOKING)
        connection = connect()
        send_after_idle(connection)
        code, _, stderr = run.end()
    assert (code, "warning: root" in stderr) == (0, False), stderr
    assert_owned(tmp_path / "a.cwnd", 0, 0)
    assert connection.sport in set(cwndtrace.load(tmp_path / "a.cwnd").connections["sport"])


def test_stay_root_keeps_all_privileges(connect: Connect, space: tcp.Space, home: Path) -> None:
    connect()
    with running("-n", space.name, "-o", home / "a.cwnd", "--stay-root", before=BY_SUDO) as run:
        assert {t["CapEff"] for t in thread_status(run.process.pid)} == {
            t["CapEff"] for t in thread_status(os.getpid())
        }
        assert {t["NoNewPrivs"] for t in thread_status(run.process.pid)} == {"0"}
        assert children(run.process.pid) == []
        code, _, stderr = run.end()
    assert code == 0, stderr
    assert_owned(home / "a.cwnd", UID, GID)


@pytest.mark.parametrize("how", [(), ("--stay-root",)], ids=["", "stay-root"])
@pytest.mark.parametrize("command", ["run", "reproduce"])
def test_nothing_is_made_where_the_user_may_not_write(command: str, how: tuple[str, ...], home: Path) -> None:
    """The error doesn't tell which files exist in a folder that the user may not read."""
    if how and command != "run":
        pytest.skip("the command doesn't have this option")
    closed = home / "closed"
    (closed / "folder").mkdir(parents=True)
    (closed / "there").touch()
    closed.chmod(0o700)
    errors = set()
    for name in ("new", "there", "folder/new", "missing/new", "there/new"):
        done = call(command, *how, "-o", closed / name, before=BY_SUDO)
        assert (done.returncode, done.stdout) == (1, "")
        assert "can't be made: Permission denied" in done.stderr
        assert "with -o" in done.stderr
        errors.add(done.stderr.replace(str(closed / name), ""))
    assert len(errors) == 1
    assert sorted(p.name for p in closed.rglob("*")) == ["folder", "there"]


def test_an_installation_that_the_user_cannot_read_is_refused(home: Path) -> None:
    """Modules are imported after the privileges are dropped too, so the user must be able to read them."""
    closed = home / "closed"
    shutil.copytree(Path(cwndtrace.__file__).parent, closed / "cwndtrace")
    shutil.copytree(bpf_dir(), closed / "bpf")
    closed.chmod(0o700)
    os.chown(closed, 0, 0)
    for arguments in (("run", "-o", "a.cwnd"), ("reproduce",), ("report", "a.cwnd"), ("compare", "a", "b"), ("serve",)):
        done = subprocess.run(
            [*BY_SUDO, f"PYTHONPATH={closed}", sys.executable, "-P", "-m", "cwndtrace", *arguments],
            cwd=home, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, ""), (arguments, done.stderr)
        cause, cure = done.stderr.splitlines()
        assert cause == f"cwndtrace: {UID} may not read {closed}/cwndtrace/__init__.py, a part of this installation."
        assert "make install" in cure
    assert [p.name for p in home.iterdir()] == ["closed"]


def test_a_capture_whose_folder_was_closed_meanwhile_is_summarised(
    connect: Connect, space: tcp.Space, home: Path
) -> None:
    """Only root can walk to the capture after it was made; its summary is read nevertheless."""
    closed = home / "closed"
    closed.mkdir()
    os.chown(closed, UID, GID)
    connect()
    with running("-n", space.name, "-o", closed / "a.cwnd", before=BY_SUDO) as run:
        os.chown(closed, 0, 0)
        closed.chmod(0o700)
        code, stdout, stderr = run.end()
    assert code == 0, stderr
    assert "kept " in stdout


def test_the_helper_ends_with_the_trace(space: tcp.Space, home: Path) -> None:
    with running("-n", space.name, "-o", home / "a.cwnd", before=BY_SUDO) as run:
        helper = helper_of(run)
        run.process.kill()
        run.process.communicate()
        until(lambda: not Path(f"/proc/{helper}").exists(), 10, "the helper to end")
    assert cwndtrace.load(home / "a.cwnd").status == "interrupted"


@pytest.mark.parametrize(
    ("had", "owner"),
    [
        (("bpf", "perfmon"), 0),
        (("bpf", "perfmon", "setuid", "setgid"), UID),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_container_with_few_capabilities_traces_and_drops_them(
    had: tuple[str, ...], owner: int, connect: Connect, home: Path, tmp_path: Path
) -> None:
    capture, caller = (home / "a.cwnd", BY_SUDO) if owner else (tmp_path / "a.cwnd", BY_ROOT)
    few = ("setpriv", "--inh-caps=-all", f"--bounding-set=-all,{','.join(f'+{name}' for name in had)}")
    connection = connect(tcp.Here())
    with running("-P", str(connection.sport), "-o", capture, before=(*caller, *few)) as run:
        for thread in thread_status(run.process.pid):
            assert (int(thread["CapPrm"], 16), int(thread["CapEff"], 16), thread["NoNewPrivs"]) == (0, 0, "1")
            assert thread["Uid"].split() == [str(owner)] * 4
        for thread in thread_status(helper_of(run)):
            assert int(thread["CapPrm"], 16) & ~sum(1 << number for number in privileges.LOOKING) == 0
        send_after_idle(connection)
        code, _, stderr = run.end()
    assert (code, "Traceback" in stderr) == (0, False), stderr
    trace = cwndtrace.load(capture)
    assert list(trace.resets["sport"]) == [connection.sport]
    assert connection.sport in set(trace.connections["sport"])
    assert capture.stat().st_uid == owner


@pytest.mark.parametrize(
    ("before", "reader"),
    [
        ((), -10),
        (("setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice"), 0),  # as in most containers
        (("nice", "-n", "5"), 5),
    ],
    ids=["root", "refused", "chosen"],
)
def test_only_the_thread_that_empties_the_buffers_has_priority(
    before: tuple[str, ...], reader: int, connect: Connect, space: tcp.Space, home: Path
) -> None:
    undone = ("nice", "-n", str(-priority.nice()))
    with running("-n", space.name, "-v", "-o", home / "a.cwnd", before=(*BY_SUDO, *undone, *before)) as run:
        pid, helper = run.process.pid, helper_of(run)
        send_after_idle(connect())
        until(lambda: (home / "a.cwnd/cwnd_reset").exists(), 20, "the first part")
        nices = {task: os.getpriority(os.PRIO_PROCESS, task) for task in threads_of(pid)}
        assert len(nices) > 2
        assert nices.pop(pid) == reader
        assert set(nices.values()) == {max(reader, 0)}
        assert {os.getpriority(os.PRIO_PROCESS, task) for task in threads_of(helper)} == {max(reader, 0)}
        code, _, stderr = run.end()
    assert code == 0, stderr
    assert f"the thread that empties the buffers runs at nice {reader}\n" in stderr
    assert cwndtrace.load(home / "a.cwnd").meta["reader_nice"] == reader


def test_commands_that_may_not_become_the_user_do_nothing(home: Path) -> None:
    few = ("setpriv", "--inh-caps=-all", "--bounding-set=-all,+bpf,+perfmon")
    for arguments in (("run", "-o", home / "a.cwnd"), ("plot", home / "a.cwnd"), ("reproduce", "-o", home / "a")):
        done = call(*arguments, before=(*BY_SUDO, *few))
        assert (done.returncode, done.stdout) == (1, "")
        assert f"SUDO_UID names user {UID}, whom this process may not become." in done.stderr
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(("caller", "uid", "gid"), [(BY_SUDO, UID, GID), (BY_ROOT, 0, 0)], ids=["sudo", "root"])
def test_commands_that_need_no_root_drop_privileges(caller: tuple[str, ...], uid: int, gid: int, home: Path) -> None:
    """serve is tested for all such commands, because it keeps running."""
    serve = [*caller, *COMMAND, "serve", "--port", "0"]
    with subprocess.Popen(serve, cwd=home, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("Listening")
            assert_privileges(process.pid, uid, gid, frozenset())
        finally:
            process.kill()


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - NEED_ROOT))
def test_privileges_are_dropped_before_large_imports(command: str, home: Path) -> None:
    """HOME and similar variables don't name folders of root afterwards."""
    script = (
        "import os, sys\n"
        "from cwndtrace import cli, privileges\n"
        "real = privileges.drop\n"
        "def drop(user):\n"
        "    print(user.uid, [n for n in ('numpy', 'pyarrow', 'pandas', 'matplotlib') if n in sys.modules])\n"
        "    real(user)\n"
        "privileges.drop = drop\n"
        "try: cli.main([sys.argv[1], 'missing.cwnd', '-o', '/root/x.png'])\n"
        "finally: print([n for n in os.environ if '/root' in os.environ[n]], os.environ['HOME'])\n"
    )
    of_root = ("HOME=/root", "MPLCONFIGDIR=/root/m", "XDG_CONFIG_HOME=/root/c", "XDG_CACHE_HOME=/root/d", "PATH=/bin")
    done = subprocess.run(
        [*BY_SUDO, *of_root, sys.executable, "-c", script, command],
        cwd=home, env={"PYTHONPATH": CHECKOUT}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout == f"{UID} []\n[] /\n", done.stderr


def test_reproduce_reports_and_draws_without_privileges(home: Path) -> None:
    """A separate process reads the user's capture and draws."""
    short = ("--rtt", "20ms", "--burst", "20k", "--idle", "0s", "--rounds", "1")
    command = [*BY_SUDO, *COMMAND, "reproduce", *short, "-o", str(home / "a")]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:

            def drawing() -> bool:
                assert process.poll() is None, process.communicate()
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                assert "matplotlib" not in maps
                for child in children(process.pid):
                    with suppress(OSError):
                        if "matplotlib" in Path(f"/proc/{child}/maps").read_text():
                            assert_privileges(child, UID, GID, frozenset())
                            return True
                return False

            until(drawing, 120, "matplotlib to be loaded")
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, output
    assert_owned(home / "a", UID, GID)
    assert len(list((home / "a").glob("*.png"))) == 4
