"""What the registry says of the served views, looked at again and again: a view that changed is taken over in place.

A broken look changes nothing: the worker goes on with what it knows, and tells.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

from feast import FeatureStore, KafkaSource
from feast.infra.registry.sql import SqlRegistry, feature_views
from sqlalchemy import select

from headrace.contract import ViewContract, load_transform
from headrace.errors import ConfigError, HeadraceError
from headrace.online import unapplied
from streaming.health import Fault, Health, Kind
from streaming.settings import StreamConfig, View, check_formats, schema_registry
from streaming.threads import Crew, Thread

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the registry says now.

    Attributes:
        views: the served views that can be read, by name.
        refused: why the others cannot go on, by name.
        waiting: what a restart, or the end of a `feast apply`, is needed for; in words.
    """

    views: Mapping[str, View]
    refused: Mapping[str, str]
    waiting: tuple[str, ...]


def fingerprint(store: FeatureStore) -> str | None:
    """Of all views of an SQL registry, not decoded, which would be nearly all of the work; None of another one."""
    registry = store.registry
    if not isinstance(registry, SqlRegistry):
        return None
    columns = feature_views.c.feature_view_name, feature_views.c.feature_view_proto
    with registry.read_engine.connect() as connection:
        rows = connection.execute(select(*columns).where(feature_views.c.project_id == store.project)).all()
    digest = hashlib.blake2b()
    for name, proto in sorted((str(name), bytes(proto)) for name, proto in rows):
        digest.update(b"%d %s %d " % (len(name), name.encode(), len(proto)) + proto)
    return digest.hexdigest()


def declared(config: StreamConfig, served: Mapping[str, View]) -> Declared:
    """Read the registry, and compare it with what is served. Blocking.

    Raises:
        Exception: whatever Feast and the registry raise.
    """
    store, settings = config.store, config.settings
    found = {view.name: view for view in store.list_feature_views()}
    views: dict[str, View] = {}
    refused: dict[str, str] = {}
    waiting: list[str] = []
    for name, view in served.items():
        if name not in found:
            refused[name] = f"feature view `{name}` was deleted from the registry; start the worker again without it"
            continue
        try:
            contract = ViewContract.from_feast(found[name], store.config)
            if _promise(contract) == _promise(view.contract):
                views[name] = view
            elif (later := _is_for_a_restart(contract, view.contract)) is not None:
                views[name] = view
                waiting.append(later)
            elif (why := unapplied(store, contract)) is not None:
                views[name] = view
                waiting.append(why)
            else:
                _refuse(contract, view.contract)
                views[name] = View(contract, load_transform(contract, settings.feature_repo))
        except ConfigError as error:
            refused[name] = str(error)
    if not settings.view_names:
        waiting += _newcomers(found, served)
    return Declared(views, refused | _of_other_format(config, served, views), tuple(waiting))


def _promise(contract: ViewContract) -> tuple[Any, ...]:
    """All that the stream takes from a declaration: not when it was materialized, for instance."""
    own = [getattr(contract, part.name) for part in dataclasses.fields(contract) if part.name != "feature_view"]
    view = contract.feature_view
    kinds = [(column.name, str(column.dtype)) for column in (*view.entity_columns, *view.features)]
    return *own, kinds, getattr(view, "current_version_number", None)


def _is_for_a_restart(contract: ViewContract, former: ViewContract) -> str | None:
    """Why a view goes on as it was until the worker is started again; None: it need not."""
    if contract.topic != former.topic:
        return (
            f"feature view `{contract.name}` has another topic, {_named(contract.topic)} instead of "
            f"{_named(former.topic)}; start the worker again to read it"
        )
    if contract.bootstrap_servers != former.bootstrap_servers:
        return f"feature view `{contract.name}` names other kafka_bootstrap_servers; start the worker again to use them"
    return None


def _named(topic: str | None) -> str:
    return "none" if topic is None else f"`{topic}`"


def _refuse(contract: ViewContract, former: ViewContract) -> None:
    """What would make other keys of the rows that are there."""
    if contract.join_keys != former.join_keys and contract.directory == former.directory:
        msg = (
            f"feature view `{contract.name}`: its join keys are {list(contract.join_keys)} now and were "
            f"{list(former.join_keys)}; apply the former ones again, or declare a view of another name with a folder "
            "of its own"
        )
        raise ConfigError(msg)


def _newcomers(found: Mapping[str, Any], served: Mapping[str, View]) -> list[str]:
    """Views that a worker started now would serve, too."""
    streams = [name for name, view in found.items() if isinstance(getattr(view, "stream_source", None), KafkaSource)]
    new = [name for name in streams if name not in served]
    return [f"feature view `{name}` is new; start the worker again to serve it" for name in sorted(new)]


def _of_other_format(config: StreamConfig, served: Mapping[str, View], views: dict[str, View]) -> dict[str, str]:
    """Takes out the changed views whose format cannot be read, or is not that of the others of their topic; and why."""
    refused: dict[str, str] = {}
    for name in [name for name, view in views.items() if view is not served[name]]:
        topic = views[name].contract.topic
        others = [view.contract for other, view in views.items() if other != name and view.contract.topic == topic]
        try:
            check_formats([views[name].contract, *others], schema_registry(config.settings))
        except ConfigError as error:
            refused[name] = str(error)
            del views[name]
    return refused


class Serving(Protocol):
    """Who serves the views."""

    @property
    def views(self) -> Mapping[str, View]:
        """As they are served now, by name."""

    async def renew(self, changed: Mapping[str, View], refused: Mapping[str, str]) -> None:
        """Take over changed views, and leave out those that cannot go on, with the reasons."""


class Renewal:
    """See the module. Of the event loop."""

    def __init__(self, config: StreamConfig, health: Health, serving: Serving) -> None:
        self._config = config
        self._health = health
        self._serving = serving
        self._thread = Thread(Crew("headrace-registry"))  # a registry that hangs holds up nothing else
        self._known: tuple[str | None, dict[str, View], Declared] | None = None
        self._refused: Mapping[str, str] = {}
        self._waiting: tuple[str, ...] = ()
        self._error: str | None = None
        self._read_s = time.time()
        health.registry_read.set(self._read_s)

    async def watch(self) -> None:
        """Look at the registry until cancelled."""
        while True:
            await asyncio.sleep(self._config.settings.registry_seconds)
            await self.look()

    async def look(self) -> None:
        """Look once, and take over what changed."""
        served = dict(self._serving.views)
        looking = asyncio.get_running_loop().run_in_executor(self._thread, self._declared, served)
        try:
            now = await looking
        except Exception as error:  # noqa: BLE001 - a registry may fail in any way
            self._fail(error)
            return
        self._succeed()
        for text in now.waiting:
            if text not in self._waiting:
                logger.warning(text)
        self._waiting = now.waiting
        changed = {name: view for name, view in now.views.items() if view is not served[name] or name in self._refused}
        refused = {name: why for name, why in now.refused.items() if self._refused.get(name) != why}
        if changed or refused:
            await self._serving.renew(changed, refused)
        self._refused = now.refused

    def _declared(self, served: dict[str, View]) -> Declared:
        """What the registry says, read only if it says something else than last time. Of the thread."""
        mark = fingerprint(self._config.store)
        if self._known is not None and mark is not None:
            last_mark, last_served, last = self._known
            is_same = last_served.keys() == served.keys() and all(served[name] is last_served[name] for name in served)
            if is_same and last_mark == mark and not last.waiting:
                return last
        now = declared(self._config, served)
        self._known = mark, served, now
        return now

    def faults(self) -> list[Fault]:
        """What is declared and not served."""
        return [Fault(Kind.RESTART, text) for text in self._waiting]

    def state(self) -> dict[str, Any]:
        """When the registry was last read, and why not since."""
        return {"read_s_ago": round(time.time() - self._read_s, 1), "error": self._error}

    def _fail(self, error: Exception) -> None:
        text = str(error) if isinstance(error, HeadraceError) else type(error).__name__
        if self._error is None:
            logger.warning("the registry cannot be read, going on with what is known of the views: %s", text)
        self._error = text
        self._health.registry_failures.inc()

    def _succeed(self) -> None:
        if self._error is not None:
            logger.info("the registry can be read again")
        self._error = None
        self._read_s = time.time()
        self._health.registry_read.set(self._read_s)
