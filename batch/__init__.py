"""The batch chain, as Luigi tasks: rows of a database to the offline and the online store.

    luigi --module batch Materialize --date 2026-01-31 [--view driver_stats]

`Ingest` → `Clean` → `ExploreAndValidate` → `OfflineStore` → `Materialize`. Each takes `--view` (default:
every view with a source) and `--date` (default: yesterday, UTC). `Backfill` does them for many days:

    luigi --module batch Backfill --start 2026-01-01 --stop 2026-02-01 --workers 4

    luigi --module batch Audit [--view driver_stats]

`Compact`, `Audit`, `Repair` and `Retain` keep the stores in order. Each takes `--view` (default: every view) and `--at`
(default: the present minute, UTC).

    luigi --module batch History

shows what ran.
"""

from __future__ import annotations

from batch import command_line

command_line.prepare()

from batch import recording, tasks  # noqa: E402 - settings of Luigi first
from batch.backfill import Backfill  # noqa: E402
from batch.history import History  # noqa: E402
from batch.tasks import Clean, ExploreAndValidate, Ingest, Materialize, OfflineStore  # noqa: E402
from batch.upkeep import Audit, Compact, Repair, Retain  # noqa: E402

recording.record(tasks.ViewTask)

__all__ = [
    "Audit",
    "Backfill",
    "Clean",
    "Compact",
    "ExploreAndValidate",
    "History",
    "Ingest",
    "Materialize",
    "OfflineStore",
    "Repair",
    "Retain",
]
