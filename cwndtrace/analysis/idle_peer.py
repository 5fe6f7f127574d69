# SPDX-License-Identifier: Apache-2.0
"""Whether the peer asked for what a connection sent after idle time.

Data that comes in during idle time is a request, or it is chatter: what a peer sends by its own clock and expects no
answer to (Redis' REPLCONF ACK, a standby's status, WebSocket's pongs). A sender answers a request; chatter comes at any
time before a send. The rule, where anything is uncertain in favour of chatter:

- A send is prompt if it follows the last message so closely that, with as many messages in the idle time, chance puts
  it there at most one time in twenty. How many came is counted from when the previous burst ended, or else from the
  connection's beginning. Captures of older versions don't count; ten a second are taken then, and never more.
- A connection whose sends are prompt after most of its idle times is one that answers requests. Otherwise a prompt send
  is taken for chance. Idle times in which no data came in, or none in the last half, don't count in this.
- What came before the send is no request, even there, if several small messages came, all but the last of them to no
  effect; or if it was far less than what comes before the connection's prompt sends at the median.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis.cost import Bools

_CHANCE: Final = 0.05
"""The probability up to which a send isn't taken to follow a message by chance."""
_MESSAGES_PER_S: Final = 10
"""More chatter than this isn't expected."""
_SMALL: Final = 128
"""Mean bytes of a message up to which several may be chatter: pings, heartbeats, acknowledgments, also inside TLS."""
_FAR_LESS: Final = 0.25

Floats = npt.NDArray[np.float64]


def asked(resets: pd.DataFrame, recoveries: pd.DataFrame, data_came: Bools) -> Bools:
    """Return which resets followed a request, of those with ``data_came``: the ones with data in their idle time.

    Takes frames of a Trace. ``bytes_received`` and ``data_segs_in`` may be missing in them, or missing values.
    """
    idle_us = np.maximum(resets["idle_us"].to_numpy(np.float64), 1)
    received, messages, recent = _received(resets, recoveries, idle_us)
    most = np.maximum(idle_us / 1e6 * _MESSAGES_PER_S, 1)
    # fmin takes the other one where a value is missing.
    chance = resets["last_rcv_us"].to_numpy(np.float64) * np.fmin(messages, most) / idle_us
    chatter = recent & (messages >= 2) & (received <= _SMALL * messages)
    prompt = data_came & ~chatter & (chance <= _CHANCE)
    connection = pd.factorize(resets["connection"])[0]

    def per_connection(values: Floats, of: Bools) -> Any:
        return pd.Series(np.where(of, values, np.nan)).groupby(connection)

    counts = data_came & (resets["last_rcv_us"].to_numpy(np.float64) < idle_us / 2)
    answers = per_connection(prompt.astype(np.float64), counts).transform("mean").to_numpy() > 0.5
    usual = per_connection(received, prompt & recent).transform("median").to_numpy()
    requests: Bools = data_came & answers & ~chatter & ~(recent & (received < _FAR_LESS * usual))
    return requests


def _received(resets: pd.DataFrame, recoveries: pd.DataFrame, idle_us: Floats) -> tuple[Floats, Floats, Bools]:
    """Return the bytes and the messages, at most, that came in the idle time; missing where they weren't counted.

    The third array says where they were counted from about the beginning of the idle time. Full segments that follow
    each other are one message.
    """
    names = np.concatenate([frame["connection"].to_numpy(object) for frame in (resets, recoveries)])
    codes = np.split(pd.factorize(names)[0], [len(resets)])
    at = pd.DataFrame({"connection": codes[0], "ts": resets["ts_ns"].to_numpy(np.int64), "row": np.arange(len(resets))})
    last = pd.DataFrame(
        {
            "connection": codes[1],
            "ts": recoveries["reset_ts_ns"].to_numpy(np.int64),
            "until": recoveries["end_ts_ns"].to_numpy(np.float64),
            "bytes": _counter(recoveries, "bytes_received"),
            "segments": _counter(recoveries, "data_segs_in"),
        }
    ).dropna()
    joined = pd.merge_asof(
        at.sort_values("ts", kind="stable"),
        last.sort_values("ts", kind="stable"),
        on="ts",
        by="connection",
        allow_exact_matches=False,
    )
    joined = joined.sort_values("row")
    before_ns = 2e3 * idle_us
    recent = joined["until"].to_numpy() >= resets["ts_ns"].to_numpy(np.float64) - before_ns
    received, segments = (
        np.maximum(_counter(resets, name) - joined[column].fillna(0).to_numpy(), 0)
        for name, column in (("bytes_received", "bytes"), ("data_segs_in", "segments"))
    )
    full = received // np.maximum(resets["mss"].to_numpy(np.float64), 1)
    return received, np.maximum(segments - full, 1), recent & ~np.isnan(received)


def _counter(frame: pd.DataFrame, name: str) -> Floats:
    if name not in frame:
        return np.full(len(frame), np.nan)
    return frame[name].to_numpy(np.float64, na_value=np.nan)
