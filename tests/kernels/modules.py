# SPDX-License-Identifier: Apache-2.0
"""The modules of a kernel that a guest needs, with those that they depend on."""

from __future__ import annotations

import lzma
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

BOOT: Final = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
"""The modules that the initramfs loads, for the disks and the port on which a guest reports."""
# ext4 asks for a CRC by its name and not by the module's.
BOOT_IF_THERE: Final = ("crc32c_generic", "crc32c_cryptoapi", "crc32c-intel", "libcrc32c")
TRACED: Final = (
    *("loop", "veth", "dummy", "tun", "ifb", "null_blk", "sch_netem", "sch_fq", "sch_tbf", "sch_ingress", "cls_bpf"),
    *("tcp_bbr", "inet_diag", "tcp_diag", "unix_diag", "af_packet_diag"),
)
"""The modules that the checks use; the kernel loads them when they are asked for."""


def _name(path: str) -> str:
    return re.sub(r"\.ko(\.\w+)?$", "", PurePosixPath(path).name).replace("-", "_")


def in_order(dependencies: str, builtin: str, wanted: Iterable[str], optional: Iterable[str] = ()) -> list[str]:
    """Return the paths of modules, each after those that it depends on.

    ``dependencies`` is the text of modules.dep and ``builtin`` that of modules.builtin, whose modules need no file.
    Raises LookupError for a wanted module that the kernel doesn't have; an optional one is left out then.
    """
    needs = dict(line.split(":") for line in dependencies.splitlines() if ":" in line)
    paths = {_name(path): path for path in needs}
    inside = {_name(path) for path in builtin.splitlines()}
    found: list[str] = []

    def add(path: str) -> None:
        # modules.dep lists all that a module needs, the first needed last.
        for each in (*reversed(needs[path].split()), path):
            if each not in found:
                found.append(each)

    required = [name.replace("-", "_") for name in wanted]
    for name in (*required, *(name.replace("-", "_") for name in optional)):
        if name in paths:
            add(paths[name])
        elif name in required and name not in inside:
            raise LookupError(f"this kernel has no module {name}")
    return found


def chosen(folder: Path, wanted: Iterable[str], optional: Iterable[str] = ()) -> list[str]:
    """Return the paths below ``folder`` of modules, each after those that it depends on. Raises LookupError."""
    builtin = folder / "modules.builtin"
    return in_order((folder / "modules.dep").read_text(), builtin.read_text(), wanted, optional)


def plain(path: Path) -> bytes:
    """Return a module's content, decompressed: not every insmod can do that."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", str(path)], check=True, stdout=subprocess.PIPE).stdout
    return data
