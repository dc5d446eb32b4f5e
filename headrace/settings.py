"""Settings from `HEADRACE_*` variables and an optional `.env` file: one frozen, validated object a process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from headrace.errors import ConfigError

PREFIX = "HEADRACE_"


class Settings(BaseSettings):
    """What the stream and the batch chain both need to know.

    Attributes:
        feature_repo: the folder with `feature_store.yaml`.
        views: names of the feature views to serve, separated by commas; empty means all.
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

    @property
    def view_names(self) -> tuple[str, ...]:
        """The names in `views`, in order; empty means all."""
        return tuple(name.strip() for name in self.views.split(",") if name.strip())


SettingsT = TypeVar("SettingsT", bound=Settings)


def load(settings: type[SettingsT]) -> SettingsT:
    """Read the settings once, from the environment first and `.env` second.

    Raises:
        ConfigError: names every variable that is wrong, and why; never its value.
    """
    try:
        return settings()
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
    return (
        ".env" if any(name == known.upper() for known, value in dotenv_values(".env").items() if value) else "not set"
    )
