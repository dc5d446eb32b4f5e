"""One fault at a time, under load: broker, network, disk, the group's offsets, the shape of a topic. Real servers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions

from headrace.chains import Folder, footer
from streaming.broker import Broker, BrokerError, Log
from tests.servers import Kafka, KafkaCluster, Mode
from tests.streaming.chaos import Load
from tests.streaming.conftest import Network, Stream, StreamFactory, read_from
from tests.streaming.oracle import contract_of, judge, read_offline, read_topic, verify
from tests.streaming.process import Worker, config_of, emit

MEBIBYTE = 1 << 20

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def admin(kafka: str) -> AdminClient:
    """Of the shared Kafka."""
    return AdminClient({"bootstrap.servers": kafka})


@contextlib.contextmanager
def under_load(stream: Stream, *, rate: float = 500) -> Iterator[None]:
    """Events of every kind while the body runs."""
    load = Load(stream, seed=3, rate=rate)
    load.start()
    try:
        yield
    finally:
        load.finish()


def settle(stream: Stream, worker: Worker) -> dict[str, int]:
    """Let the worker finish, and hold everything to the truth."""
    worker.wait_ready()
    worker.wait_drained(stream.ends())
    assert all(part["lag"] == 0 for part in worker.state()["partitions"])
    assert worker.stop()[0] == 0
    return verify(stream.broker, stream.topic, stream.repo)


def configure(admin: AdminClient, topic: str, **entries: str) -> None:
    """Change a topic's configuration; underscores stand for dots."""
    changes = [
        ConfigEntry(name.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
        for name, value in entries.items()
    ]
    resource_ = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=changes)
    admin.incremental_alter_configs([resource_])[resource_].result(10)


def event(driver: int, **more: Any) -> bytes:
    """A good event."""
    values = {"driver_id": driver, "conv_rate": 0.5, "acc_rate": 0.25, "avg_daily_trips": 7, "created": None}
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return json.dumps({**values, "datetime": moment, **more}).encode()


def peak_mebibytes(worker: Worker) -> int:
    """The most memory that the worker's process has used."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) // 1024


# -- broker and network ----------------------------------------------------------------------------------------------


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_broker_that_restarts_under_load(stream: Stream, kafka_server: Kafka, tmp_path: Path, how: str) -> None:
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        with under_load(stream):
            time.sleep(2)
            getattr(kafka_server, how)()
            time.sleep(3)
            assert worker.get("/healthz")[0] == 200
            kafka_server.start()
            time.sleep(2)
        settle(stream, worker)


@pytest.mark.campaign
@pytest.mark.parametrize("mode", [Mode.STALLED, Mode.MUTE, Mode.CUT])
@pytest.mark.parametrize("to", ["broker", "store"])
def test_a_network_that_fails_for_longer_than_the_session(
    make_stream: StreamFactory, network: Network, tmp_path: Path, mode: Mode, to: str
) -> None:
    stream = make_stream(network=network)
    proxy = network.store if to == "store" else network.broker
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        with under_load(stream):
            time.sleep(1)
            proxy.set(mode)
            worker.wait(lambda: worker.get("/readyz")[0] == 503, 30, "not ready")
            said = " ".join(worker.state()["faults"])
            expected = ("step online",) if to == "store" else ("the broker has not answered", "group's assignment")
            assert any(words in said for words in expected), said
            proxy.set(Mode.OPEN)
            worker.wait_ready()
        settle(stream, worker)


@pytest.mark.parametrize("mode", [Mode.CUT, pytest.param(Mode.STALLED, marks=pytest.mark.campaign)])
def test_sigterm_while_the_broker_is_away(
    make_stream: StreamFactory, network: Network, tmp_path: Path, mode: Mode
) -> None:
    stream = make_stream(network=network)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        network.broker.set(mode)
        time.sleep(3)
        assert worker.stop(30)[0] == 0


@pytest.mark.campaign
def test_leaders_and_the_controller_change(make_stream: StreamFactory, tmp_path: Path) -> None:
    """Of three brokers each is killed once, under load."""
    single = make_stream(store_retry_seconds=120)
    with KafkaCluster() as cluster, Worker(single.environment, tmp_path / "log") as worker:
        topic = cluster.create_topic("drivers")
        cluster.create_topic(f"{topic}.dlq")
        read_from(single.repo, cluster.address, topic)
        stream = Stream(cluster.address, topic, single.repo, single.environment)
        worker.start().wait_ready()
        with under_load(stream):
            for node in cluster.nodes:
                time.sleep(3)
                node.kill()
                time.sleep(8)
                node.start()
        settle(stream, worker)


# -- disk ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, worker: Worker) -> Iterator[Callable[[], None]]:
    """Let the running worker's folder have no room; the function makes room again.

    A real, full file system where one can be mounted, else a limit on the size of files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mounting, capture_output=True, check=False).returncode == 0:
        ballast = folder / "ballast"
        try:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            worker.start().wait_ready()
            yield ballast.unlink
        finally:
            if not worker.is_over:
                worker.kill()
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    worker.start().wait_ready()
    pid, size = worker.process.pid, resource.RLIMIT_FSIZE
    _, hard = resource.prlimit(pid, size)
    resource.prlimit(pid, size, (1024, hard))

    def make_room() -> None:
        resource.prlimit(pid, size, (hard, hard))

    yield make_room


def test_a_full_disk(stream: Stream, tmp_path: Path) -> None:
    contract = contract_of(stream.repo)
    folder = contract.directory
    with Worker(stream.environment, tmp_path / "log") as worker, small_disk(folder, worker) as make_room:
        emit(stream.environment, count=2000, seed=1, bad_fraction=0.1)
        worker.wait(lambda: "step offline" in " ".join(worker.state().get("faults", [])), 20, "not ready")
        assert worker.get("/readyz")[0] == 503
        assert worker.get("/healthz")[0] == 200
        time.sleep(2)
        assert list(folder.glob("*.parquet")) == []
        make_room()
        settle(stream, worker)
        assert [path.name for path in folder.iterdir() if path.suffix != ".parquet"] == []


# -- the group's offsets ---------------------------------------------------------------------------------------------


def test_the_group_s_offsets_are_lost_or_wrong(stream: Stream, admin: AdminClient, tmp_path: Path) -> None:
    with Worker(stream.environment, tmp_path / "log") as worker:
        emit(stream.environment, count=1000, seed=1)
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        group = worker.state()["group"]
        assert worker.stop()[0] == 0
        emit(stream.environment, count=1000, seed=2)
        wrong = [TopicPartition(stream.topic, n, offset) for n, offset in enumerate((0, 10, 10**9))]
        admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, wrong)])[group].result(10)
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        assert worker.stop()[0] == 0
        emit(stream.environment, count=1000, seed=3)
        admin.delete_consumer_groups([group])[group].result(10)
        worker.start()
        assert settle(stream, worker)["accepted"] == 3000


# -- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.campaign
def test_the_head_of_the_log_is_deleted_under_a_worker_that_lags(
    make_stream: StreamFactory, admin: AdminClient, tmp_path: Path
) -> None:
    stream = make_stream(allow_gaps=True, session_seconds=30)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        emit(stream.environment, count=1000, seed=1)
        worker.wait_drained(stream.ends())
        before = stream.ends()
        worker.process.send_signal(19)
        emit(stream.environment, count=20_000, seed=2)
        cut = [TopicPartition(stream.topic, n, end - 5) for n, end in stream.ends().items()]
        for deleted in admin.delete_records(cut).values():
            deleted.result(10)
        worker.process.send_signal(18)
        worker.wait_drained(stream.ends())
        assert worker.stop()[0] == 0
        said = worker.log.read_text()
    folder = Folder(contract_of(stream.repo).directory)
    marks = {
        int(chain.rsplit("-", 2)[1]): (segment.first, mark.next)
        for chain, found in folder.chains().items()
        for segment in found.valid
        if (mark := footer(folder.path_of(segment))).mark == "gap"
    }
    # What was fetched before the cut is no gap.
    assert marks.keys() == before.keys()
    for part in cut:
        first, after = marks[part.partition]
        assert before[part.partition] <= first < after == part.offset
        assert f"the ledger of `driver_stats` for {stream.topic}[{part.partition}] ends at {first}" in said
    kept = judge(read_topic(stream.broker, stream.topic)).accepted
    found = read_offline(contract_of(stream.repo), stream.topic)
    assert not found.doubled
    assert kept.items() <= found.rows.items()


def test_the_ends_of_a_partition_that_was_added(stream: Stream, admin: AdminClient) -> None:
    broker = Broker(config_of(stream.environment))
    emit(stream.environment, count=100)
    before = {number: broker.log(stream.topic, number).latest for number in range(4)}
    assert before == stream.ends()
    admin.create_partitions([NewPartitions(stream.topic, 5)])[stream.topic].result(10)
    deadline = time.monotonic() + 10
    while True:
        try:
            found = broker.log(stream.topic, 4)
            break
        except BrokerError:  # it has no leader yet; the worker asks again too
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    assert found == Log(0, 0)
    broker.close()


@pytest.mark.campaign
def test_partitions_added_under_a_worker(stream: Stream, admin: AdminClient, tmp_path: Path) -> None:
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        with under_load(stream):
            time.sleep(2)
            admin.create_partitions([NewPartitions(stream.topic, 7)])[stream.topic].result(10)
            begun_s = time.monotonic()
            time.sleep(1)
            emit(stream.environment, count=2000, seed=9)  # this producer knows of the new ones at once
            worker.wait(lambda: len(worker.state().get("partitions", [])) == 7, 60, "seven partitions")
            print(f"found after {time.monotonic() - begun_s:.0f} s")  # noqa: T201 - a figure of the campaign
        settle(stream, worker)
        assert all(read_offline(contract_of(stream.repo), stream.topic).ends[n] > 0 for n in range(7))


@pytest.mark.campaign
def test_a_compacted_topic_has_gaps(stream: Stream, admin: AdminClient, tmp_path: Path) -> None:
    configure(
        admin,
        stream.topic,
        cleanup_policy="compact",
        segment_ms="200",
        min_cleanable_dirty_ratio="0.001",
        delete_retention_ms="3600000",
    )
    producer = Producer({"bootstrap.servers": stream.broker, "enable.idempotence": True})

    def send(number: int) -> None:
        for driver in range(100):
            value = None if (number + driver) % 10 == 0 else event(1001 + driver, avg_daily_trips=number)
            producer.produce(stream.topic, value, str(driver).encode(), partition=driver % 4)
        assert producer.flush(10) == 0

    for number in range(5):
        send(number)
        time.sleep(0.3)
    sent, deadline = 500, time.monotonic() + 60
    while len(read_topic(stream.broker, stream.topic)) > 250:
        send(9)  # only what lies before the newest segment is compacted
        sent += 100
        assert time.monotonic() < deadline, "the broker compacts nothing"
        time.sleep(0.3)
    configure(admin, stream.topic, cleanup_policy="delete")
    time.sleep(1)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start()
        counts = settle(stream, worker)
    assert counts["messages"] < sent == sum(stream.ends().values())


# -- huge records ----------------------------------------------------------------------------------------------------


@pytest.mark.campaign
def test_records_of_50_megabytes(make_stream: StreamFactory, admin: AdminClient, tmp_path: Path) -> None:
    stream = make_stream(session_seconds=30, store_retry_seconds=300, broker_timeout_seconds=30)
    limit = 60_000_000
    configure(admin, stream.topic, max_message_bytes=str(limit))
    producer = Producer({"bootstrap.servers": stream.broker, "message.max.bytes": limit})
    noise = random.Random(1).randbytes(25_000_000).hex()
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        before = peak_mebibytes(worker)
        for partition in range(4):
            producer.produce(stream.topic, event(1001, note=noise), b"a", partition=partition)
            producer.produce(stream.topic, noise.encode(), b"b", partition=partition)
            producer.produce(stream.topic, event(1002 + partition), b"c", partition=partition)
        assert producer.flush(60) == 0
        worker.wait_ready()
        worker.wait_drained(stream.ends())
        peak = peak_mebibytes(worker)
        print(f"peak memory: {before} MiB, then {peak} MiB")  # noqa: T201 - a figure of the campaign
        assert worker.stop()[0] == 0
    truth = judge(read_topic(stream.broker, stream.topic))
    assert len(truth.accepted) == 8
    assert read_offline(contract_of(stream.repo), stream.topic).rows == truth.accepted
    letters = {m.headers["headrace.partition"]: m for m in read_topic(stream.broker, f"{stream.topic}.dlq")}
    assert {letter.headers["headrace.size"] for letter in letters.values()} == {b"50000000"}
    assert len(letters) == 4
    assert peak < 2048


@pytest.mark.campaign
@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize(("records", "size"), [(1, 300 * MEBIBYTE), (300, MEBIBYTE)])
def test_records_that_unpack_to_hundreds_of_megabytes(
    make_stream: StreamFactory, tmp_path: Path, codec: str, records: int, size: int
) -> None:
    stream = make_stream(session_seconds=30, store_retry_seconds=300, broker_timeout_seconds=30)
    producer = Producer(
        {
            "bootstrap.servers": stream.broker,
            "compression.type": codec,
            "message.max.bytes": 1_000_000_000,
            "batch.size": 1_000_000_000,
            "linger.ms": 1000,
            "queue.buffering.max.kbytes": 2_000_000,
        }
    )
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        before = peak_mebibytes(worker)
        zeros = bytes(size)
        for _ in range(records):
            producer.produce(stream.topic, zeros, b"a", partition=0)
        assert producer.flush(120) == 0  # what is in one batch with them cannot be read either
        for partition in range(4):
            producer.produce(stream.topic, event(1001 + partition), b"c", partition=partition)
        assert producer.flush(120) == 0
        worker.wait_ready()
        worker.wait_drained(stream.ends(), 200)
        peak = peak_mebibytes(worker)
        print(f"{codec}, {records} x {size}: peak memory {before} MiB, then {peak} MiB")  # noqa: T201
        assert worker.stop()[0] == 0
    found = read_offline(contract_of(stream.repo), stream.topic)
    assert len(found.rows) == 4
    assert found.rejected == records
    assert peak < 4096
