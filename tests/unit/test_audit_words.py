# SPDX-License-Identifier: Apache-2.0
"""The audit notes in words what is unlike the host in a network namespace, and what has changed in it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from cwndtrace.present import audit
from cwndtrace.tcp import CONTROL_SYSCTL, IDLE_SYSCTL
from tests.unit import frames

HOST = {"name": "init", "host": True, IDLE_SYSCTL: 0, CONTROL_SYSCTL: "cubic"}


def note(space: dict[str, Any], end: dict[str, Any] | None = None, host: dict[str, Any] | None = HOST) -> str:
    """Return the note on a namespace with these settings at the start of a capture and at its end."""
    spaces = {"2": {"name": "web"} | space} | ({"1": host} if host else {})
    about = frames.about(sysctls=spaces, sysctls_end={"2": end} if end else {})
    return str(audit.namespaces(pd.DataFrame({"netns_ino": [2]}), about)["note"].item())


@pytest.mark.parametrize(
    ("space", "end", "said"),
    [
        ({IDLE_SYSCTL: 0, CONTROL_SYSCTL: "cubic"}, None, ""),
        ({IDLE_SYSCTL: 1}, None, f"{IDLE_SYSCTL} is 1 here but 0 on the host"),
        ({CONTROL_SYSCTL: "bbr"}, None, f"{CONTROL_SYSCTL} is bbr here but cubic on the host"),
        ({IDLE_SYSCTL: 1}, {IDLE_SYSCTL: 0},
         f"{IDLE_SYSCTL} was 1 at the start of the capture and 0 at its end"),
        ({IDLE_SYSCTL: 0}, {IDLE_SYSCTL: 1}, f"{IDLE_SYSCTL} was 0 at the start of the capture and 1 at its end; "
         f"{IDLE_SYSCTL} is 1 here but 0 on the host"),
        ({CONTROL_SYSCTL: "cubic"}, {CONTROL_SYSCTL: "reno"}, f"{CONTROL_SYSCTL} is reno here but cubic on the host"),
        ({IDLE_SYSCTL: 0}, {IDLE_SYSCTL: 0, "new": True}, "the namespace is younger than the trace"),
    ],
)  # fmt: skip
def test_a_note_says_what_differs_and_what_changed(
    space: dict[str, Any], end: dict[str, Any] | None, said: str
) -> None:
    assert note(space, end) == said


def test_without_the_host_or_the_namespace_nothing_is_compared() -> None:
    assert note({IDLE_SYSCTL: 1}, host=None) == ""
    assert note({IDLE_SYSCTL: 1}, {IDLE_SYSCTL: 0}, None).endswith("1 at the start of the capture and 0 at its end")
    unknown = audit.namespaces(pd.DataFrame({"netns_ino": [9]}), frames.about(sysctls={"1": HOST}))
    assert unknown["note"].tolist() == [""]
