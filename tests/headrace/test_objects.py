"""The offline store in an object store: a real S3 server, and a network in between that counts and loses answers."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace
from headrace import faults, objects
from headrace.chains import Folder, StreamLedger, accepted_offsets, push, replace_day
from headrace.compact import compact
from headrace.contract import TIMESTAMP, ViewContract
from headrace.damage import SET_ASIDE, Examination, set_aside
from headrace.errors import ConfigError, LedgerError, LostRaceError, TransientError
from headrace.objects import Bucket, ObjectPath, ObjectReader
from headrace.place import clear, place_of, readable, stat_now
from headrace.retain import retain
from headrace.scan import Window, rows_within
from headrace.segments import ROWS_A_GROUP, Footer, SegmentName, create, new_append_id, read_footer, remove
from tests.headrace.test_chains import (  # noqa: F401 - collected here too, on the contract below
    DAY,
    offsets,
    some,
    test_a_closed_epoch_is_followed_by_the_next,
    test_an_append_is_the_commit,
    test_an_append_that_would_leave_a_hole_is_refused,
    test_beginning_in_the_middle,
)
from tests.headrace.views import EPOCH_US, config, view
from tests.servers import Fault, FaultyNetwork, ObjectStore

CHAIN = "stream-events-0-0"


@pytest.fixture
def url(object_store: ObjectStore) -> str:
    """A prefix of its own in a bucket."""
    object_store.bucket("views")
    return f"s3://views/{uuid.uuid4().hex}/stats"


@pytest.fixture
def network(object_store: ObjectStore) -> Iterator[FaultyNetwork]:
    with FaultyNetwork(object_store.port) as between:
        yield between


@pytest.fixture
def contract(url: str, network: FaultyNetwork, tmp_path: Path) -> ViewContract:
    """A view in the object store, which is asked through the network."""
    return ViewContract.from_feast(view(path=url, endpoint=network.url)[1], config(tmp_path))


def ids(contract: ViewContract) -> list[int]:
    """All rows that count, by DuckDB."""
    found = rows_within(contract, headrace.files(contract), Window())
    return sorted(found.column("id").to_pylist())


def extended(ledger: StreamLedger, contract: ViewContract, start: int, count: int = 1) -> None:
    """One row an append."""
    for number in range(start, start + count):
        ledger.append(0, number, number + 1, some(contract, number), accepted=offsets(number), topic_id="t")


def test_racing_writers_lose_no_row_and_double_none(contract: ViewContract) -> None:
    def write(base: int) -> None:
        for number in range(5):
            push(contract, some(contract, base + number))

    threads = [threading.Thread(target=write, args=(base,)) for base in range(0, 800, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids(contract) == sorted(base + n for base in range(0, 800, 100) for n in range(5))
    assert Folder.of(contract).chain("push").end == 40


@pytest.mark.parametrize("fault", [Fault.ERROR_AFTER, Fault.CUT_AFTER])
def test_an_append_whose_answer_was_lost_knows_itself_again(
    contract: ViewContract, network: FaultyNetwork, fault: Fault
) -> None:
    """The client asks again by itself, and is told that the name is taken: by what it made."""
    ledger = StreamLedger(contract, "events", 0)
    extended(ledger, contract, 0)
    network.once("PUT", fault)
    extended(ledger, contract, 1)
    network.once("PUT", fault, times=100)  # each try is done or refused, and none answered
    extended(ledger, contract, 2)
    assert network.judge is not None
    network.judge = None
    extended(ledger, contract, 3)
    assert (ledger.end().end, ids(contract)) == (4, [0, 1, 2, 3])


def test_an_answer_that_never_comes_is_not_waited_for_for_ever(
    contract: ViewContract, network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_TIMEOUT", timedelta(seconds=1))
    objects._client.cache_clear()
    ledger = StreamLedger(contract, "events", 0)
    network.once("PUT", Fault.MUTE_AFTER)
    extended(ledger, contract, 0)
    assert (ledger.end().end, ids(contract)) == (1, [0])
    objects._client.cache_clear()


def test_a_store_that_is_down_or_slow_is_a_matter_of_time(
    contract: ViewContract, network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_RETRY_TIMEOUT", timedelta(seconds=1))
    objects._client.cache_clear()
    ledger = StreamLedger(contract, "events", 0)
    network.once("PUT", Fault.SLOW_DOWN, times=2)
    extended(ledger, contract, 0)
    network.once("PUT", Fault.SLOW_DOWN, times=100)
    with pytest.raises(TransientError, match=r"s3://views/.* does not do it: SlowDown"):
        extended(ledger, contract, 1)
    network.judge = lambda *_: Fault.CUT_BEFORE
    with pytest.raises(TransientError, match=f"s3://views/.*: {network.url} does not do it"):
        extended(ledger, contract, 1)
    network.judge = None
    extended(ledger, contract, 1)
    assert ids(contract) == [0, 1]
    objects._client.cache_clear()


def test_a_request_that_was_held_back_makes_nothing_that_counts(contract: ViewContract) -> None:
    """As the network may: the PUT of an append arrives when its file was merged and removed long since."""
    ledger = StreamLedger(contract, "events", 0)
    extended(ledger, contract, 0)
    path = Folder.of(contract).path_of(SegmentName(CHAIN, 0, 0))
    assert isinstance(path, ObjectPath)
    content = objects.read(path, 0, objects.head(path).size)
    extended(ledger, contract, 1, 9)
    compact(contract, grace_s=0)
    assert not path.exists()
    assert objects.create(path, content)
    assert ids(contract) == list(range(10))
    extended(ledger, contract, 10)
    assert (ledger.end().end, ids(contract)) == (11, list(range(11)))


def test_an_append_costs_the_same_whatever_the_history(contract: ViewContract, network: FaultyNetwork) -> None:
    ledger = StreamLedger(contract, "events", 0)
    extended(ledger, contract, 0, 2)
    network.count()
    extended(ledger, contract, 2)
    requests = network.requests
    assert [method for method, _ in requests] == ["PUT", "HEAD", "HEAD"]  # create; the witness; what was created
    network.count()
    fill(contract, 3, 1100)
    extended(StreamLedger(contract, "events", 0), contract, 1100)
    fresh = StreamLedger(contract, "events", 0)
    extended(fresh, contract, 1101)
    network.count()
    extended(fresh, contract, 1102)
    assert network.count() == 3


def fill(contract: ViewContract, start: int, end: int) -> None:
    """As many appends without rows, many at a time."""
    folder, nothing = Folder.of(contract), contract.schema.empty_table()

    def make(number: int) -> None:
        note = Footer(next=number + 1, append=new_append_id())
        assert create(folder.path_of(SegmentName(CHAIN, 0, number)), nothing, note)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(start, end)))


def test_what_was_merged_is_not_listed_again(contract: ViewContract, network: FaultyNetwork) -> None:
    """Who looks for the end of a chain begins behind what is covered."""
    ledger = StreamLedger(contract, "events", 0)
    extended(ledger, contract, 0, 10)
    compact(contract)  # within its grace: all files are there
    network.count()
    assert StreamLedger(contract, "events", 0).end().end == 10
    starts = [path for method, path in network.requests if "list-type=2" in path and f"{CHAIN}-0-" in path]
    assert any(f"{CHAIN}-0-{9:020d}" in path for path in starts)


def test_topics_whose_names_begin_alike_are_kept_apart(contract: ViewContract) -> None:
    """Names of one chain lie among those of another in the order of the store."""
    for topic, partition in (("t", 0), ("t-0", 1), ("t-0-1", 0), ("t", 1)):
        ledger = StreamLedger(contract, topic, partition)
        for number in range(3):
            ledger.append(0, number, number + 1, some(contract, number), accepted=offsets(number), topic_id="a")
        ledger.close("b", 5)
        ledger.append(1, 5, 7, None, accepted=offsets(), rejected=2, topic_id="b")
    for topic, partition in (("t", 0), ("t-0", 1), ("t-0-1", 0), ("t", 1)):
        ledger = StreamLedger(contract, topic, partition)
        assert (ledger.end().epoch, ledger.end().end) == (1, 7)
        assert ledger.epochs() == {"a": 0, "b": 1}


def test_an_epoch_is_found_whichever_others_are_gone(contract: ViewContract) -> None:
    """Whatever was set aside, and whichever topics have names that lie among ours."""
    for topic, partition, epochs in (("t", 0, 3), ("t-0", 2, 1), ("t-0-2", 0, 1)):
        for number in range(epochs):
            StreamLedger(contract, topic, partition).close(f"id {number}", 5)
    remove(*map(Folder.of(contract).path_of, Folder.of(contract).segments("stream-t-0-0")))
    ledger = StreamLedger(contract, "t", 0)
    assert (ledger.end().epoch, ledger.end().end) == (2, 5)
    assert ledger.epochs() == {"id 1": 1, "id 2": 2}


def test_what_is_copied_is_one_object(contract: ViewContract, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the size of one, and bytes of another that came to its name meanwhile."""
    commit(contract, 10)
    place, name = place_of(contract.directory), str(SegmentName(CHAIN, 0, 0))
    path = place.file(name)
    assert isinstance(path, ObjectPath)
    whole = bytes(objects.read(path, 0, objects.head(path).size))
    head = objects.head

    def replaced(asked: ObjectPath) -> objects.Stat:
        found = head(asked)
        if asked == path:
            objects.write(path, whole + b"more")
        return found

    monkeypatch.setattr(objects, "head", replaced)
    with pytest.raises(FileNotFoundError):
        place.lift(name, str(SegmentName(CHAIN, 1, 0)), lambda: None)
    objects.write(path, whole)
    place.set_aside(name, head(path).identity, SET_ASIDE)
    monkeypatch.undo()
    assert stat_now(path) is not None
    assert not list(objects.listing(contract.directory / SET_ASIDE))


def test_files_of_others_are_history_too(contract: ViewContract) -> None:
    push(contract, some(contract, 1))
    sink = pa.BufferOutputStream()
    pq.write_table(some(contract, 2), sink)
    directory = contract.directory
    assert isinstance(directory, ObjectPath)
    for name in ("mine.parquet", "2025/part-0.parquet", "_x/part-0.parquet", ".x.parquet", "README"):
        objects.write(directory / name, memoryview(sink.getvalue()))
    objects.write(directory / "other.parquet", b"no parquet")
    assert ids(contract) == [1, 2, 2]


def commit(contract: ViewContract, until: int) -> StreamLedger:
    """Segments of five records, the last of which is rejected."""
    ledger = StreamLedger(contract, "events", 0)
    for first in range(ledger.end().end, until, 5):
        accepted = np.arange(first, first + 4, dtype=np.int64)
        table = some(contract, *accepted.tolist())
        ledger.append(0, first, first + 5, table, accepted=accepted, rejected=1, topic_id="t")
    return ledger


def accepted_below(end: int) -> list[int]:
    return [number for number in range(end) if number % 5 != 4]


def test_small_files_become_one_and_full_ones_go_up(contract: ViewContract) -> None:
    ledger = commit(contract, 60)
    done = compact(contract, grace_s=0).chains[CHAIN]
    assert (done.files_before, done.files_after, done.files_merged, done.files_deleted) == (12, 2, 11, 11)
    assert (ids(contract), ledger.end().end) == (accepted_below(60), 60)
    merged = Folder.of(contract).path_of(SegmentName(CHAIN, 1, 0))
    footer = read_footer(merged)
    assert (footer.next, footer.rejected, footer.topic_id) == (55, 11, "t")
    assert accepted_offsets(merged).tolist() == accepted_below(55)
    assert pq.read_table(readable(merged)).schema.equals(contract.schema)
    commit(contract, 120)
    done = compact(contract, grace_s=0, level_cap_bytes=10).chains[CHAIN]
    assert (done.files_linked, done.files_merged) == (24, 0)
    assert (ids(contract), ledger.end().end) == (accepted_below(120), 120)
    assert compact(contract, grace_s=0).chains[CHAIN].files_deleted == 0


def test_covered_files_stay_for_the_grace(contract: ViewContract) -> None:
    commit(contract, 60)
    assert compact(contract, grace_s=3600).chains[CHAIN].files_deleted == 0
    assert ids(contract) == accepted_below(60)


def test_what_is_old_goes(contract: ViewContract) -> None:
    ledger = commit(contract, 30)
    replace_day(contract, DAY, some(contract, 1, 2))
    horizon = datetime.fromtimestamp(EPOCH_US // 10**6, UTC) + timedelta(microseconds=15)
    done = retain(contract, horizon)
    assert (done.chains, done.days, done.rows) == ({CHAIN: (0, 15)}, [DAY], 14)
    compact(contract, grace_s=0)
    assert ids(contract) == [number for number in accepted_below(30) if number >= 15]
    assert (ledger.end().end, retain(contract, horizon).rows) == (30, 0)
    late = StreamLedger(contract, "events", 0)
    with pytest.raises(LostRaceError) as lost:
        late.append(0, 5, 6, some(contract, 77), accepted=offsets(5))
    assert lost.value.end == 30


@pytest.mark.parametrize("grace_s", [0.0, 3600.0])
def test_an_appender_that_sleeps_before_its_request_loses(
    contract: ViewContract, monkeypatch: pytest.MonkeyPatch, grace_s: float
) -> None:
    """It saw its last segment as the newest; when it wakes, what others appended behind it may be merged and gone."""
    sleeper = commit(contract, 15)

    def sleep(step: str) -> None:
        if step == "append.1.written":
            monkeypatch.setattr(faults, "hook", None)
            commit(contract, 75)
            compact(contract, grace_s=grace_s)
            commit(contract, 135)
            compact(contract, grace_s=grace_s)

    monkeypatch.setattr(faults, "hook", sleep)
    with pytest.raises(LostRaceError) as lost:
        sleeper.append(0, 15, 20, some(contract, 99), accepted=offsets(15), rejected=4, topic_id="t")
    assert (lost.value.end, ids(contract)) == (135, accepted_below(135))
    sleeper.append(0, 135, 136, some(contract, 135), accepted=offsets(135), topic_id="t")


def test_of_many_who_publish_a_day_at_once_the_last_read_counts(contract: ViewContract) -> None:
    reads = list(range(8))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda us: replace_day(contract, DAY, some(contract, us), read_us=us), reads))
    assert ids(contract) == [7]
    assert len(Folder.of(contract).names()) == 1


def test_a_day_costs_the_same_whatever_the_history(contract: ViewContract, network: FaultyNetwork) -> None:
    """Neither streams nor other days are listed to replace one, or to empty it."""
    fill(contract, 0, 20)
    for number in range(3):
        replace_day(contract, DAY + timedelta(days=number), some(contract, number))
    network.count()
    replace_day(contract, DAY, some(contract, 1, 3))
    retain(contract, datetime(2024, 1, 1, tzinfo=UTC))
    starts = [path for method, path in network.requests if "list-type=2" in path and "start-after" not in path]
    assert len(starts) <= 3  # what retention itself looks at: chains, days


def test_days_are_replaced_and_read(contract: ViewContract) -> None:
    first = replace_day(contract, DAY, some(contract, 1, 2))
    assert replace_day(contract, DAY, some(contract, 1, 2)) == first
    second = replace_day(contract, DAY, some(contract, 1, 3))
    assert headrace.files(contract) == [second.path]
    assert ids(contract) == [1, 3]
    assert str(second.path).startswith("s3://views/")
    assert pq.read_table(readable(second.path)).schema.equals(contract.schema)


def test_a_damaged_object_is_found_and_set_aside(contract: ViewContract) -> None:
    commit(contract, 15)
    path = Folder.of(contract).path_of(SegmentName(CHAIN, 0, 5))
    assert isinstance(path, ObjectPath)
    whole = bytes(objects.read(path, 0, objects.head(path).size))
    objects.write(path, whole[:-40] + b"x" * 40)
    with pytest.raises(LedgerError, match=f"{path}: expected a segment"):
        headrace.files(contract)
    examine = Examination(contract, CHAIN)
    found = examine()
    assert ([str(name) for name in found.damaged], found.end) == ([path.name], 15)
    set_aside(contract, found.damaged)
    assert list(objects.listing(path.parent / SET_ASIDE)) == [(path.name, ANY)]
    assert [(hole.first, hole.next) for hole in examine().holes] == [(5, 10)]
    note = Footer(next=10, min_us=EPOCH_US + 5, max_us=EPOCH_US + 5, append=new_append_id())
    assert create(path, some(contract, 5), note, offsets(5))
    assert ids(contract) == [0, 1, 2, 3, 5, 10, 11, 12, 13]


def test_the_threads_of_a_query_read_one_file(contract: ViewContract) -> None:
    """Each seeks and then reads, and the other does so in between."""
    count = 2 * ROWS_A_GROUP
    numbers = pa.array(np.random.default_rng(1).permutation(count))
    times = pa.array(EPOCH_US + np.arange(count)).cast(TIMESTAMP)
    values = pa.array(np.random.default_rng(2).random(count))
    table = pa.Table.from_arrays([numbers, values, numbers, times, times], schema=contract.schema)
    path = push(contract, table)
    assert isinstance(path, ObjectPath)
    assert rows_within(contract, [path], Window()).sort_by("at").equals(table)
    whole = bytes(objects.read(path, 0, objects.head(path).size))
    reader = ObjectReader(path)
    with ThreadPoolExecutor(1) as other:
        assert (reader.seek(100), other.submit(reader.seek, 200_000).result()) == (100, 200_000)
        assert (reader.read(9), other.submit(reader.read, 9).result()) == (whole[100:109], whole[200_000:200_009])
        assert (reader.tell(), other.submit(reader.tell).result()) == (109, 200_009)
    assert (reader.seek(-3, os.SEEK_END), reader.read(9)) == (len(whole) - 3, whole[-3:])


def test_paths_are_urls() -> None:
    path = ObjectPath.parse("s3://bucket/a/b/", "http://127.0.0.1:1")
    assert (str(path), str(path / "c.parquet"), path.name) == ("s3://bucket/a/b", "s3://bucket/a/b/c.parquet", "b")
    assert (path / "c").parent == path
    assert ((path / "c").is_relative_to(path), path.is_relative_to(path / "c")) == (True, False)
    assert ObjectPath.parse("gs://bucket").key == ""
    assert (ObjectPath.parse("gs://bucket") / "a").parent == ObjectPath.parse("gs://bucket")
    for wrong in ("hdfs://x/y", "s3:///x", "s3://"):
        with pytest.raises(ConfigError, match="expected the path of a folder or one of s3://bucket/prefix"):
            ObjectPath.parse(wrong)
    for wrong in ("s3://b/a//c", "s3://b/./a", "s3://b/a/../c"):
        with pytest.raises(ConfigError, match="expected the prefix as the store has it"):
            ObjectPath.parse(wrong)


@pytest.mark.parametrize("prefix", ["a b+c", "ü%20%", "x=1/a#b?c", "a*[1]{b}", "漢字'\"&;|<>~"])
def test_names_of_any_letters(contract: ViewContract, prefix: str) -> None:
    """As a URL has them, as a pattern of DuckDB's, or as a partition of Hive's."""
    directory = contract.directory
    assert isinstance(directory, ObjectPath)
    contract = replace(contract, directory=directory.parent / f"{prefix}/stats")
    commit(contract, 60)
    compact(contract, grace_s=0)
    assert (ids(contract), StreamLedger(contract, "events", 0).end().end) == (accepted_below(60), 60)
    clear(contract.directory)
    assert not contract.directory.exists()


def test_without_encryption_only_this_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    far = ObjectPath(Bucket("s3", "views", "http://store.example:9000"), "stats")
    with pytest.raises(ConfigError, match="neither encrypted nor on this machine"):
        objects.check(far)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    assert objects._is_plain(far.bucket)


def test_a_profile_has_the_keys(
    contract: ViewContract, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = object_store.credentials()
    for name in known:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "there")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    objects._client.cache_clear()
    with pytest.raises(ConfigError, match="AWS_PROFILE=there: expected aws_access_key_id"):
        push(contract, some(contract, 1))
    (tmp_path / "config").write_text("[profile there]\nregion = us-east-1\n")
    (tmp_path / "credentials").write_text(
        f"[there]\naws_access_key_id = {known['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {known['AWS_SECRET_ACCESS_KEY']}\n"
    )
    push(contract, some(contract, 1))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", known["AWS_ACCESS_KEY_ID"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    objects._client.cache_clear()
    with pytest.raises(
        TransientError, match="refuses these credentials"
    ):  # as of any tool, the environment comes first
        push(contract, some(contract, 1))
    objects._client.cache_clear()


def test_credentials_that_are_renewed_are_read_again(
    contract: ViewContract, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = object_store.credentials()
    for name in known:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "default")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    (tmp_path / "credentials").write_text(text.format(known["AWS_ACCESS_KEY_ID"], "of yesterday"))
    objects._client.cache_clear()
    with pytest.raises(TransientError, match="refuses these credentials: SignatureDoesNotMatch"):
        push(contract, some(contract, 1))
    (tmp_path / "credentials").write_text(text.format(known["AWS_ACCESS_KEY_ID"], known["AWS_SECRET_ACCESS_KEY"]))
    push(contract, some(contract, 1))
    assert ids(contract) == [1]
    objects._client.cache_clear()


def test_what_is_wrong_is_said_in_one_line(
    contract: ViewContract, network: FaultyNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = ObjectPath(Bucket("s3", "absent", network.url), "stats")
    with pytest.raises(ConfigError, match=f"there is no bucket `absent` at {network.url}; create it") as found:
        objects.check(absent)
    assert "\n" not in str(found.value)
    elsewhere = ViewContract.from_feast(view(path=str(absent), endpoint=network.url)[1], config(tmp_path))
    with pytest.raises(TransientError, match="there is no bucket `absent`"):
        push(elsewhere, some(elsewhere, 1))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-but-not-shown")
    objects._client.cache_clear()
    with pytest.raises(ConfigError, match="refuses these credentials: SignatureDoesNotMatch") as found:
        objects.check(contract.directory)
    assert "wrong-but-not-shown" not in str(found.value)
    assert "\n" not in str(found.value)
    objects._client.cache_clear()
    down = ObjectPath(Bucket("s3", "views", "http://127.0.0.1:9"), "stats")
    monkeypatch.setattr(objects, "_RETRIES", 0)
    with pytest.raises(TransientError, match=r"http://127\.0\.0\.1:9 does not do it: connection refused"):
        objects.check(down)
    for endpoint in ("http://me:hidden@127.0.0.1:9", "http://me:hidden@127.0.0.1:nine", "me:hidden@127.0.0.1:9"):
        with pytest.raises(ConfigError, match="expected an endpoint like https://host:port, found") as said:
            objects.check(ObjectPath(Bucket("s3", "views", endpoint), "stats"))
        assert "hidden" not in str(said.value)
    objects._client.cache_clear()


def test_a_store_that_makes_objects_twice_is_refused(contract: ViewContract, network: FaultyNetwork) -> None:
    """As servers do that know nothing of `If-None-Match`."""
    place_of(contract.directory).prepare()
    place_of(contract.directory).prepare()
    assert headrace.files(contract) == []
    network.once("PUT", Fault.DONE_TWICE, times=2)
    with pytest.raises(ConfigError, match="it makes an object a second time"):
        place_of(contract.directory).prepare()
