"""Logging in to the broker: every protocol and mechanism, on a real Kafka that lets nobody in without."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaConnectionError
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth
from redis import Redis

from headrace.errors import ConfigError
from headrace.settings import load
from streaming.broker import Broker, BrokerError
from streaming.security import faust_credentials, keep_logins_out_of_logs, token_source, warnings
from streaming.settings import StreamConfig, StreamSettings, read_config
from streaming.tokens import TokenError, TokenSource
from tests.conftest import RepositoryFactory
from tests.headrace.test_online_secured import RIGHTS
from tests.servers import Kafka, UnavailableError, Valkey, environment, free_port, use_valkey
from tests.servers.certificates import Authority, Certificate
from tests.servers.secured import secured_kafka
from tests.servers.tls import TlsFront
from tests.servers.tokens import TokenServer
from tests.streaming.conftest import QUICK, Stream, read_from
from tests.streaming.oracle import verify
from tests.streaming.process import FAUST, Worker, config_of, emit

CAMPAIGN = ["OAUTHBEARER", "SCRAM-SHA-256"] if os.environ.get("HEADRACE_TEST_LOGINS") == "all" else []
PASSWORD, SECRET, KEY_PASSWORD = "Pass-w0rd/of;test:1", "Secret+of%test:1", "Key-passw0rd"
GROUP = "headrace-headrace_demo-driver_stats"


@dataclass(frozen=True)
class Secured:
    """A broker with every way to log in, and what a client needs for each."""

    kafka: Kafka
    authority: Authority
    stranger: Authority
    clients: Mapping[str, Certificate]
    stranger_client: Certificate
    tokens: TokenServer

    def login(self, way: str, user: str = "worker") -> dict[str, object]:
        """The settings of a way to log in: `mTLS`, or the name of a mechanism."""
        tls = {"tls_ca_file": self.authority.file}
        if way == "mTLS":
            own = {"tls_certificate_file": self.clients[user].file, "tls_key_file": self.clients[user].key}
            return {
                "broker": self.kafka.address_of("MTLS"),
                "security_protocol": "SSL",
                "tls_key_password": KEY_PASSWORD,
                **own,
                **tls,
            }
        sasl = {
            "broker": self.kafka.address_of("SASL_TLS"),
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": way,
            **tls,
        }
        if way == "OAUTHBEARER":
            return {
                **sasl,
                "oauth_token_url": self.tokens.url,
                "oauth_client_id": user,
                "oauth_client_secret": SECRET,
                "oauth_scope": "kafka",
                "oauth_ca_file": self.authority.file,
            }
        return {**sasl, "sasl_username": user, "sasl_password": PASSWORD}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    try:
        authority, stranger = Authority(folder / "own"), Authority(folder / "stranger", "stranger")
        clients = {user: authority.sign(user, password=KEY_PASSWORD) for user in ("worker", "emitter")}
        other = authority.sign("other", hosts=("DNS:other.example",))
        served = authority.sign("login", hosts=("IP:127.0.0.1",))
        with (
            TokenServer(folder / "tokens", served, dict.fromkeys(clients, SECRET)) as tokens,
            secured_kafka(authority, tokens, dict.fromkeys(clients, PASSWORD), other=other) as kafka,
        ):
            yield Secured(kafka, authority, stranger, clients, stranger.sign("client"), tokens)
    except UnavailableError as exc:
        pytest.skip(str(exc))


def allow(kafka: Kafka, topic: str) -> None:
    """Give the rights of `docs/how-to/security.md`: a worker's to one user, an emitter's to another."""
    rights = [
        AclBinding(kind, name, ResourcePatternType.LITERAL, f"User:{user}", "*", operation, AclPermissionType.ALLOW)
        for prefix in ("", "CN=")  # as SASL and as certificates name them
        for user, kind, name, operation in (
            (f"{prefix}worker", ResourceType.TOPIC, topic, AclOperation.READ),
            (f"{prefix}worker", ResourceType.TOPIC, f"{topic}.dlq", AclOperation.WRITE),
            (f"{prefix}worker", ResourceType.GROUP, GROUP, AclOperation.READ),
            (f"{prefix}emitter", ResourceType.TOPIC, topic, AclOperation.WRITE),
        )
    ]
    admin = AdminClient({"bootstrap.servers": kafka.address})
    for future in admin.create_acls(rights).values():
        future.result(20)


LoginFactory = Callable[..., Stream]


@pytest.fixture
def log_in(
    secured: Secured, feature_repo_copy: RepositoryFactory, worker_environment: Callable[..., dict[str, str]]
) -> LoginFactory:
    """A function that makes a stream whose worker logs in by some way, with further settings."""

    def make(way: str, /, **settings: object) -> Stream:
        topic = f"drivers-{way}-{time.monotonic_ns()}"
        repo = feature_repo_copy()
        secured.kafka.create_topic(topic)
        secured.kafka.create_topic(f"{topic}.dlq")
        allow(secured.kafka, topic)
        read_from(repo, secured.kafka.address, topic)
        chosen = worker_environment(**{"feature_repo": repo, **QUICK, **secured.login(way), **settings})
        return Stream(secured.kafka.address, topic, repo, chosen)

    return make


def assert_no_secret(text: str) -> None:
    for secret in (PASSWORD, SECRET, KEY_PASSWORD, "auth=Bearer", "eyJ"):
        assert secret not in text


@pytest.mark.parametrize("way", ["SCRAM-SHA-512", "mTLS", "PLAIN", *CAMPAIGN])
def test_the_whole_stream(
    way: str, secured: Secured, log_in: LoginFactory, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Emitter, worker, dead letters; what they print and serve at debug level tells no secret."""
    stream = log_in(way)
    emitter = environment(feature_repo=stream.repo, **secured.login(way, "emitter"))
    if way == "OAUTHBEARER":
        request.addfinalizer(lambda: setattr(secured.tokens, "life_s", 3600))
        secured.tokens.life_s = 10  # then the broker closes the connection, and each client comes back with a new one
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start("debug").wait_ready()
        for seed in range(4 if way == "OAUTHBEARER" else 1):
            time.sleep(8 if seed else 0)
            emit(emitter, count=500, seed=seed, bad_fraction=0.1)
        worker.wait_drained(stream.ends())
        served = [worker.get(page)[1].decode() for page in ("/readyz", "/healthz", "/metrics")]
        arguments = Path(f"/proc/{worker.process.pid}/cmdline").read_text()
        assert worker.stop()[0] == 0
    assert verify(stream.broker, stream.topic, stream.repo)["letters"] > 0
    log = worker.log.read_text()
    assert "Request to" in log  # what aiokafka says at debug level was there to be looked at
    assert_no_secret("\n".join([log, arguments, *served]))


VERIFIED = "headrace_verify_"
"""How everything begins that a verification makes."""


def allow_verification(kafka: Kafka, valkey: Any) -> None:
    """Give the rights that a verification needs by `docs/how-to/security.md`, and to Redis no others."""
    operations = AclOperation
    rights = [
        AclBinding(kind, name, ResourcePatternType.PREFIXED, "User:worker", "*", operation, AclPermissionType.ALLOW)
        for kind, name, granted in (
            (
                ResourceType.TOPIC,
                VERIFIED,
                (operations.CREATE, operations.DELETE, operations.READ, operations.WRITE),
            ),
            (ResourceType.GROUP, f"headrace-{VERIFIED}", (operations.READ, operations.DELETE)),
        )
        for operation in granted
    ]
    client = AdminClient({"bootstrap.servers": kafka.address})
    for future in client.create_acls(rights).values():
        future.result(20)
    words = ["on", "resetchannels", "resetkeys", f"~*{VERIFIED}*", f">{PASSWORD}", *RIGHTS.split()]
    valkey.execute_command("ACL SETUSER", "headrace", *words)


@pytest.mark.slow
def test_a_verification_on_secured_servers(secured: Secured, log_in: LoginFactory, tmp_path: Path) -> None:
    """It passes with the least rights, and no secret is in what it prints, writes and gives its workers to run."""
    stream = log_in("SCRAM-SHA-512")
    served = secured.authority.sign("valkey", hosts=("DNS:localhost",))
    with Valkey() as server, TlsFront(server.port, served) as front:
        admin: Any = Redis(port=server.port)
        allow_verification(secured.kafka, admin)
        use_valkey(stream.repo, "ADDRESS")
        login = f'ssl=true,ssl_ca_certs={secured.authority.file},username=headrace,password="${{VALKEY_PASSWORD}}"'
        file = stream.repo / "feature_store.yaml"
        file.write_text(file.read_text().replace('"ADDRESS,db=0"', f"'localhost:{front.port},{login}'"))
        folder = tmp_path / "temporary"
        folder.mkdir()
        with (tmp_path / "stdout").open("wb") as stdout, (tmp_path / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                # With this seed the first intervention is a kill after two seconds, and the only one.
                [*FAUST, "verify", "--minutes", "0.1", "--rate", "200", "--kill", "--workers", "1", "--seed", "900"],
                env={**stream.environment, "VALKEY_PASSWORD": PASSWORD, "TMPDIR": str(folder)},
                stdout=stdout,
                stderr=stderr,
            )
            try:
                seen = watch(process, [folder, stream.repo.parent / "data"], timeout_s=150)
            finally:
                process.terminate()  # it ends its workers then
                process.wait()
        output, said = (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text()
        assert process.returncode == 0, said
        assert admin.dbsize() == 0
        assert admin.execute_command("ACL LOG") == []
    result = json.loads(output)
    assert result["ok"] is True
    assert min(result[name] for name in ("accepted", "rejected", "letters", "keys", "kills")) > 0
    kafka = AdminClient({"bootstrap.servers": secured.kafka.address})
    groups = [group.group_id for group in kafka.list_consumer_groups().result().valid]
    assert not [name for name in [*kafka.list_topics(timeout=10).topics, *groups] if VERIFIED in name]
    assert {path.name for path in seen} >= {"feature_store.yaml", "registry.db", "worker-1.log", "cmdline"}
    assert not [path for path in seen if path.exists()]
    assert_no_secret("\n".join([output, said, *seen.values()]))


def watch(process: subprocess.Popen[bytes], folders: Sequence[Path], *, timeout_s: float) -> dict[Path, str]:
    """What a verification writes in some folders, and how its workers are called, until it ends: as last seen."""
    seen: dict[Path, str] = {}
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        assert time.monotonic() < deadline
        files = [path for folder in folders for path in folder.rglob("*") if VERIFIED in str(path)]
        for path in [*files, *Path("/proc").glob("[0-9]*/cmdline")]:
            with contextlib.suppress(OSError):  # a folder, or gone by now
                text = path.read_text(errors="replace")
                if path.name != "cmdline" or str(folders[0]) in text:
                    seen[path] = text
        time.sleep(0.2)
    return seen


@pytest.mark.parametrize("way", ["SCRAM-SHA-256", "OAUTHBEARER", "PLAIN"])
def test_both_clients_log_in_and_tell_no_secret(
    way: str, secured: Secured, log_in: LoginFactory, caplog: pytest.LogCaptureFixture
) -> None:
    stream = log_in(way)
    config = config_of(stream.environment)
    keep_logins_out_of_logs()
    with caplog.at_level(logging.DEBUG):
        assert stream.topic in Broker(config).partitions()
        assert stream.topic in asyncio.run(topics_by_aiokafka(config))
    assert "SaslHandShakeRequest" in caplog.text
    assert_no_secret(caplog.text + repr(config.settings) + repr(faust_credentials(config.settings, 1)))
    if way == "OAUTHBEARER":
        assert secured.tokens.forms[-1] == {"grant_type": ["client_credentials"], "scope": ["kafka"]}


async def topics_by_aiokafka(config: StreamConfig) -> set[str]:
    """The topics that the worker's consumer sees."""
    credentials = faust_credentials(config.settings, config.settings.broker_timeout_seconds)
    options = credentials_to_aiokafka_auth(credentials)
    consumer = AIOKafkaConsumer(bootstrap_servers=list(config.servers), **options)
    try:
        await consumer.start()
        return set(await consumer.topics())
    finally:
        await consumer.stop()


REFUSED = {
    "PLAIN, wrong password": ("SASL authentication error", "HEADRACE_SASL_MECHANISM"),
    "SCRAM-SHA-512, wrong password": ("SASL authentication error", "HEADRACE_SASL_MECHANISM"),
    "SCRAM-SHA-512, unknown authority": ("certificate verify failed", "HEADRACE_TLS_CA_FILE"),
    "SCRAM-SHA-512, another host's certificate": ("certificate verify failed", "names the host"),
    "SCRAM-SHA-512, not encrypted": ("answer within", "HEADRACE_SECURITY_PROTOCOL"),
    "mTLS, no certificate": ("alert", "HEADRACE_SECURITY_PROTOCOL"),
    "mTLS, a stranger's certificate": ("alert", "HEADRACE_SECURITY_PROTOCOL"),
    "OAUTHBEARER, wrong secret": (r"answered 401 \(invalid_client\)", "HEADRACE_OAUTH_CLIENT_SECRET"),
    "OAUTHBEARER, unknown authority": ("certificate verify failed", "HEADRACE_OAUTH_CA_FILE"),
}
"""What is wrong, and which words tell it."""


def wrong_settings(secured: Secured, fault: str) -> dict[str, object]:
    """The settings of a way to log in, with something wrong."""
    way, _, what = fault.partition(", ")
    settings = secured.login(way)
    stranger = secured.stranger_client
    changes: Mapping[str, Mapping[str, object]] = {
        "wrong password": {"sasl_password": f"{PASSWORD}!"},
        "wrong secret": {"oauth_client_secret": f"{SECRET}!"},
        "unknown authority": {"oauth_ca_file" if "oauth_ca_file" in settings else "tls_ca_file": secured.stranger.file},
        "another host's certificate": {"broker": secured.kafka.address_of("SASL_OTHER")},
        "not encrypted": {"security_protocol": "SASL_PLAINTEXT", "tls_ca_file": None},
        "no certificate": {"tls_certificate_file": None, "tls_key_file": None, "tls_key_password": None},
        "a stranger's certificate": {
            "tls_certificate_file": stranger.file,
            "tls_key_file": stranger.key,
            "tls_key_password": None,
        },
    }
    return {name: value for name, value in {**settings, **changes[what]}.items() if value is not None}


def test_neither_client_is_let_in_wrongly(secured: Secured, log_in: LoginFactory) -> None:
    base = config_of(log_in("PLAIN").environment)

    def refusals(fault: str) -> tuple[str, str]:
        chosen = {**wrong_settings(secured, fault), "broker_timeout_seconds": 4}
        settings = StreamSettings.model_validate(chosen)
        config = replace(base, settings=settings, servers=(settings.broker,))
        with pytest.raises((BrokerError, TokenError)) as by_librdkafka:
            Broker(config).partitions()
        with pytest.raises(KafkaConnectionError) as by_aiokafka:
            asyncio.run(topics_by_aiokafka(config))
        return str(by_librdkafka.value), str(by_aiokafka.value)

    with ThreadPoolExecutor(len(REFUSED)) as pool:  # each is tried until its time is over
        found = dict(zip(REFUSED, pool.map(refusals, REFUSED), strict=True))
    for fault, (why, advice) in REFUSED.items():
        message, other = found[fault]
        assert re.search(why, message), (fault, message)
        assert advice in message, (fault, message)
        assert_no_secret(message + other)


def test_a_worker_that_is_not_let_in_ends_with_one_line(secured: Secured, log_in: LoginFactory) -> None:
    faults = ("SCRAM-SHA-512, wrong password", "SCRAM-SHA-512, unknown authority")
    repo = log_in("PLAIN").environment["HEADRACE_FEATURE_REPO"]
    started = [
        subprocess.Popen(
            [*FAUST, "worker", "-l", "info"],
            env=environment(
                **wrong_settings(secured, fault), feature_repo=repo, broker_timeout_seconds=2, web_port=free_port()
            ),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # Faust's banner
            text=True,
        )
        for fault in faults
    ]
    said = [process.communicate(timeout=150)[1] for process in started]
    for process, fault, text in zip(started, faults, said, strict=True):
        assert process.returncode == 1
        (line,) = text.splitlines()
        assert re.search(REFUSED[fault][0], line)
        assert REFUSED[fault][1] in line
        assert_no_secret(line)


def test_tokens_are_fetched_once_and_renewed_before_they_end(secured: Secured) -> None:
    tokens, source = secured.tokens, source_of(secured)
    given = tokens.given
    tokens.life_s = 30
    try:
        first = asyncio.run(source.token())
        assert asyncio.run(source.token()) == first
        assert tokens.given == given + 1
        tokens.life_s = 0
        source._held = (first, 0.0, source._held[2])  # as after 24 of its 30 seconds
        tokens.answer = (503, b"")
        assert asyncio.run(source.token()) == first  # it is still good
        tokens.answer = None
        assert asyncio.run(source.token()) != first
        assert tokens.given == given + 2
        asyncio.run(source.token())
        assert tokens.given == given + 3  # one that ends at once is not held
    finally:
        tokens.life_s, tokens.answer = 3600, None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, b'{"error": "invalid_client"}'), r"answered 401 \(invalid_client\)"),
        ((500, f"<html>{SECRET}".encode()), "answered 500;"),
        ((200, b'{"token": 1}'), "without an `access_token`"),
        ((200, b'{"access_token": "a\\u0001b"}'), "without an `access_token`"),
        ((302, b""), "answered 302"),
    ],
)
def test_an_endpoint_without_tokens_is_named(secured: Secured, answer: tuple[int, bytes], words: str) -> None:
    secured.tokens.answer = answer
    try:
        with pytest.raises(TokenError, match=words) as caught:
            source_of(secured).fetch()
    finally:
        secured.tokens.answer = None
    assert_no_secret(str(caught.value))


def test_an_endpoint_that_hangs_is_not_waited_for(secured: Secured) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/token?key={SECRET}"
        with pytest.raises(TokenError, match=r"did not answer within 0\.3 s") as caught:
            token_source(settings_of(secured, "OAUTHBEARER", oauth_token_url=url), 0.3).fetch()
    assert_no_secret(str(caught.value))


def settings_of(secured: Secured, way: str, **changes: object) -> StreamSettings:
    return StreamSettings.model_validate({**secured.login(way), **changes})


def source_of(secured: Secured) -> TokenSource:
    return token_source(settings_of(secured, "OAUTHBEARER"), 5)


def test_every_fault_of_the_settings_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("HEADRACE_TLS_CERTIFICATE_FILE=gone.pem\nHEADRACE_SASL_MECHANISM=PLAIN\n")
    chosen = {
        "SECURITY_PROTOCOL": "SASL_SSL",
        "TLS_CA_FILE": "ca.pem",
        "TLS_KEY_PASSWORD": KEY_PASSWORD,
        "SASL_PASSWORD": PASSWORD,
        "OAUTH_CLIENT_SECRET": SECRET,
        "WEB_PORT": "many",
    }
    for name, value in chosen.items():
        monkeypatch.setenv(f"HEADRACE_{name}", value)
    with pytest.raises(ConfigError) as caught:
        load(StreamSettings)
    message = str(caught.value)
    for words in (
        "HEADRACE_SASL_USERNAME (not set): Value error, is not set, and HEADRACE_SECURITY_PROTOCOL=SASL_SSL with",
        "HEADRACE_TLS_CA_FILE (environment): Value error, ca.pem holds no certificate in PEM form",
        "HEADRACE_TLS_CERTIFICATE_FILE (.env): Value error, gone.pem cannot be read: No such file",
        "HEADRACE_TLS_KEY_PASSWORD (environment): Value error, is set, but HEADRACE_TLS_KEY_FILE is not",
        "HEADRACE_OAUTH_CLIENT_SECRET (environment): Value error, is set, but HEADRACE_SECURITY_PROTOCOL=SASL_SSL with",
        "HEADRACE_WEB_PORT (environment)",
    ):
        assert words in message
    assert message.count("HEADRACE_SASL_PASSWORD") == 0
    assert_no_secret(message)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"sasl_password": PASSWORD}, r"SASL_PASSWORD.*PROTOCOL=PLAINTEXT does not use it"),
        ({"security_protocol": "SASL_SSL"}, r"SASL_USERNAME.*needs it.*SASL_PASSWORD.*needs it"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}, r"OAUTH_TOKEN_URL.*needs it"),
        ({"security_protocol": "SSL", "tls_certificate_file": "{own}"}, r"TLS_KEY_FILE.*is not set.*set both"),
        ({"security_protocol": "SSL", "tls_key_file": "{own}"}, r"TLS_KEY_FILE.*TLS_CERTIFICATE_FILE is not; set both"),
        (
            {"security_protocol": "SSL", "tls_certificate_file": "{own}", "tls_key_file": "{key}"},
            r"TLS_KEY_PASSWORD.*cannot be loaded",
        ),
        (
            {
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "OAUTHBEARER",
                "oauth_token_url": f"https://me:{SECRET}@example.com/",
                "oauth_client_id": "a",
                "oauth_client_secret": "b",
            },
            r"OAUTH_TOKEN_URL.*without a user name or password",
        ),
        ({"security_protocol": "TLS"}, "SECURITY_PROTOCOL"),
    ],
)
def test_settings_that_do_not_fit_together(
    chosen: Mapping[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Authority(tmp_path).sign("own", password=KEY_PASSWORD)
    for name, value in chosen.items():
        monkeypatch.setenv(f"HEADRACE_{name.upper()}", value.format(own=made.file, key=made.key))
    with pytest.raises(ConfigError, match=words) as caught:
        load(StreamSettings)
    assert_no_secret(str(caught.value))


@pytest.mark.parametrize(
    ("protocol", "mechanism", "server", "words"),
    [
        ("SASL_PLAINTEXT", "PLAIN", "kafka.example:9092", ["the password passes the network to kafka.example:9092"]),
        ("SASL_PLAINTEXT", "SCRAM-SHA-512", "10.0.0.1:9092", ["guessed from"]),
        ("SASL_PLAINTEXT", "PLAIN", "127.0.0.1:9092", []),
        ("SASL_SSL", "PLAIN", "kafka.example:9092", []),
    ],
)
def test_secrets_that_pass_in_the_clear_are_warned_of(
    protocol: str, mechanism: str, server: str, words: list[str]
) -> None:
    chosen = {"sasl_username": "worker", "sasl_password": PASSWORD}
    settings = StreamSettings.model_validate(
        {"security_protocol": protocol, "sasl_mechanism": mechanism, "broker": server, **chosen}
    )
    found = warnings(settings, [server])
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
    assert_no_secret(repr(found))


def test_a_broker_with_a_user_in_it_is_refused(
    feature_repo_copy: RepositoryFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_FEATURE_REPO", str(feature_repo_copy()))
    monkeypatch.setenv("HEADRACE_BROKER", "worker:wordpass@127.0.0.1:9092")
    with pytest.raises(ConfigError, match="without a user name") as caught:
        read_config()
    assert "wordpass" not in str(caught.value)
