"""What each task does, without Luigi: open what it needs, write its files, return what its receipt shall say.

Imports Feast and Arrow, so a task imports it in its own process only.
"""

from __future__ import annotations

import hashlib
import logging
import time
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
from feast import FeatureStore

from batch.clean import clean
from batch.folder import DayFolder, read_json, staged
from batch.publish import publish
from batch.report import Findings, explore, write_report
from batch.settings import settings
from batch.source import open_source
from headrace.chains import content_hash
from headrace.contract import ViewContract, load_transform
from headrace.materialize import materialize_arrived
from headrace.repository import contracts, open_store

logger = logging.getLogger("luigi-interface")


class Watcher(Protocol):
    """Who wants to know how it goes."""

    def say(self, message: str, progress: float | None = None) -> None:
        """A status, and how far it is in percent."""

    def say_progress(self, done: int, total: int | None, what: str) -> None:
        """How much of how much; None where the whole is not known."""


def ingest(view: str, day: date, folder: DayFolder, watcher: Watcher) -> dict[str, Any]:
    """Read a day of the view's table to `raw.parquet`.

    Raises:
        ConfigError, SchemaError, TransientError: as `open_source` and `Source.read`.
    """
    _, contract = _open(view)
    source = open_source(settings(), contract)
    watcher.say(f"reading table {source.table}")
    read_us = time.time_ns() // 1000
    rows = 0
    with staged(folder.raw) as path:
        with pq.ParquetWriter(path, source.schema, compression="zstd") as writer:
            for chunk in source.read(day, settings().chunk_rows):
                writer.write_table(chunk)
                rows += chunk.num_rows
                watcher.say_progress(rows, None, "rows read")
        digest = _hash(path)
    if source.ignored:
        names = ", ".join(source.ignored)
        logger.info("table `%s`: columns that view `%s` does not know: %s", source.table, view, names)
    lost = source.rows_of_no_day()
    watcher.say(f"{rows:,} rows of table {source.table}", 100)
    return {
        "table": source.table,
        "window": settings().window,
        "window_column": source.window_column,
        "rows": rows,
        "read_us": read_us,
        "rows_of_no_day": lost,
        "ignored_columns": list(source.ignored),
        "hash": digest,
    }


def clean_day(view: str, folder: DayFolder, watcher: Watcher) -> dict[str, Any]:
    """Turn `raw.parquet` into `kept.parquet` and `rejects.parquet`."""
    _, contract = _open(view)
    transform = load_transform(contract, settings().feature_repo)
    raw = read_json(folder.raw_receipt)
    with staged(folder.rejects) as rejects, staged(folder.kept) as kept:
        table, counts = clean(
            contract,
            folder.raw,
            rejects,
            now_us=raw["read_us"],
            max_future_us=round(settings().max_future_s * 1_000_000),
            transform=transform,
            progress=lambda done, total: watcher.say_progress(done, total, "rows"),
        )
        pq.write_table(table, kept, compression="zstd")
    duplicates = counts.duplicate_exact + counts.duplicate_key_time
    watcher.say(f"{counts.kept:,} kept, {counts.rejected:,} rejected, {duplicates:,} duplicates", 100)
    return {
        "counts": counts.as_json(),
        "read_us": raw["read_us"],
        "content_hash": content_hash(table),
        "transform": None if transform is None else {"name": transform.name, "hash": transform.hash},
        "inputs": {folder.raw.name: raw["hash"]},
    }


def report(view: str, day: date, folder: DayFolder, watcher: Watcher) -> Findings:
    """Write `report.html` and `report.json`, whatever they say."""
    _, contract = _open(view)
    watcher.say("looking at the rows", 10)
    findings = explore(contract, folder, settings(), day)
    write_report(findings, folder)
    return findings


def publish_day(view: str, day: date, folder: DayFolder, watcher: Watcher) -> dict[str, Any]:
    """Make `kept.parquet` the day's snapshot in the offline store."""
    _, contract = _open(view)
    watcher.say("publishing", 10)
    published = publish(contract, day, folder, read_json(folder.clean_receipt))
    watcher.say(f"{published['rows']:,} rows, {'published' if published['changed'] else 'unchanged'}", 100)
    return published


def materialize(view: str, watcher: Watcher) -> dict[str, Any]:
    """Bring to the online store what arrived offline."""
    store, contract = _open(view)
    watcher.say("looking for what arrived")
    done = materialize_arrived(store, contract, progress=lambda keys, total: watcher.say_progress(keys, total, "keys"))
    keys = f"the newest rows of {done.keys:,} keys, {done.keys_written:,} written"
    watcher.say("nothing new" if done.already else keys, 100)
    return {
        "keys": done.keys,
        "keys_written": done.keys_written,
        "days": list(done.days),
        "chains": {name: list(ends) for name, ends in done.chains.items()},
        "files": list(done.files),
        "already": done.already,
    }


def _open(view: str) -> tuple[FeatureStore, ViewContract]:
    store = open_store(settings().feature_repo)
    return store, contracts(store, [view])[0]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
