# SPDX-License-Identifier: Apache-2.0
"""The captures of many hosts: small frames of each, computed in parallel, and put together.

The package can be called: ``cwndtrace.fleet(PLACE)`` is ``cwndtrace.fleet.result.fleet(PLACE)``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cwndtrace.fleet.result import Fleet


class _Package(ModuleType):
    def __call__(self, *places: Any, **options: Any) -> Fleet:
        from cwndtrace.fleet.result import fleet

        return fleet(*places, **options)


# An import of any module of the package makes "fleet" in cwndtrace the package, whatever it was before.
sys.modules[__name__].__class__ = _Package
