"""One view on one partition: the steps from fetched records to both stores, in order, each off the event loop.

Steps of successive slices overlap; their order does not change:

1. Take slices, decode, transform, cast, apply the rules.
2. Write the rejects to the dead letters, and wait for the broker's word.
3. Write online, newest wins.
4. Append `[first, next)` to the ledger, several slices at a time: the commit.

Steps 1 and 3 are taken together with the other partitions of the view (`streaming.view_steps`).

A crash anywhere repeats only steps that do no harm when repeated. A lane belongs to one assignment; when that ends it
finishes what it can in a bounded time and the rest is read again by whoever is next.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from headrace.chains import StreamEnd, StreamLedger
from headrace.errors import LostRaceError, TerminalError
from headrace.place import stat_of
from streaming.batches import Batch, Fetched, Gathering
from streaming.health import OFFLINE, ONLINE, Health
from streaming.settings import StreamSettings
from streaming.share import DeadLetterShareError
from streaming.slices import Slice, TopicPartition
from streaming.stores import SERVERS_AGE_S, Stores
from streaming.view_steps import ViewSteps, measured

logger = logging.getLogger(__name__)

SLOW_S = 3.0
"""After this long in one call a step counts as failing. To wait for the calls of other partitions is no failure."""

HOPELESS_S = 1.0
"""How long a lane whose step fails now may take to finish."""

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
WAITING_BATCHES = 2

BACKLOG_WAIT_S = 0.05
"""How long a batch waits for more records when there are plenty."""

WORTH_A_FILE = 0.1
"""Of `append_rows`: so many rows are appended at once where the log has no more."""

Result = TypeVar("Result")


class TopicReplacedError(TerminalError):
    """The topic was deleted and made anew: its offsets are not those of the ledger."""


class Budget:
    """The bound on bytes that were fetched and not yet appended. Of the event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._room = asyncio.Event()
        self._room.set()

    @property
    def used(self) -> int:
        """Bytes that came and are not done."""
        return self._used

    @property
    def limit(self) -> int:
        """Where fetching pauses."""
        return self._limit

    @property
    def is_spent(self) -> bool:
        """Whether nothing more may be fetched now."""
        return self._used >= self._limit

    def take(self, size: int) -> None:
        """Note bytes that came. They came already, so this may go beyond the limit."""
        self._used += size
        if self.is_spent:
            self._room.clear()

    def give(self, size: int) -> None:
        """Note bytes that are done."""
        self._used -= size
        if not self.is_spent:
            self._room.set()

    async def wait(self, timeout_s: float) -> bool:
        """Wait for room; False if there is none after that time."""
        if not self.is_spent:
            return True
        try:
            await asyncio.wait_for(self._room.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


class Waiting:
    """When what a store does not have yet was produced: how old its oldest event is, while it waits."""

    def __init__(self) -> None:
        self._pieces: dict[str, deque[tuple[int, int]]] = {ONLINE: deque(), OFFLINE: deque()}

    def put(self, piece: Slice) -> None:
        """A slice came."""
        if piece.records:
            produced_ms = piece.records[0].timestamp
            for pieces in self._pieces.values():
                pieces.append((piece.next, produced_ms if produced_ms > 0 else int(time.time() * 1000)))

    def done(self, store: str, next: int) -> None:  # noqa: A002 - the field's own word
        """A store has what lies before an offset."""
        pieces = self._pieces[store]
        while pieces and pieces[0][0] <= next:
            pieces.popleft()

    def oldest_ms(self, store: str) -> int | None:
        """When the oldest event that waits was produced, milliseconds since the epoch; None if none waits."""
        pieces = self._pieces[store]
        return pieces[0][1] if pieces else None


class Lane:
    """See the module.

    Args:
        start: where the ledger ends, and in which epoch.
        topic_id: of the topic at the start of the assignment.
        on_fault: called once, from the event loop, with what stopped the lane; the lane does nothing more.
    """

    def __init__(
        self,
        steps: ViewSteps,
        partition: TopicPartition,
        *,
        start: StreamEnd,
        topic_id: str | None,
        ledger: StreamLedger,
        stores: Stores,
        budget: Budget,
        health: Health,
        settings: StreamSettings,
        on_fault: Callable[[Lane, BaseException], None],
    ) -> None:
        self.view = steps.view
        self._steps = steps
        self.partition = partition
        self.end = start.end
        self.epoch = start.epoch
        self._topic_id = topic_id
        self._ledger = ledger
        self._stores = stores
        self._budget = budget
        self._health = health
        self._settings = settings
        self._on_fault = on_fault
        fields = {"view": self.view.contract.name, **partition._asdict()}
        self._log = logging.LoggerAdapter(logger, fields)
        self._name = self.view.contract.name
        self._taken = start.end
        self._outstanding = 0
        self._moved_s = time.monotonic()
        self.waiting = Waiting()
        self._servers = start.servers
        self._looked_s = -math.inf
        self._failing_since_s: dict[str, float] = {}
        self._unappended: list[Batch] = []
        self._inbox: asyncio.Queue[Slice | None] = asyncio.Queue()
        self._decoded: asyncio.Queue[Batch | None] = asyncio.Queue(WAITING_BATCHES)
        self._may_decode = asyncio.Event()
        self._may_decode.set()
        self._online: asyncio.Queue[Batch | None] = asyncio.Queue()
        tasks = (self._decode_step, self._online_step, self._append_step)
        self._tasks = [asyncio.create_task(self._guarded(task)) for task in tasks]
        self._is_faulty = False

    def put(self, piece: Slice) -> None:
        """Take the next slice of the partition; what the ledger has already is left out.

        Raises:
            AssertionError: offsets are missing before it; to go on would be to lose them.
        """
        if piece.next <= self._taken:
            return
        if piece.first > self._taken:
            msg = f"{self.label}: the slice at {piece.first} does not follow {self._taken}"
            raise AssertionError(msg)
        own = piece.from_offset(self._taken)
        if self._taken == self.end:
            self._moved_s = time.monotonic()
        self._taken = own.next
        self._outstanding += own.size
        self._budget.take(own.size)
        self.waiting.put(own)
        self._inbox.put_nowait(own)

    def stands_still_s(self) -> float:
        """For how long the ledger has not moved although there is something to append."""
        return time.monotonic() - self._moved_s if self._taken > self.end else 0.0

    async def finish(self, timeout_s: float) -> None:
        """Bring what was taken to the stores and end; after the time, drop what is left.

        While a step fails there is little hope, and others may do better: then the time is short.
        """
        self._inbox.put_nowait(None)
        try:
            if self.failing is not None:
                timeout_s = min(timeout_s, HOPELESS_S)
            if not self._is_faulty:
                await asyncio.wait(self._tasks, timeout=timeout_s)
        finally:
            self.drop()

    def drop(self) -> None:
        """End now. A call that is under way in a thread ends by itself, and does no harm."""
        for task in self._tasks:
            task.cancel()
        self._budget.give(self._outstanding)
        self._outstanding = 0
        for key in [key for key in self._health.failing if key[0] == self.label]:
            del self._health.failing[key]

    @property
    def outstanding(self) -> int:
        """The bytes that it has taken and not appended."""
        return self._outstanding

    @property
    def failing(self) -> str | None:
        """What one of its steps fails for, now."""
        return next((why for (label, _), why in self._health.failing.items() if label == self.label), None)

    @property
    def label(self) -> str:
        """View and partition, for messages."""
        return f"{self._name} {self.partition.topic}[{self.partition.partition}]"

    async def _guarded(self, step: Callable[[], Any]) -> None:
        try:
            await step()
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - nothing may be lost in a task
            if not self._is_faulty:
                self._is_faulty = True
                for task in self._tasks:
                    if task is not asyncio.current_task():
                        task.cancel()
                self._on_fault(self, error)

    async def _decode_step(self) -> None:
        while True:
            # Behind a batch that is not full, not before it is being written: what comes meanwhile is decoded together.
            await self._may_decode.wait()
            pieces, is_last = await self._gathered()
            if pieces:
                records = [record for piece in pieces for record in piece.records]
                fetched = Fetched(self._name, self.partition, self.epoch, self._topic_id, pieces, records)
                # A decoder may have to ask a schema registry. It counts nothing before that, so a repeat does no harm.
                batch = await self._insist("decode", partial(self._steps.decode, fetched))
                share = self._steps.share
                if share.fault is not None and self._settings.dead_letter_stop:
                    msg = f"{share.fault}; HEADRACE_DEAD_LETTER_STOP=true: nothing of this batch was written"
                    raise DeadLetterShareError(msg)
                if batch.letters:
                    writing = partial(self._stores.write_letters, batch.letters)
                    await self._insist("dead_letters", self._timed("dead_letters", writing, len(batch.letters)))
                batch.letters = []
                if len(records) < self._settings.slice_records:
                    self._may_decode.clear()
                await self._decoded.put(batch)
            if is_last:
                await self._decoded.put(None)
                return

    async def _gathered(self) -> tuple[list[Slice], bool]:
        """The slices to decode in one go, and whether they are the last.

        On a backlog more is waited for a little: the fuller a batch, the more often its keys repeat, and the less is
        written online.
        """
        most = self._settings.slice_records
        pieces: list[Slice] = []
        piece = await self._inbox.get()
        count = 0
        while piece is not None:
            pieces.append(piece)
            count += len(piece.records)
            if count >= most or (self._inbox.empty() and piece.left < most):
                break
            try:
                async with asyncio.timeout(BACKLOG_WAIT_S):
                    piece = await self._inbox.get()
            except TimeoutError:
                break
        return pieces, piece is None

    async def _online_step(self) -> None:
        is_last = False
        while not is_last:
            try:
                async with asyncio.timeout(SERVERS_AGE_S):
                    batch = await self._decoded.get()
            except TimeoutError:
                await self._look_at_servers()
                continue
            waiting: list[Batch] = []
            is_last = batch is None
            while batch is not None:
                waiting.append(batch)
                if self._decoded.empty():
                    break
                batch = self._decoded.get_nowait()
                is_last = batch is None
            if waiting:
                await self._look_at_servers()
                merged = Batch.merge(waiting)
                merged.servers = self._servers
                self._unappended.append(merged)
                if merged.table.num_rows:
                    await self._insist("online", partial(self._steps.write_online, merged, self._go_on_decoding))
                else:
                    self._go_on_decoding()
                self.waiting.done(ONLINE, merged.next)
                self._online.put_nowait(merged)
        self._online.put_nowait(None)

    def _go_on_decoding(self) -> None:
        """A batch is being written online, perhaps not for the first time: then the next may be waiting already."""
        if self._decoded.empty():
            self._may_decode.set()

    async def _look_at_servers(self) -> None:
        """Where the online servers are not those of before, bring what they may have forgotten.

        That is what was appended lately under the former ids, and what is not appended yet.
        """
        if time.monotonic() - self._looked_s < SERVERS_AGE_S:
            return
        present = self._stores.heard_server_ids()
        if present is None:
            present = await self._insist("online", self._in(self._steps.pools.online, self._stores.server_ids))
        self._looked_s = time.monotonic()
        former, self._servers = self._servers, present
        if former in ((), present):
            return
        again = [batch for batch in self._unappended if batch.table.num_rows]
        segments, written = await self._insist(
            "online", self._in(self._steps.pools.online, lambda: self._apply_again(present, again))
        )
        self._log.warning(
            "%s: the online servers are not those of before and may have forgotten: %d recent segments and %d batches "
            "were applied again, %d keys written",
            self.label,
            segments,
            len(again),
            written,
        )

    def _apply_again(self, present: tuple[str, ...], batches: Sequence[Batch]) -> tuple[int, int]:
        """How many segments were applied again, and how many keys written. Lists anew when it is repeated."""
        paths = self._ledger.recent(self.epoch, present, self._settings.apply_again_seconds)
        written = self._stores.apply_recent(self.view, paths)
        return len(paths), written + (self._stores.write_online(self.view, batches) if batches else 0)

    async def _append_step(self) -> None:
        gathering = Gathering()
        is_last = False
        # The partitions of an assignment begin together; that they append together would hold up what is to be served.
        patience_s = self._settings.append_seconds * random.random()  # noqa: S311 - no secret
        while not is_last:
            wait_s = gathering.wait_s(time.monotonic(), patience_s)
            try:
                async with asyncio.timeout(wait_s):
                    batch = await self._online.get()
            except TimeoutError:
                is_due = True
            else:
                is_last = is_due = batch is None
                if batch is not None:
                    gathering.add(batch)
                    is_due = (
                        gathering.rows >= self._settings.append_rows
                        or (batch.left == 0 and gathering.rows >= WORTH_A_FILE * self._settings.append_rows)
                        or gathering.size >= self._settings.append_bytes
                        or self._budget.is_spent
                    )
            if is_due and gathering.batches:
                await self._append(Batch.merge(gathering.batches))
                gathering = Gathering()
                patience_s = self._settings.append_seconds

    async def _append(self, batch: Batch) -> None:
        size = 0
        if batch.next > batch.first:
            size = await self._insist(
                "offline", self._timed("offline", partial(self._commit, batch), batch.table.num_rows)
            )
        self.end = batch.next
        self.waiting.done(OFFLINE, batch.next)
        self._moved_s = time.monotonic()
        self._unappended = [one for one in self._unappended if one.next > batch.next]
        self._budget.give(batch.size)
        self._outstanding -= batch.size
        health = self._health
        health.rows.labels(self._name).inc(batch.table.num_rows)
        health.bytes.labels(self._name).inc(size)
        health.succeeded(self._name, OFFLINE, batch.produced_ms)
        self._log.debug(
            "%s: appended [%d, %d): %d rows, %d rejected, %d skipped",
            self.label,
            batch.first,
            batch.next,
            batch.table.num_rows,
            batch.rejected,
            batch.skipped,
        )

    def _commit(self, batch: Batch) -> int:
        """Append, and return how many bytes that took."""
        present = self._stores.topic_id(self.partition.topic, batch.fetched_s)
        if present is not None and self._topic_id is not None and present != self._topic_id:
            raise TopicReplacedError(replaced(self.partition.topic, self._topic_id, present))
        path = self._ledger.append(
            self.epoch,
            batch.first,
            batch.next,
            batch.table.combine_chunks(),
            accepted=batch.offsets,
            rejected=batch.rejected,
            skipped=batch.skipped,
            topic_id=present or self._topic_id,
            servers=batch.servers,
            transform_hash=self.view.transform.hash if self.view.transform is not None else None,
        )
        try:
            return stat_of(path).size
        except FileNotFoundError:  # merged and removed meanwhile
            return 0

    def _timed(self, step: str, work: Callable[[], Result], rows: int) -> Callable[[], Awaitable[Result]]:
        thread = self._steps.thread_of(step)
        return self._in(thread, partial(measured, self._health, self._name, step, rows, work))

    @staticmethod
    def _in(pool: Executor, work: Callable[[], Result]) -> Callable[[], Awaitable[Result]]:
        return lambda: asyncio.get_running_loop().run_in_executor(pool, work)

    async def _insist(self, step: str, ask: Callable[[], Awaitable[Result]]) -> Result:
        """Do the work, again and again with growing pauses while it fails for a reason that may pass.

        Raises:
            LostRaceError, TerminalError: as the work raised it, at once.
            StoreDownError: it failed for longer than the bound, or did not return within it.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = await self._once(step, asyncio.ensure_future(ask()))
            except (LostRaceError, TerminalError):
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                self._fails(step, why)
                if self._has_failed_s(step) + pause_s > self._settings.store_retry_seconds:
                    raise StoreDownError(self._down(step, why)) from error
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self._works(step)
                return result

    async def _once(self, step: str, call: asyncio.Future[Result]) -> Result:
        """Wait for one try; tell of it when its thread hangs in a call, and do not wait beyond the bound then."""
        thread = self._steps.thread_of(step)
        try:
            while True:
                done, _ = await asyncio.wait({call}, timeout=SLOW_S)
                if done:
                    return call.result()
                if thread.busy_s < SLOW_S:
                    continue  # others' calls are made, this one's turn comes
                self._fails(step, f"no answer for more than {SLOW_S:g} s", thread.busy_s)
                if self._has_failed_s(step) > self._settings.store_retry_seconds:
                    raise StoreDownError(self._down(step, "no answer"))
        finally:
            call.cancel()  # what no thread has begun is not begun

    def _fails(self, step: str, why: str, ago_s: float = 0.0) -> None:
        self._health.retries.labels(self._name, step).inc()
        if step not in self._failing_since_s:
            self._failing_since_s[step] = time.monotonic() - ago_s
            self._log.warning("%s: step %s fails, and is tried again: %s", self.label, step, why)
        self._health.failing[self.label, step] = why

    def _works(self, step: str) -> None:
        if self._failing_since_s.pop(step, None) is not None:
            self._health.failing.pop((self.label, step), None)
            self._log.info("%s: step %s works again", self.label, step)

    def _has_failed_s(self, step: str) -> float:
        return time.monotonic() - self._failing_since_s[step]

    def _down(self, step: str, why: str) -> str:
        bound_s = self._settings.store_retry_seconds
        return f"{self.label}: step {step} failed for {bound_s:g} s (HEADRACE_STORE_RETRY_SECONDS): {why}"


class StoreDownError(TerminalError):
    """A store failed for longer than the bound."""


def replaced(topic: str, known: str | None, present: str | None) -> str:
    """The message for a topic that was made anew."""
    return (
        f"topic `{topic}` was made anew: its id is {present}, the ledger is of {known}; if that is intended, run "
        f"`faust -A streaming start --topic {topic} --new-epoch` and start the worker again"
    )
