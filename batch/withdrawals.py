"""Rows that a corrected day no longer has leave the online store too.

Newest-wins alone could never take them back. So before `OfflineStore` replaces a snapshot, the rows that only the
former one has go to `withdrawn.parquet` beside the receipts, and, by a link, to a note named after the former snapshot:

    <batch_folder>/<view>/withdrawn/<name of the former snapshot>

So they stay when the same day is done anew before, in the same run. `Materialize` takes the notes whose snapshot was
replaced, sets each key that still has one of the rows to its newest row offline, and removes the note last. That is
right whenever and however often it is done, so a crash between any two steps costs a repeat.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore

from batch.folder import DayFolder, ViewFolder, staged
from headrace.chains import day_files
from headrace.contract import ViewContract
from headrace.online import NewestWinsStore, online_store
from headrace.place import File, readable
from headrace.repair import withdraw
from headrace.scan import connection, quoted
from headrace.segments import DayName, parse_name

logger = logging.getLogger("luigi-interface")

_ROWS_AT_ONCE = 100_000


def note_withdrawn(contract: ViewContract, former: File, day: DayFolder, view: ViewFolder) -> None:
    """Write the rows of a snapshot that `kept.parquet` lacks, if any, and the note. Equal rows count one by one.

    They are in the order of event time and key, as in the snapshot, and have the columns that both files have. Call it
    before the snapshot is replaced, under the day's lock. Atomic, idempotent.
    """
    there = set(pq.read_schema(readable(former)).names)
    names = [name for name in contract.schema.names if name in there]  # fewer if the view was given a feature since
    columns = ", ".join(map(quoted, names))
    with connection(None, [former]) as con:
        gone: pa.Table = con.sql(
            f"SELECT {columns} FROM read_parquet(?, hive_partitioning = false) "  # noqa: S608 - names are quoted
            f"EXCEPT ALL SELECT {columns} FROM read_parquet(?, hive_partitioning = false)",
            params=[str(former), str(day.kept)],
        ).to_arrow_table()
    note = view.withdrawals / former.name
    if not gone.num_rows:
        note.unlink(missing_ok=True)  # of a try that was going to replace the snapshot by other rows
        return
    order = (contract.timestamp_field, *contract.join_keys)
    gone = gone.sort_by([(name, "ascending") for name in order if name in there])
    with staged(day.withdrawn) as path:
        pq.write_table(gone.cast(pa.schema(map(contract.schema.field, names))), path, compression="zstd")
    with staged(note) as path:
        path.hardlink_to(day.withdrawn)


def apply_withdrawals(
    store: FeatureStore, contract: ViewContract, view: ViewFolder, progress: Callable[[int, int], None]
) -> int:
    """Take back online what replaced snapshots had, and return how many keys changed. Idempotent.

    An online store that is not ours keeps no order by which a row could be recognised: it is left alone.

    Args:
        progress: called with rows done and rows in all of a list, after each chunk.
    """
    if not isinstance(online_store(store), NewestWinsStore):
        return 0
    notes = {path: name.day for path, name in _snapshots(view.withdrawals)}
    present = {file.path.name for file in day_files(contract, set(notes.values())).values()} if notes else set()
    taken = 0
    for note in notes:
        if note.name in present:
            continue  # OfflineStore was cut off before it replaced it
        taken += _take_back(store, contract, note, progress)
        note.unlink()
    return taken


def _snapshots(folder: Path) -> list[tuple[Path, DayName]]:
    found = [(path, parse_name(path.name)) for path in sorted(folder.glob("*.parquet"))]
    return [(path, name) for path, name in found if isinstance(name, DayName)]


def _take_back(store: FeatureStore, contract: ViewContract, path: Path, progress: Callable[[int, int], None]) -> int:
    taken = done = 0
    with pq.ParquetFile(path) as file:
        known = set(file.schema_arrow.names)
        names = [field.name for field in contract.schema if field.name not in contract.features]
        if not known.issuperset(names):
            logger.warning("view `%s` has other keys since it lost rows (%s): `Audit` tells", contract.name, path)
            return 0
        schema = pa.schema(map(contract.schema.field, names))
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=names):
            rows = pa.Table.from_batches([batch]).select(names).cast(schema)
            taken += withdraw(store, contract, rows).total()
            done += batch.num_rows
            progress(done, file.metadata.num_rows)
    return taken
