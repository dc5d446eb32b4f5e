"""Fixtures: a place to run the chain in, and a Luigi that starts clean and forks nothing."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from luigi import configuration
from luigi.task_register import Register

from batch import plan, tasks
from batch.settings import BatchSettings, settings
from tests.batch.place import Place, apply_template, place_in
from tests.servers import Postgres, UnavailableError


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return apply_template(tmp_path_factory.mktemp("template") / "place")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A real PostgreSQL, shared by the session."""
    try:
        with Postgres() as server:
            yield server
    except UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def postgres(postgres_server: Postgres) -> str:
    """The SQLAlchemy URL of a new database there, with a query."""
    name = f"test_{uuid.uuid4().hex}"
    with postgres_server.connect() as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{postgres_server.url.removesuffix('/postgres')}/{name}?application_name=headrace"


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Place:
    return place_in(tmp_path / "place", template)


@pytest.fixture
def here(place: Place, configure: Callable[..., None]) -> Place:
    """The place, with this process set up to run tasks in it."""
    configure()
    return place


@pytest.fixture
def configure(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Set up this process for tasks in the place, with other settings if wanted; may be called again."""

    def apply(**changes: object) -> None:
        for name, value in place.settings(**changes).items():
            monkeypatch.setenv(name, value)
        forget()

    def look_up(chosen: BatchSettings, view: str, find: plan.Find) -> plan.Plan:
        names = (view,) if view else chosen.view_names
        return plan.Plan(find(chosen, names), bool(view))

    fresh = configuration.cfg_parser.LuigiConfigParser()
    for section, option, value in (
        ("worker", "check_complete_on_run", "true"),
        ("worker", "keep_alive", "true"),
        ("worker", "wait_interval", "0.05"),
        ("worker", "wait_jitter", "0"),
        ("scheduler", "retry_delay", "0"),
        ("scheduler", "retry_count", "1"),
    ):
        if not fresh.has_section(section):
            fresh.add_section(section)
        fresh.set(section, option, value)
    monkeypatch.setattr(configuration.cfg_parser.LuigiConfigParser, "_instance", fresh)
    monkeypatch.setattr(tasks, "look_up", look_up)
    monkeypatch.chdir(place.root)
    yield apply
    forget()


def forget() -> None:
    """What a new process would not know."""
    settings.cache_clear()
    tasks._plans.clear()
    Register.clear_instance_cache()
