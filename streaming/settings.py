"""The settings of the stream, and what follows from them and the registry: topics, views, broker, group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from feast import FeatureStore
from pydantic import Field, SecretStr, field_validator

from headrace.contract import Transform, ViewContract, load_transform
from headrace.errors import ConfigError
from headrace.repository import contracts, open_store
from headrace.settings import load
from streaming.formats import bytes_format, decoder_of
from streaming.schema_registry import SchemaRegistry
from streaming.security import SecuritySettings, is_loopback

MEBIBYTE = 1 << 20
_LONGEST_GROUP = 120


class StreamSettings(SecuritySettings):
    """What the stream needs to know beyond the feature repository. Variables are these names after `HEADRACE_`.

    How to log in to the broker is in `SecuritySettings`.

    Attributes:
        broker: `host:port`, several separated by commas; overrides what the views say.
        broker_timeout_seconds: how long to wait for the broker at start.
        schema_registry_url: where the API of a schema registry begins; with it every Avro record is framed with the id
            of its schema, without it none is.
        schema_registry_username, schema_registry_password: how to log in there.
        schema_registry_ca_file: PEM, who may have signed its certificate; the system's own authorities without it.
        session_seconds: the group's session timeout: how long a dead worker keeps its partitions, and where another
            one joins meanwhile, all workers wait for it.
        append_seconds, append_rows, append_bytes: an append gathers slices until it is so old, or so large.
        slice_records: the most records decoded in one go.
        fetch_bytes: the most bytes fetched of a partition at a time.
        in_flight_bytes: the bound on payload bytes that were fetched and not yet appended; fetching pauses there.
        max_skew_seconds: how far ahead of the clock an event may be dated.
        store_retry_seconds: how long a store or the dead-letter topic may fail before the worker gives up.
        apply_again_seconds: how far back appended rows are written online once more where a store may have forgotten.
        short_log_seconds: how long a log may be shorter than its ledger before its topic is stopped.
        view_gap_offsets: how far behind the others a view of the same topic may be and still be read with them.
        allow_gaps: whether to go on, with the gap recorded, where a topic lost events that were not read yet.
        dead_letter_share: above this share of bad events a view is not ready; 1 means never.
        dead_letter_window_seconds, dead_letter_min_events: the events that are looked at: those of so many seconds, and
            so many at least.
        dead_letter_stop: whether the worker ends then, before the events are written to the dead letters.
        registry_seconds: how often the registry is asked whether a view changed.
        log_format: `text` for people, `json` for one JSON object a line.
        web_host, web_port: where the status page, `/healthz`, `/readyz` and `/metrics` are served.
    """

    broker: str = ""
    broker_timeout_seconds: float = Field(default=10.0, gt=0, le=60)
    schema_registry_url: str = ""
    schema_registry_username: str | None = None
    schema_registry_password: SecretStr | None = None
    schema_registry_ca_file: Path | None = None
    session_seconds: float = Field(default=10.0, ge=1, le=60)
    append_seconds: float = Field(default=5.0, gt=0)
    append_rows: int = Field(default=500_000, gt=0)
    append_bytes: int = Field(default=128 * MEBIBYTE, gt=0)
    slice_records: int = Field(default=20_000, gt=0)
    fetch_bytes: int = Field(default=MEBIBYTE, gt=0)
    in_flight_bytes: int = Field(default=128 * MEBIBYTE, gt=0)
    max_skew_seconds: float = Field(default=300.0, ge=0)
    store_retry_seconds: float = Field(default=120.0, gt=0)
    apply_again_seconds: float = Field(default=600.0, ge=0)
    short_log_seconds: float = Field(default=30.0, ge=0)
    view_gap_offsets: int = Field(default=1_000_000, ge=0)
    allow_gaps: bool = False
    dead_letter_share: float = Field(default=0.5, gt=0, le=1)
    dead_letter_window_seconds: float = Field(default=60.0, gt=0)
    dead_letter_min_events: int = Field(default=100, gt=0)
    dead_letter_stop: bool = False
    registry_seconds: float = Field(default=10.0, gt=0)
    log_format: Literal["text", "json"] = "text"
    web_host: str = "127.0.0.1"
    web_port: int = Field(default=6066, ge=1, le=65_535)

    @field_validator("schema_registry_ca_file")
    @classmethod
    def _has_authorities(cls, file: Path | None) -> Path | None:
        return cls._has_certificates(file)

    @field_validator("schema_registry_url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
            raise ValueError("expected http://host:port or https://host:port, with a path if there is one")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "has a login in it, which logs would show; use HEADRACE_SCHEMA_REGISTRY_USERNAME and "
                "HEADRACE_SCHEMA_REGISTRY_PASSWORD"
            )
        return url


@dataclass(frozen=True)
class View:
    """A view that the stream serves."""

    contract: ViewContract
    transform: Transform | None


@dataclass(frozen=True)
class StreamConfig:
    """Settings and registry together, validated.

    Attributes:
        store: opened once to read the registry; the worker opens its own for writing.
        views: the views of each topic, by topic; both sorted.
        servers: the broker's bootstrap servers, `host:port` each.
        group: the consumer group, from the project and the set of views.
    """

    settings: StreamSettings
    store: FeatureStore
    views: Mapping[str, tuple[View, ...]]
    servers: tuple[str, ...]
    group: str

    @property
    def bootstrap(self) -> str:
        """The servers as Kafka clients want them."""
        return ",".join(self.servers)

    def views_of(self, topic: str) -> tuple[View, ...]:
        """The views of one topic.

        Raises:
            ConfigError: no view names it.
        """
        if topic not in self.views:
            known = ", ".join(f"`{name}`" for name in self.views)
            msg = f"no feature view has the topic `{topic}`; those with a KafkaSource name: {known}"
            raise ConfigError(msg)
        return self.views[topic]


def read_config(settings: StreamSettings | None = None) -> StreamConfig:
    """Read settings, unless they are given, and registry. Needs no broker.

    Raises:
        ConfigError: a setting, the repository or a view is wrong.
    """
    settings = settings or load(StreamSettings)
    store = open_store(settings.feature_repo)
    wanted = contracts(store, settings.view_names)
    without = [contract.name for contract in wanted if contract.topic is None]
    if without and settings.view_names:
        msg = (
            f"feature view {_names(without)} of HEADRACE_VIEWS has no topic; give its source a KafkaSource, "
            "or leave it out"
        )
        raise ConfigError(msg)
    served = [contract for contract in wanted if contract.topic is not None]
    if not served:
        msg = f"no feature view of {settings.feature_repo} has a KafkaSource; the stream has nothing to read"
        raise ConfigError(msg)
    check_formats(served, schema_registry(settings))
    views: dict[str, list[View]] = {}
    for contract in served:
        view = View(contract, load_transform(contract, settings.feature_repo))
        views.setdefault(str(contract.topic), []).append(view)
    return StreamConfig(
        settings=settings,
        store=store,
        views={topic: tuple(views[topic]) for topic in sorted(views)},
        servers=_servers(settings, served),
        group=group_of(store.project, [contract.name for contract in served]),
    )


def schema_registry(settings: StreamSettings) -> SchemaRegistry | None:
    """The schema registry of the settings; None without one. Connects to nothing yet.

    Raises:
        ConfigError: half a login.
    """
    if not settings.schema_registry_url:
        return None
    username, password = settings.schema_registry_username, settings.schema_registry_password
    if (username is None) != (password is None):
        msg = (
            "HEADRACE_SCHEMA_REGISTRY_USERNAME and HEADRACE_SCHEMA_REGISTRY_PASSWORD are set only together; "
            "set both, or neither"
        )
        raise ConfigError(msg)
    return SchemaRegistry(
        settings.schema_registry_url,
        username=username,
        password=password.get_secret_value() if password is not None else None,
        ca_file=settings.schema_registry_ca_file,
        timeout_s=settings.broker_timeout_seconds,
    )


def registry_warnings(settings: StreamSettings) -> list[str]:
    """What an operator should know of a registry's settings that are valid: a password that passes in the clear."""
    url = urlsplit(settings.schema_registry_url)
    if settings.schema_registry_password is None or url.scheme != "http" or is_loopback(url.hostname or ""):
        return []
    return [
        f"HEADRACE_SCHEMA_REGISTRY_URL: the password passes the network to {url.hostname} unencrypted; use https",
    ]


def check_formats(served: list[ViewContract], registry: SchemaRegistry | None) -> None:
    """Every view's format must be served, and be that of the other views of its topic.

    Raises:
        ConfigError: one is not.
    """
    formats: dict[str | None, ViewContract] = {}
    for contract in served:
        decoder_of(contract, registry)
        other = formats.setdefault(contract.topic, contract)
        if bytes_format(other, registry) != bytes_format(contract, registry):
            msg = (
                f"topic `{contract.topic}`: the feature views `{other.name}` and `{contract.name}` read the same "
                "records, but their KafkaSources have different message formats or schemas; declare the same for both"
            )
            raise ConfigError(msg)


def _servers(settings: StreamSettings, served: list[ViewContract]) -> tuple[str, ...]:
    """The bootstrap servers: the setting, or what all views agree on."""
    said = {_split(settings.broker)} if settings.broker else {_split(c.bootstrap_servers or "") for c in served}
    if len(said) > 1:
        each = "; ".join(f"`{c.name}`: {c.bootstrap_servers}" for c in served)
        msg = f"the views name different kafka_bootstrap_servers ({each}); set HEADRACE_BROKER, or serve fewer views"
        raise ConfigError(msg)
    servers = said.pop()
    if not servers:
        msg = "no broker: set HEADRACE_BROKER to host:port, or kafka_bootstrap_servers of the views' KafkaSource"
        raise ConfigError(msg)
    for server in servers:
        host, _, port = server.rpartition(":")
        if "@" in host:
            msg = (
                "broker: expected host:port without a user name; set HEADRACE_SASL_USERNAME and HEADRACE_SASL_PASSWORD"
            )
            raise ConfigError(msg)
        if not host or not port.isdigit() or not 0 < int(port) < 65_536:
            msg = f"broker `{server}`: expected host:port, several separated by commas (HEADRACE_BROKER, or the views)"
            raise ConfigError(msg)
    return servers


def _split(servers: str) -> tuple[str, ...]:
    return tuple(sorted({part.strip() for part in servers.split(",") if part.strip()}))


def group_of(project: str, names: list[str]) -> str:
    """One group for one set of views: workers that serve the same views share their partitions."""
    group = "-".join(["headrace", project, *sorted(names)])
    if len(group) > _LONGEST_GROUP:
        group = f"headrace-{project}-{hashlib.sha256(group.encode()).hexdigest()[:16]}"
    return group


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
