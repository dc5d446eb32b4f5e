"""Settings from `HEADRACE_*` variables, `.env` and files of secrets: one frozen, validated object a process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from headrace import secret_files
from headrace.errors import ConfigError

PREFIX = "HEADRACE_"


class Settings(BaseSettings):
    """What the stream and the batch chain both need to know.

    Attributes:
        feature_repo: the folder with `feature_store.yaml`.
        views: names of the feature views to serve, separated by commas; empty means all.
        batch_folder: where the batch chain keeps raw and clean data, rejects, reports, receipts and what ran; relative
            to the feature repository, like every path of it, so that a copy of the repository has a chain of its own.
        report_url: where `batch_folder` is served, for the links to reports in the scheduler's pages and the worker's.
            None gives `file:` links there, which a terminal opens and a browser refuses to follow, and none here.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    feature_repo: Path = Path("feature_repo")
    views: str = ""
    batch_folder: Path = Path("../data/batch")
    report_url: str | None = None

    @field_validator("report_url")
    @classmethod
    def _is_public_url(cls, url: str | None) -> str | None:
        parts = urlsplit(url) if url else None
        if parts is not None and not (parts.scheme in {"http", "https"} and parts.hostname and parts.username is None):
            msg = "expected a URL that begins with https:// or http://, without a login: pages show it to all"
            raise ValueError(msg)
        return url or None

    @property
    def folder(self) -> Path:
        """`batch_folder`, absolute."""
        return (self.feature_repo.resolve() / self.batch_folder).resolve()

    @property
    def view_names(self) -> tuple[str, ...]:
        """The names in `views`, in order; empty means all."""
        return tuple(name.strip() for name in self.views.split(",") if name.strip())


SettingsT = TypeVar("SettingsT", bound=Settings)


def load(settings: type[SettingsT]) -> SettingsT:
    """Read the settings once: from the environment, else from `.env`, else from files in the folder of secrets.

    Raises:
        ConfigError: names every variable that is wrong, and why; never its value.
    """
    folder = secret_files.folder()
    try:
        return settings(_secrets_dir=folder if folder.is_dir() else None)  # type: ignore[call-arg] # its plugin hides it
    except SettingsError as error:  # a file that cannot be read
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else type(cause).__name__
        msg = f"invalid settings: {error} ({reason}); files of secrets are in {folder}"
        raise ConfigError(msg) from None
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_input=False, include_url=False):
            name = PREFIX + "_".join(str(part) for part in fault["loc"]).upper()
            faults.append(f"{name} ({_source(name)}): {fault['msg']}")
        msg = "invalid settings: " + "; ".join(faults)
        raise ConfigError(msg) from None


def _source(name: str) -> str:
    """Where a setting was read from."""
    if any(name == known.upper() for known, value in os.environ.items() if value):
        return "environment"
    if any(name == known.upper() for known, value in dotenv_values(".env").items() if value):
        return ".env"
    folder = secret_files.folder()
    return str(folder) if folder.is_dir() and name in {path.name.upper() for path in folder.iterdir()} else "not set"
