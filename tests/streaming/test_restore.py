"""Rebuilding: damaged segments, a lost offline or online store, another cluster. Real servers, and an oracle."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from feast import Entity, FeatureView, Field, FileSource, KafkaSource, ValueType
from feast.data_format import AvroFormat, JsonFormat, ParquetFormat
from feast.types import Array, Float64, Int64, String
from redis import Redis

from headrace import faults
from headrace.audit import audit
from headrace.chains import Folder, StreamLedger, accepted_offsets, footer
from headrace.compact import FILES_A_MERGE, compact
from headrace.contract import ViewContract
from headrace.damage import SET_ASIDE
from headrace.repository import contracts, open_store
from headrace.segments import SegmentName
from streaming import emit as emitting
from streaming.restore import restore
from streaming.settings import read_config
from tests.conftest import TopicFactory
from tests.headrace.crashes import forked, in_clean_process
from tests.servers import Valkey
from tests.servers.schema_registry import SchemaRegistryServer
from tests.streaming.conftest import Stream, StreamFactory, set_format
from tests.streaming.oracle import FEATURES, KEY, contract_of, judge, read_offline, read_topic, verify
from tests.streaming.process import Worker, config_of, emit, run
from tests.streaming.test_faults import make_anew
from tests.streaming.test_formats import SECOND, plainly


def filled(stream: Stream, log: Path) -> Folder:
    """A folder with several segments of each partition."""
    with Worker(stream.environment, log) as worker:
        worker.start().wait_ready()
        for seed in range(5):
            emit(stream.environment, count=1000, seed=seed, bad_fraction=0.05, late_fraction=0.1)
            worker.wait_drained(stream.ends())
        worker.stop()
    return Folder.of(contract_of(stream.repo))


def files(folder: Folder, partition: int) -> list[Path]:
    """The valid files of a partition, in the order of their positions."""
    names = {name.chain for name in folder.names() if isinstance(name, SegmentName)}
    (chain,) = (name for name in names if name.endswith(f"-{partition}-0"))
    return [Path(str(folder.path_of(segment))) for segment in folder.chain(chain).valid]


def flip(path: Path) -> None:
    """Change one bit at the end of a file's first column, in its values: the footer stays whole."""
    column = pq.read_metadata(path).row_group(0).column(0)
    place = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def delete_records(stream: Stream, below: dict[int, int]) -> None:
    """Let the topic lose what lies below an offset of each partition."""
    places = [TopicPartition(stream.topic, number, offset) for number, offset in below.items()]
    admin = AdminClient({"bootstrap.servers": stream.broker})
    for future in admin.delete_records(places).values():
        future.result(10)


def truth_of(stream: Stream) -> dict[Any, Any]:
    """The rows of what the topic has."""
    return judge(read_topic(stream.broker, stream.topic)).accepted


def restored(stream: Stream, *, is_ok: bool = True, dry_run: bool = False) -> dict[str, Any]:
    """Restore in this process, which takes no seconds to start; by chain, what was told of the one view."""
    found: Any = restore(config_of(stream.environment), stream.topic, dry_run=dry_run)
    assert found["ok"] is is_ok, found
    return dict(found["views"].get("driver_stats", {}))


STEPS = (
    "set-aside.1.renamed",
    "restore.0.online",
    "restore.1.temporary-written",
    "restore.2.temporary-fsynced",
    "restore.3.linked",
    "restore.4.folder-fsynced",
    "restore.5.temporary-removed",
    "restore.6.others-checked",
)


def killed_at_every_step(topic: str) -> dict[str, int]:
    """End one restoration after the other, each at another step, all on one folder; how each ended."""
    codes = {}
    for step in STEPS:

        def work(step: str = step) -> None:
            faults.hook = lambda reached: os.kill(os.getpid(), signal.SIGKILL) if reached == step else None
            restore(read_config(), topic)

        codes[step] = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
    return codes


def test_damaged_segments_are_set_aside_and_read_again(
    make_stream: StreamFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit, a file cut short, one that is gone, an end that is garbage, a merged file; and kills meanwhile."""
    stream = make_stream(slice_records=100)
    folder = filled(stream, tmp_path / "log")
    assert restored(stream) == {}, "nothing is damaged"
    monkeypatch.setitem(FILES_A_MERGE, 1, 2)
    compact(contract_of(stream.repo), grace_s=0)
    levels = {name.level for name in folder.names() if isinstance(name, SegmentName)}
    assert levels >= {0, 1}, "the newest of a level is never merged, the others are"

    gone = files(folder, 3)[0]
    damaged = {
        "a bit of a merged file": files(folder, 0)[0],
        "a file cut short": files(folder, 1)[-2],
        "an end": files(folder, 2)[-1],
    }
    flip(damaged["a bit of a merged file"])
    damaged["a file cut short"].write_bytes(damaged["a file cut short"].read_bytes()[:-9])
    damaged["an end"].write_bytes(b"garbage")
    gone.unlink()

    told = restored(stream, dry_run=True, is_ok=False)
    assert {name for chain in told.values() for name in chain["damaged"]} == {path.name for path in damaged.values()}
    assert {chain[-3] for chain, one in told.items() if one["missing"]} == {"0", "1", "2", "3"}
    first_of_end = int(damaged["an end"].name[-28:-8])
    (end,) = (one["missing"] for chain, one in told.items() if chain[-3] == "2")
    assert end == [[first_of_end, stream.ends()[2]]]
    assert all(path.exists() for path in damaged.values()), "a dry run changes nothing"

    for name, value in stream.environment.items():
        monkeypatch.setenv(name, value)
    codes = in_clean_process(f"{__name__}:killed_at_every_step", stream.topic)
    assert codes == dict.fromkeys(STEPS, -signal.SIGKILL)
    done = run(stream.environment, "restore", "--topic", stream.topic)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    assert restored(stream, dry_run=True) == {}
    aside = {path.name for path in (folder.path / SET_ASIDE).iterdir()}
    assert aside == {path.name for path in damaged.values()}
    verify(stream.broker, stream.topic, stream.repo)


def test_ends_beside_workers_and_a_whole_folder(stream: Stream, tmp_path: Path) -> None:
    """One worker knows where the end was and is frozen meanwhile, another takes over; the first wakes, and goes on."""
    folder = filled(stream, tmp_path / "log")
    logs = tmp_path / "one", tmp_path / "other"
    with Worker(stream.environment, logs[0]) as one, Worker(stream.environment, logs[1]) as other:
        one.start().wait_ready()
        emit(stream.environment, count=300, seed=7)
        one.wait_drained(stream.ends())
        ends = [files(folder, number)[-1] for number in range(4)]
        os.kill(one.process.pid, signal.SIGSTOP)
        emit(stream.environment, count=500, seed=8, late_fraction=0.1)  # it may have fetched some, appended none
        for path in ends[:2]:
            path.write_bytes(b"garbage")
        for path in ends[2:]:
            flip(path)
        told = restored(stream)
        for path, number in zip(ends, range(4), strict=True):
            (missing,) = (found["missing"] for chain, found in told.items() if chain[-3] == str(number))
            assert missing[0][0] == int(path.name[-28:-8])
            assert (missing[0][1] == stream.ends()[number]) is (number < 2), "its footer says where it ended"
        other.start().wait_ready()
        other.wait_drained(stream.ends())
        os.kill(one.process.pid, signal.SIGCONT)
        emit(stream.environment, count=500, seed=9)
        wait_for(lambda: all(end == stream.ends()[n] for n, end in ends_of(folder).items()))
        for worker in (one, other):
            worker.stop()
    assert "is left out" not in logs[0].read_text() + logs[1].read_text()
    verify(stream.broker, stream.topic, stream.repo)

    # Of the whole folder what the topic still has is read again, and told is what it has not.
    shutil.rmtree(folder.path)
    starts = {0: 20, 1: 40, 2: 0, 3: 1}
    delete_records(stream, starts)
    started = run(stream.environment, "start", "--topic", stream.topic, "--at", "earliest")
    assert json.loads(started.stdout)["starts"] == {str(number): offset for number, offset in starts.items()}
    with Worker(stream.environment, logs[0]) as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    assert read_offline(contract_of(stream.repo), stream.topic).rows == truth_of(stream)


def ends_of(folder: Folder) -> dict[int, int]:
    return {int(name[-3]): chain.end for name, chain in folder.chains().items()}


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_what_cannot_be_restored_keeps_nothing_else_from_it(make_stream: StreamFactory, tmp_path: Path) -> None:
    stream = make_stream(broker_timeout_seconds=2)
    folder = filled(stream, tmp_path / "log")

    # What the topic lost too is a gap, once that is allowed; the other partitions are restored all the same.
    first = files(folder, 0)[0]
    lost = int(files(folder, 0)[1].name[-28:-8]) - 3
    first.unlink()
    flip(files(folder, 1)[1])
    delete_records(stream, {0: lost})
    refused = run(stream.environment, "restore", "--topic", stream.topic)
    assert refused.returncode == 1
    told = json.loads(refused.stdout)
    assert not told["ok"]
    zero, one = (told["views"]["driver_stats"][f"stream-{stream.topic}-{number}-0"] for number in (0, 1))
    words = f"begins at {lost} now; restore the files from a backup, or set HEADRACE_ALLOW_GAPS=true"
    assert words in zero["failed"]
    assert (zero["restored"], one["failed"], one["restored"]) == ([], None, one["missing"])
    stream.environment["HEADRACE_ALLOW_GAPS"] = "true"
    (zero,) = restored(stream).values()
    assert (zero["lost"], zero["restored"]) == ([[0, lost]], [[lost, lost + 3]])
    assert read_offline(contract_of(stream.repo), stream.topic).rows == truth_of(stream)

    # What nobody can read yet is not taken for empty: here records of a transaction, as after a leader that was lost.
    place, chain = stream.ends()[3], f"stream-{stream.topic}-3-0"
    producer = Producer({"bootstrap.servers": stream.broker, "transactional.id": stream.topic, "log_level": 0})
    producer.init_transactions(10)
    producer.begin_transaction()
    sent = [m.value for m in read_topic(stream.broker, stream.topic) if m.partition == 3][:20]
    for value in sent:
        producer.produce(stream.topic, value, partition=3)
    assert producer.flush(10) == 0
    ledger = StreamLedger(contract_of(stream.repo), stream.topic, 3)
    for start in (place, place + 10):
        ledger.append(0, start, start + 10, None, accepted=np.empty(0, dtype=np.int64), topic_id=ledger.end().topic_id)
    folder.path_of(SegmentName(chain, 0, place)).unlink()
    flip(files(folder, 1)[2])
    told = restored(stream, is_ok=False)
    assert f"[3] can be read up to offset {place} now, not up to {place + 10}" in told[chain]["failed"]
    assert told[f"stream-{stream.topic}-1-0"]["failed"] is None
    producer.commit_transaction(10)
    wait_for(lambda: stream.ends()[3] > place + 20)
    assert restored(stream)[chain]["restored"] == [[place, place + 10]]
    offline = read_offline(contract_of(stream.repo), stream.topic).rows
    assert offline == {
        (n, offset): row for (n, offset), row in truth_of(stream).items() if (n, offset) < (3, place + 10)
    }

    # Nor is a broker that is away: it is told at once, for every ledger.
    flip(files(folder, 1)[0])
    stream.environment["HEADRACE_BROKER"] = "127.0.0.1:9"
    (one,) = restored(stream, is_ok=False).values()
    assert "did not answer within 2 s" in one["failed"]
    assert list(one["damaged"]) == [files(folder, 1)[0].name]


def test_views_of_any_shape_are_restored_from_nothing(
    make_stream: StreamFactory, topic: TopicFactory, tmp_path: Path
) -> None:
    """Avro with a registry; two join keys, lists of texts, two views of one topic that judge differently.

    Every file of every ledger is damaged, and the online store is empty.
    """
    with SchemaRegistryServer() as registry:
        stream = make_stream(schema_registry_url=registry.url, slice_records=70)
        registry.register(SECOND, subject=f"{stream.topic}-value")
        set_format(stream.repo, AvroFormat(json.dumps(SECOND)))
        pairs = topic("pairs", partitions=2)
        names = ("driver_stats", "pairs", "strict_pairs")
        add_pairs(stream, pairs)
        config = config_of(stream.environment)
        views = contracts(open_store(stream.repo), list(names))
        with Worker(stream.environment, tmp_path / "log") as worker:
            worker.start().wait_ready()
            for seed in range(3):
                for name in names[:2]:
                    plan = emitting.Plan(rate=0, count=300, seed=seed, bad_fraction=0.1, late_fraction=0.1, keys=40)
                    emitting.emit(config, plan, view=name, anywhere=False)
                wait_for(lambda: drained(worker, {**ends_in(stream, stream.topic), **ends_in(stream, pairs)}))
            worker.stop()
        before = {view.name: content(view) for view in views}
        for view in views:
            for number, path in enumerate(sorted(Path(str(view.directory)).glob("stream-*"))):
                if number % 2 and pq.read_metadata(path).num_rows:
                    flip(path)
                else:
                    path.write_bytes(b"garbage")
        flush_online(stream)
        for one in (stream.topic, pairs):
            assert restore(config, one)["ok"]
        assert {view.name: content(view) for view in views} == before
        for view in views[1:]:  # the first has history that no topic has
            report = audit(open_store(stream.repo), view)
            assert (report.diverged, report.keys > 0) == (0, True)
        newest = judge(read_topic(stream.broker, stream.topic), decode=from_avro).newest()
        features = [f"driver_stats:{feature}" for feature in FEATURES]
        keys = [{KEY: key} for key in sorted(newest)]
        served = open_store(stream.repo).get_online_features(features, keys).to_dict()
        rows = zip(*(served[feature] for feature in (KEY, *FEATURES)), strict=True)
        assert list(rows) == [row[:4] for _, row in sorted(newest.items())]
    tags = [tag for row in before["pairs"]["rows"].values() for tag in row["tags"]]
    assert tags
    assert all(isinstance(tag, str) for tag in tags)


def from_avro(value: bytes) -> Any:
    """A record of the one schema that the registry has."""
    if value[:5] != b"\0\0\0\0\1":
        raise ValueError(value)
    return plainly(value[5:], SECOND)


def add_pairs(stream: Stream, topic: str) -> None:
    """Two views with two join keys and a list of texts on one topic, the second one stricter."""
    store = open_store(stream.repo)
    places = Entity(name="place", join_keys=["place_id"], value_type=ValueType.STRING)
    riders = Entity(name="rider", join_keys=["rider_id"], value_type=ValueType.INT64)
    made = []
    for name, most in (("pairs", "1"), ("strict_pairs", "0.5")):
        history = FileSource(
            name=f"{name}_history",
            path=f"../data/offline/{name}",
            file_format=ParquetFormat(),
            timestamp_field="at",
            created_timestamp_column="made",
        )
        source = KafkaSource(
            name=f"{name}_events",
            kafka_bootstrap_servers=stream.broker,
            topic=topic,
            timestamp_field="at",
            created_timestamp_column="made",
            message_format=JsonFormat(schema_json=""),
            batch_source=history,
        )
        schema = [
            Field(name="place_id", dtype=String),
            Field(name="rider_id", dtype=Int64),
            Field(name="score", dtype=Float64, tags={"ge": "0", "le": most}),
            Field(name="tags", dtype=Array(String)),
        ]
        made.append(FeatureView(name=name, entities=[places, riders], schema=schema, source=source))
    store.apply([places, riders, *made])


def ends_in(stream: Stream, topic: str) -> dict[tuple[str, int], int]:
    return {(topic, n): end for n, end in replace(stream, topic=topic).ends().items()}


def drained(worker: Worker, ends: dict[tuple[str, int], int]) -> bool:
    parts = worker.state().get("partitions", [])
    return len(parts) == 8 and all(part["ledger_end"] == ends[part["topic"], part["partition"]] for part in parts)


def content(view: ViewContract) -> dict[str, Any]:
    """The rows of a view by partition and offset, what is not there, and where its chains end."""
    folder = Folder.of(view)
    rows: dict[tuple[str, int], Any] = {}
    counts = [0, 0]
    for name, chain in folder.chains().items():
        for segment in chain.valid:
            path = folder.path_of(segment)
            mark = footer(path)
            counts = [counts[0] + mark.rejected, counts[1] + mark.skipped]
            held = pq.read_table(path).to_pylist()
            for offset, row in zip(accepted_offsets(path).tolist(), held, strict=True):
                assert (name, offset) not in rows
                rows[name, offset] = row
    return {"rows": rows, "counts": counts, "ends": {name: chain.end for name, chain in folder.chains().items()}}


def flush_online(stream: Stream) -> None:
    text = (stream.repo / "feature_store.yaml").read_text()
    address, database = re.findall(r"(127\.0\.0\.1:\d+),db=(\d+)", text)[0]
    with Redis.from_url(f"redis://{address}/{database}") as client:
        client.flushdb()


def test_a_move_to_another_cluster_with_an_exact_start(stream: Stream, tmp_path: Path) -> None:
    """What is drained is mirrored there too, under other offsets: nothing is lost, nothing is taken twice."""
    emit(stream.environment, count=2000, seed=1)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
        make_anew(stream)
        emit(stream.environment, count=700, seed=1)  # the mirror's copies of what is drained
        exact = stream.ends()
        emit(stream.environment, count=900, seed=2)
        at = ",".join(f"{number}:{offset}" for number, offset in exact.items())
        for wrong, why in (("0:1", "each of the partitions 0, 1, 2, 3 once"), (at.replace(":", ":9", 1), "not 9")):
            refused = run(stream.environment, "start", "--topic", stream.topic, "--new-epoch", "--at", wrong)
            assert refused.returncode == 1
            assert why in refused.stderr
        for _ in range(2):  # may be repeated
            started = run(stream.environment, "start", "--topic", stream.topic, "--new-epoch", "--at", at)
            assert json.loads(started.stdout)["starts"] == {str(number): offset for number, offset in exact.items()}
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    expected = {origin: row for origin, row in truth_of(stream).items() if origin[1] >= exact[origin[0]]}
    assert len(expected) == 900
    assert read_offline(contract_of(stream.repo), stream.topic, epoch=1).rows == expected
    assert len(read_offline(contract_of(stream.repo), stream.topic, epoch=0).rows) == 2000

    # Of the old cluster's offsets the new topic says nothing, even where no file is left that tells whose they were.
    folder = Folder.of(contract_of(stream.repo))
    chains = folder.chains()
    one, old, older = (chains[f"stream-{stream.topic}-{name}"] for name in ("0-1", "1-0", "2-0"))
    Path(str(folder.path_of(one.valid[-1]))).write_bytes(b"garbage")
    flip(Path(str(folder.path_of(old.valid[0]))))
    for name in older.valid:
        Path(str(folder.path_of(name))).write_bytes(b"garbage")
    told = restored(stream, is_ok=False)
    assert told[one.name]["failed"] is None
    assert "is of the topic with id" in told[old.name]["failed"]
    assert "is of an earlier topic" in told[older.name]["failed"]
    assert len(list((folder.path / SET_ASIDE).iterdir())) == 1
    for path in folder.path.glob(f"stream-{stream.topic}-?-0-*"):
        path.unlink()
    assert read_offline(contract_of(stream.repo), stream.topic, epoch=1).rows == expected


def test_a_lost_online_store_is_filled_again_while_the_stream_goes_on(
    make_stream: StreamFactory, valkey_server: Valkey, tmp_path: Path
) -> None:
    """What the worker brings again by itself is turned off here: that is for what was lost within minutes."""
    stream = make_stream(apply_again_seconds=0)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        emit(stream.environment, count=3000, seed=1)
        worker.wait_drained(stream.ends())
        valkey_server.stop()
        valkey_server.start()
        command = [sys.executable, "-m", "luigi", "--module", "batch", "Repair", "--local-scheduler"]
        repairing = subprocess.Popen(command, env=stream.environment, stderr=subprocess.DEVNULL)
        emit(stream.environment, count=2000, seed=2, late_fraction=0.3)
        assert repairing.wait(120) == 0
        worker.wait_drained(stream.ends())
        worker.stop()
    verify(stream.broker, stream.topic, stream.repo)
