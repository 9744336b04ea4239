"""Errors that end a start: one line that names the value and the remedy, never a traceback."""

from __future__ import annotations

import sys
from typing import NoReturn

EXIT_CODE = 2  # argparse's own code for a wrong command line


class StartupError(ValueError):
    """The spherical cache cannot serve what was asked for.

    Raise it anywhere between argument parsing and the end of `Scheduler.__init__`, in any process.
    On the command line the user sees one `error: …` line and exit code 2; from `sglang.Engine` it
    arrives as this exception. Nothing is left running either way
    (`spherical_patches.startup` carries it from the workers to the launching process).
    """


def one_line(error: BaseException) -> str:
    """The message of `error` with every run of white space made one space."""
    return " ".join(str(error).split()) or type(error).__name__


def print_error(error: BaseException) -> None:
    """Write `error: <message>` as one line to stderr."""
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)


def exit_with(error: BaseException) -> NoReturn:
    """End the process from its main thread with one line and `EXIT_CODE`. Raises SystemExit."""
    print_error(error)
    raise SystemExit(EXIT_CODE)
