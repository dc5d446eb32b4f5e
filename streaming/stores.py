"""The blocking calls of the stream: to the stores and the broker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
from feast import FeatureStore

from headrace.encode import Origin, stream_tails
from headrace.materialize import apply_newest
from headrace.online import server_ids, write_online
from headrace.place import File
from headrace.repository import open_store
from streaming.batches import Batch
from streaming.broker import Broker, client_config
from streaming.deadletters import DeadLetterWriter, Letter
from streaming.settings import StreamConfig, View

SERVERS_AGE_S = 5.0
"""How old the ids of the online servers may be. Old ones are safe: they differ if the store has forgotten since."""


class Stores(Protocol):
    """The calls that a lane makes, each that may block in a thread that the lane chooses."""

    def write_letters(self, letters: Sequence[Letter]) -> None:
        """Return when the broker has them."""

    def write_online(self, view: View, batches: Sequence[Batch]) -> int:
        """Newest wins; how many keys were written. The batches may be of several partitions."""

    def heard_server_ids(self) -> tuple[str, ...] | None:
        """The ids of the online servers, at most `SERVERS_AGE_S` old; None if they must be asked. Does not block."""

    def server_ids(self) -> tuple[str, ...]:
        """The same, asked if they must be."""

    def apply_recent(self, view: View, paths: Sequence[File]) -> int:
        """Write online what some segments hold, newest wins; how many keys were written."""

    def topic_id(self, topic: str, not_before_s: float) -> str | None:
        """The topic's id, as heard after a moment of the monotonic clock."""


class RealStores:
    """Kafka's dead letters, the Feast stores, the broker. `topic_id` and `heard_server_ids` are of any thread."""

    def __init__(self, config: StreamConfig, broker: Broker) -> None:
        self._config = config
        self._broker = broker
        self._feast: FeatureStore | None = None
        # Not made with the first letter: an idempotent producer waits half a second for its id, and events with it.
        self._letters = DeadLetterWriter(client_config(config), config.settings.broker_timeout_seconds)
        self._servers: tuple[float, tuple[str, ...]] | None = None

    def write_letters(self, letters: Sequence[Letter]) -> None:
        """See `Stores`."""
        self._letters.write(letters)

    def write_online(self, view: View, batches: Sequence[Batch]) -> int:
        """See `Stores`."""
        tails = [stream_tails(Origin(batch.epoch, batch.partition, batch.offsets)) for batch in batches]
        table = pa.concat_tables([batch.table for batch in batches])
        return write_online(self._store(), view.contract, table, tails=np.concatenate(tails))

    def heard_server_ids(self) -> tuple[str, ...] | None:
        """See `Stores`. Of all lanes: a worker with many of them would else have a call a lane, each in the queue."""
        heard = self._servers
        return None if heard is None or time.monotonic() - heard[0] > SERVERS_AGE_S else heard[1]

    def server_ids(self) -> tuple[str, ...]:
        """See `Stores`."""
        present = self.heard_server_ids()
        if present is None:
            asked_s = time.monotonic()
            present = server_ids(self._store())
            self._servers = asked_s, present
        return present

    def apply_recent(self, view: View, paths: Sequence[File]) -> int:
        """See `Stores`."""
        return apply_newest(self._store(), view.contract, paths)[1]

    def topic_id(self, topic: str, not_before_s: float) -> str | None:
        """See `Stores`."""
        return self._broker.topic_id(topic, not_before_s)

    def _store(self) -> FeatureStore:
        if self._feast is None:
            self._feast = open_store(self._config.settings.feature_repo)
        return self._feast
