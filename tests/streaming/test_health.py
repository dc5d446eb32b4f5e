"""What a worker tells of itself, without servers: the share of dead letters, metrics, logs."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from headrace.conform import Reason, Reject
from streaming.health import Fault, Health, Kind
from streaming.logs import Hush, JsonFormatter, TextFormatter
from streaming.settings import StreamSettings
from streaming.share import DeadLetterShareError, LetterShare
from tests.streaming.test_lane import Bench, Fake, piece


class Clock:
    """Seconds that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def share_of(clock: Callable[[], float], **chosen: object) -> LetterShare:
    return LetterShare("view", StreamSettings.model_validate(chosen), clock)


def is_faulty(share: LetterShare) -> bool:
    return share.fault is not None


def rejects(count: int, reason: Reason = Reason.MISSING_FIELD) -> list[Reject]:
    return [Reject(row, reason, "trips", "") for row in range(count)]


def test_a_share_above_the_bound_is_named_and_recovers_with_good_events() -> None:
    clock = Clock()
    share = share_of(clock)
    share.note(1000, rejects(400))
    assert not is_faulty(share)
    share.note(1000, rejects(800))
    text = str(share.fault)
    assert "view `view`: 1,200 of its last 2,000 events (60%) are bad" in text
    assert "mostly missing_field of `trips` (1,200)" in text
    assert "faust -A streaming dead-letters" in text
    share.note(800, [])
    assert is_faulty(share), "close to the bound it would flap"
    share.note(1000, [])
    assert not is_faulty(share)


def test_first_events_and_idle_topics_do_not_flap() -> None:
    clock = Clock()
    share = share_of(clock)
    for _ in range(99):
        share.note(1, rejects(1))
        assert not is_faulty(share)
    share.note(1, rejects(1))
    assert is_faulty(share)
    for _ in range(10):  # nothing comes, or next to nothing: what it was it stays
        clock.now_s += 1000
        share.note(0, [])
        share.note(1, rejects(1))
        assert is_faulty(share)
    for _ in range(100):  # slower than the window; the last events count
        clock.now_s += 100
        share.note(1, [])
    assert not is_faulty(share)


def test_what_is_older_than_the_window_counts_no_more() -> None:
    clock = Clock()
    share = share_of(clock, dead_letter_window_seconds=10)
    share.note(100_000, rejects(100_000))
    clock.now_s = 11
    share.note(150, [])
    assert not is_faulty(share)


def test_a_share_of_1_is_never_exceeded() -> None:
    share = share_of(Clock(), dead_letter_share=1)
    share.note(1000, rejects(1000))
    assert not is_faulty(share)


def test_the_lane_stops_before_it_writes_letters_and_loses_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        lane = bench.lane()
        lane.put(piece(0, 100))
        await asyncio.sleep(0.3)
        lane.put(piece(100, 400, [Fake(offset, b"bad") for offset in range(100, 400)]))
        await lane.finish(5)

    bench = Bench(tmp_path, dead_letter_stop=True)
    asyncio.run(scenario())
    assert isinstance(bench.faults[0], DeadLetterShareError)
    assert "HEADRACE_DEAD_LETTER_STOP" in str(bench.faults[0])
    bench.assert_complete(100)  # nothing beyond it is in any store, nor in the dead letters


def test_metrics_are_what_prometheus_expects() -> None:
    health = Health()
    health.received.labels("view").inc(3)
    health.succeeded("view", "online", np.array([0, 1], dtype=np.int64))
    health.steps.labels("view", "online").observe(0.1)
    health.batches.labels("view", "online").observe(3)
    health.gauges.source = lambda: {("view", "topic", 0): (5, 2), ("view", "topic", 1): (7, None)}
    health.gauges.faults = lambda: [Fault(Kind.STALLED, "view topic[0]")]
    health.gauges.objectives = {("view", "online"): 1.5}
    families = {family.name: family for family in text_string_to_metric_families(health.exposition().decode())}
    for name, family in families.items():
        assert re.fullmatch("(headrace|process)_[a-z_]+", name)
        assert family.documentation.endswith("."), name
        assert family.type in ("counter", "gauge", "histogram"), name
        for sample in family.samples:
            assert sample.labels.keys() <= {
                *("view", "store", "topic", "partition", "step", "reason", "kind", "le", "version", "faust")
            }, name
            assert not math.isnan(sample.value)
    assert {sample.labels["kind"] for sample in families["headrace_readiness_faults"].samples} == set(Kind)
    assert sum(sample.value for sample in families["headrace_readiness_faults"].samples) == 1
    (objective,) = families["headrace_freshness_objective_seconds"].samples
    assert (objective.labels, objective.value) == ({"view": "view", "store": "online"}, 1.5)
    assert families["headrace_build_info"].samples[0].labels["version"]
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    assert [sample.value for sample in families["headrace_lag_offsets"].samples] == [2]


def record(name: str, text: str, *args: object, line: int = 1, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord(name, level, "file.py", line, text, args, None)


def test_hosts_do_not_repeat_themselves() -> None:
    clock = Clock()
    hush = Hush(clock)
    harmless = "Heartbeat failed for group %s because it is rebalancing"
    assert not hush.filter(record("aiokafka.consumer", harmless, "group"))
    assert [hush.filter(record("aiokafka.conn", "no node %d", n)) for n in range(5)] == [True, *[False] * 4]
    assert hush.filter(record("aiokafka.conn", "another", line=2))
    assert all(hush.filter(record("streaming.lane", "ours")) for _ in range(2))
    clock.now_s = 31
    again = record("aiokafka.conn", "no node %d", 6)
    assert hush.filter(again)
    assert again.getMessage() == "no node 6 (and 4 times like it meanwhile)"


def test_log_lines() -> None:
    ours = record("streaming.lane", "%s works", "it")
    ours.view, ours.topic, ours.partition = "v", "t", 3
    line = JsonFormatter().format(ours)
    values = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", values.pop("time"))
    assert values == {
        "level": "WARNING",
        "logger": "streaming.lane",
        "message": "it works",
        "view": "v",
        "topic": "t",
        "partition": 3,
    }
    assert TextFormatter().format(ours).endswith("Z WARNING  streaming.lane: it works")
