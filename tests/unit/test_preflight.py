# SPDX-License-Identifier: Apache-2.0
"""run warns if no idle reset can occur, and doctor prints its findings as a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwndtrace import privileges
from cwndtrace.cli import preflight
from cwndtrace.cli.doctor import BAD, LACK, Fact, Findings, _print
from cwndtrace.kernel import host
from cwndtrace.kernel.netns import Namespace

THIS = Namespace(1, "this", Path("/proc/self/ns/net"))
NAMED = Namespace(2, "blue", Path("/run/netns/blue"))
POD = Namespace(3, "nginx[7]", Path("/proc/7/ns/net"))
CUBIC = {"cubic", "bbr"}


def warnings(sysctls: dict[int, int | None], controls: set[str], *namespaces: Namespace) -> list[str]:
    return preflight.warnings(controls, [(namespace, sysctls[namespace.inode]) for namespace in namespaces], "eth0")


def test_no_warning_if_idle_resets_can_occur() -> None:
    assert warnings({1: 1}, CUBIC, THIS) == []


@pytest.mark.parametrize(
    ("namespace", "where", "command"),
    [
        (THIS, "in this network namespace", "(sysctl -w net.ipv4.tcp_slow_start_after_idle=1 turns"),
        (NAMED, "in network namespace blue", "(ip netns exec blue sysctl -w net.ipv4.tcp_slow_start_after_idle=1 "),
    ],
)
def test_a_setting_that_is_off_is_a_warning_with_a_command(namespace: Namespace, where: str, command: str) -> None:
    (line,) = warnings({namespace.inode: 0}, CUBIC, namespace)
    assert where in line
    assert command in line


def test_no_warning_if_the_setting_is_on_in_one_namespace() -> None:
    assert warnings({1: 0, 3: 1}, CUBIC, THIS, POD) == []
    assert warnings({1: 0, 3: None}, CUBIC, THIS, POD) == []


def test_a_warning_says_that_there_is_no_connection() -> None:
    (line,) = warnings({1: 1}, set(), THIS)
    assert line == "eth0 carries no TCP connection now"


def test_a_warning_says_that_all_connections_are_exempt() -> None:
    (line,) = warnings({1: 1}, {"bbr"}, THIS)
    assert line.startswith("every connection on eth0 uses bbr, which is exempt")


# ---- containers ------------------------------------------------------------------------------------


def set_place(patch: pytest.MonkeyPatch, *, pids: bool = True, held: frozenset[int] = privileges.LOOKING) -> None:
    """Let this process be in a container that sees all of the host but for what a test changes."""
    patch.setattr(host, "in_container", lambda: True)
    patch.setattr(host, "sees_all_processes", lambda: pids)
    patch.setattr(host, "lacking_root", lambda: None)
    patch.setattr(host, "in_first_cgroup_namespace", lambda: True)
    patch.setattr(privileges, "held", lambda: held)


def test_a_container_that_sees_the_host_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch)
    assert preflight.container() == []


def test_a_container_with_its_own_processes_is_told_so_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch, pids=False, held=frozenset())
    ((cause, remedy),) = preflight.container()
    assert "sees no processes but its own" in cause
    assert "--pid=host" in remedy


def test_missing_capabilities_are_named_with_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch, held=frozenset({privileges.SYS_ADMIN}))
    ((cause, remedy),) = preflight.container()
    assert "lacks CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH" in cause
    assert remedy == "--cap-add=SYS_PTRACE --cap-add=DAC_READ_SEARCH"


def test_a_hidden_root_and_cgroup_namespace_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch)
    monkeypatch.setattr(host, "lacking_root", lambda: "/proc/1/root: Permission denied")
    monkeypatch.setattr(host, "in_first_cgroup_namespace", lambda: False)
    (root, _), (_, remedy) = preflight.container()
    assert "can't be read: /proc/1/root: Permission denied" in root
    assert "--cgroupns=host" in remedy


# ---- doctor ----------------------------------------------------------------------------------------


def test_doctor_prints_an_aligned_table_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    facts = [
        Fact("kernel", "Linux 6"),
        Fact("probe fentry", "refused", LACK, "ask for it"),
        Fact("sysctl in \x1b[2J\x07evil", "\x07x", BAD, "fix \x1b it"),
    ]
    _print(Findings(facts, {"idle": "sendmsg"}, block=True))
    stdout = capsys.readouterr().out
    lines = stdout.splitlines()
    assert all(c.isprintable() or c == "\n" for c in stdout)
    assert lines[1].startswith("ok ")
    assert lines[2].startswith("-  ")
    assert lines[3].strip() == "fix: ask for it"
    assert lines[4].startswith("BAD")
    assert lines[1].index("Linux") == lines[2].index("refused") == lines[4].index("?x")
    assert lines[-1] == "sudo cwndtrace run --iface NAME will work here."


def test_doctor_says_that_nothing_can_be_traced(capsys: pytest.CaptureFixture[str]) -> None:
    _print(Findings([Fact("BTF", "none", BAD)], None))
    assert "Nothing here can trace idle resets." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("probes", "block", "last"),
    [
        ({"idle": "kprobe"}, False, "sudo cwndtrace run --iface NAME will work here, without block I/O."),
        (None, True, "Nothing here can trace idle resets; sudo cwndtrace run traces block I/O alone."),
    ],
)
def test_doctor_promises_no_more_than_a_plain_run_can(
    capsys: pytest.CaptureFixture[str], probes: dict[str, str | None] | None, block: bool, last: str
) -> None:
    _print(Findings([Fact("kernel", "Linux 6")], probes, block=block))
    assert capsys.readouterr().out.splitlines()[-1] == last
