# SPDX-License-Identifier: Apache-2.0
"""Find the captures below folders, globs and URLs."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cwndtrace.errors import CwndtraceError, NotFound
from cwndtrace.fleet import names
from cwndtrace.fleet.tables import MOST_TEXT
from cwndtrace.format import clean
from cwndtrace.store.layout import META

MOST_FILES: Final = 5_000_000
"""The most files and folders that are looked at for captures."""
_DEEPEST: Final = 24
_MOST_OF_CAPTURE: Final = 1_000_000
"""The most files of one capture whose changes are noticed. It bounds memory; none that can be read has as many."""
_FAR: Final = "://"
_CHANGES: Final = (
    "ETag", "LastModified", "mtime", "updated", "md5Hash", "generation", "last_modified", "created", "etag", "modify"
)  # fmt: skip
"""What file systems list of a file that is another value once its content is: entity tags and times."""


@dataclass(frozen=True)
class Located:
    """A capture that was found: ``where`` is its path, on the file system of the URL ``place`` if that isn't empty.

    ``name`` is its path below the place in printable characters, and ``host`` what a folder host=NAME says, else empty.
    ``packed`` captures are tar files. ``stamp`` changes when a file of the capture or the version of the analyses does;
    it is empty where that can't be seen. Of an unpacked capture elsewhere, ``files`` has the path of each file and its
    path below the capture, and ``modified`` the time of its meta.json, seconds since 1970.
    """

    where: str
    name: str
    host: str
    packed: bool
    stamp: str
    place: str = ""
    files: tuple[tuple[str, str], ...] = ()
    modified: float | None = None


def find(places: Iterable[str]) -> list[Located]:
    """Return the captures below ``places``, in order of their names.

    A capture is a folder with meta.json or with a name that ends with .cwnd, or a tar file of one. Links in a place
    aren't followed. A folder that can't be listed counts as a capture, so that a row of the result says why. Raises
    NotFound where a place doesn't exist or has no capture, and CwndtraceError where two have the same name, or a URL
    can't be listed.
    """
    found: dict[str, Located] = {}
    for place in places:
        # fsspec would follow links on this machine.
        place = place.removeprefix("file://").removeprefix("local://")
        here = list(_far(place) if _FAR in place else _near(place))
        if not here:
            raise NotFound(
                f"there is no capture in {clean(place)}",
                "captures are folders NAME.cwnd, or files NAME.cwnd.tar, NAME.cwnd.tar.gz or NAME.cwnd.tar.zst",
            )
        for each in here:
            other = found.setdefault(each.name, each)
            if other.where != each.where:
                cause = f"{clean(other.where)} and {clean(each.where)} would have the same name"
                raise CwndtraceError(cause, "give the folder that holds both")
    # A capture that is there both packed and not counts once.
    counted = {name: each for name, each in found.items() if not each.packed or names.unpacked(name) not in found}
    return [replace(each, name=names.shown(name, MOST_TEXT)) for name, each in sorted(counted.items())]


def _stamp(files: Iterable[tuple[Any, ...]]) -> str:
    """Return a digest of what identifies the content of files: names, sizes, and times or entity tags."""
    # The package is loaded before its modules are, and it imports this one, so it isn't imported here.
    text = repr((sys.modules["cwndtrace"].__version__, sorted(files)))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# ---- this machine -----------------------------------------------------------------------------------


def _near(place: str) -> Iterator[Located]:
    if os.path.lexists(place):
        whole = Path(place).resolve()
        alone = whole.is_file() or _is_capture(whole)
        base, tops = whole.parent if alone else whole, [whole]
    elif glob.has_magic(place):
        base = Path(f"{_fixed(place)}x").parent
        matches = map(Path, sorted(glob.glob(place, recursive=True)))  # noqa: PTH207  (it may be an absolute path)
        tops = [path for path in matches if not _through_link(path, base)]
    else:
        raise NotFound(f"there is no {clean(place)}", "give a folder, a glob in quotes, or a URL such as s3://...")
    left = iter(range(MOST_FILES))
    for top in tops:
        yield from _walk(top, base, left, 0)


def _fixed(pattern: str) -> str:
    """Return a pattern up to its first wildcard."""
    return re.split(r"[*?[]", pattern, maxsplit=1)[0]


def _through_link(path: Path, base: Path) -> bool:
    inner = [path, *path.parents][: len(path.parts) - len(base.parts)]
    return any(step.is_symlink() for step in inner)


def _is_capture(path: Path) -> bool:
    meta = os.path.isfile(path / META)  # noqa: PTH113  (that of Path raises PermissionError)
    return meta or (path.name.endswith(".cwnd") and path.is_dir())


def _walk(path: Path, base: Path, left: Iterator[int], depth: int) -> Iterator[Located]:
    """Yield the captures in ``path``, or ``path`` itself where it is one."""
    if next(left, None) is None:
        raise CwndtraceError(f"{clean(str(base))} holds more than {MOST_FILES:,} files", "give a smaller folder")
    where, name = str(path.absolute()), str(path.relative_to(base))
    unreadable = Located(where, name, names.host(where), False, "")
    try:
        status = path.lstat()
    except FileNotFoundError:  # it was removed meanwhile
        return
    except OSError:
        yield unreadable
        return
    if stat.S_ISREG(status.st_mode) and names.is_packed(path.name):
        stamp = _stamp([("", status.st_size, status.st_mtime_ns)])
        yield Located(where, name, names.host(where), True, stamp)
    elif not stat.S_ISDIR(status.st_mode):
        return
    elif _is_capture(path):
        yield Located(where, name, names.host(where), False, _stamp(_files(path, left)))
    elif depth < _DEEPEST:
        try:
            with os.scandir(path) as entries:
                inner = sorted(Path(entry.path) for entry in entries if not entry.name.startswith("."))
        except OSError:
            yield unreadable
            return
        for each in inner:
            yield from _walk(each, base, left, depth + 1)


def _files(folder: Path, left: Iterator[int]) -> list[tuple[Any, ...]]:
    """Return what ``_stamp`` wants of a capture's files; those that can't be looked at are left out."""
    files: list[tuple[Any, ...]] = []
    for at, folders, inner in os.walk(folder):  # it follows no link
        for name in inner:
            try:
                status = os.lstat(os.path.join(at, name))  # noqa: PTH118  (there may be many thousands)
            except OSError:
                continue
            if len(files) == _MOST_OF_CAPTURE:
                return files
            files.append((os.path.relpath(at, folder), name, status.st_size, status.st_mtime_ns))
        folders[:] = folders if next(left, None) is not None else []
    return files


# ---- elsewhere --------------------------------------------------------------------------------------


def _far(place: str) -> Iterator[Located]:
    from fsspec.core import url_to_fs

    scheme = place.partition(_FAR)[0]
    try:
        fs, root = url_to_fs(place)
        if glob.has_magic(root):
            base = _fixed(root).rpartition("/")[0]
            tops = sorted(map(str, fs.glob(root)))
            listed = {path: about for top in tops for path, about in fs.find(top, detail=True).items()}
        else:
            base, listed = root.rstrip("/"), fs.find(root, detail=True)
    except ImportError as error:
        raise CwndtraceError(
            f"{scheme}:// needs Python packages that aren't installed: {clean(str(error))}",
            "install them where cwndtrace is, such as s3fs for s3:// and gcsfs for gs://",
        ) from error
    except Exception as error:  # whatever a library for a protocol raises
        cause = f"{clean(place)} can't be listed: {type(error).__name__}: {clean(str(error))[:400]}"
        raise CwndtraceError(cause, "check the address, and the credentials that its library takes") from error
    if len(listed) > MOST_FILES:
        raise CwndtraceError(f"{clean(place)} holds more than {MOST_FILES:,} files", "give a smaller folder")
    yield from _sorted(place, base, {path: about for path, about in listed.items() if path.startswith(base)})


def _sorted(place: str, base: str, listed: dict[str, dict[str, Any]]) -> Iterator[Located]:
    """Yield the captures among the files that a file system lists."""
    inner = [path for path in listed if "/." not in path.removeprefix(base)]
    folders = {path.rpartition("/")[0] for path in inner if path.rpartition("/")[2] == META}
    folders |= {
        above for path in inner for above in _above(path) if above.endswith(".cwnd") and len(above) >= len(base)
    }
    members: dict[str, list[str]] = {each: [] for each in folders if not _above(each) & folders}
    for path in inner:
        owner = next((above for above in _above(path) if above in members), None)
        if owner is not None:
            members[owner].append(path)
        elif names.is_packed(path):
            stamp = _far_stamp({"": listed[path]})
            yield Located(path, _below(base, path), names.host(path), True, stamp, place)
    for folder, paths in members.items():
        short = {path: path.removeprefix(f"{folder}/") for path in paths}
        stamp = _far_stamp({name: listed[path] for path, name in short.items()})
        files = tuple(
            (path, name) for path, name in short.items() if name == META or name.endswith((".parquet", ".raw"))
        )
        modified = _seconds(listed.get(f"{folder}/{META}", {}))
        name = _below(base, folder)
        yield Located(folder, name, names.host(folder), False, stamp, place, files=files, modified=modified)


def _below(base: str, path: str) -> str:
    return path.rpartition("/")[2] if path == base else path.removeprefix(f"{base}/")


def _above(path: str) -> set[str]:
    return {path[:at] for at, char in enumerate(path) if char == "/"}


def _far_stamp(about: dict[str, dict[str, Any]]) -> str:
    """Return the stamp of files by what is listed of each; empty if it doesn't tell when one of them changes."""
    marks = {
        name: [f"{key}={each[key]}" for key in _CHANGES if each.get(key) is not None] for name, each in about.items()
    }
    if not all(marks.values()):
        return ""
    return _stamp((name, about[name].get("size"), *mark) for name, mark in marks.items())


def _seconds(about: dict[str, Any]) -> float | None:
    """Return a file's time of modification as file systems tell it, in seconds since 1970; None where they don't."""
    for key in ("LastModified", "mtime", "last_modified"):
        value = about.get(key)
        if isinstance(value, datetime) and value.tzinfo is not None:
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
