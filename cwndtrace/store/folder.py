# SPDX-License-Identifier: Apache-2.0
"""Folders that are held open, so that files land in them even if another user renames or replaces part of their path.

Root may write to a folder where another user may rename things. If root used path names there, that user could redirect
it anywhere with a symbolic link. So the path is walked once, step by step. Everything below it is created relative to
the folder's descriptor, always as a new file, and never through a link.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import BinaryIO, Final, Self

from cwndtrace import privileges

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_STEP: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS: Final = 40  # as many as the kernel follows, MAXSYMLINKS in include/linux/namei.h


class UnsafePath(OSError):
    """A symbolic link in the path, or the folder itself, belongs to another user."""


class Folder:
    """An open folder whose files are created with the rights of ``user``, or of this process for None.

    Its methods raise OSError.
    """

    def __init__(self, descriptor: int, user: privileges.User | None) -> None:
        self._fd = descriptor
        self.user = user

    @classmethod
    def make(cls, path: Path, user: privileges.User | None) -> Self:
        """Create the folder ``path`` with ``user``'s rights, accessible to its owner only.

        Raises FileExistsError if ``path`` exists.
        """
        with privileges.acting_as(user):
            parent = _reach(path.parent)
            try:
                _make_in(parent, path.name)
                descriptor = os.open(path.name, _FOLDER, dir_fd=parent)
                try:
                    owner = user.uid if user else os.geteuid()
                    if os.fstat(descriptor).st_uid != owner or os.listdir(descriptor):  # noqa: PTH208  (by descriptor)
                        raise UnsafePath(errno.EPERM, "somebody put another folder in its place")
                    os.fchmod(descriptor, 0o700)
                    _sync(parent)
                except BaseException:
                    os.close(descriptor)
                    raise
            finally:
                os.close(parent)
        return cls(descriptor, user)

    @property
    def path(self) -> Path:
        """A path that leads this process to the folder wherever it has been moved, until ``close``."""
        return Path(f"/proc/self/fd/{self._fd}")

    def fileno(self) -> int:
        """Return the folder's descriptor, to pass it to another process."""
        return self._fd

    def inside(self, name: str) -> Folder:
        """Open the folder ``name`` in this one, and create it if it doesn't exist."""
        with privileges.acting_as(self.user):
            try:
                descriptor = os.open(name, _FOLDER, dir_fd=self._fd)
            except FileNotFoundError:
                os.mkdir(name, 0o700, dir_fd=self._fd)
                os.fsync(self._fd)
                descriptor = os.open(name, _FOLDER, dir_fd=self._fd)
        return Folder(descriptor, self.user)

    def write(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        """Write what ``fill`` gives to the file ``name``, completely or not at all, accessible to its owner only."""
        temporary = f".{name}.tmp"
        with privileges.acting_as(self.user):
            self.discard(temporary)
            try:
                with self._new(temporary) as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                os.fsync(self._fd)
            except BaseException:
                self.discard(temporary)
                raise

    def begin(self, name: str) -> BinaryIO:
        """Open a new file to append to, without a buffer, accessible to its owner only."""
        with privileges.acting_as(self.user):
            return os.fdopen(os.open(name, _NEW | os.O_APPEND, 0o600, dir_fd=self._fd), "ab", buffering=0)

    def link(self, name: str, file: BinaryIO) -> bool:
        """Make ``name`` a hard link to an open file; return False where that can't be.

        Only a file of this folder's user is linked: another owner could change it later.
        """
        with privileges.acting_as(self.user):
            if os.fstat(file.fileno()).st_uid != _file_system_uid():
                return False
            try:
                os.link(f"/proc/self/fd/{file.fileno()}", name, dst_dir_fd=self._fd, follow_symlinks=True)
            except OSError:  # another file system, one without hard links, or no name of the file is left
                return False
            return True

    def locked(self) -> bool:
        """Return whether another process holds a lock, see flock(2), on the folder; False where that can't be told."""
        try:
            descriptor = os.open(".", _FOLDER, dir_fd=self._fd)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without such locks
            return False
        finally:
            os.close(descriptor)
        return False

    def sync(self) -> None:
        """Flush the names in the folder to the device."""
        os.fsync(self._fd)

    @contextmanager
    def _new(self, name: str) -> Iterator[BinaryIO]:
        descriptor = os.open(name, _NEW, 0o600, dir_fd=self._fd)
        with os.fdopen(descriptor, "wb") as file:
            yield file

    def discard(self, name: str) -> None:
        """Remove a file if it exists, and ignore errors."""
        with suppress(OSError), privileges.acting_as(self.user):
            os.unlink(name, dir_fd=self._fd)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def refuse(path: Path, user: privileges.User | None) -> None:
    """Raise the error of ``Folder.make`` where it can be foreseen without creating anything."""
    with privileges.acting_as(user):
        parent = _reach(path.parent)
        try:
            with suppress(FileNotFoundError):
                os.stat(path.name or ".", dir_fd=parent, follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            # effective_ids checks the rights that acting_as() set; the real ones may still be root's.
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=parent, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        finally:
            os.close(parent)


def rename(path: Path, name: str, user: privileges.User | None) -> None:
    """Give the folder ``path`` another ``name`` beside it, with ``user``'s rights. Raises OSError."""
    with privileges.acting_as(user):
        parent = _reach(path.parent)
        try:
            os.rename(path.name, name, src_dir_fd=parent, dst_dir_fd=parent)
            _sync(parent)
        finally:
            os.close(parent)


def remove(path: Path, user: privileges.User | None) -> None:
    """Remove the folder ``path`` and all that is in it, with ``user``'s rights and never through a link.

    It is renamed first, so that nobody finds half of it. Raises OSError.
    """
    with privileges.acting_as(user):
        parent = _reach(path.parent)
        try:
            hidden = f".{path.name}.tmp"
            os.rename(path.name, hidden, src_dir_fd=parent, dst_dir_fd=parent)
            shutil.rmtree(hidden, dir_fd=parent)
        finally:
            os.close(parent)


def _make_in(parent: int, name: str) -> None:
    try:
        os.mkdir(name or ".", 0o700, dir_fd=parent)
    except FileNotFoundError:
        # File systems such as /proc, where nothing can be created, give this error too. A removed folder has no links.
        if os.fstat(parent).st_nlink == 0:
            raise
        raise OSError(errno.EROFS, "nothing can be made in that file system") from None


def _reach(path: Path) -> int:
    """Return a descriptor of the folder ``path``. Raises UnsafePath for a symbolic link that isn't root's or ours."""
    trusted = {0, _file_system_uid()}
    left = list(reversed(path.parts))
    at = os.open(".", _STEP)
    links = 0
    try:
        while left:
            step = os.open(left.pop(), _STEP, dir_fd=at)
            status = os.fstat(step)
            if not stat.S_ISLNK(status.st_mode):
                os.close(at)
                at = step
                continue
            try:
                links += 1
                if links > _LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if status.st_uid not in trusted:
                    raise UnsafePath(errno.EPERM, f"a symbolic link in the path belongs to user {status.st_uid}")
                left += reversed(PurePath(os.readlink("", dir_fd=step)).parts)
            finally:
                os.close(step)
        if not stat.S_ISDIR(os.fstat(at).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except BaseException:
        os.close(at)
        raise
    return at


def _file_system_uid() -> int:
    status = Path("/proc/thread-self/status").read_text(encoding="utf-8", errors="replace")
    return int(next(line for line in status.splitlines() if line.startswith("Uid:")).split()[4])


def _sync(folder: int) -> None:
    """Flush a folder that is open with O_PATH. Errors are ignored, because it may be writable and not readable."""
    with suppress(OSError):
        descriptor = os.open(".", _FOLDER, dir_fd=folder)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
