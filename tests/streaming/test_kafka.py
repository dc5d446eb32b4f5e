"""The worker on a real Kafka and a real Valkey: every event in both stores, whatever happens to the worker."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from tests.streaming.conftest import Stream
from tests.streaming.oracle import verify
from tests.streaming.process import FAUST, Worker, emit, run

KILLS = int(os.environ.get("HEADRACE_TEST_KILLS", "3"))
EVENTS = int(os.environ.get("HEADRACE_TEST_EVENTS", "20000"))
SECONDS_A_KILL = float(os.environ.get("HEADRACE_TEST_SECONDS_A_KILL", "8"))
SEED = int(os.environ.get("HEADRACE_TEST_SEED", "7"))


FAULTY = ("--bad-fraction", "0.05", "--late-fraction", "0.1", "--duplicate-fraction", "0.02")


def test_every_event_is_in_both_stores(stream: Stream, tmp_path: Path) -> None:
    done = run(stream.environment, "emit", "--rate", "0", "--count", str(EVENTS), "--seed", "1", *FAULTY)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    with Worker(stream.environment, tmp_path / "worker.log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        status, metrics = worker.get("/metrics")
        assert status == 200
        assert worker.get("/healthz")[0] == 200
        state = worker.state()
        code, seconds = worker.stop()
    assert code == 0
    assert seconds < 10
    counts = verify(stream.broker, stream.topic, stream.repo)
    assert counts["messages"] == summary["sent"]
    assert counts["bad"] == sum(summary["bad"].values())
    text = metrics.decode()
    name = f'view="{"driver_stats"}"'
    assert f"headrace_events_received_total{{{name}}} {summary['sent']}.0" in text
    assert 'headrace_freshness_seconds_bucket{le="+Inf",store="offline"' in text
    assert state["freshness"]["driver_stats"]["online"]["p50_s"] > 0
    assert "password" not in text


def test_the_group_s_offsets_follow_the_ledger(stream: Stream, tmp_path: Path) -> None:
    emit(stream.environment, count=1000, seed=2)
    with Worker(stream.environment, tmp_path / "worker.log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        group = worker.state()["group"]
        worker.stop()
    consumer = Consumer({"bootstrap.servers": stream.broker, "group.id": group})
    committed = consumer.committed([TopicPartition(stream.topic, n) for n in range(4)], timeout=10)
    consumer.close()
    assert {part.partition: part.offset for part in committed} == stream.ends()


@pytest.mark.timeout(1800)
def test_kill_9_at_random_moments(stream: Stream, tmp_path: Path) -> None:
    """`make campaign` is the long one."""
    chance = random.Random(SEED)
    log = tmp_path / "worker.log"
    rate = EVENTS / (KILLS * SECONDS_A_KILL)
    emitter = subprocess.Popen(
        [*FAUST, "emit", "--rate", str(rate), "--count", str(EVENTS), "--seed", str(SEED), *FAULTY],
        env=stream.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(KILLS):
        with Worker(stream.environment, log) as worker:
            worker.start()
            if chance.random() < 0.8:
                worker.wait_ready()
                time.sleep(chance.uniform(0.0, SECONDS_A_KILL / 2))
            else:
                time.sleep(chance.uniform(0.0, 5.0))
            worker.kill()
    output, _ = emitter.communicate(timeout=600)
    with Worker(stream.environment, log) as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        code, _ = worker.stop()
    assert code == 0
    counts = verify(stream.broker, stream.topic, stream.repo)
    assert counts["messages"] == json.loads(output.splitlines()[-1])["sent"]
    print(counts)  # noqa: T201 - the figures of a campaign
