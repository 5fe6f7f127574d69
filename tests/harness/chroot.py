# SPDX-License-Identifier: Apache-2.0
"""Bare root file systems of Debian releases, and commands that run in them as on a new machine.

mmdebstrap makes a root once, and the cache folder keeps it as a tarball; each use unpacks its own copy. Commands run in
separate mount namespaces, so a root's mounts are never visible outside, and vanish with the last process, however that
ended. A run deletes the roots that killed runs have left behind.
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
"""The place of root's clone of the checkout that ``cloned`` makes."""
PACKAGES = "ca-certificates,git,make"
"""The packages of a bare root besides the essential ones: those that ``git clone`` and ``make`` need."""

# The root itself is mounted first, because on a real machine / is a mount, and programs rely on that. /dev/shm is
# mounted nodev and nosuid, so the root is remounted for devices and sudo.
_MOUNTS = """
mount --rbind "$root" "$root"
mount -o remount,bind,suid,dev,exec "$root"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mountpoint -q "$root/sys/kernel/tracing/" || mount -t tracefs tracefs "$root/sys/kernel/tracing"
"""


def cache_dir() -> Path:
    """Return the folder of the tarballs, outside the checkout, which is kept between runs."""
    base = os.environ.get("CWNDTRACE_CACHE")
    if base:
        return Path(base) / "chroots"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cwndtrace" / "chroots"


def need_tools() -> None:
    """Skip the test if a program is missing that this module needs."""
    missing = [tool for tool in ("mmdebstrap", "unshare", "chroot", "tar", "git") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: sudo make test-distributions installs it")


def tarball(suite: str) -> Path:
    """Return the tarball of a bare root, and make it if the cache has none. Raises CalledProcessError if that fails."""
    path = cache_dir() / f"{suite}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / f"{suite}.lock"):  # of several runs that begin at once, one makes it
        if not path.exists():
            with _folder(path.parent, suite) as folder:
                new = folder / path.name
                command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", suite, str(new)]
                subprocess.run(command, check=True)
                new.rename(path)  # atomic, so the cache never has a part of one
    return path


@dataclass(frozen=True)
class Root:
    """An unpacked root file system."""

    suite: str
    path: Path
    binds: tuple[Path, ...]
    """The folders of this machine that pip's settings name, mounted read-only at the same path in the root."""

    def run(
        self, *command: str, cwd: str = "/root", timeout: float = 600, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the root; ``stdout`` of the result has both streams.

        Prints the command's time and CPU time, for ``pytest -rP``. After ``timeout`` seconds it kills the command and
        its children, and raises TimeoutExpired.
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
            errors="replace",  # the root's locale may differ
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
        """Run a command that must succeed, and return its output."""
        done = self.run(*command, cwd=cwd, timeout=timeout)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def make(self, *goals: str) -> str:
        """Run make in root's clone, which must succeed, and return its output."""
        return self.good("make", *goals, cwd=CLONE)

    def add(self, *packages: str) -> None:
        """Install packages from the distribution."""
        if not any((self.path / "var/lib/apt/lists").glob("*Packages*")):
            self.good("apt-get", "-q", "update")
        apt = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "--no-install-recommends")
        self.good(*apt, "install", *packages)

    def has(self, program: str) -> bool:
        """Return true if the root has a program of this name in /usr/bin."""
        return (self.path / "usr/bin" / program).exists()


@contextmanager
def unpacked(suite: str) -> Iterator[Root]:
    """Unpack a root of ``suite`` that can use this machine's package sources; delete it on exit."""
    source = tarball(suite)
    with _folder(_home(), suite) as folder:
        subprocess.run(["tar", "--numeric-owner", "-xpf", str(source), "-C", str(folder)], check=True)
        _share_network(folder)
        # This root needn't survive a power cut, and the syncs take half of dpkg's time.
        (folder / "etc/dpkg/dpkg.cfg.d/this-machine").write_text("force-unsafe-io\n")
        yield Root(suite, folder, _configure_pip(folder))


@contextmanager
def cloned(suite: str) -> Iterator[Root]:
    """Unpack a root with the checkout cloned to CLONE; delete it on exit."""
    with unpacked(suite) as root:
        copy_checkout(root)
        clone(root, CLONE)
        yield root


def copy_checkout(root: Root) -> None:
    """Make a repository of the checkout's files, including uncommitted ones, at /origin in the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    origin = root.path / "origin"
    for name in filter(None, listed.decode().split("\0")):
        if (CHECKOUT / name).exists():  # git lists deleted files too
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, origin / name, follow_symlinks=False)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-C", str(origin)]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it is in the checkout"]):
        subprocess.run([*git, *arguments], check=True)


def clone(root: Root, target: str, owner: str = "root") -> None:
    """Clone the repository at /origin to ``target`` in the root, and give it to ``owner``."""
    root.good("git", "clone", "-q", "/origin", target)
    root.good("chown", "-R", f"{owner}:", target)


# ---- temporary folders ----

_MEMORY = Path("/dev/shm")
_PREFIX = "cwndtrace-root-"
_ROOTS = 4
"""The number of roots that ``tools/test distributions`` has at the same time."""
_ROOT_BYTES = 2 << 30


def _home() -> Path:
    """Return the folder for roots: memory if enough is free, since writing and deleting one takes minutes on a disk."""
    if "CWNDTRACE_NEWCOMER" in os.environ:
        return cache_dir()  # all live tests run there then, and some read files past the page cache
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        available = next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("MemAvailable:"))
        free = shutil.disk_usage(_MEMORY).free
    except (OSError, StopIteration):
        return cache_dir()
    # The programs that run in the roots need half as much again.
    return _MEMORY if min(free, available) > _ROOTS * _ROOT_BYTES * 3 // 2 else cache_dir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder, or of a file, which is made. The kernel releases it when the process ends."""
    fd = os.open(path, os.O_RDONLY | (0 if path.is_dir() else os.O_CREAT), 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def _folder(home: Path, suite: str) -> Iterator[Path]:
    """Make a folder in ``home`` and lock it; on exit, delete it and kill the processes whose root it is."""
    with ExitStack() as stack:
        with _locked(cache_dir()):  # a new folder that isn't locked yet looks like one that was left behind
            _delete_left_behind()
            folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{suite}-", dir=home))
            stack.enter_context(_locked(folder))
            stack.callback(_delete, folder)
        yield folder


def _delete_left_behind() -> None:
    """Delete the folders of runs that were killed, which no process locks any more."""
    for folder in (*cache_dir().glob(f"{_PREFIX}*"), *_MEMORY.glob(f"{_PREFIX}*")):
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # its run has just deleted it, or it is another user's symbolic link
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
    """Kill the processes whose root a folder is, and delete it. Raises RuntimeError if they don't end within 30 s."""
    limit = time.monotonic() + 30
    while pids := _processes_in(folder):
        if time.monotonic() > limit:
            raise RuntimeError(f"processes {pids} with {folder} as their root don't end")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder)


def _processes_in(folder: Path) -> list[int]:
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            if (process / "root").readlink() == folder:
                pids.append(int(process.name))
    return pids


def _cpu_s() -> float:
    """Return the CPU time of this process's children that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- access to the package sources ----

_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_SHARED_CERTIFICATES = "/etc/ssl/this-machine.crt"


def _environment() -> dict[str, str]:
    """Return a new user's environment, with only the proxy variables of this one."""
    env = {"HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "TERM": "dumb"}
    env["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return env | {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}


def _share_network(root: Path) -> None:
    """Give the root this machine's DNS servers, certificates and apt proxies."""
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    if _CERTIFICATES.exists():
        # The root's own bundle stays as it is, because installing ca-certificates there replaces it.
        shutil.copy(_CERTIFICATES, root / _SHARED_CERTIFICATES.lstrip("/"))
    dump = subprocess.run(["apt-config", "dump", "Acquire"], check=True, text=True, stdout=subprocess.PIPE).stdout
    proxies = [line for line in dump.splitlines() if '::proxy "' in line.lower()]
    # Translated package descriptions are half of what apt-get update downloads, and the tests don't need them.
    lines = [*proxies, 'Acquire::Languages "none";']
    (root / "etc/apt/apt.conf.d/99this-machine").write_text("".join(f"{line}\n" for line in lines))


def _configure_pip(root: Path) -> tuple[Path, ...]:
    """Give the root this machine's pip settings and the files that they name, and return the folders that they name."""
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
    # The pages of a local index refer to files beside its folder, so the parent is needed.
    folders = {path.parent if f"file://{path}" in words and len(path.parts) > 3 else path for path in named}
    return tuple(sorted(filter(Path.is_dir, folders)))


def _pip_settings() -> dict[str, str]:
    """Return this machine's pip settings; variables override files, as in pip."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    pairs = [line.split("=", 1) for line in listed.splitlines() if line.startswith(("global.", ":env:."))]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))
    # pip prints each value as a Python literal, and a value may be a list on several lines.
    texts = {name.split(".", 1)[1]: str(ast.literal_eval(value)) for name, value in pairs}
    return {name: " ".join(text.split()) for name, text in texts.items() if name != "config-file"}
