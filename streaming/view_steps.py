"""The steps that the lanes of a view take together: decoding and writing online, several partitions in one call."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np

from streaming.batches import Batch, Fetched, batches_of
from streaming.coalesce import Coalescer
from streaming.formats import Decoder
from streaming.health import ONLINE, Health
from streaming.judgement import Judged, judge
from streaming.settings import StreamSettings, View
from streaming.share import LetterShare
from streaming.stores import Stores
from streaming.threads import Pools, Thread

Result = TypeVar("Result")


class ViewSteps:
    """See the module. Of the event loop; the work is done in the pools.

    Args:
        share: of the view's events that are turned away, noted here.
        may_wait: whether decoding asks a schema registry, or runs a transformation of the user's.
    """

    def __init__(
        self,
        view: View,
        decoder: Decoder,
        stores: Stores,
        pools: Pools,
        health: Health,
        settings: StreamSettings,
        share: LetterShare,
        *,
        may_wait: bool = True,
    ) -> None:
        self.view = view
        self.share = share
        self.pools = pools
        self._decoder = decoder
        self._stores = stores
        self._health = health
        self._settings = settings
        self._name = view.contract.name
        most = settings.slice_records
        self._threads = {
            "decode": pools.decode if may_wait else pools.compute,
            "dead_letters": pools.letters,
            "online": pools.online,
            "offline": pools.offline,
        }
        self._decoding = Coalescer(self._threads["decode"], self._decode, lambda one: len(one.records), most)
        self._writing = Coalescer(pools.online, self._write_online, lambda one: one.table.num_rows, most)

    def thread_of(self, step: str) -> Thread:
        """The thread of a step, by the step's name."""
        return self._threads[step]

    def decode(self, fetched: Fetched) -> Awaitable[Batch]:
        """Records to columns. Pure but for the clock, the counts, and what a schema registry says."""
        return self._decoding.ask(fetched)

    def write_online(self, batch: Batch, begun: Callable[[], None] = lambda: None) -> Awaitable[None]:
        """Newest wins.

        Args:
            begun: called when the store is being asked.
        """
        return self._writing.ask(batch, begun)

    def _decode(self, fetched: Sequence[Fetched]) -> list[Batch]:
        values = [record.value for one in fetched for record in one.records]

        def decoded() -> tuple[Judged, list[Batch]]:
            judged = judge(self.view, self._decoder, values, self._settings.max_skew_seconds)
            return judged, batches_of(fetched, judged)

        judged, batches = measured(self._health, self._name, "decode", len(values), decoded)
        self._health.judged(
            self._name,
            received=len(values),
            accepted=len(judged.rows),
            skipped=judged.skipped,
            reasons=(reject.reason for reject in judged.rejects),
        )
        self.share.note(len(judged.rows) + len(judged.rejects), judged.rejects)
        return batches

    def _write_online(self, batches: Sequence[Batch]) -> list[None]:
        rows = sum(batch.table.num_rows for batch in batches)
        health, name = self._health, self._name
        keys = measured(health, name, "online", rows, lambda: self._stores.write_online(self.view, batches))
        health.online_rows.labels(name).inc(rows)
        health.online_bytes.labels(name).inc(sum(batch.table.nbytes for batch in batches))
        health.keys.labels(name).inc(keys)
        health.succeeded(name, ONLINE, np.concatenate([batch.produced_ms for batch in batches]))
        return [None] * len(batches)


def measured(health: Health, view: str, step: str, rows: int, work: Callable[[], Result]) -> Result:
    """Do it, and note how long it took if it did not fail."""
    begun = time.perf_counter()
    result = work()
    health.stepped(view, step, time.perf_counter() - begun, rows)
    return result
