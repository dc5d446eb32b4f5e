"""What `benchmarks.batch` measures in a process of its own (see `benchmarks.measure`): prepare, then run.

python -m benchmarks.batch_operations <operation>       with arguments as a line of JSON on standard input
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch.folder import DayFolder, write_json
from benchmarks.measure import Answer, Operation, serve, timed

PEER_CHUNK_ROWS = 100_000


class Silent:
    """Nobody watches."""

    def say(self, message: str, progress: float | None = None) -> None:
        """Nothing."""

    def say_progress(self, done: int, total: int | None, what: str) -> None:
        """Nothing."""


def ingest_ours(*, repo: str, url: str, view: str, day: str, folder: str) -> Callable[..., Answer]:
    """What the task `Ingest` does, without Luigi."""
    steps = _steps(repo, url)
    place = DayFolder(Path(folder))

    def run() -> Answer:
        answer: Answer = {}
        with timed(answer):
            receipt = steps.ingest(view, date.fromisoformat(day), place, Silent())
        write_json(place.raw_receipt, receipt)
        return {**answer, **_sums(place.raw)}

    return run


def ingest_pandas(*, url: str, table: str, day: str, folder: str) -> Callable[..., Answer]:
    """The same rows by `pandas.read_sql` in chunks with a server-side cursor, into one Parquet file."""
    import pandas as pd  # noqa: PLC0415 - of this side alone
    import sqlalchemy as sa  # noqa: PLC0415

    engine = sa.create_engine(url)
    begins = datetime.fromisoformat(f"{day}T00:00:00+00:00")
    query = sa.text(f"SELECT * FROM {table} WHERE made >= :begins AND made < :ends")  # noqa: S608 - our own table
    query = query.bindparams(begins=begins, ends=begins + timedelta(days=1))
    path = Path(folder) / "raw.parquet"

    def run() -> Answer:
        answer: Answer = {}
        with timed(answer), engine.connect().execution_options(stream_results=True) as connection:
            writer = None
            for frame in pd.read_sql(query, connection, chunksize=PEER_CHUNK_ROWS):
                chunk = pa.Table.from_pandas(frame, preserve_index=False)
                writer = writer or pq.ParquetWriter(path, chunk.schema, compression="zstd")
                writer.write_table(chunk)
            assert writer is not None  # noqa: S101 - the table has rows
            writer.close()
        return {**answer, **_sums(path)}

    return run


def clean_ours(*, repo: str, url: str, view: str, day: str, folder: str) -> Callable[..., Answer]:
    """What `Clean` and `OfflineStore` do, without Luigi, from the raw file of `ingest_ours`."""
    steps = _steps(repo, url)
    place = DayFolder(Path(folder))

    def run() -> Answer:
        answer: Answer = {}
        with timed(answer):
            receipt = steps.clean_day(view, place, Silent())
            write_json(place.clean_receipt, receipt)
            published = steps.publish_day(view, date.fromisoformat(day), place, Silent())
        counts = receipt["counts"]
        return {**answer, "read": counts["read"], "rows": published["rows"], "rejected": counts["rejected"]}

    return run


def clean_pandas(*, raw: str, folder: str) -> Callable[..., Answer]:
    """The same by pandas: types, rules, the newest of equal key and time, sorted, one Parquet file."""
    import pandas as pd  # noqa: PLC0415 - of this side alone

    def run() -> Answer:
        answer: Answer = {}
        with timed(answer):
            frame = pd.read_parquet(raw)
            read = len(frame)
            required = frame[["trip_id", "happened"]].notna().all(axis=1)
            fits = frame["fare"].isna() | frame["fare"].between(0, 1_000)
            fits &= frame["distance_km"].isna() | frame["distance_km"].between(0, 1_000)
            good = frame[required & fits]
            unique = good.sort_values(["happened", "trip_id", "made"]).drop_duplicates(
                ["happened", "trip_id"], keep="last"
            )
            unique = unique.astype({"fare": "float32", "distance_km": "float64", "passengers": "Int32"})
            unique.to_parquet(Path(folder) / "clean.parquet", compression="zstd", index=False)
        return {**answer, "read": read, "rows": len(unique), "rejected": read - len(good)}

    return run


def _steps(repo: str, url: str) -> Any:
    os.environ.update(HEADRACE_FEATURE_REPO=repo, HEADRACE_SOURCE_URL=url)
    from batch import steps  # noqa: PLC0415 - imports Feast, of our side alone

    return steps


def _sums(path: Path) -> dict[str, Any]:
    """What both sides must agree on."""
    table = pq.read_table(path, columns=["trip_id", "fare", "happened"])
    times = table["happened"].cast(pa.timestamp("us", "UTC")).cast(pa.int64())
    return {
        "rows": table.num_rows,
        "keys": pc.sum(table["trip_id"]).as_py(),
        "fares": round(pc.sum(table["fare"]).as_py() or 0.0, 2),
        "times": pc.sum(pc.divide(times, 1_000_000)).as_py(),
        "file_bytes": path.stat().st_size,
    }


OPERATIONS: dict[str, Operation] = {
    "ingest-ours": ingest_ours,
    "ingest-pandas": ingest_pandas,
    "clean-ours": clean_ours,
    "clean-pandas": clean_pandas,
}

if __name__ == "__main__":
    serve(OPERATIONS)
