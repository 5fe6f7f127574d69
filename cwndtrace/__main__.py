# SPDX-License-Identifier: Apache-2.0
"""``python -m cwndtrace``."""

from cwndtrace.cli import main

main(prog_name="cwndtrace")
