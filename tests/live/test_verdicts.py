# SPDX-License-Identifier: Apache-2.0
"""A test of verdicts and idle causes on connections for which the right answers are known.

The connections run over the lab's paths. One trace of the whole machine covers all of them, and at the end a table
compares the expected with the actual answers.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
import pytest

import cwndtrace
from cwndtrace.capture.source import Filters
from cwndtrace.errors import KernelLacks
from cwndtrace.lab import path as paths
from cwndtrace.lab.disk import read_for, slow_device
from cwndtrace.lab.link import Link
from cwndtrace.lab.namespaces import write_sysctl
from cwndtrace.lab.owner import Owner
from cwndtrace.lab.recording import Recording
from cwndtrace.tcp import IDLE_SYSCTL
from cwndtrace.trace import Trace
from tests.harness import tcp
from tests.harness.lab import PathEnd

pytestmark = pytest.mark.live

RTT_MS: Final = 40
IDLE_S: Final = 1.0
"""Idle time of several retransmission timeouts of such a path (240 ms)."""
LARGE: Final = 1_000_000
SMALL: Final = 2_000


@dataclass(frozen=True)
class Way:
    """A path on which data goes from ``near`` to ``far``."""

    near: PathEnd
    far: PathEnd
    relay: int

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Stop the relay meanwhile, so that no packet crosses the path."""
        tcp.stop(self.relay)
        try:
            yield
        finally:
            os.kill(self.relay, signal.SIGCONT)


@dataclass(frozen=True)
class VerdictCase:
    """The expected answers for a connection (namespace, ports); there are several if they depend on the probe."""

    name: str
    ends: tuple[int, int, int]
    verdicts: tuple[str, ...]
    causes: tuple[str, ...] = ()


class Scenarios:
    """A maker of connections, one for each scenario; ``cases`` has the expected answers."""

    def __init__(self, stack: ExitStack, drain: tcp.Drain) -> None:
        self.cases: list[VerdictCase] = []
        self.skipped: dict[str, str] = {}
        self._stack, self._drain = stack, drain
        self.clean, self.lossy, self.frail = (self._way(loss) for loss in (0.0, 0.02, 0.0))

    def _way(self, loss: float) -> Way:
        path = self._stack.enter_context(paths.open_path(Link(rtt_ms=RTT_MS, loss=loss), force="relay"))
        assert path.relay is not None
        for end in (path.server, path.client):
            write_sysctl(end.namespace, "net.ipv4.tcp_no_metrics_save", "1")
        write_sysctl(path.client.namespace, IDLE_SYSCTL, "0")
        return Way(PathEnd(path.server), PathEnd(path.client), path.relay.pid)

    def connect(
        self, way: Way | None = None, *, back: bool = False, grown: int = 150, **options: Any
    ) -> tcp.TcpConnection:
        """Return a connection whose window has grown to this many segments; ``back`` is from far to near."""
        way = way or self.clean
        near, far = (way.far, way.near) if back else (way.near, way.far)
        connection = tcp.connect(near, self._drain, address=far.address, to=far, device=near.device, **options)
        self._stack.callback(connection.close)
        if grown:
            connection.grow(grown)
        return connection

    def expect(self, name: str, c: tcp.TcpConnection, *verdicts: str, causes: tuple[str, ...] = ()) -> None:
        """Add the expected answers for a connection."""
        self.cases.append(VerdictCase(name, (c.space.inode, c.sport, c.dport), verdicts, causes))


def ask(c: tcp.TcpConnection) -> None:
    """Send a request from the peer, and read it at the sending end."""
    c.peer.send(b"ask")
    assert c.sock.recv(3) == b"ask"


def burst(c: tcp.TcpConnection, size: int, piece: int = LARGE) -> None:
    """Send ``size`` bytes in pieces, and wait until they are acknowledged."""
    for begin in range(0, size, piece):
        c.sock.sendall(bytes(min(piece, size - begin)))
    c.quiet()


def idle(c: tcp.TcpConnection, seconds: float = IDLE_S) -> None:
    """Wait until no data was sent for this time."""
    c.until(lambda i: i.last_snd_us >= seconds * 1e6, "idle time")


# ---- the scenarios ----------------------------------------------------------------------------------


def harmful(lab: Scenarios) -> None:
    """The sender sends a large answer after a long idle time."""
    c = lab.connect()
    idle(c)
    ask(c)
    burst(c, LARGE)
    lab.expect("harmful idle reset", c, "harmful", causes=("peer",))


def small_payload(lab: Scenarios) -> None:
    """The answer of two kilobytes fits into ten segments."""
    c = lab.connect()
    idle(c)
    ask(c)
    burst(c, SMALL)
    lab.expect("payload of 2 kB", c, "nothing_waited", causes=("peer",))


def small_receive_window(lab: Scenarios) -> None:
    """The receiver never offers more than a few segments."""
    c = lab.connect(grown=0, read_buffer=10_000)
    for _ in range(2):
        burst(c, 100_000)
    idle(c)
    ask(c)
    burst(c, 100_000)
    lab.expect("receiver window small", c, "receiver_window")


def small_send_buffer(lab: Scenarios) -> None:
    """The sender's own buffer holds few segments, yet more than the window that idle time leaves."""
    c = lab.connect(grown=0)
    c.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
    # The pieces are small, because the kernel may take a single large write whole.
    for _ in range(2):
        burst(c, 600_000, 16_000)
    idle(c)
    ask(c)
    burst(c, 600_000, 16_000)
    lab.expect("send buffer small", c, "harmful", causes=("peer",))


def random_loss(lab: Scenarios) -> None:
    """One packet in fifty is lost, and there is no idle time."""
    c = lab.connect(lab.lossy, grown=0)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        burst(c, 60_000)
    assert c.info().total_retrans
    lab.expect("random loss, no idle time", c, "loss")


def timeout_after_idle(lab: Scenarios) -> None:
    """The path fails when the connection sends after idle time, with a window that never exceeded the initial one."""
    c = lab.connect(lab.frail, grown=0)
    burst(c, SMALL)
    idle(c)
    with lab.frail.outage():
        c.sock.send(bytes(SMALL))
        c.until(lambda i: bool(i.retransmits), "a retransmission timeout")
    c.quiet()
    lab.expect("RTO loss after idle time", c, "loss")


def bbr(lab: Scenarios) -> None:
    """BBR has its own cong_control, so it is exempt."""
    if "bbr" not in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split():
        lab.skipped["BBR"] = "this kernel has no BBR; a kernel with CONFIG_TCP_CONG_BBR does (modprobe tcp_bbr)"
        return
    c = lab.connect(ca="bbr", grown=20)
    idle(c)
    ask(c)
    burst(c, LARGE)
    lab.expect("BBR", c, "exempt")


def sysctl_off(lab: Scenarios) -> None:
    """The sender is in a namespace where the sysctl is off."""
    c = lab.connect(back=True)
    idle(c)
    ask(c)
    burst(c, LARGE)
    lab.expect("sysctl off", c, "sysctl_off")


def trickle(lab: Scenarios) -> None:
    """The sender sends little and often. The unused window may decay, which costs nothing."""
    c = lab.connect()
    for _ in range(40):
        c.sock.send(b"x" * 100)
        time.sleep(0.05)
    lab.expect("application trickling", c, "no_reset", "nothing_waited")


def disk(lab: Scenarios) -> None:
    """The sender gets a request, reads a slow device, and answers."""
    with ExitStack() as stack:
        try:
            device = stack.enter_context(slow_device(Owner.new()))
        except KernelLacks as e:
            lab.skipped["idle for a disk"] = f"{e.cause}: {e.remedy}"
            return
        c = lab.connect()
        ask(c)
        read_for(str(device.path))(IDLE_S)
        burst(c, LARGE)
    lab.expect("idle for a disk", c, "harmful", causes=("disk",))


def silence(lab: Scenarios) -> None:
    """The peer sends its request late, and the sender answers at once."""
    c = lab.connect()
    idle(c, 2 * IDLE_S)
    ask(c)
    burst(c, LARGE)
    lab.expect("idle for a silent peer", c, "harmful", causes=("peer",))


def timer(lab: Scenarios) -> None:
    """The sender's application sends without a request, after idle time."""
    c = lab.connect()
    idle(c)
    burst(c, LARGE)
    lab.expect("idle by a timer", c, "harmful", causes=("application",))


def reopened(lab: Scenarios) -> None:
    """The peer's window is closed for long; when it opens, the sender sends the remaining data."""
    c = lab.connect(read_buffer=300_000, grown=40)
    c.fill()
    idle(c)
    lab._drain.add(c.peer)
    c.quiet()
    lab.expect("zero-window reopen", c, "receiver_window", causes=("peer",))


def written_behind(lab: Scenarios) -> None:
    """The sender's application writes more while the peer's window is closed."""
    c = lab.connect(read_buffer=300_000, grown=40)
    c.fill()
    for _ in range(3):
        idle(c)
        c.sock.send(bytes(2000), socket.MSG_EOR)
    lab._drain.add(c.peer)
    c.quiet()
    lab.expect("writes behind a zero window", c, "receiver_window", causes=("peer",))


def web_server(lab: Scenarios) -> None:
    """A client keeps its connection to nginx, and sends requests with idle times between them."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        lab.skipped["HTTP keep-alive"] = "needs nginx: make develop, or sudo apt install nginx"
        return
    near, far = lab.clean.near, lab.clean.far
    with Nginx(program, near) as server:
        clients: list[http.client.HTTPConnection] = []
        far.enter(lambda: clients.append(_http(near.address)))
        (client,) = clients
        ends = (near.inode, 8080, client.sock.getsockname()[1])
        for pause in (0, 0, 0, IDLE_S, IDLE_S):
            time.sleep(pause)
            client.request("GET", "/large")
            assert len(client.getresponse().read()) == LARGE
        # The connection stays open until a snapshot has seen it once more.
        lab._stack.callback(client.close)
        lab._stack.push(server.keep())
    lab.cases.append(VerdictCase("HTTP keep-alive", ends, ("harmful",), ("peer",)))


def _http(address: str) -> http.client.HTTPConnection:
    client = http.client.HTTPConnection(address, 8080, timeout=20)
    client.connect()
    return client


class Nginx:
    """nginx in a namespace, with one large file; it is stopped on exit unless ``keep`` was called."""

    def __init__(self, program: str, where: PathEnd) -> None:
        self._stack = ExitStack()
        self._program, self._where = program, where

    def __enter__(self) -> Nginx:
        from tempfile import TemporaryDirectory

        folder = Path(self._stack.enter_context(TemporaryDirectory()))
        folder.chmod(0o755)
        (folder / "large").write_bytes(bytes(LARGE))
        (folder / "conf").write_text(
            f"daemon off; user root; worker_processes 1; pid {folder}/pid; error_log stderr;"
            f"events {{}} http {{ access_log off; server {{ listen {self._where.address}:8080; root {folder}; }} }}"
        )
        listener = self._stack.enter_context(self._where.enter(self._listen))
        # nginx takes over the listening socket that this variable names, and with it the congestion control.
        process = subprocess.Popen(
            [self._program, "-c", str(folder / "conf")],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._stack.enter_context(process)
        self._stack.callback(process.terminate)

        def answers() -> bool:
            assert process.poll() is None, process.stderr and process.stderr.read()
            with contextlib.suppress(OSError):
                self._where.enter(lambda: socket.create_connection((self._where.address, 8080), 1).close())
                return True
            return False

        tcp.until(answers, 20, "nginx")
        return self

    def _listen(self) -> socket.socket:
        listener = socket.create_server((self._where.address, 8080))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        listener.setblocking(False)
        return listener

    def keep(self) -> ExitStack:
        """Return a stack that stops nginx when it is closed."""
        return self._stack.pop_all()

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def pings(lab: Scenarios) -> None:
    """The application pings more often than once per RTO, so it keeps its window."""
    c = lab.connect()
    end = time.monotonic() + 1.5 * IDLE_S
    while time.monotonic() < end:
        c.sock.send(b"ping")
        time.sleep(0.1)
    burst(c, LARGE)
    lab.expect("pings shorter than the RTO", c, "no_reset")


SCENARIOS: Final = (
    harmful, small_payload, small_receive_window, small_send_buffer, random_loss, timeout_after_idle, bbr, sysctl_off,
    trickle, disk, silence, timer, reopened, written_behind, web_server, pings,
)  # fmt: skip


# ---- the answers ----------------------------------------------------------------------------------


def answers(trace: Trace, case: VerdictCase) -> tuple[str, str, str]:
    """Return the verdict on a connection, the cause of most of its idle times, and the verdict's evidence."""
    summary = trace.summary()
    inode, sport, dport = case.ends
    mine = summary[(summary["netns_ino"] == inode) & (summary["sport"] == sport) & (summary["dport"] == dport)]
    assert len(mine) == 1, (case, mine)
    row = mine.iloc[0]
    judged = trace.verdicts[trace.verdicts["connection"] == row["connection"]]
    causes = judged.loc[judged["cause"] != "", "cause"]
    return row["verdict"], "" if causes.empty else str(causes.mode().iloc[0]), row["why"]


def test_verdicts_and_causes_are_right(tmp_path: Path, drain: tcp.Drain) -> None:
    with ExitStack() as stack:
        lab = Scenarios(stack, drain)
        with Recording(tmp_path / "a.cwnd", Filters(), cwndtrace.__version__) as recording:
            for scenario in SCENARIOS:
                scenario(lab)
        trace = recording.trace()
    wrong, table = [], []
    print(f"\n{'SCENARIO':<28}{'EXPECTED':<40}{'ACTUAL':<26}EVIDENCE")
    for case in lab.cases:
        verdict, cause, why = answers(trace, case)
        expected = " or ".join(case.verdicts) + (f", {' or '.join(case.causes)}" if case.causes else "")
        actual = f"{verdict}, {cause}" if cause else verdict
        table.append((verdict if verdict in case.verdicts else case.verdicts[0], verdict))
        print(f"{case.name:<28}{expected:<40}{actual:<26}{why}")
        if verdict not in case.verdicts or (case.causes and cause not in case.causes):
            wrong.append((case.name, expected, actual, why))
    confusion = pd.DataFrame(table, columns=["expected", "actual"])
    print(f"\n{pd.crosstab(confusion['expected'], confusion['actual']).to_string()}\n")
    for name, why in lab.skipped.items():
        print(f"{name}: left out, {why}")
    assert not wrong
    assert len(lab.cases) + len(lab.skipped) == len(SCENARIOS)
