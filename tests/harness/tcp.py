# SPDX-License-Identifier: Apache-2.0
"""Connections whose state is known: TCP_INFO is read right before and right after each send.

A small send is too little to make the window grow, and all earlier data is acknowledged. So a window that is smaller
after such a send was reset in it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups, netns

INIT_CWND: Final = 10
IDLE_S: Final = 0.45
"""Idle time of two retransmission timeouts of a short path (200 ms)."""
NO_TASK: Final = (0, 0, "")
"""The tgid, tid and name of a send that a timer or an ACK makes."""
PREFIX: Final = "cwt-test-"
"""The beginning of the names of the tests' network namespaces."""
CORK: Final = socket.TCP_CORK
MSG_ZEROCOPY: Final = 0x4000000
_SO_ZEROCOPY: Final = 60
_SO_COOKIE: Final = 57
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
# Ethernet's MTU. With loopback's own 64 KiB, a window of ten segments would be larger than a burst.
_MTU: Final = 1500
# This is less than the receiver's buffer, so a slow receiver never closes the window.
_BURST: Final = 300_000
_BUFFER: Final = 4_000_000


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Return once ``condition`` holds; fail after ``seconds`` with a message that names ``what``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.001)


def stop(pid: int) -> None:
    """Stop a process and return once all its threads have stopped; until then they may finish system calls."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")

    def stopped() -> bool:
        # A thread may end meanwhile; the next call doesn't see it.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return all((t / "stat").read_text().rpartition(") ")[2].startswith("T") for t in threads.iterdir())
        return False

    until(stopped, 60, f"process {pid} to stop")


def run(*command: str) -> str:
    """Run a command and return its stdout; fail with its stderr if its exit code isn't 0."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


# ---- TCP_INFO ---------------------------------------------------------------------------------------------


class Info(NamedTuple):
    """The members of struct tcp_info that are compared with records; 0 for members that this kernel doesn't have."""

    ca_state: int
    retransmits: int
    rto_us: int
    mss: int
    unacked: int
    last_snd_us: int
    last_rcv_us: int
    last_ack_us: int
    srtt_us: int
    ssthresh: int
    cwnd: int
    total_retrans: int
    bytes_acked: int
    bytes_received: int
    unsent: int
    min_rtt_us: int
    bytes_sent: int
    snd_wnd: int


_SIZE: Final = 232
_U32: Final = {
    "rto_us": 8,
    "mss": 16,
    "unacked": 24,
    "last_snd_us": 44,
    "last_rcv_us": 52,
    "last_ack_us": 56,
    "srtt_us": 68,
    "ssthresh": 76,
    "cwnd": 80,
    "total_retrans": 100,
    "unsent": 144,
    "min_rtt_us": 148,
    "snd_wnd": 228,
}
_U64: Final = {"bytes_acked": 120, "bytes_received": 128, "bytes_sent": 200}


def info(sock: socket.socket) -> Info:
    """Return TCP_INFO of ``sock``, with times in microseconds (the kernel gives idle times in milliseconds)."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE).ljust(_SIZE, b"\0")
    values = {name: struct.unpack_from("=I", raw, at)[0] for name, at in _U32.items()}
    values |= {name: struct.unpack_from("=Q", raw, at)[0] for name, at in _U64.items()}
    values["last_snd_us"] *= 1000
    values["last_rcv_us"] *= 1000
    values["last_ack_us"] *= 1000
    return Info(ca_state=raw[1], retransmits=raw[2], **values)


# ---- network namespaces -----------------------------------------------------------------------------------


LISTEN = "0A"
"""The state of a listener in /proc/net/tcp."""


def listening() -> set[tuple[str, int]]:
    """Return addresses and ports of all TCP listeners in the calling thread's network namespace."""
    listeners = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == LISTEN:
                raw, port = local.split(":")
                # The address is printed as words of 32 bits in host byte order.
                words = [int(raw[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(raw), 8)]
                listeners.add((str(ipaddress.ip_address(b"".join(words))), int(port, 16)))
    return listeners


class Here:
    """The network namespace that the tests run in. Tests change nothing in it, because other programs use it too."""

    private = False

    def __init__(self) -> None:
        self.name = "this"
        self.inode = netns.own().inode

    def enter(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` in this namespace and return its result."""
        return work()

    def index(self, device: str) -> int:
        """Return the index of an interface in this namespace."""
        return int(self.enter(lambda: socket.if_nametoindex(device)))


class Space(Here):
    """A network namespace that the tests made, with loopback up at Ethernet's MTU."""

    private = True

    def __init__(self, name: str) -> None:
        self.name = name
        run("ip", "netns", "add", name)
        try:
            self._namespace = netns.find(name)
            self.inode = self._namespace.inode
            self.ip("link", "set", "lo", "mtu", str(_MTU), "up")
            # The kernel must not start a connection with the ssthresh of an earlier one.
            self.sysctl("net.ipv4.tcp_no_metrics_save", "1")
        except BaseException:
            self.close()
            raise

    def ip(self, *arguments: str) -> str:
        """Run ``ip`` in this namespace and return its stdout."""
        return run("ip", "-n", self.name, *arguments)

    def sysctl(self, name: str, value: str) -> None:
        """Set a sysctl of this namespace."""
        self.enter(lambda: Path("/proc/sys", *name.split(".")).write_text(value))

    def enter(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` in this namespace, on a separate thread, and return its result."""
        return netns.inside(self._namespace, work)

    def counter(self, name: str) -> int:
        """Return one of the kernel's counters of this namespace, such as TCPTimeouts."""

        def read() -> int:
            text = Path("/proc/thread-self/net/netstat").read_text()
            names, values = [line.split() for line in text.splitlines() if line.startswith("TcpExt:")]
            return int(values[names.index(name)])

        return int(self.enter(read))

    def close(self) -> None:
        """Delete the namespace and its interfaces."""
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


def delete_left_behind() -> None:
    """Delete the namespaces of test runs that were killed; a name has the pid of its run."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        pid = name.removeprefix(PREFIX).split("-")[0]
        if name.startswith(PREFIX) and not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def join(a: Space, b: Space, name: str, a_addresses: list[str], b_addresses: list[str]) -> None:
    """Add a veth pair called ``name`` at both ends, up, with addresses such as 10.0.0.1/24."""
    a.ip("link", "add", name, "mtu", str(_MTU), "type", "veth", "peer", "name", name, "netns", b.name)
    for space, addresses in ((a, a_addresses), (b, b_addresses)):
        for address in addresses:
            space.ip("addr", "add", address, "dev", name, *(["nodad"] if ":" in address else []))
        space.ip("link", "set", name, "mtu", str(_MTU), "up")


# ---- connections ------------------------------------------------------------------------------------------


class Drain:
    """A thread that reads all data that comes in on its sockets."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self._thread.start()

    def add(self, sock: socket.socket) -> None:
        """Read ``sock`` from now on."""
        self._sockets[sock.fileno()] = sock
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def pause(self, sock: socket.socket) -> None:
        """Stop reading ``sock``; a read that is under way is finished."""
        with contextlib.suppress(OSError):
            self._epoll.unregister(sock.fileno())

    def _run(self) -> None:
        while not self._stopped:
            for fd, _ in self._epoll.poll(0.05):
                try:
                    data = self._sockets[fd].recv(1 << 20, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except (OSError, KeyError):
                    data = b""
                if not data:
                    with contextlib.suppress(OSError):
                        self._epoll.unregister(fd)

    def close(self) -> None:
        """End the thread."""
        self._stopped = True
        self._thread.join()
        self._epoll.close()


@dataclass(frozen=True)
class Send:
    """A send: TCP_INFO and CLOCK_MONOTONIC before and after it, and the task that sent."""

    before: Info
    after: Info
    start_ns: int
    end_ns: int
    tgid: int
    tid: int
    comm: str

    @property
    def reason(self) -> str | None:
        """The reason why the window fell in this send; None if it didn't.

        A restart halves the window at least once, but not below the initial window. The only other function that
        lowers a window in a send, tcp_cwnd_application_limited(), takes less than half of it.
        """
        if self.after.cwnd >= self.before.cwnd:
            return None
        return "idle" if self.after.cwnd <= max(self.before.cwnd >> 1, INIT_CWND) else "app_limited"


@dataclass
class TcpConnection:
    """A connection whose sending end ``sock`` is observed; ``peer`` only receives."""

    space: Here
    sock: socket.socket
    peer: socket.socket
    drain: Drain
    family: int
    ca: str
    ifindex: int
    cgroup_id: int
    init_cwnd: int = INIT_CWND
    sends: list[Send] = field(default_factory=list)
    blind: list[tuple[int, int]] = field(default_factory=list)
    """Spans of CLOCK_MONOTONIC in which a reset may have gone unnoticed here, because the machine stalled."""
    saddr: str = ""
    daddr: str = ""
    sport: int = 0
    dport: int = 0

    def __post_init__(self) -> None:
        local, remote = self.sock.getsockname(), self.sock.getpeername()
        self.saddr, self.daddr = (str(end[0]).removeprefix("::ffff:") for end in (local, remote))
        self.sport, self.dport = local[1], remote[1]

    @property
    def key(self) -> tuple[int, str, int, str, int]:
        """The key that no other connection has."""
        return self.space.inode, self.saddr, self.sport, self.daddr, self.dport

    def info(self) -> Info:
        """Return TCP_INFO of the sending end."""
        return info(self.sock)

    def fill(self) -> Info:
        """Send until the window of the peer, which doesn't read, is closed and some data is left; return TCP_INFO.

        The sends are recorded in ``sends``, because on a slow machine there may be idle time between them.
        """
        self.drain.pause(self.peer)
        for _ in range(10_000):
            window = self.info().snd_wnd
            # The last of the window is one piece, since a piece that doesn't fit whole would wait for the probe timer.
            piece = bytes(min(window, 4 * _MTU) or 100)
            self.send(lambda data=piece: self.sock.send(data, socket.MSG_EOR))  # type: ignore[misc]
            # The peer must not delay its ACK.
            self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            if not window:
                return self.until(lambda i: not i.unacked and bool(i.unsent) and not i.snd_wnd, "a closed window")
            self.quiet()
        raise AssertionError(f"the peer's window never closed: {self.info()}")

    def cookie(self) -> int:
        """Return the socket's cookie; the kernel makes one if there is none yet."""
        return int(struct.unpack("=Q", self.sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0])

    def until(self, condition: Callable[[Info], bool], what: str) -> Info:
        """Return TCP_INFO once ``condition`` holds for it; fail after 20 s."""
        seen: list[Info] = []

        def holds() -> bool:
            seen[:] = [self.info()]
            return condition(seen[0])

        until(holds, 20, what)
        return seen[0]

    def quiet(self) -> Info:
        """Return TCP_INFO once all data is sent and acknowledged."""
        return self.until(lambda i: not i.unacked and not i.unsent, "all data acknowledged")

    def idle(self, seconds: float) -> Info:
        """Return TCP_INFO after idle time of ``seconds`` and of more than the RTO, which is long on a slow machine."""
        return self.until(lambda i: i.last_snd_us > max(seconds * 1e6, i.rto_us + 2e4), "idle time longer than the RTO")

    def send(self, how: Callable[[], Any] | None = None, by: tuple[int, int, str] | None = None) -> Send:
        """Send a little and record it in ``sends``; ``how`` sends in another way, ``by`` is the task that does so."""
        me = by or (os.getpid(), threading.get_native_id(), thread_name())
        # The send lies between the two readings of the clock, so its reset does too.
        start, before = time.monotonic_ns(), self.info()
        if how is None:
            self.sock.send(b"x" * 100)
        else:
            how()
        end, after = time.monotonic_ns(), self.info()
        self.sends.append(Send(before, after, start, end, *me))
        return self.sends[-1]

    def grow(self, least: int = 24, burst: int = _BURST) -> Info:
        """Send bursts of this many bytes until the window has at least ``least`` segments; return TCP_INFO then.

        A recorded small send comes before each burst, so no burst begins after idle time, where a reset would go
        unnoticed.
        """
        for _ in range(200):
            small = self.send()
            self.sock.send(bytes(1000))
            self.sock.sendall(bytes(burst))
            now = time.monotonic_ns()
            # An emulated machine may take longer for this than the RTO, so there may be idle time within it.
            if now - small.start_ns > small.before.rto_us * 1000:
                self.blind.append((small.end_ns, now))
            last = self.quiet()
            if last.cwnd >= least:
                return last
        raise AssertionError(f"the window never grew to {least}: {last}")

    def close(self) -> None:
        """Close both ends; a second call does nothing."""
        if self.peer.fileno() >= 0:
            self.drain.pause(self.peer)
        self.sock.close()
        self.peer.close()

    def reopen(self) -> Send:
        """Let the peer read again; return the recorded send that the opened window allows.

        This waits by TCP_INFO of the peer. A getsockopt on the sender holds the socket's lock, and if the ACK came
        then, the send would be made by the calling task.
        """

        def received() -> int:
            return info(self.peer).bytes_received

        total = received() + self.info().unsent

        def opened() -> None:
            self.drain.add(self.peer)
            until(lambda: received() == total, 20, "the remaining data")

        send = self.send(opened, NO_TASK)
        self.quiet()
        return send


Connect = Callable[..., TcpConnection]
"""The type of the fixture ``connect``."""


def own_cgroup() -> int:
    """Return the id of this process's cgroup v2, the inode of its folder; 0 if cgroup v2 isn't mounted."""
    path = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    try:
        return (cgroups.mount_point() / path.lstrip("/")).stat().st_ino
    except NotFound:
        return 0


def thread_name() -> str:
    """Return the name of the calling thread in the kernel."""
    return Path("/proc/thread-self/comm").read_text("utf-8", "replace").rstrip("\n")


def connect(
    space: Here,
    drain: Drain,
    *,
    ca: str = "cubic",
    address: str = "127.0.0.1",
    mapped: bool = False,
    from_server: bool = False,
    source: tuple[str, int] | None = None,
    port: int = 0,
    to: Here | None = None,
    device: str = "lo",
    init_cwnd: int = INIT_CWND,
    read_buffer: int = _BUFFER,
    by: Holder | None = None,
) -> TcpConnection:
    """Return a connection from ``space`` to ``address`` in ``to``, by default the same namespace.

    The end in ``space`` sends; with ``from_server``, the end that accepted does (both are in ``space`` then).
    ``mapped`` uses IPv6 sockets with IPv4-mapped addresses; ``by`` is the process that makes the sending end.
    """
    v6 = mapped or ":" in address
    family = socket.AF_INET6 if v6 else socket.AF_INET
    place = f"::ffff:{address}" if mapped else address

    def make() -> socket.socket:
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, ca.encode())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not space.private:
            # Loopback's default MTU is 64 KiB.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _MTU)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, read_buffer)
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        return sock

    listener: socket.socket = (to or space).enter(make)
    client: socket.socket | None = None
    try:
        listener.bind((place, port))
        listener.listen()
        client = by.connect(*listener.getsockname()) if by else space.enter(make)
        assert client is not None
        if not by:
            if source:
                client.bind(source)
            client.settimeout(20)
            client.connect(listener.getsockname())
            client.settimeout(None)
        server, _ = listener.accept()
    except BaseException:
        if client is not None:
            client.close()
        raise
    finally:
        listener.close()
    sock, peer = (server, client) if from_server else (client, server)
    drain.add(peer)
    shown_family = int(socket.AF_INET6 if v6 and not mapped else socket.AF_INET)
    cgroup_id = by.cgroup_id if by else own_cgroup()
    return TcpConnection(space, sock, peer, drain, shown_family, ca, space.index(device), cgroup_id, init_cwnd)


_HOLDER: Final = """
import socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
held = []
while command := control.recv(100).decode().split():
    if command[0] == "connect":
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((command[1], int(command[2])))
        held.append(sock)
        socket.send_fds(control, [b"done"], [sock.fileno()])
    else:
        held[int(command[1])].send(b"x" * 100)
        control.send(b"done")
"""


class Holder:
    """Another process, in a namespace and a cgroup (a folder of cgroup v2), that makes and holds connections.

    The tests hold the same sockets, to read TCP_INFO.
    """

    def __init__(self, space: Space, cgroup: Path) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = str(theirs.fileno())
        with theirs:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", space.name, sys.executable, "-c", _HOLDER, fd], pass_fds=[theirs.fileno()]
            )
        self.pid = self._process.pid
        (cgroup / "cgroup.procs").write_text(str(self.pid))
        self.cgroup_id = cgroup.stat().st_ino

    def connect(self, address: str, port: int, *_: object) -> socket.socket:
        """Make the process open a cubic connection to an IPv4 address, and return its socket."""
        self._control.send(f"connect {address} {port}".encode())
        received = socket.recv_fds(self._control, 100, 1)
        return socket.socket(fileno=received[1][0])

    def send(self, number: int) -> None:
        """Make the process send on its connection with this number, counted from 0."""
        self._control.send(f"send {number}".encode())
        assert self._control.recv(100) == b"done"

    @property
    def who(self) -> tuple[int, int, str]:
        """The tgid, tid and name of the process."""
        return self.pid, self.pid, Path(f"/proc/{self.pid}/comm").read_text().rstrip("\n")

    def close(self) -> None:
        """End the process."""
        self._control.close()
        self._process.wait()


@contextmanager
def corked(sock: socket.socket) -> Iterator[None]:
    """Set TCP_CORK meanwhile, so that the kernel holds small pieces back."""
    sock.setsockopt(socket.IPPROTO_TCP, CORK, 1)
    try:
        yield
    finally:
        sock.setsockopt(socket.IPPROTO_TCP, CORK, 0)


def allow_zerocopy(sock: socket.socket) -> None:
    """Set SO_ZEROCOPY, which MSG_ZEROCOPY needs."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)


class ForkedSender:
    """A process, of another user with ``uid``, that sends on an inherited socket each time ``send`` is called."""

    def __init__(self, sock: socket.socket, uid: int | None = None) -> None:
        script = "while read -r line; do printf %100s .; echo sent >&2; done"
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=sock.fileno(),
            stderr=subprocess.PIPE,
            text=True,
            user=uid,
        )
        self.pid = self._process.pid

    def send(self) -> None:
        """Make the process send, and return when it has."""
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._process.stderr.readline() == "sent\n"

    @property
    def who(self) -> tuple[int, int, str]:
        """The tgid, tid and name of the process."""
        return self.pid, self.pid, Path(f"/proc/{self.pid}/comm").read_text().rstrip("\n")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
