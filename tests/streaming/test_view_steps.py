"""Partitions of a view that are judged together come apart again as if each had been judged alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import TransientError
from headrace.objects import ObjectPath
from streaming.batches import Batch, Fetched
from streaming.decode import Decoded, JsonDecoder
from streaming.slices import Slice, TopicPartition
from streaming.threads import Pools
from streaming.view_steps import ViewSteps
from tests.streaming.test_decode import changed
from tests.streaming.test_lane import Bench, Fake

GOOD, BAD, TOMBSTONE = changed(id=1), b"bad", None


def fetched(partition: int, values: Sequence[bytes | None], first: int = 10) -> Fetched:
    """Every second offset of a partition."""
    records = [Fake(first + 2 * at, value, timestamp=1_000 * partition + at) for at, value in enumerate(values)]
    place = TopicPartition("topic", partition)
    piece = Slice(place, first, first + 2 * len(values), records, 7 * len(values), float(partition), left=partition)
    return Fetched("view", place, partition, f"id-{partition}", [piece], records)


def facts(batch: Batch) -> list[object]:
    """All that a batch says."""
    letters = [(each.origin, each.topic_id, each.record.offset, each.reject.reason) for each in batch.letters]
    place = [batch.epoch, batch.partition, batch.first, batch.next, batch.size, batch.fetched_s, batch.left]
    counts = [batch.skipped, batch.rejected]
    return [*place, *counts, letters, batch.table.to_pylist(), batch.offsets.tolist(), batch.produced_ms.tolist()]


def sample(bench: Bench, name: str) -> float:
    """A metric of the view."""
    return bench.health.registry.get_sample_value(name, {"view": bench.view.contract.name}) or 0.0


@given(st.lists(st.lists(st.sampled_from([GOOD, BAD, TOMBSTONE]), max_size=6), min_size=1, max_size=5))
def test_together_is_as_alone(partitions: list[list[bytes | None]]) -> None:
    asked = [fetched(number, values) for number, values in enumerate(partitions)]

    async def together(steps: ViewSteps) -> list[Batch]:
        return list(await asyncio.gather(*(steps.decode(one) for one in asked)))

    async def alone(steps: ViewSteps) -> list[Batch]:
        return [await steps.decode(one) for one in asked]

    with TemporaryDirectory() as folder:
        apart, joint = Bench(Path(folder)), Bench(Path(folder))
        names = ("headrace_events_received_total", "headrace_events_accepted_total", "headrace_events_skipped_total")
        found = asyncio.run(together(joint.steps))
        assert list(map(facts, found)) == list(map(facts, asyncio.run(alone(apart.steps))))
        values = [value for one in partitions for value in one]
        assert [sample(joint, name) for name in names] == [len(values), values.count(GOOD), values.count(TOMBSTONE)]
        assert joint.share._rejected == apart.share._rejected


def test_rows_of_one_partition_do_not_hold_the_columns_of_all(tmp_path: Path) -> None:
    async def together() -> list[Batch]:
        steps = Bench(tmp_path).steps
        return list(await asyncio.gather(steps.decode(small), steps.decode(large)))

    small, large = fetched(0, [GOOD]), fetched(1, [GOOD] * 10_000)
    batch, _ = asyncio.run(together())
    assert batch.table.num_rows == 1
    assert batch.table.get_total_buffer_size() < 10_000


def test_what_cannot_be_judged_now_holds_up_its_own_partition_alone(tmp_path: Path) -> None:
    class Asking(JsonDecoder):
        def __call__(self, values: Sequence[bytes | None]) -> Decoded:
            if b"unknown" in values:
                raise TransientError("the registry does not answer")
            return super().__call__(values)

    async def together() -> list[Batch | BaseException]:
        bench = Bench(tmp_path)
        steps = ViewSteps(
            bench.view,
            Asking(bench.view.contract),
            bench.stores,
            bench.pools,
            bench.health,
            bench.settings,
            bench.share,
        )
        asked = (fetched(0, [GOOD]), fetched(1, [GOOD, b"unknown"]), fetched(2, [GOOD, GOOD]))
        return await asyncio.gather(*(steps.decode(one) for one in asked), return_exceptions=True)

    first, second, third = asyncio.run(together())
    assert isinstance(first, Batch)
    assert isinstance(third, Batch)
    assert [first.table.num_rows, third.table.num_rows] == [1, 2]
    assert isinstance(second, TransientError)


def test_many_views_share_the_threads_in_which_nothing_waits(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    directories = [tmp_path, ObjectPath.parse("s3://bucket/prefix")] * 100
    contracts = [
        replace(bench.view.contract, name=str(number), directory=directory)
        for number, directory in enumerate(directories)
    ]
    pools = list(Pools.of(replace(bench.view, contract=contract) for contract in contracts).values())
    assert len({pool.compute for pool in pools}) == 1
    for own in ([pool.decode for pool in pools], [pool.offline for pool in pools]):
        assert len(set(own)) == len(pools)
    assert len({pool.decode.crew for pool in pools}) == 1
    assert len({pool.offline.crew for pool in pools}) == 2
    common = (bench.view, JsonDecoder(bench.view.contract), bench.stores, bench.pools, bench.health, bench.settings)
    patient, quick = (ViewSteps(*common, bench.share, may_wait=may_wait) for may_wait in (True, False))
    assert patient.thread_of("decode") is bench.pools.decode
    assert quick.thread_of("decode") is bench.pools.compute


@pytest.mark.parametrize("fails", [False, True])
def test_partitions_are_written_online_together(tmp_path: Path, *, fails: bool) -> None:
    """Where the store turns the joint write away, each has its own; what each says counts for itself."""
    calls: list[str] = []

    def fail(step: str) -> None:
        calls.append(step)
        if fails and len(calls) == 1:
            raise ConnectionError("refused")

    async def scenario() -> None:
        bench.stores.fail = fail
        batches = [await bench.steps.decode(fetched(number, [changed(id=number)])) for number in range(3)]
        await asyncio.gather(*(bench.steps.write_online(batch) for batch in batches))

    bench = Bench(tmp_path)
    names = ("headrace_online_rows_offered_total", "headrace_online_keys_written_total")
    asyncio.run(scenario())
    assert len(calls) == (4 if fails else 1)
    assert bench.stores.online == dict.fromkeys(range(3), 10)
    assert [sample(bench, name) for name in names] == [3, 3]
