"""Events that wait: a steady load with pulses in it, how long each was not served, and nothing lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import Answer, MeasureError, Worker
from benchmarks.stream import Bench

Floats = npt.NDArray[np.float64]


class Pulsing:
    """A load that is being produced, and its reader."""

    def __init__(self, folder: Path, producing: Callable[..., Answer], watching: Callable[..., Answer]) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._stops = [folder / "stop-producing", folder / "stop-watching"]
        calls = zip((producing, watching), self._stops, strict=True)
        self._answers: list[Future[Answer]] = [self._pool.submit(call, stop=str(stop)) for call, stop in calls]

    def end_producing(self) -> Answer:
        """What was produced.

        Raises:
            MeasureError: the broker did not take all of it.
        """
        self._stops[0].touch()
        answer = self._answers[0].result()
        if answer["left"]:
            raise MeasureError(f"the broker did not acknowledge {answer['left']:,} events")
        return answer

    def end_watching(self) -> Answer:
        """What was seen.

        Raises:
            MeasureError: an older value came after a newer one.
        """
        time.sleep(1.0)  # for a last look
        self._stops[1].touch()
        answer = self._answers[1].result()
        if answer["backwards"]:
            raise MeasureError(f"an older pulse was served after a newer one: places {answer['backwards'][:5]}")
        return answer

    def close(self) -> None:
        """End both, whatever has been asked."""
        for stop in self._stops:
            stop.touch()
        self._pool.shutdown()


@contextlib.contextmanager
def pulsing(bench: Bench, load: Mapping[str, Any], reading: Mapping[str, Any]) -> Iterator[Pulsing]:
    """Produce and watch, in processes beside us, until told to stop."""
    place = bench.place()
    operation = partial(Worker, "benchmarks.fleet_operations", log=place / "log.txt")
    with (
        operation("produce", address=bench.kafka.address, **load) as producer,
        operation("watch", **reading) as watcher,
        contextlib.closing(Pulsing(place, producer.run, watcher.run)) as found,
    ):
        yield found


@dataclass(frozen=True)
class Waits:
    """When the pulses of each watched place were made, and how long each was not served; seconds."""

    made: Mapping[int, Floats]
    waits: Mapping[int, Floats]

    @classmethod
    def of(cls, produced: Answer, watched: Answer) -> Waits:
        """Of what producer and reader tell.

        Raises:
            MeasureError: a pulse was never served.
        """
        made = {place: np.array(produced["made"][place]) for place, _ in watched["seen"]}
        waits: dict[int, Floats] = {}
        for place, looks in watched["seen"]:
            times, numbers = np.array(looks, dtype=np.float64).reshape(-1, 2).T
            at = np.searchsorted(numbers, np.arange(len(made[place])))
            waits[place] = np.append(times, np.inf)[at] - made[place]
            if not np.isfinite(waits[place]).all():
                raise MeasureError(f"the last pulses of place {place} were never served")
        return cls(made, waits)

    def between(self, begin_s: float, end_s: float, places: Sequence[int] | None = None) -> list[Floats]:
        """The waits of the pulses that were made in a time, place by place."""
        chosen = self.made if places is None else places
        return [self.waits[place][(self.made[place] >= begin_s) & (self.made[place] < end_s)] for place in chosen]
