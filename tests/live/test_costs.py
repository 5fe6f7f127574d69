# SPDX-License-Identifier: Apache-2.0
"""Tests of the measured cost of resets against the receiver's clock, with the sysctl on and off.

Each shape of traffic has connections of its own on one path, and all run at once, traced by every probe that there is.
What a burst really cost is how much later it arrives than the bursts of the same shape with the sysctl at 0.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

import pandas as pd
import pytest

from cwndtrace.analysis import cost, recovery, verdict
from cwndtrace.kernel import ladder
from cwndtrace.lab import path as paths
from cwndtrace.lab.link import Link
from cwndtrace.lab.namespaces import write_sysctl
from cwndtrace.records.arrow import schema
from cwndtrace.tcp import IDLE_SYSCTL
from tests.harness import tcp
from tests.harness.lab import PathEnd
from tests.harness.tracing import EMULATED, Tracer, left_out

pytestmark = pytest.mark.live

RTT_MS: Final = 100
PATIENCE_S: Final = 120
IDLE_S: Final = 2.0
"""Several RTOs of such a path (300 ms), after which a window of some hundred segments is back at ten."""
PIECE: Final = 16_000


@dataclass
class TimedBurst:
    """What one burst took at the receiver, in ms, and when it began and ended, in ns of CLOCK_MONOTONIC."""

    took_ms: float
    begin_ns: int
    end_ns: int


class TimedStream:
    """A connection whose far end notes when each byte arrives."""

    def __init__(self, near: PathEnd, far: PathEnd, sndbuf: int = 0) -> None:
        listener = far.enter(lambda: socket.create_server((far.address, 0)))
        self.sock = near.enter(lambda: self._connect(listener.getsockname(), sndbuf))
        self.sport = int(self.sock.getsockname()[1])
        self._peer, _ = listener.accept()
        listener.close()
        self._got = 0
        self._arrived: list[tuple[int, int]] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @staticmethod
    def _connect(address: tuple[str, int], sndbuf: int) -> socket.socket:
        sock = socket.socket()
        # The machine's default may be one that never resets its window.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sndbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
        sock.connect(address)
        return sock

    def _read(self) -> None:
        while data := self._peer.recv(1 << 20):
            with self._more:
                self._got += len(data)
                self._arrived.append((time.monotonic_ns(), self._got))
                self._more.notify_all()

    def _wait(self, total: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: self._got >= total, PATIENCE_S), (self._got, total)

    def _at(self, number: int) -> int:
        """Return when the byte with this number arrived."""
        with self._more:
            return next(at for at, got in self._arrived if got >= number)

    def idle(self, seconds: float = IDLE_S) -> None:
        """Wait until nothing was sent for this time, by the kernel."""
        tcp.until(lambda: tcp.info(self.sock).last_snd_us >= seconds * 1e6, PATIENCE_S, "idle time")

    def send(self, size: int, *, whole: bool = False) -> TimedBurst:
        """Send a burst, and return what it took from its first byte's arrival, or ``whole`` from the send."""
        base, begin = self._got, time.monotonic_ns()
        for at in range(0, size, PIECE):
            self.sock.sendall(bytes(min(PIECE, size - at)))
        self._wait(base + size)
        end = self._at(base + size)
        return TimedBurst((end - (begin if whole else self._at(base + 1))) / 1e6, begin, end)

    def messages(self, number: int, size: int, every_s: float) -> TimedBurst:
        """Send messages at fixed times, and return for how long the latest was under way."""
        base, begin, sent = self._got, time.monotonic_ns(), []
        for n in range(number):
            # The pause is the shape of the traffic.
            time.sleep(max(0.0, begin / 1e9 + n * every_s - time.monotonic()))
            sent.append(time.monotonic_ns())
            self.sock.sendall(bytes(size))
        self._wait(base + number * size)
        took = [self._at(base + (n + 1) * size) - at for n, at in enumerate(sent)]
        return TimedBurst(max(took) / 1e6, begin, self._at(base + number * size))

    def ask(self) -> None:
        """Send a request from the far end, and read it."""
        self._peer.sendall(b"ask")
        assert self.sock.recv(3, socket.MSG_WAITALL) == b"ask"

    def close(self) -> None:
        """Close both ends."""
        self.sock.close()
        self._reader.join(PATIENCE_S)
        self._peer.close()


def grow(stream: TimedStream, size: int = 300_000) -> None:
    for _ in range(4):
        stream.send(size)


def heartbeats(stream: TimedStream) -> Iterator[TimedBurst]:
    """100 kB after ten messages of 20 bytes, each of which comes after more than an RTO."""
    grow(stream, 200_000)
    for _ in range(2):
        begin = time.monotonic_ns()
        for _ in range(10):
            stream.idle(0.45)
            stream.send(20)
        burst = stream.send(100_000)
        yield TimedBurst(burst.took_ms, begin, burst.end_ns)


def large(stream: TimedStream) -> Iterator[TimedBurst]:
    """No burst is near the size of the window before, in which it fits or doesn't by chance."""
    grow(stream, 500_000)
    for _ in range(3):
        stream.idle()
        yield stream.send(400_000)


def young(stream: TimedStream) -> Iterator[TimedBurst]:
    """The connection never grew: the peer's window and the send buffer are still small."""
    stream.send(100_000)
    for _ in range(2):
        stream.idle(1.5)
        yield stream.send(285_000)


def in_turn(stream: TimedStream) -> Iterator[TimedBurst]:
    """Ten answers of 30 kB, each to a request that the far end sends when it has the answer before."""
    grow(stream)
    for _ in range(3):
        stream.idle()
        answers = []
        for _ in range(10):
            stream.ask()
            answers.append(stream.send(30_000, whole=True))
        yield TimedBurst(sum(a.took_ms for a in answers), answers[0].begin_ns, answers[-1].end_ns)


def eight_segments(stream: TimedStream) -> Iterator[TimedBurst]:
    grow(stream)
    stream.idle(3.5)
    for _ in range(3):
        stream.idle(1.0)
        yield stream.send(8 * 1400, whole=True)


def small(stream: TimedStream) -> Iterator[TimedBurst]:
    grow(stream)
    for _ in range(3):
        stream.idle()
        yield stream.send(10_000, whole=True)


def pieces(stream: TimedStream) -> Iterator[TimedBurst]:
    """16 kB each 40 ms."""
    grow(stream)
    for _ in range(3):
        stream.idle()
        yield stream.messages(20, 16_000, 0.04)


def small_buffer(stream: TimedStream) -> Iterator[TimedBurst]:
    grow(stream)
    for _ in range(3):
        stream.idle()
        yield stream.send(200_000)


@dataclass(frozen=True)
class Shape:
    """A shape of traffic: a function that yields its bursts, with the number of its connections."""

    run: Callable[[TimedStream], Iterator[TimedBurst]]
    connections: int = 1
    sndbuf: int = 0


SHAPES: Final = {
    "heartbeats": Shape(heartbeats),
    "400 kB": Shape(large),
    "young": Shape(young, connections=4),
    "in turn": Shape(in_turn),
    "8 segments": Shape(eight_segments),
    "10 kB": Shape(small),
    "16 kB each 40 ms": Shape(pieces),
    "small send buffer": Shape(small_buffer, sndbuf=150_000),
}
COSTLY: Final = ("heartbeats", "400 kB", "young", "in turn", "16 kB each 40 ms", "small send buffer")


@dataclass(frozen=True)
class RealCost:
    """What a burst really cost, in ms: no less and no more than this, as far as the clock can tell."""

    least_ms: float
    most_ms: float

    def error_ms(self, measured_ms: float) -> float:
        """Return how far a measured cost is from what the burst can have cost."""
        return measured_ms - min(max(measured_ms, self.least_ms), self.most_ms)


@dataclass
class ShapeCosts:
    """By shape: what bursts really cost, and what each probe's records say, in ms; and the judged resets by probe."""

    real: dict[str, list[RealCost]] = field(default_factory=dict)
    said: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], list[set[str]]] = field(default_factory=dict)
    held: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """For how long a burst waited after a loss, or a young connection's for the peer's window, in ms."""
    probes: list[str] = field(default_factory=list)


def run_all(near: PathEnd, far: PathEnd) -> dict[tuple[str, int], tuple[int, list[TimedBurst]]]:
    """Run all shapes at once; return port and bursts of each shape's connections."""
    done: dict[tuple[str, int], tuple[int, list[TimedBurst]]] = {}

    def one(name: str, number: int, stream: TimedStream) -> None:
        done[name, number] = stream.sport, list(SHAPES[name].run(stream))

    streams = {
        (name, n): TimedStream(near, far, shape.sndbuf)
        for name, shape in SHAPES.items()
        for n in range(shape.connections)
    }
    threads = [threading.Thread(target=one, args=(*key, stream)) for key, stream in streams.items()]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for stream in streams.values():
            stream.close()
    assert done.keys() == streams.keys(), "a shape failed; its error is above"
    return done


def judged(tracer: Tracer) -> pd.DataFrame:
    """Return the resets of a tracer as the verdicts of a Trace have them."""
    resets = pd.DataFrame(tracer.records)
    resets = resets.assign(connection=resets["sport"].astype(str), ssthresh_before=float("nan"))
    none = pd.DataFrame(columns=schema("connections").names).assign(connection="")
    followed = recovery.with_duration(pd.DataFrame(tracer.recoveries), resets)
    return verdict.resets(cost.predict(resets, none, followed))


@pytest.fixture(scope="module")
def measured() -> ShapeCosts:
    """All shapes with the sysctl on and then off, traced by all probes."""
    out = ShapeCosts(probes=[p.name for p in ladder.PROBES if p.name not in left_out()])
    with ExitStack() as stack:
        path = stack.enter_context(paths.open_path(Link(rtt_ms=RTT_MS), force=None if EMULATED else "relay"))
        for end in (path.server, path.client):
            write_sysctl(end.namespace, "net.ipv4.tcp_no_metrics_save", "1")
        near, far = PathEnd(path.server), PathEnd(path.client)
        write_sysctl(path.client.namespace, IDLE_SYSCTL, "0")
        tracers = {name: stack.enter_context(Tracer(name, idle_only=True)) for name in out.probes}
        write_sysctl(path.server.namespace, IDLE_SYSCTL, "1")
        on = run_all(near, far)
        write_sysctl(path.server.namespace, IDLE_SYSCTL, "0")
        off = run_all(near, far)
        for tracer in tracers.values():
            tracer.settle()
        for name, shape in SHAPES.items():
            usual = [b.took_ms for key, (_, bursts) in off.items() if key[0] == name for b in bursts]
            mine = [(port, burst) for key, (port, bursts) in on.items() if key[0] == name for burst in bursts]
            each = len(usual) // shape.connections
            alike = [[statistics.median(usual)]] * each
            if shape.connections > 1:
                # The peer's window of a young connection grows by chance. With the sysctl at 0, too, it delays the
                # bursts of some connections by a round trip, so what one burst would have taken isn't known exactly.
                alike = [usual[n::each] for n in range(each)]
            out.real[name] = [
                RealCost(burst.took_ms - max(alike[n % each]), burst.took_ms - min(alike[n % each]))
                for n, (_, burst) in enumerate(mine)
            ]
            for probe, tracer in tracers.items():
                rows = judged(tracer)
                during = [
                    rows[(rows["sport"] == port) & rows["ts_ns"].between(burst.begin_ns, burst.end_ns)]
                    for port, burst in mine
                ]
                out.said[name, probe] = [float(each["cost_us"].sum()) / 1000 for each in during]
                out.verdicts[name, probe] = [set(each["verdict"]) for each in during]
                others = ["after_loss_us", *(["rwnd_limited_us"] if shape.connections > 1 else [])]
                held = [float(each[others].sum().sum()) / 1000 for each in during]
                out.held[name, probe] = held
                least, most = (
                    rounded([r.least_ms for r in out.real[name]]),
                    rounded([r.most_ms for r in out.real[name]]),
                )
                real = f"{least}" if least == most else f"{least} to {most}"
                print(f"{name}, {probe}: real {real}, measured {rounded(out.said[name, probe])} ms")
                if any(held):
                    print(f"{name}, {probe}: something else held {rounded(held)} ms, {out.verdicts[name, probe]}")
    return out


def rounded(values: list[float]) -> list[int]:
    return [round(value) for value in values]


def typical(costs: list[RealCost]) -> float:
    """Return the median of the most that bursts can really have cost, in ms."""
    return statistics.median(cost.most_ms for cost in costs)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_measured_cost_is_the_real_one_at_the_median(measured: ShapeCosts, shape: str) -> None:
    for probe in measured.probes:
        pairs = list(zip(measured.real[shape], measured.said[shape, probe], strict=True))
        off = statistics.median(real.error_ms(said) for real, said in pairs)
        # On an emulated machine each round trip that a reset costs takes some 10 to 30 ms of computing more, which the
        # client's clock has in it. The peer's window delays half of the young connections' bursts by a round trip, or
        # more of them there, so that the median lies half a round trip off.
        least = RTT_MS / 2 if EMULATED else 10.0
        if SHAPES[shape].connections > 1:
            least += RTT_MS / 2
        assert abs(off) <= max(least, 0.1 * typical(measured.real[shape])), (probe, pairs)


def test_the_measured_cost_is_within_a_round_trip_for_nearly_all_bursts(measured: ShapeCosts) -> None:
    # Young connections are compared at the median only: the peer's window delays some of their bursts by chance.
    alike = [name for name, shape in SHAPES.items() if shape.connections == 1]
    for probe in measured.probes:
        pairs = [p for s in alike for p in zip(measured.real[s], measured.said[s, probe], strict=True)]
        within = sum(abs(real.error_ms(said)) <= RTT_MS for real, said in pairs)
        assert within >= 0.95 * len(pairs), (probe, pairs)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_reset_that_cost_time_is_called_harmless(measured: ShapeCosts, shape: str) -> None:
    for probe in measured.probes:
        known = (measured.verdicts[shape, probe], measured.held[shape, probe])
        for real, labels, held in zip(measured.real[shape], *known, strict=True):
            # A burst that a loss or the peer's window held back may have been as late without the reset.
            if real.least_ms - held >= RTT_MS / 2:
                assert "harmful" in labels, (probe, real, held, labels)
            elif shape not in COSTLY:
                assert labels <= {"nothing_waited", "as_before", "slight"}, (probe, real, labels)


def test_the_shapes_that_should_cost_something_do(measured: ShapeCosts) -> None:
    for shape in SHAPES:
        assert (typical(measured.real[shape]) >= RTT_MS / 2) == (shape in COSTLY), measured.real[shape]


# ---- a path that loses packets ---------------------------------------------------------------------


def test_what_waits_after_a_loss_is_not_the_resets() -> None:
    """1 MB after idle time, over a path that loses one packet in 500: no burst waited for longer than it took."""
    with ExitStack() as stack:
        path = stack.enter_context(paths.open_path(Link(rtt_ms=80, loss=0.002), force=None if EMULATED else "relay"))
        write_sysctl(path.client.namespace, IDLE_SYSCTL, "0")
        write_sysctl(path.server.namespace, IDLE_SYSCTL, "1")
        stream = TimedStream(PathEnd(path.server), PathEnd(path.client))
        stack.callback(stream.close)
        tracer = stack.enter_context(Tracer(idle_only=True))
        bursts = []
        for _ in range(24):
            bursts.append(stream.send(1_000_000))
            stream.idle(1.5)
        stream.send(20)
        tracer.settle()
        rows = judged(tracer)
        rows = rows[rows["sport"] == stream.sport]
    lossy = 0
    found = [rows[rows["ts_ns"].between(burst.begin_ns, burst.end_ns)].to_dict("records") for burst in bursts[1:]]
    # On a machine that is too slow, a loss makes the RTO longer than the idle time.
    assert sum(map(len, found)) >= len(found) // 2
    for burst, row in ((burst, row) for burst, here in zip(bursts[1:], found, strict=True) for row in here):
        print(f"{burst.took_ms:.0f} ms: {row['outcome']}, {row['cost_us'] / 1000:.0f} ms by the reset, "
              f"{row['after_loss_us'] / 1000:.0f} ms after a loss")  # fmt: skip
        # From the first byte's arrival on; each time is measured from one ACK to the next.
        assert (row["first_cost_us"] + row["after_loss_us"]) / 1000 <= burst.took_ms + 80
        if row["outcome"] == "loss":
            lossy += 1
            assert row["verdict"] == "harmful" or row["cost_us"] < verdict.FLOOR_US
    assert lossy, "no burst met a loss, so this measures nothing"
