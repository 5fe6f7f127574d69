# SPDX-License-Identifier: Apache-2.0
"""The process without privileges that writes the report of ``reproduce`` and draws its pictures.

Only ``reproduce`` starts it, as ``python -I -m cwndtrace.cli.measured``, because ``reproduce`` itself keeps root's
privileges to its end. The user may have changed the files that this process reads, and the libraries that read and draw
them are large.
"""

from __future__ import annotations

import signal
import sys

from cwndtrace.cli import explain, user
from cwndtrace.encoding import print_all
from cwndtrace.errors import CwndtraceError


def main() -> None:
    """Drop all privileges, then report and draw."""
    print_all()
    # The parent reports a Ctrl-C; this process just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        user.drop_privileges()
        from cwndtrace.cli.reproduce import measured

        measured()
    except CwndtraceError as e:
        sys.exit(explain(e))


if __name__ == "__main__":
    main()
