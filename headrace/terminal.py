"""What a person at a terminal reads of a command: one line of what is wrong, in colour only where colour is shown.

Everywhere else, in a log or a pipe, the same line without a control character.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

from headrace.errors import HeadraceError

_RED, _PLAIN = "\x1b[31m", "\x1b[0m"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads the stream on a screen that can move its cursor."""
    return stream is not None and not stream.closed and stream.isatty() and os.environ.get("TERM", "") != "dumb"


def red(text: str, stream: TextIO | None) -> str:
    """The text, in red if the stream is a terminal and `NO_COLOR` is not set."""
    return f"{_RED}{text}{_PLAIN}" if is_terminal(stream) and not os.environ.get("NO_COLOR") else text


def printable(text: str) -> str:
    """Text of any origin in one line without a control character."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def say_error(error: BaseException | str) -> None:
    """Write `error: ` and the message to stderr, in one line."""
    sys.stderr.write(f"{red('error:', sys.stderr)} {printable(str(error))}\n")
    sys.stderr.flush()


def is_command(name: str) -> bool:
    """Whether this process is the command of a host, as its package installs it or by `python -m`."""
    path = Path(sys.argv[0] if sys.argv else "")
    return path.stem == name or (path.parent.parent.name == name and path.name in {"cli.py", "__main__.py"})


def say_errors_of_feast() -> None:
    """Make a `feast` command end with one line, and exit code 1 as before, where an error of ours ends it.

    For the plug-ins, which have no command line of their own. Any other process, and any other error, is left alone.
    """
    if is_command("feast") and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _say_ours


def _say_ours(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, HeadraceError):
        say_error(error)
    else:
        sys.__excepthook__(kind, error, trace)
