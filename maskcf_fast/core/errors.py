"""What a user can mend, told apart from bugs."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable

CONTINUES = "interrupted: the same command continues with what is missing"  # of commands that keep what is finished


class UserError(ValueError):
    """Settings, files or data that a user can mend; the text names the value and the remedy."""


class MissingLibraryError(ModuleNotFoundError, UserError):
    """A library that only a part of the package needs is not installed; the text has the command that installs it."""


def report_errors(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command; an error that a user can mend becomes one message and exit code 1.

    Everything else is a bug and keeps its traceback; with ``MASKCF_DEBUG=1`` every error does.
    """
    survive_encoding()
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError, ImportError) as error:
        if os.environ.get("MASKCF_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def survive_encoding() -> None:
    """Print a ? for what the terminal's encoding lacks, such as α, rather than stop."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
