"""How a worker ends, whatever it is doing, and what others notice of it. Real servers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from headrace.repository import open_store
from tests.servers import Kafka, Valkey
from tests.streaming.conftest import Stream, StreamFactory
from tests.streaming.oracle import contract_of, read_offline, read_topic, verify
from tests.streaming.process import Worker, emit

READY_S = 180.0  # on a busy machine; the imports alone take five seconds of its processor
BOUND_S = 10.0
RATE = float(os.environ.get("HEADRACE_TEST_ROLLING_RATE", "500"))
STEADY_S = float(os.environ.get("HEADRACE_TEST_ROLLING_STEADY_S", "0.5"))


def assert_ends(worker: Worker) -> None:
    """The worker ends by SIGTERM, in time, with 0."""
    code, seconds = worker.stop()
    assert code == 0, worker.tail()
    assert seconds < BOUND_S, worker.tail()


def test_while_it_starts(stream: Stream, kafka_server: Kafka, tmp_path: Path) -> None:
    with Worker(stream.environment, tmp_path / "importing") as worker:
        worker.start()
        time.sleep(1.5)
        if worker.process.poll() is None:
            assert worker.stop()[0] in (0, -signal.SIGTERM)  # Faust itself is loaded before us
    kafka_server.freeze()
    try:
        with Worker({**stream.environment, "HEADRACE_BROKER_TIMEOUT_SECONDS": "60"}, tmp_path / "checking") as worker:
            worker.start()
            time.sleep(3)
            code, seconds = worker.stop()
            assert code in (0, -signal.SIGTERM)
            assert seconds < BOUND_S
    finally:
        kafka_server.thaw()


def test_while_the_broker_hangs(stream: Stream, kafka_server: Kafka, tmp_path: Path) -> None:
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready(READY_S)
        kafka_server.freeze()
        try:
            time.sleep(1)
            assert_ends(worker)
        finally:
            kafka_server.thaw()


def test_while_dead_letters_cannot_be_written(stream: Stream, tmp_path: Path) -> None:
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready(READY_S)
        letters = f"{stream.topic}.dlq"
        admin = AdminClient({"bootstrap.servers": stream.broker})
        admin.delete_topics([letters])[letters].result(10)
        emit(stream.environment, count=200, seed=3, bad_fraction=0.5)
        worker.wait(lambda: "dead_letters" in str(worker.state().get("faults")), 30, "failing")
        assert_ends(worker)
    assert set(read_offline(contract_of(stream.repo), stream.topic).ends.values()) <= {0}


def test_a_second_signal_ends_at_once(stream: Stream, valkey_server: Valkey, tmp_path: Path) -> None:
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready(READY_S)
        valkey_server.freeze()
        try:
            emit(stream.environment, count=100, seed=3)
            worker.wait(lambda: b"headrace_in_flight_bytes 0.0" not in worker.get("/metrics")[1], 10, "at work")
            worker.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            worker.process.send_signal(signal.SIGINT)
            assert worker.process.wait(BOUND_S) == 0
        finally:
            valkey_server.thaw()
        assert "a second signal" in worker.tail()


def test_too_many_bad_events_stop_the_worker_before_they_are_dead_letters(
    make_stream: StreamFactory, tmp_path: Path
) -> None:
    stream = make_stream(dead_letter_share=0.5, dead_letter_stop=True, log_format="json")
    with Worker(stream.environment, tmp_path / "log") as worker:
        emit(stream.environment, count=1000, seed=1)
        worker.start().wait_ready(READY_S)
        worker.wait_drained(stream.ends())
        good = stream.ends()
        emit(stream.environment, count=6000, seed=2, bad_fraction=1.0)
        assert worker.process.wait(60) == 1
        assert "HEADRACE_DEAD_LETTER_STOP" in worker.tail().splitlines()[-1]
        lines = [json.loads(line) for line in worker.log.read_text().splitlines() if line.startswith("{")]
        assert {"time", "level", "logger", "message"} <= lines[0].keys()
        assert any("of its last" in line["message"] and line["level"] == "CRITICAL" for line in lines)
    left = {n: end - good[n] for n, end in read_offline(contract_of(stream.repo), stream.topic).ends.items()}
    written = len(read_topic(stream.broker, f"{stream.topic}.dlq"))
    assert written < 6000, "all of the topic was drained"
    assert sum(left.values()) <= written, "a batch was appended whose letters are not written"
    with Worker({**stream.environment, "HEADRACE_DEAD_LETTER_STOP": "false"}, tmp_path / "log") as worker:
        worker.start()
        worker.wait_drained(stream.ends())
        assert "of its last" in str(worker.state()["faults"])
        emit(stream.environment, count=20_000, seed=3)
        worker.wait_drained(stream.ends())
        worker.wait_ready()
        assert_ends(worker)
    verify(stream.broker, stream.topic, stream.repo)


class Load:
    """Events of one key a partition at a steady rate; how long each key's online value stood still."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._produce), threading.Thread(target=self._watch)]
        self.sent = 0
        self.longest_s = dict.fromkeys(range(4), 0.0)

    def _produce(self) -> None:
        producer = Producer({"bootstrap.servers": self._stream.broker, "linger.ms": 2, "enable.idempotence": True})
        begun_s = time.monotonic()
        while not self._ended.is_set():
            now = time.time()
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}"
            event = {"driver_id": self.sent % 4, "conv_rate": 0.5, "acc_rate": 0.5, "avg_daily_trips": self.sent}
            value = json.dumps({**event, "datetime": moment, "created": None}).encode()
            producer.produce(self._stream.topic, value, partition=self.sent % 4)
            producer.poll(0)
            self.sent += 1
            self._ended.wait(max(0.0, begun_s + self.sent / RATE - time.monotonic()))
        assert producer.flush(30) == 0

    def _watch(self) -> None:
        store = open_store(self._stream.repo)
        features, rows = ["driver_stats:avg_daily_trips"], [{"driver_id": key} for key in range(4)]
        seen: dict[int, tuple[object, float]] = {}
        while not self._ended.wait(0.02):
            values = store.get_online_features(features, rows).to_dict()["avg_daily_trips"]
            now_s = time.monotonic()
            for key, value in enumerate(values):
                before, since_s = seen.get(key, (None, now_s))
                if before is not None:
                    self.longest_s[key] = max(self.longest_s[key], now_s - since_s)
                if value != before:
                    seen[key] = (value, now_s)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.timeout(1200)
def test_a_rolling_restart(make_stream: StreamFactory, tmp_path: Path) -> None:
    """Each of three workers is stopped and started again in turn, under load: nothing is lost or doubled.

    The session is long, so a worker that did not leave its group would show: its partitions would stand still so long.
    """
    stream = make_stream(session_seconds=30)
    workers = [Worker(stream.environment, tmp_path / str(number)) for number in range(3)]

    def are_shared() -> bool:
        held = [p["partition"] for w in workers for p in w.state().get("partitions", [])]
        return sorted(held) == [0, 1, 2, 3] and all(w.get("/readyz")[0] == 200 for w in workers)

    with workers[0], workers[1], workers[2]:
        for worker in workers:
            worker.start()
        workers[0].wait(are_shared, 120, "shared")
        with Load(stream) as load:
            time.sleep(STEADY_S)
            for worker in workers:
                assert_ends(worker)
                time.sleep(STEADY_S)
                worker.start().wait_ready(READY_S)
                time.sleep(STEADY_S)
        print({key: round(seconds, 2) for key, seconds in load.longest_s.items()})  # noqa: T201 - the figures
        ends = stream.ends()
        workers[0].wait(
            lambda: {p["partition"]: p["ledger_end"] for w in workers for p in w.state().get("partitions", [])} == ends,
            60,
            "drained",
        )
        workers[0].wait(are_shared, 60, "shared")
        stopping = [threading.Thread(target=assert_ends, args=(worker,)) for worker in workers]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        assert [worker.process.poll() for worker in workers] == [0, 0, 0]
    assert max(load.longest_s.values()) < 25, "partitions waited for the session of a worker that had ended"
    counts = verify(stream.broker, stream.topic, stream.repo)
    assert counts["messages"] == load.sent
