"""Publish a clean day in the offline store."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch.folder import DayFolder, ViewFolder
from batch.withdrawals import note_withdrawn
from headrace.chains import DayFile, Folder, day_files, replace_day
from headrace.contract import ViewContract
from headrace.days import remove_superseded


def publish(
    contract: ViewContract, day: date, folder: DayFolder, view: ViewFolder, clean: dict[str, Any]
) -> dict[str, Any]:
    """Make `kept.parquet` the day's snapshot, unless the present one has the same content or was read later.

    The rows that the former snapshot had and this one lacks go to `withdrawn.parquet` first, so a crash in between
    loses none: the repeat finds the snapshot published and leaves the list as it is. A day without rows that was
    never published stays so. Idempotent; one caller a day at a time in a work folder, any number in others.

    Returns:
        What the receipt shall say.
    """
    table = pq.read_table(folder.kept, schema=contract.schema)
    read_us, content = clean["read_us"], clean["content_hash"]
    present = day_files(contract, [day]).get(day)
    changed = present.content_hash != content if present is not None else table.num_rows > 0
    if present is not None and changed and present.was_read_after(read_us):
        return {"superseded_by": _others_read(present)}
    if changed and present is not None:
        note_withdrawn(contract, present.path, folder, view)
    if changed:
        footer = {"transform": clean["transform"], "inputs": clean["inputs"]}
        present = replace_day(contract, day, table, read_us=read_us, footer=footer)
        if present.content_hash != content:
            return {"superseded_by": _others_read(present)}
    elif present is not None:
        remove_superseded(Folder.of(contract), day)  # of a publication that was killed before it did
    times = pc.min_max(table.column(contract.timestamp_field)).as_py()
    return {
        "rows": table.num_rows,
        "min_event_time": times["min"],
        "max_event_time": times["max"],
        "changed": changed,
        "content_hash": content,
        "file": None if present is None else present.path.name,
        "withdrawn": pq.read_metadata(folder.withdrawn).num_rows if folder.withdrawn.exists() else 0,
        "inputs": clean["inputs"],
    }


def _others_read(day: DayFile) -> str:
    """Who published the day, of another work folder, for people."""
    moment = datetime.fromtimestamp((day.read_us or 0) / 1e6, UTC)
    return f"what another work folder read at {moment:%Y-%m-%d %H:%M:%S} (UTC)"
