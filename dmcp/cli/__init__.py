"""The command line: ``dmcp search | train | eval | inspect | bench | export | …``."""

from __future__ import annotations

import sys

from dmcp.errors import DmcpError, MissingDependencyError, require


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 after one line on stderr saying what is wrong.

    Args:
        arguments: the command line without the program's name, ``sys.argv`` by default.
    """
    try:
        for package in ("click", "rich"):
            require(package, "cli", "the command line")
    except MissingDependencyError as error:
        print(f"dmcp: {error}", file=sys.stderr)
        return 2
    import click

    from dmcp.cli.commands import commands

    given = sys.argv[1:] if arguments is None else arguments
    try:
        commands.main(given, prog_name="dmcp", standalone_mode=False, obj=given)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        print(f"dmcp: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    except (click.Abort, KeyboardInterrupt):
        print("dmcp: interrupted; the same command continues the run", file=sys.stderr)
        return 130
    except (DmcpError, OSError) as error:
        print(f"dmcp: {error}", file=sys.stderr)
        return 2
    return 0
