# SPDX-License-Identifier: Apache-2.0
"""Many captures at once, one task each, on Dask's own scheduler.

Tasks return their tables as Parquet, 75 kB with 200 connections. Nothing is shuffled and no task depends on another: a
groupby over all parts was tried, and waited for itself.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final

from cwndtrace.errors import CwndtraceError, UsageError
from cwndtrace.fleet import dataset, names
from cwndtrace.fleet.dataset import Dataset
from cwndtrace.fleet.extract import MOST_ROWS, failed
from cwndtrace.fleet.places import Located
from cwndtrace.fleet.work import work
from cwndtrace.format import clean

_WAITING: Final = 256
"""The most tasks that the scheduler has at once, so that its memory and the results in it stay small."""
_PATIENCE_S: Final = 20
"""How long a scheduler may take to answer, and a first worker to come to it, s."""
_DEATHS: Final = 1
"""How many workers of a local cluster a task may end before it is set aside. It gets a second chance alone."""


def _unseen(done: int, of: int) -> None:
    """Show no progress."""


def run(
    found: Sequence[Located],
    result: Dataset,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    max_rows: int = MOST_ROWS,
    resume: bool = False,
    progress: Callable[[int, int], object] = _unseen,
) -> int:
    """Put all captures into the result, and return how many were computed.

    With ``resume``, those are left out that are in the result, didn't change since, and could be read. ``progress`` is
    called with how many are done, and how many there are. ``scheduler`` is the address of a running one, which is
    trusted with what this process may do; without it ``workers`` processes are started. Raises CwndtraceError where
    there is no scheduler, or none any more, or it has no worker.
    """
    known = result.known() if resume else {}
    left = [each for each in found if not each.stamp or known.get(names.file(each.name)) != ("ok", each.stamp)]
    done = len(found) - len(left)
    progress(done, len(found))
    if not left:
        return 0
    with tempfile.TemporaryDirectory(prefix="cwndtrace-fleet-") as scratch:
        # A task of another machine's worker has its own place for temporary files.
        cluster = _theirs(scheduler) if scheduler else _own(min(workers or _cpus(), len(left)), scratch)
        with cluster as client:
            at = None if scheduler else scratch
            for each, packed in _outcomes(client, left, max_rows, at):
                result.put(packed, each.stamp)
                done += 1
                progress(done, len(found))
    return len(left)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _outcomes(
    client: Any, found: Sequence[Located], max_rows: int, scratch: str | None
) -> Iterator[tuple[Located, dict[str, bytes]]]:
    """Yield each capture with its tables. Those that end a worker come last and alone, so that no other suffers."""
    suspects = []
    for each, packed in _computed(client, found, max_rows, scratch, _WAITING):
        if packed is None:
            suspects.append(each)
        else:
            yield each, packed
    for each, packed in _computed(client, suspects, max_rows, scratch, 1):
        yield each, _deadly(each) if packed is None else packed


def _deadly(found: Located) -> dict[str, bytes]:
    cause = "The process that analysed it ended each time: something killed it, or memory ran out."
    remedy = "Try cwndtrace report with it alone; give more memory to fewer --workers, or lower --max-rows."
    return dataset.pack(failed(found.host, found.name, CwndtraceError(cause, remedy)))


def _computed(
    client: Any, found: Sequence[Located], max_rows: int, scratch: str | None, most: int
) -> Iterator[tuple[Located, dict[str, bytes] | None]]:
    """Yield each capture with its tables, or with None where its workers ended; at most ``most`` are under way.

    Raises CwndtraceError where the scheduler is lost: that says nothing of the captures that are left.
    """
    from distributed import KilledWorker, as_completed

    waiting = iter(found)
    tasks: dict[Any, Located] = {}

    def begin(number: int) -> list[Any]:
        begun = []
        for each in islice(waiting, number):
            task = client.submit(work, each, max_rows, scratch, pure=False)
            tasks[task.key] = each
            begun.append(task)
        return begun

    done = as_completed(begin(most), loop=client.loop)
    for task in done:
        each = tasks.pop(task.key)
        try:
            yield each, task.result()
        except KilledWorker:
            yield each, None
        except CancelledError as error:
            cause = f"the Dask scheduler ended or can't be reached any more: {clean(str(error))[:200]}"
            remedy = "start it again; where the result has a folder, --resume goes on with what is in it"
            raise CwndtraceError(cause, remedy) from error
        except Exception as error:  # such as a worker that has no cwndtrace, or another version
            cause = f"Dask couldn't run its task: {type(error).__name__}: {clean(str(error))[:400]}."
            remedy = "Workers need the same version of cwndtrace and Python, and the same captures."
            yield each, dataset.pack(failed(each.host, each.name, CwndtraceError(cause, remedy)))
        task.release()
        for following in begin(1):
            done.add(following)


@contextmanager
def _theirs(address: str) -> Iterator[Any]:
    from distributed import Client

    if not re.fullmatch(r"(tcp|tls)://(\[[0-9A-Fa-f:.]+\]|[^:/\[\]]+):[0-9]{1,5}", address):
        raise UsageError(f"{address} is no address of a scheduler", "write tcp://HOST:PORT, as dask scheduler prints")
    try:
        client = Client(address, timeout=_PATIENCE_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        cause = f"there is no Dask scheduler at {address}: {clean(str(error))[:200]}"
        raise CwndtraceError(cause, "start one: dask scheduler; and on each machine: dask worker ADDRESS") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_PATIENCE_S)
        except TimeoutError as error:
            cause = f"no worker came to the Dask scheduler at {address} within {_PATIENCE_S} s"
            raise CwndtraceError(cause, f"start one on each machine: dask worker {address}") from error
        yield client


@contextmanager
def _own(workers: int, scratch: str) -> Iterator[Any]:
    """Yield a client of a cluster on loopback.

    It speaks TLS, and both ends need a key of this run: other users of this machine can reach its ports, and whoever
    may talk to a scheduler may run code as its user. Nothing is served by HTTP.
    """
    import dask
    from distributed import Client, LocalCluster
    from distributed.security import Security

    quiet: dict[str, list[str]] = {f"distributed.{part}.http.routes": [] for part in ("scheduler", "worker", "nanny")}
    # A worker has one task at a time, so that it takes no innocent one with it.
    rules = {"distributed.scheduler.allowed-failures": _DEATHS, "distributed.scheduler.worker-saturation": 1.0}
    none = "127.0.0.1:0"
    with dask.config.set({**quiet, **rules, "distributed.admin.system-monitor.disk": False}):
        security = Security.temporary()
        with (
            LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", protocol="tls",
                security=security, dashboard_address=none, worker_dashboard_address=none, local_directory=scratch,
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster, security=security, set_as_default=False) as client,
        ):  # fmt: skip
            yield client
