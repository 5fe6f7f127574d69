# SPDX-License-Identifier: Apache-2.0
"""Every error that cwndtrace raises on purpose.

CwndtraceError              a cause and a remedy, both for a person
├── UsageError              what was asked for makes no sense as typed
├── PermissionNeeded        needs root
├── NotFound                an interface, process, namespace or cgroup isn't there
├── CaptureError            a capture can't be read or written
├── BccError                the bcc package is missing, wrong or failed
└── KernelLacks             this kernel can't do what is needed
    └── NoRung              no probe works; carries what was tried
"""

from __future__ import annotations

import errno
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_NONSENSE: Final = (ArithmeticError, LookupError, ValueError)
"""What arithmetic on values that contradict each other raises. A TypeError or an AttributeError is a bug."""
_PACKAGE: Final = Path(__file__).parent


class CwndtraceError(Exception):
    """The base: ``cause`` says what is wrong, ``remedy`` what to do about it (may be empty)."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause}\n{remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy


class UsageError(CwndtraceError):
    """What was asked for makes no sense as typed."""


class PermissionNeeded(CwndtraceError):
    """The step needs root."""


class NotFound(CwndtraceError):
    """An interface, process, namespace or cgroup isn't there."""


class CaptureError(CwndtraceError):
    """A capture can't be read or written."""


class BccError(CwndtraceError):
    """The bcc package is missing, is another package of that name, or failed."""


class KernelLacks(CwndtraceError):
    """This kernel can't do what is needed."""


class NoProbe(KernelLacks):
    """No probe works here; ``tried`` maps each probe to why it failed."""

    def __init__(self, cause: str, remedy: str, tried: dict[str, str]) -> None:
        super().__init__(cause, remedy)
        self.tried = tried


MORE_FILES: Final = "raise the limit: ulimit -n 1024"


def too_many_files(error: OSError) -> CwndtraceError | None:
    """What to say of an error that comes from a limit of open files; None for any other one."""
    if error.errno == errno.ENFILE:
        return CwndtraceError("this machine has as many files open as it may", "raise the limit: sysctl fs.file-max")
    if error.errno != errno.EMFILE:
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CwndtraceError(f"this process may have {most:,} files open at once, which is too few", MORE_FILES)


@contextmanager
def making_sense() -> Iterator[None]:
    """As a decorator of what works on a capture's rows: what it raises where they make no sense is CaptureError.

    A capture may come from a stranger, and no check in front of the arithmetic could foresee all that numbers do.
    """
    import numpy as np  # only where rows are worked on, and then it is there

    try:
        # What is missing has no integer: numpy would make one up.
        with np.errstate(invalid="raise"):
            yield
    except CwndtraceError:
        raise
    except Exception as e:
        if for_lack_of_memory(e):
            raise out_of_memory() from e
        if not isinstance(e, _NONSENSE):
            raise
        ours = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).is_relative_to(_PACKAGE)]
        place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        cause = f"The rows of this capture make no sense together: {type(e).__name__}{place}."
        raise CaptureError(cause, "If cwndtrace wrote it and nobody changed it, report this line.") from e


def for_lack_of_memory(error: BaseException) -> bool:
    """Whether an error, whatever its type, says that there was no memory: for a value, a thread or a library."""
    texts = ("failed to map segment", "cannot allocate memory", "can't start new thread", "to launch worker thread")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def out_of_memory() -> CaptureError:
    """What to say where a capture's rows don't fit."""
    cause = "Memory ran out: this capture's rows need more than there is."
    return CaptureError(
        cause, "Read it where more is free, raise ulimit -v if one is set, or trace for a shorter time."
    )
