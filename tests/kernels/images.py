# SPDX-License-Identifier: Apache-2.0
"""The disks that a guest with a stock kernel has: Debian's root with the project installed, and the checkout.

A root is made once for each state of what is installed. The checkout, with the kernel's modules and the compiled BPF
programs, is a second disk, made for each boot.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Final

from tests.harness import chroot
from tests.harness.chroot import CHECKOUT, CLONE
from tests.kernels import live, modules
from tests.kernels.archive import Archive, locked
from tests.kernels.stock import CACHE, Stock, Unpacked

_HERE: Final = Path(__file__).parent
# What a user has, and what the checks need to make disks, links and other users.
PACKAGES: Final = (
    *("python3", "python3-venv", "python3-bpfcc", "iproute2", "mount"),
    *("ca-certificates", "git", "make", "sudo", "e2fsprogs", "kmod", "util-linux", "procps"),
)
# An extracted root lacks the essential packages too.
_FOREIGN: Final = (
    *PACKAGES,
    *("base-files", "base-passwd", "bash", "bsdutils", "coreutils", "dash", "debianutils", "diffutils", "findutils"),
    *("grep", "gzip", "hostname", "libc-bin", "login", "mawk", "ncurses-bin", "passwd", "sed", "sysvinit-utils", "tar"),
    *("libpam-modules", "libpam-runtime"),
)
INSTALLED: Final = ("pyproject.toml", "README.md", "LICENSE", "LICENSES", "cwndtrace", "bpf", "tools/setup", "Makefile")
"""The parts of the checkout on which an installation depends."""
USER: Final = "user"
_SIZE: Final = "4G"
_KEPT: Final = 2


def checkout_files(*parts: str) -> list[str]:
    """Return the checkout's files below these parts, by default all, including those that aren't committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *parts]
    listed = subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.PIPE).stdout.decode()
    return sorted(name for name in listed.split("\0") if name and (CHECKOUT / name).is_file())


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def installed_digest() -> str:
    """Return a hash of everything in the checkout on which an installation depends."""
    files = checkout_files(*INSTALLED)
    return _digest(*((name, (CHECKOUT / name).read_bytes()) for name in files))


def root(stock: Stock) -> Path:
    """Return the image of a root with the project installed; make it if the cache has none of this state.

    For another architecture, what ``make install`` and the live tests need is there, and the guest installs it.
    """
    native = stock.architecture == "amd64"
    recipe = (PACKAGES, _HERE.joinpath("images.py").read_bytes())
    key = _digest(recipe, installed_digest() if native else (_FOREIGN, requirements()))
    folder = CACHE / "stock/roots"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{stock.root}-{stock.architecture}"
    image = folder / f"{name}-{key}.img"
    with locked(folder / f"{name}.lock"):
        if not image.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                new = Path(temporary) / "root.img"
                if native:
                    _native(stock, new)
                else:
                    _foreign(stock, new, folder)
                new.rename(image)
        image.touch()
        for old in sorted(folder.glob(f"{name}-*.img"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            old.unlink()
    return image


def _make_image(tree: Path, image: Path) -> None:
    with image.open("wb"):
        os.truncate(image, 0)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(tree), str(image), _SIZE], check=True)


def _native(stock: Stock, image: Path) -> None:
    """Make the root as a user would: install packages, then the project from a clone."""
    with chroot.cloned(stock.root) as made:
        made.add(*PACKAGES)
        made.good("useradd", "-m", "-s", "/bin/bash", USER)
        _let_sudo(made.path)
        made.make("install")
        # This machine's settings mean nothing in a guest, which has no network.
        for name in ("etc/pip.conf", "etc/resolv.conf", "etc/apt/apt.conf.d/99this-machine"):
            (made.path / name).unlink(missing_ok=True)
        for folder in ("origin", CLONE.lstrip("/"), "var/cache/apt", "var/lib/apt/lists", "root/.cache"):
            shutil.rmtree(made.path / folder, ignore_errors=True)
        _make_image(made.path, image)


def _let_sudo(tree: Path) -> None:
    rule = tree / "etc/sudoers.d/user"
    rule.write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
    rule.chmod(0o440)


def _foreign(stock: Stock, image: Path, cache: Path) -> None:
    """Make the root by unpacking packages, without running any of their programs."""
    archive = cache / f"{stock.root}-{stock.architecture}-{_digest(_FOREIGN)}.tar"
    if not archive.exists():
        new = image.with_name("root.tar")
        command = ["mmdebstrap", "--quiet", "--variant=extract", "--skip=check/qemu"]
        command += [f"--architectures={stock.architecture}", f"--include={','.join(_FOREIGN)}", stock.root, str(new)]
        subprocess.run(command, check=True)
        new.rename(archive)
    tree = image.with_name("tree")
    tree.mkdir()
    tree.chmod(0o755)
    subprocess.run(["tar", "--numeric-owner", "-xpf", str(archive), "-C", str(tree)], check=True)
    masters = tree / "usr/share/base-passwd"
    for name in ("passwd", "group"):
        line = f"{USER}:x:1000:1000::/home/{USER}:/bin/bash\n" if name == "passwd" else f"{USER}:x:1000:\n"
        (tree / "etc" / name).write_text((masters / f"{name}.master").read_text() + line)
    # The packages' scripts would make all of these.
    for name in ("bin", "sbin", "lib"):
        if not (tree / name).exists():
            (tree / name).symlink_to(f"usr/{name}")
    for name in ("proc", "sys", "run", "root", "mnt", "srv", "opt", "boot"):
        (tree / name).mkdir(exist_ok=True)
    (tree / "etc/shadow").write_text(f"root:*:1::::::\n{USER}:*:1::::::\n")
    for kind in ("auth", "account", "session", "session-noninteractive", "password"):
        (tree / f"etc/pam.d/common-{kind}").write_text(f"{kind.partition('-')[0]} required pam_permit.so\n")
    for name, target in (("awk", "mawk"), ("sh", "dash")):
        if not (tree / "usr/bin" / name).exists():
            (tree / "usr/bin" / name).symlink_to(target)
    certificates = sorted((tree / "usr/share/ca-certificates").rglob("*.crt"))
    bundle = tree / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.write_bytes(b"".join(each.read_bytes() for each in certificates))
    home = tree / "home" / USER
    home.mkdir(parents=True)
    os.chown(home, 1000, 1000)
    _let_sudo(tree)
    python = (tree / "usr/bin/python3").readlink().name.removeprefix("python")
    _download_wheels(python, "aarch64", tree / "wheels")
    _make_image(tree, image)


def requirements() -> list[str]:
    """Return what pip installs with the project, what it builds the project with, and what the live tests need."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    return [*project["project"]["dependencies"], *project["build-system"]["requires"], *live.PACKAGES]


def _download_wheels(python: str, machine: str, into: Path) -> None:
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(41, 16, -1)] + [f"manylinux2014_{machine}"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--quiet",
        "--only-binary",
        ":all:",
        "--dest",
        str(into),
    ]
    command += ["--python-version", python, *(word for each in platforms for word in ("--platform", each))]
    subprocess.run([*command, *requirements()], check=True)


# ---- what is made for each boot ----


def initramfs(unpacked: Unpacked, into: Path) -> Path:
    """Return an initramfs with busybox and the modules that mount the root."""
    stock = unpacked.stock
    tree = into / "initramfs"
    (tree / "modules").mkdir(parents=True)
    busybox(stock, tree)
    order = modules.chosen(unpacked.modules, modules.BOOT, modules.BOOT_IF_THERE)
    names = []
    for path in order:
        name = Path(path).name.partition(".ko")[0] + ".ko"
        (tree / "modules" / name).write_bytes(modules.plain(unpacked.modules / path))
        names.append(name)
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in names))
    for source, name in (("init.sh", "init"), ("guest.sh", "guest.sh")):
        shutil.copy(_HERE / source, tree / name)
        (tree / name).chmod(0o755)
    image = into / "initramfs.cpio"
    listed = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    with image.open("wb") as file:
        command = ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0"]
        subprocess.run(command, cwd=tree, input=listed.encode(), stdout=file, check=True)
    return image


def busybox(stock: Stock, tree: Path) -> None:
    """Put a static busybox of the kernel's architecture at bin/busybox."""
    kept = CACHE / "stock" / f"busybox-{stock.root}-{stock.architecture}"
    with locked(CACHE / "stock/busybox.lock"):
        if not kept.exists():
            archive = Archive((stock.root,), stock.architecture, CACHE)
            archive.update()
            with tempfile.TemporaryDirectory(dir=CACHE / "stock") as temporary:
                archive.unpack(["busybox-static"], Path(temporary))
                next(Path(temporary).glob("**/bin/busybox")).rename(kept)
    (tree / "bin").mkdir()
    shutil.copy(kept, tree / "bin/busybox")


def input_disk(unpacked: Unpacked, kept: Path, into: Path) -> Path:
    """Return a disk that is a tar archive: the checkout, the kernel's modules, and what earlier guests have kept."""
    disk = into / "input.tar"
    with tarfile.open(disk, "w") as tar:
        for name in checkout_files():
            tar.add(CHECKOUT / name, f"{CLONE.lstrip('/')}/{name}", filter=_owned_by_user)
        release = f"usr/lib/modules/{unpacked.release}"
        for path in sorted(unpacked.modules.glob("modules.*")):
            tar.add(path, f"{release}/{path.name}")
        for each in modules.chosen(unpacked.modules, (), (*modules.BOOT, *modules.BOOT_IF_THERE, *modules.TRACED)):
            tar.add(unpacked.modules / each, f"{release}/{each}")
        # Where the distribution puts it.
        config = unpacked.config.encode()
        newer = (unpacked.modules / "config").exists()
        entry = tarfile.TarInfo(f"{release}/config" if newer else f"boot/config-{unpacked.release}")
        entry.size = len(config)
        tar.addfile(entry, io.BytesIO(config))
        for archive in sorted(kept.glob("*.tar")):
            with tarfile.open(archive) as earlier:
                for member in earlier:
                    tar.addfile(member, earlier.extractfile(member) if member.isfile() else None)
    return disk


def _owned_by_user(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 1000
    member.uname = member.gname = USER
    return member


def output_disk(into: Path) -> Path:
    """Return an empty disk on which a guest leaves a tar archive."""
    disk = into / "output.tar"
    with disk.open("wb") as file:
        file.truncate(2 << 30)
    return disk


def keep(output: Path, kept: Path) -> None:
    """Keep what a guest has left for later ones: compiled BPF programs and, if it installed the project, that."""
    new = output.with_name("kept.tar")
    parts: dict[str, list[tarfile.TarInfo]] = {}
    # A guest that failed leaves a disk of zeros, which is an empty archive; one that was killed may leave a part.
    with suppress(tarfile.TarError), tarfile.open(output, "r:") as tar:
        for member in tar:
            name = "images" if "var/cache/cwndtrace" in member.name else "opt"
            parts.setdefault(name, []).append(member)
        for name, members in parts.items():
            with tarfile.open(new, "w") as archive:
                for member in members:
                    archive.addfile(member, tar.extractfile(member) if member.isfile() else None)
            new.rename(kept / f"{name}.tar")
