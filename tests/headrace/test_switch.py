"""A stock Feast repository switches to the plug-ins and back by the steps of its page, and loses nothing."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from feast import FeatureStore
from feast.data_source import PushMode

from headrace.audit import audit
from headrace.chains import push
from headrace.repository import contracts
from tests.servers import environment, feast_apply
from tests.servers.repository import ROOT

PAGE = ROOT / "docs" / "how-to" / "existing-repository.md"

DEFINITIONS = """
from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, PushSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Float64, Int64

shop = Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.INT64)
sales = FeatureView(
    name="sales",
    entities=[shop],
    ttl=timedelta(days=0),
    schema=[
        Field(name="shop_id", dtype=Int64), Field(name="turnover", dtype=Float64), Field(name="orders", dtype=Int64)
    ],
    source=PushSource(
        name="till",
        batch_source=FileSource(
            name="sales_history", path="data/sales.parquet", file_format=ParquetFormat(),
            timestamp_field="at", created_timestamp_column="made",
        ),
    ),
)
"""
STORE = """project: shops
provider: local
registry: data/registry.db
offline_store: {{type: {offline}}}
online_store: {{type: redis, connection_string: "{redis}"}}
entity_key_serialization_version: 3
"""
START = pd.Timestamp("2026-01-01", tz="UTC")


def sales(shops: int, at_hours: int, turnover: float) -> pd.DataFrame:
    at = START + pd.Timedelta(hours=at_hours)
    frame = pd.DataFrame(
        {
            "shop_id": range(shops),
            "turnover": [turnover + shop for shop in range(shops)],
            "orders": [at_hours] * shops,
            "at": at,
            "made": at,
        }
    )
    return frame.astype({"at": "datetime64[us, UTC]", "made": "datetime64[us, UTC]"})


def online(store: FeatureStore, shops: int) -> list[float | None]:
    asked = [{"shop_id": shop} for shop in range(shops)]
    answer: dict[str, Any] = store.get_online_features(features=["sales:turnover"], entity_rows=asked).to_dict()
    return list(answer["turnover"])


def history(store: FeatureStore, at_hours: int) -> list[float]:
    asked = pd.DataFrame({"shop_id": [0, 1, 2], "event_timestamp": START + pd.Timedelta(hours=at_hours)})
    frame = store.get_historical_features(entity_df=asked, features=["sales:turnover"]).to_df()
    return [float(value) for value in frame.sort_values("shop_id")["turnover"]]


def documented(start: str) -> list[str]:
    """The command of the way back in the page that has these words, in words."""
    text = PAGE.read_text(encoding="utf-8")
    section = text.split("## Switch a repository over, and back")[1].split("\n## ")[0]
    commands = re.findall(r"```sh\n(.*?)```|(?<!`)`([^`]+)`(?!`)", section, re.DOTALL)
    (found,) = [block or inline for block, inline in commands if start in (block or inline)]
    return shlex.split(found.replace("\\\n", ""))


@pytest.mark.parametrize("offline", ["dask", "duckdb"])
def test_there_and_back_again(
    tmp_path: Path, valkey: str, valkey_databases: Iterator[int], offline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "feature_repo"
    data = repo / "data"
    data.mkdir(parents=True)
    monkeypatch.chdir(repo)  # stock DuckDB takes relative paths from the working directory
    address = f"{valkey},db={next(valkey_databases)}"
    stock = STORE.format(offline=offline, redis=address)
    (repo / "definitions.py").write_text(DEFINITIONS, encoding="utf-8")
    (repo / "feature_store.yaml").write_text(stock, encoding="utf-8")
    sales(3, 1, 100.0).to_parquet(data / "sales.parquet")
    feast_apply(repo)
    store = FeatureStore(repo_path=str(repo))
    store.push("till", sales(3, 5, 500.0), to=PushMode.ONLINE_AND_OFFLINE)
    assert online(store, 3) == [500.0, 501.0, 502.0]

    # There.
    (data / "sales").mkdir()
    (data / "sales.parquet").rename(data / "sales" / "sales.parquet")
    folder = DEFINITIONS.replace("data/sales.parquet", "data/sales")
    (repo / "definitions.py").write_text(folder, encoding="utf-8")
    lines = re.findall(r"^(?:offline_store|online_store|batch_engine): .*$", three_lines(), re.MULTILINE)
    ours = [line for line in stock.splitlines() if not line.startswith(("offline_store", "online_store"))]
    ours += [line.replace("localhost:6379", address) for line in lines]
    (repo / "feature_store.yaml").write_text("\n".join(ours) + "\n", encoding="utf-8")
    feast_apply(repo)
    store = FeatureStore(repo_path=str(repo))
    (contract,) = contracts(store)
    assert online(store, 3) == [500.0, 501.0, 502.0]
    assert (history(store, 2), history(store, 6)) == ([100.0, 101.0, 102.0], [500.0, 501.0, 502.0])
    store.push("till", sales(2, 3, 300.0), to=PushMode.ONLINE_AND_OFFLINE)  # late: stock's rows are newer
    assert online(store, 3) == [500.0, 501.0, 502.0]
    store.push("till", sales(2, 7, 700.0), to=PushMode.ONLINE_AND_OFFLINE)
    assert online(store, 4) == [700.0, 701.0, 502.0, None]
    store.materialize(START.to_pydatetime(), (START + pd.Timedelta(hours=9)).to_pydatetime())
    assert audit(store, contract).diverged == 0
    assert (history(store, 4), history(store, 8)) == ([300.0, 301.0, 102.0], [700.0, 701.0, 502.0])
    for at_hours in range(10, 20):
        push(contract, contract_table(contract, sales(3, at_hours, 1000.0 + at_hours)))

    # And back.
    grace, luigi, *arguments = documented("luigi --module batch Compact")
    assert luigi == "luigi"
    settings = dict([grace.split("=")])
    command = [str(Path(sys.executable).with_name(luigi)), *arguments]
    subprocess.run(command, cwd=tmp_path, env=environment() | settings, check=True)
    (repo / "feature_store.yaml").write_text(stock, encoding="utf-8")
    feast_apply(repo)
    store = FeatureStore(repo_path=str(repo))
    assert online(store, 4) == [700.0, 701.0, 502.0, None]
    assert (history(store, 4), history(store, 8)) == ([300.0, 301.0, 102.0], [700.0, 701.0, 502.0])
    store.materialize(START.to_pydatetime(), (START + pd.Timedelta(hours=30)).to_pydatetime())
    assert online(store, 3) == [1019.0, 1020.0, 1021.0]
    python = documented("duckdb.sql")
    program = python[2].replace("data/driver_stats", "data/sales")
    subprocess.run([sys.executable, "-c", program], cwd=repo, env=environment(), check=True)
    (repo / "definitions.py").write_text(DEFINITIONS, encoding="utf-8")
    feast_apply(repo)
    store = FeatureStore(repo_path=str(repo))
    store.push("till", sales(3, 40, 4000.0), to=PushMode.ONLINE_AND_OFFLINE)
    assert online(store, 3) == [4000.0, 4001.0, 4002.0]
    assert (history(store, 4), history(store, 8), history(store, 50)) == (
        [300.0, 301.0, 102.0],
        [700.0, 701.0, 502.0],
        [4000.0, 4001.0, 4002.0],
    )
    assert len(pd.read_parquet(data / "sales.parquet")) == 3 + 3 + 2 + 2 + 30 + 3


def three_lines() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text.split("```yaml\n")[1].split("```")[0]


def contract_table(contract: Any, frame: pd.DataFrame) -> Any:
    return pa.Table.from_pandas(frame, schema=contract.schema, preserve_index=False)
