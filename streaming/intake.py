"""The stream between assignments: where each partition begins, who takes its slices, what has become of it.

All state here belongs to the event loop and, but for the views that were stopped, to one assignment: a new one begins
with the ledgers and forgets expected offsets, buffers and tasks of the former.

The views of a topic are read together. One that cannot go on, or that is too far behind the others, is left out, and
the others go on; the worker ends when none is left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from headrace.chains import StreamEnd, StreamLedger
from headrace.errors import (
    ChainClosedError,
    ConfigError,
    HeadraceError,
    LedgerError,
    LostRaceError,
    TransientError,
)
from headrace.evolution import conflict
from streaming.broker import Broker, Log
from streaming.formats import decoder_of
from streaming.health import OFFLINE, ONLINE, Fault, Health, Kind
from streaming.lane import Budget, Lane, StoreDownError, TopicReplacedError, replaced
from streaming.settings import StreamConfig, View, schema_registry
from streaming.share import DeadLetterShareError, LetterShare
from streaming.slices import Position, Slice, TopicPartition
from streaming.stores import RealStores
from streaming.threads import Pools
from streaming.view_steps import ViewSteps

logger = logging.getLogger(__name__)

FINISH_S = 5.0
"""How long an assignment that ends may take to append what it has."""

ASSIGNMENT = "assignment"
"""The step before the first slice."""

STALLED_S = 60.0
"""So much longer than `append_seconds` a ledger may stand still with work in hand; slow stores are not stalled ones."""

OTHERS_WAIT_S = 3.0
"""How long an assignment waits for each of its partitions to begin."""

RESYNC_PAUSE_S = 1.0

SECOND_LOOK_S = 10.0
"""After so long it is looked again at a view that was left out for a reason that may pass."""

Result = TypeVar("Result")


class Mover(Protocol):
    """The consumer, as far as partitions are moved."""

    async def hold(self, partition: TopicPartition) -> None:
        """Stop fetching."""

    async def move(self, partition: TopicPartition, offset: int) -> None:
        """Fetch from an offset on."""

    def high_water(self, partition: TopicPartition) -> int | None:
        """The end of the log as last heard."""

    def silence_s(self) -> Mapping[TopicPartition, float]:
        """How long ago the broker last answered for each partition that is fetched."""


class StoppedError(Exception):
    """A view cannot go on with a topic; the message names the facts and the command that helps."""


class ViewError(Exception):
    """The ledger of a view cannot be read now."""

    def __init__(self, view: View, why: Exception) -> None:
        super().__init__(f"feature view `{view.contract.name}`: {why}")
        self.view = view


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


class StreamIntake:
    """See the module.

    Args:
        on_fatal: what to do when the worker cannot go on; does not return before the worker ends.
    """

    def __init__(self, config: StreamConfig, health: Health, on_fatal: Callable[[BaseException], None]) -> None:
        self._config = config
        self._views = dict(config.views)
        self._settings = config.settings
        self._health = health
        self._on_fatal = on_fatal
        self.mover: Mover | None = None
        self._broker = Broker(config)
        self._stores = RealStores(config, self._broker)
        self._looks = ThreadPoolExecutor(4, "headrace-looks")
        self._budget: Budget | None = None
        self._generation: int | None = None
        self._partitions: set[TopicPartition] = set()
        self._assignment = 0
        self._ending = asyncio.Lock()
        self._runs: dict[TopicPartition, Run] = {}
        self._committed: dict[TopicPartition, int] = {}
        served = self.views
        pools = Pools.of(served.values())
        self._steps = {
            name: self._steps_of(view, pools[name], LetterShare(name, config.settings)) for name, view in served.items()
        }
        self._stopped: dict[tuple[str, str], str] = {}
        self._passing: set[tuple[str, str]] = set()
        self._behind: dict[tuple[TopicPartition, str], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        health.gauges.source = self._gauges
        health.gauges.waiting = self._waiting
        health.gauges.in_flight = lambda: (self._room.used, self._room.limit)
        health.gauges.assigned = lambda: len(self._runs)
        self._tell_objectives()

    @property
    def views(self) -> dict[str, View]:
        """The views that are served, as they are declared now, by name."""
        return {view.contract.name: view for views in self._views.values() for view in views}

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

        So is a partition that cannot begin yet, one without a leader for instance: the others do not wait for it.

        Faust calls it twice at once now and then, from its recovery and from its fetcher: the later call counts.
        """
        if generation == self._generation and partitions == self._runs.keys():
            return {partition: run.position.expected for partition, run in self._runs.items() if run.lanes}
        assignment = await self._end_assignment()
        if assignment != self._assignment:
            return {}
        self._generation, self._partitions = generation, partitions
        found = await self._begin_all(partitions, assignment)
        if assignment == self._assignment and found.keys() == self._runs.keys():
            where = {p: "held" if start is None else f"from {start}" for p, start in found.items()}
            logger.info(
                "generation %d: %s",
                generation,
                ", ".join(f"{p.topic}[{p.partition}] {start}" for p, start in where.items()) or "no partition, a spare",
            )
        return {partition: start for partition, start in found.items() if start is not None}

    async def release(self) -> None:
        """See `Intake`."""
        await self._end_assignment()

    async def renew(self, changed: Mapping[str, View], refused: Mapping[str, str]) -> None:
        """Take over changed views, and leave out those that cannot go on, as their declarations are now.

        What was taken is appended as at the end of an assignment, and the same partitions begin again from the ledgers.

        Args:
            refused: why, by name.
        """
        async with self._ending:  # an assignment that waits for another's end is not to be superseded: it begins then
            if self._generation is None:
                self._take_over(changed, refused)
                return
        generation, partitions = self._generation, self._partitions
        assignment = await self._end_assignment(lambda: self._take_over(changed, refused))
        if assignment != self._assignment:
            return  # the assignment that came meanwhile begins with them
        self._generation = generation
        for partition, start in (await self._begin_all(partitions, assignment)).items():
            if start is not None and assignment == self._assignment:
                await self._consumer.move(partition, start)

    async def has_room(self, timeout_s: float) -> bool:
        """See `Intake`. A view that fails may not keep the others waiting: what it holds is given back."""
        if self._room.is_spent and (lane := self._hindrance()) is not None:
            reason = f"{lane.failing}; it holds all that may be in flight while other views wait"
            self._stop(lane.partition.topic, lane.view, reason, passes=True)
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
            logger.warning(
                "%s[%d]: the log does not have the next offset; looking", *partition, extra=partition._asdict()
            )
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
                extra=piece.partition._asdict(),
            )
            self._spawn(self._consumer.move(piece.partition, run.position.expected))

    def faults(self) -> list[Fault]:
        """What keeps events from the stores."""
        failing = [f"{label}: step {step} fails: {why}" for (label, step), why in self._health.failing.items()]
        stalled_s = self._settings.append_seconds + STALLED_S
        stalled = [
            f"{lane.label}: {lane.stands_still_s():.0f} s without an append, though there is something to append"
            for run in self._runs.values()
            for lane in run.lanes
            if lane.stands_still_s() > stalled_s
        ]
        shares = [steps.share for steps in self._steps.values()]
        stopped = [f"{name} is left out of topic `{topic}`: {why}" for (topic, name), why in self._stopped.items()]
        return [
            *(Fault(Kind.STEP_FAILING, text) for text in failing),
            *(Fault(Kind.STALLED, text) for text in stalled),
            *(Fault(Kind.CONSUMER, text) for text in self._silent()),
            *(Fault(Kind.VIEW_LEFT_OUT, text) for text in stopped),
            *(Fault(Kind.VIEW_BEHIND, text) for text in self._behind.values()),
            *(Fault(Kind.DEAD_LETTERS, share.fault) for share in shares if share.fault is not None),
        ]

    def close(self) -> None:
        """Let go of threads and connections, and of what would still ask them."""
        for task in self._tasks:
            task.cancel()
        for steps in self._steps.values():
            steps.pools.close()
        self._looks.shutdown(wait=False, cancel_futures=True)

    # -- views -------------------------------------------------------------------------------------------------------

    def _take_over(self, changed: Mapping[str, View], refused: Mapping[str, str]) -> None:
        """No lane is at work, and none has been opened for what is to begin."""
        former = self.views
        self._views = {
            topic: tuple(changed.get(view.contract.name, view) for view in views)
            for topic, views in self._views.items()
        }
        for name, view in changed.items():
            steps = self._steps[name]
            self._steps[name] = self._steps_of(view, steps.pools, steps.share)
            self._stopped.pop((str(view.contract.topic), name), None)
            self._health.renewals.labels(name).inc()
            logger.info("`%s` changed in the registry, and goes on as it is declared now", name, extra={"view": name})
        for name, reason in refused.items():
            topic = str(former[name].contract.topic)
            self._stopped.pop((topic, name), None)  # the reason may be another now
            self._stop(topic, former[name], reason)
        self._tell_objectives()

    def _steps_of(self, view: View, pools: Pools, share: LetterShare) -> ViewSteps:
        registry = schema_registry(self._settings)  # whose connection is of one thread
        decoder = decoder_of(view.contract, registry)
        may_wait = view.transform is not None or (registry is not None and view.contract.message_format == "avro")
        return ViewSteps(view, decoder, self._stores, pools, self._health, self._settings, share, may_wait=may_wait)

    def _tell_objectives(self) -> None:
        self._health.gauges.objectives = {
            (name, store): within_s
            for name, view in self.views.items()
            for store, within_s in view.contract.objectives.of_stores().items()
        }

    # -- partitions --------------------------------------------------------------------------------------------------

    async def _end_assignment(self, between: Callable[[], None] = lambda: None) -> int:
        """End the assignment that is or is beginning; the number of the one that may begin, if no other came since.

        Args:
            between: called when all lanes have ended, and before any begins.
        """
        self._assignment += 1
        assignment = self._assignment
        self._generation = None
        for key in [key for key in self._health.failing if key[1] == ASSIGNMENT]:
            del self._health.failing[key]
        runs, self._runs = self._runs, {}
        self._stopped = {key: reason for key, reason in self._stopped.items() if key not in self._passing}
        self._passing.clear()
        self._behind.clear()
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        async with self._ending:  # the next may read the ledgers when the lanes of all before have ended
            await asyncio.gather(*(lane.finish(FINISH_S) for run in runs.values() for lane in run.lanes))
            between()
        for partition, run in runs.items():
            if run.lanes:
                self._committed[partition] = min(lane.end for lane in run.lanes)
        return assignment

    async def _begin_all(self, partitions: set[TopicPartition], assignment: int) -> dict[TopicPartition, int | None]:
        """Where each partition begins, in order; None for one that cannot yet."""
        ordered = sorted(partitions)
        starts = await asyncio.gather(*(self._begin_in_time(partition, assignment) for partition in ordered))
        return dict(zip(ordered, starts, strict=True))

    async def _begin_in_time(self, partition: TopicPartition, assignment: int) -> int | None:
        """Begin a partition; None if it is held, for good or until it can begin."""
        beginning = asyncio.ensure_future(self._begin_safely(partition, assignment))
        done, _ = await asyncio.wait({beginning}, timeout=OTHERS_WAIT_S)
        if done:
            return beginning.result()
        if assignment == self._assignment:
            self._runs[partition] = Run(Position(0), [])
            await self._consumer.hold(partition)
            self._spawn(self._move_when_begun(partition, assignment, beginning))
        return None

    async def _move_when_begun(
        self, partition: TopicPartition, assignment: int, beginning: asyncio.Future[int | None]
    ) -> None:
        start = await beginning
        if start is not None and assignment == self._assignment:
            logger.info("%s[%d]: begins from %d", *partition, start, extra=partition._asdict())
            await self._consumer.move(partition, start)

    async def _begin_safely(self, partition: TopicPartition, assignment: int) -> int | None:
        """Begin a partition; None if it is held because no view can go on with it or its log is too short for now."""
        deadline = time.monotonic() + self._settings.store_retry_seconds
        pause_s = 0.1
        while assignment == self._assignment:
            try:
                if not self._served(partition.topic):
                    break
                start = await self._begin(partition, assignment)
                self._health.failing.pop(_short_key(partition), None)
                if self._runs[partition].lanes:
                    return start
                break
            except OutdatedError:
                return None
            except ShortLogError as error:
                logger.warning("%s[%d]: %s", *partition, error, extra=partition._asdict())
                self._health.failing[_short_key(partition)] = str(error)
                self._spawn(self._watch_short_log(partition, assignment))
                break
            except Exception as error:  # noqa: BLE001 - whatever it is, it is retried or named
                is_alone = not isinstance(error, ViewError) or len(self._served(partition.topic)) == 1
                if is_alone and time.monotonic() + pause_s <= deadline:
                    if _short_key(partition) not in self._health.failing:
                        logger.warning("%s[%d]: cannot begin yet: %s", *partition, error, extra=partition._asdict())
                    self._health.failing[_short_key(partition)] = str(error)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, 5.0)
                elif isinstance(error, ViewError):
                    self._health.failing.pop(_short_key(partition), None)
                    self._stop(partition.topic, error.view, str(error), passes=True)
                else:
                    self._on_fatal(error)
                    break
        if assignment != self._assignment:
            return None
        self._runs[partition] = Run(Position(0), [])
        await self._consumer.hold(partition)
        return None

    async def _begin(self, partition: TopicPartition, assignment: int) -> int:
        """Read the ledgers, compare them with the log, and open the lanes of the views that go on together.

        Raises:
            OutdatedError: see there; also instead of any other error, which is nobody's concern then.
            ShortLogError, ViewError: see there.
        """
        try:
            ledgers, present = await self._ledgers(partition)
        except Exception as error:
            if assignment != self._assignment:
                raise OutdatedError from error
            raise
        if assignment != self._assignment:
            raise OutdatedError
        together = self._together(partition, ledgers)
        start = min((end.end for _, _, end in together), default=0)
        opened = [self._open(view, partition, ledger, end, present) for view, ledger, end in together]
        self._runs[partition] = Run(Position(start), opened)
        return start

    async def _ledgers(
        self, partition: TopicPartition
    ) -> tuple[list[tuple[View, StreamLedger, StreamEnd]], str | None]:
        """The ledgers of the views that can go on, with their ends, and the topic's id; leaves out who cannot."""
        asked_s = time.monotonic()
        present = await self._look(lambda: self._broker.topic_id(partition.topic, asked_s))
        log = await self._look(lambda: self._broker.log(*partition))
        ledgers: list[tuple[View, StreamLedger, StreamEnd]] = []
        for view in self._served(partition.topic):
            ledger = StreamLedger(view.contract, *partition)
            try:
                end = await self._where(view, ledger, partition, log, present)
                schema = await self._look(partial(ledger.other_schema, end.epoch))
                if schema is not None and (why := conflict(view.contract, schema)) is not None:
                    raise StoppedError(why)
            except (StoppedError, LedgerError, ConfigError) as error:
                self._stop(partition.topic, view, str(error))
                continue
            except LostRaceError:
                raise
            except (OSError, TransientError) as error:
                raise ViewError(view, error) from error
            if end.end > log.latest:
                msg = (
                    f"the log of {partition.topic}[{partition.partition}] ends at {log.latest}, the ledger of "
                    f"`{view.contract.name}` at {end.end}"
                )
                raise ShortLogError(msg)
            ledgers.append((view, ledger, end))
        return ledgers, present

    async def _where(
        self, view: View, ledger: StreamLedger, partition: TopicPartition, log: Log, present: str | None
    ) -> StreamEnd:
        """Where a ledger ends, begun if it is new.

        Raises:
            StoppedError: it is not of this topic, or the topic has no longer what comes next.
        """
        end = await self._look(ledger.end)
        if end.exists and None not in (present, end.topic_id) and present != end.topic_id:
            raise StoppedError(replaced(partition.topic, end.topic_id, present))
        if not end.exists:
            return await self._look(partial(ledger.begin, log.earliest, present))
        if end.end < log.earliest:
            return await self._lost_head(view, partition, ledger, end, log.earliest, present)
        return end

    def _together(
        self, partition: TopicPartition, ledgers: list[tuple[View, StreamLedger, StreamEnd]]
    ) -> list[tuple[View, StreamLedger, StreamEnd]]:
        """Those that are read together, from the lowest end: not who would keep the others reading what they have."""
        furthest = max((end.end for _, _, end in ledgers), default=0)
        together = []
        for view, ledger, end in ledgers:
            name = view.contract.name
            if furthest - end.end <= self._settings.view_gap_offsets:
                self._behind.pop((partition, name), None)
                together.append((view, ledger, end))
                continue
            if (partition, name) in self._behind:  # it is told and watched already
                continue
            reason = (
                f"`{name}` is left out of {partition.topic}[{partition.partition}]: it is {furthest - end.end} offsets "
                "behind the other views (HEADRACE_VIEW_GAP_OFFSETS); let it catch up in a worker of its own: "
                f"HEADRACE_VIEWS={name} faust -A streaming worker"
            )
            logger.error(reason)
            self._behind[partition, name] = reason
            self._spawn(self._watch_behind(partition, view, self._assignment))
        return together

    def _open(
        self, view: View, partition: TopicPartition, ledger: StreamLedger, end: StreamEnd, present: str | None
    ) -> Lane:
        return Lane(
            self._steps[view.contract.name],
            partition,
            start=end,
            topic_id=present or end.topic_id,
            ledger=ledger,
            stores=self._stores,
            budget=self._room,
            health=self._health,
            settings=self._settings,
            on_fault=self._lane_fault,
        )

    async def _lost_head(
        self,
        view: View,
        partition: TopicPartition,
        ledger: StreamLedger,
        end: StreamEnd,
        earliest: int,
        present: str | None,
    ) -> StreamEnd:
        """The topic no longer has what the ledger wants next: record the gap if that is allowed, else stop."""
        facts = (
            f"the ledger of `{view.contract.name}` for {partition.topic}[{partition.partition}] ends at {end.end}, and "
            f"the oldest event that the topic still has is {earliest}: {earliest - end.end} offsets were lost by "
            "retention"
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
        start = await self._begin_safely(partition, assignment)
        if start is not None and assignment == self._assignment:
            self._health.resyncs.labels(partition.topic).inc()
            logger.info("%s[%d]: goes on from %d", *partition, start, extra=partition._asdict())
            await self._consumer.move(partition, start)

    async def _watch_short_log(self, partition: TopicPartition, assignment: int) -> None:
        """A log may be short for a moment while a broker recovers; after the bound it is another log."""
        deadline = time.monotonic() + self._settings.short_log_seconds
        while assignment == self._assignment:
            await asyncio.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
            key = _short_key(partition)
            try:
                start = await self._begin(partition, assignment)
            except ShortLogError as error:
                if time.monotonic() < deadline:
                    continue
                self._health.failing.pop(key, None)
                self._stop_all(
                    partition.topic,
                    f"{error}, for {self._settings.short_log_seconds:g} s: it is another log; if that is intended, run "
                    f"`faust -A streaming start --topic {partition.topic} --new-epoch` and start the worker again",
                )
                return
            except OutdatedError:
                return
            except Exception as error:  # noqa: BLE001 - looked at again
                logger.warning("%s[%d]: %s", *partition, error, extra=partition._asdict())
                continue
            self._health.failing.pop(key, None)
            if self._runs[partition].lanes:
                text = "%s[%d]: the log is long enough again; from %d"
                logger.info(text, *partition, start, extra=partition._asdict())
                await self._consumer.move(partition, start)
            return

    async def _watch_behind(self, partition: TopicPartition, view: View, assignment: int) -> None:
        """Take a view back in when it has caught up, in whatever worker it did."""
        ledger = StreamLedger(view.contract, *partition)
        while assignment == self._assignment and (partition, view.contract.name) in self._behind:
            await asyncio.sleep(SECOND_LOOK_S)
            try:
                end = (await self._look(ledger.end)).end
            except (LedgerError, OSError, TransientError) as error:
                logger.warning("%s: %s", view.contract.name, error, extra=partition._asdict())
                continue
            run = self._runs.get(partition)
            if run is not None and run.position.expected - end <= self._settings.view_gap_offsets:
                await self._restart(partition)
                return

    def _lane_fault(self, lane: Lane, error: BaseException) -> None:
        """A lane ended by itself."""
        partition = lane.partition
        if isinstance(error, LostRaceError | ChainClosedError):
            logger.info("%s[%d]: %s; reading the ledger again", *partition, error, extra=partition._asdict())
            run = self._runs.get(partition)
            if run is not None and lane in run.lanes:  # else it belongs to an assignment that ended
                self._spawn(self._restart(partition))
        elif isinstance(error, DeadLetterShareError):
            self._on_fatal(error)
        elif isinstance(error, TopicReplacedError):
            self._stop_all(partition.topic, str(error))
        elif isinstance(error, HeadraceError):
            self._stop(partition.topic, lane.view, str(error), passes=isinstance(error, StoreDownError))
        else:
            self._on_fatal(error)

    def _stop_all(self, topic: str, reason: str) -> None:
        """Leave a topic alone."""
        for view in self._views[topic]:
            self._stop(topic, view, reason)

    def _stop(self, topic: str, view: View, reason: str, *, passes: bool = False) -> None:
        """Leave a view of a topic out; with none left the worker ends.

        Args:
            passes: the reason may: it is tried again.
        """
        name = view.contract.name
        if (topic, name) in self._stopped:
            return
        logger.error("`%s` is left out of topic `%s`: %s", name, topic, reason, extra={"view": name, "topic": topic})
        self._stopped[topic, name] = reason
        for partition, run in self._runs.items():
            if partition.topic == topic and run.lanes:
                for lane in [lane for lane in run.lanes if lane.view is view]:
                    lane.drop()
                    run.lanes.remove(lane)
                if not run.lanes:
                    self._spawn(self._consumer.hold(partition))
        if len(self._stopped) == len(self.views):
            self._on_fatal(StoppedError(reason))
        elif passes:
            self._passing.add((topic, name))
            self._spawn(self._take_in(topic, view, self._assignment))

    async def _take_in(self, topic: str, view: View, assignment: int) -> None:
        """Try again with a view that was left out; the other views of the topic go back with it."""
        await asyncio.sleep(SECOND_LOOK_S)
        self._passing.discard((topic, view.contract.name))
        self._stopped.pop((topic, view.contract.name), None)
        if assignment == self._assignment:
            logger.info("`%s` is tried again with topic `%s`", view.contract.name, topic)
            for partition in [partition for partition in self._runs if partition.topic == topic]:
                await self._restart(partition)

    def _served(self, topic: str) -> list[View]:
        """The views of a topic that are not left out."""
        return [view for view in self._views[topic] if (topic, view.contract.name) not in self._stopped]

    def _hindrance(self) -> Lane | None:
        """Of the lanes whose step fails the one that holds most, if another view waits for room that would go on."""
        lanes = [(partition, run, lane) for partition, run in self._runs.items() for lane in run.lanes]
        failing = [lane for _, _, lane in lanes if lane.failing is not None]
        faulty = {lane.view.contract.name for lane in failing}
        waits = any(
            lane.view.contract.name not in faulty
            and (self._consumer.high_water(partition) or 0) > run.position.expected
            for partition, run, lane in lanes
        )
        return max(failing, key=lambda lane: lane.outstanding) if failing and waits else None

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

    def _silent(self) -> list[str]:
        """Partitions of which the broker tells nothing for longer than the group waits for a worker."""
        if self.mover is None or self._room.is_spent:  # then nothing is asked
            return []
        silent = {p: s for p, s in self.mover.silence_s().items() if s > self._settings.session_seconds}
        names = ", ".join(f"{topic}[{number}]" for topic, number in sorted(silent))
        return [f"the broker has not answered for {max(silent.values()):.0f} s: {names}"] if silent else []

    def _gauges(self) -> Mapping[tuple[str, str, int], tuple[int, int | None]]:
        found: dict[tuple[str, str, int], tuple[int, int | None]] = {}
        for partition, run in list(self._runs.items()):
            high = self.mover.high_water(partition) if self.mover is not None else None
            for lane in list(run.lanes):
                behind = None if high is None else max(0, high - lane.end)
                found[lane.view.contract.name, partition.topic, partition.partition] = (lane.end, behind)
        return found

    def _waiting(self) -> Mapping[tuple[str, str], int]:
        """By view and store, when the oldest event that the store does not have yet was produced, milliseconds."""
        found: dict[tuple[str, str], int] = {}
        for lane in [lane for run in self._runs.values() for lane in run.lanes]:
            for store in (ONLINE, OFFLINE):
                oldest_ms = lane.waiting.oldest_ms(store)
                if oldest_ms is not None:
                    key = (lane.view.contract.name, store)
                    found[key] = min(oldest_ms, found.get(key, oldest_ms))
        return found


def _short_key(partition: TopicPartition) -> tuple[str, str]:
    return f"{partition.topic}[{partition.partition}]", ASSIGNMENT
