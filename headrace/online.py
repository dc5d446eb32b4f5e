"""Writing online: one door for Arrow rows, newest-wins and atomic in our stores, by Feast's generic write in others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureStore, FeatureView, RepoConfig
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey as EntityKeyProto
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.utils import _convert_arrow_to_proto

from headrace.contract import ViewContract
from headrace.encode import (
    EncodedRows,
    Int64s,
    Tails,
    encode,
    hash_tails,
    newest,
    order_keys,
    schema_id,
)
from headrace.errors import TransientError
from headrace.values import BINARY, canonical

FeastRow = tuple[EntityKeyProto, dict[str, ValueProto], datetime, datetime | None]
"""A row as Feast hands it to `OnlineStore.online_write_batch`."""

Mark = Mapping[str, Any]
"""What has been materialized of a view, see `headrace.materialize`."""


@dataclass(frozen=True)
class StoredRows:
    """What an online store holds of some keys. All sequences have the same length and order.

    Attributes:
        keys: serialized entity keys.
        order: of what is stored; None: nothing. A row that a stock client wrote has the order that its time means.
        event_us: event times, microseconds since the epoch; None: nothing is stored.
        values: serialized values by feature name; empty bytes are null, or no field at all.
    """

    keys: list[bytes]
    order: list[bytes | None]
    event_us: list[int | None]
    values: Mapping[str, list[bytes]]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Int64s) -> StoredRows:
        """These rows alone, in the order given."""
        at = rows.tolist()
        return StoredRows(
            [self.keys[i] for i in at],
            [self.order[i] for i in at],
            [self.event_us[i] for i in at],
            {name: [column[i] for i in at] for name, column in self.values.items()},
        )


@runtime_checkable
class NewestWinsStore(Protocol):
    """An online store of ours."""

    def rows_a_write(self, columns: int) -> int | None:
        """How many rows of so many columns are best given to one `write_newest`; None where it does not matter."""

    def write_newest(self, config: RepoConfig, view: FeatureView, rows: EncodedRows) -> int:
        """Write each row that is not older than the stored one (`headrace.encode.is_older`); the rest is turned away.

        Atomic for each row, whoever else writes; idempotent. Returns how many were written.
        """

    def read_stored(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> StoredRows:
        """What is stored of these keys, aligned with them. Not one snapshot of all, but whole rows."""

    def stored_keys(
        self, config: RepoConfig, view: FeatureView, chosen: Callable[[list[bytes]], list[bytes]] | None = None
    ) -> Iterator[list[bytes]]:
        """The keys that hold this view, in chunks. A key may come twice; every key that stays is there.

        Args:
            chosen: picks from the keys of a chunk those that are wanted; all are listed, the others looked at no more.
        """

    def replace_exact(
        self, config: RepoConfig, view: FeatureView, seen: StoredRows, new: EncodedRows | None
    ) -> list[bool]:
        """Compare and set, row by row: only where what is stored is exactly what was seen.

        Args:
            seen: from `read_stored`; where nothing was seen, nothing may be stored.
            new: the rows to store, aligned with `seen`, with their orders even if these are smaller; None: delete.

        Returns:
            Which rows were done.
        """

    def server_ids(self, config: RepoConfig) -> tuple[str, ...]:
        """Ids of the servers that hold the values; they change when a server may have forgotten."""

    def is_applied(self, config: RepoConfig, view: FeatureView) -> bool:
        """Whether the store has taken over the features of a view as it is declared, as `feast apply` has it do last.

        Before that it may still be emptying those that are new.
        """

    def read_mark(self, config: RepoConfig, view: FeatureView) -> Mark | None:
        """The mark of a view as last swapped; None where there is none."""

    def swap_mark(self, config: RepoConfig, view: FeatureView, seen: Mark | None, mark: Mark) -> bool:
        """Set the mark if it still is what was seen. False, and nothing done, if it is not."""


def online_store(store: FeatureStore) -> Any:
    """The online store behind a Feast store."""
    return cast("Any", store._get_provider()).online_store


def write_online(
    store: FeatureStore,
    contract: ViewContract,
    table: pa.Table,
    *,
    tails: Tails | None = None,
) -> int:
    """Write the newest row of each key, if it is newer than what is stored.

    Blocking; safe to repeat; thread-safe. In stores that are not ours the newest row of each key goes through Feast's
    generic write, with whatever guarantee that store has.

    Args:
        table: rows in the contract's schema.
        tails: the origin of rows of the stream, from `headrace.encode.stream_tails`; see `encode`. None: of no stream.

    Returns:
        How many keys were written, not counting those turned away.
    """
    if table.num_rows == 0:
        return 0
    target = online_store(store)
    if isinstance(target, NewestWinsStore):
        return target.write_newest(store.config, contract.feature_view, encode(contract, table, tails))
    return _write_generic(store, contract, table)


def server_ids(store: FeatureStore) -> tuple[str, ...]:
    """Ids of the online servers; none for stores that are not ours."""
    target = online_store(store)
    return target.server_ids(store.config) if isinstance(target, NewestWinsStore) else ()


def unapplied(store: FeatureStore, contract: ViewContract) -> str | None:
    """Why a view must not be written yet, in words; None if it may be.

    The registry has a changed view before the online store has emptied its new features: what is written of them until
    then would be emptied, too.
    """
    target = online_store(store)
    if not isinstance(target, NewestWinsStore) or target.is_applied(store.config, contract.feature_view):
        return None
    return (
        f"feature view `{contract.name}` changed in the registry, and the online store has not taken it over yet; if "
        "no `feast apply` is under way, run it again"
    )


def expect_applied(store: FeatureStore, contract: ViewContract) -> None:
    """See `unapplied`.

    Raises:
        TransientError: the view must not be written yet.
    """
    if (why := unapplied(store, contract)) is not None:
        raise TransientError(why)


def has_features(known: Mapping[str, str | None], view: FeatureView) -> bool:
    """Whether the types that a store remembers, if it does, are those of a view's features."""
    return not known or all(known.get(name) == kind for name, kind in feature_types(view).items())


def encode_feast_rows(config: RepoConfig, view: FeatureView, data: Sequence[FeastRow]) -> EncodedRows:
    """Rows of Feast's own interface, encoded; the newest of each key. Naive times are UTC, as Feast means them."""
    names = [feature.name for feature in view.features]
    values = {
        name: pa.array([canonical(row[1][name]) if name in row[1] else b"" for row in data], BINARY) for name in names
    }
    event = np.array([_microseconds(row[2]) for row in data], dtype=np.int64)
    created = [None if pd.isnull(row[3]) else _microseconds(row[3]) for row in data]
    order = order_keys(
        event,
        np.array([us or 0 for us in created], dtype=np.int64),
        np.array([us is not None for us in created], dtype=bool),
        hash_tails(values, schema_id(view)) if data else np.empty((0, 17), dtype=np.uint8),
    )
    version = config.entity_key_serialization_version
    keys = [serialize_entity_key(row[0], entity_key_serialization_version=version) for row in data]
    return newest(EncodedRows(keys, order, event.tolist(), created, values))


def stock_order(event_us: int) -> bytes:
    """The order of a row of which only the time is known, as stock Feast writes them: the lowest of that time."""
    time = np.array([event_us], dtype=np.int64)
    return order_keys(time, time, np.zeros(1, dtype=bool), np.zeros((1, 17), dtype=np.uint8))[0]


def event_times(order: Sequence[bytes | None]) -> list[int | None]:
    """The event time in each order, microseconds since the epoch."""
    stamps = b"".join(key[:8] for key in order if key is not None)
    times = iter((np.frombuffer(stamps, dtype=">u8") ^ np.uint64(1 << 63)).astype(np.uint64).view(np.int64).tolist())
    return [None if key is None else next(times) for key in order]


def feature_types(view: FeatureView) -> dict[str, str]:
    """The type of each feature, as text: what an online store remembers of a view to notice that one changed."""
    return {feature.name: str(feature.dtype) for feature in view.features}


def _write_generic(store: FeatureStore, contract: ViewContract, table: pa.Table) -> int:
    """The newest row of each key by event and created time through Feast's own write, columns by the view's names."""
    view = contract.feature_view
    keys = {field.name: field.dtype.to_value_type() for field in view.entity_columns}
    times = [
        (name, "ascending", "at_start")
        for name in (contract.timestamp_field, contract.created_field)
        if name is not None
    ]
    ordered = table.take(pc.sort_indices(table, sort_keys=times))  # absent created is lowest
    ordered = ordered.rename_columns([contract.view_name(name) for name in ordered.schema.names])
    if not contract.join_keys:
        ordered = ordered.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * len(ordered), pa.string()))
    latest: dict[bytes, FeastRow] = {}
    for batch in ordered.combine_chunks().to_batches():  # given a table, Feast would convert its first batch only
        for key, values, event, created in _convert_arrow_to_proto(batch, view, keys):
            known = None if pd.isnull(created) else created  # stock SQLite cannot store NaT
            latest[key.SerializeToString(deterministic=True)] = (key, values, event, known)
    store._get_provider().online_write_batch(store.config, view, list(latest.values()), None)
    return len(latest)


def _microseconds(moment: datetime) -> int:
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    delta = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
