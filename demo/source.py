"""The source database of the demonstration: two weeks of 1,000 drivers in `driver_stats`, some rows dirty.

    python -m demo.source [--database data/source.db]

One row a driver and hour. The rows of an hour depend on the seed and the hour alone, so that a day that is
over reads the same however often the database is filled.
"""

from __future__ import annotations

import argparse
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

TABLE = "driver_stats"
DRIVERS = range(1001, 2001)
DAYS = 14
SEED = 20_210_713
DIRTY_FRACTION = 0.005
"""Share of the rows with something wrong in them, one fault each."""

SCHEMA = f"""
CREATE TABLE {TABLE} (
    driver_id       INTEGER,
    conv_rate       REAL,
    acc_rate        REAL,
    avg_daily_trips INTEGER,
    datetime        TIMESTAMP,
    created         TIMESTAMP
);
CREATE INDEX {TABLE}_created ON {TABLE} (created);
"""

Row = tuple[int | None, float | None, float | None, int | None, str | None, str]


def rows_of_hour(hour: datetime) -> list[Row]:
    """Return the rows of one hour, one a driver and a few twice, with their faults.

    Each row is dated within the hour and made up to a minute later.
    """
    random = np.random.default_rng([SEED, int(hour.timestamp())])
    count = len(DRIVERS)
    conversion = random.beta(8, 2, count).round(6)
    acceptance = random.beta(5, 2, count).round(6)
    trips = random.poisson(300, count)
    seconds = random.integers(0, 3600, count)
    delay_ms = random.integers(200, 60_000, count)
    fault = np.where(random.random(count) < DIRTY_FRACTION, random.integers(1, 7, count), 0)
    rows: list[Row] = []
    for index, driver in enumerate(DRIVERS):
        dated = hour + timedelta(seconds=int(seconds[index]))
        created = dated + timedelta(milliseconds=int(delay_ms[index]))
        row: Row = (
            driver,
            float(conversion[index]),
            float(acceptance[index]),
            int(trips[index]),
            f"{dated:%Y-%m-%d %H:%M:%S}",
            created.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00"),
        )
        rows.extend(_with_fault(row, int(fault[index])))
    return rows


def _with_fault(row: Row, fault: int) -> list[Row]:
    """Return the row as the numbered fault leaves it; 0 is none."""
    driver, conversion, acceptance, trips, dated, created = row
    match fault:
        case 1:
            return [(driver, 1.0 + (conversion or 0.0), acceptance, trips, dated, created)]
        case 2:
            return [(driver, conversion, None, trips, dated, created)]
        case 3:
            return [(driver, conversion, acceptance, -1, dated, created)]
        case 4:
            return [(None, conversion, acceptance, trips, dated, created)]
        case 5:
            return [(driver, conversion, acceptance, trips, None, created)]
        case 6:
            return [row, row]
        case _:
            return [row]


def fill(database: Path, *, until: datetime) -> int:
    """Write the database anew, whole or not at all, with the two weeks before a time; return its rows."""
    hours = DAYS * 24
    last = until.replace(minute=0, second=0, microsecond=0)
    database.parent.mkdir(parents=True, exist_ok=True)
    draft = database.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    connection = sqlite3.connect(draft)
    try:
        connection.executescript(SCHEMA)
        total = 0
        with connection:
            for back in range(hours, 0, -1):
                rows = rows_of_hour(last - timedelta(hours=back))
                connection.executemany(f"INSERT INTO {TABLE} VALUES (?, ?, ?, ?, ?, ?)", rows)
                total += len(rows)
    finally:
        connection.close()
    draft.replace(database)
    return total


def main() -> None:
    """Fill the database that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m demo.source", description="Fill the source database.")
    parser.add_argument("--database", type=Path, default=Path("data/source.db"))
    arguments = parser.parse_args()
    total = fill(arguments.database, until=datetime.now(UTC))
    print(f"{arguments.database}: {total:,} rows in {TABLE}")


if __name__ == "__main__":
    main()
