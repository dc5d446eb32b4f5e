"""Feast's SQLite online store, with newest-wins in one transaction.

The tables are Feast's own, so stock clients read them. One table beside each holds, per entity, the order of the stored
row and the event time it was written with; where that time differs from the one in Feast's table, a stock client wrote
later, and its time counts.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from feast import Entity, FeatureView, RepoConfig
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig, _quote_id, _table_id

from headrace import registry as _registry  # noqa: F401 - resolves relative registries
from headrace.encode import EncodedRows, order_keys
from headrace.online import FeastRow, Mark, encode_feast_rows

_BUSY_TIMEOUT_MS = 60_000
_KEYS_A_QUERY = 500
_MARKS = "headrace_marks"


class HeadraceSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):
    """Configuration of `HeadraceSqliteOnlineStore`; the fields are Feast's."""

    type: Literal["headrace.sqlite.HeadraceSqliteOnlineStore"] = "headrace.sqlite.HeadraceSqliteOnlineStore"  # type: ignore[assignment]


class HeadraceSqliteOnlineStore(SqliteOnlineStore):
    """SQLite with newest-wins: WAL, `synchronous=FULL`, many processes a file, one writer at a time.

    Each write of a batch is one transaction: all of it or nothing, decided by rows against what is stored then.
    """

    def __init__(self) -> None:
        self._writer: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Feast's own write, newest-wins as every write here."""
        self.write_newest(config, table, encode_feast_rows(config, table, data))
        if progress:
            progress(len(data))

    def write_newest(self, config: RepoConfig, view: FeatureView, rows: EncodedRows) -> int:
        """See `NewestWinsStore`. One transaction."""
        if len(rows) == 0:
            return 0
        name = _name(config, view)
        with self._transaction(config) as connection:
            # Each time, for views that a stock store applied, or another process made anew: it costs next to nothing.
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {_order_table(name)} "
                "(entity_key BLOB PRIMARY KEY, ord BLOB NOT NULL, event_ts INTEGER NOT NULL) WITHOUT ROWID"
            )
            stored = _stored_orders(connection, name, rows.keys)
            keep = [i for i, key in enumerate(rows.keys) if rows.order[i] >= stored.get(key, b"")]
            seconds = [_stock_seconds(rows.event_us[i]) for i in keep]
            created = [None if (us := rows.created_us[i]) is None else _stock_seconds(us) for i in keep]
            connection.executemany(
                f"INSERT INTO {_order_table(name)} (entity_key, ord, event_ts) VALUES (?, ?, ?) "
                "ON CONFLICT (entity_key) DO UPDATE SET ord = excluded.ord, event_ts = excluded.event_ts",
                zip((rows.keys[i] for i in keep), (rows.order[i] for i in keep), seconds, strict=True),
            )
            for feature, values in rows.values.items():
                connection.executemany(
                    f"INSERT INTO {_quote_id(name)} (entity_key, feature_name, value, event_ts, created_ts) "
                    "VALUES (?, ?, ?, ?, ?) ON CONFLICT (entity_key, feature_name) DO UPDATE SET "
                    "value = excluded.value, value_text = NULL, event_ts = excluded.event_ts, "
                    "created_ts = excluded.created_ts",
                    (
                        (rows.keys[i], feature, values[i], second, made)
                        for i, second, made in zip(keep, seconds, created, strict=True)
                    ),
                )
        return len(keep)

    def server_ids(self, config: RepoConfig) -> tuple[str, ...]:
        """The database file by device and inode: another file has forgotten."""
        self._get_conn(config)
        stat = Path(self._get_db_path(config)).stat()
        return (f"sqlite:{stat.st_dev:x}:{stat.st_ino:x}",)

    def read_mark(self, config: RepoConfig, view: FeatureView) -> Mark | None:
        """See `NewestWinsStore`."""
        with self._transaction(config) as connection:
            row = connection.execute(f"SELECT mark FROM {_MARKS} WHERE view = ?", (_name(config, view),)).fetchone()
        return None if row is None else json.loads(row[0])

    def swap_mark(self, config: RepoConfig, view: FeatureView, seen: Mark | None, mark: Mark) -> bool:
        """See `NewestWinsStore`."""
        name = _name(config, view)
        with self._transaction(config) as connection:
            row = connection.execute(f"SELECT mark FROM {_MARKS} WHERE view = ?", (name,)).fetchone()
            if (None if row is None else json.loads(row[0])) != seen:
                return False
            connection.execute(
                f"INSERT INTO {_MARKS} (view, mark) VALUES (?, ?) "
                "ON CONFLICT (view) DO UPDATE SET mark = excluded.mark",
                (name, json.dumps(mark, sort_keys=True)),
            )
        return True

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Create what views need; a deleted view's values, orders and mark go together."""
        super().update(config, tables_to_delete, tables_to_keep, entities_to_delete, entities_to_keep, partial)
        self._forget(config, tables_to_delete)

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Remove the tables of these views; what else is in the file stays."""
        with self._transaction(config) as connection:
            for table in tables:
                connection.execute(f"DROP TABLE IF EXISTS {_quote_id(_name(config, table))}")
        self._forget(config, tables)

    def _forget(self, config: RepoConfig, views: Sequence[FeatureView]) -> None:
        with self._transaction(config) as connection:
            for view in views:
                name = _name(config, view)
                connection.execute(f"DROP TABLE IF EXISTS {_order_table(name)}")
                connection.execute(f"DELETE FROM {_MARKS} WHERE view = ?", (name,))

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        """Feast's connection for reads and DDL, which waits for writers instead of failing."""
        if self._conn is None:
            connection = super()._get_conn(config)
            _configure(connection)
        return self._conn  # type: ignore[return-value]

    @contextmanager
    def _transaction(self, config: RepoConfig) -> Iterator[sqlite3.Connection]:
        """The one write connection of this process, in an immediate transaction."""
        with self._lock:
            if self._writer is None:
                path = Path(self._get_db_path(config))
                path.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                _configure(connection)
                connection.execute(f"CREATE TABLE IF NOT EXISTS {_MARKS} (view TEXT PRIMARY KEY, mark TEXT NOT NULL)")
                self._writer = connection
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")


def _configure(connection: sqlite3.Connection) -> None:
    # The busy timeout first: changing to WAL itself needs the lock for a moment.
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    deadline = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:  # SQLite does not wait here when another connection changes the mode too
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    connection.execute("PRAGMA synchronous = FULL")


def _name(config: RepoConfig, view: FeatureView) -> str:
    return str(_table_id(config.project, view, config.registry.enable_online_feature_view_versioning))


def _order_table(name: str) -> str:
    return str(_quote_id(f"{name}__headrace"))


def _stored_orders(connection: sqlite3.Connection, name: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
    """The order of what is stored of these keys; of rows that a stock client wrote, the one their time means."""
    stored: dict[bytes, bytes] = {}
    for start in range(0, len(keys), _KEYS_A_QUERY):
        chunk = keys[start : start + _KEYS_A_QUERY]
        rows = connection.execute(
            f"SELECT t.entity_key, o.ord, o.event_ts, max(t.event_ts) FROM {_quote_id(name)} t "
            f"LEFT JOIN {_order_table(name)} o ON o.entity_key = t.entity_key "
            f"WHERE t.entity_key IN ({','.join('?' * len(chunk))}) GROUP BY t.entity_key",
            chunk,
        )
        for key, order, ours, theirs in rows:
            stored[key] = order if order is not None and ours == theirs else _stock_order(theirs)
    return stored


def _stock_order(seconds: int | None) -> bytes:
    """The lowest order of a row that stock Feast wrote: its whole second, no created time."""
    if seconds is None:
        return b""
    moment = datetime.fromtimestamp(seconds).replace(tzinfo=UTC)  # noqa: DTZ006 - Feast's reader does so, see below
    event = np.array([int(moment.timestamp()) * 1_000_000], dtype=np.int64)
    nothing = np.zeros(1, dtype=bool)
    return order_keys(event, event, nothing, np.zeros((1, 17), dtype=np.uint8))[0]


def _stock_seconds(us: int) -> int:
    """A time as stock Feast stores it: the naive UTC time taken for local, in whole seconds. Its reader undoes that."""
    seconds = us // 1_000_000
    if time.timezone == 0 and not time.daylight:
        return seconds
    return int(datetime.fromtimestamp(seconds, tz=UTC).replace(tzinfo=None).timestamp())
