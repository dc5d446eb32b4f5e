"""A command at a real pseudo-terminal, and what a person sees there from one moment to the next."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyte


@dataclass
class Seen:
    """What came of a command.

    Attributes:
        code: its exit code.
        stdout: what it wrote there, through a pipe.
        raw: what it wrote to the terminal, with control characters.
        frames: what was on the screen, each time that it changed, lines without trailing spaces.
        screen: the lines of the whole history, as they stay.
    """

    code: int = 0
    stdout: str = ""
    raw: str = ""
    frames: list[str] = field(default_factory=list)
    screen: list[str] = field(default_factory=list)

    def first(self, text: str) -> str:
        """The first frame that shows a text."""
        return next((frame for frame in self.frames if text in frame), "")


def _own_terminal() -> None:
    """In the new process; where the tests run in the background it would else ignore Ctrl-C."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def at_terminal(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    cwd: Path | None = None,
    columns: int = 110,
    rows: int = 40,
    timeout_s: float = 120,
    kill_at: str | None = None,
) -> Seen:
    """Run a command whose stderr is a terminal, in a session of its own, until it ends.

    Args:
        kill_at: send Ctrl-C as soon as a frame shows this.

    Raises:
        TimeoutError: it took too long; it was killed.
    """
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    reading, writing = os.pipe()
    process = subprocess.Popen(
        list(command),
        cwd=cwd,
        env={"TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
        stdin=secondary,
        stdout=writing,
        stderr=secondary,
        start_new_session=True,
        preexec_fn=_own_terminal,  # noqa: PLW1509 - Ctrl-C reaches only whose terminal it is
    )
    os.close(secondary)
    os.close(writing)
    seen = Seen()
    screen = pyte.HistoryScreen(columns, rows, history=10_000)
    stream = pyte.ByteStream(screen)
    end = time.monotonic() + timeout_s
    raw, stdout = bytearray(), bytearray()
    open_ones = {primary, reading}
    try:
        while open_ones:
            if time.monotonic() > end:
                raise TimeoutError(f"{command} took longer than {timeout_s} s:\n{raw.decode(errors='replace')}")
            for descriptor in select.select(list(open_ones), [], [], 0.5)[0]:
                try:
                    piece = os.read(descriptor, 65_536)
                except OSError:  # the last process that had the terminal is gone
                    piece = b""
                if not piece:
                    open_ones.discard(descriptor)
                elif descriptor == reading:
                    stdout += piece
                else:
                    raw += piece
                    stream.feed(piece)
                    frame = "\n".join(line.rstrip() for line in screen.display).rstrip()
                    seen.frames.append(frame)
                    if kill_at is not None and kill_at in frame:
                        kill_at = None
                        os.write(primary, b"\x03")
        seen.code = process.wait(10)
    finally:
        process.kill()
        process.wait()
        os.close(primary)
        os.close(reading)
    above = ["".join(line[column].data for column in range(columns)).rstrip() for line in screen.history.top]
    seen.screen = above + [line.rstrip() for line in screen.display]
    seen.raw, seen.stdout = raw.decode(errors="replace"), stdout.decode(errors="replace")
    return seen
