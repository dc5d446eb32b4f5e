"""Feast's SQLite online store, with newest-wins in transactions.

The tables are Feast's own, so stock clients read them. One table beside each holds, per entity, the stored row's
order, and the event time it was written with; where that differs from the one in Feast's table, a stock client wrote
later, and its time counts.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from feast import Entity, FeatureView, RepoConfig
from feast.infra.online_stores.helpers import extract_text_and_num
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig, _quote_id, _table_id
from feast.protos.feast.types.Value_pb2 import Value as ValueProto

from headrace import registry as _registry  # noqa: F401 - resolves relative registries
from headrace.encode import EncodedRows, is_older
from headrace.errors import ConfigError, TransientError
from headrace.online import (
    FeastRow,
    Mark,
    StoredRows,
    encode_feast_rows,
    event_times,
    feature_types,
    has_features,
    stock_order,
)
from headrace.values import to_list

_LOCK_TIMEOUT_S = 30.0
_LOCK_POLL_S = 0.002
_KEYS_A_QUERY = 500
_KEYS_A_PAGE = 10_000
_CACHE_KIB = 65_536
_VALUES_A_TRANSACTION = 100_000
_ROWS_A_WRITE, _VALUES_A_WRITE = 250_000, 6_000_000
_MARKS = "headrace_marks"
_TYPES = "headrace_types"


class HeadraceSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):
    """Configuration of `HeadraceSqliteOnlineStore`; the fields are Feast's."""

    type: Literal["headrace.sqlite.HeadraceSqliteOnlineStore"] = "headrace.sqlite.HeadraceSqliteOnlineStore"  # type: ignore[assignment]


class HeadraceSqliteOnlineStore(SqliteOnlineStore):
    """SQLite with newest-wins: WAL, `synchronous=FULL`, many processes a file, one writer at a time.

    A large write is several transactions, so that other writers get in; each row is decided within one of them, against
    what is stored then. A writer waits up to 30 s for others.

    What an entity holds of a view is always one row: a write removes what an earlier row left of features that the view
    has no more. A feature added or of another type since the last `feast apply` has no value until it is written.
    """

    def __init__(self) -> None:
        self._own(os.getpid())

    def _own(self, pid: int) -> None:
        """Begin without connections. Those of a parent process may not even be closed, so they are kept."""
        self._inherited = [self.__dict__.get("_inherited"), self._conn, self.__dict__.get("_writer")]
        self._conn: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._pid = pid

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

    def rows_a_write(self, columns: int) -> int | None:
        """See `NewestWinsStore`. Many: each write goes through all of the table, in the order of keys."""
        return max(1, min(_ROWS_A_WRITE, _VALUES_A_WRITE // columns))

    def write_newest(self, config: RepoConfig, view: FeatureView, rows: EncodedRows) -> int:
        """See `NewestWinsStore`. A failure leaves whole transactions; a repeat is harmless."""
        table = _Table.of(config, view)
        by_key = sorted(range(len(rows)), key=rows.keys.__getitem__)  # neighbours share pages
        size = max(1, _VALUES_A_TRANSACTION // (1 + len(rows.values)))
        written = 0
        for start in range(0, len(by_key), size):
            if start > 0:
                time.sleep(2 * _LOCK_POLL_S)  # for those who wait
            chunk = rows.take(np.array(by_key[start : start + size], dtype=np.int64))
            with self._transaction(config) as connection:
                table.create_order(connection)
                stored = table.orders(connection, chunk.keys)
                if stored:
                    both = enumerate(zip(chunk.keys, chunk.order, strict=True))
                    taken = [i for i, (key, order) in both if not is_older(order, stored.get(key, b""))]
                    chunk = chunk.take(np.array(taken, dtype=np.int64))
                table.put(connection, chunk, stored)
                if _is_searchable(config):
                    table.put_search(connection, config, chunk)
            written += len(chunk)
        return written

    def read_stored(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> StoredRows:
        """See `NewestWinsStore`. In chunks of keys, so that no read stays open."""
        table = _Table.of(config, view)
        features = [feature.name for feature in view.features]
        order: list[bytes | None] = []
        values: dict[str, list[bytes]] = {name: [] for name in features}
        with self._connection(config) as connection:
            table.create_order(connection)
        for start in range(0, len(keys), _KEYS_A_QUERY):
            with self._connection(config) as connection:
                stored = table.stored(connection, features, keys[start : start + _KEYS_A_QUERY])
            order += stored.order
            for name in features:
                values[name] += stored.values[name]
        return StoredRows(list(keys), order, event_times(order), values)

    def stored_keys(
        self, config: RepoConfig, view: FeatureView, chosen: Callable[[list[bytes]], list[bytes]] | None = None
    ) -> Iterator[list[bytes]]:
        """See `NewestWinsStore`. By pages in the order of keys, so that no read stays open."""
        table, last = _Table.of(config, view), b""
        while True:
            with self._connection(config) as connection:
                page = connection.execute(
                    f"SELECT DISTINCT entity_key FROM {table.values} WHERE entity_key > ? ORDER BY entity_key LIMIT ?",
                    (last, _KEYS_A_PAGE),
                ).fetchall()
            if not page:
                return
            keys = [key for (key,) in page]
            yield keys if chosen is None else chosen(keys)
            (last,) = page[-1]

    def replace_exact(
        self, config: RepoConfig, view: FeatureView, seen: StoredRows, new: EncodedRows | None
    ) -> list[bool]:
        """See `NewestWinsStore`. A transaction a chunk of rows."""
        table, done = _Table.of(config, view), [False] * len(seen)
        for start in range(0, len(seen), _KEYS_A_QUERY):
            chunk = range(start, min(start + _KEYS_A_QUERY, len(seen)))
            with self._transaction(config) as connection:
                table.create_order(connection)
                found = table.stored(connection, list(seen.values), seen.keys[chunk.start : chunk.stop])
                for i, order in zip(chunk, found.order, strict=True):
                    done[i] = order == seen.order[i] and all(
                        found.values[name][i - start] == column[i] for name, column in seen.values.items()
                    )
                taken = [i for i in chunk if done[i]]
                if new is None:
                    table.delete(connection, [seen.keys[i] for i in taken])
                else:
                    rows = new.take(np.array(taken, dtype=np.int64))
                    table.put(connection, rows, table.orders(connection, rows.keys))
                    if _is_searchable(config):
                        table.put_search(connection, config, rows)
        return done

    def server_ids(self, config: RepoConfig) -> tuple[str, ...]:
        """The database file by device and inode: another file has forgotten."""
        self._get_conn(config)
        stat = Path(self._get_db_path(config)).stat()
        return (f"sqlite:{stat.st_dev:x}:{stat.st_ino:x}",)

    def is_applied(self, config: RepoConfig, view: FeatureView) -> bool:
        """See `NewestWinsStore`."""
        with self._connection(config) as connection:
            return has_features(_Table.of(config, view).known_types(connection), view)

    def read_mark(self, config: RepoConfig, view: FeatureView) -> Mark | None:
        """See `NewestWinsStore`."""
        with self._connection(config) as connection:
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
        """Create what views need, empty the features that are new or of another type, and delete views."""
        if not _is_searchable(config):
            with self._transaction(config) as connection:
                for view in tables_to_keep:
                    _Table.of(config, view).create(connection)
        super().update(config, tables_to_delete, tables_to_keep, entities_to_delete, entities_to_keep, partial)
        with self._transaction(config) as connection:
            for view in tables_to_keep:
                _Table.of(config, view).take_types(connection, feature_types(view))
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
                connection.execute(f"DROP TABLE IF EXISTS {_Table.of(config, view).order}")
                for table in (_MARKS, _TYPES):
                    connection.execute(f"DELETE FROM {table} WHERE view = ?", (name,))

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        """Feast's connection for reads and DDL, which waits for writers instead of failing."""
        if self._pid != os.getpid():
            self._own(os.getpid())
        if self._conn is None:
            connection = super()._get_conn(config)
            _configure(connection)
        return self._conn  # type: ignore[return-value]

    @contextmanager
    def _connection(self, config: RepoConfig) -> Iterator[sqlite3.Connection]:
        """The one connection of ours in this process, for one thread at a time. Each statement is a transaction."""
        if self._pid != os.getpid():
            self._own(os.getpid())
        path = Path(self._get_db_path(config))
        with self._lock, _naming(path):
            if self._writer is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                _configure(connection)
                connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                connection.execute(f"CREATE TABLE IF NOT EXISTS {_MARKS} (view TEXT PRIMARY KEY, mark TEXT NOT NULL)")
                connection.execute(f"CREATE TABLE IF NOT EXISTS {_TYPES} (view TEXT PRIMARY KEY, types TEXT NOT NULL)")
                self._writer = connection
            yield self._writer

    @contextmanager
    def _transaction(self, config: RepoConfig) -> Iterator[sqlite3.Connection]:
        """Our connection in an immediate transaction."""
        with self._connection(config) as connection:
            _begin(connection)
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")


@dataclass(frozen=True)
class _Table:
    """The tables of one view. Names are quoted where they are columns' or tables' of SQL.

    Attributes:
        name: of Feast's table, not quoted.
        values: Feast's table.
        order: ours, a row an entity.
    """

    name: str
    values: str
    order: str

    @classmethod
    def of(cls, config: RepoConfig, view: FeatureView) -> _Table:
        name = _name(config, view)
        return cls(name, str(_quote_id(name)), str(_quote_id(f"{name}__headrace")))

    def create(self, connection: sqlite3.Connection) -> None:
        """Feast's table as Feast declares it, but for WITHOUT ROWID: one B-tree in place of two, rows by entity."""
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS {self.values} (entity_key BLOB, feature_name TEXT, value BLOB, "
            "value_text TEXT, vector_value BLOB, event_ts timestamp, created_ts timestamp, "
            "PRIMARY KEY(entity_key, feature_name)) WITHOUT ROWID"
        )

    def create_order(self, connection: sqlite3.Connection) -> None:
        """Each time, for views that a stock store applied, or another process made anew: it costs next to nothing."""
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS {self.order} (entity_key BLOB PRIMARY KEY, ord BLOB NOT NULL, "
            "event_ts INTEGER NOT NULL) WITHOUT ROWID"
        )

    def orders(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The order of what is stored, of those keys that have something."""
        stored: dict[bytes, bytes] = {}
        for start in range(0, len(keys), _KEYS_A_QUERY):
            chunk = keys[start : start + _KEYS_A_QUERY]
            found = connection.execute(
                f"SELECT t.entity_key, o.ord, o.event_ts, max(t.event_ts) FROM {self.values} t "
                f"LEFT JOIN {self.order} o ON o.entity_key = t.entity_key "
                f"WHERE t.entity_key IN ({','.join('?' * len(chunk))}) GROUP BY t.entity_key",
                chunk,
            )
            for key, order, ours, theirs in found:
                stored[key] = order if order is not None and ours == theirs else _stock_order(theirs)
        return stored

    def stored(self, connection: sqlite3.Connection, features: Sequence[str], keys: Sequence[bytes]) -> StoredRows:
        """What is stored of at most `_KEYS_A_QUERY` keys, in one statement's snapshot."""
        found = connection.execute(
            f"SELECT t.entity_key, t.feature_name, t.value, t.event_ts, o.ord, o.event_ts FROM {self.values} t "
            f"LEFT JOIN {self.order} o ON o.entity_key = t.entity_key "
            f"WHERE t.entity_key IN ({','.join('?' * len(keys))})",
            keys,
        ).fetchall()
        cells = {(key, feature): value for key, feature, value, *_ in found}
        latest: dict[bytes, int] = {}
        ours = {}
        for key, _, _, seconds, order, own_seconds in found:
            latest[key] = max(seconds, latest.get(key, seconds))
            ours[key] = (order, own_seconds)
        orders = {
            key: ours[key][0] if ours[key][1] == seconds else _stock_order(seconds) for key, seconds in latest.items()
        }
        order = [orders.get(key) for key in keys]
        values = {name: [cells.get((key, name), b"") for key in keys] for name in features}
        return StoredRows(list(keys), order, event_times(order), values)

    def put(self, connection: sqlite3.Connection, rows: EncodedRows, stored: Mapping[bytes, bytes]) -> None:
        """Store these rows whole, whatever is stored; `stored` has the keys that hold something."""
        seconds, created = _stock_seconds(rows.event_us), _stock_seconds(rows.created_us)
        self._remove_retired(connection, rows.values, [key for key in rows.keys if key in stored])
        connection.executemany(
            f"INSERT INTO {self.order} (entity_key, ord, event_ts) VALUES (?, ?, ?) "
            "ON CONFLICT (entity_key) DO UPDATE SET ord = excluded.ord, event_ts = excluded.event_ts",
            zip(rows.keys, rows.order, seconds, strict=True),
        )
        connection.executemany(
            self._upsert(list(rows.values)),
            zip(rows.keys, seconds, created, *map(to_list, rows.values.values()), strict=True),
        )

    def put_search(self, connection: sqlite3.Connection, config: RepoConfig, rows: EncodedRows) -> None:
        """Fill the columns that Feast's text search reads, for rows that were put; value by value, as Feast does.

        `value_num` only where `feast apply` has made the column. Not `vector_value`: Feast 0.67 loads the extension
        that searches it under Python 3.10 alone.
        """
        columns = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({self.values})")}
        has_numbers = config.online_store.enable_openai_compatible_store and "value_num" in columns
        for feature, values in rows.values.items():
            found = [extract_text_and_num(ValueProto.FromString(value), has_numbers) for value in to_list(values)]
            connection.executemany(
                f"UPDATE {self.values} SET value_text = ?{', value_num = ?' if has_numbers else ''} "
                f"WHERE entity_key = ? AND feature_name = {_literal(feature)}",
                (
                    (*((text, number) if has_numbers else (text,)), key)
                    for key, (text, number) in zip(rows.keys, found, strict=True)
                ),
            )

    def delete(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> None:
        """Remove the rows of these keys."""
        for table in (self.values, self.order):
            connection.executemany(f"DELETE FROM {table} WHERE entity_key = ?", ((key,) for key in keys))

    def take_types(self, connection: sqlite3.Connection, types: dict[str, str]) -> None:
        """Remember the types of the features; those that are new or other than remembered lose their values."""
        known = self.known_types(connection)
        for feature, kind in types.items():
            if known and known.get(feature) != kind:
                connection.execute(
                    f"UPDATE {self.values} SET value = x'', value_text = NULL WHERE feature_name = ?", (feature,)
                )
        text = json.dumps(dict.fromkeys(known) | types)
        connection.execute(f"REPLACE INTO {_TYPES} (view, types) VALUES (?, ?)", (self.name, text))

    def known_types(self, connection: sqlite3.Connection) -> dict[str, str | None]:
        """The type of every feature that the view has had, as last applied; None: it has it no more."""
        row = connection.execute(f"SELECT types FROM {_TYPES} WHERE view = ?", (self.name,)).fetchone()
        return {} if row is None else json.loads(row[0])

    def _upsert(self, features: Sequence[str]) -> str:
        """One statement for all features of an entity: its key, seconds, created seconds, values."""
        rows = ", ".join(f"(?1, {_literal(name)}, ?{4 + place}, ?2, ?3)" for place, name in enumerate(features))
        return (
            f"INSERT INTO {self.values} (entity_key, feature_name, value, event_ts, created_ts) VALUES {rows} "
            "ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value, value_text = NULL, "
            "event_ts = excluded.event_ts, created_ts = excluded.created_ts"
        )

    def _remove_retired(
        self, connection: sqlite3.Connection, present: Mapping[str, Any], keys: Sequence[bytes]
    ) -> None:
        """Remove what these keys hold of features that the view has had and that are not present any more."""
        for feature in self.known_types(connection).keys() - present.keys():
            connection.executemany(
                f"DELETE FROM {self.values} WHERE entity_key = ? AND feature_name = {_literal(feature)}",
                ((key,) for key in keys),
            )


def _configure(connection: sqlite3.Connection) -> None:
    # The busy timeout first: changing to WAL itself needs the lock for a moment.
    connection.execute(f"PRAGMA busy_timeout = {_LOCK_TIMEOUT_S * 1000:.0f}")
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:  # SQLite does not wait here when another connection changes the mode too
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    connection.execute("PRAGMA synchronous = FULL")


def _begin(connection: sqlite3.Connection) -> None:
    """Take the write lock. SQLite's own waiting looks every 100 ms and so misses the gaps that a busy writer leaves."""
    connection.execute("PRAGMA busy_timeout = 0")
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    try:
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(_LOCK_POLL_S)
    finally:
        connection.execute(f"PRAGMA busy_timeout = {_LOCK_TIMEOUT_S * 1000:.0f}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file, and what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            msg = f"{path}: {error}; the view is not applied to this online store, run `feast apply`"
            raise ConfigError(msg) from error
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            msg = (
                f"{path}: another process held the write lock for {_LOCK_TIMEOUT_S:.0f} s. Nothing of this transaction "
                "was written; find that process (`fuser` names who has the file open), then repeat"
            )
            raise TransientError(msg) from error
        msg = f"{path}: {error}. Nothing of this transaction was written, and a repeat does no harm"
        raise TransientError(msg) from error


def _name(config: RepoConfig, view: FeatureView) -> str:
    return str(_table_id(config.project, view, config.registry.enable_online_feature_view_versioning))


def _is_searchable(config: RepoConfig) -> bool:
    """Whether Feast is to search in this store, which needs row ids and further columns."""
    online = config.online_store
    return bool(online.vector_enabled or online.text_search_enabled or online.enable_openai_compatible_store)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _stock_order(seconds: int) -> bytes:
    """The lowest order of a row that stock Feast wrote: its whole second, no created time."""
    moment = datetime.fromtimestamp(seconds).replace(tzinfo=UTC)  # noqa: DTZ006 - Feast's reader does so, see below
    return stock_order(int(moment.timestamp()) * 1_000_000)


def _stock_seconds(times_us: Sequence[int | None]) -> list[int | None]:
    """Times as stock Feast stores them: naive UTC taken for local time, in whole seconds. Its reader undoes that."""
    seconds = [None if us is None else us // 1_000_000 for us in times_us]
    if time.timezone == 0 and not time.daylight:
        return seconds
    return [
        None if at is None else int(datetime.fromtimestamp(at, tz=UTC).replace(tzinfo=None).timestamp())
        for at in seconds
    ]
