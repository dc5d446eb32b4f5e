"""Secrets in files: settings, and what `${NAME}` stands for in `feature_store.yaml` and in URLs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from feast.repo_config import FeastConfigError, RepoConfig, load_repo_config
from pydantic import SecretStr

from batch.settings import BatchSettings
from headrace.errors import ConfigError
from headrace.settings import load
from streaming.settings import StreamSettings
from tests.servers.repository import ROOT

ODD = "p@ss/w:rd ${x} %41"
"""A password that a URL must quote."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of secrets, and an environment without settings."""
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(name)
    found = tmp_path / "secrets"
    found.mkdir()
    monkeypatch.setenv("HEADRACE_SECRETS_DIR", str(found))
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize("name", ["headrace_schema_registry_password", "HEADRACE_SCHEMA_REGISTRY_PASSWORD"])
def test_a_setting_may_be_a_file(folder: Path, name: str) -> None:
    (folder / name).write_text("hush\n")
    password = load(StreamSettings).schema_registry_password
    assert password is not None
    assert password.get_secret_value() == "hush"


def test_a_variable_wins_over_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "headrace_broker").write_text("file:1")
    monkeypatch.setenv("HEADRACE_BROKER", "variable:1")
    assert load(StreamSettings).broker == "variable:1"


def test_a_wrong_file_is_named_and_not_shown(folder: Path) -> None:
    (folder / "headrace_web_port").write_text("hush")
    with pytest.raises(ConfigError, match=rf"HEADRACE_WEB_PORT \({folder}\)") as raised:
        load(StreamSettings)
    assert "hush" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "headrace_schema_registry_password").write_bytes(b"hush\xff")
    with pytest.raises(ConfigError, match=r"schema_registry_password.*UnicodeDecodeError") as raised:
        load(StreamSettings)
    assert "hush" not in str(raised.value)

    (folder / "headrace_schema_registry_password").unlink()
    (folder / "postgres_password").mkdir()
    monkeypatch.setenv("HEADRACE_SOURCE_URL", "postgresql://me:${POSTGRES_PASSWORD}@host/db")
    with pytest.raises(ConfigError, match="the file cannot be read: Is a directory"):
        load(BatchSettings)


def test_without_a_folder_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_SECRETS_DIR", str(tmp_path / "none"))
    assert load(StreamSettings).broker == ""


def test_the_source_url_takes_its_password_from_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "postgres_password").write_text(ODD + "\n")
    monkeypatch.setenv("HEADRACE_SOURCE_URL", "postgresql://me:${POSTGRES_PASSWORD}@host/db")
    settings = load(BatchSettings)
    assert settings.source_url == SecretStr("postgresql://me:p%40ss%2Fw%3Ard%20%24%7Bx%7D%20%2541@host/db")
    assert ODD in settings.secrets


def test_a_source_url_whose_password_is_missing_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_SOURCE_URL", "postgresql://me:${NOWHERE}@host/db")
    with pytest.raises(ConfigError, match=rf"HEADRACE_SOURCE_URL.*`\$\{{NOWHERE\}}`.*file nowhere in {folder}"):
        load(BatchSettings)


def deployed() -> RepoConfig:
    """What Feast reads of the file of the Compose deployment."""
    return load_repo_config(ROOT, ROOT / "deploy" / "feature_store.yaml")


def test_feature_store_yaml_takes_secrets_from_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "valkey_password").write_text("hush\n")
    (folder / "postgres_password").write_text(ODD)
    config = deployed()
    assert config.online_store.connection_string == "valkey:6379,password=hush"
    assert "p%40ss" in config.registry.path
    assert config.registry.path == config.registry.path

    monkeypatch.setenv("VALKEY_PASSWORD", "variable")
    assert deployed().online_store.connection_string == "valkey:6379,password=variable"

    monkeypatch.delenv("VALKEY_PASSWORD")
    (folder / "valkey_password").unlink()
    with pytest.raises(FeastConfigError, match=r"connection_string names `\$\{VALKEY_PASSWORD\}`"):
        _ = deployed().online_store
