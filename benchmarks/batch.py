"""Speed and memory of the batch chain, beside pandas where it could do the same, on this machine, in the same run.

    python -m benchmarks.batch [--only ingest ...] [--runs 3] [--scale 1.0] [--write docs/explanation/benchmarks.md]

A real PostgreSQL holds the table. `ingest` and `clean` time what the tasks do, in processes of their own that take
turns with pandas; `empty-day` and `backfill` run the literal `luigi` commands. Figures are medians. What both sides
made is compared: wrong data end the run. `--scale` makes everything smaller, to try things; the bounds are meant for 1.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import redis

from batch.ledger import Ledger
from benchmarks.command import Asked, command
from benchmarks.measure import (
    GIB,
    MILLION,
    ROOT,
    Answer,
    MeasureError,
    Worker,
    median_of,
    redis_program,
    seconds,
    short,
    table,
    words_of,
)
from headrace.segments import DayName, parse_name
from tests.servers import Postgres, Valkey, environment, feast_apply

VIEW = TABLE = "trips"
DAY = date(2026, 3, 10)
YEAR_BEGINS = date(2025, 1, 1)
DAYS, ROWS_A_DAY, KEYS = 365, 50_000, 20_000
BULK = 10 * MILLION
HEADS = ("what", "ours", "pandas", "ratio", "bound", "met", "peak memory: ours, pandas", "runs: ours, pandas")
PACKAGES = ("feast", "luigi", "pyarrow", "pandas", "sqlalchemy", "psycopg")
SAMPLED_S = 0.2

DEFINITIONS = """
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Float32, Float64, Int32, Int64

trip = Entity(name="trip", join_keys=["trip_id"], value_type=ValueType.INT64)
trips = FeatureView(
    name="trips", entities=[trip], tags={"source_table": "trips"},
    source=FileSource(
        name="trips_history", path="../data/offline/trips", file_format=ParquetFormat(),
        timestamp_field="happened", created_timestamp_column="made",
    ),
    schema=[
        Field(name="trip_id", dtype=Int64),
        Field(name="fare", dtype=Float32, tags={"ge": "0", "le": "1000"}),
        Field(name="distance_km", dtype=Float64, tags={"ge": "0", "le": "1000"}),
        Field(name="passengers", dtype=Int32),
    ],
)
"""

FEATURE_STORE = """
project: bench
provider: local
registry: {{registry_type: sql, path: "sqlite:///../data/registry.db"}}
offline_store: {{type: headrace.offline.HeadraceOfflineStore}}
online_store: {{type: headrace.redis.HeadraceRedisOnlineStore, connection_string: "{address},db=0"}}
batch_engine: {{type: headrace.engine.HeadraceEngine}}
entity_key_serialization_version: 3
"""

MAKE_TABLE = """
DROP TABLE IF EXISTS trips;
CREATE UNLOGGED TABLE trips (
    trip_id bigint, fare double precision, distance_km double precision, passengers integer,
    happened timestamptz, made timestamptz
)
"""

# One row in a hundred breaks a rule, and one in a hundred repeats the key and time of its neighbour.
FILL_TABLE = """
INSERT INTO trips
SELECT (n * 7919) %% %(keys)s,
       CASE WHEN n %% 100 = 50 THEN -1 ELSE (n %% 9973) / 10.0 END,
       CASE WHEN n %% 1000 = 7 THEN NULL ELSE (n %% 99991) / 100.0 END,
       n %% 7,
       %(day)s + (n * %(step)s) * interval '1 microsecond',
       %(day)s + (n * %(step)s) * interval '1 microsecond' + interval '1 second'
FROM (SELECT i - CASE WHEN i %% 100 = 99 THEN 1 ELSE 0 END AS n FROM generate_series(0::bigint, %(rows)s - 1) AS i) AS s
"""


@dataclass(frozen=True)
class Row:
    """One row of the table, formatted; `met` is None where there is no bound."""

    what: str
    ours: str
    pandas: str
    ratio: str
    bound: str
    met: bool | None
    memory: str
    runs: str

    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        return (
            self.what,
            self.ours,
            self.pandas,
            self.ratio,
            self.bound,
            words_of(self.met),
            self.memory,
            self.runs,
        )


class Bench:
    """Where the servers and the data are, and how often and how large things run."""

    def __init__(self, folder: Path, postgres: Postgres, valkey: Valkey, runs: int, scale: float) -> None:
        self.folder, self.postgres, self.valkey = folder, postgres, valkey
        self.runs, self.scale = runs, scale
        self._begun = time.monotonic()

    def scaled(self, count: int) -> int:
        """A size at this scale."""
        return max(int(count * self.scale), 2)

    def say(self, text: str) -> None:
        """Print progress."""
        print(f"[{time.monotonic() - self._begun:6.0f} s] {text}", flush=True)

    def place(self, name: str) -> Path:
        """A new folder with an applied feature repository, whose online store is empty."""
        place = self.folder / name
        repo = place / "feature_repo"
        repo.mkdir(parents=True)
        (place / "data").mkdir()
        (repo / "feature_store.yaml").write_text(FEATURE_STORE.format(address=self.valkey.address))
        (repo / "definitions.py").write_text(DEFINITIONS)
        shutil.copy(ROOT / "luigi.cfg", place)
        self.empty_online()
        feast_apply(repo)
        return place

    def empty_online(self) -> None:
        """Forget every value online."""
        with redis.Redis.from_url(f"redis://{self.valkey.address}") as client:
            client.flushall()

    def fill(self, rows: int, begins: date, step_us: int, keys: int) -> None:
        """Make the table anew: rows one step apart from a day on."""
        day = datetime(begins.year, begins.month, begins.day, tzinfo=UTC)
        with self.postgres.connect() as connection:
            connection.execute(MAKE_TABLE)
            connection.execute(FILL_TABLE, {"rows": rows, "day": day, "step": step_us, "keys": keys})
            connection.execute("CREATE INDEX ON trips (made)")
            connection.execute("VACUUM ANALYZE trips")
        self.say(f"table of {rows:,} rows")

    def once(self, operation: str, **arguments: Any) -> Answer:
        """One run of an operation in a process of its own."""
        log = self.folder / "log.txt"
        with Worker("benchmarks.batch_operations", operation, log, **arguments) as worker:
            return worker.run()

    def take_turns(self, name: str, ours: Callable[[], Answer], pandas: Callable[[], Answer]) -> list[list[Answer]]:
        """Run both sides in turn."""
        found: list[list[Answer]] = [[], []]
        for number in range(self.runs):
            for side, run in enumerate((ours, pandas)):
                answer = run()
                found[side].append(answer)
                label, peak = ("ours", "pandas")[side], answer["peak_bytes"] / GIB
                self.say(f"{name}: run {number + 1}, {label}: {answer['seconds']:.2f} s, peak {peak:.2f} GiB")
        return found


def ingest(bench: Bench) -> list[Row]:
    """A day of ten million rows from PostgreSQL to a Parquet file."""
    rows = _bulk(bench)
    place = bench.place("ingest")
    url, folder = bench.postgres.url, str(place)
    common = {"url": url, "day": str(DAY), "folder": folder}
    ours, pandas = bench.take_turns(
        "ingest",
        lambda: bench.once("ingest-ours", repo=str(place / "feature_repo"), view=VIEW, **common),
        lambda: bench.once("ingest-pandas", table=TABLE, **common),
    )
    _agree("ingest", ours + pandas, ("rows", "keys", "fares", "times"))
    return [_compared(f"ingest of {short(rows)} rows x 6 columns from PostgreSQL", ours, pandas, 3.0, GIB)]


def clean(bench: Bench) -> list[Row]:
    """The same day from the raw file to the offline store."""
    rows = _bulk(bench)
    place = bench.place("clean")
    repo, url, day = str(place / "feature_repo"), bench.postgres.url, str(DAY)
    raw = place / "raw.parquet"
    common = {"repo": repo, "url": url, "view": VIEW, "day": day, "folder": str(place)}
    bench.once("ingest-ours", **common)

    def ours() -> Answer:
        shutil.rmtree(place / "data" / "offline", ignore_errors=True)
        return bench.once("clean-ours", **common)

    found, pandas = bench.take_turns("clean", ours, lambda: bench.once("clean-pandas", raw=str(raw), folder=str(place)))
    _agree("clean", found + pandas, ("read", "rows", "rejected"))
    row = _compared(f"Clean + OfflineStore of {short(rows)} rows", found, pandas, None, None)
    speed = rows / median_of(found, "seconds")
    return [
        Row(
            row.what,
            f"{row.ours}, {speed / MILLION:.2f}M rows/s",
            row.pandas,
            row.ratio,
            "≥ 1M rows/s",
            speed >= MILLION,
            row.memory,
            row.runs,
        )
    ]


IMPORTS = """
from headrace.quick_import import leave_feast_unchecked
leave_feast_unchecked()
import luigi.cmdline, batch.steps, headrace.redis, headrace.engine
"""
"""What a run of the chain imports, in its way."""


def empty_day(bench: Bench) -> list[Row]:
    """The whole command for a day without rows, and its imports alone."""
    place = bench.place("empty-day")
    bench.fill(2, YEAR_BEGINS, 1, 2)
    took = []
    imports = []
    for number in range(bench.runs):
        day = DAY + timedelta(days=number)
        took.append(_luigi(bench, place, "Materialize", "--date", str(day)).seconds)
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", IMPORTS],
            check=True,
            env=_environment(bench, place),
            cwd=place,
        )
        imports.append(time.perf_counter() - begun)
        bench.say(f"empty-day: {took[-1]:.2f} s, imports alone {imports[-1]:.2f} s")
    own = median(took) - median(imports)
    what = "the chain for an empty day, of which imports"
    ours = f"{seconds(median(took))}, {seconds(median(imports))}"
    return [Row(what, ours, "", "", "< 5 s, imports aside", own < 5, "", f"{bench.runs}")]


def backfill(bench: Bench) -> list[Row]:
    """A year, undisturbed; and the same killed in the middle and repeated."""
    days = bench.scaled(DAYS)
    bench.fill(days * ROWS_A_DAY, YEAR_BEGINS, 86_400_000_000 // ROWS_A_DAY, KEYS)
    stop = YEAR_BEGINS + timedelta(days=days)
    command = ("Backfill", "--start", str(YEAR_BEGINS), "--stop", str(stop), "--workers", "2")
    whole = bench.place("backfill")
    calm = _luigi(bench, whole, *command)
    _every_day_once(whole, days)
    bench.say(f"backfill: {calm.seconds:.1f} s, peak {calm.peak_bytes / GIB:.2f} GiB")
    broken = bench.place("backfill-killed")
    first = _luigi(bench, broken, *command, kill_at=days // 2)
    second = _luigi(bench, broken, *command)
    _every_day_once(broken, days)
    total = first.seconds + second.seconds
    bench.say(f"backfill: killed after {first.seconds:.1f} s, then {second.seconds:.1f} s")
    rows = f"{days} days x {short(ROWS_A_DAY)} rows"
    peak = f"{max(run.peak_bytes for run in (calm, first, second)) / GIB:.2f} GiB, all processes"
    return [
        Row(f"Backfill of {rows}", seconds(calm.seconds), "", "", "", None, peak, "1"),
        Row(
            f"Backfill of {rows}, kill -9 in the middle and the same command again: no day done twice",
            f"{seconds(first.seconds)} + {seconds(second.seconds)}",
            "",
            f"{total / calm.seconds:.2f}x of the undisturbed",
            "no day twice",
            True,
            "",
            "1",
        ),
    ]


@dataclass(frozen=True)
class Run:
    """A `luigi` command: seconds, and the most memory that it and its children had together at a time."""

    seconds: float
    peak_bytes: int


def _luigi(bench: Bench, place: Path, *words: str, kill_at: int | None = None) -> Run:
    """Run a task; with `kill_at` everything of it is killed when so many days are published."""
    log = place / "luigi.log"
    begun = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "luigi"), "--module", "batch", *words, "--local-scheduler"],
            cwd=place,
            env=_environment(bench, place),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    peaks: list[int] = [0]
    watching = threading.Thread(target=_watch, args=(process, peaks))
    watching.start()
    try:
        while kill_at is not None and process.poll() is None and _published(place) < kill_at:
            time.sleep(SAMPLED_S)
        if kill_at is not None:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        watching.join()
    if kill_at is None and code != 0:
        raise MeasureError(f"luigi {' '.join(words)} ended with {code}:\n{log.read_text(errors='replace')[-3_000:]}")
    return Run(time.perf_counter() - begun, peaks[0])


def _watch(process: subprocess.Popen[bytes], peaks: list[int]) -> None:
    """Note the most memory that a session has: what its processes share counts once (PSS)."""
    while process.poll() is None:
        peaks[0] = max(peaks[0], sum(_pss(entry) for entry in _session(process.pid)))
        time.sleep(SAMPLED_S)


def _session(leader: int) -> list[Path]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == leader:
                found.append(entry)
        except OSError:
            continue
    return found


def _pss(entry: Path) -> int:
    try:
        lines = (entry / "smaps_rollup").read_text().splitlines()
    except OSError:  # it ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _environment(bench: Bench, place: Path) -> dict[str, str]:
    return environment(feature_repo=place / "feature_repo", source_url=bench.postgres.url)


def _published(place: Path) -> int:
    return len(list(place.glob("data/batch/*/run=*/day=*/offline.json")))


def _every_day_once(place: Path, days: int) -> None:
    """Each day was published by one run, in one snapshot, and the history knows one such run of it."""
    names = [parse_name(path.name) for path in place.glob("data/offline/trips/batch-*.parquet")]
    files = Counter(name.day for name in names if isinstance(name, DayName))
    runs = Ledger(place / "data" / "batch" / "history").runs(2, datetime.now(UTC))
    done = Counter(run.parameters["date"] for run in runs if run.task == "OfflineStore" and run.outcome == "done")
    published = _published(place)
    if not (published == len(files) == len(done) == days and set(files.values()) == set(done.values()) == {1}):
        msg = f"backfill: {days} days, {published} receipts, {len(files)} days offline, {sum(done.values())} runs"
        raise MeasureError(msg)


def _bulk(bench: Bench) -> int:
    """The table of the large day, made once in a row of measurements that want it."""
    rows = bench.scaled(BULK)
    with bench.postgres.connect() as connection:
        there = connection.execute("SELECT to_regclass('trips') IS NOT NULL").fetchone()
        if there == (True,) and connection.execute("SELECT count(*) FROM trips").fetchone() == (rows,):
            return rows
    bench.fill(rows, DAY, 80_000_000_000 // rows, max(rows // 10, 1))
    return rows


def _agree(name: str, answers: list[Answer], figures: tuple[str, ...]) -> None:
    found = [{figure: answer[figure] for figure in figures} for answer in answers]
    if any(one != found[0] for one in found):
        raise MeasureError(f"{name}: the sides differ: {found}")


def _compared(what: str, ours: list[Answer], pandas: list[Answer], least: float | None, most: int | None) -> Row:
    mine, theirs = median_of(ours, "seconds"), median_of(pandas, "seconds")
    peaks = [median_of(answers, "peak_bytes") for answers in (ours, pandas)]
    bounds = [f"≥ {least:g}x"] if least is not None else []
    bounds += [f"< {most / GIB:g} GiB"] if most is not None else []
    met = (least is None or theirs / mine >= least) and (most is None or peaks[0] < most)
    return Row(
        what,
        seconds(mine),
        seconds(theirs),
        f"{theirs / mine:.1f}x",
        ", ".join(bounds),
        met if bounds else None,
        ", ".join(f"{peak / GIB:.2f} GiB" for peak in peaks),
        f"{len(ours)}, {len(pandas)}",
    )


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "ingest": ingest,
    "clean": clean,
    "empty-day": empty_day,
    "backfill": backfill,
}


def measure(asked: Asked) -> dict[str, str]:
    """The table of the rows asked for."""
    rows: list[Row] = []
    with Postgres() as postgres, Valkey(program=redis_program()) as valkey:
        with postgres.connect() as connection:
            server = f"PostgreSQL {connection.execute('SHOW server_version').fetchone()[0]}"  # type: ignore[index]
        bench = Bench(asked.folder, postgres, valkey, asked.runs, asked.scale)
        for name in asked.only:
            rows += ROWS[name](bench)
    return {"batch": f"{table(HEADS, [row.cells() for row in rows])}\n\n{asked.measured(server, PACKAGES)}"}


def main() -> int:
    """See `benchmarks.command`."""
    return command("batch", "Speed of the batch chain.", measure, rows=list(ROWS), runs=3)


if __name__ == "__main__":
    raise SystemExit(main())
