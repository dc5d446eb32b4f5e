"""Views that change while workers run: the registry on PostgreSQL, `feast apply` as a person runs it."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer
from feast import Entity, FeatureView, Field, ValueType
from feast.types import Float64, Int32, Int64, String

from headrace.audit import audit
from headrace.chains import Folder, StreamLedger, accepted_offsets
from headrace.errors import TransientError
from headrace.online import online_store
from headrace.repository import contracts, open_store
from headrace.segments import SegmentName, parse_name
from streaming.health import Health
from streaming.intake import StreamIntake
from streaming.renewal import Renewal, declared
from streaming.slices import TopicPartition
from streaming.worker import check
from tests.conftest import EnvironmentFactory, RepositoryFactory, TopicFactory
from tests.servers import Postgres, UnavailableError, feast_apply, free_port
from tests.servers.repository import use_registry
from tests.streaming.conftest import QUICK, Stream, StreamFactory
from tests.streaming.oracle import contract_of, read_topic
from tests.streaming.process import Worker, config_of, emit, run
from tests.streaming.test_intake import Places, lanes_at_work
from tests.streaming.test_views import add_view

pytestmark = pytest.mark.timeout(300)

SERVED_WITHIN_S = 15.0
"""After `feast apply` has ended; the workers look every second or two."""

TAKEN_OVER = "`driver_stats` changed in the registry, and goes on as it is declared now"

TIPS = """        Field(
            name="tips",
            dtype=Float32,
            tags={"nullable": "true"},
        ),
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    try:
        with Postgres() as server:
            yield server
    except UnavailableError as exc:
        pytest.skip(str(exc))


class Drivers:
    """Producers old and new: every other event has `tips`, which the view does not know yet."""

    def __init__(self, broker: str, topic: str) -> None:
        self._producer = Producer({"bootstrap.servers": broker, "acks": "all", "linger.ms": 5})
        self._topic = topic
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self._chance = random.Random(5)
        self._count = 0

    def send(self, driver: int, tips: float | None) -> None:
        self._count += 1
        event = {
            "driver_id": driver,
            "conv_rate": self._count % 1000 / 1024,
            "acc_rate": 0.5,
            "avg_daily_trips": self._count,
            "datetime": datetime.now(UTC).isoformat(),
            "created": None,
        }
        more = {} if tips is None else {"tips": tips}
        self._producer.produce(self._topic, json.dumps(event | more).encode(), str(driver).encode())

    def _send(self) -> None:
        while not self._is_over.wait(0.02):
            for _ in range(4):
                self.send(self._chance.randrange(1, 60), self._count / 4 if self._count % 2 else None)
            self._producer.poll(0)

    def __enter__(self) -> Drivers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._producer.flush(30)


def test_a_changed_view_is_taken_over_in_place(
    postgres: Postgres,
    kafka: str,
    topic: TopicFactory,
    feature_repo_copy: RepositoryFactory,
    worker_environment: EnvironmentFactory,
    tmp_path: Path,
) -> None:
    """Two workers notice at different moments, each is killed then, and PostgreSQL goes away for a while."""
    name = topic("drivers", partitions=4)
    repo = feature_repo_copy("valkey", replace={'topic="drivers"': f'topic="{name}"'}, apply=False)
    use_registry(repo, postgres.url)
    feast_apply(repo)
    settings = {"feature_repo": repo, "broker": kafka, **QUICK}
    stream = Stream(kafka, name, repo, worker_environment(**settings))
    quick = Worker(worker_environment(**settings, registry_seconds=1), tmp_path / "quick")
    slow = Worker(worker_environment(**settings, registry_seconds=5), tmp_path / "slow")
    with quick, slow:
        for worker in (quick, slow):
            worker.start()
        for worker in (quick, slow):
            worker.wait_ready()
        with Drivers(kafka, name) as drivers:
            quick.wait(lambda: min(ends(quick, slow).values(), default=0) > 20, 30, "at work")
            definitions = repo / "definitions.py"
            text = definitions.read_text()
            place = text.index('        Field(\n            name="acc_rate"')
            behind = text.index("        Field(", place + 1)
            definitions.write_text(text[:place] + TIPS + text[behind:])
            feast_apply(repo)
            applied_s = time.monotonic()
            for worker in (quick, slow):  # what the first one had goes to the other, which may not know yet
                worker.wait(lambda worker=worker: TAKEN_OVER in worker.log.read_text(), 2 * SERVED_WITHIN_S, "renewed")  # type: ignore[misc]
                worker.kill()
                worker.start()
            drivers.send(1000, 7.5)
            while served(repo, 1000) != 7.5:
                assert time.monotonic() < applied_s + 3 * SERVED_WITHIN_S, quick.tail() + slow.tail()
                time.sleep(0.1)
                drivers.send(1000, 7.5)
            for worker in (quick, slow):
                worker.wait_ready()
            postgres.stop()
            quick.wait(lambda: quick.state()["registry"]["error"] is not None, 30, "told of the registry")
            before = ends(quick, slow)
            quick.wait(lambda: all(ends(quick, slow).get(n, 0) > end for n, end in before.items()), 30, "going on")
            assert quick.get("/readyz")[0] == 200
            postgres.start()
            quick.wait(lambda: quick.state()["registry"]["error"] is None, 30, "reading the registry again")
        wanted = stream.ends()
        quick.wait(lambda: ends(quick, slow) == wanted, 60, f"drained to {wanted}")
        for worker in (quick, slow):
            assert worker.stop()[0] == 0
    assert_is_whole(stream)


def ends(*workers: Worker) -> dict[int, int]:
    partitions = [part for worker in workers for part in worker.state().get("partitions", [])]
    return {part["partition"]: part["ledger_end"] for part in partitions}


def served(repo: Path, driver: int) -> float | None:
    answer = open_store(repo).get_online_features(["driver_stats:tips"], [{"driver_id": driver}])
    found: float | None = answer.to_dict()["tips"][0]
    return found


def assert_is_whole(stream: Stream) -> None:
    """Each event once, in files of either schema, with what the view had then; online the newest of them."""
    contract = contract_of(stream.repo)
    sent = {(m.partition, m.offset): json.loads(m.value or b"") for m in read_topic(stream.broker, stream.topic)}
    seen: Counter[tuple[int, int]] = Counter()
    schemas: dict[str, set[bool]] = {}
    for path in Folder.of(contract).files():
        segment = parse_name(path.name)
        assert isinstance(segment, SegmentName)
        partition = int(segment.chain.split("-")[-2])
        table = pq.read_table(path)
        has_tips = "tips" in table.column_names
        assert ("acc_rate" in table.column_names) is not has_tips
        schemas.setdefault(segment.chain, set()).add(has_tips)
        for offset, row in zip(accepted_offsets(path), table.to_pylist(), strict=True):
            seen[partition, int(offset)] += 1
            event = sent[partition, int(offset)]
            assert (row["driver_id"], row["avg_daily_trips"]) == (event["driver_id"], event["avg_daily_trips"])
            assert not has_tips or row["tips"] == event.get("tips")
    assert seen == dict.fromkeys(sent, 1)
    assert {True, False} in schemas.values()
    assert audit(open_store(stream.repo), contract).diverged == 0


def test_a_worker_whose_registry_is_away_says_so_in_one_line(
    feature_repo_copy: RepositoryFactory, worker_environment: EnvironmentFactory
) -> None:
    repo = feature_repo_copy()
    use_registry(repo, f"postgresql+psycopg://feast:not-for-logs@127.0.0.1:{free_port()}/feast")
    done = run(worker_environment(feature_repo=repo), "worker")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert "not-for-logs" not in said
    assert f"error: the registry that {repo}/feature_store.yaml names does not answer: " in said
    assert "Connection refused" in said


# -- what may change, and what may not ---------------------------------------------------------------------------------


def change(repo: Path, view: str = "driver_stats", **kinds: Any) -> None:
    """Apply a view with other fields: a type by name, None removes the field."""
    store = open_store(repo)
    former = store.get_feature_view(view)
    fields = [field for field in (*former.entity_columns, *former.features) if field.name not in kinds]
    former_features = {field.name: field for field in former.features}
    for name, kind in kinds.items():
        tags = former_features[name].tags if name in former_features and kind != String else {"nullable": "true"}
        fields += [] if kind is None else [Field(name=name, dtype=kind, tags=tags)]
    entities = [store.get_entity(entity) for entity in former.entities]
    store.apply([FeatureView(name=view, entities=entities, ttl=former.ttl, schema=fields, source=former.stream_source)])


def test_views_that_cannot_go_on_are_left_out_and_taken_in_again(make_stream: StreamFactory) -> None:
    stream = make_stream("sqlite")
    add_view(stream, "strict", stream.topic)
    emit(stream.environment, count=200, seed=1)
    config = config_of(stream.environment)
    faults: list[BaseException] = []

    async def scenario() -> None:
        health = Health()
        intake = StreamIntake(config, health, faults.append)
        places = intake.mover = Places()
        renewal = Renewal(config, health, intake)
        everything = {TopicPartition(stream.topic, number) for number in range(4)}

        def left_out() -> str:
            return " ".join(fault.text for fault in [*intake.faults(), *renewal.faults()])

        await intake.assign(1, everything)
        await renewal.look()
        assert (places.moves, left_out()) == ([], "")
        write_history(stream)
        change(stream.repo, avg_daily_trips=String)
        await renewal.look()
        assert "column `avg_daily_trips` is string now, and int32 in the rows that it has" in left_out()
        assert {place for place, _ in places.moves} == everything
        assert "`strict`" not in left_out()
        change(stream.repo, avg_daily_trips=Int64)
        await renewal.look()
        assert left_out() == ""
        assert intake.views["driver_stats"].contract.schema.field("avg_daily_trips").type == "int64"
        store = open_store(stream.repo)
        rider = Entity(name="rider", join_keys=["rider_id"], value_type=ValueType.INT64)
        former = store.get_feature_view("strict")
        fields = [Field(name="rider_id", dtype=Int64), *former.features]
        source = former.stream_source
        store.apply([rider, FeatureView(name="strict", entities=[rider], schema=fields, source=source)])
        await renewal.look()
        assert "its join keys are ['rider_id'] now and were ['driver_id']" in left_out()
        store.delete_feature_view("strict")
        await renewal.look()
        assert "`strict` was deleted from the registry" in left_out()
        add_view(stream, "strict", stream.topic)
        add_view(stream, "another", stream.topic)
        await renewal.look()
        assert left_out() == "feature view `another` is new; start the worker again to serve it"
        change(stream.repo, avg_daily_trips=Int64, tips=Float64)
        places.moves.clear()
        async with intake._ending:  # an assignment comes while the lanes of the one before still end
            coming = asyncio.create_task(intake.assign(2, everything))
            await asyncio.sleep(0)
            looking = asyncio.create_task(renewal.look())
            while len(intake._ending._waiters or ()) < 2:
                await asyncio.sleep(0.01)
        starts, _ = await asyncio.gather(coming, looking)
        assert {*starts, *(place for place, _ in places.moves)} == everything
        assert lanes_at_work() == 3 * 2 * 4
        assert "tips" in intake.views["driver_stats"].contract.features
        await intake.release()
        intake.close()

    asyncio.run(scenario())
    assert faults == []


def write_history(stream: Stream) -> None:
    """One file of each view and partition, as an append leaves it."""
    for contract in contracts(open_store(stream.repo)):
        for partition in range(4):
            ledger = StreamLedger(contract, stream.topic, partition)
            none = np.empty(0, dtype=np.int64)
            ledger.append(0, ledger.end().end, ledger.end().end + 1, None, accepted=none)


def test_a_view_waits_for_its_apply_to_end(make_stream: StreamFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wrote before the online store has emptied a new feature would have the value emptied, too."""
    stream = make_stream("sqlite")
    config = config_of(stream.environment)
    online = online_store(open_store(stream.repo))
    with monkeypatch.context() as patch:
        patch.setattr(type(online), "update", lambda *_, **__: None)  # as if it ended there
        change(stream.repo, tips=Float64)
    with pytest.raises(TransientError, match="the online store has not taken it over yet"):
        check(config_of(stream.environment), web=False, host="", port=0)  # a worker that starts then
    served = {view.contract.name: view for views in config.views.values() for view in views}
    now = declared(config, served)
    assert now.views == served
    assert "the online store has not taken it over yet" in now.waiting[0]
    change(stream.repo, tips=Float64, more=Int32)
    now = declared(config, served)
    assert now.waiting == ()
    assert "tips" in now.views["driver_stats"].contract.features
    moved = {name: replace(view, contract=replace(view.contract, topic="elsewhere")) for name, view in served.items()}
    assert "has another topic" in declared(config, moved).waiting[0]
