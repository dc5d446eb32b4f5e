"""Requests of many askers, in calls of several: every one has its own answer, whatever fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.coalesce import Coalescer


def doubled(calls: list[list[int]]) -> Callable[[Sequence[int]], list[int]]:
    """Twice each request; 13 and its like fail the call they are in."""

    def call(requests: Sequence[int]) -> list[int]:
        calls.append(list(requests))
        if any(request % 13 == 0 for request in requests):
            raise ValueError(f"unlucky {[request for request in requests if request % 13 == 0]}")
        return [2 * request for request in requests]

    return call


@given(
    waves=st.lists(st.lists(st.integers(1, 60), max_size=8), max_size=6),
    most=st.integers(1, 100),
    taken_back=st.integers(0, 3),
)
def test_everyone_gets_the_own_answer(waves: list[list[int]], most: int, taken_back: int) -> None:
    calls: list[list[int]] = []

    async def scenario(pool: ThreadPoolExecutor) -> None:
        coalescer = Coalescer(pool, doubled(calls), lambda request: request, most)
        asked = []
        for wave in waves:
            asked += [(request, coalescer.ask(request)) for request in wave]
            await asyncio.sleep(0)
        for _, answer in asked[:taken_back]:
            answer.cancel()
        for request, answer in asked[taken_back:]:
            if request % 13 == 0:
                with pytest.raises(ValueError, match=rf"unlucky \[{request}\]"):  # the own one alone
                    await answer
            else:
                assert await answer == 2 * request

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(scenario(pool))
    requests = [request for wave in waves for request in wave]
    assert all(sum(call) <= most or len(call) == 1 for call in calls)
    if taken_back == 0:
        first_tries = [request for call in calls for request in call if request % 13]
        assert set(first_tries) == {request for request in requests if request % 13}


def test_what_waits_goes_together_and_in_order() -> None:
    calls: list[list[int]] = []
    free = threading.Event()

    def call(requests: Sequence[int]) -> list[int]:
        free.wait(10)
        calls.append(list(requests))
        return list(requests)

    async def scenario(pool: ThreadPoolExecutor) -> None:
        coalescer = Coalescer(pool, call, lambda _: 1, 100)
        first = [coalescer.ask(1), coalescer.ask(2)]
        await asyncio.sleep(0.05)
        later = [coalescer.ask(number) for number in (3, 4, 5, 6)]
        later[1].cancel()
        await asyncio.sleep(0.01)
        free.set()
        assert await asyncio.gather(*first, later[0], *later[2:]) == [1, 2, 3, 5, 6]

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(scenario(pool))
    assert calls == [[1, 2], [3, 5, 6]]


def test_what_comes_while_others_have_the_thread_goes_along() -> None:
    calls: list[list[int]] = []
    free = threading.Event()
    begun: list[int] = []

    def call(requests: Sequence[int]) -> list[int]:
        calls.append(list(requests))
        return list(requests)

    async def scenario(pool: ThreadPoolExecutor) -> None:
        coalescer = Coalescer(pool, call, lambda _: 1, 3)
        pool.submit(free.wait, 10)
        asked = []
        for number in (1, 2, 3, 4):
            asked.append(coalescer.ask(number, lambda number=number: begun.append(number)))  # type: ignore[misc]
            await asyncio.sleep(0.02)
        assert begun == []
        free.set()
        assert await asyncio.gather(*asked) == [1, 2, 3, 4]

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(scenario(pool))
    assert calls == [[1, 2, 3], [4]]
    assert begun == [1, 2, 3, 4]


def test_the_end_of_the_loop_takes_back_what_waits() -> None:
    calls: list[list[int]] = []

    def call(requests: Sequence[int]) -> list[int]:
        time.sleep(0.1)
        calls.append(list(requests))
        return list(requests)

    async def abandoned() -> list[asyncio.Future[int]]:
        asked = [coalescer.ask(1)]
        await asyncio.sleep(0.05)
        return [*asked, coalescer.ask(2)]

    async def afresh() -> int:
        return await coalescer.ask(3)

    with ThreadPoolExecutor(1) as pool:
        coalescer = Coalescer(pool, call, lambda _: 1, 100)
        assert all(answer.cancelled() for answer in asyncio.run(abandoned()))
        assert asyncio.run(afresh()) == 3
    assert calls == [[1], [3]]
