"""How far long work is, for whoever watches: lines below what a command writes, gone when the work is done.

    progress.install()                                    # once, by a command; else nothing is ever shown
    with progress.shown("Audit of `drivers`") as meter:
        meter.say("looking at the newest rows")
        meter.update(done, total, "keys compared")

One process draws, some times a second. Those that it forks tell it by memory that all share, so tasks side by side have
a line each, and what any of them writes to stderr goes above the lines, whole. Work of less than `LONG_S` is not shown.
Where stderr is no terminal nothing is written at all, and `update` costs a comparison.
"""

from __future__ import annotations

import atexit
import json
import mmap
import multiprocessing
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass

from tqdm import tqdm
from tqdm.utils import disp_trim

from headrace.terminal import is_terminal, printable

LONG_S = 2.0
_TICK_S = 0.2
_PUBLISH_S = 0.05
_WIDEST = 120
_MOST_LINES = 8

_SLOTS = 256
_SLOT_BYTES = 512
_HEAD = struct.Struct("=II")  # process id, length
_ERASE = "\r\x1b[J"

Look = Callable[[], tuple[int, int]]


@dataclass
class Work:
    """What is known of some work at one moment.

    Attributes:
        label: what it is.
        text: what it does, where that is not counted.
        what: what is counted; empty while nothing is.
        done, total: how much of how much; a total of 0 is not known.
        initial: how much was done when counting began.
        begun_s, counted_s: when the work and the counting began, by the monotonic clock, which all processes share.
        updated_s: when the last count came. Between two counts the rate stays, and the time left runs down.
    """

    label: str
    text: str
    what: str
    done: int
    total: int
    initial: int
    begun_s: float
    counted_s: float
    updated_s: float

    def line(self, now_s: float, width: int, *, ascii_only: bool = False) -> str:
        """One line of at most `width` columns: how far, how fast, and how much longer it will take at that rate."""
        label = printable(f"{self.label}, {self.text}" if self.what and self.text else self.label)
        if not self.what:
            text = f"{label}: {printable(self.text) or 'works'}, {tqdm.format_interval(now_s - self.begun_s)}"
            return str(disp_trim(text, width))
        passed_s = self.updated_s - self.counted_s
        rate = (self.done - self.initial) / passed_s if passed_s > 0 else 0.0
        speed = f", {_speed(rate)}" if rate else ""
        if not self.total:
            count = f"{label}: {self.done:,} {printable(self.what)}{speed}"
            return str(disp_trim(f"{count}, {tqdm.format_interval(now_s - self.begun_s)}", width))
        count = f"{self.done:,} of {self.total:,} {printable(self.what)}{speed}"
        left_s = max(0.0, (self.total - self.done) / rate - (now_s - self.updated_s)) if rate else None
        left = f", {tqdm.format_interval(left_s)} left" if left_s is not None else ""
        # Its bar is as wide as the rest leaves room for.
        form = "{desc}: {percentage:3.0f}% |{bar}| {count}{left}"
        shown = min(self.done, self.total)
        line = tqdm.format_meter(
            shown, self.total, 0, ncols=width, prefix=label, bar_format=form, ascii=ascii_only, count=count, left=left
        )
        return str(disp_trim(line, width))


class Meter:
    """Tells of one piece of work. Not for several threads at once."""

    def __init__(self, label: str) -> None:
        now_s = time.monotonic()
        self._work = Work(label, "", "", 0, 0, 0, now_s, now_s, now_s)
        self._told_s = 0.0

    def say(self, text: str) -> None:
        """What it does now, which is not counted."""
        self._work.text, self._work.what = text, ""
        self._tell()

    def update(self, done: int, total: int | None, what: str, note: str = "") -> None:
        """How much of how much is done; None where the whole is not known. May be called as often as is easy."""
        if _board is None:
            return
        work = self._work
        work.updated_s = time.monotonic()
        if what != work.what or done < work.done:
            work.what, work.initial, work.counted_s = what, done, work.updated_s
        work.done, work.total, work.text = done, total or 0, note
        if not _board.is_mine and work.updated_s - self._told_s >= _PUBLISH_S:
            self._tell()

    def work(self) -> Work:
        """As it is now."""
        return self._work

    def _tell(self) -> None:
        if _board is not None and not _board.is_mine:
            self._told_s = time.monotonic()
            _board.publish(self._work)


class Counted:
    """Work that is counted elsewhere: what is drawn asks how far it is."""

    def __init__(self, label: str, what: str, look: Look) -> None:
        now_s = time.monotonic()
        done, total = look()
        self._work = Work(label, "", what, done, total, done, now_s, now_s, now_s)
        self._look = look

    def work(self) -> Work:
        """As it is now."""
        done, self._work.total = self._look()
        if done != self._work.done:
            self._work.done, self._work.updated_s = done, time.monotonic()
        return self._work


class Board:
    """The lines at the bottom of a terminal. A forked process takes no lock here, as a fork may leave one taken."""

    def __init__(self, descriptor: int, *, ascii_only: bool = False) -> None:
        self._owner = os.getpid()
        self._descriptor = descriptor
        self._ascii_only = ascii_only
        self._own: list[Meter | Counted] = []
        # A byte that says whether lines are there now, and then the slots of forked processes.
        self._shared = mmap.mmap(-1, mmap.PAGESIZE + _SLOTS * _SLOT_BYTES)
        self._drawn = ""
        self._ended = threading.Event()
        self._drawing = threading.Lock()  # of the process that draws only
        self.is_within_line = False

    @property
    def is_mine(self) -> bool:
        """Whether this process is the one that draws."""
        return os.getpid() == self._owner

    def begin(self) -> None:
        """Draw from now on, in a thread of its own."""
        threading.Thread(target=self._run, name="headrace-progress", daemon=True).start()

    def add(self, work: Meter | Counted) -> None:
        """Show some work of this process."""
        if self.is_mine:
            self._own.append(work)
        else:
            self.publish(work.work())

    def drop(self, work: Meter | Counted) -> None:
        """Show it no longer."""
        if not self.is_mine:
            self._shared[self._slot() : self._slot() + _HEAD.size] = bytes(_HEAD.size)
            return
        self._own.remove(work)
        self.draw()

    def publish(self, work: Work) -> None:
        """Tell the process that draws. What it reads half written it leaves out, once."""
        place = self._slot()
        room = _SLOT_BYTES - _HEAD.size
        content = json.dumps(astuple(work)).encode()
        if len(content) > room:  # a name of several hundred letters
            short = Work(work.label[:60], work.text[:60], work.what[:20], *astuple(work)[3:])
            content = json.dumps(astuple(short)).encode()[:room]
        self._shared[place : place + _HEAD.size] = bytes(_HEAD.size)
        self._shared[place + _HEAD.size : place + _HEAD.size + len(content)] = content
        self._shared[place : place + _HEAD.size] = _HEAD.pack(os.getpid(), len(content))

    def erase(self) -> str:
        """What takes the lines away, if there are any; whoever writes it stands where they began."""
        if not self._shared[0]:
            return ""
        self._shared[0] = 0
        return _ERASE

    def end(self) -> None:
        """Take the lines away, for good."""
        self._ended.set()
        if self.is_mine:
            is_free = self._drawing.acquire(timeout=_TICK_S)  # a handler of a signal may have interrupted its holder
            with suppress(OSError):
                os.write(self._descriptor, self.erase().encode())
            if is_free:
                self._drawing.release()

    def draw(self) -> None:
        """Bring the lines up to date. Writes nothing where they are."""
        if not self.is_within_line:
            with self._drawing:
                self._draw()

    def _draw(self) -> None:
        try:
            width, height = os.get_terminal_size(self._descriptor)
            lines = self._lines(min(width - 1, _WIDEST), min(height - 1, _MOST_LINES)) if self._is_seen() else []
            text = "\r\n".join(lines)
            if self._ended.is_set() or (text == self._drawn and bool(text) == bool(self._shared[0])):
                return
            up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
            erase = self.erase()
            self._drawn = text
            self._shared[0] = bool(text)
            os.write(self._descriptor, f"{erase}{text}{up}\r".encode(errors="replace") if text else erase.encode())
        except OSError:  # the terminal is gone
            self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(_TICK_S):
            self.draw()

    def _is_seen(self) -> bool:
        """Whether the command is in the foreground of its terminal."""
        try:
            return os.tcgetpgrp(self._descriptor) == os.getpgrp()
        except OSError:  # it is not the terminal of this session: nobody else's command runs there
            return True

    def _lines(self, width: int, most: int) -> list[str]:
        now_s = time.monotonic()
        works = [work.work() for work in self._own] + [work for _, work in sorted(self._others())]
        long = [work for work in works if now_s - work.begun_s >= LONG_S and not (work.what and _is_done(work))]
        return [work.line(now_s, width, ascii_only=self._ascii_only) for work in long[:most]] if width > 0 else []

    def _others(self) -> Iterator[tuple[float, Work]]:
        for place in range(mmap.PAGESIZE, len(self._shared), _SLOT_BYTES):
            pid, length = _HEAD.unpack(self._shared[place : place + _HEAD.size])
            if not pid:
                continue
            try:
                os.kill(pid, 0)
                content = json.loads(self._shared[place + _HEAD.size : place + _HEAD.size + length])
                work = Work(*content)
            except ProcessLookupError:
                self._shared[place : place + _HEAD.size] = bytes(_HEAD.size)
            except (ValueError, TypeError, PermissionError):
                continue
            else:
                yield work.begun_s, work

    def _slot(self) -> int:
        # Two processes alive at once with the same slot are so far apart that it does not matter.
        return mmap.PAGESIZE + os.getpid() % _SLOTS * _SLOT_BYTES


_board: Board | None = None


def install() -> None:
    """Have this process, a command, show how far its work is and that of the processes it forks. Idempotent.

    Nothing where stderr is no terminal, and in a process that was started by another one's `multiprocessing`.
    """
    global _board  # noqa: PLW0603 - a terminal is one
    if _board is not None or multiprocessing.parent_process() is not None or not is_terminal(sys.stderr):
        return
    try:
        descriptor = sys.stderr.fileno()
    except OSError:
        return
    board = _board = Board(descriptor, ascii_only="utf" not in (sys.stderr.encoding or "").lower())
    write = sys.stderr.write

    def above(text: str) -> int:
        board.is_within_line = not text.endswith("\n")
        return write(board.erase() + text)

    sys.stderr.write = above  # type: ignore[method-assign]
    atexit.register(board.end)
    board.begin()


def is_installed() -> bool:
    """Whether long work is shown."""
    return _board is not None


def end() -> None:
    """Take the lines away, for good; also from within a handler of a signal."""
    if _board is not None:
        _board.end()


@contextmanager
def shown(label: str) -> Iterator[Meter]:
    """Show some work while the block runs, once it takes long."""
    meter = Meter(label)
    if _board is None:
        yield meter
        return
    _board.add(meter)
    try:
        yield meter
    finally:
        _board.drop(meter)


def watch(label: str, what: str, look: Look) -> None:
    """Show work that other processes do, until this one ends or all is done.

    Args:
        look: how much of how much is done. Called from another thread, often: it must be quick, and take no lock.
    """
    if _board is not None:
        _board.add(Counted(label, what, look))


def _is_done(work: Work) -> bool:
    return 0 < work.total <= work.done


def _speed(rate: float) -> str:
    if rate < 1:
        return f"{1 / rate:.1f} s each"
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
