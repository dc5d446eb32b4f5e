"""The app and its worker: what Faust runs, checked before it starts, and ended in one piece.

`create_app` needs no broker. The worker looks at broker, topics, stores and its port before anything starts, so
that what is missing is told in one line.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import socket
import time
from typing import Any, NoReturn

import faust
from faust.web.views import View as WebView

from headrace.errors import ConfigError, HeadraceError, TransientError
from headrace.online import expect_applied, server_ids
from headrace.place import place_of
from headrace.repository import open_store
from streaming import commands  # noqa: F401 - registers `emit` and `start` with Faust's command line
from streaming.broker import Broker
from streaming.deadletters import topic_of
from streaming.ending import Deadline, give_up, leave, leave_on_signals, while_signals_are_heard
from streaming.health import OFFLINE, ONLINE, Fault, Health, Kind
from streaming.intake import StreamIntake
from streaming.logs import QUIET, set_up, silence_hosts
from streaming.pages import add_status_pages
from streaming.renewal import Renewal
from streaming.security import faust_credentials, keep_logins_out_of_logs, warnings
from streaming.settings import StreamConfig, read_config, registry_warnings, schema_registry
from streaming.status import Board, Moment
from streaming.transport import BulkSchema, BulkTransport

try:
    import uvloop
except ImportError:  # pragma: no cover - not on every platform
    uvloop = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

UNBOUNDED_POLL_S = 1e8
"""Never 0 or None, and never small: after it aiokafka leaves the group for good, though the worker is only busy."""

HEARTBEAT_S = 0.5
"""A worker hears of a rebalance by its heartbeat, and until the last one has heard all stand still."""

LONGEST_REBALANCE_S = 180.0
USUAL_REBALANCE_S = 15.0
"""So long a worker that had an assignment stays ready without one: a rolling restart is no outage."""


class HeadraceWorker(faust.Worker):
    """Faust's worker, which looks before it starts, and says in one line why it does not, or ends."""

    logger = QUIET

    def on_setup_root_logger(self, logger: Any, level: int) -> None:
        """Of Faust, when it has set up its logging."""
        super().on_setup_root_logger(logger, level)
        set_up(logger, level, self.app.config.settings.log_format)  # type: ignore[attr-defined]

    def execute_from_commandline(self) -> NoReturn:
        """Run until a signal or a fatal fault; the exit code is 0 only after a signal."""
        app: Any = self.app
        leave_on_signals()
        try:
            while_signals_are_heard(
                lambda: check(app.config, web=app.conf.web_enabled, port=app.conf.web_port, host=app.conf.web_bind)
            )
        except HeadraceError as error:
            give_up(error)
        try:
            super().execute_from_commandline()
        except SystemExit as ending:
            if app.fatal is not None:
                give_up(app.fatal)
            is_asked = self._signal_stop_time is not None  # then what broke on the way out is no fault
            logger.info("ended")
            leave(ending.code if isinstance(ending.code, int) and not is_asked else 0)

    def _schedule_shutdown(self, signal: Any) -> None:
        """Of both signals: the first asks for an orderly end, the second ends."""
        app: Any = self.app
        if self._signal_stop_time is not None:
            logger.warning("a second signal: ends now")
            leave(app.exit_code())
        app.deadline.set()
        logger.info("%s: appends what it has, leaves the group, and ends", signal.name)
        super()._schedule_shutdown(signal)

    def _crash(self, reason: BaseException) -> None:
        """Of Faust, whatever crashed. From any thread."""
        if self._signal_stop_time is None:
            self.app.note_crash(reason)  # type: ignore[attr-defined]
        super()._crash(reason)


class HeadraceApp(faust.App):
    """The Faust app with our transport, and with what the parts share."""

    logger = QUIET

    def __init__(self, config: StreamConfig, **options: Any) -> None:
        self.config = config
        self.health = Health()
        self.intake = StreamIntake(config, self.health, self.fail)
        self.renewal = Renewal(config, self.health, self.intake)
        self.fatal: BaseException | None = None
        self.deadline = Deadline(self.exit_code)
        self.rebalancing_since_s: float | None = None
        self.was_assigned = False
        self.health.gauges.faults = lambda: readiness_faults(self)
        super().__init__(config.group, **options)

    def fail(self, error: BaseException) -> None:
        """End the worker: nothing more is committed, the exit code is not 0. Of the event loop; returns at once."""
        if self.fatal is None and self.should_stop:
            logger.warning("while ending: %s", error)  # the signal counts; who starts next meets the fault again
        elif self.fatal is None:
            self.fatal = error
            logger.critical("the worker ends: %s", error)
            silence_hosts()
            self.deadline.set()
            self.add_future(self._fail(error))

    def exit_code(self) -> int:
        """0 after a signal, 1 after a fault."""
        return 0 if self.fatal is None else 1

    def note_crash(self, reason: BaseException) -> None:
        """Note what ended the worker, if nothing did before."""
        if self.fatal is None:
            self.fatal = reason if str(reason) else RuntimeError(repr(reason))
            self.deadline.set()

    async def _fail(self, error: BaseException) -> None:
        await self.crash(Exception(str(error)) if not isinstance(error, Exception) else error)

    def on_rebalance_start(self) -> None:
        """Note when."""
        self.rebalancing_since_s = time.monotonic()
        self.health.rebalances.inc()
        logger.info("the group rebalances")
        super().on_rebalance_start()

    def on_rebalance_end(self) -> None:
        """Note that it is over."""
        self.rebalancing_since_s = None
        self.was_assigned = True
        super().on_rebalance_end()

    def rebalancing_s(self) -> float:
        """For how long the group has been rebalancing; 0 when it is not."""
        return 0.0 if self.rebalancing_since_s is None else time.monotonic() - self.rebalancing_since_s

    def _new_consumer(self) -> Any:
        consumer: Any = super()._new_consumer()
        self.intake.mover = consumer
        return consumer

    def _new_transport(self) -> BulkTransport:
        return BulkTransport(self.conf.broker_consumer, self)

    def _create_directories(self) -> None:
        """Faust's tables want folders; there are no tables."""

    def worker_init(self) -> None:
        """Choose the event loop, before there is one, and let the collector leave alone what stays for good.

        It would else walk the whole heap again and again while records come and go, which costs half of a fetch.
        """
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)  # extension modules tell a person of all that is never collected
        gc.set_threshold(50_000, 20, 100)
        if uvloop is not None:
            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        super().worker_init()


def create_app() -> HeadraceApp:
    """Build the app from the settings and the registry.

    Raises:
        ConfigError: a setting, the repository or a view is wrong.
    """
    config = read_config()
    settings = config.settings
    keep_logins_out_of_logs()
    for warning in [*warnings(settings, config.servers), *registry_warnings(settings)]:
        logger.warning(warning)
    app = HeadraceApp(
        config,
        broker=";".join(f"kafka://{server}" for server in config.servers),
        broker_credentials=faust_credentials(settings, settings.broker_timeout_seconds),
        broker_max_poll_interval=UNBOUNDED_POLL_S,
        broker_max_poll_records=settings.slice_records,
        broker_commit_interval=1.0,
        broker_session_timeout=settings.session_seconds,
        broker_heartbeat_interval=min(HEARTBEAT_S, settings.session_seconds / 4),
        broker_rebalance_timeout=60.0,
        consumer_max_fetch_size=settings.fetch_bytes,
        stream_buffer_maxsize=64,
        stream_wait_empty=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        table_standby_replicas=0,
        producer_request_timeout=settings.broker_timeout_seconds,
        web_bind=settings.web_host,
        web_host=settings.web_host,
        web_port=settings.web_port,
        web_tables_enabled=False,
        web_stats_enabled=False,
        web_graph_enabled=False,
        web_router_enabled=False,
        worker_redirect_stdouts=False,
        Worker=HeadraceWorker,
    )
    topic = app.topic(*config.views, schema=BulkSchema())

    @app.agent(topic, name="ingest")
    async def ingest(stream: Any) -> None:
        """Hand each slice to its lanes. No exception may leave this body: Faust would acknowledge and lose events."""
        async for event in stream.noack().events():
            try:
                app.intake.deliver(event.value, event.message.generation_id)
            except Exception as error:  # noqa: BLE001 - see above
                app.fail(error)
        if not app.should_stop:
            app.fail(RuntimeError("Faust ended the stream of events; start the worker again"))

    @app.task  # type: ignore[untyped-decorator]
    async def watch_registry() -> None:
        """What the registry says of the views while the worker runs."""
        await app.renewal.watch()

    _add_pages(app)
    return app


def check(config: StreamConfig, *, web: bool, host: str, port: int) -> None:
    """Look at what the worker needs, and create the dead-letter topics. Blocking, bounded.

    Raises:
        HeadraceError: something is missing; the message says what to do.
    """
    if web:
        _check_port(host, port)
    broker = Broker(config)
    present = broker.partitions()
    missing = [topic for topic in config.views if topic not in present]
    if missing:
        names = ", ".join(f"`{topic}`" for topic in missing)
        msg = (
            f"broker {config.bootstrap} has no topic {names}, or does not let this user see it; create it, give the "
            "rights of docs/how-to/security.md, or correct the topic of its view's KafkaSource"
        )
        raise ConfigError(msg)
    for topic in config.views:
        if topic_of(topic) not in present:
            broker.create_topic(topic_of(topic), present[topic])
    registry = schema_registry(config.settings)
    if registry is not None and any(
        view.contract.message_format == "avro" for vs in config.views.values() for view in vs
    ):
        registry.check()
    store = open_store(config.settings.feature_repo)
    try:
        server_ids(store)
    except Exception as error:
        kind = store.config.online_store.type
        why = f"{type(error).__name__}: {error}"
        msg = f"the online store ({kind}) does not answer: {why}; start it, or correct feature_store.yaml"
        raise TransientError(msg) from error
    for views in config.views.values():
        for view in views:
            expect_applied(store, view.contract)
            folder = view.contract.directory
            try:
                place_of(folder).prepare()
            except OSError as error:
                msg = f"feature view `{view.contract.name}`: its folder {folder} cannot be made: {error.strerror}"
                raise ConfigError(msg) from error


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            msg = f"the worker's pages cannot be served on {host}:{port}: {error.strerror}; set HEADRACE_WEB_PORT"
            raise ConfigError(msg) from error


def _add_pages(app: HeadraceApp) -> None:
    """`/healthz`: restart me if this fails. `/readyz`: I take events and both stores take them. `/metrics`, `/`."""

    @app.page("/healthz")
    async def healthz(self: WebView, request: Any) -> Any:
        faults = [fault.text for fault in liveness_faults(app)]
        return self.json({"ok": not faults, "faults": faults}, status=503 if faults else 200)

    @app.page("/readyz")
    async def readyz(self: WebView, request: Any) -> Any:
        faults = [fault.text for fault in readiness_faults(app)]
        return self.json({"ok": not faults, "faults": faults, **state(app)}, status=503 if faults else 200)

    @app.page("/metrics")
    async def metrics(self: WebView, request: Any) -> Any:
        return self.bytes(app.health.exposition(), content_type="text/plain")

    add_status_pages(app, Board(app.config, app.health, lambda: moment(app)))


def liveness_faults(app: HeadraceApp) -> list[Fault]:
    """What only a restart can cure."""
    faults: list[Fault] = []
    if app.fatal is not None:
        faults.append(Fault(Kind.ENDING, f"ending: {app.fatal}"))
    consumer: Any = app.intake.mover
    if consumer is not None and consumer.coordinator_failed():
        faults.append(Fault(Kind.CONSUMER, "the task that keeps this worker in its group has ended"))
    if consumer is not None and consumer.thread_failed():
        faults.append(Fault(Kind.CONSUMER, "the thread that talks to the broker has ended or hangs"))
    if (spent_s := app.rebalancing_s()) > LONGEST_REBALANCE_S:
        faults.append(Fault(Kind.REBALANCING, f"rebalancing for {spent_s:.0f} s"))
    return faults


def readiness_faults(app: HeadraceApp) -> list[Fault]:
    """What keeps events from reaching both stores now. A worker without partitions is a spare, and ready."""
    faults = liveness_faults(app) + app.intake.faults() + app.renewal.faults()
    is_assigned = not app.rebalancing and (app.intake.has_begun or app.unassigned)
    if not is_assigned and not (app.was_assigned and app.rebalancing_s() < USUAL_REBALANCE_S):
        faults.append(Fault(Kind.REBALANCING, "waiting for the group's assignment"))
    return faults


def moment(app: HeadraceApp) -> Moment:
    """What the status page needs of the event loop."""
    gauges = app.health.gauges
    views = [*app.intake.views.values()]
    return Moment(readiness_faults(app), gauges.source(), gauges.assigned(), gauges.waiting(), views)


def state(app: HeadraceApp) -> dict[str, Any]:
    """Where the worker is: ledgers, lag, freshness."""
    partitions = [
        {"view": view, "topic": topic, "partition": number, "ledger_end": end, "lag": lag}
        for (view, topic, number), (end, lag) in sorted(app.health.gauges.source().items())
    ]
    freshness = {
        name: {
            store: {
                "p50_s": app.health.freshness.quantile(name, store, 0.50),
                "p99_s": app.health.freshness.quantile(name, store, 0.99),
            }
            for store in (ONLINE, OFFLINE)
        }
        for name in app.intake.views
    }
    registry = app.renewal.state()
    return {"group": app.config.group, "partitions": partitions, "freshness": freshness, "registry": registry}
