"""Dead letters: listed, and tried once more after the rules were mended. Real Kafka and Valkey."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer
from feast.data_format import AvroFormat

from headrace.audit import audit
from headrace.chains import files
from headrace.errors import ConfigError
from headrace.repository import open_store
from headrace.segments import read_accepted, read_footer, read_origins
from streaming import avro as avro_decoding
from streaming import letters as reading
from streaming import replay as replaying
from streaming.letters import Choice, parse_since
from streaming.schema_registry import RegistryError
from tests.servers.schema_registry import SchemaRegistryServer
from tests.streaming.conftest import Stream, StreamFactory, set_format
from tests.streaming.oracle import KEY, Decode, contract_of, judge, read_online, read_topic
from tests.streaming.process import FAUST, Worker, config_of, emit, run
from tests.streaming.test_formats import FIRST, SECOND, avro, plainly

BOUND = 0.7
"""The rule that is too strict at first: `conv_rate` may be no greater."""


def bound(stream: Stream, bound: float) -> None:
    """Change the rule of `conv_rate`, as an edit of the definitions and `feast apply` do."""
    store = open_store(stream.repo)
    view = store.get_feature_view("driver_stats")
    next(field for field in view.schema if field.name == "conv_rate").tags["le"] = str(bound)
    store.apply([view])


def strict_then_mended(stream: Stream, log: Path) -> None:
    """A worker turns away what the strict rule forbids, then the rule is mended; other letters are there too."""
    emit(stream.environment, count=3000, seed=5, bad_fraction=0.1, duplicate_fraction=0.05, late_fraction=0.1, keys=50)
    turn_away(stream, log)


def turn_away(stream: Stream, log: Path) -> None:
    """The same of the events that are there."""
    bound(stream, BOUND)
    with Worker(stream.environment, log) as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        worker.stop()
    bound(stream, 1.0)


def replay(stream: Stream, choice: Choice | None = None, *, dry_run: bool = False) -> dict[str, Any]:
    """What `faust -A streaming replay` does, in this process, which takes no seconds to start; outcomes by view."""
    views: Any = replaying.replay(config_of(stream.environment), choice or Choice(), dry_run=dry_run)["views"]
    return dict(views)


def everything(stream: Stream) -> dict[tuple[int, int], tuple[Any, ...]]:
    """Every row of stream and replay by its origin; fails where one is there twice."""
    contract = contract_of(stream.repo)
    found: dict[tuple[int, int], tuple[Any, ...]] = {}
    for path in files(contract):
        note = read_footer(path)
        if path.name.startswith("replay-"):
            places = [(partition, n) for _, partition, own in read_origins(note) for n in own.tolist()]
        else:
            partition = int(path.name.split("-")[-4])
            places = [(partition, n) for n in read_accepted(path).tolist()]
        columns = [c.cast("int64") if "timestamp" in str(c.type) else c for c in pq.read_table(path).columns]
        for place, row in zip(places, zip(*(c.to_pylist() for c in columns), strict=True), strict=True):
            assert place not in found, f"{place} is there twice"
            found[place] = row
    return found


def assert_as_if_never_strict(stream: Stream, *, decode: Decode = json.loads, max_skew_s: float = 300.0) -> None:
    """Both stores are what they would be had the mended rule held from the start."""
    truth = judge(read_topic(stream.broker, stream.topic), decode=decode, max_skew_s=max_skew_s)
    assert everything(stream) == truth.accepted
    newest = truth.newest()
    assert read_online(stream.repo, sorted(newest)) == {key: row[1:4] for key, row in newest.items()}
    assert audit(open_store(stream.repo), contract_of(stream.repo)).diverged == 0


def test_letters_are_listed_and_replayed_once(stream: Stream, tmp_path: Path) -> None:
    strict_then_mended(stream, tmp_path / "log")
    truth = judge(read_topic(stream.broker, stream.topic))
    before = everything(stream)
    expected = len(truth.accepted) - len(before)
    assert expected > 500

    listed = json.loads(run(stream.environment, "--json", "dead-letters", "--newest", "3").stdout)
    assert listed["letters"] == expected + len(truth.bad)
    strict = [g for g in listed["groups"] if (g["reason"], g["field"]) == ("out_of_range", "conv_rate")]
    assert strict[0]["letters"] >= expected
    assert len(listed["newest"]) == 3
    table = run(stream.environment, "dead-letters", "--reason", "out_of_range", "--since", "1h").stdout
    assert re.search(r"driver_stats\s+.*out_of_range\s+.*conv_rate", table)
    assert "undecodable" not in table

    ends = (stream.ends(), len(read_topic(stream.broker, f"{stream.topic}.dlq")))
    tried = replay(stream, dry_run=True)
    assert everything(stream) == before
    done = run(stream.environment, "replay")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["views"] == tried
    view = tried["driver_stats"]
    assert (view["replayed"], sum(view["rejected"].values())) == (expected, len(truth.bad))
    assert_as_if_never_strict(stream)
    assert ends == (stream.ends(), len(read_topic(stream.broker, f"{stream.topic}.dlq"))), "replay produced something"

    again = replay(stream)["driver_stats"]
    assert (again["replayed"], again["left"]) == (0, {"replayed": expected})
    assert_as_if_never_strict(stream)


LATER_S = 400 * 86_400.0
"""How far ahead an event may be dated once the clock is as good as a year on."""


def with_the_clock_on(stream: Stream) -> Stream:
    """The stream with settings by which what was dated too far ahead is no longer so."""
    return replace(stream, environment={**stream.environment, "HEADRACE_MAX_SKEW_SECONDS": str(LATER_S)})


def test_plain_avro_letters_are_replayed_once(make_stream: StreamFactory, tmp_path: Path) -> None:
    stream = make_stream("sqlite")
    set_format(stream.repo, AvroFormat(json.dumps(SECOND)))

    def decode(value: bytes) -> Any:
        return plainly(value, SECOND)

    strict_then_mended(stream, tmp_path / "log")
    messages, before = read_topic(stream.broker, stream.topic), everything(stream)
    truth = judge(messages, decode=decode, max_skew_s=LATER_S)
    mended, later = len(judge(messages, decode=decode).accepted), len(truth.accepted)
    assert 0 < len(before) < mended < later, "both the rule and the clock have made letters"

    stream, online = with_the_clock_on(stream), read_online(stream.repo, sorted(truth.newest()))
    tried = replay(stream, dry_run=True)
    assert (everything(stream), read_online(stream.repo, sorted(truth.newest()))) == (before, online)
    assert replay(stream) == tried
    assert tried["driver_stats"]["replayed"] == later - len(before)
    again = replay(stream)["driver_stats"]
    assert (again["replayed"], again["left"]) == (0, {"replayed": later - len(before)})
    assert_as_if_never_strict(stream, decode=decode, max_skew_s=LATER_S)


def test_framed_avro_letters_are_replayed_once_whatever_the_registry_does(
    make_stream: StreamFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions, and records of a third that is registered when they are letters; away at first, then half-way."""
    monkeypatch.setattr(avro_decoding, "DOUBT_S", 0.1)  # each replay would doubt the garbage's ids anew
    with SchemaRegistryServer() as registry:
        stream = make_stream(schema_registry_url=registry.url)
        set_format(stream.repo, AvroFormat(json.dumps(SECOND)))
        by_id = {registry.register(text, subject=f"{stream.topic}-value"): text for text in (FIRST, SECOND)}
        first, third = min(by_id), max(by_id) + 1
        by_id[third] = {**SECOND, "fields": SECOND["fields"][::-1]}

        def decode(value: bytes) -> Any:
            number = int.from_bytes(value[1:5], "big")
            if value[:1] != b"\0" or number not in by_id:
                raise ValueError(value)
            return plainly(value[5:], by_id[number])

        emit(stream.environment, count=2000, seed=5, bad_fraction=0.1, keys=50)
        producer = Producer({"bootstrap.servers": stream.broker})
        now = datetime.now(UTC)
        event = {KEY: 1001, "conv_rate": 0.9, "acc_rate": 0.5, "datetime": now, "created": now}
        for trips in range(100):  # with a key: behind others in their partition, as their letters will be
            for number, own in ((first, {"trips": trips}), (third, {"avg_daily_trips": trips, "source": None})):
                value = b"\0" + number.to_bytes(4, "big") + avro({**event, **own}, by_id[number])
                producer.produce(stream.topic, value, b"1001")
        assert producer.flush(10) == 0
        turn_away(stream, tmp_path / "log")

        messages, before = read_topic(stream.broker, stream.topic), everything(stream)
        truth = judge(messages, decode=decode, max_skew_s=LATER_S)
        expected = len(truth.accepted) - len(before)
        assert min(len(before), expected) > 300
        counts = {
            key[1:]: group.count
            for key, group in reading.survey(config_of(stream.environment), Choice()).groups.items()
        }
        assert counts["out_of_range", "conv_rate"] > 200
        assert counts["undecodable", ""] > 100
        assert counts["future_event", "datetime"] > 0
        stream = with_the_clock_on(stream)
        assert registry.register(by_id[third]) == third

        registry.stop()
        done = run(stream.environment, "replay")
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: schema registry {registry.url}/schemas/ids/")
        assert "check that it runs, and HEADRACE_SCHEMA_REGISTRY_URL" in line
        assert everything(stream) == before

        registry.start()
        tried = replay(stream, dry_run=True)
        assert everything(stream) == before
        config = config_of(stream.environment)
        monkeypatch.setattr(reading, "CHUNK_RECORDS", 50)
        with pytest.raises(RegistryError):
            replaying.replay(config, Choice(), progress=lambda *_: registry.stop())
        assert len(before) < len(everything(stream)) < len(truth.accepted)

        registry.start()
        replay(stream)
        view = tried["driver_stats"]
        assert (view["replayed"], sum(view["rejected"].values())) == (expected, len(truth.bad))
        again = replay(stream)["driver_stats"]
        assert (again["replayed"], again["left"]) == (0, {"replayed": expected})
        assert_as_if_never_strict(stream, decode=decode, max_skew_s=LATER_S)


def test_a_filter_takes_its_letters_alone(stream: Stream, tmp_path: Path) -> None:
    strict_then_mended(stream, tmp_path / "log")
    assert replay(stream, Choice(since_ms=parse_since("2099-01-01T00:00:00Z"))) == {}
    assert replay(stream, Choice(view="another")) == {}
    assert replay(stream, Choice(reason="undecodable"))["driver_stats"]["replayed"] == 0
    assert replay(stream, Choice(reason="out_of_range"))["driver_stats"]["replayed"] > 500
    assert_as_if_never_strict(stream)
    with pytest.raises(ConfigError, match="elsewhere"):
        replay(stream, Choice(topic="elsewhere"))


def test_replays_at_once_beside_a_worker_and_killed_ones(stream: Stream, tmp_path: Path) -> None:
    strict_then_mended(stream, tmp_path / "log")
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        emit(stream.environment, count=2000, seed=6, keys=50)
        for delay in (2.5, 3.5):
            pair = [
                subprocess.Popen([*FAUST, "replay"], env=stream.environment, stdout=subprocess.DEVNULL)
                for _ in range(2)
            ]
            time.sleep(delay)
            os.kill(pair[0].pid, signal.SIGKILL)
            assert pair[0].wait() in (0, -signal.SIGKILL)
            assert pair[1].wait(60) == 0
        worker.wait_drained(stream.ends())
        worker.stop()
    replay(stream)
    assert_as_if_never_strict(stream)


def test_what_a_killed_replay_appended_is_brought_online(stream: Stream, tmp_path: Path) -> None:
    strict_then_mended(stream, tmp_path / "log")
    killed = (
        "import os, signal\n"
        "from headrace import faults\n"
        "from streaming.letters import Choice\n"
        "from streaming.replay import replay\n"
        "from streaming.settings import read_config\n"
        "faults.hook = lambda step: step == 'replay.1.appended' and os.kill(os.getpid(), signal.SIGKILL)\n"
        "replay(read_config(), Choice())\n"
    )
    done = subprocess.run([sys.executable, "-c", killed], env=stream.environment, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert audit(open_store(stream.repo), contract_of(stream.repo)).diverged == 0, "offline alone is pending"
    replay(stream)
    assert_as_if_never_strict(stream)


def test_records_of_others_in_the_topic_are_counted_and_harmless(stream: Stream, tmp_path: Path) -> None:
    strict_then_mended(stream, tmp_path / "log")
    producer = Producer({"bootstrap.servers": stream.broker})
    good = json.dumps({KEY: 1}).encode()
    forged: list[tuple[str, str | bytes | None]] = [("headrace.view", b"driver_stats"), ("headrace.partition", b"x")]
    for headers in ([], forged[:1], forged):
        producer.produce(f"{stream.topic}.dlq", value=good, headers=headers)
    producer.produce(f"{stream.topic}.dlq", value=None)
    assert producer.flush(10) == 0
    listed = json.loads(run(stream.environment, "--json", "dead-letters").stdout)
    assert listed["foreign"] == 4
    replay(stream)
    assert_as_if_never_strict(stream)


def test_without_a_broker_there_is_one_line(stream: Stream) -> None:
    done = run({**stream.environment, "HEADRACE_BROKER": "127.0.0.1:1"}, "replay", "--since", "6h")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "HEADRACE_BROKER" in done.stderr


def test_since_is_a_time_or_a_span() -> None:
    assert parse_since("1970-01-01T00:00:01Z") == parse_since("1970-01-01 00:00:01") == 1000
    assert abs(parse_since("2h") - (time.time() - 7200) * 1000) < 60_000
    for text in ("yesterday", "h", "-5m", "5", ""):
        with pytest.raises(ConfigError, match="expected a time"):
            parse_since(text)
