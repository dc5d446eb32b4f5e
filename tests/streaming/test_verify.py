"""The command `verify`: it passes on sound stores, finds what was tampered with, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from feast.infra.online_stores.helpers import _redis_key
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from feast.infra.provider import Provider
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import FloatList, Value
from redis import Redis

from headrace.chains import Folder
from headrace.errors import ConfigError
from headrace.repository import open_store
from streaming.broker import Broker
from streaming.settings import StreamConfig
from streaming.verify import Plan, Run, drive, verify
from streaming.verify_place import KEY, PREFIX, VIEW, Place, build, refuse, remove
from streaming.verify_proof import Fault, Proof, prove
from tests.conftest import RepositoryFactory
from tests.streaming.conftest import Stream, StreamFactory
from tests.streaming.process import FAUST, config_of

SHORT = Plan(seconds=2, rate=1000, workers=1, kill=False, seed=11)


@pytest.fixture(autouse=True)
def folder_for_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifications make their homes in the folder for temporary files; other tests' ones run at the same time."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)


def redis_of(config: StreamConfig) -> Redis:
    """A client of the database of a stream's online store."""
    address, database = config.store.config.online_store.connection_string.split(",db=")
    host, port = address.split(":")
    return Redis(host, int(port), int(database))


def remains(config: StreamConfig) -> list[str]:
    """Whatever verifications left: topics, groups, folders, files, keys of Redis."""
    admin = AdminClient({"bootstrap.servers": config.bootstrap})
    names = [*admin.list_topics(timeout=10).topics]
    names += [group.group_id for group in admin.list_consumer_groups().result().valid]
    names += folders(config)
    if "redis" in config.store.config.online_store.type.lower():
        names += [key.decode(errors="replace") for key in redis_of(config).scan_iter()]
    return [name for name in names if PREFIX in name]


def folders(config: StreamConfig) -> list[str]:
    """Folders and files by the names of verifications."""
    places = [Path(tempfile.gettempdir()), Path(config.store.repo_path).parent]
    return [str(path) for folder in places for path in (*folder.glob(f"{PREFIX}*"), *folder.glob(f"data/**/{PREFIX}*"))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_at_once_and_one_of_them_is_disturbed(
    stream: Stream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one Redis, where the user has rows too. Kills keep one from nothing; a stranger's event fails the other.

    The user's rows are untouched, byte for byte, and nothing but the evidence is there afterwards.
    """
    config = config_of(stream.environment)
    client = redis_of(config)
    view = config.views[stream.topic][0].contract.feature_view
    key = EntityKey(join_keys=["driver_id"], entity_values=[Value(int64_val=1001)])
    now = datetime.now(UTC)
    row = (key, {"conv_rate": Value(float_val=0.5)}, now, now)
    Provider.online_write_batch(config.store._get_provider(), config.store.config, view, [row], None)
    stored = {name: client.dump(name) for name in client.scan_iter()}
    assert stored

    command = [*FAUST, "verify", "--minutes", "0.33", "--rate", "300", "--kill", "--seed", "5"]
    log = tmp_path / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=stream.environment, stdout=subprocess.PIPE, stderr=stderr)
        try:
            wait_for(process, log, "starting 2 workers")
            assert_fails_if_somebody_else_writes(config, known_topics(config), capsys)
            output, _ = process.communicate(timeout=480)
        finally:
            process.kill()
            process.wait()

    said = log.read_text()
    assert process.returncode == 0, said
    result = json.loads(output)
    assert result["ok"] is True
    assert result["sent"] == result["accepted"] + result["rejected"] >= 0.33 * 60 * 300
    assert min(result[name] for name in ("accepted", "rejected", "letters", "keys", "kills")) > 0
    assert [result[str(kind)] for kind in Fault] == [0, 0, 0, 0]
    assert result["freshness"]["online"].keys() == result["freshness"]["offline"].keys() == {"p50_s", "p99_s"}
    assert {name: client.dump(name) for name in client.scan_iter()} == stored
    assert remains(config) == []
    names, project = said.partition("starting")[0], result["project"]
    for name in (project, f"{project}.dlq", config.bootstrap, f"headrace-{project}-{VIEW}"):
        assert name in names
    assert "all is right" in said


def known_topics(config: StreamConfig) -> set[str]:
    """The topics that there are."""
    return set(AdminClient({"bootstrap.servers": config.bootstrap}).list_topics(timeout=10).topics)


def wait_for(process: subprocess.Popen[bytes], log: Path, text: str) -> None:
    """Wait until a process says something."""
    deadline = time.monotonic() + 90
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def assert_fails_if_somebody_else_writes(
    config: StreamConfig, known: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Verify while a stranger sends one event to the new topic. The evidence is kept; it is removed here."""

    def disturb() -> None:
        while not (new := [name for name in known_topics(config) - known if not name.endswith(".dlq")]):
            time.sleep(0.2)
        producer = Producer({"bootstrap.servers": config.bootstrap})
        producer.produce(new[0], b"{}", partition=2)
        producer.flush(10)

    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(disturb)
        result = verify(config, SHORT, anywhere=False)
        disturbed.result()
    assert result["ok"] is False
    assert result["lost"] == result["doubled"] == result["older"] == 0
    examples = result["examples"]
    assert isinstance(examples, dict)
    assert "partition 2: its log is" in examples["wrong"][0]
    assert any("nothing that was sent, and a dead letter" in text for text in examples["wrong"])
    said = capsys.readouterr().err
    assert "another one runs or was killed: " in said
    assert "WRONG" in said
    place = Place.of(config, str(result["project"]).removeprefix(PREFIX))
    assert f"{place.offline} (offline folder), {place.logs} (logs)" in said
    assert list(place.offline.glob("*.parquet"))
    assert list(place.logs.glob("worker-*.log"))
    assert json.loads((place.home / "verdict.json").read_text()) == result
    assert result["project"] not in known_topics(config)
    shutil.rmtree(place.offline)
    shutil.rmtree(place.home)


@pytest.fixture
def driven(stream: Stream) -> Iterator[tuple[StreamConfig, Place, StreamConfig, Run]]:
    """A verification just before its proof: the user's configuration, the place, the one there, what was done."""
    config = config_of(stream.environment)
    place = Place.of(config, f"test{time.time_ns():x}")
    try:
        own = build(place, config)
        yield config, place, own, drive(place, own, SHORT)
    finally:
        assert remove(place, config, keep=False) == []


def test_what_was_tampered_with_is_found_and_named(
    driven: tuple[StreamConfig, Place, StreamConfig, Run], tmp_path: Path
) -> None:
    config, place, own, run = driven
    assert prove(own, run.sent).is_right
    assert_keys_are_of(place, config, run.sent.rows[KEY][0].as_py())
    segments = sorted(place.offline.glob("*.parquet"), key=lambda path: path.stat().st_size)
    largest = segments[-1]

    moved = tmp_path / largest.name
    shutil.move(largest, moved)
    assert_found(prove(own, run.sent), Fault.LOST, "in no segment", "no row offline")
    shutil.move(moved, largest)

    again = Folder(place.offline).path_of(_name_after(largest))
    shutil.copy(largest, again)
    assert_found(prove(own, run.sent), Fault.DOUBLED, "several rows offline")
    again.unlink()

    other = largest.with_name("batch-2026-01-01-00000000000000000001.parquet")
    shutil.copy(largest, other)
    assert_found(prove(own, run.sent), Fault.WRONG, other.name)
    other.unlink()

    unsent = replace(run.sent, bad={**run.sent.bad, (0, 10**6): b"{}"})
    assert_found(prove(own, unsent), Fault.LOST, "partition 0, offset 1000000: a bad event, and no dead letter")

    assert prove(own, run.sent).is_right
    key = _bring_back_an_older_value(own, run)
    proof = prove(own, run.sent)
    assert_found(proof, Fault.OLDER, f"key {key} online: the values of an older event")
    assert proof.faults == {**{kind: set() for kind in Fault}, Fault.OLDER: {("key", key)}}


def assert_keys_are_of(place: Place, config: StreamConfig, key: int) -> None:
    """The keys of Redis end in the project: two have none in common, though entity and view be the same."""
    client = redis_of(config)
    entity = EntityKey(join_keys=[KEY], entity_values=[Value(int64_val=key)])
    assert client.exists(_redis_key(place.project, entity, 3)) == 1
    assert client.exists(_redis_key(config.store.project, entity, 3)) == 0
    hashes = [name for name in client.scan_iter() if client.type(name) == b"hash"]
    assert all(name.endswith(place.project.encode()) for name in hashes)


def assert_found(proof: Proof, kind: Fault, *texts: str) -> None:
    """The proof names such a fault, with partition and offset, or key, or file."""
    assert not proof.is_right
    assert proof.faults[kind]
    shown = "\n".join(proof.examples[kind])
    assert any(text in shown for text in texts), shown


def _name_after(path: Path) -> Any:
    """The name that the next append of the chain of a file would have."""
    folder = Folder(path.parent)
    chain = next(chain for chain in folder.chains().values() if any(str(name) == path.name for name in chain.valid))
    return chain.valid[0]._replace(first=chain.end)


def _bring_back_an_older_value(config: StreamConfig, run: Run) -> int:
    """Write an older event of some key by stock Feast, as if it were new."""
    events = run.sent.rows.sort_by("happened").to_pylist()
    key = next(event[KEY] for event in reversed(events) if sum(e[KEY] == event[KEY] for e in events) > 1)
    older, newer = [event for event in events if event[KEY] == key][-2:]
    row = {
        "share": Value(double_val=older["share"]),
        "weight": Value(float_val=older["weight"]),
        "count": Value(int32_val=older["count"]),
        "total": Value(int64_val=older["total"]),
        "state": Value(string_val=older["state"]),
        "label": Value(string_val=older["label"]),
        "flag": Value(bool_val=older["flag"]),
        "readings": Value(float_list_val=FloatList(val=older["readings"])),
    }
    assert older["share"] != newer["share"]
    settings = RedisOnlineStoreConfig(connection_string=config.store.config.online_store.connection_string)
    stock = config.store.config.model_copy()
    stock._online_store = settings  # type: ignore[assignment]
    entity = EntityKey(join_keys=[KEY], entity_values=[Value(int64_val=key)])
    now = datetime.now(UTC)
    view = config.store.get_feature_view(VIEW)
    RedisOnlineStore().online_write_batch(stock, view, [(entity, row, now, now)], None)
    return int(key)


def test_a_signal_leaves_nothing_behind(make_stream: StreamFactory, tmp_path: Path) -> None:
    """On SQLite, in the middle of the work."""
    stream = make_stream("sqlite")
    config = config_of(stream.environment)
    log = tmp_path / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*FAUST, "verify", "--minutes", "5", "--kill"],
            env=stream.environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        try:
            deadline = time.monotonic() + 90
            while len(folders(config)) < 3:  # home, online file, and the workers' offline folder
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert output == b""
    assert remains(config) == []
    project = next(line for line in log.read_text().splitlines() if "project:" in line).rpartition(" ")[2]
    assert subprocess.run(["pgrep", "-f", project], capture_output=True, check=False).stdout == b""


def test_names_that_collide_are_refused(stream: Stream) -> None:
    config = config_of(stream.environment)
    broker = Broker(config)
    place = Place.of(config, f"test{time.time_ns():x}")
    folder = config.views[stream.topic][0].contract.directory
    assert [name for name in refuse(place, config, broker) if name == place.topic] == []
    for collision, text in (
        (replace(place, project=stream.topic), f"topic `{stream.topic}` exists"),
        (replace(place, project=config.store.project), f"project `{config.store.project}` is that of"),
        (replace(place, group=config.group), f"group `{config.group}` exists"),
        (replace(place, home=stream.repo), f"{stream.repo} exists"),
        (replace(place, offline=folder / "own"), "feature view `driver_stats`.* lie in each other"),
        (replace(place, offline=folder), "feature view `driver_stats`.* lie in each other"),
        (replace(place, offline=folder.parent), "lie in each other"),
        (replace(place, online_file=stream.repo / "feature_store.yaml"), "feature_store.yaml exists"),
    ):
        with pytest.raises(ConfigError, match=text):
            refuse(collision, config, broker)
    broker.close()


def test_what_cannot_be_verified_is_refused(
    stream: Stream, feature_repo_copy: RepositoryFactory, mock_broker: str
) -> None:
    config = config_of(stream.environment)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:9092 is not on this machine; add --yes"):
        verify(replace(config, servers=("192.0.2.1:9092",)), SHORT, anywhere=False)
    with pytest.raises(ConfigError, match="embedded one, which can delete no topic"):
        verify(replace(config, servers=(mock_broker,)), SHORT, anywhere=False)
    repo = feature_repo_copy()
    file = repo / "feature_store.yaml"
    file.write_text(file.read_text().replace("headrace.sqlite.HeadraceSqliteOnlineStore", "sqlite"))
    with pytest.raises(ConfigError, match="SqliteOnlineStore does not promise that the newest wins"):
        verify(replace(config, store=open_store(repo)), SHORT, anywhere=False)
    assert remains(config) == []


def test_secrets_are_neither_shown_nor_written(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a variable of `feature_store.yaml` holds stays in the variable."""
    config = config_of(stream.environment)
    file = stream.repo / "feature_store.yaml"
    connection = config.store.config.online_store.connection_string
    monkeypatch.setenv("STORE", f"{connection},username=somebody,password=hush")
    file.write_text(file.read_text().replace(f'"{connection}"', '"${STORE}"  # a comment'))
    own = replace(config, store=open_store(stream.repo))
    place = Place.of(own, f"test{time.time_ns():x}")
    shown = " ".join(place.names(own).values())
    assert connection in shown
    assert "hush" not in shown
    assert "somebody" not in shown
    try:
        with pytest.raises(Exception, match=r"(?i)auth|WRONGPASS|invalid"):  # the server here knows no such user
            build(place, own)
        written = (place.home / "feature_store.yaml").read_text()
        assert "${STORE}" in written
        assert "hush" not in written
        assert (place.home.stat().st_mode & 0o777) == 0o700
        # A secret that is in the user's file itself would be in this one.
        assert ((place.home / "feature_store.yaml").stat().st_mode & 0o777) == 0o600
    finally:
        shutil.rmtree(place.home)
