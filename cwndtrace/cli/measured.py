# SPDX-License-Identifier: Apache-2.0
"""What ``reproduce`` says and draws in the end, as a process that has no power.

``python -I -m cwndtrace.cli.measured``, started by ``reproduce`` alone, which has root's power to the last: what this
one reads, the user may have changed, and what it reads and draws with is much code.
"""

from __future__ import annotations

import signal
import sys

from cwndtrace.cli import explain, user
from cwndtrace.encoding import print_all
from cwndtrace.errors import CwndtraceError


def main() -> None:
    """Give the power up, and then go on."""
    print_all()
    # A Ctrl-C is for the parent to explain.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        user.give_up_power()
        from cwndtrace.cli.reproduce import measured

        measured()
    except CwndtraceError as e:
        sys.exit(explain(e))


if __name__ == "__main__":
    main()
