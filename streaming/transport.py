"""Bulk delivery: Faust's transport, changed to hand an agent one event per slice of a partition.

Faust delivers, acknowledges and schedules single records (8,000 to 13,000 a second, whatever the agent does). Here a
fetch passes as a whole, as one `Slice`, and where a partition begins and what is committed are asked of an `Intake`.
Overridden are private methods of Faust 0.15 and attributes of aiokafka 0.14: `tests/streaming/test_transport.py` holds
them to what is used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

import aiokafka
import faust
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import IllegalStateError, KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from streaming.logs import QUIET
from streaming.records import install
from streaming.slices import Slice, TopicPartition

FETCH_WAIT_MS = 250
"""How long a broker may hold a fetch while nothing comes. A partition that was not in the fetch waits as long."""

LINGER_MS = 15
LINGER_BYTES = 1024 * 1024
"""While events come, a fetch waits so long, or for so many bytes: few full ones are less work than many small ones."""

CALM_S = 0.04
"""After so long without events a fetch is answered with the first that comes."""

FAREWELL_S = 3.0
"""How long the last commit may take, and leaving the group, which waits for a rebalance under way."""


LONGEST_SILENCE_S = 60.0


async def _within(seconds: float, work: Awaitable[None]) -> None:
    """Do it, or give up after a time."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, seconds)


class Intake(Protocol):
    """Who takes the slices, and knows where each partition begins."""

    async def assign(self, generation: int, partitions: set[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Begin an assignment: forget the former one, and return where each partition starts."""

    async def release(self) -> None:
        """End the assignment, finishing within a bound what can be finished."""

    async def has_room(self, timeout_s: float) -> bool:
        """Wait until more may be fetched; False if it may not after that time."""

    def committable(self) -> Mapping[TopicPartition, int]:
        """Where the ledgers end: the offsets to commit to the group."""

    async def out_of_range(self, partition: TopicPartition) -> None:
        """The log does not have the offset that was to be read."""


class ForgetfulOffsets(dict[Any, Any]):
    """Faust drops records below the last offset it read; after a seek back that would lose them. It reads None here."""

    def __getitem__(self, key: Any) -> None:
        return None


class Linger:
    """Fetches wait for more while events come, and are answered at once when it is calm. Of the thread's event loop."""

    def __init__(self) -> None:
        self._calm: asyncio.TimerHandle | None = None

    def note(self, fetcher: Any) -> None:
        """Events came. It holds for the next fetch: none is under way then."""
        fetcher._fetch_min_bytes, fetcher._fetch_max_wait_ms = LINGER_BYTES, LINGER_MS
        if self._calm is not None:
            self._calm.cancel()
        self._calm = asyncio.get_running_loop().call_later(CALM_S, self._end, fetcher)

    @staticmethod
    def _end(fetcher: Any) -> None:
        fetcher._fetch_min_bytes, fetcher._fetch_max_wait_ms = 1, FETCH_WAIT_MS


class BulkThread(driver.AIOKafkaConsumerThread):
    """The thread that talks to the broker."""

    logger = QUIET
    beat_s: float | None = None
    _linger: Linger
    _sought: dict[TP, int]

    @faust.Service.task
    async def _beat(self) -> None:
        """Show that the thread's event loop turns."""
        while not self.should_stop:
            self.beat_s = time.monotonic()
            await self.sleep(1.0)

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        conf = self.app.conf
        install(self.app.config.settings.in_flight_bytes)  # type: ignore[attr-defined]
        self._assignor = RoundRobinPartitionAssignor
        self._linger = Linger()
        self._sought = {}
        return aiokafka.AIOKafkaConsumer(
            client_id=conf.broker_client_id,
            group_id=conf.id,
            bootstrap_servers=driver.server_list(transport.url, transport.default_port),
            partition_assignment_strategy=[RoundRobinPartitionAssignor],
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_poll_records=conf.broker_max_poll_records,
            max_poll_interval_ms=int(conf.broker_max_poll_interval * 1000),
            max_partition_fetch_bytes=conf.consumer_max_fetch_size,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            request_timeout_ms=int(conf.broker_request_timeout * 1000),
            session_timeout_ms=int(conf.broker_session_timeout * 1000),
            rebalance_timeout_ms=int(conf.broker_rebalance_timeout * 1000),
            heartbeat_interval_ms=int(conf.broker_heartbeat_interval * 1000),
            isolation_level="read_committed",
            metadata_max_age_ms=30_000,
            **driver.credentials_to_aiokafka_auth(conf.broker_credentials, conf.ssl_context),
        )

    async def _fetch_records(
        self,
        consumer: aiokafka.AIOKafkaConsumer,
        active_partitions: set[TP],
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> dict[TP, list[Slice]]:
        """Fetch, and say of each partition from where to where.

        What comes of a partition that is sent elsewhere meanwhile may be of before or of afterwards, and named by the
        position of before it could pass for what follows that, with rows missing. So it is fetched again from there.
        """
        before = self._positions(consumer)
        self._sought.clear()
        try:
            records = await super()._fetch_records(consumer, active_partitions, timeout, max_records)
        except OffsetOutOfRangeError as error:
            for tp in error.args[0]:
                self.app.loop.call_soon_threadsafe(self._note_out_of_range, tp)
            return {}
        except NoOffsetForPartitionError:
            # Of the moment between an assignment and the seek that follows each.
            return {}
        if records:
            self._linger.note(consumer._fetcher)
        now = time.monotonic()
        slices: dict[TP, list[Slice]] = {}
        for tp, state in self._states(consumer).items():
            if tp in self._sought:
                consumer.seek(tp, self._sought[tp])
                continue
            first = before.get(tp)
            found = records.get(tp, ())
            if first is not None and state.has_valid_position and (found or state.position > first):
                after = state.position
                size = sum(len(r.value or b"") + len(r.key or b"") for r in found)
                left = max(0, (state.highwater or after) - after)
                slices[tp] = [Slice(TopicPartition(*tp), first, after, found, size, now, left)]
        return slices

    async def _seek_wait(self, consumer: aiokafka.AIOKafkaConsumer, partitions: Mapping[TP, int]) -> None:
        """Where a partition begins it is not held, whatever was before in the same generation."""
        self._sought.update(partitions)
        await super()._seek_wait(consumer, partitions)
        consumer.resume(*(aiokafka.TopicPartition(*tp) for tp in partitions))

    def _note_out_of_range(self, tp: TP) -> None:
        """In the main loop."""
        intake: Intake = self.app.intake  # type: ignore[attr-defined]
        self.app.add_future(intake.out_of_range(TopicPartition(*tp)))  # type: ignore[attr-defined]

    def heard_ms(self) -> dict[TP, int]:
        """When the broker last answered a fetch of each partition that is fetched, by the wall clock. Of any thread."""
        states = self._states(self._consumer) if self._consumer is not None else {}
        return {tp: state.timestamp for tp, state in states.items() if not state.paused and state.timestamp is not None}

    @classmethod
    def _positions(cls, consumer: aiokafka.AIOKafkaConsumer) -> dict[TP, int]:
        return {tp: state.position for tp, state in cls._states(consumer).items() if state.has_valid_position}

    @staticmethod
    def _states(consumer: aiokafka.AIOKafkaConsumer) -> dict[TP, Any]:
        subscription = consumer._subscription.subscription
        assignment = subscription.assignment if subscription is not None else None
        if assignment is None or not assignment.active:
            return {}
        return {tp: assignment.state_value(tp) for tp in assignment.tps}

    async def hold(self, tp: TP) -> None:
        """Stop fetching a partition."""
        await self.call_thread(self._hold, tp)

    async def move(self, tp: TP, offset: int) -> None:
        """Fetch a partition from an offset on."""
        await self.call_thread(self._move, tp, offset)

    async def on_thread_stop(self) -> None:
        """Leave the group, so that others have the partitions at once; but do not wait long to say so.

        Without a broker aiokafka waits for an answer, or lets the cancellation of a fetch out of its `stop`; of both
        Faust would never hear that the thread has ended, and SIGTERM would not end the worker.
        """
        with contextlib.suppress(asyncio.CancelledError):
            await _within(FAREWELL_S, super().on_thread_stop())

    async def _hold(self, tp: TP) -> None:
        consumer = self._ensure_consumer()
        # A partition without a position would be looked up, in vain, at each fetch.
        self._seek(consumer, tp, 0)
        consumer.pause(aiokafka.TopicPartition(*tp))  # it takes its own tuples only

    async def _move(self, tp: TP, offset: int) -> None:
        consumer = self._ensure_consumer()
        self._seek(consumer, tp, offset)
        consumer.resume(aiokafka.TopicPartition(*tp))

    def _seek(self, consumer: aiokafka.AIOKafkaConsumer, tp: TP, offset: int) -> None:
        consumer.seek(tp, offset)
        self._sought[tp] = offset


class BulkConsumer(driver.Consumer):
    """Faust's consumer, which begins at the ledger's end and commits what the ledger has."""

    logger = QUIET
    _thread: BulkThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_offset = ForgetfulOffsets()
        self._intake: Intake = self.app.intake  # type: ignore[attr-defined]

    def _new_consumer_thread(self) -> BulkThread:
        return BulkThread(self, loop=self.loop, beacon=self.beacon)

    async def perform_seek(self) -> None:
        """Called on each assignment, and when a fetch crossed a pause of the flow."""
        partitions = {TopicPartition(*tp) for tp in self.assignment()}
        starts = await self._intake.assign(self.app.consumer_generation_id, partitions)
        assigned = self.assignment()
        seeks = {TP(*partition): start for partition, start in starts.items()}
        await self._thread.seek_wait({tp: start for tp, start in seeks.items() if tp in assigned})

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> Any:
        if not await self._intake.has_room(timeout):
            return {}
        return await super()._getmany(active_partitions, timeout)

    def _to_message(self, tp: TP, record: Slice) -> ConsumerMessage:
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            record.first,
            time.time(),
            0,
            None,
            None,
            record,  # type: ignore[arg-type]
            None,
            -1,
            -1,
            tp,
            generation_id=self.app.consumer_generation_id,
        )

    def track_message(self, message: Any) -> None:
        """Nothing waits for acknowledgements: what is done is asked of the intake."""

    def _filter_committable_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        ends = {TP(*tp): offset for tp, offset in self._intake.committable().items()}
        return {tp: offset for tp, offset in ends.items() if self._should_commit(tp, offset)}

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Gaps are seen by position, not by offset."""

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's check counts single records; `/healthz` looks at the coordinator and the assignment instead."""

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Append what can be appended, commit, and only then let Faust forget."""
        await self._intake.release()
        await self.commit()
        await super().on_partitions_revoked(revoked)

    async def on_stop(self) -> None:
        """The same when the worker stops. A broker that does not answer is not waited for."""
        await self._intake.release()
        await _within(FAREWELL_S, super().on_stop())

    async def hold(self, partition: TopicPartition) -> None:
        """Stop fetching a partition; nothing if it is not ours any more."""
        await self._if_assigned(self._thread.hold(TP(*partition)))

    async def move(self, partition: TopicPartition, offset: int) -> None:
        """Fetch a partition from an offset on; nothing if it is not ours any more."""
        await self._if_assigned(self._thread.move(TP(*partition), offset))

    def high_water(self, partition: TopicPartition) -> int | None:
        """The end of the log as last heard; None if not heard yet."""
        try:
            high: int | None = self._thread._ensure_consumer().highwater(TP(*partition))
        except (IllegalStateError, faust.exceptions.FaustError, AssertionError):
            return None
        return high

    def silence_s(self) -> Mapping[TopicPartition, float]:
        """How long ago the broker last answered for each partition that is fetched."""
        now_ms = time.time() * 1000
        return {TopicPartition(*tp): (now_ms - heard_ms) / 1000 for tp, heard_ms in self._thread.heard_ms().items()}

    def coordinator_failed(self) -> bool:
        """Whether aiokafka's coordinator ended while the worker runs: nothing would ever come again."""
        kafka = self._thread._consumer
        task = getattr(getattr(kafka, "_coordinator", None), "_coordination_task", None)
        return task is not None and task.done() and not self.should_stop

    def thread_failed(self) -> bool:
        """Whether the thread that talks to the broker ended, or hangs, while the worker runs."""
        thread = self._thread
        is_dead = thread._thread is not None and not thread._thread.is_alive()
        is_silent = thread.beat_s is not None and time.monotonic() - thread.beat_s > LONGEST_SILENCE_S
        return (is_dead or is_silent) and not self.should_stop

    async def _if_assigned(self, moving: Any) -> None:
        try:
            await moving
        except (IllegalStateError, KafkaError) as error:
            self.log.info("partition moved meanwhile: %s", error)


class BulkTransport(driver.Transport):
    """Faust's transport with our consumer."""

    Consumer: ClassVar[type[Any]] = BulkConsumer


class BulkSchema(faust.Schema[Any, Any]):
    """Slices pass as they are."""

    def loads_key(self, app: Any, message: Any, *, loads: Any = None, serializer: Any = None) -> Any:
        """None."""
        return message.key

    def loads_value(self, app: Any, message: Any, *, loads: Any = None, serializer: Any = None) -> Any:
        """The slice."""
        return message.value
