# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace.stream`` traces what its caller names, yields what comes in, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from cwndtrace import privileges
from cwndtrace.capture import clocks, target
from cwndtrace.capture import stream as module
from cwndtrace.capture.source import Filters
from cwndtrace.errors import KernelLacks, UsageError
from tests.unit import frames
from tests.unit.fake_source import FakeSource, NoNames


class StreamHelper(NoNames):
    """A helper in this process, or in another one for ``user``, that sees no connections."""

    def __init__(self, filters: Filters, user: object = "this process", *, cmdline: bool) -> None:
        super().__init__(filters, cmdline=cmdline)
        self.user, self.cmdline, self.closed = user, cmdline, False

    def snapshot(self) -> Any:
        return [], 0.0

    def close(self) -> None:
        self.closed = True


class Opening:
    """What was opened: the names that were resolved, and the kernel with its filters and options."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.filters: Filters | None = None
        self.options: dict[str, Any] = {}
        self.source = FakeSource(
            [("block_io", frames.block().tobytes())], last=[("cwnd_reset", frames.reset().tobytes())]
        )
        self.refusal: Exception | None = None

    def resolve(self, **names: Any) -> Filters:
        self.names = names
        return Filters(port=names.get("port"))

    def kernel(self, filters: Filters, **options: Any) -> FakeSource:
        self.filters, self.options = filters, options
        if self.refusal:
            raise self.refusal
        return self.source


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Opening:
    made = Opening()
    monkeypatch.setattr(target, "need_root", lambda _: None)
    monkeypatch.setattr(target, "resolve", made.resolve)
    monkeypatch.setattr(clocks, "refuse_other_time", lambda: None)
    monkeypatch.setattr(privileges, "invoking_user", lambda: "the user")
    monkeypatch.setattr(module, "Kernel", made.kernel)
    monkeypatch.setattr(module, "Helper", StreamHelper)
    monkeypatch.setattr(module, "PrivilegedHelper", StreamHelper)
    return made


def test_what_the_caller_names_is_traced(opening: Opening) -> None:
    same = {
        "iface": "eth0",
        "pid": 1,
        "port": 2,
        "cgroup": "/c",
        "container": "d",
        "pod": "e/f",
        "unit": "g",
        "family": 4,
    }
    module.stream(**same, netns="blue", min_idle=0.5, probe="fentry", block=True)  # type: ignore[arg-type]
    assert opening.names == same | {"namespace": "blue", "min_idle_s": 0.5}
    assert opening.filters == Filters(port=2)
    helper = opening.options["helper"]
    assert (opening.options["probe"], opening.options["block"]) == ("fentry", True)
    assert (helper.user, helper.cmdline, helper._filters) == ("this process", True, Filters(port=2))
    module.stream(cmdline=False)
    assert (opening.options["probe"], opening.options["block"]) == (None, None)
    assert opening.options["helper"].cmdline is False


def test_a_probe_that_is_not_known_is_refused(opening: Opening) -> None:
    with pytest.raises(UsageError, match="no probe fentri") as caught:
        module.stream(probe="fentri")
    assert caught.value.remedy.startswith("there are: tracepoint, fentry, ")
    assert opening.filters is None


def test_batches_come_in_order_and_everything_is_closed(opening: Opening) -> None:
    with module.stream(connections=False) as traced:
        assert traced.probes == opening.source.probes
        assert [(batch.event, len(batch)) for batch in traced] == [("block_io", 1), ("cwnd_reset", 1)]
        assert traced.tally.kept == {"block_io": 1, "cwnd_reset": 1}
        assert traced.lacking is None
        closed = [opening.source.closed]
    assert [*closed, opening.source.closed, opening.options["helper"].closed] == [False, True, True]


def test_a_stream_that_is_stopped_yields_what_came_in_until_then(opening: Opening) -> None:
    opening.source._polls = [[("block_io", frames.block().tobytes())] for _ in range(5)]
    with module.stream(connections=False) as traced:
        events = []
        for batch in traced:
            events.append(batch.event)
            traced.stop()
    assert events == ["block_io", "cwnd_reset"]


@pytest.mark.parametrize("connections", [True, False])
def test_connections_are_snapshots_unless_they_are_left_out(opening: Opening, connections: bool) -> None:
    with module.open_session(Filters(), connections=connections) as session:
        assert (session.snapshots is not None) == connections
        session.finish()
    assert opening.source.begun_ns == session.start["mono_ns"]


@pytest.mark.parametrize(("privsep", "user"), [(True, "the user"), (False, "this process")])
def test_another_process_reads_what_takes_privileges_where_it_is_asked_for(
    opening: Opening, privsep: bool, user: str
) -> None:
    with module.open_session(Filters(port=3), privsep=privsep, connections=False, cmdline=False) as session:
        assert opening.options["helper"] is session.helper
        assert isinstance(session.helper, StreamHelper)
        assert (session.helper.user, session.helper.cmdline) == (user, False)
        assert opening.filters == session.helper._filters == Filters(port=3)


def test_an_error_leaves_nothing_open(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    opening.refusal = KernelLacks("no")
    with pytest.raises(KernelLacks):
        module.open_session(Filters())
    assert opening.options["helper"].closed
    opening.refusal = None

    def refuse(_: StreamHelper) -> None:
        raise OSError("no snapshot")

    monkeypatch.setattr(StreamHelper, "snapshot", refuse)
    with pytest.raises(OSError, match="no snapshot"):
        module.open_session(Filters())
    assert opening.source.closed
    assert opening.options["helper"].closed
