"""Where a verification takes place: names, a feature repository, topics and folders of its own, made and removed.

Only the servers are the user's: broker, online store, and the disk on which the offline folders are.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, KafkaSource, ValueType
from feast.data_format import JsonFormat, ParquetFormat
from feast.types import Array, Bool, Float32, Float64, Int32, Int64, String

from headrace.contract import directory_of
from headrace.errors import ConfigError, TransientError
from headrace.objects import ObjectPath
from headrace.offline import is_parquet
from headrace.online import online_store
from headrace.place import File, clear, is_within
from headrace.redis import HeadraceRedisOnlineStore
from headrace.repository import open_store
from headrace.sqlite import HeadraceSqliteOnlineStore
from streaming.broker import Broker, BrokerError
from streaming.deadletters import topic_of
from streaming.settings import StreamConfig, group_of, read_config

PREFIX = "headrace_verify_"
VIEW = "verified_events"
KEY = "verified_id"
PARTITIONS = 4

LONGEST_SESSION_S = 6.0
"""Of the workers here, so that dead ones are replaced while we look; as short as a broker allows by default."""

_KEPT = ("provider", "offline_store", "online_store", "batch_engine", "entity_key_serialization_version", "flags")
"""What is taken from the user's `feature_store.yaml`, word by word."""

_TOPIC_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Place:
    """The names of one verification.

    Attributes:
        project: of Feast; the topic and the folders have this name too.
        home: the feature repository with its registry, and the workers' logs; for this user alone.
        offline: the view's folder, beside the folder of the user's first view.
        online: what is said of the online store: no user name, no password.
        online_file: the file of an SQLite store, beside the user's; None for Redis, where the project is in every key.
    """

    project: str
    home: Path
    offline: File
    group: str
    online: str
    online_file: Path | None
    session_s: float

    @classmethod
    def of(cls, config: StreamConfig, ident: str) -> Place:
        """Choose the names.

        Raises:
            ConfigError: the online store is not one of Headrace's.
        """
        project = PREFIX + ident
        online, file = _online(config.store, project)
        first = next(iter(config.views.values()))[0].contract
        return cls(
            project=project,
            home=Path(tempfile.gettempdir()).resolve() / project,
            offline=first.directory.parent / project,
            group=group_of(project, [VIEW]),
            online=online,
            online_file=file,
            session_s=min(LONGEST_SESSION_S, config.settings.session_seconds),
        )

    @property
    def topic(self) -> str:
        """The topic."""
        return self.project

    @property
    def letters(self) -> str:
        """The dead-letter topic."""
        return topic_of(self.topic)

    @property
    def logs(self) -> Path:
        """The folder of the workers' logs."""
        return self.home / "logs"

    def names(self, config: StreamConfig) -> Mapping[str, str]:
        """Everything that will be made, by what it is."""
        return {
            "project": self.project,
            "broker": config.bootstrap,
            "topic": self.topic,
            "dead letters": self.letters,
            "group": self.group,
            "offline folder": str(self.offline),
            "online store": self.online,
            "registry, logs": str(self.home),
        }

    def environment(self, config: StreamConfig, port: int) -> dict[str, str]:
        """The environment of a worker: ours, with the settings that lead it here."""
        own = {
            "FEATURE_REPO": self.home,
            "VIEWS": VIEW,
            "BROKER": config.bootstrap,
            "SESSION_SECONDS": self.session_s,
            "WEB_HOST": "127.0.0.1",
            "WEB_PORT": port,
        }
        return {**os.environ, **{f"HEADRACE_{name}": str(value) for name, value in own.items()}}


def refuse(place: Place, config: StreamConfig, broker: Broker) -> list[str]:
    """Check that nothing of these names exists and that nothing of the user's is near.

    Returns:
        Topics that an earlier verification left behind, or one that runs now.

    Raises:
        ConfigError: something does; nothing was made.
    """
    topics = broker.partitions()
    if broker.is_embedded():
        msg = f"broker {config.bootstrap} is the embedded one, which can delete no topic; verify needs an Apache Kafka"
        raise ConfigError(msg)
    groups = broker.groups()
    of_views = {name for topic in config.views for name in (topic, topic_of(topic))}
    paths: list[File] = [place.home, place.offline, *([] if place.online_file is None else [place.online_file])]
    taken = [f"topic `{name}` exists" for name in (place.topic, place.letters) if name in topics or name in of_views]
    taken += [f"{path} exists" for path in paths if path.exists()]
    if place.group in groups or place.group == config.group:
        taken.append(f"group `{place.group}` exists")
    if place.project == config.store.project:
        taken.append(f"project `{place.project}` is that of {config.store.repo_path}")
    taken += _near(place, config.store)
    if taken:
        msg = f"nothing was started, for verify may touch only what is its own: {'; '.join(taken)}"
        raise ConfigError(msg)
    return sorted(name for name in topics if name.startswith(PREFIX))


def build(place: Place, config: StreamConfig) -> StreamConfig:
    """Make the repository, the registry and the topics.

    Returns:
        Settings and registry as the workers there read them.
    """
    place.home.mkdir(mode=0o700)
    place.logs.mkdir()
    file = place.home / "feature_store.yaml"
    file.touch(mode=0o600)  # it may hold the user's password, as theirs may
    file.write_text(_store_yaml(place, config.store), encoding="utf-8")
    open_store(place.home).apply(_declarations(place, config))
    broker = Broker(config)
    for topic in (place.topic, place.letters):
        broker.create_topic(topic, PARTITIONS)
    deadline = time.monotonic() + _TOPIC_TIMEOUT_S
    while any(broker.partitions().get(topic) != PARTITIONS for topic in (place.topic, place.letters)):
        if time.monotonic() > deadline:
            msg = (
                f"broker {config.bootstrap} does not show topic `{place.topic}` {_TOPIC_TIMEOUT_S:g} s after making it"
            )
            raise TransientError(msg)
        time.sleep(0.1)
    own = {"feature_repo": place.home, "views": VIEW, "broker": config.bootstrap, "session_seconds": place.session_s}
    return read_config(config.settings.model_copy(update=own))


def remove(place: Place, config: StreamConfig, *, keep: bool) -> list[str]:
    """Remove all of it; the workers have ended. What cannot be removed does not keep the rest.

    Args:
        keep: leave the offline folder, and the folder with the logs.

    Returns:
        What is left against our will, and why.
    """
    broker = Broker(config)
    steps: dict[str, Callable[[], None]] = {
        f"topic `{place.topic}`": lambda: broker.delete_topic(place.topic),
        f"topic `{place.letters}`": lambda: broker.delete_topic(place.letters),
        f"group `{place.group}`": lambda: _delete_group(place, broker),
        f"online rows of project `{place.project}` (`feast -c {place.home} teardown`)": lambda: _forget(place),
    }
    left = []
    for what, step in steps.items():
        try:
            step()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other things go
            left.append(f"{what}: {type(error).__name__}: {error}")
    broker.close()
    if not keep:
        clear(place.offline)
        if not left:
            clear(place.home)
        left += [f"folder {path}" for path in (place.offline, place.home) if path.exists()]
    return left


def _online(store: FeatureStore, project: str) -> tuple[str, Path | None]:
    """What is said of the online store, and the file of an SQLite one."""
    target = online_store(store)
    settings = store.config.online_store
    if isinstance(target, HeadraceSqliteOnlineStore):
        file = Path(store.repo_path, settings.path).resolve().with_name(f"{project}.db")
        return f"SQLite, {file}", file
    if isinstance(target, HeadraceRedisOnlineStore):
        shown = [part for part in settings.connection_string.split(",") if "=" not in part or part.startswith("db=")]
        return f"Redis, {','.join(shown)}, keys that end in the project", None
    msg = (
        f"the online store {type(target).__name__} does not promise that the newest wins: there is nothing "
        "to verify; use headrace.redis.HeadraceRedisOnlineStore or headrace.sqlite.HeadraceSqliteOnlineStore"
    )
    raise ConfigError(msg)


def _near(place: Place, store: FeatureStore) -> Iterator[str]:
    """Folders of views that ours lies in, or that lie in ours. Of all views of the registry, served or not."""
    for view in store.list_feature_views():
        source = view.batch_source
        if not is_parquet(source):
            continue
        folder = directory_of(source, store.config)
        if is_within(place.offline, folder) or is_within(folder, place.offline):
            yield f"{place.offline} and the folder of feature view `{view.name}`, {folder}, lie in each other"


def _store_yaml(place: Place, store: FeatureStore) -> str:
    """The user's `feature_store.yaml` with another project and registry.

    Taken over as text, so that `${VARIABLES}` stay such: what they hold is written nowhere.
    """
    text = Path(store.repo_path, "feature_store.yaml").read_text(encoding="utf-8")
    root: Any = yaml.compose(text)
    entries = {key.value: (key, value) for key, value in root.value}
    parts = [
        yaml.safe_dump(
            {
                "project": place.project,
                "registry": {"registry_type": "sql", "path": f"sqlite:///{place.home}/registry.db"},
            }
        )
    ]
    for name in _KEPT:
        if name == "online_store" and place.online_file is not None:
            own = store.config.online_store.model_dump(mode="json", exclude_unset=True)
            parts.append(
                yaml.safe_dump({name: own | {"type": store.config.online_store.type, "path": str(place.online_file)}})
            )
        elif name in entries:
            key, value = entries[name]
            parts.append(text[key.start_mark.index : value.end_mark.index].rstrip() + "\n")
    return "".join(parts)


def _declarations(place: Place, config: StreamConfig) -> list[Any]:
    """One entity and one view, with features of several types, and rules that an event can break."""
    entity = Entity(name=KEY, join_keys=[KEY], value_type=ValueType.INT64)
    times: Any = {"timestamp_field": "happened", "created_timestamp_column": "created"}
    history = FileSource(
        name=f"{VIEW}_history",
        path=str(place.offline),
        s3_endpoint_override=place.offline.bucket.endpoint if isinstance(place.offline, ObjectPath) else None,
        file_format=ParquetFormat(),
        **times,
    )
    events = KafkaSource(
        name=f"{VIEW}_topic",
        kafka_bootstrap_servers=config.bootstrap,
        topic=place.topic,
        message_format=JsonFormat(schema_json=""),
        batch_source=history,
        **times,
    )
    view = FeatureView(
        name=VIEW,
        entities=[entity],
        ttl=timedelta(0),
        schema=[
            Field(name=KEY, dtype=Int64),
            Field(name="share", dtype=Float64, tags={"ge": "0", "le": "1", "nullable": "false"}),
            Field(name="weight", dtype=Float32, tags={"ge": "0", "nullable": "false"}),
            Field(name="count", dtype=Int32, tags={"ge": "0", "lt": "1000000", "nullable": "false"}),
            Field(name="total", dtype=Int64),
            Field(name="state", dtype=String, tags={"isin": "open,paid,sent,closed"}),
            Field(name="label", dtype=String),
            Field(name="flag", dtype=Bool),
            Field(name="readings", dtype=Array(Float32)),
        ],
        source=events,
        online=True,
    )
    return [entity, view]


def _delete_group(place: Place, broker: Broker) -> None:
    """Delete the group; members that were killed stay in it until their session is over."""
    deadline = time.monotonic() + 3 * place.session_s + 10
    while True:
        try:
            broker.delete_group(place.group)
        except BrokerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def _forget(place: Place) -> None:
    """Remove the online rows, by Feast's own teardown of the project, and the SQLite file."""
    with contextlib.suppress(ConfigError):  # interrupted before there was a repository: nothing was written
        store: Any = open_store(place.home)
        store.teardown()
    if place.online_file is not None:
        for ending in ("", "-wal", "-shm", "-journal"):
            place.online_file.with_name(place.online_file.name + ending).unlink(missing_ok=True)
