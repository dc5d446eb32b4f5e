"""A table whose rows come late, are corrected, withdrawn, doubled and dirty, and what the chain must make of it.

The oracle is plain Python over the rows as they were meant: it reads no text and knows no code of ours.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import psycopg

BERLIN = ZoneInfo("Europe/Berlin")
KATHMANDU = timezone(timedelta(hours=5, minutes=45))

WRITTEN: list[Callable[[datetime], str]] = [
    lambda at: f"{at:%Y-%m-%d %H:%M:%S}",
    lambda at: f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond:06}Z",
    lambda at: at.astimezone(BERLIN).isoformat(),
    lambda at: at.astimezone(KATHMANDU).isoformat(sep=" "),
]
"""Ways to write a moment of UTC as text; whole seconds all of them."""

FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no rider": ("null", "rider", {"rider": None}),
    "no stops": ("null", "stops", {"stops": None}),
    "negative": ("out_of_range", "stops", {"stops": -1}),
    "far": ("out_of_range", "distance_km", {"distance_km": 1000.5}),
    "grade": ("out_of_range", "grade", {"grade": "z"}),
    "list": ("wrong_type", "streets", {"streets": '["High St", 5]'}),
    "future": ("future_event", "happened", {"happened": "2999-01-01 00:00:00"}),
    "when": ("null", "happened", {"happened": None}),
    # What only SQLite's columns can hold.
    "text": ("wrong_type", "distance_km", {"distance_km": "far"}),
    "half": ("wrong_type", "stops", {"stops": 1.5}),
    "huge": ("wrong_type", "stops", {"stops": 3_000_000_000}),
    "bytes": ("wrong_type", "rider", {"rider": b"\xff\xfe"}),
    "city": ("wrong_type", "city_id", {"city_id": "seven"}),
    "bool": ("wrong_type", "is_shared", {"is_shared": 7}),
    "leap second": ("bad_timestamp", "happened", {"happened": "{day} 23:59:60"}),
    "no hour": ("bad_timestamp", "happened", {"happened": "{day} 99:00:00"}),
}
TYPED = list(FAULTS)[:8]
NEVER_READ_BY_EVENT = {"future", "when"}
"""Rows of no day, or of one that never comes, where the event's time tells the day."""


@dataclass(frozen=True)
class Row:
    """A row as it is meant.

    Attributes:
        fault: a name of `FAULTS`, or none.
        writing: how its times are written, by number.
    """

    number: int
    rider: str
    value: float
    happened: datetime
    made: datetime
    fault: str | None = None
    writing: int = 0

    @property
    def key_time(self) -> tuple[str, datetime]:
        return self.rider, self.happened

    def cells(self) -> dict[str, Any]:
        """As the table holds it; `remark` says which row it is."""
        write = WRITTEN[self.writing]
        cells: dict[str, Any] = {
            "rider": self.rider,
            "city_id": 7,
            "distance_km": self.value,
            "stops": 1,
            "streets": '["High St"]',
            "is_shared": 1,
            "grade": "a",
            "happened": write(self.happened),
            "made": write(self.made),
            "remark": str(self.number),
        }
        if self.fault is not None:
            day = self.happened.date()
            for name, value in FAULTS[self.fault][2].items():
                cells[name] = value.format(day=day) if isinstance(value, str) else value
        return cells


@dataclass
class Expected:
    """What must be of a day: its rows by rider and time, and the counts of the receipt."""

    rows: dict[tuple[str, datetime], Row] = field(default_factory=dict)
    read: int = 0
    rejected: dict[tuple[str, str], int] = field(default_factory=dict)
    exact: int = 0
    key_time: int = 0


def expected(rows: Iterable[Row], day: date, window: str) -> Expected:
    """Of the rows that are there now."""
    found = Expected()
    by_key: dict[tuple[str, datetime], list[Row]] = {}
    for row in rows:
        moment = row.made if window == "arrival" else row.happened
        if moment.date() != day or (window == "event" and row.fault in NEVER_READ_BY_EVENT):
            continue
        found.read += 1
        if row.fault is not None:
            reason = FAULTS[row.fault][:2]
            found.rejected[reason] = found.rejected.get(reason, 0) + 1
        else:
            by_key.setdefault(row.key_time, []).append(row)
    for key, same in by_key.items():
        distinct = {(row.value, row.made) for row in same}
        found.exact += len(same) - len(distinct)
        found.key_time += len(distinct) - 1
        found.rows[key] = max(same, key=lambda row: row.made)
    return found


def newest(days: Iterable[Expected]) -> dict[str, float]:
    """What online must serve of each rider."""
    latest: dict[str, Row] = {}
    for day in days:
        for row in day.rows.values():
            before = latest.get(row.rider)
            if before is None or (before.happened, before.made) < (row.happened, row.made):
                latest[row.rider] = row
    return {rider: row.value for rider, row in latest.items()}


class Table:
    """The rows as meant, and the table that holds them: SQLite's, or PostgreSQL's where there is a connection.

    PostgreSQL's columns are typed, with zones; its session's zone is the server's.
    """

    def __init__(self, path: str, postgres: psycopg.Connection | None = None) -> None:
        self.rows: dict[int, Row] = {}
        self._path = path
        self._postgres = postgres
        self._made = 0
        if postgres is not None:
            postgres.execute("DROP TABLE IF EXISTS rides")
            postgres.execute(
                "CREATE TABLE rides (rider text, city_id bigint, distance_km double precision, stops integer, "
                "streets text, is_shared boolean, grade text, happened timestamptz, made timestamptz, remark text)"
            )

    def add(self, row: Row) -> Row:
        """Insert it under a number of its own."""
        self._made += 1
        row = self.rows[self._made] = replace(row, number=self._made)
        cells = row.cells()
        if self._postgres is not None:
            cells["is_shared"] = bool(cells["is_shared"])
            for name, at in (("happened", row.happened), ("made", row.made)):
                given = name in FAULTS[row.fault][2] if row.fault else False
                cells[name] = f"{cells[name]}+00" if given and cells[name] else cells[name] if given else at
        self._do(f"INSERT INTO rides ({', '.join(cells)}) VALUES ({', '.join('?' for _ in cells)})", *cells.values())
        return row

    def correct(self, number: int, value: float) -> None:
        """Change a value in place, as a database does: nothing else tells."""
        self.rows[number] = replace(self.rows[number], value=value)
        if self.rows[number].fault not in {"far", "text"}:
            self._do("UPDATE rides SET distance_km = ? WHERE remark = ?", value, str(number))

    def withdraw(self, number: int) -> None:
        """Delete it."""
        del self.rows[number]
        self._do("DELETE FROM rides WHERE remark = ?", str(number))

    def _do(self, statement: str, *values: Any) -> None:
        if self._postgres is not None:
            self._postgres.execute(statement.replace("?", "%s"), values)
            return
        with contextlib.closing(sqlite3.connect(self._path)) as connection, connection:
            connection.execute(statement, values)


def reasons(counts: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Of a receipt, as the oracle has them."""
    return {(one["reason"], one["field"]): one["rows"] for one in counts["reasons"]}


def at(day: date, hour: int, minute: int = 0) -> datetime:
    """A moment of a day, UTC."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(hours=hour, minutes=minute)


def as_text(rows: dict[tuple[str, datetime], Row]) -> str:
    """For messages."""
    return json.dumps(sorted((rider, str(when), row.value) for (rider, when), row in rows.items()))
