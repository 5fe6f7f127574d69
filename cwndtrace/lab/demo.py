# SPDX-License-Identifier: Apache-2.0
"""Trace a connection on this machine that is idle while a process reads a loop device, and plot the capture.

``python -I -m cwndtrace.lab.demo [--out FOLDER]`` needs root. It uses only loopback, and removes what it set up.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from cwndtrace import isolated, privileges
from cwndtrace.capture.target import need_root
from cwndtrace.encoding import print_all
from cwndtrace.errors import CwndtraceError
from cwndtrace.lab.disk import loop

_BURST: Final = 3_000_000
_IDLE_S: Final = (0.25, 0.6, 1.2, 0.1, 0.4, 0.9, 0.25, 0.6)
_DISK_BYTES: Final = 64 << 20
_BLOCK: Final = 4096


@contextmanager
def loop_device(size: int) -> Iterator[str]:
    """Yield the path of a loop device over ``size`` bytes of memory. Raises CwndtraceError if none can be made.

    It uses memory because a temporary file would lie in TMPDIR, which may be another user's folder.
    """
    with ExitStack() as stack:
        memory = os.memfd_create("cwndtrace-demo")
        stack.callback(os.close, memory)
        os.ftruncate(memory, size)
        try:
            device = loop(stack, memory)
        except OSError as e:
            raise CwndtraceError(f"no loop device: {e.strerror}", "load the module: modprobe loop") from e
        yield str(Path(f"/proc/self/fd/{device}").readlink())


def read_at_random(device: str, stop: threading.Event) -> None:
    """Read single blocks directly from ``device``, a hundred a second, until ``stop`` is set."""
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    # O_DIRECT needs a page-aligned buffer; an anonymous mapping is one.
    buffer = mmap.mmap(-1, _BLOCK)
    try:
        while not stop.wait(0.01):
            os.preadv(fd, [buffer], random.randrange(_DISK_BYTES // _BLOCK) * _BLOCK)
    finally:
        os.close(fd)
        buffer.close()


@contextmanager
def connection(control: bytes = b"cubic") -> Iterator[socket.socket]:
    """Yield the sending end of a loopback connection with a congestion control; a thread reads the other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sender:
        # The host's default may be BBR, which is exempt from idle resets.
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control)
        sender.connect(listener.getsockname())
        receiver, _ = listener.accept()
        reader = threading.Thread(target=_discard, args=(receiver,), daemon=True)
        reader.start()
        try:
            yield sender
        finally:
            sender.close()
            reader.join()


def _discard(receiver: socket.socket) -> None:
    with receiver:
        while receiver.recv(1 << 20):
            pass


def demo(folder: Path) -> tuple[Path, Path]:
    """Run the demo and return the paths of the capture and the picture in ``folder``.

    Raises CwndtraceError if a step fails.
    """
    need_root("the demo")
    try:
        # The folder is made as the user that called sudo, so it belongs to them and lies where they may write.
        with privileges.acting_as(privileges.invoking_user()):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CwndtraceError(f"{folder} can't be made: {e.strerror}.", "choose another folder with --out") from e
    capture = folder / time.strftime("demo-%Y%m%d-%H%M%S.cwnd")
    picture = capture.with_suffix(".png")
    command, environment = isolated.python("-m", "cwndtrace"), isolated.environment()
    stop = threading.Event()
    with loop_device(_DISK_BYTES) as device, connection() as sender:
        disk = threading.Thread(target=read_at_random, args=(device, stop))
        disk.start()
        run = [*command, "run", "--iface", "lo", "--output", str(capture)]
        tracer = subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
        try:
            _wait_until_attached(tracer)
            for idle in _IDLE_S:
                sender.sendall(bytes(_BURST))
                time.sleep(idle)
            sender.sendall(b"the last burst ends the last idle time")
        finally:
            tracer.terminate()
            rest_of_stderr = tracer.communicate()[1]
            sys.stderr.write(rest_of_stderr)
            stop.set()
            disk.join()
    if tracer.returncode != 0:
        raise CwndtraceError(f"cwndtrace run ended with exit code {tracer.returncode}", "see what it printed above")
    plot = [*command, "plot", str(capture), "--output", str(picture)]
    # This process drops its privileges before it does anything else.
    if code := subprocess.run(plot, env=environment, check=False, stdout=subprocess.DEVNULL).returncode:
        raise CwndtraceError(f"cwndtrace plot ended with exit code {code}", "see what it printed above")
    return capture, picture


def _wait_until_attached(tracer: subprocess.Popen[str]) -> None:
    assert tracer.stderr is not None
    for line in tracer.stderr:
        sys.stderr.write(line)
        if line.startswith("Tracing "):
            return


def main() -> None:
    """Parse the command line and run the demo."""
    isolated.begin()
    print_all()
    parser = argparse.ArgumentParser(prog="cwndtrace demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the capture and the picture")
    try:
        capture, picture = demo(parser.parse_args().out)
    except CwndtraceError as e:
        sys.exit(f"cwndtrace: {e.cause}\n  {e.remedy}" if e.remedy else f"cwndtrace: {e.cause}")
    print(f"\nThe capture is in {capture}")
    print(f"The picture is in {picture}")


if __name__ == "__main__":
    main()
