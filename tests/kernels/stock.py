# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernels, unpacked in the cache with their modules."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.harness.chroot import cache_dir
from tests.kernels.archive import Archive, depends, locked

CACHE: Final = cache_dir().parent
_KEPT: Final = 2
"""Versions of each kernel that stay in the cache."""
_PARTS: Final = r"linux-(image|binary|modules|base)-.+"


@dataclass(frozen=True)
class Stock:
    """A kernel of Debian: the suites and the metapackage that it comes from, and the release whose root it runs.

    ``cpu`` is QEMU's model of a CPU, where the usual one of the architecture doesn't do.
    """

    name: str
    architecture: str
    suites: tuple[str, ...]
    package: str
    root: str
    cpu: str = ""


KERNELS: Final = (
    Stock("5.10", "amd64", ("bullseye", "bullseye-security"), "linux-image-amd64", "bookworm"),
    Stock("6.1", "amd64", ("bookworm", "bookworm-security"), "linux-image-amd64", "bookworm"),
    Stock("6.1-cloud", "amd64", ("bookworm", "bookworm-security"), "linux-image-cloud-amd64", "bookworm"),
    Stock("6.12", "amd64", ("trixie", "trixie-security"), "linux-image-amd64", "trixie"),
    Stock("newest-cloud", "amd64", ("trixie-backports",), "linux-image-cloud-amd64", "trixie"),
    Stock("6.12-arm64", "arm64", ("trixie", "trixie-security"), "linux-image-arm64", "trixie"),
)
"""The kernels of the table."""
MORE: Final = (
    # The usual model has no pages of 16 KiB.
    Stock("arm64-16k", "arm64", ("trixie-backports",), "linux-image-arm64-16k", "trixie", cpu="neoverse-n1"),
)
"""Kernels that are tested only by name."""
BY_NAME: Final = {stock.name: stock for stock in (*KERNELS, *MORE)}


@dataclass(frozen=True)
class Unpacked:
    """A stock kernel's files in the cache."""

    stock: Stock
    version: str
    """The version of the package."""
    folder: Path

    @property
    def modules(self) -> Path:
        """The folder with the modules, whose name is the kernel's release."""
        (found,) = (self.folder / "usr/lib/modules").iterdir()
        return found

    @property
    def release(self) -> str:
        """What uname -r says in this kernel."""
        return self.modules.name

    def _file(self, name: str) -> Path:
        # From 7.x on, these lie beside the modules.
        places = (self.folder / "boot" / f"{name}-{self.release}", self.modules / name)
        return next(place for place in places if place.exists())

    @property
    def vmlinuz(self) -> Path:
        """The compressed kernel."""
        return self._file("vmlinuz")

    @property
    def config(self) -> str:
        """The kernel's configuration."""
        return self._file("config").read_text()


def packages(archive: Archive, metapackage: str) -> tuple[list[str], str]:
    """Return the packages that have the files of a kernel, and their version. Raises Unavailable."""
    found: list[str] = []
    waiting, version = [metapackage], ""
    while waiting:
        name = waiting.pop()
        fields = archive.fields(name)
        version = version or fields["Version"]
        waiting += [other for other in depends(fields, _PARTS) if other not in found]
        if any(c.isdigit() for c in name.removesuffix("amd64").removesuffix("arm64")):
            found.append(name)
    return sorted(set(found)), version


def fetch(stock: Stock) -> Unpacked:
    """Return a kernel's files, downloaded if the cache has another version. Raises Unavailable."""
    archive = Archive(stock.suites, stock.architecture, CACHE)
    archive.update()
    names, version = packages(archive, stock.package)
    kept = CACHE / "stock/kernels" / stock.name
    kept.mkdir(parents=True, exist_ok=True)
    folder = kept / version
    with locked(kept.with_name(f"{stock.name}.lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
                new = Path(temporary) / "kernel"
                new.mkdir()
                archive.unpack(names, new)
                _settle(new)
                new.rename(folder)
        folder.touch()
        for old in sorted(kept.iterdir(), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(old)
    return Unpacked(stock, version, folder)


def _settle(folder: Path) -> None:
    """Put the modules at usr/lib/modules, where newer releases have them, and list their dependencies."""
    old, new = folder / "lib/modules", folder / "usr/lib/modules"
    if old.is_dir() and not old.parent.is_symlink():
        new.parent.mkdir(parents=True, exist_ok=True)
        old.rename(new)
        shutil.rmtree(folder / "lib")
    (folder / "lib").symlink_to("usr/lib")
    # The scripts of a package do this when it is installed.
    subprocess.run(["depmod", "-b", str(folder), next(new.iterdir()).name], check=True)
