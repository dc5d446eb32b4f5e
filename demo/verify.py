"""Whether the stream, the batch chain and both stores agree, as a table.

    python -m demo.verify --worker http://127.0.0.1:6066

Called by `make demo`, while its broker and worker run. Waits until the emitter has ended (`--emitted`) and the
worker has drained the topic: events that still flow cannot be counted. Exits 0 only if all counts agree and every
online value equals the latest offline one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sqlite3
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.request import urlopen

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Consumer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from demo.place import ADDRESS_FILE, DATABASE, DEAD_LETTERS, ROOT, TOPIC, WORKER_PORT
from headrace.chains import Folder, StreamLedger, day_files
from headrace.offline import latest
from headrace.repository import contracts, open_store
from headrace.segments import parse_stream_chain, read_accepted, read_footer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from feast import FeatureStore

    from headrace.contract import ViewContract

DRAIN_TIMEOUT_S = 60.0
EMIT_TIMEOUT_S = 120.0
CHUNK_KEYS = 500
WIDTH = 32
FRESHNESS = "headrace_freshness_seconds_bucket"


@dataclass(frozen=True)
class Stream:
    """What became of the events of the present epoch."""

    emitted: Mapping[str, Any]
    sent: int
    accepted: int
    rejected: int
    skipped: int
    letters: Mapping[str, int]

    @property
    def agrees(self) -> bool:
        """Whether every event was accepted, is a dead letter, or was skipped, each exactly once."""
        is_complete = self.sent == self.accepted + self.rejected + self.skipped
        is_told = not self.emitted or self.emitted["sent"] == self.sent
        return is_complete and is_told and self.rejected == sum(self.letters.values())


@dataclass(frozen=True)
class Batch:
    """What became of the rows of the days that the batch chain published."""

    days: Sequence[date]
    read: int
    clean: int
    offline: int

    @property
    def agrees(self) -> bool:
        """Whether each clean row, by a count of the source itself, is offline exactly once."""
        return bool(self.days) and self.clean == self.offline


@dataclass(frozen=True)
class Online:
    """The online store beside the latest of the offline store."""

    keys: int
    differences: Sequence[str]


def drain(contract: ViewContract, broker: str) -> int:
    """Wait until the ledger of every partition ends where its log does; return the events in the logs.

    Raises:
        TimeoutError: Says which partition is behind.
    """
    logs = watermarks(broker, TOPIC)
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    for partition, (_, high) in logs.items():
        ledger = StreamLedger(contract, TOPIC, partition)
        while (end := ledger.end().end) < high:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{TOPIC}[{partition}] is drained to {end} of {high} after {DRAIN_TIMEOUT_S:.0f} s; "
                    "the worker's log says why"
                )
            time.sleep(0.1)
    return sum(high - low for low, high in logs.values())


def wait_for_emitter(file: Path) -> dict[str, Any]:
    """Wait until the emitter has printed its line of JSON, and return it.

    Raises:
        TimeoutError: It has not.
    """
    deadline = time.monotonic() + EMIT_TIMEOUT_S
    while time.monotonic() < deadline:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("{") and line.endswith("}"):
                told: dict[str, Any] = json.loads(line)
                return told
        time.sleep(0.1)
    raise TimeoutError(f"the emitter did not end within {EMIT_TIMEOUT_S:.0f} s; see {file}")


def watermarks(broker: str, topic: str) -> dict[int, tuple[int, int]]:
    """Return where the log of each partition begins and ends."""
    consumer = consumer_of(broker)
    try:
        found = consumer.list_topics(topic, timeout=10.0).topics[topic].partitions
        return {part: consumer.get_watermark_offsets(TopicPartition(topic, part), timeout=10.0) for part in found}
    finally:
        consumer.close()


def consumer_of(broker: str) -> Consumer:
    """Return a consumer that commits nothing and belongs to no group that works."""
    return Consumer(
        {
            "bootstrap.servers": broker,
            "group.id": "headrace-demo-verify",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "log_level": 0,
        }
    )


def dead_letters(broker: str) -> Counter[str]:
    """Count the dead letters by reason; the same origin twice is one."""
    logs = watermarks(broker, DEAD_LETTERS)
    wanted = {part: high for part, (low, high) in logs.items() if high > low}
    consumer = consumer_of(broker)
    reasons: dict[tuple[str, str], str] = {}
    try:
        consumer.assign([TopicPartition(DEAD_LETTERS, part, logs[part][0]) for part in wanted])
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while wanted and time.monotonic() < deadline:
            for message in consumer.consume(1_000, timeout=0.5):
                partition, offset = message.partition(), message.offset()
                if message.error() is not None or partition is None or offset is None:
                    continue
                headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
                letter = {name: (value or b"").decode() for name, value in headers}
                origin = letter["headrace.partition"], letter["headrace.offset"]
                reasons[origin] = letter["headrace.reason"]
                if offset + 1 >= wanted.get(partition, 0):
                    wanted.pop(partition, None)
    finally:
        consumer.close()
    return Counter(reasons.values())


def stream(contract: ViewContract, broker: str, sent: int, emitted: Mapping[str, Any]) -> Stream:
    """Count what the footers of the present epoch say, and the dead letters."""
    folder = Folder(contract.directory)
    accepted = rejected = skipped = 0
    for name, chain in folder.chains().items():
        parsed = parse_stream_chain(name)
        if parsed is None or parsed[0] != TOPIC:
            continue
        _, partition, epoch = parsed
        if epoch != StreamLedger(contract, TOPIC, partition).end().epoch:
            continue
        for segment in chain.valid:
            path = folder.path_of(segment)
            mark = read_footer(path)
            accepted += len(read_accepted(path))
            rejected += mark.rejected
            skipped += mark.skipped
    return Stream(emitted, sent, accepted, rejected, skipped, dead_letters(broker))


def batch(contract: ViewContract) -> Batch:
    """Count the published days, and in the source database what they should have."""
    days = day_files(contract)
    offline = sum(day.rows for day in days.values())
    read = clean = 0
    connection = sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True)
    try:
        for day in days:
            bounds = (str(day), str(day + timedelta(days=1)))
            read += count(connection, "driver_stats WHERE created >= ? AND created < ?", bounds)
            clean += count(
                connection,
                "(SELECT DISTINCT * FROM driver_stats WHERE created >= ? AND created < ? "
                "AND driver_id IS NOT NULL AND datetime IS NOT NULL AND conv_rate BETWEEN 0 AND 1 "
                "AND acc_rate BETWEEN 0 AND 1 AND avg_daily_trips >= 0)",
                bounds,
            )
    finally:
        connection.close()
    return Batch(sorted(days), read, clean, offline)


def count(connection: sqlite3.Connection, source: str, bounds: tuple[str, str]) -> int:
    """Count the rows of a FROM clause."""
    found: int = connection.execute(f"SELECT count(*) FROM {source}", bounds).fetchone()[0]
    return found


def online(store: FeatureStore, contract: ViewContract, newest: pa.Table) -> Online:
    """Compare every value that the online store serves with the latest one offline."""
    differences: list[str] = []
    keys = 0
    for rows in chunks(newest):
        served = serve(store, contract, [{key: row[key] for key in contract.join_keys} for row in rows])
        for index, row in enumerate(rows):
            found = {feature: served[feature][index] for feature in contract.features}
            keys += any(value is not None for value in found.values())
            differences.extend(
                f"{ {key: row[key] for key in contract.join_keys} } {feature}: online {found[feature]!r}, "
                f"latest offline {row[feature]!r}"
                for feature in contract.features
                if not is_same(found[feature], row[feature])
            )
    return Online(keys, differences)


def serve(store: FeatureStore, contract: ViewContract, keys: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Ask Feast for all features of some keys."""
    names = [f"{contract.name}:{feature}" for feature in contract.features]
    answer: dict[str, list[Any]] = store.get_online_features(features=names, entity_rows=keys).to_dict()
    return answer


def chunks(table: pa.Table) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a table, some at a time."""
    for start in range(0, table.num_rows, CHUNK_KEYS):
        yield table.slice(start, CHUNK_KEYS).to_pylist()


def is_same(one: object, other: object) -> bool:
    """Return whether two values are equal; NaN equals NaN."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return one == other


def report(contract: ViewContract, day: date) -> Path:
    """Return where the batch chain left its report of a day."""
    return ROOT / "data" / "batch" / contract.name / f"run={day}" / f"day={day}" / "report.html"


def freshness(url: str, view: str) -> dict[tuple[str, float], float]:
    """Return seconds by store and share, from the worker's histogram, interpolated within its buckets."""
    with urlopen(f"{url}/metrics", timeout=10.0) as response:  # noqa: S310 - the worker's address
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.name == FRESHNESS]
    found: dict[tuple[str, float], float] = {}
    for store in ("online", "offline"):
        buckets = [
            (float(sample.labels["le"]), sample.value)
            for sample in samples
            if sample.labels["view"] == view and sample.labels["store"] == store
        ]
        for share in (0.5, 0.99):
            found[store, share] = quantile(sorted(buckets), share)
    return found


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """Return a quantile of a cumulative histogram: pairs of upper bound and count, ascending.

    NaN without events, infinity beyond the last finite bound.
    """
    if not buckets or not buckets[-1][1]:
        return math.nan
    wanted = share * buckets[-1][1]
    low, before = 0.0, 0.0
    for bound, reached in buckets:
        if reached >= wanted:
            return low + (bound - low) * (wanted - before) / max(reached - before, 1.0) if bound < math.inf else bound
        low, before = bound, reached
    return math.inf


def newest_event(contract: ViewContract, newest: pa.Table) -> dict[str, Any]:
    """Return the row with the newest event time."""
    order = pc.sort_indices(newest, sort_keys=[(contract.timestamp_field, "descending")])
    row: dict[str, Any] = newest.take(order[:1]).to_pylist()[0]
    return row


def training_frame(store: FeatureStore, contract: ViewContract, newest: pa.Table) -> pd.DataFrame:
    """Return five rows of a point-in-time join: five entities, each as of another time of the last day."""
    rows = newest.slice(0, 5).select(list(contract.join_keys)).to_pandas()
    now = datetime.now(UTC).replace(microsecond=0)
    rows["event_timestamp"] = [now - timedelta(hours=6 * back) for back in range(len(rows))]
    names = [f"{contract.name}:{feature}" for feature in contract.features]
    frame: pd.DataFrame = store.get_historical_features(entity_df=rows, features=names).to_df()
    return frame


class Table:
    """Aligned lines in sections, for a terminal."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def section(self, title: str) -> None:
        """Begin a section."""
        self._lines.extend(["", title, "-" * 78])

    def row(self, label: str, value: object, note: str = "") -> None:
        """Add a line: what, how much, and what to say of it."""
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        self._lines.append(f"  {label:<{WIDTH}}{shown:>14}  {note}".rstrip())

    def text(self, text: str) -> None:
        """Add lines as they are, indented."""
        self._lines.extend(f"  {line}" for line in text.splitlines())

    def __str__(self) -> str:
        return "\n".join(self._lines)


def show(contract: ViewContract, found: tuple[Stream, Batch, Online], table: Table) -> bool:
    """Add the counts and the comparison to the table; return whether all of it agrees."""
    events, rows, served = found
    table.section("Events, this run")
    made = events.emitted
    bad = sum(made.get("bad", {}).values())
    note = f"{made['late']:,} late, {made['doubled']:,} doubled, {bad:,} bad" if made else ""
    table.row("sent", events.sent, note)
    table.row("accepted, offline exactly once", events.accepted)
    table.row("dead letters", events.rejected, f"in {DEAD_LETTERS}, by reason:")
    for reason, letters in sorted(events.letters.items()):
        table.row(f"  {reason}", letters)
    table.row("skipped", events.skipped)
    table.row("sent = accepted + dead + skipped", verdict(events.agrees))

    table.section("Offline store, all runs")
    stream_rows = latest_rows(contract)
    table.row("rows from the stream", stream_rows)
    days = f"{rows.days[0]} to {rows.days[-1]}" if rows.days else "no day"
    table.row("rows from the batch chain", rows.offline, f"{days}, of {rows.read:,} read")
    table.row("clean rows of these days, by SQL", rows.clean, "in the source database")
    table.row("batch rows = clean rows", verdict(rows.agrees))

    table.section("Online store")
    table.row("keys", served.keys)
    table.row("every value = latest offline", verdict(not served.differences))
    for difference in served.differences[:5]:
        table.text(difference)
    return events.agrees and rows.agrees and not served.differences


def latest_rows(contract: ViewContract) -> int:
    """Count the rows of all stream chains."""
    folder = Folder(contract.directory)
    return sum(
        len(read_accepted(folder.path_of(segment)))
        for name, chain in folder.chains().items()
        if parse_stream_chain(name) is not None
        for segment in chain.valid
    )


def verdict(is_right: bool) -> str:
    """Return how a comparison came out, for a person."""
    return "yes" if is_right else "NO"


def main() -> int:
    """Wait, compare, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m demo.verify", description="Compare the stores.")
    parser.add_argument("--worker", default=f"http://127.0.0.1:{WORKER_PORT}", help="address of the worker's pages")
    parser.add_argument("--emitted", type=Path, metavar="FILE", help="what the emitter prints; waits for its end")
    arguments = parser.parse_args()
    broker = os.environ.get("HEADRACE_BROKER") or ADDRESS_FILE.read_text(encoding="utf-8").strip()
    store = open_store(ROOT / "feature_repo")
    (contract,) = contracts(store, ["driver_stats"])
    try:
        emitted = {} if arguments.emitted is None else wait_for_emitter(arguments.emitted)
        sent = drain(contract, broker)
    except TimeoutError as exc:
        print(f"not drained: {exc}")
        return 1
    newest = latest(store, contract)
    table = Table()
    found = stream(contract, broker, sent, emitted), batch(contract), online(store, contract, newest)
    agrees = show(contract, found, table)

    table.section("Freshness, from Kafka's timestamp to readable")
    seconds = freshness(arguments.worker, contract.name)
    for name in ("online", "offline"):
        table.row(f"{name}, p50 and p99", f"{seconds[name, 0.5]:.2f} s", f"{seconds[name, 0.99]:.2f} s")

    event = newest_event(contract, newest)
    keys = {key: event[key] for key in contract.join_keys}
    served = serve(store, contract, [keys])
    table.section(f"The newest event, of {', '.join(f'{key} {value}' for key, value in keys.items())}")
    table.row("", "event", f"{'get_online_features':>20}")
    for feature in contract.features:
        table.row(feature, f"{event[feature]:.6g}", f"{served[feature][0]:>20.6g}")
    table.row(contract.timestamp_field, f"{event[contract.timestamp_field]:%H:%M:%S}")

    table.section("Five rows of a training frame, each as of its event_timestamp")
    table.text(training_frame(store, contract, newest).to_string(index=False))

    days = batch(contract).days
    if days:
        table.section("To look at")
        table.row("report of the batch chain", "", str(report(contract, days[-1]).relative_to(ROOT)))
    print(table)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
