# SPDX-License-Identifier: Apache-2.0
"""Tests of the table in kernel-patches/README.md: each fall of the window is forced, and what fires is what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import pytest

from tests.harness import tcp
from tests.harness.guest import KERNEL
from tests.harness.scripts import PATCHES
from tests.harness.tcp import Connect
from tests.vm.falls import Fall, Fired, Forcing

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("patched")]

FORCED: Final[dict[str, Callable[[Forcing], Fall]]] = {
    "tcp_cwnd_restart(), on a send": Forcing.idle,
    "tcp_cwnd_restart(), on an ACK that opens the window": Forcing.opened_window,
    "tcp_enter_loss(), on a timeout": Forcing.timeout,
    "tcp_enter_loss(), on a SYN's timeout": Forcing.lost_syn,
    "tcp_enter_loss(), with a window of 0": Forcing.zero_window,
    "tcp_cwnd_application_limited()": Forcing.application_limit,
    "tcp_process_tlp_ack()": Forcing.loss_probe,
    "tcp_cwnd_reduction(), tcp_end_cwnd_reduction()": Forcing.congestion_mark,
    "tcp_mtup_probe_success(), tcp_mtu_probe()": Forcing.larger_segments,
    "tcp_init_transfer()": Forcing.first_window,
    "tcp_undo_cwnd_reduction()": Forcing.undo,
}
RAISED: Final = "tcp_undo_cwnd_reduction()"


def table() -> dict[str, Fired]:
    """Return the events of each row for this kernel."""
    text = (PATCHES / "README.md").read_text().partition("## Each way in which the window falls")[2]
    lines = text.partition("\n\n|")[2].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = next(i for i, cell in enumerate(rows[0]) if KERNEL in cell.split(", "))
    return {row[0]: frozenset(re.findall(r"`([^`]+)`", row[column])) for row in rows[2:]}


def test_the_table_has_the_rows_that_are_forced() -> None:
    assert list(table()) == list(FORCED)


@pytest.mark.parametrize("row", FORCED)
def test_a_fall_has_the_events_of_the_table(row: str, connect: Connect, make_space: Callable[[], tcp.Space]) -> None:
    fall = FORCED[row](Forcing(connect, make_space))
    print(f"{row}: {fall.before} -> {fall.after} segments, {', '.join(sorted(fall.fired)) or 'no event'}")
    assert (fall.after > fall.before) if row == RAISED else (fall.after < fall.before)
    assert fall.fired == table()[row]
