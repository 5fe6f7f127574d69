# SPDX-License-Identifier: Apache-2.0
"""What explains a reset better than its reason is told from the record, for one row and for a frame."""

from __future__ import annotations

from typing import Any

import pytest

from cwndtrace.analysis import peer_window
from cwndtrace.cli.live import TextView
from cwndtrace.records import arrow
from cwndtrace.records import frames as records
from tests.unit import frames
from tests.unit.fake_source import FakeSource, session_of

CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "idle"),
    ({"tgid": 0, "unsent_bytes": 1}, "peer window"),
    ({"unsent_bytes": 1448}, "peer window"),
    ({"unsent_bytes": 700, "snd_wnd": 699}, "peer window"),
    ({"unsent_bytes": 700, "snd_wnd": 700}, "idle"),
    ({"reason": "app_limited", "unsent_bytes": 9_000}, "app_limited"),
    ({"reason": "app_limited", "unsent_bytes": 9_000, "snd_wnd": 20_000, "unacked_bytes": 18_553}, "peer window"),
    ({"reason": "app_limited", "unsent_bytes": 9_000, "snd_wnd": 20_000, "unacked_bytes": 18_552}, "app_limited"),
    # A window that shrank below what is in flight.
    ({"reason": "app_limited", "unsent_bytes": 9_000, "snd_wnd": 0, "unacked_bytes": 18_552}, "peer window"),
    ({"reason": "rto_loss"}, "rto_loss"),
    ({"reason": "rto_loss", "snd_wnd": 0}, "peer window"),
    ({"reason": "rto_loss", "snd_wnd": 0, "tcp_state": "close_wait"}, "peer window"),
    ({"reason": "rto_loss", "snd_wnd": 0, "tcp_state": "syn_sent"}, "lost SYN"),
    ({"reason": "rto_loss", "tcp_state": "syn_recv"}, "lost SYN"),
    ({"reason": "tlp_loss", "tgid": 0, "unsent_bytes": 1, "snd_wnd": 0}, "tlp_loss"),
]


@pytest.mark.parametrize(("fields", "shown"), CASES)
def test_a_line_says_what_explains_the_reset(
    fields: dict[str, Any], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(FakeSource([("cwnd_reset", frames.reset(1, **fields).tobytes())]))
    view = TextView(session, print_block=False, quiet=True)
    for batch in session.step():
        view.batch(batch)
    assert capsys.readouterr().out.split("  ")[1].strip() == shown


def test_a_frame_gives_the_same_as_its_rows() -> None:
    table = frames.table("cwnd_reset", *(frames.reset(n, **fields) for n, (fields, _) in enumerate(CASES)))
    frame, rows = records.frame(table, "cwnd_reset"), arrow.table_to_dicts("cwnd_reset", table)
    for rule in (peer_window.reopened, peer_window.window_full, peer_window.zero_window, peer_window.handshake):
        column = rule(frame).tolist()
        assert column == [rule(row) for row in rows]
        assert any(column)
        assert not all(column)
