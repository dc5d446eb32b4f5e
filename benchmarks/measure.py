"""One operation in a process of its own: a fresh interpreter, a clock around the operation alone, its peak memory.

The child (`serve`) prepares the operation, untimed, and runs it each time it is told to; the parent (`Worker`) tells it
and reads the figures. Parent and child talk in lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]

Answer = dict[str, Any]
"""What a run reports: `seconds` and `peak_bytes` at least, see `timed`."""

Operation = Callable[..., Callable[..., Answer]]
"""Prepares and returns what is to run; arguments of both are JSON."""


class MeasureError(Exception):
    """An operation failed or gave wrong data; no figure is worth printing."""


class Worker:
    """A child process with one operation prepared. The context ends it.

    Args:
        module: whose `__main__` calls `serve`.
        log: where its output goes.
        arguments: for the operation.
    """

    def __init__(self, module: str, operation: str, log: Path, **arguments: Any) -> None:
        self._name = operation
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, operation],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        self._tell(arguments)

    def run(self, **arguments: Any) -> Answer:
        """Run the operation once.

        Raises:
            MeasureError: it failed; the message has the end of its log.
        """
        return self._tell(arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._process.communicate()  # closes its input, upon which it ends

    def _tell(self, arguments: Mapping[str, Any]) -> Answer:
        assert self._process.stdin is not None  # noqa: S101 - Popen's types do not say that PIPE was asked for
        assert self._process.stdout is not None  # noqa: S101 - as above
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            tail = self._log.read_text(errors="replace")[-3_000:]
            raise MeasureError(f"`{self._name}` ended with {code}:\n{tail}")
        answer: Answer = json.loads(line)
        return answer


def serve(operations: Mapping[str, Operation]) -> None:
    """Be the child: prepare the operation named on the command line, then run it for each line of arguments."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print is no answer
        run: Callable[..., Answer] | None = None
        for line in sys.stdin:
            arguments = json.loads(line)
            if run is None:
                run = operations[sys.argv[1]](**arguments)
                answer: Answer = {}
            else:
                answer = run(**arguments)
            print(json.dumps(answer), file=channel, flush=True)


@contextlib.contextmanager
def timed(answer: Answer) -> Iterator[None]:
    """Put the seconds of a block, and the peak memory of this process at its end, into an answer."""
    begun = time.perf_counter()
    yield
    answer["seconds"] = time.perf_counter() - begun
    answer["peak_bytes"] = peak_bytes()


def peak_bytes() -> int:
    """The greatest resident memory of this process so far, interpreter and libraries included.

    Not `getrusage`: a child that its parent started by vfork inherits the parent's peak there.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise MeasureError("expected VmHWM in /proc/self/status; peak memory can be measured on Linux only")
    return int(found[1]) * 1024


@dataclass(frozen=True)
class Row:
    """One row of the table, formatted.

    Attributes:
        bound: what is asked of it.
        met: whether it holds; None where there is no bound.
        memory: peak memory of ours and of stock.
        runs: how many of ours and of stock the medians are of.
    """

    what: str
    ours: str
    stock: str
    ratio: str
    bound: str
    met: bool | None
    memory: str
    runs: str


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table whose columns are aligned."""
    heads = ("what", "ours", "stock Feast", "ratio", "bound", "met", "peak memory: ours, stock", "runs: ours, stock")
    words = {True: "yes", False: "**no**", None: ""}
    cells = [(r.what, r.ours, r.stock, r.ratio, r.bound, words[r.met], r.memory, r.runs) for r in rows]
    widths = [max(len(line[column]) for line in [heads, *cells]) for column in range(len(heads))]
    lines = [heads, tuple("-" * width for width in widths), *cells]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def machine() -> str:
    """The processor, its cores, the memory, the system and the Python."""
    processor = platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        processor = found[1] if found else processor
    return (
        f"{os.cpu_count()} cores of {processor}, {memory:.0f} GiB of memory, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
