# SPDX-License-Identifier: Apache-2.0
"""The command line: all printing and all exit codes are here."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any, Final

from cwndtrace import privileges

privileges.limit_library_threads()  # before anything imports numpy or pyarrow

# isort: split

import click

import cwndtrace
from cwndtrace.cli import systemd, user
from cwndtrace.cli.output import reopen_std_fds
from cwndtrace.encoding import print_all
from cwndtrace.errors import CwndtraceError, KernelLacks, UsageError, for_lack_of_memory, too_many_files

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_KERNEL: Final = 77


COMMANDS: Final = {
    "compare": ("compare", "What a change did: one capture beside another."),
    "doctor": ("doctor", "What this kernel offers, and what mends each lack."),
    "plot": ("plot", "The picture of a capture."),
    "report": ("report", "What a capture means, and what to do."),
    "reproduce": ("reproduce", "What the setting costs on a long path."),
    "run": ("run", "Trace resets, a line each, and block I/O."),
    "serve": ("reproduce", "The far end of reproduce --against."),
}
"""Each command's module, imported only when the command is used, and what ``--help`` says of it."""

NEED_ROOT: Final = frozenset({"doctor", "reproduce", "run"})
"""All others give root's power up before their module is imported and their arguments are looked at."""


class Commands(click.Group):
    """A group that loads a command when it is used, and turns the project's errors into lines and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in NEED_ROOT:
            user.give_up_power()
        found: click.Command = getattr(import_module(f"cwndtrace.cli.{COMMANDS[cmd_name][0]}"), cmd_name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list in ``--help``, for which none is loaded."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(self, *args: Any, **options: Any) -> Any:
        """Run it all; what is wrong with the command line is printed before a command is invoked."""
        reopen_std_fds()
        print_all()
        systemd.take()
        return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        # What libraries say to programmers, of what a capture may hold; behind the filters that raise it in tests.
        warnings.simplefilter("ignore", append=True)
        try:
            return super().invoke(ctx)
        except CwndtraceError as e:
            sys.exit(explain(e))
        except Exception as e:
            if for_lack_of_memory(e):
                # Not by ``explain``, which imports more.
                click.echo("cwndtrace: Memory ran out.", err=True)
                click.echo("  Try again where more is free, or raise ulimit -v if one is set.", err=True)
                sys.exit(EXIT_FAILED)
            if not isinstance(e, OSError) or (limit := too_many_files(e)) is None:
                raise
            sys.exit(explain(limit))


def explain(error: CwndtraceError) -> int:
    """Say the cause and the cure; the exit code."""
    from cwndtrace.format import clean

    click.echo(f"cwndtrace: {clean(error.cause)}", err=True)
    if error.remedy:
        click.echo(f"  {clean(error.remedy)}", err=True)
    return exit_code(error)


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
