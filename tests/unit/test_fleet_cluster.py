# SPDX-License-Identifier: Apache-2.0
"""Fleets on clusters of several processes give what their captures give one by one, also when workers are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import LocalCluster
from distributed.client import FutureCancelledError

import cwndtrace
from cwndtrace.errors import CwndtraceError
from cwndtrace.fleet import engine, names, tables
from cwndtrace.fleet.dataset import Dataset
from cwndtrace.fleet.extract import MOST_ROWS
from cwndtrace.fleet.places import Located, find
from cwndtrace.fleet.result import compute
from cwndtrace.fleet.tables import Frames
from cwndtrace.fleet.work import analysed, work
from tests.harness.command import ENVIRONMENT
from tests.harness.loopback import need_loopback
from tests.unit import frames, hostile

PATIENCE_S = 30


@pytest.fixture(scope="module", autouse=True)
def loopback() -> None:
    need_loopback()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures of four hosts, six of which are broken or hostile."""
    place = tmp_path_factory.mktemp("fleet") / "place"
    for number, host in enumerate(("web1", "web1", "web2", "web2", "db1", "db1")):
        resets, connections = frames.story(seed=number, peers=1 + number % 3, seconds=30, comm=host)
        where = place / f"host={host}" / f"{number}.cwnd"
        where.parent.mkdir(parents=True, exist_ok=True)
        blocks = frames.disk(500 * (1 + number), number)
        frames.capture(where, resets=resets, connections=connections, block_io=blocks, host=f"not {host}")
    odd = place / "host=%2E%2E%2F%2E%2E%2Fodd"
    odd.mkdir()
    hostile.everywhere(odd / "hostile.cwnd")
    for name, damage in DAMAGE.items():
        damage(frames.two_idle_connections(odd / f"{name}.cwnd").path)
    (odd / "noise.cwnd.tar").write_bytes(os.urandom(5000))
    (odd / "empty.cwnd").mkdir()
    return place


def cut(path: Path) -> None:
    part = next((path / "cwnd_reset").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:200])


def link(path: Path) -> None:
    (path / "meta.json").unlink()
    (path / "meta.json").symlink_to("/etc/passwd")


def folder(path: Path) -> None:
    (path / "meta.json").unlink()
    (path / "meta.json").mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut part": cut,
    "no metadata": lambda path: (path / "meta.json").write_text("{"),
    "a link": link,
    "a folder as metadata": folder,
}
FAILED = {"no metadata.cwnd", "a link.cwnd", "a folder as metadata.cwnd", "noise.cwnd.tar", "empty.cwnd"}


def one_by_one(found: list[Located]) -> Frames:
    """Return the frames of captures without a cluster and without a result on disk, by pandas only."""
    each = [analysed(one, MOST_ROWS, None).named() for one in found]
    whole = {name: [part[name] for part in each if len(part[name])] for name in tables.COLUMNS}
    rows = {
        name: pd.concat(parts).sort_values(["host", "capture"], kind="stable", ignore_index=True)
        for name, parts in whole.items()
    }
    return Frames(**rows)


def same(got: Frames, wanted: Frames, *leave: str) -> None:
    """Compare two fleets to the last bit."""
    for name, frame in wanted.named().items():
        out = [column for column in leave if column in frame]
        pd.testing.assert_frame_equal(
            got.named()[name].drop(columns=out), frame.drop(columns=out), check_exact=True, check_like=False
        )


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A file system with a bucket, of an S3 server on loopback that this process and its children find."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    known = {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        for name, value in {**known, "ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(f"AWS_{name}", value)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem()
        fs.mkdir("captures")
        try:
            yield fs
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()


@pytest.fixture(scope="module")
def cluster(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:  # noqa: ARG001
    """The client of a cluster of two processes, which takes seconds to start."""
    with engine._own(2, str(tmp_path_factory.mktemp("cluster"))) as client:
        yield client


@pytest.fixture
def shared(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all runs use one cluster."""
    monkeypatch.setattr(engine, "_own", lambda *_: nullcontext(cluster))


@pytest.fixture(scope="module")
def wanted(place: Path) -> Frames:
    return one_by_one(find([str(place)]))


def stranger(host: str, port: int) -> str:
    """Return how a port answers somebody without a key: to plain HTTP, or else by an error of TLS."""
    with socket.create_connection((host, port), timeout=PATIENCE_S) as plain, suppress(ConnectionError):
        plain.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        if (answer := plain.recv(1000)).startswith(b"HTTP"):
            return answer.decode().partition("\r\n")[0]
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), timeout=PATIENCE_S) as plain, context.wrap_socket(plain) as secure:
            # In TLS 1.3 the other end looks at the certificate after this end is done.
            return f"it sent {secure.recv(1)!r}"
    except (ssl.SSLError, ConnectionError):
        return "refused"


def workers() -> set[psutil.Process]:
    """Return this process's children that run Dask's workers.

    Where setproctitle is installed, Dask gives them a name. Elsewhere they are what multiprocessing has spawned.
    """
    children = psutil.Process().children(recursive=True)
    return {each for each in children if re.search("spawn_main|dask worker", " ".join(each.cmdline()))}


def listening() -> set[tuple[str, int]]:
    """Return the addresses at which this process and its workers listen."""
    sockets = [each for process in (psutil.Process(), *workers()) for each in process.net_connections("inet")]
    return {tuple(each.laddr) for each in sockets if each.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_two_processes_give_what_pandas_gives_also_when_both_are_killed(
    place: Path, wanted: Frames, tmp_path: Path
) -> None:
    shown: list[tuple[int, int]] = []
    killed: set[psutil.Process] = set()
    places: set[tuple[str, int]] = set()
    answers: list[str] = []
    of_others, elsewhere = workers(), listening()

    def progress(done: int, of: int) -> None:
        shown.append((done, of))
        if done == 1:
            places.update(listening() - elsewhere)
            answers.extend(stranger(*address) for address in places)
            killed.update(workers() - of_others)
            for worker in killed:
                worker.send_signal(signal.SIGKILL)

    got = compute([str(place)], tmp_path / "r", workers=2, progress=progress)
    same(got.frames(), wanted)
    # They are replaced, and the captures that they had are tried again.
    assert len(killed) >= 2
    # The scheduler and both workers, each with its nanny, and nobody else can reach them.
    assert len(places) >= 5
    assert {host for host, _ in places} == {"127.0.0.1"}
    assert set(answers) == {"refused", "HTTP/1.1 404 Not Found"}
    assert answers.count("refused") >= 5
    assert shown == [(done, 13) for done in range(14)]
    rows = got.captures
    assert {Path(name).name for name in rows[rows["status"] == "failed"]["capture"]} == FAILED
    assert (rows["reason"] != "").tolist() == (rows["status"] == "failed").tolist()
    assert set(rows["host"]) == {"web1", "web2", "db1", "../../odd"}
    assert {path.name for path in tmp_path.iterdir()} == {"r"}


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_only_what_changed_or_failed_is_computed_again(place: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(place / "host=web1", tmp_path / "mine")
    (mine / "empty.cwnd").mkdir()
    compute([str(mine)], tmp_path / "r")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*.parquet")}
    os.utime(mine / "0.cwnd" / "meta.json")
    again = compute([str(mine)], tmp_path / "r", resume=True)
    same(again.frames(), one_by_one(find([str(mine)])))
    kept = {path.name for path, at in before.items() if path.exists() and path.stat().st_mtime_ns == at}
    assert kept == {names.file("1.cwnd")}


@pytest.mark.slow
def test_nothing_is_started_where_nothing_is_left(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Dataset.create(tmp_path / "r", resume=False)
    found = find([str(place / "host=web1")])
    for each in found:
        result.put(work(each, MOST_ROWS, None), each.stamp)
    monkeypatch.setattr(engine, "_own", None)
    assert engine.run(found, result, resume=True) == 0


# ---- killed workers ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_a_capture_that_ends_every_worker_is_a_row(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A function of this function is sent as its code, so that workers don't import what this file imports.
    def deadly(found: Located, max_rows: int, scratch: str | None) -> dict[str, bytes]:
        if found.name.endswith("2.cwnd"):
            os._exit(1)
        return work(found, max_rows, scratch)

    monkeypatch.setattr(engine, "work", deadly)
    rows = compute([str(place / "host=web*")], tmp_path / "r").captures
    assert rows[["capture", "status"]].to_numpy().tolist() == [
        ["host=web1/0.cwnd", "ok"],
        ["host=web1/1.cwnd", "ok"],
        ["host=web2/2.cwnd", "failed"],
        ["host=web2/3.cwnd", "ok"],
    ]
    assert "memory ran out" in rows["reason"][2]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FutureCancelledError("work-1", "scheduler-connection-lost"), ""),
        (ModuleNotFoundError("No module named 'cwndtrace'\x1b"), "Dask couldn't run its task: ModuleNotFoundError: No"),
    ],
)
def test_a_lost_scheduler_ends_the_run_and_a_worker_that_cannot_work_does_not(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    class Task:
        key = "work-1"

        def result(self) -> None:
            raise error

        def release(self) -> None: ...

    client = SimpleNamespace(submit=lambda *_, **__: Task(), loop=None)
    monkeypatch.setattr("distributed.as_completed", lambda tasks, **_: tasks)
    found = find([str(place / "host=web1")])[:1]
    if not says:
        with pytest.raises(CwndtraceError, match="scheduler ended or can't be reached"):
            list(engine._computed(client, found, MOST_ROWS, None, 1))
        return
    ((_, packed),) = engine._computed(client, found, MOST_ROWS, None, 1)
    assert packed is not None
    (reason,) = pq.read_table(pa.BufferReader(packed["captures"]))["reason"].to_pylist()
    assert reason.startswith(says)
    assert reason.isprintable()


# ---- other places and schedulers --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_captures_in_s3_give_the_same_figures(place: Path, wanted: Frames, s3: Any, tmp_path: Path) -> None:
    for file in place.rglob("*"):
        if file.is_file() and not file.is_symlink():
            s3.put(str(file), f"captures/team/{file.relative_to(place)}")
    shutil.make_archive(str(tmp_path / "packed"), "gztar", place / "host=web1", "0.cwnd")
    s3.put(str(tmp_path / "packed.tar.gz"), "captures/team/host=web3/0.cwnd.tar.gz")
    got = cwndtrace.fleet("s3://captures/team", result=tmp_path / "r")
    rows = got.captures
    packed = rows["host"] == "web3"
    assert rows[packed]["status"].tolist() == ["ok"]
    plain = [name for name in wanted.captures["capture"] if Path(name).name not in FAILED]
    for name, frame in wanted.named().items():
        mine, theirs = (
            each[each["capture"].isin(plain)].reset_index(drop=True) for each in (got.frames().named()[name], frame)
        )
        times = [column for column in ("modified", "ahead_s") if column in frame]
        pd.testing.assert_frame_equal(mine.drop(columns=times), theirs.drop(columns=times), check_exact=True)
    # S3 has no folders, so an empty one isn't there.
    assert set(rows[rows["status"] == "failed"]["capture"].map(lambda name: Path(name).name)) == FAILED - {"empty.cwnd"}
    with pytest.raises(CwndtraceError, match=r"can't be listed|no capture"):
        find(["s3://nothing-here/x"])


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """A scheduler and a worker, started as people start them."""
    file = tmp_path / "scheduler.json"
    options = ["--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    alone = ["--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path)]
    started = []

    def start(*arguments: str) -> None:
        command = [sys.executable, "-m", "dask", *arguments]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, **quiet))  # type: ignore[call-overload]

    try:
        start("scheduler", "--port", "0", "--scheduler-file", str(file), *options)
        deadline = time.monotonic() + PATIENCE_S
        while not file.exists() or not file.read_text().endswith("}"):
            assert time.monotonic() < deadline
            assert started[0].poll() is None
            time.sleep(0.05)
        address = str(json.loads(file.read_text())["address"])
        start("worker", address, *alone, *options)
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(PATIENCE_S)


@pytest.mark.slow
def test_a_cluster_started_by_hand_gives_the_same_figures(place: Path, tmp_path: Path, scheduler: str) -> None:
    got = cwndtrace.fleet(place / "host=db1", result=tmp_path / "r", scheduler=scheduler)
    same(got.frames(), one_by_one(find([str(place / "host=db1")])))


@pytest.mark.slow
def test_a_scheduler_without_a_worker_is_told_with_its_cure(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_PATIENCE_S", 3)
    with (
        LocalCluster(
            n_workers=0, processes=False, host="127.0.0.1", protocol="tcp", dashboard_address="127.0.0.1:0"
        ) as bare,
        pytest.raises(CwndtraceError, match="no worker came to the Dask scheduler at tcp://"),
    ):
        cwndtrace.fleet(place, result=tmp_path / "r", scheduler=bare.scheduler_address)


@pytest.mark.slow
def test_no_scheduler_is_told_with_its_cure(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_PATIENCE_S", 1)
    with pytest.raises(CwndtraceError, match="there is no Dask scheduler at"):
        cwndtrace.fleet(place, result=tmp_path / "r", scheduler="tcp://127.0.0.1:1")
