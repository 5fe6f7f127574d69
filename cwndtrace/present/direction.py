# SPDX-License-Identifier: Apache-2.0
"""Where to trace instead, in words, if connections mostly receive. Pandas isn't imported here, as ``run`` uses this."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from cwndtrace.format import plural

_NAMED: Final = 3
"""The most other ends that are named."""


def elsewhere(receivers: Sequence[Mapping[Any, Any]], total: int) -> str:
    """Return sentences that name the senders of ``receivers`` and say what to run there.

    ``receivers``, at least one, are those of ``total`` connections that mostly receive, with ``saddr``, ``sport``,
    ``daddr`` and ``dport``. Addresses may hold any text.
    """
    shared = Counter(port for row in receivers for port in {row["sport"], row["dport"]})
    places: Counter[tuple[str, int]] = Counter()
    for row in receivers:
        # The port of the service, at whichever end it is, is the one that more connections have, or the lower one.
        port = min((row["dport"], row["sport"]), key=lambda port: (-shared[port], port))
        places[_host(row["daddr"]), port] += 1
    named = [f"{host}, port {port}" for (host, port), _ in places.most_common(_NAMED)]
    more = [f"{len(places) - _NAMED} more"] if len(places) > _NAMED else []
    ((host, port), _), *_ = places.most_common(1)
    one = len(receivers) == 1
    mostly = f"{len(receivers):,} of {plural(total, 'connection')} mostly {'receives' if one else 'receive'}"
    whose = "its sender is" if one else "their senders are"
    return (
        f"{mostly}: {whose} at the other end ({'; '.join([*named, *more])}). "
        f"{'Its window is' if one else 'Their windows are'} kept there: "
        f"run `sudo cwndtrace run --port {port}` on {host}{', and likewise on the others' if len(places) > 1 else ''}."
    )


def _host(address: str) -> str:
    try:
        return "this host" if ipaddress.ip_address(address).is_loopback else address
    except ValueError:
        return address
