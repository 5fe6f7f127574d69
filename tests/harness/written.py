# SPDX-License-Identifier: Apache-2.0
"""Files as container runtimes and kubelet leave them, for as long as a test runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written(files: dict[str, Any]) -> Iterator[None]:
    """Write files, and delete them and the folders made for them on exit."""
    made: list[Path] = []
    try:
        for name, content in files.items():
            file = Path(name)
            assert not file.exists()
            made += [folder for folder in reversed(file.parents) if not folder.exists()]
            file.parent.mkdir(parents=True, exist_ok=True)
            made.append(file)
            file.symlink_to(content) if isinstance(content, Path) else file.write_text(json.dumps(content))
        yield
    finally:
        for path in reversed(made):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
