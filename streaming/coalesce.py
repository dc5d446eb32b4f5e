"""Requests that wait for the same thread, made in one call.

A call costs something beside its rows. Paid for each partition, that would be most of the work of a worker that has
many partitions and few events in each, and what waits for it would wait long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

COMPANY_S = 0.002
"""How long a call waits for requests beside the first: what one fetch brought is asked for within less."""

Request = TypeVar("Request")
Answer = TypeVar("Answer")


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
        self._waiting: deque[tuple[Request, asyncio.Future[Answer]]] = deque()
        self._task: asyncio.Task[None] | None = None

    def ask(self, request: Request) -> asyncio.Future[Answer]:
        """The answer, later. To cancel it takes the request back, if no call has it yet."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return answer

    async def _work(self) -> None:
        try:
            while self._waiting:
                if sum(self._rows(request) for request, _ in self._waiting) < self._most:
                    await asyncio.sleep(COMPANY_S)
                await self._answer(self._next())
        finally:
            self._task = None
            while self._waiting:  # only where the event loop ends
                self._waiting.popleft()[1].cancel()

    def _next(self) -> list[tuple[Request, asyncio.Future[Answer]]]:
        asked: list[tuple[Request, asyncio.Future[Answer]]] = []
        rows = 0
        while self._waiting:
            request, answer = self._waiting[0]
            if not answer.done():
                rows += self._rows(request)
                if asked and rows > self._most:
                    break
                asked.append((request, answer))
            self._waiting.popleft()
        return asked

    async def _answer(self, asked: Sequence[tuple[Request, asyncio.Future[Answer]]]) -> None:
        if not asked:
            return
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._pool, self._call, [request for request, _ in asked])
        except asyncio.CancelledError:
            for _, answer in asked:
                answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - of whoever asked
            if len(asked) == 1:
                _settle(asked[0][1], error)
            else:
                for one in asked:
                    await self._answer([one])
            return
        for (_, answer), result in zip(asked, found, strict=True):
            if not answer.done():
                answer.set_result(result)


def _settle(answer: asyncio.Future[Answer], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
