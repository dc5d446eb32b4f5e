"""Open a feature repository and read its views."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from feast import FeatureStore

from headrace.contract import ViewContract
from headrace.errors import ConfigError


def open_store(repo: Path) -> FeatureStore:
    """Open the Feast store of a repository.

    Raises:
        ConfigError: `repo` has no `feature_store.yaml`.
    """
    if not (Path(repo) / "feature_store.yaml").is_file():
        msg = (
            f"expected a feature repository at {Path(repo).resolve()}, found no feature_store.yaml there; "
            "set HEADRACE_FEATURE_REPO to the folder that has it"
        )
        raise ConfigError(msg)
    return FeatureStore(repo_path=str(Path(repo).resolve()))


def contracts(store: FeatureStore, names: Collection[str] = ()) -> list[ViewContract]:
    """The contracts of the plain feature views of a store, sorted by name.

    Args:
        names: the views wanted; none means all that have a file source for their history.

    Raises:
        ConfigError: nothing was applied, a name is unknown, or a view wanted cannot be served.
    """
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
