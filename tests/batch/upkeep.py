"""Views with a history in both stores, and ways to make the stores differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from feast import FeatureStore

import headrace
from headrace.chains import StreamLedger
from headrace.contract import ViewContract
from headrace.encode import EncodedRows, Origin, encode, stream_tails
from headrace.online import NewestWinsStore, online_store, write_online
from headrace.repository import contracts, open_store
from tests.batch.place import Place
from tests.headrace.views import rows

Event = tuple[int, int, int]
"""Key, event time in microseconds after `EPOCH_US`, value."""


@dataclass(frozen=True)
class History:
    """One view of a place, with its stores open in this process."""

    store: FeatureStore
    contract: ViewContract

    @classmethod
    def of(cls, place: Place, view: str) -> History:
        store = open_store(place.repo)
        return cls(store, contracts(store, [view])[0])

    def stream(self, *events: Event) -> None:
        """An append of events that are online already, as the worker does it."""
        ledger = StreamLedger(self.contract, "events", 0)
        first = ledger.end().end
        offsets = np.arange(first, first + len(events), dtype=np.int64)
        table = self.table(events)
        write_online(self.store, self.contract, table, tails=stream_tails(Origin(0, 0, offsets)))
        ledger.append(0, first, first + len(events), table, accepted=offsets)

    def force(self, event: Event, *, is_older: bool = False, is_removed: bool = False) -> None:
        """Put an event online in the place of what is there, or as the older one that it is; or remove the key."""
        target: NewestWinsStore = online_store(self.store)
        put: EncodedRows | None = encode(self.contract, self.table([event]))
        assert put is not None
        seen = target.read_stored(self.store.config, self.contract.feature_view, put.keys)
        if seen.order[0] is not None and not is_older:
            put = replace(put, order=[seen.order[0]])
        changed = target.replace_exact(self.store.config, self.contract.feature_view, seen, None if is_removed else put)
        assert changed == [True]

    def write(self, *events: Event) -> None:
        """Write online alone, as somebody's script would."""
        write_online(self.store, self.contract, self.table(events))

    def table(self, events: Sequence[Event]) -> pa.Table:
        return rows(self.contract, [self._row(*event) for event in events])

    def files(self) -> int:
        """How many files there are in the view's folder."""
        return len(list(self.contract.directory.glob("*.parquet")))

    def offline(self) -> list[dict[str, Any]]:
        """What a reader gets, in order."""
        found: list[dict[str, Any]] = ds.dataset(headrace.files(self.contract)).to_table().to_pylist()
        return sorted(found, key=repr)

    def _row(self, key: int, at: int, value: int) -> dict[str, Any]:
        times = (self.contract.timestamp_field, self.contract.created_field)
        row: dict[str, Any] = {}
        for field in self.contract.schema:
            number = key if field.name in self.contract.join_keys else value
            row[field.name] = at if field.name in times else _as(field.type, number)
        return row


def _as(kind: pa.DataType, number: int) -> Any:
    if pa.types.is_list(kind):
        return [_as(kind.value_type, number)]
    return str(number) if pa.types.is_string(kind) else pa.scalar(number, pa.int64()).cast(kind).as_py()
