# SPDX-License-Identifier: Apache-2.0
"""Child processes get only harmless variables, and a command ignores the user's matplotlib settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cwndtrace import isolated

PRINT_DPI = "import cwndtrace.plot.style, matplotlib, os; print(matplotlib.rcParams['figure.dpi'], os.getcwd())"


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        ("TERM", "xterm", True),
        ("LC_ALL", "de_DE.ISO-8859-1", True),
        ("LC_ALL", "../../tmp/x", False),
        ("LANG", "%s", False),
        ("TZ", "Europe/Vienna", True),
        ("TZ", ":/tmp/x", False),
        ("TZ", "../../tmp/x", False),
        ("SUDO_UID", "1000", True),
        ("PYTHONPATH", "/tmp", False),
        ("LD_PRELOAD", "/tmp/x.so", False),
        ("MPLCONFIGDIR", "/tmp", False),
        ("BCC_SYMFS", "/tmp", False),
        ("HOME", "/tmp", False),
        ("WATCHDOG_USEC", "30000000", True),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://192.0.2.7:4318", True),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "a=b", True),
        ("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=a", True),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/etc/shadow", False),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/etc/shadow", False),
        ("OTEL_PYTHON_METER_PROVIDER", "evil", False),
        ("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "evil", False),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_METRICS_CREDENTIAL_PROVIDER", "evil", False),
    ],
)
def test_a_child_gets_only_harmless_variables(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, passes: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert (isolated.environment().get(name) == value) is passes


def test_children_find_commands_only_in_system_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/tmp", ""):
        monkeypatch.setenv("PATH", path)
        assert isolated.environment()["PATH"] == "/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.mark.parametrize(("options", "dpi"), [(("-I",), "100.0"), (("-P",), "31.0")])
def test_a_command_ignores_the_users_matplotlibrc_and_other_programs_read_it(
    tmp_path: Path, options: tuple[str, ...], dpi: str
) -> None:
    (tmp_path / "matplotlibrc").write_text("figure.dpi: 31\n")
    command = [sys.executable, *options, "-c", PRINT_DPI]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [dpi, str(tmp_path)]
