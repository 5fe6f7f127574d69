# SPDX-License-Identifier: Apache-2.0
"""The user who called sudo is found, and the fewest capabilities that suffice.

The tests that need root are in tests/live/test_privileges.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from cwndtrace import privileges
from tests.harness.users import need_readable_checkout
from tests.unit.fake_privileges import LAST, FakeKernel

ROOT = Path(__file__).resolve().parents[2]


def invoked(
    monkeypatch: pytest.MonkeyPatch, uid: str | None, gid: str | None, *, euid: int = 0
) -> privileges.User | None:
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    for name, value in (("SUDO_UID", uid), ("SUDO_GID", gid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    return privileges.invoking_user()


def test_the_user_who_called_sudo_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "held", lambda: frozenset({privileges.SETUID, privileges.SETGID}))
    assert invoked(monkeypatch, "54321", "54322") == privileges.User(54321, 54322, (54322,), "54321")
    largest = "4294967294"
    assert invoked(monkeypatch, largest, largest) == privileges.User(
        int(largest), int(largest), (int(largest),), largest
    )
    known = invoked(monkeypatch, "65534", "65534")
    assert known is not None
    assert known.name == "nobody"
    assert 65534 in known.groups


@pytest.mark.parametrize(("uid", "gid"), [(None, None), ("0", "0"), ("0", None)])
def test_root_without_sudo_is_no_user(monkeypatch: pytest.MonkeyPatch, uid: str | None, gid: str | None) -> None:
    assert invoked(monkeypatch, uid, gid) is None


@pytest.mark.parametrize(
    ("uid", "gid"),
    [
        ("54321", None), (None, "54322"), ("", ""), ("00", "0"), ("-1", "5"), ("4294967295", "5"),
        ("99999999999", "5"), ("00000054321", "5"),
        ("54321", "4294967295"), ("1e3", "5"), ("5\n", "5"), (" 5", "5"), ("²", "5"), ("5", "x"),
    ],
)  # fmt: skip
def test_sudo_variables_that_name_no_user_are_refused(
    monkeypatch: pytest.MonkeyPatch, uid: str | None, gid: str | None
) -> None:
    with pytest.raises(PermissionError, match="name no user"):
        invoked(monkeypatch, uid, gid)


def test_a_user_whom_the_process_may_not_become_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "held", lambda: frozenset({privileges.SETGID}))
    with pytest.raises(PermissionError, match="user 54321, whom this process may not become"):
        invoked(monkeypatch, "54321", "54322")


def test_without_root_the_sudo_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoked(monkeypatch, "54321", "54322", euid=54321) is None


def test_acting_as_none_changes_nothing() -> None:
    before = Path("/proc/thread-self/status").read_text().splitlines()[8:10]
    with privileges.acting_as(None):
        assert Path("/proc/thread-self/status").read_text().splitlines()[8:10] == before


@pytest.mark.parametrize("groups", [True, False])
def test_acting_as_a_user_without_the_right_raises_permission_error(groups: bool) -> None:
    script = (
        "from cwndtrace import privileges\n"
        f"if not {groups}: privileges._set_groups = lambda _: None\n"
        "try:\n"
        "    with privileges.acting_as(privileges.User(0, 0, (0,), 'root')): print('acted')\n"
        "except PermissionError as e:\n"
        "    print('refused')\n"
    )
    nobody = 65534 if os.geteuid() == 0 else None
    if nobody:
        need_readable_checkout()
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, user=nobody)
    assert result.stdout == "refused\n"


def test_least_returns_the_first_capabilities_that_suffice() -> None:
    """Each set of capabilities is tried on a thread with no others, which ends before ``least`` returns."""
    script = (
        "import os\n"
        "from pathlib import Path\n"
        "from cwndtrace import privileges\n"
        "seen = []\n"
        "def work():\n"
        "    text = Path('/proc/thread-self/status').read_text()\n"
        "    seen.append(int(text.split('CapEff:')[1].split()[0], 16))\n"
        "    if len(seen) < 2: raise PermissionError(1, 'not enough')\n"
        "mine = frozenset({privileges.DAC_READ_SEARCH}) if os.geteuid() == 0 else frozenset()\n"
        "found = privileges.least(work, None, [frozenset(), mine, frozenset({privileges.SYS_ADMIN})])\n"
        "assert found == mine, found\n"
        "assert seen == [0, sum(1 << n for n in mine)], seen\n"
        "assert len(list(Path('/proc/self/task').iterdir())) == 1\n"
        "try:\n"
        "    privileges.least(lambda: 1 / 0, None, [frozenset(), frozenset()])\n"
        "except ZeroDivisionError:\n"
        "    print('as it should be')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "as it should be\n"), result.stderr


def test_importing_the_commands_starts_no_thread() -> None:
    """Each thread has its own capabilities, so such a thread would keep root's when ``run`` drops them."""
    script = "from cwndtrace.cli import main; import os; print(os.listdir('/proc/self/task').__len__())"
    environment = {n: v for n, v in os.environ.items() if n not in ("OPENBLAS_NUM_THREADS", "JE_ARROW_MALLOC_CONF")}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


def test_still_privileged_tolerates_threads_that_end() -> None:
    stopped = threading.Event()

    def churn() -> None:
        while not stopped.is_set():
            short = [threading.Thread(target=int) for _ in range(20)]
            for thread in short:
                thread.start()
            for thread in short:
                thread.join()

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        for _ in range(300):
            privileges.still_privileged(privileges.held())
    finally:
        stopped.set()
        churning.join()


def test_a_thread_is_waited_for_until_it_is_gone_and_at_most_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def sleep(_: float) -> None:
        nonlocal now
        now += 1

    monkeypatch.setattr(privileges, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    privileges._wait_until_gone([2**22 + 1])
    assert now == 100
    privileges._wait_until_gone([threading.get_native_id(), 2**22 + 1])
    assert now == 110


def test_capabilities_have_the_kernels_numbers() -> None:
    numbers = {
        "DAC_READ_SEARCH": 2,
        "SETGID": 6,
        "SETUID": 7,
        "SYS_PTRACE": 19,
        "SYS_ADMIN": 21,
        "PERFMON": 38,
        "BPF": 39,
    }
    assert {name: getattr(privileges, name) for name in numbers} == numbers


USER = privileges.User(1000, 1001, (1001, 27), "someone")


@pytest.mark.parametrize("keep", [frozenset(), privileges.LOOKING, frozenset({privileges.BPF, privileges.PERFMON})])
def test_a_drop_leaves_the_users_ids_and_no_capability_but_those_kept(
    monkeypatch: pytest.MonkeyPatch, keep: frozenset[int]
) -> None:
    kernel = FakeKernel().install(monkeypatch)
    privileges.drop(USER, keep)
    assert kernel.ids == [(1000, 1000, 1000), (1001, 1001, 1001)]
    assert kernel.groups == (1001, 27)
    assert (kernel.permitted, kernel.effective, kernel.inheritable) == (keep, keep, frozenset())
    assert kernel.bounding == keep
    assert (kernel.locked, kernel.ambient, kernel.keeps) == (True, False, False)
    assert privileges.held() == keep


def test_a_drop_keeps_no_capability_that_was_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel().install(monkeypatch)
    kernel.permitted = kernel.effective = kernel.permitted - {privileges.SYS_PTRACE}
    privileges.drop(None, privileges.LOOKING)
    assert privileges.held() == privileges.LOOKING - {privileges.SYS_PTRACE}
    assert kernel.bounding == privileges.held()


def test_a_drop_without_a_user_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel().install(monkeypatch)
    privileges.drop(None)
    assert kernel.ids == [(0, 0, 0), (0, 0, 0)]
    assert kernel.groups == (0, 4)
    assert (privileges.held(), kernel.locked, kernel.ambient) == (frozenset(), True, False)


def test_a_drop_goes_on_where_the_bounding_set_cannot_be_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(may_reduce=False).install(monkeypatch)
    privileges.drop(USER)
    assert kernel.bounding == set(range(LAST + 1))
    assert (privileges.held(), kernel.ids[0], kernel.locked) == (frozenset(), (1000, 1000, 1000), True)


@pytest.mark.parametrize("number", [0, 1, 31, 32, 33, LAST])
def test_held_tells_each_capability_from_the_others(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    kernel = FakeKernel().install(monkeypatch)
    kernel.permitted = frozenset({number})
    assert privileges.held() == {number}


def test_acting_as_a_user_ends_with_the_ids_and_groups_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel().install(monkeypatch)
    with privileges.acting_as(USER):
        assert (kernel.fsuid, kernel.fsgid, kernel.groups) == (1000, 1001, (1001, 27))
        # The inner one leaves all to the outer one.
        with privileges.acting_as(USER):
            assert kernel.fsuid == 1000
        assert (kernel.fsuid, kernel.fsgid, kernel.groups) == (1000, 1001, (1001, 27))
    assert (kernel.fsuid, kernel.fsgid, kernel.groups) == (0, 0, (0, 4))
    with pytest.raises(ZeroDivisionError), privileges.acting_as(USER):
        _ = 1 / 0
    assert (kernel.fsuid, kernel.fsgid, kernel.groups) == (0, 0, (0, 4))


def test_acting_as_a_user_is_refused_where_the_kernel_keeps_the_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(may_become=False).install(monkeypatch)
    with pytest.raises(PermissionError, match="may not act as someone"), privileges.acting_as(USER):
        pytest.fail("it acts")
    assert (kernel.fsuid, kernel.fsgid, kernel.groups) == (0, 0, (0, 4))


def test_the_first_file_that_a_user_cannot_read_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = FakeKernel().install(monkeypatch)
    readable, missing, folder = tmp_path / "a", tmp_path / "b", tmp_path
    readable.write_bytes(b"\xff")
    assert privileges.unreadable(USER, [readable, readable]) is None
    assert privileges.unreadable(USER, [readable, missing, folder]) == missing
    assert privileges.unreadable(USER, [folder, missing]) == folder
    assert kernel.fsuid == 0


def test_threads_with_more_than_the_kept_capabilities_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number, (name, mask) in enumerate([(b"main", 0), (b"looks", 1 << 19), (b"\xff", 1 << 21 | 1 << 19)]):
        task = tmp_path / str(number)
        task.mkdir()
        (task / "status").write_bytes(b"Name:\t%b\nCapInh:\t%016x\nCapPrm:\t%016x\n" % (name, 1 << 40, mask))
    (tmp_path / "ended").mkdir()
    monkeypatch.setattr(privileges, "Path", lambda path: {"/proc/self/task": tmp_path}[path])
    assert sorted(privileges.still_privileged()) == ["looks", "\ufffd"]
    assert privileges.still_privileged(frozenset({19})) == ["\ufffd"]
    assert privileges.still_privileged(frozenset({19, 21})) == []


def test_libraries_start_no_threads_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JE_ARROW_MALLOC_CONF", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    privileges.limit_library_threads()
    assert os.environ["JE_ARROW_MALLOC_CONF"] == "background_thread:false"
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    privileges.limit_library_threads()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"


def test_least_acts_as_the_user_and_needs_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel().install(monkeypatch)
    assert privileges.least(lambda: None, USER, [frozenset({privileges.BPF})]) == {privileges.BPF}
    assert kernel.fsuid == 1000
    assert kernel.permitted == {privileges.BPF}
    with pytest.raises(ValueError, match="no capabilities to choose from"):
        privileges.least(lambda: None, None, [])
