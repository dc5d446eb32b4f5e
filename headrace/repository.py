"""Open a feature repository and read its views."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from feast import FeatureStore
from sqlalchemy.exc import DBAPIError

from headrace.contract import ViewContract
from headrace.errors import ConfigError, TransientError


def open_store(repo: Path) -> FeatureStore:
    """Open the Feast store of a repository.

    Raises:
        ConfigError: `repo` has no `feature_store.yaml`.
        TransientError: the database of its registry does not answer, or refuses.
    """
    if not (Path(repo) / "feature_store.yaml").is_file():
        msg = (
            f"expected a feature repository at {Path(repo).resolve()}, found no feature_store.yaml there; "
            "set HEADRACE_FEATURE_REPO to the folder that has it"
        )
        raise ConfigError(msg)
    with _naming(repo):
        return FeatureStore(repo_path=str(Path(repo).resolve()))


def contracts(store: FeatureStore, names: Collection[str] = ()) -> list[ViewContract]:
    """The contracts of the plain feature views of a store, sorted by name.

    Args:
        names: the views wanted; none means all that have a file source for their history.

    Raises:
        ConfigError: nothing was applied, a name is unknown, or a view wanted cannot be served.
        TransientError: the database of the registry does not answer, or refuses.
    """
    with _naming(store.repo_path):
        views = {view.name: view for view in store.list_feature_views()}
    if not views:
        msg = (
            f"the registry of project `{store.project}` has no feature view; "
            f"run `feast -c {store.repo_path} apply` first"
        )
        raise ConfigError(msg)
    unknown = sorted(set(names) - set(views))
    if unknown:
        msg = (
            f"unknown feature view {', '.join(f'`{n}`' for n in unknown)}; the registry has: {', '.join(sorted(views))}"
        )
        raise ConfigError(msg)
    return [ViewContract.from_feast(views[name], store.config) for name in sorted(names or views)]


@contextmanager
def _naming(repo: Path) -> Iterator[None]:
    """Say which registry fails, by the driver's own first line: SQLAlchemy's have the statement, and Feast no word."""
    try:
        yield
    except DBAPIError as error:
        why = next(iter(str(error.orig).strip().splitlines()), type(error.orig).__name__)
        file = Path(repo).resolve() / "feature_store.yaml"
        msg = f"the registry that {file} names does not answer: {why}; start its database, or correct `registry` there"
        raise TransientError(msg) from error
