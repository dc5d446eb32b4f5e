"""The blocking calls of the stream: to the stores and the broker, and the threads they are made in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

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
    """The blocking calls that a lane makes, each in a thread that the lane chooses."""

    def write_letters(self, letters: Sequence[Letter]) -> None:
        """Return when the broker has them."""

    def write_online(self, view: View, batches: Sequence[Batch]) -> int:
        """Newest wins; how many keys were written. The batches may be of several partitions."""

    def server_ids(self) -> tuple[str, ...]:
        """The ids of the online servers, at most `SERVERS_AGE_S` old."""

    def apply_recent(self, view: View, paths: Sequence[File]) -> int:
        """Write online what some segments hold, newest wins; how many keys were written."""

    def topic_id(self, topic: str, not_before_s: float) -> str | None:
        """The topic's id, as heard after a moment of the monotonic clock."""


class Thread(ThreadPoolExecutor):
    """One thread, started when it is needed, that tells how long its present call takes."""

    def __init__(self, name: str) -> None:
        super().__init__(1, name)
        self._begun_s: float | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor`."""
        return super().submit(self._call, fn, *args, **kwargs)

    @property
    def busy_s(self) -> float:
        """Since when it makes the call that it makes now, in seconds; 0: it makes none. From any thread."""
        begun_s = self._begun_s
        return 0.0 if begun_s is None else time.monotonic() - begun_s

    def _call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._begun_s = time.monotonic()
        try:
            return fn(*args, **kwargs)
        finally:
            self._begun_s = None


@dataclass(frozen=True)
class Pools:
    """The threads of a view: one a kind of work, so that each store sees one caller.

    Attributes:
        decode, offline: the view's own: a schema registry or a folder that hangs holds up no other view.
        letters, online: shared by all views, as are the producer and the store.
    """

    decode: Thread
    letters: Thread
    online: Thread
    offline: Thread

    def of_step(self, step: str) -> Thread:
        """The thread of a step, by the step's name."""
        return {"decode": self.decode, "dead_letters": self.letters, "online": self.online}.get(step, self.offline)

    @classmethod
    def of(cls, views: Iterable[str]) -> dict[str, Pools]:
        """The threads of some views, none of them started yet."""
        letters, online = Thread("headrace-letters"), Thread("headrace-online")
        return {
            view: cls(
                decode=Thread(f"headrace-decode-{view}"),
                letters=letters,
                online=online,
                offline=Thread(f"headrace-offline-{view}"),
            )
            for view in views
        }

    def close(self) -> None:
        """Begin no more work."""
        for pool in (self.decode, self.letters, self.online, self.offline):
            pool.shutdown(wait=False, cancel_futures=True)


class RealStores:
    """Kafka's dead letters, the Feast stores, the broker. `topic_id` may be called from any thread."""

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

    def server_ids(self) -> tuple[str, ...]:
        """See `Stores`. Asked once for all lanes."""
        now_s = time.monotonic()
        if self._servers is None or now_s - self._servers[0] > SERVERS_AGE_S:
            self._servers = now_s, server_ids(self._store())
        return self._servers[1]

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
