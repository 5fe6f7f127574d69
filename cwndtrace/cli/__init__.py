# SPDX-License-Identifier: Apache-2.0
"""The command line: all printing and all exit codes are here."""

from __future__ import annotations

import sys
from typing import Any, Final

from cwndtrace import power

power.few_threads()  # before anything imports numpy or pyarrow

# isort: split

import click

import cwndtrace
from cwndtrace.cli.compare import compare
from cwndtrace.cli.doctor import doctor
from cwndtrace.cli.output import hold_standard
from cwndtrace.cli.plot import plot
from cwndtrace.cli.report import report
from cwndtrace.cli.reproduce import reproduce, serve
from cwndtrace.cli.run import run
from cwndtrace.errors import CwndtraceError, KernelLacks, UsageError
from cwndtrace.events import clean

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_KERNEL: Final = 77


class Commands(click.Group):
    """A group that turns the project's errors into one or two lines and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        hold_standard()
        try:
            return super().invoke(ctx)
        except CwndtraceError as e:
            click.echo(f"cwndtrace: {clean(e.cause)}", err=True)
            if e.remedy:
                click.echo(f"  {clean(e.remedy)}", err=True)
            sys.exit(exit_code(e))


def exit_code(error: CwndtraceError) -> int:
    """The exit code of an error."""
    if isinstance(error, KernelLacks):
        return EXIT_KERNEL
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cwndtrace.__version__, prog_name="cwndtrace")
def main() -> None:
    """Trace congestion-window resets and block I/O on any Linux kernel.

    \b
    Start here:
      sudo cwndtrace doctor
      sudo cwndtrace run --iface eth0
      sudo cwndtrace reproduce
    """


for command in (run, doctor, report, plot, compare, reproduce, serve):
    main.add_command(command)
