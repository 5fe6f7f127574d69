# SPDX-License-Identifier: Apache-2.0
"""The command ``cwndtrace``, and ``python -I -m cwndtrace``."""

import os
import sys

# Before anything is imported that the current folder could have in its place.
if __name__ == "__main__" and os.geteuid() == 0 and not sys.flags.safe_path:
    sys.exit(
        "cwndtrace: with -m alone Python takes modules from the current folder first, which root must not.\n"
        f"  Type {sys.executable} -I -m cwndtrace, or the command cwndtrace."
    )


def main() -> None:
    """Run the command line on sys.argv."""
    from cwndtrace import isolated

    isolated.begin()
    from cwndtrace.cli import main as command_line

    command_line(prog_name="cwndtrace")


if __name__ == "__main__":
    main()
