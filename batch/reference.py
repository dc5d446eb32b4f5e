"""The days before a day as they are published in the offline store, each as the profiles of its features.

A profile lies in the work folder as `profiles/<day>.json` beside the content hash of the rows that it is of. It is a
copy of what the store's own file says: where it is missing, of other rows or damaged, it is made anew from that file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch.folder import ViewFolder, read_json, write_text
from batch.profile import Profile, profile
from headrace.contract import ViewContract
from headrace.folder import DayFile, Folder
from headrace.place import File, readable

DAYS = 7
_FORMAT = 1


@dataclass(frozen=True)
class ReferenceDay:
    """A day that is published: its rows, and the profile of each feature that its file has."""

    day: date
    rows: int
    profiles: Mapping[str, Profile]


def days_before(contract: ViewContract, folder: ViewFolder, day: date) -> list[ReferenceDay]:
    """Those of the `DAYS` days before a day that are published and have rows, the newest first."""
    store = Folder.of(contract)

    def read() -> list[ReferenceDay]:
        published = store.days([day - timedelta(days=back) for back in range(1, DAYS + 1)])
        return [_of(contract, folder, found) for found in reversed(published.values()) if found.rows]

    return store.settled(read)


def keep_profiles(
    contract: ViewContract, folder: ViewFolder, day: date, content_hash: str, profiles: Mapping[str, Profile]
) -> None:
    """Keep the profiles of a day's features for the days that follow."""
    content = {
        "format": _FORMAT,
        "day": day.isoformat(),
        "content_hash": content_hash,
        "features": list(contract.features),
        "columns": {name: found.as_json() for name, found in profiles.items()},
    }
    write_text(_path(folder, day), json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")


def _of(contract: ViewContract, folder: ViewFolder, published: DayFile) -> ReferenceDay:
    kept = _kept(contract, _path(folder, published.date), published.content_hash)
    if kept is None:
        kept = _measured(contract, published.path)
        keep_profiles(contract, folder, published.date, published.content_hash, kept)
    return ReferenceDay(published.date, published.rows, kept)


def _kept(contract: ViewContract, path: Path, content_hash: str) -> dict[str, Profile] | None:
    try:
        content: dict[str, Any] = read_json(path)
        of_these = {"format": _FORMAT, "content_hash": content_hash, "features": list(contract.features)}
        if any(content[key] != value for key, value in of_these.items()):
            return None
        return {name: Profile.from_json(column) for name, column in content["columns"].items()}
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _measured(contract: ViewContract, path: File) -> dict[str, Profile]:
    """The profiles of the features that a day's file has in a type that can be had from it, column by column."""
    found = {}
    with pq.ParquetFile(readable(path)) as file:
        times = file.read([contract.timestamp_field]).column(0)
        for name in contract.features:
            if name in file.schema_arrow.names:
                with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                    values = file.read([name]).column(0).cast(contract.schema.field(name).type)
                    found[name] = profile(values, times)[0]
    return found


def _path(folder: ViewFolder, day: date) -> Path:
    return folder.path / "profiles" / f"{day}.json"
