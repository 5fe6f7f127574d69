# SPDX-License-Identifier: Apache-2.0
"""Every error that cwndtrace raises on purpose.

CwndtraceError              a cause and a remedy, both for a person
├── UsageError              what was asked for makes no sense as typed
├── PermissionNeeded        needs root
├── NotFound                an interface, process, namespace or cgroup isn't there
├── CaptureError            a capture can't be read or written
├── BccError                the bcc package is missing, wrong or failed
└── KernelLacks             this kernel can't do what is needed
    └── NoRung              no probe of the ladder works; carries what was tried
"""

from __future__ import annotations


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


class NoRung(KernelLacks):
    """No probe of the ladder works here; ``tried`` maps each rung to why it failed."""

    def __init__(self, cause: str, remedy: str, tried: dict[str, str]) -> None:
        super().__init__(cause, remedy)
        self.tried = tried
