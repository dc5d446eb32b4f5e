"""What each task does, without Luigi: open what it needs, write its files, return what its receipt shall say.

Imports Feast and Arrow, so a task imports it in its own process only.
"""

from __future__ import annotations

import hashlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
from feast import FeatureStore

from batch.audit_report import as_json, compared, write_audit
from batch.clean import clean
from batch.explore import Findings, explore
from batch.folder import DayFolder, ViewFolder, read_json, staged
from batch.prune import prune
from batch.publish import publish
from batch.report import write_report
from batch.settings import settings
from batch.source import open_source
from batch.sources import drift
from batch.withdrawals import apply_withdrawals
from headrace.audit import Audit, audit
from headrace.chains import content_hash
from headrace.compact import compact
from headrace.contract import ViewContract, load_transform
from headrace.errors import ConfigError
from headrace.materialize import materialize_arrived
from headrace.repair import repair
from headrace.repository import contracts, open_store
from headrace.retain import retain
from headrace.sample import Sample
from headrace.segments import DICTIONARY_BYTES

logger = logging.getLogger("luigi-interface")


class Watcher(Protocol):
    """Who wants to know how it goes."""

    def say(self, message: str, progress: float | None = None) -> None:
        """A status, and how far it is in percent."""

    def say_progress(self, done: int, total: int | None, what: str) -> None:
        """How much of how much; None where the whole is not known."""


def ingest(view: str, day: date, folder: DayFolder, watcher: Watcher, *, accept_schema: bool = False) -> dict[str, Any]:
    """Read a day of the view's source to `raw.parquet`.

    Args:
        accept_schema: whether to take the source as it is where it is not what it was at the last run.

    Raises:
        ConfigError, SchemaError, TransientError: as `open_source`, `Source.read` and `batch.sources.drift`.
    """
    _, contract = _open(view)
    source = open_source(settings(), contract, day)
    of_view = ViewFolder(settings().folder, view)
    before = drift.taken(of_view, source)
    if not accept_schema:
        drift.check(before, source, contract)
    watcher.say(f"reading {source.name}")
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
        logger.info("`%s`: columns that view `%s` does not know: %s", source.name, view, names)
    lost = source.rows_of_no_day()
    drift.take(of_view, source, before)
    watcher.say(f"{rows:,} rows of {source.name}", 100)
    return {
        "table": source.name,
        "window": "drop" if source.window_column is None else settings().window,
        "window_column": source.window_column,
        "rows": rows,
        "read_us": read_us,
        "rows_of_no_day": lost,
        "ignored_columns": list(source.ignored),
        **source.describe(),
        "hash": digest,
    }


def clean_day(view: str, folder: DayFolder, watcher: Watcher) -> dict[str, Any]:
    """Turn `raw.parquet` into `kept.parquet` and `rejects.parquet`."""
    _, contract = _open(view)
    transform = load_transform(contract, settings().feature_repo)
    raw = read_json(folder.raw_receipt)
    _expect_rows(folder.raw)
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
        with ThreadPoolExecutor(1) as beside:
            digest = beside.submit(content_hash, table)
            # It is read soon and once or twice, so it is made in half the time rather than small.
            pq.write_table(table, kept, compression="lz4", dictionary_pagesize_limit=DICTIONARY_BYTES)
    duplicates = counts.duplicate_exact + counts.duplicate_key_time
    watcher.say(f"{counts.kept:,} kept, {counts.rejected:,} rejected, {duplicates:,} duplicates", 100)
    return {
        "counts": counts.as_json(),
        "read_us": raw["read_us"],
        "content_hash": digest.result(),
        "transform": None if transform is None else {"name": transform.name, "hash": transform.hash},
        "inputs": {folder.raw.name: raw["hash"]},
    }


def report(view: str, day: date, folder: DayFolder, watcher: Watcher) -> Findings:
    """Write `report.html` and `report.json`, whatever they say."""
    _, contract = _open(view)
    _expect_rows(folder.kept)
    watcher.say("looking at the rows", 10)
    findings = explore(contract, ViewFolder(settings().folder, view), folder, settings(), day)
    write_report(findings, folder)
    return findings


def publish_day(view: str, day: date, folder: DayFolder, watcher: Watcher) -> dict[str, Any]:
    """Make `kept.parquet` the day's snapshot in the offline store."""
    _, contract = _open(view)
    _expect_rows(folder.kept)
    watcher.say("publishing", 10)
    view_folder = ViewFolder(settings().folder, view)
    published = publish(contract, day, folder, view_folder, read_json(folder.clean_receipt))
    if "superseded_by" in published:
        watcher.say(f"left as it is: {published['superseded_by']} counts", 100)
    else:
        watcher.say(f"{published['rows']:,} rows, {'published' if published['changed'] else 'unchanged'}", 100)
    return published


def materialize(view: str, watcher: Watcher) -> dict[str, Any]:
    """Bring to the online store what arrived offline, and take back what corrected days no longer have."""
    store, contract = _open(view)
    watcher.say("looking for what arrived")
    done = materialize_arrived(store, contract, progress=lambda keys, total: watcher.say_progress(keys, total, "keys"))
    withdrawn = apply_withdrawals(
        store,
        contract,
        ViewFolder(settings().folder, view),
        lambda rows, total: watcher.say_progress(rows, total, "withdrawn rows"),
    )
    text = "nothing new" if done.already else f"the newest rows of {done.keys:,} keys, {done.keys_written:,} written"
    watcher.say(f"{text}; {withdrawn:,} taken back" if withdrawn else text, 100)
    return {
        "keys_taken_back": withdrawn,
        "keys": done.keys,
        "keys_written": done.keys_written,
        "days": list(done.days),
        "chains": {name: list(ends) for name, ends in done.chains.items()},
        "files": list(done.files),
        "already": done.already,
    }


def compact_view(view: str, watcher: Watcher) -> dict[str, Any]:
    """Merge what may be merged; remove what is covered for longer than the grace, and what the chain needs no more."""
    _, contract = _open(view)
    watcher.say("looking for files to merge")
    done = compact(
        contract,
        grace_s=settings().compact_grace_s,
        progress=lambda rows, total: watcher.say_progress(rows, total, "rows merged"),
    )
    chains = done.chains.values()
    pruned = prune(
        ViewFolder(settings().folder, view),
        time.time() - settings().batch_keep_days * 86_400,
        lambda: watcher.say("waiting for another run's work on a day"),
    )
    before, after = sum(chain.files_before for chain in chains), sum(chain.files_after for chain in chains)
    raised = sum(chain.files_merged + chain.files_linked for chain in chains)
    removed = sum(chain.files_deleted for chain in chains) + done.days_deleted + done.temporary_deleted
    what = f"{raised:,} files merged, {removed:,} removed; {before:,} files of chains before, {after:,} after"
    what = what if raised or removed else "nothing to merge or to remove"
    if pruned.files or pruned.runs:
        what += f"; {pruned.files:,} files of rows and {pruned.runs:,} runs of upkeep removed from the work folder"
    _conclude(view, watcher, what)
    return {**asdict(done), "pruned": asdict(pruned)}


def audit_view(view: str, folder: Path, watcher: Watcher, *, share: float, seed: int) -> Audit:
    """Compare both stores, of all keys or a share of them, and write `report.html` and `report.json`, whatever comes.

    Args:
        share: above 0; 1 is all.
        seed: which keys that are.
    """
    store, contract = _open(view)
    watcher.say("looking at the newest rows offline")
    found = audit(
        store,
        contract,
        sample=None if share == 1 else Sample(share, seed),
        progress=lambda keys, total: watcher.say_progress(keys, total, "keys compared"),
    )
    write_audit(found, contract.project, folder)
    if not found.diverged:
        _conclude(view, watcher, f"{compared(found)} compared, none differs")
    return found


def repair_view(view: str, watcher: Watcher, *, backwards: bool) -> dict[str, Any]:
    """Mend what differs, and audit again."""
    store, contract = _open(view)
    watcher.say("looking at the newest rows offline")
    done = repair(
        store,
        contract,
        backwards=backwards,
        progress=lambda keys, total: watcher.say_progress(keys, total, "keys looked at"),
    )
    after = audit(store, contract, progress=lambda keys, total: watcher.say_progress(keys, total, "keys audited again"))
    what = f"{done.mended.total():,} keys mended, {after.diverged:,} still differ"
    if done.moved:
        what += f"; {done.moved:,} were written by somebody else meanwhile"
    _conclude(view, watcher, what)
    return {
        "backwards": backwards,
        "mended": as_json(done.mended),
        "moved": done.moved,
        "keys_materialized": done.materialized.keys_written,
        "before": {"keys": done.audit.keys, "counts": as_json(done.audit.counts)},
        "after": {"keys": after.keys, "counts": as_json(after.counts)},
    }


def retain_view(view: str, at: datetime, watcher: Watcher, *, dry_run: bool) -> dict[str, Any]:
    """Remove what is older, at a time, than the view's tag `retain_days` allows. A naive time is UTC."""
    _, contract = _open(view)
    if contract.retain_days is None:
        _conclude(view, watcher, "everything is kept: the view has no tag `retain_days`")
        return {"retain_days": None}
    horizon = at.replace(tzinfo=UTC) - timedelta(days=contract.retain_days)
    watcher.say(f"looking for files older than {horizon:%Y-%m-%d %H:%M}")
    done = retain(
        contract,
        horizon,
        dry_run=dry_run,
        progress=lambda some, total: watcher.say_progress(some, total, "chains and days"),
    )
    removed = f"{done.rows:,} rows of {done.files:,} files {'would go' if dry_run else 'are gone'}"
    _conclude(view, watcher, f"before {horizon:%Y-%m-%d %H:%M}: {removed if done.files else 'no whole file'}")
    return {"retain_days": contract.retain_days, "dry_run": dry_run, **asdict(done)}


def _conclude(view: str, watcher: Watcher, what: str) -> None:
    """Say what came of it, also to who started it by hand: without a luigid there is no page."""
    logger.info("view `%s`: %s", view, what)
    watcher.say(what, 100)


def _open(view: str) -> tuple[FeatureStore, ViewContract]:
    store = open_store(settings().feature_repo)
    return store, contracts(store, [view])[0]


def _expect_rows(path: Path) -> None:
    """Refuse to go on where the rows of the step before are gone, though its receipt is there.

    Raises:
        ConfigError: names the file, and the command that reads the day again.
    """
    if not path.exists():
        msg = (
            f"{path} is gone: rows of a published day are kept for HEADRACE_BATCH_KEEP_DAYS; "
            "read the day again: luigi --module batch Backfill --start … --stop … --force-from Ingest"
        )
        raise ConfigError(msg)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
