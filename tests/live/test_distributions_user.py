# SPDX-License-Identifier: Apache-2.0
"""``make test`` by a user without root, on a bare Debian 12 in UTF-8 and a bare Debian 13 in latin-1."""

from __future__ import annotations

import re

import pytest

from tests import chroot
from tests.live.test_distributions import CHECKOUT

USER = "newcomer"
CLONE = f"/home/{USER}/cwndtrace"
LATIN = "en_US.ISO-8859-1"

# What the user can't add: the distribution's packages that a capture needs, Python among them, and a locale.
PREPARE = f"""
tools/setup packages run
apt-get -q -y --no-install-recommends install locales
localedef -i en_US -f ISO-8859-1 {LATIN}
"""

pytestmark = [pytest.mark.chroot, pytest.mark.timeout(3000)]


@pytest.mark.parametrize(("suite", "locale", "characters"), [
    ("bookworm", "C.UTF-8", "UTF-8"),
    ("trixie", LATIN, "ISO-8859-1"),
])  # fmt: skip
def test_a_user_runs_the_tests(suite: str, locale: str, characters: str) -> None:
    missing = chroot.missing_tools()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: sudo make test-distributions installs it")
    with chroot.unpacked(suite) as root:
        chroot.clone_checkout(CHECKOUT, root, CLONE)
        for command in (
            ("sh", "-ec", PREPARE),
            ("useradd", "--shell", "/bin/sh", USER),
            ("chown", "-R", f"{USER}:", f"/home/{USER}"),
        ):
            done = root.run(*command, cwd=CLONE)
            assert done.returncode == 0, done.stdout
        as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        as_user += ["env", f"HOME=/home/{USER}", f"USER={USER}", f"LC_ALL={locale}"]
        assert root.run(*as_user, "locale", "charmap").stdout == f"{characters}\n"
        done = root.run(*as_user, "make", "test", cwd=CLONE, timeout=2700)
    assert done.returncode == 0, done.stdout
    print(done.stdout)
    passed, skipped = re.findall(r"(\d+) passed, (\d+) skipped, ", done.stdout)[-1]
    assert int(passed) > 10 * int(skipped)
    for reason in re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", done.stdout, re.MULTILINE):
        assert re.match(r"needs \S.*: \S", reason), reason
