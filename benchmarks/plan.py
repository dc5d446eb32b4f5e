"""What a number of events a second needs, by the model of `benchmarks.scale`: workers, shards, requests, money.

Nothing is measured here. What a plan assumes stands in its constants, and above the table that it makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from benchmarks.measure import GIB, MILLION, short, table
from streaming.settings import StreamSettings

MONTH_HOURS = 730
MONTH_S = MONTH_HOURS * 3600
CORE_SHARE = 0.5
"""Of a core that a worker or a shard may use on average: the rest is for peaks, and for what an outage left behind."""

MEMORY_SHARE = 0.6
"""Of a node's memory that online values may fill: a replica's copy and the fork of a snapshot want the rest."""

PARTITIONS_A_WORKER = 4
"""So that a worker that leaves is shared out evenly among the others."""

LEAST_WORKERS = 2
APPEND_S: float = StreamSettings.model_fields["append_seconds"].default
"""A partition that is never still appends so often."""

WRITES_AN_APPEND, READS_AN_APPEND = 1.0, 4.0
"""PUT; twice HEAD, and when it is merged twice GET. What is merged is put again by the thousand: left out."""

NODE_CORES, NODE_GIB = 2, 8
NODE_HOUR_USD = 0.0816
WRITES_1000_USD, READS_1000_USD = 0.005, 0.0004
GB_MONTH_USD = 0.023
PRICES = (
    "List prices of Amazon Web Services in us-east-1, June 2026, without discounts: `m7g.large` (2 vCPU, 8 GiB) "
    f"{NODE_HOUR_USD} USD an hour; S3 Standard {WRITES_1000_USD} USD for 1,000 PUT or LIST, {READS_1000_USD} USD for "
    f"1,000 GET or HEAD, {GB_MONTH_USD} USD a GB and month."
)

HEADS = (
    "events/s",
    "an event",
    "keys",
    "workers",
    "partitions",
    "online: shards, memory",
    "commands/s",
    "PUT/s",
    "history a month",
    "USD a month: workers",
    "online",
    "requests",
    "a month of history",
)

LOADS = ((10_000, MILLION), (100_000, 10 * MILLION), (MILLION, 100 * MILLION))
"""Events a second, and keys."""


@dataclass(frozen=True)
class Need:
    """What an event of a kind takes, when each is brought online for itself: of a batch no two have the same key.

    Attributes:
        worker_us, store_us: CPU of a worker and of the online store.
        commands: of the online store.
        offline_bytes: appended.
        key_bytes: what a key takes in the online store.
    """

    what: str
    worker_us: float
    store_us: float
    commands: float
    offline_bytes: float
    key_bytes: float


def rows_of(need: Need) -> list[tuple[str, ...]]:
    """The plan of a kind of event: a row for each of `LOADS`; see `HEADS`."""
    rows: list[tuple[str, ...]] = []
    for rate, keys in LOADS:
        workers = max(LEAST_WORKERS, ceil(rate * need.worker_us / 1e6 / CORE_SHARE))
        partitions = workers * PARTITIONS_A_WORKER
        by_cpu = ceil(rate * need.store_us / 1e6 / CORE_SHARE)
        by_memory = ceil(keys * need.key_bytes / (NODE_GIB * GIB * MEMORY_SHARE))
        shards = max(1, by_cpu, by_memory)
        appends = partitions / APPEND_S
        requests_usd = (
            appends * MONTH_S / 1000 * (WRITES_AN_APPEND * WRITES_1000_USD + READS_AN_APPEND * READS_1000_USD)
        )
        history_gb = rate * need.offline_bytes * MONTH_S / 1e9
        node_usd = NODE_HOUR_USD * MONTH_HOURS
        rows.append(
            (
                f"{rate:,}",
                need.what,
                short(keys),
                f"{workers}",
                f"{partitions}",
                f"{shards} ({'CPU' if by_cpu > by_memory else 'memory'}), {keys * need.key_bytes / GIB:,.1f} GiB",
                f"{rate * need.commands:,.0f}",
                f"{appends:,.1f}",
                f"{history_gb:,.0f} GB",
                f"{ceil(workers / NODE_CORES) * node_usd:,.0f}",
                f"{2 * shards * node_usd:,.0f}",
                f"{requests_usd:,.0f}",
                f"{history_gb * GB_MONTH_USD:,.0f}",
            )
        )
    return rows


def report(needs: list[Need]) -> str:
    """The table of all kinds, and the prices, as Markdown."""
    return f"{table(HEADS, [row for need in needs for row in rows_of(need)])}\n\n{PRICES}"
