# SPDX-License-Identifier: Apache-2.0
"""Every error that cwndtrace raises on purpose.

CwndtraceError              the base, with a cause and a remedy for people
├── UsageError              the arguments make no sense as given
├── PermissionNeeded        the step needs root
├── NotFound                an interface, process, namespace or cgroup isn't there
├── CaptureError            a capture can't be read or written
├── BccError                the bcc package is missing, wrong or failed
└── KernelLacks             this kernel can't do what is needed
    └── NoProbe             no probe works; carries the reason for each
"""

from __future__ import annotations

import errno
import importlib.util
import resource
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_CONTRADICTIONS: Final = (ArithmeticError, LookupError, ValueError)
"""The errors that values raise when they contradict each other. A TypeError or an AttributeError is a bug."""
_PACKAGE: Final = Path(__file__).parent


class CwndtraceError(Exception):
    """The base class. ``cause`` says what is wrong, ``remedy`` what to do about it; it may be empty."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause}\n{remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy


class UsageError(CwndtraceError):
    """The arguments make no sense as given."""


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
    """No probe works on this kernel; ``tried`` maps each probe to the reason why it failed."""

    def __init__(self, cause: str, remedy: str, tried: dict[str, str]) -> None:
        super().__init__(cause, remedy)
        self.tried = tried


def need(module: str, extra: str, what: str) -> None:
    """Raise CwndtraceError where ``module`` isn't installed; ``what`` needs it, and the ``extra`` of the package."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pip = f"{sys.executable} -I -m pip install 'cwndtrace[{extra}]'"
        raise CwndtraceError(
            f"{what} needs Python packages that aren't installed",
            f"in a checkout: sudo make install EXTRAS={extra}; elsewhere: {pip}",
        )


MORE_FILES: Final = "raise the limit: ulimit -n 1024"


def too_many_files(error: OSError) -> CwndtraceError | None:
    """Return the error to raise where ``error`` comes from a limit on open files; None where it doesn't."""
    if error.errno == errno.ENFILE:
        return CwndtraceError("this machine has reached its limit on open files", "raise the limit: sysctl fs.file-max")
    if error.errno != errno.EMFILE:
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CwndtraceError(f"this process may have {most:,} files open at once, which is too few", MORE_FILES)


@contextmanager
def making_sense() -> Iterator[None]:
    """Turn errors that contradictory rows cause into CaptureError, in a ``with`` block or a decorated function.

    A capture may be untrusted, and no check beforehand could foresee every result of arithmetic on its numbers.
    """
    import numpy as np  # functions that compute with rows have loaded it already; other commands start faster without

    try:
        # numpy would convert a missing value (NaN) to an arbitrary integer.
        with np.errstate(invalid="raise"):
            yield
    except CwndtraceError:
        raise
    except Exception as e:
        if for_lack_of_memory(e):
            raise out_of_memory() from e
        if not isinstance(e, _CONTRADICTIONS):
            raise
        ours = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).is_relative_to(_PACKAGE)]
        place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        cause = f"The rows of this capture make no sense together: {type(e).__name__}{place}."
        raise CaptureError(cause, "If cwndtrace wrote it and nobody changed it, report this line.") from e


def for_lack_of_memory(error: BaseException) -> bool:
    """Return True if an error, whatever its type, says that memory ran out for a value, a thread or a library."""
    texts = ("failed to map segment", "cannot allocate memory", "can't start new thread", "to launch worker thread")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def out_of_memory() -> CaptureError:
    """Return the error to raise where a capture's rows don't fit in memory."""
    cause = "Memory ran out: this capture's rows need more than is available."
    return CaptureError(
        cause, "Read it where more is free, raise ulimit -v if one is set, or trace for a shorter time."
    )
