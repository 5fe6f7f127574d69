# SPDX-License-Identifier: Apache-2.0
"""Bare roots of other Debian releases, and commands run in them as on a new machine.

A root is made once by mmdebstrap and kept as a tarball in the cache folder; each use unpacks its own copy.
Commands run in a mount namespace of their own, so that no mount of a root is ever seen outside, and all of
them are gone with the last process, however it ended. What a killed run has left is deleted by the next one.
"""

from __future__ import annotations

import ast
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

SUITES = ("bookworm", "trixie")
CHECKOUT = Path(__file__).resolve().parents[2]
CLONE = "/srv/cwndtrace"
"""Where ``cloned`` puts root's clone of the checkout."""
PACKAGES = "ca-certificates,git,make"
"""What a bare root holds besides the essential: no more than it takes to clone the project and type make."""

# The root itself is mounted first, because on a real machine / is a mount, and programs count on that; and /dev/shm
# has no devices and no sudo.
_MOUNTS = """
mount --rbind "$root" "$root"
mount -o remount,bind,suid,dev,exec "$root"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mountpoint -q "$root/sys/kernel/tracing/" || mount -t tracefs tracefs "$root/sys/kernel/tracing"
"""


def cache_dir() -> Path:
    """Where the tarballs are kept between runs: outside the checkout."""
    base = os.environ.get("CWNDTRACE_CACHE")
    if base:
        return Path(base) / "chroots"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cwndtrace" / "chroots"


def need_tools() -> None:
    """Skip the test where a program isn't here that this module needs."""
    missing = [tool for tool in ("mmdebstrap", "unshare", "chroot", "tar", "git") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: sudo make test-distributions installs it")


def tarball(suite: str) -> Path:
    """The tarball of a bare root, made now if the cache has none; raises CalledProcessError where that fails."""
    path = cache_dir() / f"{suite}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / f"{suite}.lock"):  # several runs may begin at once, and one of them makes it
        if not path.exists():
            with _folder(path.parent, suite) as folder:
                made = folder / path.name
                command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", suite, str(made)]
                subprocess.run(command, check=True)
                made.rename(path)  # whole or not at all
    return path


@dataclass(frozen=True)
class Root:
    """An unpacked root."""

    suite: str
    path: Path
    binds: tuple[Path, ...]
    """Folders of this machine that pip's configuration names, seen in the root read-only under the same path."""

    def run(
        self, *command: str, cwd: str = "/root", timeout: float = 600, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the root and return its exit code and output, both streams as one.

        Prints how long it took, and how much of the CPUs, for ``pytest -rP``.
        Raises TimeoutExpired after ``timeout`` seconds, with the command and its children killed.
        """
        script = ["set -eu", "root=$1; cwd=$2; shift 2", _MOUNTS]
        for folder in self.binds:
            script += [f'mkdir -p "$root{folder}"', f'mount --bind -o ro "{folder}" "$root{folder}"']
        script += ['exec chroot "$root" sh -c \'cd "$1" && shift && exec "$@"\' sh "$cwd" "$@"']
        full = ["unshare", "--mount", "--propagation=private", "sh", "-c", "\n".join(script), "sh"]
        full += [str(self.path), cwd, *command]
        began, used = time.monotonic(), _cpu_s()
        with subprocess.Popen(
            full,
            env=_environment() | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",  # the root's locale may be another
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        took = f"{time.monotonic() - began:.1f} s, {_cpu_s() - used:.1f} s of CPU"
        print(f"{self.suite}: {took}: {' '.join(command)[:200]}")
        return subprocess.CompletedProcess(command, process.returncode, output)

    def good(self, *command: str, cwd: str = "/root", timeout: float = 1500) -> str:
        """Run a command that must succeed; its output."""
        done = self.run(*command, cwd=cwd, timeout=timeout)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def make(self, *goals: str) -> str:
        """Run make in root's clone; it must succeed. Its output."""
        return self.good("make", *goals, cwd=CLONE)

    def add(self, *packages: str) -> None:
        """Install packages of the distribution."""
        if not any((self.path / "var/lib/apt/lists").glob("*Packages*")):
            self.good("apt-get", "-q", "update")
        apt = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "--no-install-recommends")
        self.good(*apt, "install", *packages)

    def has(self, program: str) -> bool:
        """Whether the distribution's program of this name is installed there."""
        return (self.path / "usr/bin" / program).exists()


@contextmanager
def unpacked(suite: str) -> Iterator[Root]:
    """A root of ``suite``, ready to reach the same package sources as this machine; gone at the end."""
    source = tarball(suite)
    with _folder(_home(), suite) as folder:
        subprocess.run(["tar", "--numeric-owner", "-xpf", str(source), "-C", str(folder)], check=True)
        _share_network(folder)
        # Nobody needs this root after a power cut, and the syncs are half of the time that dpkg takes.
        (folder / "etc/dpkg/dpkg.cfg.d/this-machine").write_text("force-unsafe-io\n")
        yield Root(suite, folder, _configure_pip(folder))


@contextmanager
def cloned(suite: str) -> Iterator[Root]:
    """The same with the checkout cloned to CLONE."""
    with unpacked(suite) as root:
        copy_checkout(root)
        clone(root, CLONE)
        yield root


def copy_checkout(root: Root) -> None:
    """Put a repository of the checkout, uncommitted files included, at /origin in the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    origin = root.path / "origin"
    for name in filter(None, listed.decode().split("\0")):
        if (CHECKOUT / name).exists():  # a file that was deleted is still listed
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, origin / name, follow_symlinks=False)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-C", str(origin)]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it is in the checkout"]):
        subprocess.run([*git, *arguments], check=True)


def clone(root: Root, target: str, owner: str = "root") -> None:
    """Clone the repository that ``copy_checkout`` made to ``target`` in the root; all in it is ``owner``'s."""
    root.good("git", "clone", "-q", "/origin", target)
    root.good("chown", "-R", f"{owner}:", target)


# ---- folders that go away ----

_MEMORY = Path("/dev/shm")
_PREFIX = "cwndtrace-root-"
_ROOTS = 4
"""How many are there at once where ``tools/test distributions`` makes them."""
_ROOT_BYTES = 2 << 30


def _home() -> Path:
    """Where roots are unpacked: memory if there is plenty, since a disk takes minutes to write one and to delete it."""
    if "CWNDTRACE_NEWCOMER" in os.environ:
        return cache_dir()  # all live tests run in it then, and read files past the page cache
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        available = next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("MemAvailable:"))
        free = shutil.disk_usage(_MEMORY).free
    except (OSError, StopIteration):
        return cache_dir()
    # Half as much again for what runs in them.
    return _MEMORY if min(free, available) > _ROOTS * _ROOT_BYTES * 3 // 2 else cache_dir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or a folder; the file is made. It is let go of with the process, however that ends."""
    fd = os.open(path, os.O_RDONLY | (0 if path.is_dir() else os.O_CREAT), 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def _folder(home: Path, suite: str) -> Iterator[Path]:
    """A folder in ``home``, gone at the end with the processes that have it as their root. It is locked meanwhile."""
    with ExitStack() as stack:
        with _locked(cache_dir()):  # until a new one is locked it looks as if it had been left behind
            _delete_left_behind()
            folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{suite}-", dir=home))
            stack.enter_context(_locked(folder))
            stack.callback(_delete, folder)
        yield folder


def _delete_left_behind() -> None:
    """Delete the folders of runs that were killed: nobody holds their locks any more."""
    for folder in (*cache_dir().glob(f"{_PREFIX}*"), *_MEMORY.glob(f"{_PREFIX}*")):
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # its own run has just deleted it, or somebody else's link has its name
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                continue
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
        _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a folder, once what still runs in it has been killed."""
    limit = time.monotonic() + 30
    while found := _processes_in(folder):
        if time.monotonic() > limit:
            raise RuntimeError(f"processes {found} with {folder} as their root don't end")
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder)


def _processes_in(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if (process / "root").readlink() == folder:
                found.append(int(process.name))
    return found


def _cpu_s() -> float:
    """What processes have used that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- the way to the package sources ----

_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_SHARED_CERTIFICATES = "/etc/ssl/this-machine.crt"


def _environment() -> dict[str, str]:
    """A new user's environment: nothing of this one but what a proxy needs."""
    env = {"HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "TERM": "dumb"}
    env["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return env | {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}


def _share_network(root: Path) -> None:
    """DNS, certificates and apt's own way to its mirror, each where this machine has it."""
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    if _CERTIFICATES.exists():
        # Beside the root's own bundle: installing ca-certificates there would write that one anew.
        shutil.copy(_CERTIFICATES, root / _SHARED_CERTIFICATES.lstrip("/"))
    dump = subprocess.run(["apt-config", "dump", "Acquire"], check=True, text=True, stdout=subprocess.PIPE).stdout
    proxies = [line for line in dump.splitlines() if '::proxy "' in line.lower()]
    # Translated descriptions of packages are half of what apt-get update reads, and nobody reads them here.
    lines = [*proxies, 'Acquire::Languages "none";']
    (root / "etc/apt/apt.conf.d/99this-machine").write_text("".join(f"{line}\n" for line in lines))


def _configure_pip(root: Path) -> tuple[Path, ...]:
    """Give the root this machine's pip settings and the files they name; returns the folders that they name."""
    settings = _pip_settings()
    if (root / _SHARED_CERTIFICATES.lstrip("/")).exists():
        settings["cert"] = _SHARED_CERTIFICATES
    lines = [f"{name} = {value}\n" for name, value in sorted(settings.items())]
    (root / "etc/pip.conf").write_text("".join(["[global]\n", *lines]))
    words = {word for name in settings if name != "cert" for word in settings[name].split()}
    named = {Path(word.removeprefix("file://")) for word in words if word.startswith(("/", "file:///"))}
    for file in filter(Path.is_file, named):
        copy = root / file.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    # A local index is a folder of pages that point to files beside it, so its parent is needed.
    folders = {path.parent if f"file://{path}" in words and len(path.parts) > 3 else path for path in named}
    return tuple(sorted(filter(Path.is_dir, folders)))


def _pip_settings() -> dict[str, str]:
    """What pip's files and variables say here, the latter winning, as they do in pip."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    pairs = [line.split("=", 1) for line in listed.splitlines() if line.startswith(("global.", ":env:."))]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))
    # Each value is printed as Python would write it, and a list in it may stand on several lines.
    texts = {name.split(".", 1)[1]: str(ast.literal_eval(value)) for name, value in pairs}
    return {name: " ".join(text.split()) for name, text in texts.items() if name != "config-file"}
