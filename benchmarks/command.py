"""The command that every benchmark is: what may be asked for, a folder for the time, tables printed and written."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import MeasureError, measured, write_between


@dataclass(frozen=True)
class Asked:
    """What a call asks for.

    Attributes:
        folder: for everything; removed afterwards.
        only: the rows, in the order of the benchmark.
        runs: of each.
        scale: of the loads; the bounds are meant for 1.
        begun_s: on the clock of `time.monotonic`.
    """

    folder: Path
    only: Sequence[str]
    runs: int
    scale: float
    begun_s: float

    def measured(self, servers: str, packages: Sequence[str]) -> str:
        """See `benchmarks.measure.measured`."""
        return measured(self.scale, time.monotonic() - self.begun_s, servers, packages)


def command(
    name: str,
    about: str,
    measure: Callable[[Asked], Mapping[str, str]],
    *,
    rows: Sequence[str] = (),
    runs: int | None = None,
) -> int:
    """Measure what the command line asks for, print the tables, and return the exit code.

    Args:
        name: of the module.
        measure: returns Markdown by the name of the markers between which `--write` puts it.
        rows: that may be chosen; none is no choice.
        runs: of each row, by default; None is no choice.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    if rows:
        parser.add_argument("--only", nargs="+", choices=rows, default=rows, help="which rows; all of them")
    if runs is not None:
        parser.add_argument("--runs", type=int, default=runs, help=f"of each row that is a median; {runs}")
    parser.add_argument("--scale", type=float, default=1.0, help="of the loads; 1")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between the markers of a file")
    parser.set_defaults(only=rows, runs=1 if runs is None else runs)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers and data go too
    folder = Path(tempfile.mkdtemp(prefix=f"headrace-{name}-"))
    only = [row for row in rows if row in chosen.only]
    try:
        for markers, text in measure(Asked(folder, only, chosen.runs, chosen.scale, time.monotonic())).items():
            print(f"\n{text}")
            if chosen.write is not None:
                write_between(chosen.write, markers, text)
    except MeasureError as error:
        print(f"benchmarks.{name}: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0
