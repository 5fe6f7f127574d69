# SPDX-License-Identifier: Apache-2.0
"""A really slow block device, so that a server that is idle by reading from it is idle for block I/O.

Two ways, tried in this order:

- null_blk, told through configfs how long each request takes;
- a loop device on top of another one, where the kernel lets only so many requests a second of the server's cgroup
  through to the lower one. The upper one's requests then take long from start to end. Throttled itself, it would hold
  requests back before they start, where no tracer sees them.

All of it rests on open descriptors or carries its owner's name, so that nothing survives a kill for good.
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
# LO_FLAGS_*: gone with the last descriptor, and no page cache between the two devices.
_AUTOCLEAR: Final = 4
_DIRECT_IO: Final = 16
_BY_TIMER: Final = 2


@dataclass(frozen=True)
class SlowDevice:
    """A device to read from, what makes it slow, and ``admit(pid)``, which a process needs before it is slow for it."""

    path: str
    how: str
    admit: Callable[[int], None]


@contextmanager
def slow_device(owner: Owner) -> Iterator[SlowDevice]:
    """A slow device, gone again at the end. Raises KernelLacks, saying what was tried, where no way works."""
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
    """Idle for so many seconds by reading single blocks of ``device``, past the page cache."""

    def idle(idle_s: float) -> dict[str, Any]:
        end = time.monotonic() + idle_s
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        # O_DIRECT wants a page-aligned buffer, which an anonymous map is.
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
    """The device is slow for every process."""


def remove_null_blk(folder: Path) -> None:
    """Take a null_blk device away; fine if it is gone already."""
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
    """A descriptor of a new loop device over ``backing``, which is gone with ``stack``. Raises OSError."""
    with Path("/dev/loop-control").open("rb") as control:
        # Another process may take the free one first.
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
    """A cgroup whose members get few requests a second through to a device."""
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
                "cgroups here don't limit I/O", f"echo +io > {first}/cgroup.subtree_control (a setting of the host)"
            )
        limit.write_text(text, encoding="ascii")
        yield folder
    finally:
        remove_group(folder)


def groups() -> Path:
    """The folder of the cgroup hierarchy that can limit I/O: blkio of version 1, or version 2."""
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
    """Remove a cgroup once its last process is gone, waiting a second at most."""
    deadline = time.monotonic() + 1
    while folder.exists():
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
