# SPDX-License-Identifier: Apache-2.0
"""Bare roots of other Debian releases, and commands run in them as on a new machine.

A root is made once by mmdebstrap and kept as a tarball in the cache folder; each use unpacks its own copy.
Commands run in a mount namespace of their own, so that no mount of a root is ever seen outside, and all of
them are gone with the last process, however it ended.
"""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "ca-certificates,git,make"
"""What a bare root holds besides the essential: no more than it takes to clone the project and type make."""

# The root itself is mounted first, because on a real machine / is a mount, and programs count on that.
_MOUNTS = """
mount --rbind "$root" "$root"
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


def missing_tools() -> list[str]:
    """The programs that this module needs and that aren't here."""
    return [tool for tool in ("mmdebstrap", "unshare", "chroot", "tar", "git") if shutil.which(tool) is None]


def tarball(suite: str) -> Path:
    """The tarball of a bare root, made now if the cache has none; raises CalledProcessError where that fails."""
    path = cache_dir() / f"{suite}.tar"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run(
                ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", suite, str(made)], check=True
            )
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

        Raises TimeoutExpired after ``timeout`` seconds, with the command and its children killed.
        """
        script = ["set -eu", "root=$1; cwd=$2; shift 2", _MOUNTS]
        for folder in self.binds:
            script += [f'mkdir -p "$root{folder}"', f'mount --bind -o ro "{folder}" "$root{folder}"']
        script += ['exec chroot "$root" sh -c \'cd "$1" && shift && exec "$@"\' sh "$cwd" "$@"']
        full = ["unshare", "--mount", "--propagation=private", "sh", "-c", "\n".join(script), "sh"]
        full += [str(self.path), cwd, *command]
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
        return subprocess.CompletedProcess(command, process.returncode, output)


@contextmanager
def unpacked(suite: str) -> Iterator[Root]:
    """A root of ``suite``, ready to reach the same package sources as this machine; gone at the end."""
    source = tarball(suite)
    with tempfile.TemporaryDirectory(prefix=f"{suite}-", dir=source.parent) as folder:
        root = Path(folder)
        subprocess.run(["tar", "--numeric-owner", "-xpf", str(source), "-C", folder], check=True)
        _share_network(root)
        yield Root(suite, root, _configure_pip(root))


def clone_checkout(checkout: Path, root: Root, target: str) -> None:
    """Clone the checkout, uncommitted files included, to ``target`` in the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=checkout,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    origin = root.path / "origin"
    for name in filter(None, listed.decode().split("\0")):
        if (checkout / name).exists():  # a file that was deleted is still listed
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, origin / name, follow_symlinks=False)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-C", str(origin)]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it is in the checkout"]):
        subprocess.run([*git, *arguments], check=True)
    done = root.run("git", "clone", "-q", "/origin", target)
    if done.returncode:
        raise RuntimeError(f"git clone in {root.path}: {done.stdout}")


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
    (root / "etc/apt/apt.conf.d/99this-machine").write_text("".join(f"{line}\n" for line in proxies))


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
