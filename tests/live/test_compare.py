# SPDX-License-Identifier: Apache-2.0
"""A test of what compare concludes from captures of the same connection with the sysctl on, off and on again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

import cwndtrace
from cwndtrace.capture.source import Filters
from cwndtrace.lab import path as paths
from cwndtrace.lab.link import Link
from cwndtrace.lab.namespaces import write_sysctl
from cwndtrace.lab.recording import Recording
from cwndtrace.tcp import IDLE_SYSCTL
from cwndtrace.trace import Trace
from tests.harness import tcp
from tests.harness.command import call
from tests.harness.lab import PathEnd

pytestmark = pytest.mark.live

IDLE_S: Final = 3.0
"""There is a snapshot every two seconds, so that one comes when the RTO of such a path (240 ms) is over."""
BURSTS: Final = 3


class Served:
    """A connection over a path of 40 ms, whose bursts are traced into captures in a folder."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._folder = folder
        self._path = stack.enter_context(paths.open_path(Link(rtt_ms=40), force="relay"))
        near, far = PathEnd(self._path.server), PathEnd(self._path.client)
        drain = tcp.Drain()
        stack.callback(drain.close)
        self._connection = tcp.connect(near, drain, address=far.address, to=far, device=near.device)
        stack.callback(self._connection.close)

    @property
    def namespace(self) -> str:
        """The name of the sender's network namespace."""
        return self._path.server.namespace.name

    def trace(self, name: str, *, sysctl: int, bursts: int = BURSTS) -> Trace:
        """Trace bursts of 1 MB, each after idle time, with the sysctl at this value."""
        write_sysctl(self._path.server.namespace, IDLE_SYSCTL, str(sysctl))
        self._connection.grow(700, 1_000_000)
        with Recording(self._folder / name, Filters(netns=self._path.server.namespace.inode), "test"):
            for _ in range(bursts):
                self._connection.until(lambda i: i.last_snd_us >= IDLE_S * 1e6, "idle time")
                self._connection.sock.sendall(bytes(1_000_000))
                self._connection.quiet()
        return cwndtrace.load(self._folder / name)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(stack, tmp_path)


def test_the_sysctl_is_named_as_the_cure_of_idle_resets(served: Served) -> None:
    before = served.trace("on.cwnd", sysctl=1)
    cured = served.trace("off.cwnd", sysctl=0)
    again = served.trace("again.cwnd", sysctl=1)
    silent = served.trace("silent.cwnd", sysctl=0, bursts=0)
    change = f"{IDLE_SYSCTL} was 1 before and 0 after in namespace {served.namespace}"

    out = before.conclude(cured)
    print(out)
    assert (out.verdict, out.before.resets, out.after.resets) == ("cured", BURSTS, 0)
    # The last burst ends with the capture, whose last snapshot shows that it was sent.
    assert 2 <= out.after.quiet <= BURSTS
    assert change in out.text
    first, *_ = call("compare", before.path, cured.path).stdout.splitlines()
    assert first == str(out)

    for after, verdict, words in (
        (again, "not_cured", f"{BURSTS} of {BURSTS} idle resets"),
        (silent, "unknown", "the second capture shows no idle period"),
    ):
        out = before.conclude(after)
        print(out)
        assert out.verdict == verdict
        assert words in out.text
        assert (change in out.text) is (after is silent)
    assert cured.conclude(again).verdict == "unknown"
