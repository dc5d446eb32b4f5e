"""Fixtures: real servers shared by a test session, and feature repositories of a test's own.

With `HEADRACE_REQUIRE_ALL=1` a skipped test is a failed one.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

# Feast has the Prometheus client keep its counters in files, which all tests would share, and the processes that
# pytest starts inherit that from the first. So the variables go, and the client is imported before Feast.
for variable in ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR"):
    os.environ.pop(variable, None)

import prometheus_client  # noqa: E402, F401
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.reporting import tables  # noqa: E402
from tests.servers import (  # noqa: E402
    Browser,
    Kafka,
    MockBroker,
    ObjectStore,
    Proxy,
    UnavailableError,
    Valkey,
    copy_repository,
    environment,
    feast_apply,
    use_valkey,
)

# How long an example takes says something of the machine.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")

REQUIRE_ALL = os.environ.get("HEADRACE_REQUIRE_ALL") == "1"

OnlineStore = Literal["sqlite", "valkey"]


class TopicFactory(Protocol):
    """Make a topic on the real Kafka; its name is the prefix with a unique ending."""

    def __call__(self, prefix: str = "topic", /, *, partitions: int = 4) -> str: ...


class RepositoryFactory(Protocol):
    """Copy `feature_repo/`, change it as asked, and apply it.

    Args:
        online: the online store; `valkey` starts the shared server and uses a database of it that was empty.
        replace: texts to replace in `definitions.py`, old to new; each must be there.
        apply: whether to run `feast apply`.
    """

    def __call__(
        self,
        online: OnlineStore = "sqlite",
        /,
        *,
        replace: dict[str, str] | None = None,
        apply: bool = True,
    ) -> Path: ...


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn skips into failures where everything is required (an expected failure stays one)."""
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"HEADRACE_REQUIRE_ALL=1 and {item.nodeid} was skipped: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for whole modules that skip themselves."""
    report = yield
    if REQUIRE_ALL and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"HEADRACE_REQUIRE_ALL=1 and {collector.nodeid} was skipped: {report.longrepr}"
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the tables of a process that ran tests."""
    tables(node.config).extend(getattr(node, "workeroutput", {}).get("tables", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables."""
    for table in tables(terminalreporter.config):
        terminalreporter.write_line("\n" + table)


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """A real S3 server, shared by the session; make a bucket of your own there. This process may ask it."""
    try:
        with ObjectStore() as server, pytest.MonkeyPatch.context() as patch:
            for name, value in server.credentials().items():
                patch.setenv(name, value)
            yield server
    except UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def kafka_proxy() -> Iterator[Proxy]:
    """A way to the shared Kafka that can be broken: leave it open."""
    with Proxy() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def kafka_server(kafka_proxy: Proxy) -> Iterator[Kafka]:
    """A real Apache Kafka, one broker, shared by the session: stop it, freeze it, but leave it running."""
    try:
        with Kafka(proxy=kafka_proxy) as server:
            yield server
    except UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def kafka(kafka_server: Kafka) -> str:
    """`host:port` of the shared Apache Kafka."""
    return kafka_server.start().address


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Valkey]:
    """A real Valkey, shared by the session, with enough databases for one a test."""
    try:
        with Valkey(("--databases", "1000")) as server:
            yield server
    except UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def valkey_proxy(valkey_server: Valkey) -> Iterator[Proxy]:
    """A way to the shared Valkey that can be broken: leave it open."""
    with Proxy(valkey_server.port) as proxy:
        yield proxy


@pytest.fixture
def valkey(valkey_server: Valkey) -> str:
    """`host:port` of the shared Valkey."""
    return valkey_server.start().address


@pytest.fixture(scope="session")
def valkey_databases() -> Iterator[int]:
    """Numbers of databases of the shared Valkey that no test has used; 0 is left to those that name none."""
    return iter(range(1, 1000))


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A real Chromium."""
    try:
        with Browser() as server:
            yield server
    except UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def mock_broker() -> Iterator[str]:
    """`host:port` of the embedded broker: four partitions a topic, made when first asked for."""
    with MockBroker() as server:
        yield server.address


@pytest.fixture
def topic(kafka_server: Kafka) -> TopicFactory:
    """A function that makes a new topic on the real Kafka and returns its name."""

    def make(prefix: str = "topic", /, *, partitions: int = 4) -> str:
        return kafka_server.start().create_topic(f"{prefix}-{uuid.uuid4().hex[:8]}", partitions=partitions)

    return make


@pytest.fixture
def feature_repo_copy(tmp_path: Path, request: pytest.FixtureRequest, applied_repository: Path) -> RepositoryFactory:
    """A function that gives a separate, complete feature repository, with its data, under `tmp_path`."""

    def copy(
        online: OnlineStore = "sqlite",
        /,
        *,
        replace: dict[str, str] | None = None,
        apply: bool = True,
    ) -> Path:
        home = tmp_path / f"repo-{uuid.uuid4().hex[:6]}"
        repo = home / "feature_repo"
        is_applied = apply and not replace
        if is_applied:
            # The registry does not depend on the online store, and `apply` makes nothing in Redis.
            shutil.copytree(applied_repository.parent, home)
        else:
            copy_repository(repo)
        if online == "valkey":
            server: Valkey = request.getfixturevalue("valkey_server").start()
            use_valkey(repo, server.address, next(request.getfixturevalue("valkey_databases")))
        if is_applied:
            return repo
        definitions = repo / "definitions.py"
        text = definitions.read_text(encoding="utf-8")
        for old, new in (replace or {}).items():
            if old not in text:
                raise ValueError(f"{old!r} is not in feature_repo/definitions.py")
            text = text.replace(old, new)
        definitions.write_text(text, encoding="utf-8")
        if apply:
            feast_apply(repo)
        return repo

    return copy


@pytest.fixture(scope="session")
def applied_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository on the embedded defaults, applied once a session; copies of it start in a moment."""
    repo = tmp_path_factory.mktemp("applied") / "feature_repo"
    copy_repository(repo)
    feast_apply(repo)
    return repo


EnvironmentFactory = Callable[..., dict[str, str]]


@pytest.fixture
def worker_environment() -> EnvironmentFactory:
    """A function that gives the environment of a Headrace process; see `tests.servers.environment`."""
    return environment
