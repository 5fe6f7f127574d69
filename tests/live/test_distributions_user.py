# SPDX-License-Identifier: Apache-2.0
"""Tests of ``make test`` by a user without root, on a bare Debian 12 in UTF-8 and a bare Debian 13 in latin-1.

With CWNDTRACE_NEWCOMER=1 each runs in the other's locale too. The roots are separate, because packages that other tests
install would change which tests run and which are skipped.
"""

from __future__ import annotations

import os
import re

import pytest

from tests.harness import chroot

USER = "newcomer"
CLONE = f"/home/{USER}/cwndtrace"
LATIN = "en_US.ISO-8859-1"

pytestmark = [pytest.mark.chroot, pytest.mark.timeout(3000)]


SWAPPED = pytest.mark.skipif(
    "CWNDTRACE_NEWCOMER" not in os.environ, reason="runs all tests again: CWNDTRACE_NEWCOMER=1 make test-users"
)


@pytest.mark.parametrize(("suite", "locale", "characters"), [
    ("bookworm", "C.UTF-8", "UTF-8"),
    ("trixie", LATIN, "ISO-8859-1"),
    pytest.param("bookworm", LATIN, "ISO-8859-1", marks=SWAPPED),
    pytest.param("trixie", "C.UTF-8", "UTF-8", marks=SWAPPED),
])  # fmt: skip
def test_the_unit_tests_pass_for_a_user(suite: str, locale: str, characters: str) -> None:
    chroot.need_tools()
    with chroot.cloned(suite) as root:
        # The user can't install the distribution's packages that a capture needs, such as Python, nor a locale.
        root.good("tools/setup", "packages", "run", cwd=chroot.CLONE)
        if locale == LATIN:
            root.add("locales")
            root.good("localedef", "-i", "en_US", "-f", "ISO-8859-1", LATIN)
        root.good("useradd", "--create-home", "--shell", "/bin/sh", USER)
        chroot.clone(root, CLONE, USER)
        as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        as_user += ["env", f"HOME=/home/{USER}", f"USER={USER}", f"LC_ALL={locale}"]
        assert root.good(*as_user, "locale", "charmap") == f"{characters}\n"
        output = root.good(*as_user, "make", "test", cwd=CLONE, timeout=2700)
    print(output)
    passed, skipped = re.findall(r"(\d+) passed, (\d+) skipped", output)[-1]
    assert int(passed) > 10 * int(skipped)
    for reason in re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", output, re.MULTILINE):
        assert re.match(r"needs \S.*: \S", reason), reason
