# SPDX-License-Identifier: Apache-2.0
"""Names of captures and hosts from outside, made safe for use as names of files."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import quote, unquote

from cwndtrace.format import clean
from cwndtrace.store.parquet_limits import UnsafeFile

PACKED: Final = {".cwnd.tar": None, ".cwnd.tar.gz": "gzip", ".cwnd.tgz": "gzip", ".cwnd.tar.zst": "zstd"}
"""The endings of packed captures, with Arrow's names of their compression."""

_HOST: Final = "host="
_MOST_NAME: Final = 255  # NAME_MAX of Linux, bytes
_MOST_HOST: Final = 160
_DEEPEST: Final = 4


def compression(name: str) -> str | None:
    """Return the compression of a packed capture by its name. Raises KeyError for another name."""
    return PACKED[next((end for end in PACKED if name.endswith(end)), name)]


def unpacked(name: str) -> str:
    """Return the name of the folder that a packed capture of this name is made of."""
    end = next((end for end in PACKED if name.endswith(end)), "")
    return f"{name.removesuffix(end)}.cwnd" if end else name


def is_packed(name: str) -> bool:
    """Return whether a file of this name is a packed capture."""
    return name.endswith(tuple(PACKED))


def host(path: str) -> str:
    """Return the host that a folder host=NAME in ``path`` names, the innermost one; empty where none does."""
    # The listings of web servers have = as %3D.
    parts = [part if part.startswith(_HOST) else unquote(part) for part in PurePosixPath(path).parts[:-1]]
    named = [part for part in parts if part.startswith(_HOST)]
    return unquote(named[-1].removeprefix(_HOST)) if named else ""


def folder(host: str) -> str:
    """Return the name of a host's folder in a result. It is one safe name whatever the host is called."""
    name = quote(host, safe="")
    if len(name) > _MOST_HOST:
        name = f"{name[:_MOST_HOST]}~{_digest(host)}"
    return _HOST + name


def shown(capture: str, most: int) -> str:
    """Return the name of a capture with ``most`` printable characters at most, and another one for each name."""
    plain = clean(capture)
    return plain if plain == capture and len(plain) <= most else f"{plain[: most - 33]}~{_digest(capture)}"


def file(capture: str) -> str:
    """Return the name of a capture's files in a result."""
    return f"{_digest(capture)}.parquet"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def inside(name: str) -> PurePosixPath:
    """Return ``name`` as a path below a folder. Raises UnsafeFile for one that could lead out of it."""
    path = PurePosixPath(name)
    parts = [part for part in path.parts if part != "."]
    if path.is_absolute() or ".." in parts or len(parts) > _DEEPEST or "\0" in name or "\\" in name:
        raise UnsafeFile("it holds a name that leads out of the capture")
    if any(len(part.encode("utf-8", "surrogateescape")) > _MOST_NAME for part in parts):
        raise UnsafeFile("it holds a name that is too long")
    return PurePosixPath(*parts)
