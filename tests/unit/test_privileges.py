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

import pytest

from cwndtrace import privileges
from tests.harness.users import need_readable_checkout

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
        ("99999999999", "5"), ("54321", "4294967295"), ("1e3", "5"), ("5\n", "5"), (" 5", "5"), ("²", "5"), ("5", "x"),
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
