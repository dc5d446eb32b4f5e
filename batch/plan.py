"""Which views there are and whether their tables fit, asked once a process and never by the process itself.

Luigi decides in the parent what to run and forks a child for each task. A client that the parent had
opened, be it of the registry, DuckDB or Redis, would be shared by all of them, and DuckDB hangs. Importing
Feast in each child instead would cost seconds a task. So the parent *imports* Feast, once and only when
there is work to do, but *opens* nothing: a short-lived child, forked like a task, reads the registry and
looks at the tables, and answers through a pipe. The tasks forked later find the imports done. Where
processes are spawned and not forked each imports for itself; nothing else changes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from luigi.worker import fork_lock

from batch.settings import BatchSettings
from headrace.errors import ConfigError, HeadraceError, TerminalError


@dataclass(frozen=True)
class Plan:
    """What a process was asked to run, looked up.

    Attributes:
        problems: by view: what is wrong with its source for good, or None.
        is_single: whether one view was asked for by name.
    """

    problems: dict[str, str | None]
    is_single: bool


Find = Callable[[BatchSettings, Collection[str]], dict[str, str | None]]


def look_up(settings: BatchSettings, view: str, find: Find) -> Plan:
    """Ask a child for the views, by one of the functions below.

    An empty `view` means all that `HEADRACE_VIEWS` allows.

    Raises:
        ConfigError: unknown view, nothing applied, no feature repository, and what `find` finds wrong.
    """
    context = multiprocessing.get_context()
    is_forked = context.get_start_method() == "fork"
    if is_forked:
        importlib.import_module("batch.steps")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, settings, view, find), name="headrace-look-up")
    with fork_lock:
        child.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        child.join()
        msg = f"the look-up of the views ended with exit code {child.exitcode}; its own output says why"
        raise ConfigError(msg) from None
    finally:
        receiver.close()
    child.join()
    if isinstance(answer, HeadraceError):
        raise answer
    problems, imported = answer
    if is_forked:
        _import(imported)
    return Plan(problems, bool(view))


def find_all_views(settings: BatchSettings, names: Collection[str]) -> dict[str, str | None]:
    """The views, whether or not they have a source; nothing is wrong with any. Opens the registry."""
    from headrace.repository import contracts, open_store  # noqa: PLC0415 - imports Feast, in the child only

    return {contract.name: None for contract in contracts(open_store(settings.feature_repo), names)}


def find_views(settings: BatchSettings, names: Collection[str]) -> dict[str, str | None]:
    """The views with a source and what is wrong with it. Opens the registry, and the database or the files.

    Raises:
        ConfigError: a view that was named has no source, or none has.
    """
    from batch.source import no_source, open_source  # noqa: PLC0415 - imports Feast, in the child only
    from headrace.repository import contracts, open_store  # noqa: PLC0415

    found = contracts(open_store(settings.feature_repo), names)
    without = [contract.name for contract in found if not contract.has_source]
    if without and (names or len(without) == len(found)):
        raise no_source(*without)
    problems: dict[str, str | None] = {}
    for contract in found:
        if not contract.has_source:
            continue
        try:
            open_source(settings, contract)
            problems[contract.name] = None
        except TerminalError as error:
            problems[contract.name] = str(error)
        except HeadraceError:
            problems[contract.name] = None  # it may pass: Ingest tries, and tries again
    return problems


def _answer(sender: Connection, settings: BatchSettings, view: str, find: Find) -> None:
    answer: tuple[dict[str, str | None], list[str]] | HeadraceError
    before = set(sys.modules)
    try:
        problems = find(settings, (view,) if view else settings.view_names)
        answer = problems, [name for name in sys.modules if name not in before]
    except HeadraceError as error:
        answer = error
    sender.send(answer)
    sender.close()


def _import(modules: Iterable[str]) -> None:
    """Import what the look-up had to, as every task would: Feast loads the parts of a store late."""
    for name in modules:
        with suppress(ImportError):
            importlib.import_module(name)
