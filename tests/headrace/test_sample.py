"""Samples of keys: the same choice offline and online, and a sampled audit that says what a full one would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from feast import FeatureView, ValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.audit import Kind, audit
from headrace.chains import push
from headrace.contract import TIMESTAMP, ViewContract
from headrace.encode import encode_keys
from headrace.errors import ConfigError
from headrace.materialize import materialize_arrived
from headrace.online import write_online
from headrace.sample import Sample, decode_keys
from tests.headrace.test_encode import KEYS, column_of, mapped
from tests.headrace.views import applied, examples, redis_online, rows, sqlite_online, view

ALL_KINDS = tuple(KEYS)


def seconds(table: pa.Table) -> pa.Table:
    """The same with times rounded down to seconds, as keys have them."""
    for number, field in enumerate(table.schema):
        if field.type == TIMESTAMP:
            whole = np.floor_divide(table.column(number).cast(pa.int64()).to_numpy(), 1_000_000) * 1_000_000
            table = table.set_column(number, field, pa.array(whole).cast(TIMESTAMP))
    return table


def keys_of(contract: ViewContract, values: list[tuple[Any, ...]]) -> pa.Table:
    names = {contract.view_name(name): name for name in contract.join_keys}
    columns = [names[column_of(kind)] for kind in ALL_KINDS[-len(names) :]]
    table = rows(contract, [{"at": 0, **dict(zip(columns, row, strict=True))} for row in values])
    return table.select(list(contract.join_keys))


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_keys_come_back_from_their_serialized_form(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kinds = ALL_KINDS[-data.draw(st.integers(1, len(KEYS))) :]
    contract = mapped(tmp_path_factory.getbasetemp() / "keys", kinds)
    values = data.draw(st.lists(st.tuples(*(KEYS[kind] for kind in kinds)), max_size=5))
    table = keys_of(contract, values)
    keys: list[bytes] = encode_keys(contract, table).to_pylist()
    back, is_read = decode_keys(contract, keys)
    assert is_read.all()
    assert back.equals(seconds(table))

    damaged = [*keys, *data.draw(st.lists(st.binary(max_size=60), max_size=3))]
    for key in keys:
        at = data.draw(st.integers(0, len(key) - 1))
        damaged += [
            key[:at],
            key + b"\x00",
            key[:at] + bytes([key[at] ^ (1 << data.draw(st.integers(0, 7)))]) + key[at + 1 :],
        ]
    back, is_read = decode_keys(contract, damaged)
    again = iter(encode_keys(contract, back).to_pylist())
    assert [next(again) if good else None for good in is_read] == [
        key if good else None for key, good in zip(damaged, is_read, strict=True)
    ]
    assert is_read[: len(keys)].all()
    assert not is_read[[i for i, key in enumerate(damaged) if len(key) < 8]].any()


@settings(max_examples=examples(30), deadline=None)
@given(
    values=st.lists(st.tuples(*KEYS.values()), max_size=40),
    seed=st.integers(0, 2**63 - 1),
    share=st.floats(0.05, 0.95),
)
def test_offline_and_online_the_same_keys_are_chosen(
    values: list[tuple[Any, ...]], seed: int, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    contract = mapped(tmp_path_factory.getbasetemp() / "keys", ALL_KINDS)
    table = keys_of(contract, values)
    sample = Sample(share, seed)
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        columns = [f"c{i}" for i in range(table.num_columns)]
        con.register("offline", table.rename_columns(columns))
        offline = con.sql(f"FROM offline WHERE {sample.condition(contract, columns)}").to_arrow_table()
        keys = encode_keys(contract, table).to_pylist()
        online = sample.chosen(con, contract, keys)
    chosen = offline.rename_columns(table.column_names).cast(table.schema)
    assert Counter(online) == Counter(encode_keys(contract, chosen).to_pylist())


def test_what_is_no_key_of_the_view_is_in_every_sample(tmp_path: Path) -> None:
    contract = mapped(tmp_path, (ValueType.STRING,))
    good: list[bytes] = encode_keys(contract, keys_text(contract, "a", "b")).to_pylist()
    text = encode_keys(contract, keys_text(contract, "xyz")).to_pylist()[0].replace(b"xyz", b"\xff\xfe\xfd")
    strange = [b"", b"\x01", good[0][:-1], good[0] + b"x", text]
    with duckdb.connect() as con:
        assert Sample(1e-12, 1).chosen(con, contract, [*good, *strange]) == strange
        assert Sample(1e-12, 1).chosen(con, contract, good) == []


def keys_text(contract: ViewContract, *values: str) -> pa.Table:
    return pa.table({contract.join_keys[0]: pa.array(values, pa.string())})


def test_each_key_comes_up_with_the_probability_that_is_claimed(tmp_path: Path) -> None:
    """A million keys; the seeds are minutes, an hour apart. The bounds are six standard deviations wide."""
    contract = mapped(tmp_path, (ValueType.INT64,))
    with duckdb.connect() as con:
        con.execute("CREATE TABLE keys AS SELECT range AS c0, 0 AS times FROM range(1_000_000)")
        for run in range(100):
            condition = Sample(0.01, 30_000_000 + 60 * run).condition(contract, ["c0"])
            con.execute(f"UPDATE keys SET times = times + 1 WHERE {condition}")
        counts = dict(con.execute("SELECT times, count(*) FROM keys GROUP BY times").fetchall())
    never = counts.get(0, 0) / 1_000_000
    assert abs(never - 0.99**100) < 6 * (0.366 * 0.634 / 1_000_000) ** 0.5
    mean = sum(times * count for times, count in counts.items()) / 1_000_000
    assert abs(mean - 1) < 6 * (100 * 0.01 * 0.99 / 1_000_000) ** 0.5


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan"), float("inf")])
def test_a_share_out_of_bounds_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="expected a share above 0 and below 1"):
        Sample(share, 1)


@pytest.mark.parametrize("kind", ["sqlite", "valkey"])
def test_samples_say_of_their_keys_what_a_full_audit_says(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two join keys, one of them text; missing and extra keys; what no sample of many has is in none."""
    online = sqlite_online()
    if kind == "valkey":
        databases: Iterator[int] = request.getfixturevalue("valkey_databases")
        online = redis_online(request.getfixturevalue("valkey"), next(databases))
    made = view(keys={"name": ValueType.STRING, "id": ValueType.INT64})
    store, (contract,) = applied(tmp_path, online, made)

    def row(number: int) -> dict[str, Any]:
        return {"name": f"ä{number}", "id": number, "at": 10, "made": 10, "value": 1.0, "count": number}

    push(contract, rows(contract, [row(number) for number in range(300)]))
    materialize_arrived(store, contract)
    write_online(store, contract, rows(contract, [row(1000 + number) for number in range(30)]))
    whole = audit(store, contract, examples=1000)
    assert whole.counts == {Kind.EQUAL: 300, Kind.EXTRA: 30}
    seen: set[int] = set()
    for seed in range(40):
        sample = Sample(0.2, seed)
        part = audit(store, contract, sample=sample, examples=1000)
        wanted = ids(contract, sample, [*range(300), *range(1000, 1030)], row)
        extra = {example.key["id"] for example in part.examples.get(Kind.EXTRA, [])}
        assert extra == {number for number in wanted if number >= 1000}
        assert (part.keys, part.counts[Kind.EQUAL]) == (len(wanted), len(wanted) - len(extra))
        seen |= wanted
    assert len(seen) == 330  # the chance that a key is in none of 40 is 0.8 ** 40


def ids(contract: ViewContract, sample: Sample, numbers: list[int], row: Any) -> set[int]:
    """The numbers of the keys that the sample has, by their online form."""
    keys = encode_keys(contract, rows(contract, [row(number) for number in numbers])).to_pylist()
    with duckdb.connect() as con:
        chosen = set(sample.chosen(con, contract, keys))
    return {number for number, key in zip(numbers, keys, strict=True) if key in chosen}


def test_a_view_without_join_keys_is_in_every_sample(tmp_path: Path) -> None:
    _, made = view()
    alone = FeatureView(name="stats", entities=[], ttl=timedelta(0), schema=made.features, source=made.stream_source)
    store, (contract,) = applied(tmp_path, sqlite_online(), ([], alone))
    push(contract, rows(contract, [{"at": 1, "made": 1, "value": 1.0, "count": 1}]))
    materialize_arrived(store, contract)
    assert audit(store, contract, sample=Sample(1e-9, 1)).counts == {Kind.EQUAL: 1}
