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


class ReportedError(UserError):
    """An error that another process of the run has told the user of already."""


class Stopped(Exception):
    """A run ended where a signal asked it to, and can be continued.

    Attributes:
        code: What the process exits with: 75 (EX_TEMPFAIL: run the same again) or, after Ctrl-C, 130.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


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
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == __name__.partition(".")[0]:
            raise  # an import within this package
        if os.environ.get("MASKCF_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        if not isinstance(error, ReportedError):
            print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if text := str(stopped):
            print(text, file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def survive_encoding() -> None:
    """Print a ? for what the terminal's encoding lacks, such as α, rather than stop."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
