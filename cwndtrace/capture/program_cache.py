# SPDX-License-Identifier: Apache-2.0
"""Compiled BPF programs, and a folder that caches them between starts. This module doesn't use the compiler.

The compiler's output depends on the source text, the flags (which hold all offsets of the running kernel), the headers
and the compiler itself. The name of a cached image is the SHA-256 of all of these. A user who can write to the cache
can make the kernel run any program, so nothing is read from a folder or file that another user owns or may write to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path("/var/cache/cwndtrace")
_KEPT: Final = 64
_FORMAT: Final = 1


@dataclass(frozen=True)
class Map:
    """A BPF map; sizes in bytes. ``fields`` are those of a value's numpy dtype, empty where it is a plain number."""

    name: str
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Image:
    """Compiled programs by name. Their instructions have a map's index in ``maps`` in place of its descriptor."""

    programs: dict[str, bytes]
    maps: tuple[Map, ...]


def key(*parts: bytes) -> str:
    """Return the name of the image that is made from ``parts``."""
    digest = hashlib.sha256()
    for part in (str(_FORMAT).encode(), *parts):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def load(name: str, folder: Path = FOLDER) -> Image | None:
    """Return the image stored under ``name``; None where there is none, or none that can be trusted."""
    try:
        if not _ours(folder.lstat()):
            return None
        descriptor = os.open(folder / f"{name}.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not _ours(os.fstat(descriptor)):
                return None
            head, _, body = file.read().partition(b"\n")
        if head != hashlib.sha256(body).hexdigest().encode():
            return None
        return _decode(json.loads(body))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(name: str, image: Image, folder: Path = FOLDER) -> None:
    """Store ``image`` for the next start. If that fails, the next start compiles again."""
    body = json.dumps(_encode(image)).encode()
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _ours(folder.lstat()):
            return
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            Path(temporary).replace(folder / f"{name}.json")
        except OSError:
            Path(temporary).unlink()
            raise
        by_age = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-_KEPT]:
            old.unlink()


def _ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _encode(image: Image) -> dict[str, Any]:
    programs = {name: base64.b64encode(insns).decode() for name, insns in image.programs.items()}
    return {"programs": programs, "maps": [asdict(m) for m in image.maps]}


def _decode(value: dict[str, Any]) -> Image:
    programs = {name: base64.b64decode(text, validate=True) for name, text in value["programs"].items()}
    maps = tuple(Map(**{**m, "fields": tuple((name, kind) for name, kind in m["fields"])}) for m in value["maps"])
    return Image(programs, maps)
