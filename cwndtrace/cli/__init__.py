# SPDX-License-Identifier: Apache-2.0
"""The command line. This package does all printing and sets all exit codes."""

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
    "compare": ("compare", "Compare two captures, before and after a change."),
    "doctor": ("doctor", "Check what this kernel supports, and what it lacks."),
    "dump": ("dump", "Make a capture of a span of another, also of a running one."),
    "export": ("export", "Write a capture in the formats of other tools."),
    "fleet": ("fleet", "Report on the captures of many hosts."),
    "plot": ("plot", "Draw the timeline of a capture."),
    "report": ("report", "Report whether resets mattered, why, and what to do."),
    "reproduce": ("reproduce", "Measure what resets after idle time cost on a long path."),
    "run": ("run", "Trace resets and block I/O, and write a capture."),
    "serve": ("reproduce", "Serve as the far end of reproduce --against."),
    "top": ("top", "Watch a trace while it runs."),
}
"""The module of each command, which is imported only when the command is used, and its text in ``--help``."""

NEED_ROOT: Final = frozenset({"doctor", "reproduce", "run", "top"})
"""The commands that need root, ``top`` only where it starts a trace: it drops root's privileges itself. All others drop
them before their module is imported and their arguments are parsed."""


class Commands(click.Group):
    """A command group that loads each command on first use, and turns errors into messages and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return the command with this name, or None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in NEED_ROOT:
            user.drop_privileges()
        command: click.Command = getattr(import_module(f"cwndtrace.cli.{COMMANDS[cmd_name][0]}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands in ``--help``, without loading any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(self, *args: Any, **options: Any) -> Any:
        """Prepare the standard streams and the environment, then parse the command line and run the command.

        Errors in the command line are printed before ``invoke`` is called, so the streams are prepared here.
        """
        reopen_std_fds()
        print_all()
        systemd.take()
        return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print its error and exit if it raises one."""
        # Libraries warn programmers about values that a capture may hold. The tests' filters, which raise these
        # warnings, stay in front.
        warnings.simplefilter("ignore", append=True)
        try:
            return super().invoke(ctx)
        except CwndtraceError as e:
            sys.exit(explain(e))
        except Exception as e:
            if for_lack_of_memory(e):
                # explain() imports another module, for which there may be no memory.
                click.echo("cwndtrace: Memory ran out.", err=True)
                click.echo("  Free some memory and try again, or raise ulimit -v if one is set.", err=True)
                sys.exit(EXIT_FAILED)
            if not isinstance(e, OSError) or (limit := too_many_files(e)) is None:
                raise
            sys.exit(explain(limit))


def explain(error: CwndtraceError) -> int:
    """Print the cause and the remedy of an error on stderr, and return its exit code."""
    from cwndtrace.format import clean

    click.echo(f"cwndtrace: {clean(error.cause)}", err=True)
    if error.remedy:
        click.echo(f"  {clean(error.remedy)}", err=True)
    return exit_code(error)


def exit_code(error: CwndtraceError) -> int:
    """Return the exit code of an error."""
    if isinstance(error, KernelLacks):
        return EXIT_KERNEL
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cwndtrace.__version__, prog_name="cwndtrace")
def main() -> None:
    """Record TCP congestion-window resets and block I/O, and report what the resets cost.

    "cwndtrace COMMAND --help" lists the options of a command.

    \b
    Examples:
      sudo cwndtrace doctor             # check what this kernel supports
      sudo cwndtrace run --iface eth0   # trace until Ctrl-C
      sudo cwndtrace reproduce          # measure what resets cost on a long path
    """
