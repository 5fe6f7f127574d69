# SPDX-License-Identifier: Apache-2.0
"""The entry point of the command ``cwndtrace`` and of ``python -I -m cwndtrace``."""

import os
import sys

# This comes before every import that a module in the current folder could replace.
if __name__ == "__main__" and os.geteuid() == 0 and not sys.flags.safe_path:
    sys.exit(
        "cwndtrace: python -m imports modules from the current folder first, which isn't safe for root.\n"
        f"  Run {sys.executable} -I -m cwndtrace, or the command cwndtrace."
    )


def main() -> None:
    """Run the command line on sys.argv."""
    from cwndtrace import isolated

    isolated.begin()
    from cwndtrace.cli import main as command_line

    command_line(prog_name="cwndtrace")


if __name__ == "__main__":
    main()
