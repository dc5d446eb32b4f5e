"""A view's message format from its declaration to both stores, and what is refused before anything starts."""

from __future__ import annotations

import base64
import copy
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from fastavro import parse_schema, schemaless_reader, schemaless_writer
from feast import KafkaSource
from feast.data_format import AvroFormat, JsonFormat, ProtoFormat

from headrace.conform import Reason, conform
from headrace.errors import ConfigError
from headrace.repository import open_store
from streaming.emit import Maker, Plan, _encoding
from streaming.formats import decoder_of, patiently
from streaming.schema_registry import RegistryError, SchemaRegistry
from streaming.settings import StreamSettings, registry_warnings, schema_registry
from streaming.worker import check
from tests.conftest import RepositoryFactory
from tests.servers import UnavailableError, environment
from tests.servers.certificates import Authority
from tests.servers.schema_registry import SchemaRegistryServer
from tests.streaming.conftest import StreamFactory, set_format
from tests.streaming.oracle import contract_of, judge, read_topic, verify
from tests.streaming.process import Worker, config_of, emit

BROKER = {"broker": "127.0.0.1:9"}
PASSWORD = "Registry-pass:w0rd/ü"  # noqa: S105 - of a server that lives for a test


def moment(unit: str) -> Any:
    return {"type": "long", "logicalType": f"timestamp-{unit}"}


def schema(*fields: tuple[str, Any] | dict[str, Any]) -> dict[str, Any]:
    named = [field if isinstance(field, dict) else {"name": field[0], "type": field[1]} for field in fields]
    return {"type": "record", "name": "DriverStats", "namespace": "example", "fields": named}


FIRST = schema(
    ("driver_id", "int"),
    ("conv_rate", "float"),
    ("acc_rate", "float"),
    ("trips", "int"),
    ("datetime", moment("millis")),
    {"name": "created", "type": ["null", moment("millis")], "default": None},
)
SECOND = schema(
    ("source", ["null", "string"]),
    ("created", ["null", moment("micros")]),
    ("datetime", moment("micros")),
    ("driver_id", "long"),
    {"name": "avg_daily_trips", "type": ["null", "long"], "aliases": ["trips"]},
    ("acc_rate", ["null", "double"]),
    ("conv_rate", ["null", "double"]),
)


@pytest.fixture
def registry() -> Iterator[SchemaRegistryServer]:
    with SchemaRegistryServer() as server:
        yield server


def avro(value: dict[str, Any], written_by: Any) -> bytes:
    data = BytesIO()
    schemaless_writer(data, parse_schema(written_by), value)
    return data.getvalue()


def plainly(value: bytes, written_by: Any) -> dict[str, Any]:
    """The event in an Avro record, as JSON would have it, by fastavro alone."""
    data = BytesIO(value)
    try:
        event: Any = schemaless_reader(data, parse_schema(written_by), None)
    except (EOFError, IndexError, OverflowError) as error:
        raise ValueError(value) from error
    if data.tell() != len(value):
        raise ValueError(value)
    if "trips" in event:
        event["avg_daily_trips"] = event.pop("trips")
    return {name: part.isoformat() if isinstance(part, datetime) else part for name, part in event.items()}


@pytest.mark.timeout(120)
def test_two_schema_versions_in_one_topic_reach_both_stores(
    make_stream: StreamFactory, registry: SchemaRegistryServer, tmp_path: Path
) -> None:
    """Version 1 of another producer, version 2 of `emit`, tombstones, garbage, and a registry that is away."""
    stream = make_stream(schema_registry_url=registry.url)
    set_format(stream.repo, AvroFormat(json.dumps(SECOND)))
    by_id = {registry.register(text, subject=f"{stream.topic}-value"): text for text in (FIRST, SECOND)}
    first = min(by_id)

    def decode(value: bytes) -> Any:
        number = int.from_bytes(value[1:5], "big")
        if value[:1] != b"\0" or number not in by_id:
            raise ValueError(value)
        return plainly(value[5:], by_id[number])

    producer = Producer({"bootstrap.servers": stream.broker})

    def produce_first(count: int, start: int) -> None:
        for index in range(start, start + count):
            now = datetime.now(UTC)
            event = {"driver_id": 1001 + index % 50, "conv_rate": 0.1, "acc_rate": 0.5, "trips": index, "datetime": now}
            value: bytes | None = b"\0" + first.to_bytes(4, "big") + avro({**event, "created": now}, FIRST)
            if index % 10 == 7:
                value = None
            elif index % 10 == 8:
                value = b"\0\0\0\0" + b"\xff" * 10  # an id that nobody registered
            producer.produce(stream.topic, value, str(index % 50).encode())
        assert producer.flush(10) == 0

    produce_first(300, 0)
    summary = emit(stream.environment, count=700, bad_fraction=0.1, late_fraction=0.1, keys=50)
    assert set(summary["bad"]) == {"cut", "more_bytes", "out_of_range", "future", "unknown_schema"}
    with Worker(stream.environment, tmp_path / "worker.log") as worker:
        worker.start().wait_ready()
        worker.wait_drained(stream.ends())
        third = schema(*((f["name"], f["type"]) for f in reversed(SECOND["fields"])))
        number = registry.register(third)
        by_id[number] = third
        registry.stop()
        now = datetime.now(UTC)
        event = {**dict.fromkeys(("source", "created")), "datetime": now, "driver_id": 1001, "avg_daily_trips": 7}
        value = avro({**event, "acc_rate": 1.0, "conv_rate": 0.0}, third)
        producer.produce(stream.topic, b"\0" + number.to_bytes(4, "big") + value, b"1001")
        assert producer.flush(10) == 0
        worker.wait(lambda: worker.get("/readyz")[0] == 503, 20, "not ready")
        assert "step decode fails: RegistryError: schema registry" in " ".join(worker.state()["faults"])
        registry.start()
        worker.wait_ready()
        produce_first(100, 300)
        worker.wait_drained(stream.ends())
        code, _ = worker.stop()
    assert code == 0
    counts = verify(stream.broker, stream.topic, stream.repo, decode=decode)
    assert counts["messages"] == 300 + summary["sent"] + 1 + 100
    truth = judge(read_topic(stream.broker, stream.topic), decode=decode)
    assert len(truth.skipped) == 40
    assert len(truth.bad) == 40 + sum(summary["bad"].values())
    letters = read_topic(stream.broker, f"{stream.topic}.dlq")
    messages = {letter.headers["headrace.message"].decode() for letter in letters if letter.value[:2] == b"\0\0"}  # type: ignore[index]
    assert "schema id 255 is not known to the schema registry" in messages


def test_a_registry_that_is_away_keeps_a_worker_from_starting(
    make_stream: StreamFactory, registry: SchemaRegistryServer
) -> None:
    stream = make_stream("sqlite", schema_registry_url=registry.url)
    set_format(stream.repo, AvroFormat(""))
    registry.stop()
    with pytest.raises(RegistryError, match=f"^schema registry {registry.url}/schemas/types: ConnectionError"):
        check(config_of(stream.environment), web=False, host="", port=0)


# -- a registry behind TLS, with a login -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Secured:
    """A registry that has a private authority's certificate and wants a login; and what leads nobody there."""

    server: SchemaRegistryServer
    authority: Authority
    stranger: Authority

    def login(self, **changes: object) -> dict[str, object]:
        """The settings that lead there."""
        own = {"url": self.server.url, "username": "me", "password": PASSWORD, "ca_file": self.authority.file}
        return {f"schema_registry_{name}": value for name, value in {**own, **changes}.items() if value is not None}


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    try:
        authority, stranger = Authority(tmp_path / "own"), Authority(tmp_path / "stranger", "stranger")
    except UnavailableError as exc:
        pytest.skip(str(exc))
    with SchemaRegistryServer(authority.sign("registry", hosts=("IP:127.0.0.1",))) as server:
        server.login = f"me:{PASSWORD}"
        yield Secured(server, authority, stranger)


def assert_no_secret(text: str) -> None:
    assert PASSWORD not in text
    assert base64.b64encode(f"me:{PASSWORD}".encode()).decode() not in text


def test_the_whole_stream_with_a_secured_registry(make_stream: StreamFactory, secured: Secured, tmp_path: Path) -> None:
    """Emitter and worker; what the worker prints and serves at debug level tells no secret."""
    stream = make_stream("sqlite", **secured.login())
    set_format(stream.repo, AvroFormat(""))
    number = secured.server.register(SECOND, subject=f"{stream.topic}-value")
    emit(stream.environment, count=300, bad_fraction=0.1, keys=50)
    with Worker(stream.environment, tmp_path / "worker.log") as worker:
        worker.start("debug").wait_ready()
        worker.wait_drained(stream.ends())
        served = [worker.get(page)[1].decode() for page in ("/readyz", "/healthz", "/metrics")]
        arguments = Path(f"/proc/{worker.process.pid}/cmdline").read_text()
        assert worker.stop()[0] == 0

    def decode(value: bytes) -> Any:
        if value[:5] != b"\0" + number.to_bytes(4, "big"):
            raise ValueError(value)
        return plainly(value[5:], SECOND)

    assert verify(stream.broker, stream.topic, stream.repo, decode=decode)["letters"] > 0
    log = worker.log.read_text()
    assert f"/schemas/ids/{number}" in log  # what the HTTP client says at debug level was there to be looked at
    assert_no_secret("\n".join([log, arguments, *served]))


REFUSED = {
    "unknown authority": ("certificate verify failed", "HEADRACE_SCHEMA_REGISTRY_CA_FILE"),
    "another host's certificate": ("IP address mismatch", "names the host"),
    "no authority": ("certificate verify failed", "HEADRACE_SCHEMA_REGISTRY_CA_FILE"),
    "not encrypted": ("ConnectionError", "HEADRACE_SCHEMA_REGISTRY_URL"),
    "wrong password": ("HTTP 401", "HEADRACE_SCHEMA_REGISTRY_PASSWORD"),
    "no login": ("HTTP 401", "HEADRACE_SCHEMA_REGISTRY_USERNAME"),
}
"""What is wrong, and which words tell it."""


@pytest.mark.parametrize("fault", REFUSED)
def test_a_secured_registry_that_is_not_reached_is_told_without_the_secret(
    secured: Secured, fault: str, caplog: pytest.LogCaptureFixture, feature_repo_copy: RepositoryFactory
) -> None:
    other = SchemaRegistryServer(secured.authority.sign("other", hosts=("DNS:other.example",)))
    with other, caplog.at_level(logging.DEBUG):
        changes: dict[str, dict[str, object]] = {
            "unknown authority": {"ca_file": secured.stranger.file},
            "another host's certificate": {"url": other.url},
            "no authority": {"ca_file": None},
            "not encrypted": {"url": secured.server.url.replace("https", "http")},
            "wrong password": {"password": f"{PASSWORD}!"},
            "no login": {"username": None, "password": None},
        }
        wrong = secured.login(**changes[fault])
        config = config_of(environment(feature_repo=feature_repo_copy(), **wrong, **BROKER))
        registry = schema_registry(config.settings)
        assert registry is not None
        with pytest.raises(RegistryError) as caught:
            registry.check()
    why, advice = REFUSED[fault]
    message = str(caught.value)
    assert re.search(why, message), message
    assert advice in message
    assert_no_secret(message + caplog.text + repr(config.settings))


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_other_programs_variables_change_nobody_s_authority(
    secured: Secured, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def registry(authority: Authority) -> SchemaRegistry:
        return SchemaRegistry(secured.server.url, username="me", password=PASSWORD, ca_file=authority.file)

    monkeypatch.setenv(variable, str(secured.stranger.file))
    registry(secured.authority).check()
    monkeypatch.setenv(variable, str(secured.authority.file))
    with pytest.raises(RegistryError, match="certificate verify failed"):
        registry(secured.stranger).check()


def test_the_system_s_own_authorities_are_believed(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(secured.authority.file))  # as OpenSSL lets the system's be chosen
    SchemaRegistry(secured.server.url, username="me", password=PASSWORD).check()


@pytest.mark.parametrize(
    ("url", "password", "words"),
    [
        ("http://registry.example:8081", PASSWORD, ["the password passes the network to registry.example unencrypted"]),
        ("https://registry.example:8081", PASSWORD, []),
        ("http://127.0.0.1:8081", PASSWORD, []),
        ("http://registry.example:8081", None, []),
    ],
)
def test_a_password_that_passes_in_the_clear_is_warned_of(url: str, password: str | None, words: list[str]) -> None:
    chosen = {"schema_registry_url": url, "schema_registry_username": "me", "schema_registry_password": password}
    found = registry_warnings(StreamSettings.model_validate(chosen))
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
    assert_no_secret(repr(found))


# -- emit --------------------------------------------------------------------------------------------------------------

EMITTED = [
    SECOND,
    schema(
        ("driver_id", "long"),
        ("conv_rate", {"type": "bytes", "logicalType": "decimal", "precision": 12, "scale": 6}),
        ("acc_rate", "double"),
        ("avg_daily_trips", "int"),
        ("datetime", "string"),
        ("created", ["null", moment("nanos")]),
        ("kind", {"type": "enum", "name": "Kind", "symbols": ["A", "B"]}),
        ("inner", {**schema(("m", {"type": "map", "values": "int"})), "name": "Inner"}),
        ("many", {"type": "array", "items": {"type": "fixed", "name": "Id", "size": 16}}),
        {"name": "note", "type": "string", "default": "as declared"},
    ),
]


@pytest.mark.parametrize("declared", EMITTED)
@pytest.mark.parametrize("framed", [False, True])
def test_emitted_events_are_what_they_say(
    feature_repo_copy: RepositoryFactory, registry: SchemaRegistryServer, declared: Any, framed: bool
) -> None:
    """The bad ones are bad, the good ones good, in any schema that has what the view needs."""
    repo = feature_repo_copy()
    set_format(repo, AvroFormat("" if framed else json.dumps(declared)))
    registry.register(FIRST, subject="drivers-value")
    registry.register(declared, subject="drivers-value")
    url = {"schema_registry_url": registry.url} if framed else {}
    config = config_of(environment(feature_repo=repo, **url, **BROKER))
    (view,) = config.views["drivers"]
    encoding = _encoding(config, "drivers", (view,))
    made = list(
        Maker([view.contract], Plan(rate=0, count=None, bad_fraction=0.3, seed=3), encoding).make(
            500, datetime.now(UTC)
        )
    )
    decode = patiently(decoder_of(view.contract, schema_registry(config.settings)))
    decoded = decode([event.value for event in made])
    done = conform(view.contract, decoded.table, now_us=time.time_ns() // 1000, max_future_us=300_000_000)
    good = [index for index, event in enumerate(made) if event.fault is None]
    assert decoded.rows[done.rows].tolist() == good
    kinds = {event.fault for event in made} - {None}
    assert kinds == {"cut", "more_bytes", "out_of_range", "future"} | ({"unknown_schema"} if framed else set())
    reasons = {made[reject.row].fault: reject.reason for reject in decoded.rejects}
    assert reasons["cut"] is reasons["more_bytes"] is Reason.UNDECODABLE


def test_emit_registers_nothing(feature_repo_copy: RepositoryFactory, registry: SchemaRegistryServer) -> None:
    repo = feature_repo_copy()
    set_format(repo, AvroFormat(""))
    config = config_of(environment(feature_repo=repo, schema_registry_url=registry.url, **BROKER))
    with pytest.raises(ConfigError, match=r"no schema of the subject `drivers-value`; register one there first"):
        _encoding(config, "drivers", config.views["drivers"])
    registry.register("{}", subject="drivers-value", kind="JSON")
    with pytest.raises(ConfigError, match="the latest schema of `drivers-value` is JSON, the view expects AVRO"):
        _encoding(config, "drivers", config.views["drivers"])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (AvroFormat(""), "the schema_json of its AvroFormat is empty; write the schema there, or set"),
        (AvroFormat("{"), "the schema_json of its AvroFormat: no Avro schema: JSONDecodeError"),
        (AvroFormat(json.dumps(FIRST)), "field `avg_daily_trips` is missing, and the view does not tag it nullable"),
        (ProtoFormat("com.example.DriverStats"), "a ProtoFormat names a Java class, which Python cannot load"),
    ],
)
def test_a_format_that_cannot_be_served_is_refused_by_the_view_s_name(
    feature_repo_copy: RepositoryFactory, declared: Any, words: str
) -> None:
    repo = feature_repo_copy()
    set_format(repo, declared)
    with pytest.raises(ConfigError, match="feature view `driver_stats`: ") as caught:
        config_of(environment(feature_repo=repo, **BROKER))
    assert words in str(caught.value)


def test_the_format_is_as_feast_stored_it(feature_repo_copy: RepositoryFactory) -> None:
    repo = feature_repo_copy()
    set_format(repo, AvroFormat(json.dumps(SECOND)))
    contract = contract_of(repo)
    assert (contract.message_format, json.loads(contract.message_schema or "")) == ("avro", SECOND)


@pytest.mark.parametrize("other", [JsonFormat(""), AvroFormat(json.dumps(FIRST | {"fields": SECOND["fields"][::-1]}))])
def test_views_of_one_topic_read_the_same_bytes(feature_repo_copy: RepositoryFactory, other: Any) -> None:
    repo = feature_repo_copy()
    set_format(repo, AvroFormat(json.dumps(SECOND)))
    store = open_store(repo)
    twin = copy.deepcopy(store.get_feature_view("driver_stats"))
    assert isinstance(twin.stream_source, KafkaSource)
    twin.name = "twin_stats"
    twin.stream_source.name = "twin_events"
    twin.stream_source.kafka_options.message_format = other
    store.apply([twin])
    with pytest.raises(ConfigError, match=r"topic `drivers`: the feature views `driver_stats` and `twin_stats` read"):
        config_of(environment(feature_repo=repo, **BROKER))


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (
            {"url": "registry:8081"},
            "HEADRACE_SCHEMA_REGISTRY_URL (environment): Value error, expected http://host:port",
        ),
        ({"url": "http://me:secret-word@registry"}, "has a login in it"),
        (
            {"url": "https://registry", "ca_file": "/nowhere/ca.pem"},
            "HEADRACE_SCHEMA_REGISTRY_CA_FILE (environment): Value error, /nowhere/ca.pem",
        ),
        ({"url": "http://registry", "username": "me"}, "are set only together"),
        ({"url": "http://registry", "password": "secret-word"}, "are set only together"),
    ],
)
def test_wrong_settings_of_the_registry_are_told_without_the_secret(
    feature_repo_copy: RepositoryFactory, chosen: dict[str, str], words: str
) -> None:
    settings = {f"schema_registry_{name}": value for name, value in chosen.items()}
    with pytest.raises(ConfigError) as caught:
        config_of(environment(feature_repo=feature_repo_copy(), **settings, **BROKER))
    assert words in str(caught.value)
    assert "secret-word" not in str(caught.value)
