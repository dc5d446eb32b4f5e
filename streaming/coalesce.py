"""Requests that wait for the same thread, made in one call.

A call costs something beside its rows. Paid for each partition, that would be most of the work of a worker that has
many partitions and few events in each, and what waits for it would wait long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

COMPANY_S = 0.002
"""How long a call waits for requests beside the first: what one fetch brought is asked for within less."""

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Asked(Generic[Request, Answer]):
    """What was asked, and who is told."""

    request: Request
    answer: asyncio.Future[Answer]
    begun: Callable[[], None]


class Coalescer(Generic[Request, Answer]):
    """While a call is under way, what is asked for waits; the next call takes all of it, in order. Of the event loop.

    Args:
        call: answers requests, aligned with them; made in the pool. Where it fails for several, it is made for each of
            them alone: who asked has an error of the own request only.
        rows: how large a request is.
        most: how many rows a call may have; one request may have more.
    """

    def __init__(
        self,
        pool: Executor,
        call: Callable[[Sequence[Request]], Sequence[Answer]],
        rows: Callable[[Request], int],
        most: int,
    ) -> None:
        self._pool = pool
        self._call = call
        self._rows = rows
        self._most = most
        self._waiting: deque[_Asked[Request, Answer]] = deque()
        self._task: asyncio.Task[None] | None = None

    def ask(self, request: Request, begun: Callable[[], None] = lambda: None) -> asyncio.Future[Answer]:
        """The answer, later. To cancel it takes the request back, if no call has it yet.

        Args:
            begun: called, in the event loop, when a thread has begun a call with the request in it.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(request, answer, begun))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return answer

    async def _work(self) -> None:
        try:
            while self._waiting:
                if sum(self._rows(one.request) for one in self._waiting) < self._most:
                    await asyncio.sleep(COMPANY_S)
                # Whose turn comes late takes more with it.
                await self._make(self._next)
        finally:
            self._task = None
            while self._waiting:  # only where the event loop ends
                self._waiting.popleft().answer.cancel()

    def _next(self) -> list[_Asked[Request, Answer]]:
        """What the next call is for. In the thread."""
        asked: list[_Asked[Request, Answer]] = []
        rows = 0
        while self._waiting:
            one = self._waiting[0]
            if not one.answer.done():
                rows += self._rows(one.request)
                if asked and rows > self._most:
                    break
                asked.append(one)
            self._waiting.popleft()
        return asked

    async def _make(self, choose: Callable[[], list[_Asked[Request, Answer]]]) -> None:
        """Make one call, or where it fails one for each.

        Args:
            choose: who is asked for, called in the thread when it is its turn.
        """
        loop = asyncio.get_running_loop()
        asked: list[_Asked[Request, Answer]] = []

        def call() -> Sequence[Answer]:
            asked.extend(choose())
            if not asked:
                return []
            loop.call_soon_threadsafe(_begin, asked)
            return self._call([one.request for one in asked])

        try:
            found = await loop.run_in_executor(self._pool, call)
        except asyncio.CancelledError:
            for one in asked:
                one.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - of whoever asked
            if len(asked) == 1:
                if not asked[0].answer.done():
                    asked[0].answer.set_exception(error)
            else:
                for one in asked:
                    await self._make(partial(_alone, one))
            return
        for one, result in zip(asked, found, strict=True):
            if not one.answer.done():
                one.answer.set_result(result)


def _alone(one: _Asked[Request, Answer]) -> list[_Asked[Request, Answer]]:
    return [] if one.answer.done() else [one]


def _begin(asked: Sequence[_Asked[Any, Any]]) -> None:
    for one in asked:
        one.begun()
