"""Copies of the project's feature repository: each a complete, separate store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def copy_repository(repo: Path) -> None:
    """Copy the project's feature repository, without caches, to a folder beside which no data are."""
    shutil.copytree(ROOT / "feature_repo", repo, ignore=shutil.ignore_patterns("__pycache__"))
    (repo.parent / "data").mkdir(exist_ok=True)


def use_valkey(repo: Path, address: str, database: int | None = 0, **options: object) -> None:
    """Change the online store of a repository to the Redis one of ours, with further options of it.

    Args:
        database: None for a cluster, which has but one.
    """
    number = "" if database is None else f",db={database}"
    file = repo / "feature_store.yaml"
    lines = file.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("online_store:"))
    end = next(
        (number for number in range(start + 1, len(lines)) if lines[number][:1] not in {" ", "#", ""}),
        len(lines),
    )
    store = [
        "online_store:",
        "  type: headrace.redis.HeadraceRedisOnlineStore",
        f'  connection_string: "{address}{number}"',
        *(f"  {name}: {value}" for name, value in options.items()),
    ]
    file.write_text("\n".join([*lines[:start], *store, *lines[end:], ""]), encoding="utf-8")


def use_registry(repo: Path, url: str) -> None:
    """Change the registry of a repository to another database."""
    file = repo / "feature_store.yaml"
    text = file.read_text(encoding="utf-8")
    former = "path: sqlite:///../data/registry.db"
    if former not in text:
        raise ValueError(f"{file} has no `{former}`")
    file.write_text(text.replace(former, f"path: {url}"), encoding="utf-8")


def feast_apply(repo: Path) -> None:
    """Run `feast apply` as a person does, and fail with its own words.

    Raises:
        RuntimeError: It exited with another code than 0.
    """
    command = [sys.executable, "-m", "feast.cli.cli", "-c", str(repo), "apply"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode != 0:
        raise RuntimeError(f"`feast apply` in {repo} exited with {done.returncode}:\n{done.stdout}{done.stderr}")


def environment(**settings: object) -> dict[str, str]:
    """Return the environment of a Headrace process: what is inherited, with these settings only.

    Keyword `feature_repo` becomes `HEADRACE_FEATURE_REPO`, and so on.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    chosen = {f"HEADRACE_{name.upper()}": str(value) for name, value in settings.items()}
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **chosen}
