"""What goes wrong around the worker: stores, brokers, topics, other workers. Real servers."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from redis import Redis

from headrace.chains import Folder, footer
from headrace.errors import ConfigError
from streaming.start import begin, new_epoch
from tests.conftest import RepositoryFactory
from tests.servers import MockBroker, Valkey
from tests.servers.brokers import create_topic
from tests.servers.repository import use_valkey
from tests.streaming.conftest import QUICK, Stream, StreamFactory
from tests.streaming.oracle import contract_of, judge, read_offline, read_online, read_topic, verify
from tests.streaming.process import FAUST, Worker, config_of, emit, run


def make_anew(stream: Stream) -> None:
    """Delete the topic and create it again."""
    admin = AdminClient({"bootstrap.servers": stream.broker})
    admin.delete_topics([stream.topic])[stream.topic].result(10)
    time.sleep(1)
    create_topic(stream.broker, stream.topic)


def test_a_store_that_hangs_for_a_while_loses_nothing(stream: Stream, valkey_server: Valkey, tmp_path: Path) -> None:
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        valkey_server.freeze()
        try:
            emit(stream.environment, count=2000, seed=3, bad_fraction=0.1)
            worker.wait(lambda: worker.get("/readyz")[0] == 503, 20, "not ready")
            assert "online" in " ".join(worker.state()["faults"])
            assert worker.get("/healthz")[0] == 200
        finally:
            valkey_server.thaw()
        worker.wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    verify(stream.broker, stream.topic, stream.repo)


def test_a_store_that_stays_away_ends_the_worker(
    make_stream: StreamFactory, valkey_server: Valkey, tmp_path: Path
) -> None:
    stream = make_stream(store_retry_seconds=4)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        valkey_server.freeze()
        try:
            emit(stream.environment, count=100, seed=3)
            code = worker.process.wait(120)
        finally:
            valkey_server.thaw()
        assert code == 1
        assert "HEADRACE_STORE_RETRY_SECONDS" in worker.tail().splitlines()[-1]
        assert all(end == 0 for end in read_offline(contract_of(stream.repo), stream.topic).ends.values())
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    verify(stream.broker, stream.topic, stream.repo)


def test_sigterm_while_a_store_hangs(stream: Stream, valkey_server: Valkey, tmp_path: Path) -> None:
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        valkey_server.freeze()
        try:
            emit(stream.environment, count=100, seed=3)
            worker.wait(lambda: worker.get("/readyz")[0] == 503, 20, "not ready")
            code, seconds = worker.stop()
        finally:
            valkey_server.thaw()
    assert code == 0
    assert seconds < 10


def test_an_online_store_that_forgot_gets_back_what_is_recent(
    make_stream: StreamFactory, valkey_server: Valkey, tmp_path: Path
) -> None:
    """The server loses everything and comes back as another: running workers and new ones bring it."""
    stream = make_stream(append_seconds=2)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        emit(stream.environment, count=3000, seed=8, late_fraction=0.1, keys=200)
        worker.wait_drained(stream.ends())
        valkey_server.kill()
        valkey_server.start()
        emit(stream.environment, count=10, seed=9, keys=2)
        worker.wait(lambda: worker.log.read_text().count("applied again") >= 4, 60, "told of it, by each partition")
        worker.wait_drained(stream.ends())
        verify(stream.broker, stream.topic, stream.repo)
        worker.stop()
        valkey_server.kill()
        valkey_server.start()
        worker.start().wait_ready()
        worker.wait(lambda: worker.log.read_text().count("applied again") >= 8, 60, "told of it again")
        worker.stop()
    verify(stream.broker, stream.topic, stream.repo)


def test_what_a_replica_lacks_is_not_appended(stream: Stream, tmp_path: Path) -> None:
    """So a failover to it loses nothing of the ledger."""
    with (
        Valkey() as master,
        Valkey(("--replicaof", "127.0.0.1", str(master.port))) as replica,
        Worker(stream.environment, tmp_path / "log") as worker,
    ):
        use_valkey(stream.repo, master.address, replicas_to_wait=1)
        worker.start().wait_ready()
        replica.freeze()
        emit(stream.environment, count=500, seed=4)
        worker.wait(lambda: "replicas_to_wait" in " ".join(worker.state().get("faults", [])), 30, "told of it")
        assert worker.get("/readyz")[0] == 503
        time.sleep(2)
        assert all(end == 0 for end in read_offline(contract_of(stream.repo), stream.topic).ends.values())
        replica.thaw()
        worker.wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
        master.kill()
        Redis(port=replica.port).replicaof("NO", "ONE")
        use_valkey(stream.repo, replica.address)
        verify(stream.broker, stream.topic, stream.repo)


def test_two_workers_share_and_take_over(stream: Stream, tmp_path: Path) -> None:
    emitter = subprocess.Popen(
        [*FAUST, "emit", "--rate", "1500", "--count", "30000", "--seed", "5", "--bad-fraction", "0.05"],
        env=stream.environment,
        stdout=subprocess.DEVNULL,
    )
    with (
        Worker(stream.environment, tmp_path / "one") as one,
        Worker(stream.environment, tmp_path / "two") as two,
    ):
        one.start()
        two.start()
        one.wait_ready()
        two.wait_ready()
        one.wait(lambda: len(one.state().get("partitions", [])) == 2, 30, "sharing")
        one.kill()
        two.wait(lambda: len(two.state().get("partitions", [])) == 4, 30, "taking over")
        one.start()
        one.wait_ready()
        assert emitter.wait(60) == 0
        ends = stream.ends()

        def is_drained() -> bool:
            found = {p["partition"]: p["ledger_end"] for w in (one, two) for p in w.state().get("partitions", [])}
            return found == ends

        one.wait(is_drained, 60, "drained")
        assert one.stop()[0] == 0
        assert two.stop()[0] == 0
    verify(stream.broker, stream.topic, stream.repo)


def test_a_topic_made_anew_stops_until_a_new_epoch(stream: Stream, tmp_path: Path) -> None:
    emit(stream.environment, count=2000, seed=1)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
        make_anew(stream)
        emit(stream.environment, count=6000, seed=2)
        worker.start()
        assert worker.process.wait(120) == 1
        assert f"start --topic {stream.topic} --new-epoch" in worker.tail().splitlines()[-1]
        for _ in range(2):  # may be repeated
            started = new_epoch(config_of(stream.environment), stream.topic)
            assert started["epochs"] == {"driver_stats": dict.fromkeys("0123", 1)}
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    truth = judge(read_topic(stream.broker, stream.topic))
    assert read_offline(contract_of(stream.repo), stream.topic, epoch=1).rows == truth.accepted
    assert len(read_offline(contract_of(stream.repo), stream.topic, epoch=0).rows) == 2000


def test_a_topic_made_anew_under_a_running_worker(stream: Stream, tmp_path: Path) -> None:
    emit(stream.environment, count=2000, seed=1)
    with Worker({**stream.environment, "HEADRACE_SHORT_LOG_SECONDS": "2"}, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        make_anew(stream)
        emit(stream.environment, count=6000, seed=2)
        assert worker.process.wait(60) == 1
        assert "--new-epoch" in worker.tail().splitlines()[-1]
        assert len(read_offline(contract_of(stream.repo), stream.topic).rows) == 2000
        new_epoch(config_of(stream.environment), stream.topic)
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    assert len(read_offline(contract_of(stream.repo), stream.topic, epoch=0).rows) == 2000
    truth = judge(read_topic(stream.broker, stream.topic))
    assert len(truth.accepted) == 6000
    assert read_offline(contract_of(stream.repo), stream.topic, epoch=1).rows == truth.accepted


def test_events_lost_by_retention_are_named_and_recorded_once_allowed(stream: Stream, tmp_path: Path) -> None:
    emit(stream.environment, count=1000, seed=1)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
        before = stream.ends()
        emit(stream.environment, count=1000, seed=2)
        cut = {n: end + 10 for n, end in before.items()}
        admin = AdminClient({"bootstrap.servers": stream.broker})
        for future in admin.delete_records([TopicPartition(stream.topic, n, o) for n, o in cut.items()]).values():
            future.result(10)
        worker.start()
        assert worker.process.wait(120) == 1
        reason = worker.tail().splitlines()[-1]
        assert "HEADRACE_ALLOW_GAPS" in reason
        refused = [
            f"the ledger of `driver_stats` for {stream.topic}[{n}] ends at {end}, and the oldest event that the topic "
            f"still has is {cut[n]}: 10 offsets were lost"
            for n, end in before.items()
        ]
        assert any(facts in reason for facts in refused), reason
    with Worker({**stream.environment, "HEADRACE_ALLOW_GAPS": "true"}, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    contract = contract_of(stream.repo)
    left = judge(read_topic(stream.broker, stream.topic)).accepted
    found = read_offline(contract, stream.topic).rows
    assert len(found) == 1000 + len(left)
    assert {origin: row for origin, row in found.items() if origin in left} == left
    folder = Folder(contract.directory)
    marks = [footer(folder.path_of(s)).mark for chain in folder.chains().values() for s in chain.valid]
    assert marks.count("gap") == 4


def test_a_new_view_on_an_old_topic_begins_where_the_log_does(stream: Stream, tmp_path: Path) -> None:
    emit(stream.environment, count=1000, seed=1)
    admin = AdminClient({"bootstrap.servers": stream.broker})
    for future in admin.delete_records([TopicPartition(stream.topic, n, 7) for n in range(4)]).values():
        future.result(10)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    verify(stream.broker, stream.topic, stream.repo)


@pytest.mark.parametrize("at", ["latest", "earliest"])
def test_start_at(stream: Stream, tmp_path: Path, at: str) -> None:
    emit(stream.environment, count=1000, seed=1)
    ends = stream.ends()
    started = begin(config_of(stream.environment), stream.topic, at)
    expected = ends if at == "latest" else dict.fromkeys(ends, 0)
    assert started["starts"] == {str(n): start for n, start in expected.items()}
    if at == "latest":
        with pytest.raises(ConfigError, match="exists and ends at"):
            begin(config_of(stream.environment), stream.topic, "earliest")
    emit(stream.environment, count=500, seed=2)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    rows = read_offline(contract_of(stream.repo), stream.topic).rows
    assert len(rows) == (500 if at == "latest" else 1500)


def test_transactions(stream: Stream, tmp_path: Path) -> None:
    """Aborted events are not read; the offsets of markers and of aborted events are gaps inside a slice."""
    producer = Producer({"bootstrap.servers": stream.broker, "transactional.id": stream.topic})
    producer.init_transactions(10)
    for number in range(20):
        producer.begin_transaction()
        for index in range(50):
            now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
            event = {
                "driver_id": 1000 + index,
                "conv_rate": 0.5,
                "acc_rate": 0.5,
                "avg_daily_trips": number,
                "datetime": now,
                "created": None,
            }
            producer.produce(stream.topic, json.dumps(event).encode(), key=str(index).encode())
        assert producer.flush(10) == 0  # else what is aborted might not have come to the log
        (producer.abort_transaction if number % 3 == 1 else producer.commit_transaction)(10)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        # The log ends with the marker of an aborted transaction: nobody will ever read an event there.
        worker.wait(lambda: all(part["lag"] == 0 for part in worker.state()["partitions"]), 10, "without lag")
        worker.stop()
    truth = judge(read_topic(stream.broker, stream.topic))
    assert len(truth.accepted) == 13 * 50
    assert read_offline(contract_of(stream.repo), stream.topic).rows == truth.accepted


def test_oversize_letters_are_cut(stream: Stream, tmp_path: Path) -> None:
    producer = Producer({"bootstrap.servers": stream.broker, "message.max.bytes": 2_000_000})
    noise = random.Random(1).randbytes(1_048_588 - 200)  # what compresses well would not be too large for the broker
    producer.produce(stream.topic, noise, key=b"k", headers=[("own", b"1")], partition=0)
    producer.produce(stream.topic, b"y", key=b"k", partition=0)
    assert producer.flush(10) == 0
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    letters = {m.headers["headrace.offset"]: m for m in read_topic(stream.broker, f"{stream.topic}.dlq")}
    assert letters[b"0"].value == noise[:65_536]
    assert letters[b"0"].headers["own"] == b"1"
    assert letters[b"0"].headers["headrace.size"] == str(len(noise)).encode()
    assert letters[b"0"].headers["headrace.sha256"] == hashlib.sha256(noise).hexdigest().encode()
    assert letters[b"1"].value == b"y"


def test_the_embedded_broker_forgets_and_a_new_epoch_goes_on(
    feature_repo_copy: RepositoryFactory, worker_environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    repo = feature_repo_copy("sqlite")
    contract = contract_of(repo)
    with Worker(worker_environment(), tmp_path / "log") as worker:
        for epoch in range(2):
            with MockBroker(["drivers"]) as broker:
                # This broker holds a joining group for 3 s and forgets who is silent for a session.
                chosen = {**QUICK, "session_seconds": 6, "short_log_seconds": 1}
                environment = worker_environment(**chosen, feature_repo=repo, broker=broker.address)
                stream = Stream(broker.address, "drivers", repo, environment)
                worker.environment.update(environment)
                if epoch:
                    worker.start()
                    assert worker.process.wait(120) == 1
                    assert "--new-epoch" in worker.tail().splitlines()[-1]
                    done = run(environment, "start", "--topic", "drivers", "--new-epoch")
                    assert done.returncode == 0, done.stderr
                    assert json.loads(done.stdout)["epochs"] == {"driver_stats": dict.fromkeys("0123", 1)}
                emit(environment, seed=epoch, bad_fraction=0.1)
                worker.start().wait_ready()
                worker.wait_drained(stream.ends())
                assert worker.stop()[0] == 0
                truth = judge(read_topic(broker.address, "drivers"))
                assert read_offline(contract, "drivers", epoch=epoch).rows == truth.accepted
                if epoch == 0:
                    newest = truth.newest()
                    served = read_online(repo, sorted(newest))
                    assert {k: served[k] for k in newest} == {k: (r[1], r[2], r[3]) for k, r in newest.items()}
