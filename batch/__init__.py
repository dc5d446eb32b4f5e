"""The batch chain, as Luigi tasks: rows of a database to the offline and the online store.

    luigi --module batch Materialize --date 2026-01-31 [--view driver_stats]

`Ingest` → `Clean` → `ExploreAndValidate` → `OfflineStore` → `Materialize`. Each takes `--view` (default:
every view with a source table) and `--date` (default: yesterday, UTC).

    luigi --module batch History

shows what ran.
"""

from __future__ import annotations

from batch import command_line

command_line.prepare()

from batch import recording, tasks  # noqa: E402 - settings of Luigi first
from batch.history import History  # noqa: E402
from batch.tasks import Clean, ExploreAndValidate, Ingest, Materialize, OfflineStore  # noqa: E402

recording.record(tasks.ChainTask)

__all__ = ["Clean", "ExploreAndValidate", "History", "Ingest", "Materialize", "OfflineStore"]
