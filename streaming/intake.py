"""The stream between assignments: where each partition begins, who takes its slices, what has become of it.

All state here belongs to the event loop and, but for the topics that were stopped, to one assignment: a new one begins
with the ledgers and forgets expected offsets, buffers and tasks of the former.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from feast import FeatureStore

from headrace.chains import StreamEnd, StreamLedger
from headrace.errors import ChainClosedError, LedgerError, LostRaceError
from headrace.materialize import apply_newest
from headrace.online import server_ids, write_online
from headrace.repository import open_store
from streaming.broker import Broker, client_config
from streaming.deadletters import DeadLetterWriter, Letter
from streaming.decode import JsonDecoder
from streaming.health import Health
from streaming.lane import SERVERS_AGE_S, Budget, Int64s, Lane, Pools, TopicReplacedError, replaced
from streaming.settings import StreamConfig, View
from streaming.slices import Position, Slice, TopicPartition

logger = logging.getLogger(__name__)

FINISH_S = 5.0
"""How long an assignment that ends may take to append what it has."""

RESYNC_PAUSE_S = 1.0

Result = TypeVar("Result")


class Mover(Protocol):
    """The consumer, as far as partitions are moved."""

    async def hold(self, partition: TopicPartition) -> None:
        """Stop fetching."""

    async def move(self, partition: TopicPartition, offset: int) -> None:
        """Fetch from an offset on."""

    def high_water(self, partition: TopicPartition) -> int | None:
        """The end of the log as last heard."""


class StoppedError(Exception):
    """A topic cannot go on; the message names the facts and the command that helps."""


class OutdatedError(Exception):
    """The assignment ended meanwhile."""


class ShortLogError(Exception):
    """The log is shorter than the ledger, for now."""


@dataclass
class Run:
    """A partition in this assignment."""

    position: Position
    lanes: list[Lane]
    resynced_s: float = 0.0


class RealStores:
    """Kafka's dead letters, the Feast stores, the broker. Each part is used by one thread of `Pools`."""

    def __init__(self, config: StreamConfig, broker: Broker) -> None:
        self._config = config
        self._broker = broker
        self._feast: FeatureStore | None = None
        self._letters: DeadLetterWriter | None = None
        self._servers: tuple[float, tuple[str, ...]] | None = None

    def write_letters(self, letters: Sequence[Letter]) -> None:
        """See `Stores`."""
        if self._letters is None:
            self._letters = DeadLetterWriter(client_config(self._config), self._config.settings.broker_timeout_seconds)
        self._letters.write(letters)

    def write_online(self, view: View, table: pa.Table, epoch: int, partition: int, offsets: Int64s) -> int:
        """See `Stores`."""
        return write_online(self._store(), view.contract, table, epoch=epoch, partition=partition, offsets=offsets)

    def server_ids(self) -> tuple[str, ...]:
        """See `Stores`. Asked once for all lanes."""
        now_s = time.monotonic()
        if self._servers is None or now_s - self._servers[0] > SERVERS_AGE_S:
            self._servers = now_s, server_ids(self._store())
        return self._servers[1]

    def apply_recent(self, view: View, paths: Sequence[Path]) -> int:
        """See `Stores`."""
        return apply_newest(self._store(), view.contract, paths)[1]

    def topic_id(self, topic: str, not_before_s: float) -> str | None:
        """See `Stores`."""
        return self._broker.topic_id(topic, not_before_s)

    def _store(self) -> FeatureStore:
        if self._feast is None:
            self._feast = open_store(self._config.settings.feature_repo)
        return self._feast


class StreamIntake:
    """See the module.

    Args:
        on_fatal: what to do when the worker cannot go on; does not return before the worker ends.
    """

    def __init__(self, config: StreamConfig, health: Health, on_fatal: Callable[[BaseException], None]) -> None:
        self._config = config
        self._settings = config.settings
        self._health = health
        self._on_fatal = on_fatal
        self.mover: Mover | None = None
        self._broker = Broker(config)
        self._stores = RealStores(config, self._broker)
        self._pools = Pools(
            *(ThreadPoolExecutor(1, f"headrace-{name}") for name in ("decode", "letters", "online", "offline"))
        )
        self._looks = ThreadPoolExecutor(4, "headrace-looks")
        self._budget: Budget | None = None
        self._generation: int | None = None
        self._assignment = 0
        self._ending = asyncio.Lock()
        self._runs: dict[TopicPartition, Run] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._decoders = {
            view.contract.name: JsonDecoder(view.contract) for views in config.views.values() for view in views
        }
        self._tasks: set[asyncio.Task[None]] = set()
        health.partitions.source = self._gauges

    @property
    def broker(self) -> Broker:
        """The broker, to ask."""
        return self._broker

    @property
    def has_begun(self) -> bool:
        """Whether there is an assignment, be it of no partitions."""
        return self._generation is not None

    # -- what the transport asks -------------------------------------------------------------------------------------

    async def assign(self, generation: int, partitions: set[TopicPartition]) -> Mapping[TopicPartition, int]:
        """See `Intake`. Retries what may pass, within the bound; where a topic is stopped its partitions are held.

        Faust calls it twice at once now and then, from its recovery and from its fetcher: the later call counts.
        """
        if generation == self._generation and partitions == self._runs.keys():
            return {partition: run.position.expected for partition, run in self._runs.items() if run.lanes}
        assignment = await self._end_assignment()
        if assignment != self._assignment:
            return {}
        self._generation = generation
        starts = await asyncio.gather(*(self._begin_safely(partition) for partition in sorted(partitions)))
        found = dict(zip(sorted(partitions), starts, strict=True))
        logger.info(
            "generation %d: %s",
            generation,
            ", ".join(f"{p.topic}[{p.partition}] from {start}" for p, start in found.items()) or "no partition",
        )
        return {partition: start for partition, start in found.items() if start is not None}

    async def release(self) -> None:
        """See `Intake`."""
        await self._end_assignment()

    async def has_room(self, timeout_s: float) -> bool:
        """See `Intake`."""
        return await self._room.wait(timeout_s)

    def committable(self) -> Mapping[TopicPartition, int]:
        """See `Intake`."""
        for partition, run in self._runs.items():
            if run.lanes:
                self._committed[partition] = min(lane.end for lane in run.lanes)
        ends, self._committed = {p: end for p, end in self._committed.items() if end > 0}, {}
        return ends

    async def out_of_range(self, partition: TopicPartition) -> None:
        """See `Intake`."""
        run = self._runs.get(partition)
        if run is not None and run.lanes:
            logger.warning("%s[%d]: the log does not have the next offset; looking", *partition)
            await self._restart(partition)

    # -- what the agent brings ---------------------------------------------------------------------------------------

    def deliver(self, piece: Slice, generation: int) -> None:
        """Take a slice; one that an earlier assignment fetched, or that does not continue its partition, is dropped."""
        run = self._runs.get(piece.partition)
        if run is None or generation != self._generation or not run.lanes:
            return
        if run.position.take(piece):
            for lane in run.lanes:
                lane.put(piece)
            return
        now = time.monotonic()
        if now - run.resynced_s > RESYNC_PAUSE_S:
            run.resynced_s = now
            self._health.resyncs.labels(piece.partition.topic).inc()
            logger.info(
                "%s[%d]: expected offset %d, came [%d, %d); going back",
                *piece.partition,
                run.position.expected,
                piece.first,
                piece.next,
            )
            self._spawn(self._consumer.move(piece.partition, run.position.expected))

    def faults(self) -> list[str]:
        """What keeps the worker from being ready, in words."""
        failing = [f"{label}: step {step} fails: {why}" for (label, step), why in self._health.failing.items()]
        return failing + list(self._health.stopped.values())

    def close(self) -> None:
        """Let go of threads and connections."""
        pools = (self._pools.decode, self._pools.letters, self._pools.online, self._pools.offline, self._looks)
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)

    # -- partitions --------------------------------------------------------------------------------------------------

    async def _end_assignment(self) -> int:
        """End the assignment that is or is beginning; the number of the one that may begin, if no other came since."""
        self._assignment += 1
        assignment = self._assignment
        self._generation = None
        runs, self._runs = self._runs, {}
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        async with self._ending:  # the next may read the ledgers when the lanes of all before have ended
            await asyncio.gather(*(lane.finish(FINISH_S) for run in runs.values() for lane in run.lanes))
        for partition, run in runs.items():
            if run.lanes:
                self._committed[partition] = min(lane.end for lane in run.lanes)
        return assignment

    async def _begin_safely(self, partition: TopicPartition) -> int | None:
        """Begin a partition; None if it is held because its topic is stopped or its log is too short for now."""
        assignment = self._assignment
        deadline = time.monotonic() + self._settings.store_retry_seconds
        pause_s = 0.1
        while True:
            try:
                if partition.topic in self._health.stopped:
                    break
                return await self._begin(partition)
            except StoppedError as error:
                self._stop(partition.topic, str(error))
                break
            except ShortLogError as error:
                logger.warning("%s[%d]: %s", *partition, error)
                self._health.failing[_short_key(partition)] = str(error)
                self._spawn(self._watch_short_log(partition, assignment))
                break
            except OutdatedError:
                return None
            except Exception as error:  # noqa: BLE001 - whatever it is, it is retried or named
                if time.monotonic() + pause_s > deadline:
                    self._on_fatal(error)
                    break
                logger.warning("%s[%d]: cannot begin yet: %s", *partition, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 5.0)
            if assignment != self._assignment:
                return None
        self._runs[partition] = Run(Position(0), [])
        await self._consumer.hold(partition)
        return None

    async def _begin(self, partition: TopicPartition) -> int:
        """Read the ledgers, compare them with the log, and open the lanes.

        Raises:
            StoppedError, ShortLogError: see there.
        """
        assignment = self._assignment
        views = self._config.views[partition.topic]
        asked_s = time.monotonic()
        present = await self._look(lambda: self._broker.topic_id(partition.topic, asked_s))
        log = await self._look(lambda: self._broker.log(*partition))
        lanes: list[tuple[View, StreamLedger, StreamEnd]] = []
        for view in views:
            ledger = StreamLedger(view.contract, *partition)
            try:
                end = await self._look(ledger.end)
                if end.exists and None not in (present, end.topic_id) and present != end.topic_id:
                    raise StoppedError(replaced(partition.topic, end.topic_id, present))
                if not end.exists:
                    end = await self._look(partial(ledger.begin, log.earliest, present))
                elif end.end < log.earliest:
                    end = await self._lost_head(view, ledger, end, log.earliest, present)
            except LedgerError as error:
                raise StoppedError(str(error)) from error
            if end.end > log.latest:
                msg = (
                    f"the log of {partition.topic}[{partition.partition}] ends at {log.latest}, the ledger of "
                    f"`{view.contract.name}` at {end.end}"
                )
                raise ShortLogError(msg)
            lanes.append((view, ledger, end))
        if assignment != self._assignment:
            raise OutdatedError
        start = min(end.end for _, _, end in lanes)
        opened = [self._open(view, partition, ledger, end, present) for view, ledger, end in lanes]
        self._runs[partition] = Run(Position(start), opened)
        return start

    def _open(
        self, view: View, partition: TopicPartition, ledger: StreamLedger, end: StreamEnd, present: str | None
    ) -> Lane:
        return Lane(
            view,
            partition,
            start=end,
            topic_id=present or end.topic_id,
            ledger=ledger,
            decoder=self._decoders[view.contract.name],
            stores=self._stores,
            pools=self._pools,
            budget=self._room,
            health=self._health,
            settings=self._settings,
            on_fault=self._lane_fault,
        )

    async def _lost_head(
        self, view: View, ledger: StreamLedger, end: StreamEnd, earliest: int, present: str | None
    ) -> StreamEnd:
        """The topic no longer has what the ledger wants next: record the gap if that is allowed, else stop."""
        facts = (
            f"the ledger of `{view.contract.name}` ends at {end.end}, and the oldest event that the topic still has is "
            f"{earliest}: {earliest - end.end} offsets were lost by retention"
        )
        if not self._settings.allow_gaps:
            msg = f"{facts}; set HEADRACE_ALLOW_GAPS=true to record the gap and go on"
            raise StoppedError(msg)
        logger.error("%s; recorded, going on", facts)
        none = np.empty(0, dtype=np.int64)
        await self._look(
            lambda: ledger.append(
                end.epoch, end.end, earliest, None, accepted=none, topic_id=present or end.topic_id, mark="gap"
            )
        )
        return await self._look(ledger.end)

    async def _restart(self, partition: TopicPartition) -> None:
        """Begin a partition anew within the assignment: drop what its lanes have, and go on from the ledgers' ends."""
        run = self._runs.pop(partition, None)
        if run is None:
            return
        for lane in run.lanes:
            lane.drop()
        assignment = self._assignment
        start = await self._begin_safely(partition)
        if start is not None and assignment == self._assignment:
            self._health.resyncs.labels(partition.topic).inc()
            logger.info("%s[%d]: goes on from %d", *partition, start)
            await self._consumer.move(partition, start)

    async def _watch_short_log(self, partition: TopicPartition, assignment: int) -> None:
        """A log may be short for a moment while a broker recovers; after the bound it is another log."""
        deadline = time.monotonic() + self._settings.short_log_seconds
        while assignment == self._assignment:
            await asyncio.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
            key = _short_key(partition)
            try:
                start = await self._begin(partition)
            except ShortLogError as error:
                if time.monotonic() < deadline:
                    continue
                self._health.failing.pop(key, None)
                self._stop(
                    partition.topic,
                    f"{error}, for {self._settings.short_log_seconds:g} s: it is another log; if that is intended, run "
                    f"`faust -A streaming start --topic {partition.topic} --new-epoch` and start the worker again",
                )
                return
            except StoppedError as error:
                self._health.failing.pop(key, None)
                self._stop(partition.topic, str(error))
                return
            except OutdatedError:
                return
            except Exception as error:  # noqa: BLE001 - looked at again
                logger.warning("%s[%d]: %s", *partition, error)
                continue
            self._health.failing.pop(key, None)
            logger.info("%s[%d]: the log is long enough again; from %d", *partition, start)
            await self._consumer.move(partition, start)
            return

    def _lane_fault(self, lane: Lane, error: BaseException) -> None:
        """A lane ended by itself."""
        partition = lane.partition
        if isinstance(error, LostRaceError | ChainClosedError):
            logger.info("%s[%d]: %s; reading the ledger again", *partition, error)
            run = self._runs.get(partition)
            if run is not None and lane in run.lanes:  # else it belongs to an assignment that ended
                self._spawn(self._restart(partition))
        elif isinstance(error, TopicReplacedError | LedgerError):
            self._stop(partition.topic, str(error))
        else:
            self._on_fatal(error)

    def _stop(self, topic: str, reason: str) -> None:
        """Take a topic out; with no topic left the worker ends."""
        if topic in self._health.stopped:
            return
        logger.error("topic `%s` is stopped: %s", topic, reason)
        self._health.stopped[topic] = reason
        for partition, run in self._runs.items():
            if partition.topic == topic:
                for lane in run.lanes:
                    lane.drop()
                run.lanes = []
                self._spawn(self._consumer.hold(partition))
        if len(self._health.stopped) == len(self._config.views):
            self._on_fatal(StoppedError(reason))

    # -- small things ------------------------------------------------------------------------------------------------

    @property
    def _consumer(self) -> Mover:
        if self.mover is None:
            msg = "the consumer is not there yet"
            raise RuntimeError(msg)
        return self.mover

    @property
    def _room(self) -> Budget:
        if self._budget is None:
            self._budget = Budget(self._settings.in_flight_bytes)
        return self._budget

    async def _look(self, question: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._looks, question)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: Any) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._on_fatal(task.exception())

    def _gauges(self) -> Mapping[tuple[str, str, int], tuple[int, int | None]]:
        found: dict[tuple[str, str, int], tuple[int, int | None]] = {}
        for partition, run in list(self._runs.items()):
            high = self.mover.high_water(partition) if self.mover is not None else None
            for lane in list(run.lanes):
                behind = None if high is None else max(0, high - lane.end)
                found[lane.view.contract.name, partition.topic, partition.partition] = (lane.end, behind)
        return found


def _short_key(partition: TopicPartition) -> tuple[str, str]:
    return f"{partition.topic}[{partition.partition}]", "assignment"
