"""A feature repository unlike the example's, its source database, and how to run the chain on them."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import luigi
import pyarrow as pa
import pyarrow.parquet as pq
from luigi.execution_summary import LuigiStatusCode

from batch.processes import Factory
from tests.servers.repository import ROOT, environment, feast_apply

D = date(2026, 3, 10)
LUIGI_CFG = ROOT / "luigi.cfg"

FEATURE_STORE = """
project: batch_test
provider: local
registry: {registry_type: sql, path: "sqlite:///../data/registry.db"}
offline_store: {type: headrace.offline.HeadraceOfflineStore}
online_store: {type: headrace.sqlite.HeadraceSqliteOnlineStore, path: ../data/online.db}
entity_key_serialization_version: 3
"""

DEFINITIONS = """
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Array, Bool, Float32, Int32, Int64, String

rider = Entity(name="rider", join_keys=["rider"], value_type=ValueType.STRING)
city = Entity(name="city", join_keys=["city_id"], value_type=ValueType.INT64)
zone = Entity(name="zone", join_keys=["zone"], value_type=ValueType.STRING)

def history(name):
    return FileSource(
        name=f"{name}_history", path=f"../data/offline/{name}", file_format=ParquetFormat(),
        timestamp_field="happened", created_timestamp_column="made",
    )

rides = FeatureView(
    name="rides", entities=[rider, city], source=history("rides"), tags={"source_table": "rides"},
    schema=[
        Field(name="rider", dtype=String),
        Field(name="city_id", dtype=Int64),
        Field(name="distance_km", dtype=Float32, tags={"ge": "0", "le": "1000"}),
        Field(name="stops", dtype=Int32, tags={"ge": "0", "nullable": "false"}),
        Field(name="streets", dtype=Array(String)),
        Field(name="is_shared", dtype=Bool),
        Field(name="grade", dtype=String, tags={"isin": "a,b,c"}),
    ],
)
zones = FeatureView(
    name="zones", entities=[zone], source=history("zones"),
    tags={"source_table": "zones", "transform": "transforms:double"},
    schema=[Field(name="zone", dtype=String), Field(name="level", dtype=Int64)],
)
notes = FeatureView(
    name="notes", entities=[zone], source=history("notes"), tags={"retain_days": "30"},
    schema=[Field(name="zone", dtype=String), Field(name="n", dtype=Int64)],
)
"""

TRANSFORMS = """
import os, time
import pyarrow.compute as pc

def double(table):
    time.sleep(float(os.environ.get("TRANSFORM_SLEEP_S", "0")))
    index = table.schema.get_field_index("level")
    table = table.set_column(index, "level", pc.multiply(table.column("level"), 2))
    return table.append_column("__skip__", pc.equal(table.column("zone"), "nowhere"))
"""

TABLES = """
CREATE TABLE rides (
    rider TEXT, city_id INTEGER, distance_km REAL, stops INTEGER, streets TEXT, is_shared BOOLEAN, grade TEXT,
    happened TIMESTAMP, made TIMESTAMP, remark TEXT
);
CREATE TABLE zones (zone TEXT, level INTEGER, happened TIMESTAMP, made TIMESTAMP);
"""

GOOD = {
    "rider": "ann",
    "city_id": 7,
    "distance_km": 2.5,
    "stops": 1,
    "streets": '["High St", "Low St"]',
    "is_shared": 1,
    "grade": "a",
    "happened": f"{D} 08:00:00",
    "made": f"{D} 08:00:01.250",
}


@dataclass(frozen=True)
class Place:
    """A folder with a feature repository, a source database, and the data of a chain."""

    root: Path

    @property
    def repo(self) -> Path:
        return self.root / "feature_repo"

    @property
    def database(self) -> Path:
        return self.root / "data" / "source.db"

    def settings(self, **changes: object) -> dict[str, str]:
        """The variables of a process that works here."""
        chosen = {"feature_repo": self.repo, "source_url": f"sqlite:///{self.database}", **changes}
        return {f"HEADRACE_{name.upper()}": str(value) for name, value in chosen.items()}

    def insert(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a table of the source."""
        with sqlite3.connect(self.database) as connection:
            for row in rows:
                marks = ", ".join("?" for _ in row)
                connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))
        connection.close()

    def execute(self, statement: str) -> None:
        """Run a statement in the source."""
        with sqlite3.connect(self.database) as connection:
            connection.execute(statement)
        connection.close()

    def folder(self, view: str, day: date, run: date | None = None) -> Path:
        """Where the chain worked on a day."""
        return self.root / "data" / "batch" / view / f"run={run or day}" / f"day={day}"

    def receipt(self, view: str, day: date, name: str, run: date | None = None) -> dict[str, Any]:
        """A receipt of a day."""
        content: dict[str, Any] = json.loads((self.folder(view, day, run) / name).read_text(encoding="utf-8"))
        return content

    def day_files(self, view: str) -> list[Path]:
        """The segments of ETL days in the view's folder."""
        return sorted((self.root / "data" / "offline" / view).glob("batch-*.parquet"))

    def offline(self, view: str) -> pa.Table:
        """All rows of the ETL days."""
        return pa.concat_tables(pq.read_table(path) for path in self.day_files(view))

    def rows_of(self, path: Path) -> list[dict[str, Any]]:
        """The rows of one file."""
        rows: list[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
        return rows

    def run(
        self, *arguments: str, expect: int | None = 0, timeout_s: float = 120, **settings: object
    ) -> subprocess.CompletedProcess[str]:
        """Run the literal command line here: `luigi --module batch ...`."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(**settings),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert expect is None or done.returncode == expect, done.stdout + done.stderr
        return done

    def command(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).with_name("luigi")), "--module", "batch", *arguments]

    def environment(self, **settings: object) -> dict[str, str]:
        return environment() | self.settings(**settings)


def apply_template(root: Path) -> Path:
    """Make and apply the repository once; `place_in` copies it."""
    repo = root / "feature_repo"
    repo.mkdir(parents=True)
    (root / "data").mkdir()
    (repo / "feature_store.yaml").write_text(FEATURE_STORE, encoding="utf-8")
    (repo / "definitions.py").write_text(DEFINITIONS, encoding="utf-8")
    (repo / "transforms.py").write_text(TRANSFORMS, encoding="utf-8")
    feast_apply(repo)
    return root


def place_in(root: Path, template: Path) -> Place:
    """A place of one's own with empty tables."""
    shutil.copytree(template, root, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(LUIGI_CFG, root / "luigi.cfg")
    place = Place(root)
    with sqlite3.connect(place.database) as connection:
        connection.executescript(TABLES)
    connection.close()
    return place


def good_rides(day: date, count: int = 20) -> list[dict[str, Any]]:
    """Rows without a fault, each of its own rider, a minute apart."""
    return [
        {
            **GOOD,
            "rider": f"rider {number}",
            "city_id": number % 3,
            "distance_km": number / 4,
            "happened": f"{day} 06:{number:02}:00",
            "made": f"{day} 12:00:00",
        }
        for number in range(count)
    ]


def zone_rows(day: date) -> list[dict[str, Any]]:
    """Three zones of a day; the transformation skips one."""
    at = {"happened": f"{day} 01:00:00", "made": f"{day} 01:00:01"}
    return [{"zone": name, "level": level, **at} for name, level in (("north", 1), ("south", 2), ("nowhere", 3))]


def build(*tasks: luigi.Task) -> LuigiStatusCode:
    """Run tasks in this process, with a scheduler of their own."""
    result = luigi.build(
        list(tasks),
        worker_scheduler_factory=Factory(),
        local_scheduler=True,
        detailed_summary=True,
        log_level="WARNING",
    )
    return result.status  # type: ignore[no-any-return]


def without_cache(path: Path) -> list[str]:
    """The files of a folder that count: no locks, no empty staging."""
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and ".locks" not in p.parts)
