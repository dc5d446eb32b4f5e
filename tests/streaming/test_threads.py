"""Few threads for many callers: who waits, and what becomes of calls that hang, fail or are taken back."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait

import pytest

from streaming import threads
from streaming.threads import Crew, Thread

IN_TIME_S = 20.0


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What calls hang at; opened in the end, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def hang(gate: threading.Event, begun: threading.Semaphore | None = None) -> str:
    if begun is not None:
        begun.release()
    assert gate.wait(2 * IN_TIME_S)
    return "late"


@pytest.mark.parametrize("at_once", [1, 3])
def test_few_threads_make_the_calls_of_many_each_in_order(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(threads, "LONG_S", IN_TIME_S)
    crew = Crew("test", at_once)
    callers = [Thread(crew) for _ in range(40)]
    made: dict[int, list[int]] = {number: [] for number in range(len(callers))}
    at_work: list[int] = []
    idents: set[int] = set()
    most = 0

    def call(number: int, turn: int) -> tuple[int, int]:
        nonlocal most
        at_work.append(number)
        most = max(most, len(at_work))
        assert at_work.count(number) == 1
        idents.add(threading.get_ident())
        made[number].append(turn)
        at_work.remove(number)
        return number, turn

    plan = [(number, turn) for turn in range(25) for number in range(len(callers))]
    futures = [callers[number].submit(call, number, turn) for number, turn in plan]
    assert [future.result(IN_TIME_S) for future in futures] == plan
    assert all(turns == list(range(25)) for turns in made.values())
    assert most <= at_once
    assert len(idents) <= at_once + 1  # one may have watched before
    crew.close()


def test_calls_that_hang_hold_up_their_own_callers_only(gate: threading.Event) -> None:
    crew = Crew("test", 2)
    stuck, free = [Thread(crew) for _ in range(7)], Thread(crew)
    hanging = [caller.submit(hang, gate) for caller in stuck]
    behind = [caller.submit(lambda: "behind") for caller in stuck]
    for number in range(5):
        assert free.submit(lambda number=number: number).result(IN_TIME_S) == number
    assert not any(future.done() for future in [*hanging, *behind])
    assert all(caller.busy_s > 0 for caller in stuck)
    assert free.busy_s == 0
    gate.set()
    assert [future.result(IN_TIME_S) for future in [*hanging, *behind]] == ["late"] * 7 + ["behind"] * 7
    crew.close()


def test_who_waits_when_the_last_thread_hangs_is_seen_to(gate: threading.Event) -> None:
    """Nothing waited when the calls were put, so nobody watched: it is the end of a call that leaves one waiting."""
    crew = Crew("test")
    first, second = Thread(crew), Thread(crew)
    slow, begun = threading.Event(), threading.Semaphore(0)
    long = first.submit(hang, slow, begun)
    assert begun.acquire(timeout=IN_TIME_S)
    after = first.submit(lambda: "after")
    stuck = second.submit(hang, gate, begun)
    assert begun.acquire(timeout=IN_TIME_S)
    slow.set()
    assert long.result(IN_TIME_S) == "late"
    assert after.result(IN_TIME_S) == "after"
    assert not stuck.done()
    gate.set()
    stuck.result(IN_TIME_S)
    crew.close()


def test_errors_and_calls_taken_back_are_of_who_asked(gate: threading.Event) -> None:
    crew = Crew("test")
    caller, other = Thread(crew), Thread(crew)
    begun = threading.Semaphore(0)
    made: list[str] = []
    held = caller.submit(hang, gate, begun)
    assert begun.acquire(timeout=IN_TIME_S)
    assert not held.cancel()  # it is made
    taken_back, kept = caller.submit(made.append, "taken back"), caller.submit(made.append, "kept")
    assert taken_back.cancel()
    failing = other.submit(int, "no number")
    gate.set()
    with pytest.raises(ValueError, match="no number"):
        failing.result(IN_TIME_S)
    kept.result(IN_TIME_S)
    assert made == ["kept"]
    crew.close()


def test_a_closed_crew_begins_nothing_more(gate: threading.Event) -> None:
    crew = Crew("test")
    caller, begun = Thread(crew), threading.Semaphore(0)
    held = caller.submit(hang, gate, begun)
    assert begun.acquire(timeout=IN_TIME_S)
    waiting = [caller.submit(hang, gate), Thread(crew).submit(hang, gate)]
    crew.close()
    crew.close()
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(IN_TIME_S)
    for one in (caller, Thread(crew)):
        with pytest.raises(RuntimeError, match="no more calls"):
            one.submit(hang, gate)
    gate.set()
    assert held.result(IN_TIME_S) == "late"


def test_whatever_hangs_everything_is_made_once_and_in_order() -> None:
    chance = random.Random(7)
    crew = Crew("test", 2)
    callers = [Thread(crew) for _ in range(12)]
    made: list[list[int]] = [[] for _ in callers]
    gates = [threading.Event() for _ in range(8)]

    def call(number: int, turn: int, gate: threading.Event | None) -> None:
        assert gate is None or gate.wait(IN_TIME_S)
        made[number].append(turn)

    futures = []
    for turn in range(60):
        number = chance.randrange(len(callers))
        gate = chance.choice(gates) if chance.random() < 0.2 else None
        futures.append(callers[number].submit(call, number, turn, gate))
        if chance.random() < 0.2:
            chance.choice(gates).set()
    for gate in gates:
        gate.set()
    assert not wait(futures, IN_TIME_S).not_done
    assert all(turns == sorted(turns) for turns in made)
    assert sum(map(len, made)) == 60
    crew.close()
