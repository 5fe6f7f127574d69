# SPDX-License-Identifier: Apache-2.0
"""The checks that run in a guest with a stock kernel: ``python -m tests.kernels.inside [CHECK...]``.

Each compares what cwndtrace records with something else that knows it: TCP_INFO around each send, the kernel's counters
of a disk, the processes that are left. Each result is a JSON object on a line of stdout. Nothing else goes there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import cwndtrace
from cwndtrace.capture.source import Filters
from cwndtrace.kernel import btf, cgroups, facts, ladder
from tests.harness import owner, tcp
from tests.harness.disk import Disk, Stat, Traced, file_system, loop, stat_of
from tests.harness.netem import netem
from tests.harness.processes import children
from tests.harness.tracing import Tracer, differences
from tests.kernels import live

USER: Final = "user"
_CLONE: Final = Path("/srv/cwndtrace")
_ROUNDS: Final = 3
_START_S: Final = 600
"""The time that a trace may take to start: it may have to compile everything first."""
_END_S: Final = 180
"""The time that a trace may take to end, in seconds of the guest's clock."""
_LOSS: Final = 4
"""TCP_CA_Loss, the state after a timeout."""
_UNPRIVILEGED: Final = Path("/proc/sys/kernel/unprivileged_bpf_disabled")


@dataclass(frozen=True)
class Result:
    """One result: the check's name, whether it held, what was found, and the seconds that it took."""

    check: str
    ok: bool
    said: str
    seconds: float = 0.0


Found = Iterator[tuple[str, bool, str]]
CHECKS: dict[str, Callable[[], Found]] = {}
"""The checks in their order. The last ones change the machine for good."""


def check(function: Callable[[], Found]) -> Callable[[], Found]:
    """Register a check under its function's name."""
    CHECKS[function.__name__] = function
    return function


def say(text: str) -> None:
    """Print a line on the console."""
    print(f"checks: {time.monotonic():.0f} {text}", file=sys.stderr, flush=True)


def here() -> ladder.Facts:
    """Return the facts of this kernel that decide which probes are possible."""
    return facts.ladder_facts(btf.Btf.running())


def possible(reason: str) -> list[str]:
    """Return the probes that can see resets for this reason on this kernel, by its facts, best first."""
    known = here()
    return [probe.name for probe in ladder.PROBES if ladder.lacks(known, probe, reason) is None]


# ---- commands ----


def call(*command: str, seconds: float = _START_S, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``stdout`` and ``stderr`` of the result are text. Raises TimeoutExpired."""
    say(" ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, **how)
    print(done.stdout + done.stderr, file=sys.stderr, flush=True)
    return done


def last_line(text: str) -> str:
    """Return the last line of a text that isn't blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    return [pid, *(below for child in children(pid) for below in tree(child))]


def ticks(task: Path) -> int:
    """Return the CPU time of a task or a process, given its folder in /proc, in clock ticks; 0 if it has ended."""
    with suppress(OSError):
        fields = (task / "stat").read_text().rpartition(") ")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def evidence(pid: int) -> str:
    """Print what the processes of a tree are doing on the console, and return it in a line.

    A trace that doesn't end in time may be starved or may hang: the CPU time of a second tells one from the other.
    """

    pids = tree(pid)
    tasks = [task for each in pids for task in Path(f"/proc/{each}/task").glob("*")]
    before = {task: ticks(task) for task in tasks}
    time.sleep(1)
    lines = []
    for task in tasks:
        with suppress(OSError):
            name, where = (task / "comm").read_text().strip(), (task / "wchan").read_text().strip()
            state = (task / "stat").read_text().rpartition(") ")[2].split()[0]
            lines.append(f"{task.name} {name} {state} {where or '-'} +{ticks(task) - before[task]} ticks")
            with suppress(OSError):
                print((task / "stack").read_text(), file=sys.stderr)
            for file in ("status", "syscall"):
                with suppress(OSError):
                    print((task / file).read_text(), file=sys.stderr)
    print("\n".join(lines), file=sys.stderr, flush=True)
    # The Python that was started with -X faulthandler prints all its stacks at this signal, and ends.
    for each in pids:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGABRT)
    return "; ".join(lines)


class RunCommand:
    """``cwndtrace run`` in the background, from the moment at which it is attached.

    ``before`` stands before the command, such as sudo. Its stderr goes to a file, so that nothing ever waits for it.
    """

    def __init__(self, *arguments: str, before: tuple[str, ...] = ()) -> None:
        python = ["/opt/cwndtrace/bin/python", "-I", "-X", "faulthandler", "-m"]
        command = [*before, *(["cwndtrace"] if before else [*python, "cwndtrace"]), "run", *arguments]
        say(" ".join(command))
        self.log = Path(f"/tmp/run-{time.monotonic_ns()}.log")
        begin = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/tmp", start_new_session=True
            )
        try:
            tcp.until(self._attached, _START_S, "a trace to start")
        except BaseException:
            self.kill()
            raise
        self.started_s = time.monotonic() - begin

    def _attached(self) -> bool:
        assert self.process.poll() is None, f"exit code {self.process.returncode}: {' '.join(self.text().split())}"
        time.sleep(0.1)
        return any(line.startswith("Tracing ") for line in self.text().splitlines())

    def text(self) -> str:
        """Return what it has printed."""
        return self.log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The pid of cwndtrace itself, below sudo."""
        pid = self.process.pid
        while Path(f"/proc/{pid}/comm").read_text().strip() == "sudo":
            (pid, *_) = children(pid)
        return pid

    def end(self) -> str:
        """Send SIGINT, wait for the end, and return how long it took and how much of that was CPU time.

        Fails if it ends with an error or not in time.
        """
        pids, used = tree(self.pid), 0
        before = sum(ticks(Path(f"/proc/{pid}")) for pid in pids)
        begin = time.monotonic()
        os.kill(self.pid, signal.SIGINT)
        try:
            while self.process.poll() is None and time.monotonic() < begin + _END_S:
                used = max(used, sum(ticks(Path(f"/proc/{pid}")) for pid in pids) - before)
                time.sleep(0.2)
            if self.process.poll() is None:
                found = evidence(self.process.pid)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)
                raise AssertionError(f"not ended {_END_S} s after SIGINT: {found}")
        finally:
            self.kill()
            print(self.text(), file=sys.stderr, flush=True)
        code = self.process.returncode
        assert code == 0, f"exit code {code}: {last_line(self.text())}"
        cpu_s = used / os.sysconf("SC_CLK_TCK")
        return f"start {self.started_s:.0f} s, end {time.monotonic() - begin:.0f} s ({cpu_s:.0f} s of CPU)"

    def kill(self) -> None:
        """Kill it and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


# ---- traffic ----


@contextmanager
def world(name: str) -> Iterator[tuple[tcp.Space, tcp.Drain]]:
    """Yield a network namespace and a thread that reads; remove both on exit."""
    space, drain = tcp.Space(f"{tcp.PREFIX}{os.getpid()}-{name}"), tcp.Drain()
    try:
        yield space, drain
    finally:
        drain.close()
        space.close()


def idle_and_send(connections: list[tcp.TcpConnection], seconds: float = tcp.IDLE_S) -> None:
    """Let connections with a grown window be idle, then send on each."""
    for connection in connections:
        connection.grow()
    for connection in connections:
        connection.idle(seconds)
    for connection in connections:
        connection.send()


def known(connections: list[tcp.TcpConnection]) -> list[tuple[tcp.TcpConnection, tcp.Send]]:
    """Return the sends that reset the window by idle time, by TCP_INFO."""
    return [(c, s) for c in connections for s in c.sends if s.reason == "idle"]


def outside(connection: tcp.TcpConnection, stamp: int) -> bool:
    """Return true if a time lies where TCP_INFO of this connection was read often enough to know of each reset."""
    return not any(start < stamp < end for start, end in connection.blind)


def exact(tracer: Tracer, connections: list[tcp.TcpConnection]) -> tuple[bool, str]:
    """Compare a tracer's idle resets with TCP_INFO, and return whether they are the same, and in words."""
    sends = known(connections)
    right, wrong = 0, ""
    records = {c.key: [r for r in tracer.of(c) if r["reason"] == "idle"] for c in connections}
    for connection, send in sends:
        within = [r for r in records[connection.key] if send.start_ns <= r["ts_ns"] <= send.end_ns]
        differing = differences(tracer, connection, send, within[0]) if within else {"record": ("none", "one")}
        right += len(within) == 1 and not differing
        wrong = wrong or (f"; first difference: {differing}" if differing else "")
    surplus = sum(len(rows) for rows in records.values()) - len(sends)
    more = f", {surplus:+} records" if surplus else ""
    return right == len(sends) > 0 and not surplus, f"{right} of {len(sends)}{more}{wrong}"


KINDS: Final[tuple[dict[str, Any], ...]] = (
    {"ca": "cubic"},
    {"ca": "reno"},
    {"ca": "cubic", "address": "::1"},
    {"ca": "reno", "address": "::1"},
)


@contextmanager
def each_probe() -> Iterator[dict[str, Tracer]]:
    """Yield a tracer with each probe that can see idle resets here, all at the same time."""
    with ExitStack() as stack:
        tracers = {}
        for name in possible("idle"):
            say(f"attaching {name}")
            tracers[name] = stack.enter_context(Tracer(name))
        yield tracers


# ---- the checks ----


@check
def doctor() -> Found:
    """Compare the probes that doctor finds by loading them with those that the kernel's facts allow."""
    done = call("cwndtrace", "doctor", "--json", seconds=2400)
    found = json.loads(done.stdout)
    expected = {reason: next(iter(possible(reason)), None) for reason in ladder.REASONS}
    lacking = [f"{f['name']}: {f['value']}" for f in found["facts"] if f["state"] != "ok"]
    said = ", ".join(f"{reason} by {probe}" for reason, probe in found["probes"].items() if probe)
    yield "doctor", done.returncode == 0 and found["probes"] == expected, said
    say(f"doctor lacks: {'; '.join(lacking)}")


def timeouts(space: tcp.Space, connections: list[tcp.TcpConnection]) -> list[tuple[tcp.Info, tcp.Info]]:
    """Drop every packet until each connection has had a timeout; return TCP_INFO right before and after the first."""
    before: dict[int, tcp.Info] = {}
    after: dict[int, tcp.Info] = {}
    with netem(space, "loss", "100%") as begin:
        begin()

        def lost() -> bool:
            for n, connection in enumerate(connections):
                now = connection.info()
                if n in after:
                    continue
                if now.ca_state == _LOSS:
                    # The kernel reads the window before it takes the socket's lock, so this reading may have the window
                    # of before the timeout.
                    after[n] = connection.info()
                    continue
                before[n] = now
                # Packets that leave before the first drop are acknowledged.
                if not now.unacked:
                    connection.sock.send(b"x" * 5000)
            return len(after) == len(connections)

        tcp.until(lost, 120, "a retransmission timeout of each connection")
    for connection in connections:
        connection.quiet()
    return [(before[n], after[n]) for n in range(len(connections))]


@check
def probes() -> Found:
    """Compare idle resets and timeouts by each possible probe with TCP_INFO, on IPv4 and IPv6, cubic and reno."""
    with world("probes") as (space, drain), each_probe() as tracers:
        say("sending")
        connections = [tcp.connect(space, drain, **kind) for kind in KINDS]
        for _ in range(_ROUNDS):
            idle_and_send(connections)
        for name, tracer in tracers.items():
            yield f"idle {name}", *exact(tracer, connections)
        fresh = [tcp.connect(space, drain, **kind) for kind in KINDS]
        for connection in fresh:
            connection.grow()
        truth = timeouts(space, fresh)
        for name, tracer in tracers.items():
            if not tracer.sees("rto_loss"):
                continue
            right, wrong = 0, ""
            for connection, (before, after) in zip(fresh, truth, strict=True):
                rows = [r for r in tracer.of(connection) if r["reason"] == "rto_loss"]
                first = [(r["cwnd_before"], r["cwnd_after"]) for r in rows[:1]]
                right += first == [(before.cwnd, after.cwnd)]
                if first != [(before.cwnd, after.cwnd)]:
                    wrong = f"; {first} and not {(before.cwnd, after.cwnd)}: {rows}, {before}, {after}"
            yield f"rto_loss {name}", right == len(fresh), f"{right} of {len(fresh)}{wrong}"
        for connection in (*connections, *fresh):
            connection.close()


@check
def filters() -> Found:
    """Compare what passes each filter with what should, of connections that send at the same times."""
    with world("a") as (a, drain), world("b") as (b, _):
        tcp.join(a, b, "eth0", ["10.9.0.1/24", "fd00:9::1/64"], ["10.9.0.2/24", "fd00:9::2/64"])
        cgroup = cgroups.mount_point() / f"{tcp.PREFIX}{os.getpid()}"
        cgroup.mkdir()
        holder = tcp.Holder(a, cgroup)
        try:
            named = {
                "veth": tcp.connect(a, drain, to=b, address="10.9.0.2", device="eth0"),
                # Programs are compiled with the port, so that another one would be compiled each time.
                "veth6": tcp.connect(a, drain, to=b, address="fd00:9::2", device="eth0", port=5555),
                "lo": tcp.connect(a, drain),
                "back": tcp.connect(b, drain, to=a, address="10.9.0.1", device="eth0"),
                "held": tcp.connect(a, drain, by=holder),
            }
            cases: dict[str, tuple[dict[str, Any], str]] = {
                "iface": ({"iface": "eth0", "netns": a.name}, "veth veth6"),
                "port": ({"port": named["veth6"].dport}, "veth6"),
                "pid": ({"pid": holder.pid}, "held"),
                "cgroup": ({"cgroup": str(cgroup)}, "held"),
                "netns": ({"netns": b.name}, "back"),
            }
            wrong = []
            with ExitStack() as stack:
                tracers = {}
                for name, (arguments, _names) in cases.items():
                    say(f"attaching with {arguments}")
                    tracers[name] = stack.enter_context(Tracer(idle_only=True, **arguments))
                for connection in named.values():
                    connection.sends.clear()
                for _ in range(2):
                    for connection in named.values():
                        connection.grow()
                    for connection in named.values():
                        connection.idle(tcp.IDLE_S)
                    for name, connection in named.items():
                        if name == "held":
                            connection.send(lambda: holder.send(0), holder.who)
                        else:
                            connection.send()
                for name, (_arguments, names) in cases.items():
                    tracer, passing = tracers[name], [named[n] for n in names.split()]
                    fine, said = exact(tracer, passing)
                    keys = {c.key for c in passing}
                    others = [r for c in named.values() if c.key not in keys for r in tracer.of(c)]
                    if not fine or others:
                        wrong.append(f"{name}: {said}, {len(others)} of others")
            yield "filters", not wrong, f"{len(cases) - len(wrong)} of {len(cases)}" + "".join(f"; {w}" for w in wrong)
            for connection in named.values():
                connection.close()
        finally:
            holder.close()
            tcp.until(lambda: _removed(cgroup), 20, "the cgroup to be empty")


def _removed(folder: Path) -> bool:
    with suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def _direct(disk: Disk) -> None:
    disk.read(*range(0, 600, 3))
    disk.write(*range(1, 600, 3))


def _buffered(disk: Disk) -> None:
    with disk.path.open("r+b", buffering=0) as file:
        for block in range(0, 400, 2):
            file.seek(block << 12)
            file.write(bytes(4096))
        os.fsync(file.fileno())
    disk.forget()
    with disk.path.open("rb") as file:
        file.read(1 << 20)


def _ext4(disk: Disk) -> None:
    with file_system(disk, Path(f"/tmp/ext4-{os.getpid()}")) as folder:
        for number in range(20):
            with (folder / f"file{number}").open("wb") as file:
                file.write(bytes(50_000))
                os.fsync(file.fileno())
        shutil.rmtree(folder / "lost+found")
    Path(f"/tmp/ext4-{os.getpid()}").rmdir()


def _discard(disk: Disk) -> None:
    for start in range(0, 32 << 20, 4 << 20):
        disk.discard(start, 1 << 20)


def _flush(disk: Disk) -> None:
    for block in range(10):
        disk.write(block)
        with disk.opened() as fd:
            os.fsync(fd)


LOADS: Final = {"direct": _direct, "buffered": _buffered, "ext4": _ext4, "discard": _discard, "flush": _flush}


@check
def block() -> Found:
    """Compare block I/O with the kernel's own counters of each disk, for several loads."""
    recorded, counted, wrong = 0, 0, []
    with ExitStack() as stack:
        disks = {name: stack.enter_context(loop()) for name in LOADS}
        stats: dict[str, Stat] = {}
        with Traced() as traced:
            for name, load in LOADS.items():
                say(f"load {name}")
                before = disks[name].stat()
                load(disks[name])
                os.sync()
                stats[name] = disks[name].settled() - before
        for name, disk in disks.items():
            found, truth = stat_of(traced.records(disk)), stats[name]
            recorded += found.reads + found.writes + found.discards
            counted += truth.reads + truth.writes + truth.discards
            if found != truth:
                wrong.append(f"{name}: {found} and not {truth}")
    lost = f"; {traced.lost} lost, {traced.unfinished} unfinished" if traced.lost or traced.unfinished else ""
    yield "block I/O", not wrong and not lost, f"{recorded} of {counted}{lost}" + "".join(f"; {w}" for w in wrong)


@check
def owners() -> Found:
    """Compare whose block I/O it is with who wrote, where kernel threads submit it."""
    told = "v2 has io and memory" if owner.told() else "v2 lacks io or memory"
    with owner.writes() as writes:
        for name, filters in (("owners", Filters()), ("owners by --cgroup", Filters(cgroup=writes.cgroup))):
            with Traced(filters) as traced:
                writes.make()
            records = traced.records(*writes.disks.values())
            wrong = writes.wrong(records)
            others = sum(len(batch) for batch in traced.seen) - len(records) if filters.cgroup else 0
            said = f"{len(records)} requests, {told}, {others} of others"
            yield name, not wrong and not others, said + "".join(f"; {w}" for w in wrong)


@contextmanager
def outward() -> Iterator[tuple[tcp.TcpConnection, Disk]]:
    """Yield a connection of the machine's own namespace over an interface called eth0, and a disk."""
    with world("peer") as (space, drain), loop() as disk:
        # Programs are compiled with the index, so that another one would be compiled each time.
        tcp.run("ip", "link", "add", "eth0", "index", "77", "type", "veth", "peer", "name", "eth0", "netns", space.name)
        tcp.run("ip", "addr", "add", "10.8.0.1/24", "dev", "eth0")
        tcp.run("ip", "link", "set", "eth0", "up")
        space.ip("addr", "add", "10.8.0.2/24", "dev", "eth0")
        space.ip("link", "set", "eth0", "up")
        connection = tcp.connect(tcp.Here(), drain, to=space, address="10.8.0.2", device="eth0")
        try:
            yield connection, disk
        finally:
            connection.close()


def compared(capture: Path, connection: tcp.TcpConnection, status: str) -> str:
    """Load a capture and compare it with what is known; return that in words, or fail."""
    trace = cwndtrace.load(capture)
    assert trace.status == status, f"status {trace.status}, not {status}"
    rows = trace.resets[(trace.resets["sport"] == connection.sport) & (trace.resets["reason"] == "idle")]
    stamps = [
        (b, a)
        for t, b, a in zip(rows["ts_ns"], rows["cwnd_before"], rows["cwnd_after"], strict=True)
        if outside(connection, t)
    ]
    truth = [(s.before.cwnd, s.after.cwnd) for _, s in known([connection])]
    assert stamps == truth, f"{stamps} and not {truth}"
    return f"{len(stamps)} of {len(truth)} resets"


def traced(connection: tcp.TcpConnection, capture: Path, *arguments: str, before: tuple[str, ...] = ()) -> str:
    """Trace some resets with the command, end it with SIGINT, and compare the capture; return that in words."""
    run = RunCommand(*arguments, "-o", str(capture), before=before)
    try:
        connection.sends.clear()
        connection.blind.clear()
        for _ in range(_ROUNDS):
            idle_and_send([connection])
        connection.quiet()
        ended = run.end()
    finally:
        run.kill()
    return f"{compared(capture, connection, 'complete')}; {ended}"


@check
def capture() -> Found:
    """Run README's first command as a user with sudo; read the capture back and report on it."""
    with outward() as (connection, disk):
        folder = Path(f"/home/{USER}")
        path = folder / "a.cwnd"
        before = ("sudo", "-u", USER, "sudo")
        run = RunCommand("--iface", "eth0", "-o", str(path), before=before)
        try:
            connection.sends.clear()
            connection.blind.clear()
            for _ in range(_ROUNDS):
                idle_and_send([connection])
            disk.read(*range(200))
            connection.quiet()
            ended = run.end()
        finally:
            run.kill()
        said = compared(path, connection, "complete")
        rows = cwndtrace.load(path).block_io
        reads = rows[(rows["dev"] == disk.dev) & (rows["op"] == "read")]
        assert len(reads) == 200, f"{len(reads)} of 200 reads in the capture"
        report = call("sudo", "-u", USER, "cwndtrace", "report", str(path))
        assert report.returncode == 0, last_line(report.stderr)
        assert len(report.stdout) > 200, "the report is short"
        yield "capture", True, f"{said}, 200 of 200 reads; {ended}"


@check
def killed() -> Found:
    """Kill a trace with SIGKILL once its rows are on the disk; the capture has them, and no process is left."""
    with outward() as (connection, _disk):
        path = Path("/tmp/killed.cwnd")
        run = RunCommand("--iface", "eth0", "--no-block", "-o", str(path))
        pid = run.pid
        tree = [pid, *children(pid)]
        try:
            connection.sends.clear()
            connection.blind.clear()
            for _ in range(_ROUNDS):
                idle_and_send([connection])
            wanted = len(known([connection]))
            tcp.until(lambda: len(cwndtrace.load(path).resets) >= wanted, 120, "the rows on the disk")
            os.kill(pid, signal.SIGKILL)
            run.process.wait()
            tcp.until(lambda: not any(Path(f"/proc/{p}/exe").exists() for p in tree), 60, "its processes to end")
        finally:
            run.kill()
        yield "kill -9", True, compared(path, connection, "interrupted")


@check
def no_btf() -> Found:
    """Hide BTF; the command must say so in two lines."""
    script = "mount -t tmpfs none /sys/kernel/btf && exec cwndtrace run -d 1s -o /tmp/never.cwnd"
    done = call("unshare", "--mount", "sh", "-c", script)
    lines = done.stderr.splitlines()
    fine = done.returncode == 77 and 1 <= len(lines) <= 2 and "no BTF" in lines[0]
    yield "no BTF", fine, f"exit code {done.returncode}: {' '.join(' '.join(lines).split())}"


@check
def demo() -> Found:
    """Run make demo as a user with sudo, as README has it."""
    # A root of another architecture was made without apt.
    packages = () if shutil.which("apt-get") else ("PACKAGES=no",)
    done = call("sudo", "-u", USER, "-H", "make", "-C", str(_CLONE), "demo", *packages, seconds=3000)
    pictures = [path for pattern in ("demo-*.png", "demo-*.cwnd") for path in _CLONE.glob(pattern)]
    said = last_line(done.stdout) if done.returncode == 0 else last_line(done.stderr)
    yield "demo", done.returncode == 0 and len(pictures) == 2, said


@check
def reproduce() -> Found:
    """Run cwndtrace reproduce, one round."""
    # A starved guest adds milliseconds of its own, and the command refuses a path that is shorter than those.
    command = ("sudo", "-u", USER, "sudo", "cwndtrace", "reproduce", "--rounds", "1", "--rtt", "200ms")
    done = call(*command, seconds=3000, cwd="/tmp")
    yield "reproduce", done.returncode == 0, last_line(done.stdout if done.returncode == 0 else done.stderr)


@check
def live_tests() -> Found:
    """Run the live tests, where nothing else runs them on this architecture."""
    if live.WHEELS.exists():
        yield "live tests", *live.run(_CLONE)


@check
def cgroup_mounts() -> Found:
    """Trace by --cgroup with cgroup v1 alone and with both; a refusal has a cause and a remedy."""
    top = Path("/sys/fs/cgroup")
    tcp.run("umount", str(top))
    tcp.run("mount", "-t", "tmpfs", "tmpfs", str(top))
    try:
        v1 = top / "cpu"
        v1.mkdir()
        tcp.run("mount", "-t", "cgroup", "-o", "cpu", "cgroup", str(v1))
        (v1 / "made").mkdir()
        done = call("cwndtrace", "run", "--no-block", "-d", "1s", "-c", "made", "-o", "/tmp/v1.cwnd")
        lines = done.stderr.splitlines()
        fine = done.returncode != 0 and 1 <= len(lines) <= 2 and "cgroup" in lines[0]
        yield "cgroup v1", fine, f"exit code {done.returncode}: {' '.join(' '.join(lines[-2:]).split())}"
        unified = top / "unified"
        unified.mkdir()
        tcp.run("mount", "-t", "cgroup2", "cgroup2", str(unified))
        (unified / "made").mkdir()
        with world("hybrid") as (space, drain):
            holder = tcp.Holder(space, unified / "made")
            try:
                connection = tcp.connect(space, drain, by=holder)
                with Tracer(idle_only=True, cgroup="made") as tracer:
                    for _ in range(2):
                        connection.grow()
                        connection.idle(tcp.IDLE_S)
                        connection.send(lambda: holder.send(0), holder.who)
                    yield "cgroup hybrid", *exact(tracer, [connection])
                connection.close()
            finally:
                holder.close()
    finally:
        tcp.run("umount", "-R", str(top))
        tcp.run("mount", "-t", "cgroup2", "cgroup2", str(top))


@check
def unprivileged() -> Found:
    """Trace with each value of kernel.unprivileged_bpf_disabled. This is the last check: 1 can't be changed back."""
    with outward() as (connection, _disk):
        for value in (0, 2, 1):
            name = f"unprivileged_bpf_disabled={value}"
            try:
                _UNPRIVILEGED.write_text(str(value))
                path = Path(f"/home/{USER}/bpf{value}.cwnd")
                before = ("sudo", "-u", USER, "sudo")
                yield name, True, traced(connection, path, "--iface", "eth0", "--no-block", before=before)
            except Exception as e:
                traceback.print_exc()
                yield name, False, f"{type(e).__name__}: {e}"


def report(result: Result) -> None:
    """Print a result on stdout, and on the console."""
    print(json.dumps(asdict(result)), flush=True)
    say(f"{'ok' if result.ok else 'FAILED'} {result.check}: {result.said}")


def main(names: list[str]) -> int:
    """Run checks, by default all, and print a line for each result; the last line says that all have run."""
    if unknown := set(names) - set(CHECKS):
        sys.exit(f"there is no check {unknown.pop()}")
    for name, function in CHECKS.items():
        if names and name not in names:
            continue
        begin = time.monotonic()
        try:
            for found, ok, said in function():
                now = time.monotonic()
                report(Result(found, ok, said, round(now - begin, 1)))
                begin = now
        except BaseException as e:
            traceback.print_exc()
            report(Result(name, False, f"{type(e).__name__}: {e}", round(time.monotonic() - begin, 1)))
    print(json.dumps({"check": "end", "ok": True, "said": "", "seconds": round(time.monotonic(), 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
