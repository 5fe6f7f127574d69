# SPDX-License-Identifier: Apache-2.0
"""Packages of any Debian suite and architecture, downloaded and unpacked without being installed.

apt runs with separate lists, cache and sources for each suite, as in kernel-patches/build, so the system's apt never
uses them.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.harness.scripts import PATCHES, load_script

_BUILD: Final = load_script(PATCHES / "build")
locked: Final = _BUILD.locked


class Unavailable(Exception):
    """A package that couldn't be fetched; the text is the cause."""


def newest_fields(shown: str) -> dict[str, str]:
    """Return the fields of the first package in the output of apt-cache show, which is the newest."""
    first = shown.split("\n\n")[0]
    return dict(re.findall(r"^(\S+): (.*)$", first, re.MULTILINE))


def depends(fields: dict[str, str], pattern: str) -> list[str]:
    """Return the names of the packages that a package depends on and that match a pattern as a whole."""
    names = (part.split("|")[0].split("(")[0].strip() for part in fields.get("Depends", "").split(","))
    return [name for name in names if re.fullmatch(pattern, name)]


@dataclass
class Archive:
    """The suites of one Debian release, for an architecture. ``cache`` is the project's cache folder."""

    suites: tuple[str, ...]
    architecture: str
    cache: Path
    _stale: str = ""
    """Why the lists couldn't be updated."""

    @property
    def _folder(self) -> Path:
        return self.cache / "apt" / f"{self.suites[0]}-{self.architecture}"

    def _apt(self, *command: str, cwd: Path | None = None) -> str:
        state = self._folder
        options = {
            **{"Dir::State": state, "Dir::State::lists": state / "lists", "Dir::State::status": "/dev/null"},
            **{"Dir::Cache": state / "cache", "Dir::Etc::sourcelist": "/dev/null"},
            **{"Dir::Etc::sourceparts": state / "sources", "APT::Architecture": self.architecture},
            **{"APT::Architectures": self.architecture, "APT::Update::Error-Mode": "any"},
            **{"APT::Sandbox::User": "root", "Acquire::Languages": "none"},
        }
        flags = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        done = subprocess.run(
            [command[0], "-q", *flags, *command[1:]],
            cwd=cwd,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise Unavailable(f"{command[0]} {command[1]}: {(errors or [done.stderr.strip()])[0]}")
        return done.stdout

    def update(self) -> None:
        """Fetch the lists. If that fails, earlier lists are used where there are any."""
        state = self._folder
        for folder in (state / "lists/partial", state / "cache/archives/partial", state / "sources"):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(state / "lock"):
            lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
            texts = [path.read_text() for path in lists if path.is_file()]
            stanzas = [
                f"Types: deb\nURIs: {_BUILD.debian_mirror(texts, suite)}\nSuites: {suite}\nComponents: main\n"
                f"Signed-By: {_BUILD.KEYRING}\n"
                for suite in self.suites
            ]
            (state / "sources/debian.sources").write_text("\n".join(stanzas))
            try:
                self._apt("apt-get", "update")
            except Unavailable as e:
                self._stale = str(e)

    def fields(self, package: str) -> dict[str, str]:
        """Return the fields of a package's newest version. Raises Unavailable."""
        try:
            return newest_fields(self._apt("apt-cache", "show", package))
        except Unavailable as e:
            raise Unavailable(self._stale or str(e)) from e

    def unpack(self, packages: list[str], into: Path) -> None:
        """Download packages and unpack them into a folder. Raises Unavailable."""
        with locked(self._folder / "lock"), tempfile.TemporaryDirectory(dir=self._folder) as temporary:
            work = Path(temporary)
            self._apt("apt-get", "download", *packages, cwd=work)
            for deb in sorted(work.glob("*.deb")):
                subprocess.run(["dpkg-deb", "-x", str(deb), str(into)], check=True)
