# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace.stream``: live batches for a Python program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal, Self

from cwndtrace import privileges
from cwndtrace.capture import clocks, target
from cwndtrace.capture.bcc import silent
from cwndtrace.capture.connections import Snapshots
from cwndtrace.capture.live import Kernel
from cwndtrace.capture.privsep import Helper, PrivilegedHelper
from cwndtrace.capture.session import Batch, Session, Tally
from cwndtrace.capture.source import Filters
from cwndtrace.errors import UsageError
from cwndtrace.kernel import ladder


class Stream:
    """An iterator over batches of records as they come in.

    Enter it, then iterate. The iteration ends after ``duration`` seconds or ``stop()``. ``probes`` names the probe for
    each reason, and ``tally`` counts the records kept and lost so far.
    """

    def __init__(self, session: Session, duration: float | None) -> None:
        self._session = session
        self._duration = duration
        self._stopped = False

    @property
    def probes(self) -> dict[str, str | None]:
        """Return the probe for each reason, None where no probe sees that reason on this kernel."""
        return self._session.source.probes

    @property
    def lacking(self) -> str | None:
        """Return what the trace goes on without on this kernel, and why; None if that is nothing."""
        return self._session.source.lacking

    @property
    def tally(self) -> Tally:
        """Return the counts of the records kept and lost so far."""
        return self._session.tally

    def stop(self) -> None:
        """End the iteration after the records that have come in until now. Another thread may call this."""
        self._stopped = True

    def __iter__(self) -> Iterator[Batch]:
        for batches in self._session.turns(lambda: self._stopped, self._duration):
            yield from batches
        yield from self._session.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._session.close()


def stream(
    *,
    iface: str | None = None,
    pid: int | None = None,
    port: int | None = None,
    netns: str | None = None,
    cgroup: str | None = None,
    container: str | None = None,
    pod: str | None = None,
    unit: str | None = None,
    family: Literal[4, 6] | None = None,
    min_idle: float | None = None,
    block: bool | None = None,
    connections: bool = True,
    cmdline: bool = True,
    probe: str | None = None,
    duration: float | None = None,
) -> Stream:
    """Trace the running kernel and return a stream of batches, each with the records of one event.

    The events are ``cwnd_reset``, ``cwnd_recovery``, ``cwnd_sample``, ``block_io``, ``connections``, ``workloads`` and
    ``processes``, which has command lines with ``cmdline``. The filters are those of ``cwndtrace run``; ``min_idle``
    and ``duration`` are in seconds. Block I/O is traced if the kernel can time it, with ``block`` True in any case, and
    with False not. Tracing has begun when this returns. It needs root, and raises the errors of cwndtrace.errors.
    """
    target.need_root("tracing")
    if probe is not None and probe not in ladder.BY_NAME:
        raise UsageError(f"no probe {probe}", f"there are: {', '.join(ladder.BY_NAME)}")
    filters = target.resolve(
        iface=iface,
        pid=pid,
        port=port,
        namespace=netns,
        cgroup=cgroup,
        container=container,
        pod=pod,
        unit=unit,
        family=family,
        min_idle_s=min_idle,
    )
    session = open_session(filters, probe=probe, block=block, connections=connections, cmdline=cmdline)
    return Stream(session, duration)


def open_session(
    filters: Filters,
    *,
    probe: str | None = None,
    block: bool | None = None,
    connections: bool = True,
    privsep: bool = False,
    cmdline: bool = True,
    announce: Callable[[str], None] = silent,
) -> Session:
    """Return a session that traces the running kernel, with block I/O as in ``stream``. The caller closes it.

    With ``privsep``, a separate process reads what takes privileges (see privsep.PrivilegedHelper), so that the caller
    can drop its own. ``cmdline`` says whether command lines are kept. ``announce`` is told what is being done if that
    takes more than a second.
    """
    clocks.refuse_other_time()
    if privsep:
        helper: Helper = PrivilegedHelper(filters, privileges.invoking_user(), cmdline=cmdline)
    else:
        helper = Helper(filters, cmdline=cmdline)
    try:
        kernel = Kernel(filters, probe=probe, block=block, helper=helper, announce=announce)
        session = Session(kernel, helper=helper)
    except BaseException:
        helper.close()
        raise
    if connections:
        try:
            session.snapshots = Snapshots(helper.snapshot, lambda: session.clock.offset_ns)
        except BaseException:
            session.close()
            raise
    return session
