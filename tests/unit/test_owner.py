# SPDX-License-Identifier: Apache-2.0
"""The names of the lab's objects tell which process owns them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cwndtrace.lab.owner import Owner


def test_an_owner_is_read_from_its_names() -> None:
    owner = Owner.new()
    assert Owner.of(owner.name("client")) == owner
    assert Owner.of(owner.name()) == owner
    assert owner.alive
    assert Owner.new() != owner


def test_a_reused_pid_is_another_owner() -> None:
    owner = Owner.new()
    assert not replace(owner, start=owner.start + 1).alive
    assert not replace(owner, pid=2**22 + 1).alive


@pytest.mark.parametrize(
    "name", ["cwt", "cwt-1", "cwt-1-2", "cwt-x-2-3", "acwt-1-2-3", "cwt-1-2-3-a/b", "eth0", "cwt-1-2-3-A"]
)
def test_other_names_have_no_owner(name: str) -> None:
    assert Owner.of(name) is None
