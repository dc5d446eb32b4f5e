"""What Feast leaves open of an SQL registry's URL: relative SQLite files, and secrets in files.

A relative file is meant as every other path of a feature repository: against its folder.

Feast hands an SQL registry's URL to SQLAlchemy as it is, so `sqlite:///../data/registry.db` would mean another file in
each working directory. A custom registry class cannot be named in `feature_store.yaml`, therefore the one property
through which Feast reads the registry's configuration is wrapped, once, when a Headrace plug-in is imported. A `feast`
command says errors of ours in one line from then on.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from feast.repo_config import RepoConfig
from sqlalchemy.engine import make_url

from headrace.secret_files import filled
from headrace.terminal import say_errors_of_feast


def absolute_url(url: str, repo_path: Path) -> str:
    """Resolve the file of a relative SQLite URL against `repo_path`, and make its folder; other URLs stay.

    Pure but for the folder. Idempotent.
    """
    absolute, folder = _resolved(url, repo_path)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return absolute


@lru_cache
def _resolved(url: str, repo_path: Path) -> tuple[str, Path | None]:
    """The URL, and its file's folder if it has one. Feast asks at each write."""
    if not url.startswith("sqlite"):
        return url, None
    parsed = make_url(url)
    if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
        return url, None
    path = (repo_path / parsed.database).resolve()
    return parsed.set(database=str(path)).render_as_string(hide_password=False), path.parent


def install() -> None:
    """Wrap `RepoConfig.registry`. Idempotent."""
    original: Any = RepoConfig.registry
    if getattr(original.fget, "resolves_relative_paths", False):
        return

    def registry(self: RepoConfig) -> Any:
        config = original.fget(self)
        if config is not None and config.registry_type == "sql" and self.repo_path is not None:
            config.path = url(config.path, self.repo_path)
            if config.read_path:
                config.read_path = url(config.read_path, self.repo_path)
        return config

    def url(text: str, repo_path: Path) -> str:
        return absolute_url(filled(text, "registry.path", partial(quote, safe="")), repo_path)

    registry.resolves_relative_paths = True  # type: ignore[attr-defined]
    RepoConfig.registry = property(registry)  # type: ignore[method-assign, assignment]


install()
say_errors_of_feast()
