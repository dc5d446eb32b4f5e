"""What the worker tells of itself: Prometheus metrics, faults, freshness. A registry of its own, no global state.

Labels are names of views, topics, steps, stores, reasons and kinds, and numbers of partitions: nothing of an event.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.conform import Reason
from streaming.recent import Recent, quantile

FRESHNESS_BOUNDS_S = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0,
    15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
)  # fmt: skip
STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_BOUNDS = (1, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)

ONLINE = "online"
OFFLINE = "offline"

Times = npt.NDArray[np.int64]


class Kind(StrEnum):
    """What may be wrong with a worker."""

    ENDING = "ending"
    CONSUMER = "consumer"
    REBALANCING = "rebalancing"
    STEP_FAILING = "step_failing"
    STALLED = "stalled"
    VIEW_LEFT_OUT = "view_left_out"
    VIEW_BEHIND = "view_behind"
    DEAD_LETTERS = "dead_letters"
    RESTART = "restart"


class Fault(NamedTuple):
    """What is wrong now, and in words what to do."""

    kind: Kind
    text: str


class Freshness(Collector):
    """Seconds from a record's timestamp (when it was produced) to when it can be read, by view and store.

    Counts whole batches at once: a call costs microseconds a thousand events, where a histogram of the Prometheus
    client would cost a millisecond. Thread-safe.
    """

    def __init__(self, recent: Recent) -> None:
        self._recent = recent
        self._counts: dict[tuple[str, str], npt.NDArray[np.int64]] = {}
        self._sums: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        self._bounds = np.array(FRESHNESS_BOUNDS_S)

    def observe(self, view: str, store: str, produced_ms: Times, now_s: float) -> None:
        """Count events that became readable now. Clocks that differ can make an age negative; it counts as 0."""
        if len(produced_ms) == 0:
            return
        ages = np.maximum(now_s - produced_ms / 1000.0, 0.0)
        counts = np.bincount(np.searchsorted(self._bounds, ages), minlength=len(self._bounds) + 1)
        key = (view, store)
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + counts
            self._sums[key] = self._sums.get(key, 0.0) + float(ages.sum())
        self._recent.add(Freshness.key(view, store), counts)

    @staticmethod
    def key(view: str, store: str) -> tuple[str, str, str]:
        """Of its counts in `Recent`."""
        return "freshness", view, store

    def quantile(self, view: str, store: str, share: float) -> float | None:
        """A quantile since the start; None without events, the last bound for what lies beyond it."""
        with self._lock:
            counts = self._counts.get((view, store))
        found = None if counts is None else quantile(counts, FRESHNESS_BOUNDS_S, share)
        return None if found is None else min(found, FRESHNESS_BOUNDS_S[-1])

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """For the registry."""
        family = HistogramMetricFamily(
            "headrace_freshness_seconds",
            "Time from an event's Kafka timestamp to its being readable.",
            labels=["view", "store"],
        )
        with self._lock:
            state = [(key, counts.copy(), self._sums[key]) for key, counts in self._counts.items()]
        for key, counts, total in state:
            reached = np.cumsum(counts)
            buckets = [(repr(bound), int(n)) for bound, n in zip(FRESHNESS_BOUNDS_S, reached, strict=False)]
            family.add_metric(list(key), [*buckets, ("+Inf", int(reached[-1]))], total)
        yield family


class WorkerGauges(Collector):
    """What is looked up when scraped: ledgers, lag, what is in flight, faults."""

    def __init__(self) -> None:
        self.source: Callable[[], Mapping[tuple[str, str, int], tuple[int, int | None]]] = dict
        self.in_flight: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.assigned: Callable[[], int] = lambda: 0
        self.objectives: Mapping[tuple[str, str], float] = {}
        self.faults: Callable[[], list[Fault]] = list
        self.waiting: Callable[[], Mapping[tuple[str, str], int]] = dict

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """For the registry."""
        labels = ["view", "topic", "partition"]
        end = GaugeMetricFamily(
            "headrace_ledger_end_offset", "The offset at which the ledger of a partition ends.", labels=labels
        )
        lag = GaugeMetricFamily(
            "headrace_lag_offsets", "Offsets between the end of the log and the end of the ledger.", labels=labels
        )
        for (view, topic, partition), (ledger_end, behind) in self.source().items():
            end.add_metric([view, topic, str(partition)], ledger_end)
            if behind is not None:
                lag.add_metric([view, topic, str(partition)], behind)
        yield end
        yield lag
        used, limit = self.in_flight()
        yield GaugeMetricFamily("headrace_in_flight_bytes", "Payload bytes fetched and not yet appended.", used)
        yield GaugeMetricFamily("headrace_in_flight_limit_bytes", "Where fetching pauses.", limit)
        objectives = GaugeMetricFamily(
            "headrace_freshness_objective_seconds",
            "Within which 99 in 100 events shall be readable, as the view's tags say.",
            labels=["view", "store"],
        )
        for (view, store), within_s in self.objectives.items():
            objectives.add_metric([view, store], within_s)
        yield objectives
        yield GaugeMetricFamily("headrace_assigned_partitions", "Partitions that are this worker's.", self.assigned())
        faults = GaugeMetricFamily("headrace_readiness_faults", "What /readyz finds wrong, by kind.", labels=["kind"])
        found = [fault.kind for fault in self.faults()]
        for kind in Kind:
            faults.add_metric([kind.value], found.count(kind))
        yield faults


class Health:
    """The numbers of one worker, and what is wrong with it now."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recent = Recent()
        self.freshness = Freshness(self.recent)
        self.gauges = WorkerGauges()
        self.registry.register(self.freshness)
        self.registry.register(self.gauges)
        ProcessCollector(registry=self.registry)
        build = Gauge("headrace_build_info", "Always 1; what runs.", ["version", "faust"], registry=self.registry)
        build.labels(__version__, version("faust-streaming")).set(1)
        view = ["view"]
        self.received = self._counter("headrace_events_received", "Events read from Kafka.", view)
        self.accepted = self._counter("headrace_events_accepted", "Events that were accepted.", view)
        self.rejected = self._counter("headrace_events_rejected", "Events sent to the dead letters.", [*view, "reason"])
        self.skipped = self._counter(
            "headrace_events_skipped", "Tombstones, and events a transformation left out.", view
        )
        self.keys = self._counter("headrace_online_keys_written", "Keys written online, not those turned away.", view)
        self.online_rows = self._counter("headrace_online_rows_offered", "Rows given to the online store.", view)
        self.online_bytes = self._counter("headrace_online_offered_bytes", "Their size as Arrow columns.", view)
        self.rows = self._counter("headrace_offline_rows_appended", "Rows appended offline.", view)
        self.bytes = self._counter("headrace_offline_appended_bytes", "Bytes of the segments appended.", view)
        self.resyncs = self._counter(
            "headrace_partition_resyncs", "Times a partition went back to its ledger.", ["topic"]
        )
        self.renewals = self._counter("headrace_view_renewals", "Changes of a view that were taken over.", view)
        self.registry_failures = Counter(
            "headrace_registry_failures", "Looks at the registry that failed.", registry=self.registry
        )
        self.registry_read = Gauge(
            "headrace_registry_read_timestamp_seconds", "When the registry was last read.", registry=self.registry
        )
        self.rebalances = Counter("headrace_rebalances", "Rebalances of the group.", registry=self.registry)
        self.retries = self._counter("headrace_step_retries", "Failed tries of a step.", [*view, "step"])
        self.steps = Histogram(
            "headrace_step_duration_seconds",
            "Time of one batch in one step.",
            [*view, "step"],
            buckets=STEP_BOUNDS_S,
            registry=self.registry,
        )
        self.batches = Histogram(
            "headrace_step_batch_rows",
            "Rows of one batch in one step; records where they are decoded.",
            [*view, "step"],
            buckets=BATCH_BOUNDS,
            registry=self.registry,
        )
        self.success = Gauge(
            "headrace_last_success_timestamp_seconds",
            "When a store last took a batch.",
            [*view, "store"],
            registry=self.registry,
        )
        self.failing: dict[tuple[str, str], str] = {}

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def succeeded(self, view: str, store: str, produced_ms: Times) -> None:
        """A store has taken events."""
        now = time.time()
        self.success.labels(view, store).set(now)
        self.freshness.observe(view, store, produced_ms, now)

    def judged(self, view: str, *, received: int, accepted: int, skipped: int, reasons: Iterable[Reason]) -> None:
        """Records were decoded and judged.

        Args:
            reasons: of each that was turned away.
        """
        rejected = Counts(reasons)
        self.received.labels(view).inc(received)
        self.accepted.labels(view).inc(accepted)
        self.skipped.labels(view).inc(skipped)
        for reason, count in rejected.items():
            self.rejected.labels(view, reason.value).inc(count)
        self.recent.add(("events", view), np.array([received, accepted, skipped, *(rejected[r] for r in Reason)]))

    def stepped(self, view: str, step: str, seconds: float, rows: int) -> None:
        """A batch went through a step."""
        self.steps.labels(view, step).observe(seconds)
        self.batches.labels(view, step).observe(rows)
        bucket = np.zeros(len(STEP_BOUNDS_S) + 1, dtype=np.int64)
        bucket[bisect.bisect_left(STEP_BOUNDS_S, seconds)] = 1
        self.recent.add(("step", view, step), bucket)

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
