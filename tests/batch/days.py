"""Days of a view that are cleaned, looked at and published by the chain's own functions, without Luigi and registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from feast import Field

from batch.clean import clean
from batch.explore import Findings, explore
from batch.folder import DayFolder, ViewFolder, staged, write_json
from batch.report import write_report
from batch.settings import BatchSettings
from batch.sources.odd import ODD
from headrace.chains import content_hash, replace_day
from headrace.contract import ViewContract
from tests.headrace.views import config, view

D = date(2026, 3, 10)
READ_US = 1_773_200_000_000_000
"""In the night after D."""


@dataclass(frozen=True)
class Days:
    """A view with its folders."""

    root: Path
    contract: ViewContract

    @classmethod
    def of(
        cls, root: Path, features: Sequence[Field], tags: Mapping[str, str] | None = None, *, created: bool = True
    ) -> Days:
        made = view(features=features, tags=tags, created=created)[1]
        return cls(root, ViewContract.from_feast(made, config(root)))

    @property
    def view(self) -> ViewFolder:
        return ViewFolder(self.root / "batch", self.contract.name)

    def folder(self, day: date) -> DayFolder:
        return self.view.day(day, day)

    def look_at(self, rows: Sequence[Mapping[str, Any]] | pa.Table, day: date = D, **changes: Any) -> Findings:
        """Clean the rows as those that were read of a day, and make the report."""
        folder = self.folder(day)
        folder.path.mkdir(parents=True, exist_ok=True)
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows))
        if table.num_columns == 0:
            table = self.contract.schema.empty_table()
        pq.write_table(table.append_column(ODD, pa.nulls(len(table), pa.string())), folder.raw)
        with staged(folder.rejects) as rejects, staged(folder.kept) as kept:
            unique, counts = clean(
                self.contract, folder.raw, rejects, now_us=READ_US, max_future_us=10**15, transform=None
            )
            pq.write_table(unique, kept)
        raw = {
            "table": "source",
            "window": "arrival",
            "window_column": "made",
            "read_us": READ_US,
            "rows_of_no_day": 0,
            "ignored_columns": [],
        }
        write_json(folder.raw_receipt, raw)
        write_json(folder.clean_receipt, {"counts": counts.as_json(), "content_hash": content_hash(unique)})
        return self.again(day, **changes)

    def again(self, day: date = D, **changes: Any) -> Findings:
        """Make the report of the same clean rows once more."""
        settings = BatchSettings(feature_repo=self.root, **changes)
        findings = explore(self.contract, self.view, self.folder(day), settings, day)
        write_report(findings, self.folder(day))
        return findings

    def publish(self, day: date) -> None:
        replace_day(self.contract, day, pq.read_table(self.folder(day).kept, schema=self.contract.schema))
