# SPDX-License-Identifier: Apache-2.0
"""Reads facts about the running kernel: timer frequency, lockdown, tracefs, and those that the ladder depends on."""

from __future__ import annotations

import gzip
import platform
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from cwndtrace.errors import KernelLacks
from cwndtrace.kernel import host, ladder
from cwndtrace.kernel.btf import Btf

TRACEFS: Final = Path("/sys/kernel/tracing")
KPROBES: Final = Path("/sys/bus/event_source/devices/kprobe/type")
"""A file with the number that perf_event_open(2) takes as the type of a kprobe."""
_HZ_CHOICES: Final = (100, 250, 300, 1000)


def hz(root: Path | None = None) -> int:
    """Return the timer ticks per second (CONFIG_HZ), from the kernel's configuration or else measured.

    The measurement takes 0.3 s. ``root`` is the host's by default: a container has no configuration, and its
    /proc/timer_list is masked. Raises KernelLacks where neither works.
    """
    root = root or host.root()
    match = re.search(r"^CONFIG_HZ=(\d+)$", _configuration(root), re.MULTILINE)
    return int(match[1]) if match else _measured_hz(root / "proc/timer_list")


def _configuration(root: Path) -> str:
    """Return the running kernel's configuration; an empty text where it is in no usual place."""
    with suppress(OSError):
        return gzip.decompress((root / "proc/config.gz").read_bytes()).decode()
    release = platform.release()
    # Debian's kernels from 7.x on have it beside their modules, as Fedora's have.
    for file in (f"boot/config-{release}", f"usr/lib/modules/{release}/config", f"lib/modules/{release}/config"):
        with suppress(OSError):
            return (root / file).read_text(encoding="utf-8")
    return ""


def _measured_hz(timer_list: Path) -> int:
    def jiffies() -> tuple[int, int]:
        match = re.search(r"^jiffies: (\d+)$", timer_list.read_text(), re.MULTILINE)
        if match is None:
            raise OSError(0, "no jiffies in it")
        return int(match[1]), time.monotonic_ns()

    try:
        (j0, t0), (j1, t1) = jiffies(), jiffies()
        while t1 - t0 < 300_000_000:
            time.sleep(0.05)
            j1, t1 = jiffies()
    except OSError as e:
        raise KernelLacks(
            f"can't tell the kernel's HZ: no config in /proc, /boot or /lib/modules, and {timer_list}: {e.strerror}",
            f"install the kernel's config file as /boot/config-{platform.release()}",
        ) from e
    rate = (j1 - j0) * 1e9 / (t1 - t0)
    return min(_HZ_CHOICES, key=lambda choice: abs(choice - rate))


def ladder_facts(btf: Btf) -> ladder.Facts:
    """Return the facts that the ladder depends on."""
    return ladder.Facts(
        tracepoints=frozenset(t for t in ladder.tracepoints() if btf.has_tracepoint(t)),
        functions=frozenset(f for f in ladder.FUNCTIONS.values() if btf.has_function(f)),
        kprobes=KPROBES.exists(),
    )


def check_sock_cgroups(btf: Btf) -> None:
    """Raise KernelLacks where the kernel doesn't tell a socket's cgroup, so that a filter would let nothing through."""
    # sk_cgroup() in bpf/sock.h reads these, and 0 where one is missing. Before Linux 5.15, ``val`` is the pointer.
    pointer = btf.member("sock", "sk_cgrp_data.cgroup") or btf.member("sock", "sk_cgrp_data.val")
    if not (pointer and btf.member("cgroup", "kn") and btf.member("kernfs_node", "id")):
        raise KernelLacks(
            "this kernel doesn't tell the cgroup of a connection (it has no CONFIG_SOCK_CGROUP_DATA)",
            "select by --pid or --port, or boot a kernel with CONFIG_CGROUP_BPF=y",
        )


def lockdown() -> str:
    """Return the lockdown level in force ("none", "integrity", "confidentiality"), or "unknown" and the reason."""
    try:
        text = Path("/sys/kernel/security/lockdown").read_text()
    except OSError:
        return "unknown (securityfs isn't mounted)"
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else "unknown"


def tracefs_mounted() -> bool:
    """Return whether tracefs is mounted at its usual place, /sys/kernel/tracing."""
    return (TRACEFS / "events").is_dir()
