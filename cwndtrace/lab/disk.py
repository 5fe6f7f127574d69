# SPDX-License-Identifier: Apache-2.0
"""A slow block device, from which a server reads while its connection is idle.

There are two ways to make one, tried in this order:

- null_blk, with the time of each request set through configfs;
- a loop device over another loop device, where a cgroup limits the server's requests per second on the lower one. The
  upper device's requests then take long from start to end. A limit on the upper device would delay requests before
  they start, where a tracer doesn't see the delay.

Everything here either goes with an open descriptor or has its owner's name, so ``cleanup.sweep`` finds what a killed
process leaves.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cwndtrace.errors import KernelLacks
from cwndtrace.lab.owner import Owner

BLOCK: Final = 4096
READS_PER_S: Final = 20
SIZE: Final = 64 << 20
CONFIGFS: Final = Path("/sys/kernel/config/nullb")
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CLR_FD: Final = 0x4C01
# LO_FLAGS_AUTOCLEAR frees a device when its last descriptor is closed. LO_FLAGS_DIRECT_IO keeps the page cache out from
# between the two devices.
_AUTOCLEAR: Final = 4
_DIRECT_IO: Final = 16
_BY_TIMER: Final = 2


@dataclass(frozen=True)
class SlowDevice:
    """A device to read from, and how it is made slow.

    Call ``admit(pid)`` for each process that reads from it: a device may be slow for admitted processes only.
    """

    path: str
    how: str
    admit: Callable[[int], None]


@contextmanager
def slow_device(owner: Owner) -> Iterator[SlowDevice]:
    """Yield a slow device and remove it on exit. Raises KernelLacks, with what was tried, if none can be made."""
    tried = []
    for make in (_null_blk, _throttled_loop):
        with ExitStack() as stack:
            try:
                device = stack.enter_context(make(owner))
            except (OSError, KernelLacks) as e:
                tried.append(f"{make.__name__.strip('_')}: {e.cause if isinstance(e, KernelLacks) else e}")
                continue
            yield device
            return
    raise KernelLacks(
        f"no slow device can be made here ({'; '.join(tried)})",
        "modprobe null_blk nr_devices=0, or a kernel with CONFIG_BLK_DEV_THROTTLING and the io controller of cgroups",
    )


def read_for(device: str) -> Callable[[float], dict[str, Any]]:
    """Return a function that reads single blocks of ``device`` past the page cache for a number of seconds.

    That function returns the number of ``reads`` and ``bytes``, and the ``longest_ms`` that one read took.
    """

    def idle(idle_s: float) -> dict[str, Any]:
        end = time.monotonic() + idle_s
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        # O_DIRECT needs a page-aligned buffer; an anonymous mapping is one.
        buffer = mmap.mmap(-1, BLOCK)
        reads, longest = 0, 0.0
        try:
            while (begin := time.monotonic()) < end:
                os.preadv(fd, [buffer], reads * BLOCK % SIZE)
                reads += 1
                longest = max(longest, time.monotonic() - begin)
        finally:
            buffer.close()
            os.close(fd)
        return {"reads": reads, "bytes": reads * BLOCK, "longest_ms": longest * 1e3}

    return idle


# ---- null_blk --------------------------------------------------------------------------------------


@contextmanager
def _null_blk(owner: Owner) -> Iterator[SlowDevice]:
    if not CONFIGFS.is_dir():
        raise KernelLacks("this kernel has no null_blk, or configfs isn't mounted")
    folder = CONFIGFS / owner.name("disk")
    folder.mkdir()
    try:
        settings = {
            "size": SIZE >> 20, "blocksize": BLOCK, "irqmode": _BY_TIMER, "completion_nsec": 10**9 // READS_PER_S,
        }  # fmt: skip
        for name, value in settings.items():
            (folder / name).write_text(str(value), encoding="ascii")
        (folder / "power").write_text("1", encoding="ascii")
        node = Path("/dev", folder.name)
        if not node.exists():
            node = Path(f"/dev/nullb{(folder / 'index').read_text(encoding='ascii').strip()}")
        if not node.exists():
            raise KernelLacks(f"null_blk made {node}, but there is no such file")
        yield SlowDevice(str(node), f"null_blk, {1000 // READS_PER_S} ms a request", _all)
    finally:
        remove_null_blk(folder)


def _all(pid: int) -> None:
    """Do nothing: a null_blk device is slow for every process."""


def remove_null_blk(folder: Path) -> None:
    """Remove a null_blk device. Errors are ignored, so the device may be gone already."""
    with suppress(OSError):
        (folder / "power").write_text("0", encoding="ascii")
    with suppress(OSError):
        folder.rmdir()


# ---- loop on loop ----------------------------------------------------------------------------------


@contextmanager
def _throttled_loop(owner: Owner) -> Iterator[SlowDevice]:
    with ExitStack() as stack:
        memory = os.memfd_create(owner.name("disk"))
        stack.callback(os.close, memory)
        os.ftruncate(memory, SIZE)
        lower = loop(stack, memory)
        upper = loop(stack, lower, _DIRECT_IO)
        group = stack.enter_context(_group(owner, os.fstat(lower).st_rdev))

        def admit(pid: int) -> None:
            (group / "cgroup.procs").write_text(str(pid), encoding="ascii")

        path = str(Path(f"/proc/self/fd/{upper}").readlink())
        yield SlowDevice(path, f"a loop device on one throttled to {READS_PER_S} requests a second", admit)


def loop(stack: ExitStack, backing: int, flags: int = 0) -> int:
    """Return a descriptor of a new loop device over ``backing``; closing ``stack`` removes it. Raises OSError."""
    with Path("/dev/loop-control").open("rb") as control:
        # Another process may take the free device first.
        for attempt in range(10):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            fd = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            # struct loop_config: fd, block_size, loop_info64 with lo_flags at 52, reserved.
            config = struct.pack("=II52xI176x64x", backing, 0, flags | _AUTOCLEAR)
            try:
                fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
            except OSError:
                os.close(fd)
                if attempt == 9:
                    raise
                continue
            stack.callback(os.close, fd)
            return fd
    raise AssertionError


@contextmanager
def _group(owner: Owner, device: int) -> Iterator[Path]:
    """Yield a cgroup whose members are limited to READS_PER_S reads a second of a device."""
    name, number = owner.name(), f"{os.major(device)}:{os.minor(device)}"
    first = groups()
    folder = first / name
    folder.mkdir()
    try:
        if (folder / "blkio.throttle.read_iops_device").exists():
            limit, text = folder / "blkio.throttle.read_iops_device", f"{number} {READS_PER_S}"
        else:
            limit, text = folder / "io.max", f"{number} riops={READS_PER_S}"
        if not limit.exists():
            raise KernelLacks(
                "cgroups here don't limit I/O",
                f"enable it on this host: echo +io > {first}/cgroup.subtree_control",
            )
        limit.write_text(text, encoding="ascii")
        yield folder
    finally:
        remove_group(folder)


def groups() -> Path:
    """Return the folder of the cgroup hierarchy that can limit I/O: blkio of version 1, or version 2."""
    second = None
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup" and "blkio" in options.split(","):
            return Path(folder)
        if kind == "cgroup2":
            second = Path(folder)
    if second is None or "io" not in (second / "cgroup.controllers").read_text(encoding="ascii").split():
        raise KernelLacks("no cgroup hierarchy here can limit I/O")
    return second


def remove_group(folder: Path) -> None:
    """Remove a cgroup when its last process has left, which may take up to a second. Raises OSError after that."""
    deadline = time.monotonic() + 1
    while folder.exists():
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
