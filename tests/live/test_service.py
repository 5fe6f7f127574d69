# SPDX-License-Identifier: Apache-2.0
"""contrib/systemd/cwndtrace.service under systemd itself, on a bare Debian 12 and a bare Debian 13."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest

from tests.harness import chroot
from tests.harness.command import LONG_S
from tests.harness.systemd import Booted, booted
from tests.harness.tcp import until

pytestmark = [pytest.mark.chroot, pytest.mark.timeout(1800)]

UNIT = "cwndtrace.service"
STATE = "/var/lib/cwndtrace"
CURL = ("curl", "--silent", "--show-error", "--max-time", "30")


@pytest.fixture
def machine(installed: chroot.Root) -> Iterator[Booted]:
    """The root of each suite, booted, with the service installed as its page says."""
    installed.make("install", "EXTRAS=metrics")
    installed.add("systemd", "curl")
    shutil.copy(chroot.CHECKOUT / "contrib/systemd" / UNIT, installed.path / "etc/systemd/system")
    watchdog = installed.path / f"etc/systemd/system/{UNIT}.d/watchdog.conf"
    watchdog.parent.mkdir(exist_ok=True)
    watchdog.write_text("[Service]\nWatchdogSec=12\nRestartSec=1\n")  # half a minute is long for a test
    shutil.rmtree(installed.path / STATE.removeprefix("/"), ignore_errors=True)
    with booted(installed) as running:
        yield running


def captures(machine: Booted) -> dict[str, str]:
    """Return the status of each capture by its name."""
    files = machine.good("find", STATE, "-name", "meta.json").split()
    names = {file.split("/")[-2]: file for file in files}
    # A dump has a hidden name until it is complete.
    return {name: json.loads(machine.good("cat", file))["status"] for name, file in names.items() if name[0] != "."}


def signal_main(machine: Booted, name: str) -> None:
    machine.good("systemctl", "kill", "--kill-whom=main", f"--signal={name}", UNIT)


def test_the_service_starts_dumps_stops_and_is_watched(machine: Booted) -> None:
    machine.good("systemctl", "start", UNIT, seconds=180)  # type=notify: it returns once everything is attached
    assert machine.good(*CURL, "http://127.0.0.1:9464/healthz") == "events flow\n"
    assert "cwndtrace_build_info" in machine.good(*CURL, "http://127.0.0.1:9464/metrics")
    pid = machine.shown(UNIT, "MainPID")
    status = machine.good("grep", "-E", "^(CapPrm|CapBnd|NoNewPrivs|Seccomp):", f"/proc/{pid}/status").split()
    assert status == ["CapPrm:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2"]

    signal_main(machine, "USR1")
    until(lambda: any("-dump-" in name for name in captures(machine)), LONG_S, "the dump")

    # A process that is stopped doesn't answer, so the watchdog ends it, and it is started again.
    signal_main(machine, "STOP")
    until(lambda: machine.shown(UNIT, "NRestarts") == "1", LONG_S, "the watchdog")
    until(lambda: machine.shown(UNIT, "ActiveState") == "active", LONG_S, "the next start")
    assert machine.shown(UNIT, "MainPID") not in (pid, "0")

    machine.good("systemctl", "stop", UNIT)
    assert (machine.shown(UNIT, "Result"), machine.shown(UNIT, "ExecMainStatus")) == ("success", "0")
    found = captures(machine)
    assert sorted(status for name, status in found.items() if "-dump-" not in name) == ["complete", "running"]
    assert [status for name, status in found.items() if "-dump-" in name] == ["complete"]
    for name in found:
        machine.good("cwndtrace", "report", f"{STATE}/{name}")
    assert "the trace goes on without" not in machine.good("journalctl", "--no-pager", f"--unit={UNIT}")
