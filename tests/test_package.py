"""The package alone: built from the source archive, in an environment of its own, on a stranger's repository.

The environment has the wheel's modules and the libraries of the one that runs the tests, and not the clone.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from confluent_kafka.admin import AdminClient
from packaging.metadata import Metadata

from headrace import __version__
from tests.servers import free_port
from tests.servers.repository import ROOT

PACKAGES = ("headrace", "streaming", "batch")

# What a user has before, and the three lines.
STORE = """
project: plants
provider: local
registry: data/registry.db
entity_key_serialization_version: 3
offline_store: {type: headrace.offline.HeadraceOfflineStore}
online_store: {type: headrace.sqlite.HeadraceSqliteOnlineStore, path: data/online.db}
batch_engine: {type: headrace.engine.HeadraceEngine}
"""

DEFINITIONS = """
from feast import Entity, FeatureView, Field, FileSource, KafkaSource, ValueType
from feast.data_format import JsonFormat, ParquetFormat
from feast.types import Array, Float64, Int64, String

plant = Entity(name="plant", join_keys=["plant"], value_type=ValueType.STRING)
machine = Entity(name="machine", join_keys=["machine_no"], value_type=ValueType.INT64)
history = FileSource(
    name="history", path="data/readings", file_format=ParquetFormat(), timestamp_field="at",
    created_timestamp_column="stored_at",
)
readings = FeatureView(
    name="readings", entities=[plant, machine], tags={"source_table": "readings"},
    schema=[
        Field(name="plant", dtype=String),
        Field(name="machine_no", dtype=Int64),
        Field(name="heat", dtype=Float64, tags={"ge": "-50", "le": "500"}),
        Field(name="state", dtype=String),
    ],
    source=KafkaSource(
        name="events", topic="readings", kafka_bootstrap_servers="BROKER", timestamp_field="at",
        created_timestamp_column="stored_at", message_format=JsonFormat(schema_json=""), batch_source=history,
    ),
)
"""


@dataclass(frozen=True)
class Package:
    """What was built, and where it is installed."""

    archive: Path
    wheel: Path
    python: Path

    def run(self, *arguments: str, cwd: Path, expect: int = 0, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run a module of its environment."""
        done = subprocess.run(
            [str(self.python), "-m", *arguments],
            cwd=cwd,
            env=clean(**settings),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done


def clean(**settings: Any) -> dict[str, str]:
    """An environment that knows nothing of the clone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "PYTHONPATH"))}
    return {**inherited, **{f"HEADRACE_{name.upper()}": str(value) for name, value in settings.items()}}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The source archive of what git knows here, the wheel made of that archive alone, and an environment with it."""
    home = tmp_path_factory.mktemp("package")
    source, dist = home / "source", home / "dist"
    dist.mkdir()
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build("sdist", source, dist)
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(home / "unpacked", filter="data")
    build("wheel", home / "unpacked" / f"headrace-{__version__}", dist)
    (wheel,) = dist.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    python = home / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True)
    # Read as a path only: the clone's own `.pth` file there is not.
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Package(archive, wheel, python)


def tracked() -> list[str]:
    """The files of the clone that git knows; where there is no git, those that are not caches."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode == 0:
        return [name for name in done.stdout.decode().splitlines() if (ROOT / name).is_file()]
    parts = [
        ROOT / name for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md")
    ]
    files = [file for part in parts for file in (part.rglob("*") if part.is_dir() else [part])]
    return [str(f.relative_to(ROOT)) for f in files if f.is_file() and "__pycache__" not in f.parts]


def build(what: str, source: Path, dist: Path) -> None:
    code = f"import sys, setuptools.build_meta as b; b.build_{what}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(dist)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_has_every_file_of_the_packages_and_no_other(package: Package) -> None:
    with zipfile.ZipFile(package.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {name for name in tracked() if name.startswith(tuple(f"{part}/" for part in PACKAGES))}
    assert names == expected
    assert {f"{part}/py.typed" for part in PACKAGES} <= names


def test_its_metadata_are_valid(package: Package) -> None:
    with zipfile.ZipFile(package.wheel) as wheel:
        raw = wheel.read(f"headrace-{__version__}.dist-info/METADATA")
        licences = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    metadata = Metadata.from_email(raw, validate=True)
    assert (metadata.name, str(metadata.version)) == ("headrace", __version__)
    assert metadata.license_expression == "Apache-2.0"
    assert licences
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
    assert message_from_bytes(raw)["Home-page"] is None, "there is none"


@pytest.fixture
def plants(tmp_path: Path, package: Package, mock_broker: str) -> Path:
    """A stranger's repository with two join keys, applied, in a folder where there is nothing else of ours."""
    repo = tmp_path / "elsewhere" / "plants"
    repo.mkdir(parents=True)
    (repo / "feature_store.yaml").write_text(STORE, encoding="utf-8")
    (repo / "definitions.py").write_text(DEFINITIONS.replace("BROKER", mock_broker), encoding="utf-8")
    package.run("feast.cli.cli", "-c", "plants", "apply", cwd=repo.parent)
    return repo


@pytest.mark.slow
def test_a_strangers_repository_gets_stream_and_batch_chain(package: Package, plants: Path, mock_broker: str) -> None:
    """From a folder without `luigi.cfg`: the worker, events, values; a day of a table, and the audit of both."""
    cwd = plants.parent
    code = "import batch, headrace, streaming; print(batch.__file__, headrace.__file__, streaming.__file__)"
    where = subprocess.run(
        [package.python, "-c", code], cwd=cwd, env=clean(), capture_output=True, text=True, check=True
    )
    assert all(str(package.python.parents[1]) in file for file in where.stdout.split()), where.stdout

    AdminClient({"bootstrap.servers": mock_broker}).list_topics("readings", timeout=10)
    settings: dict[str, Any] = {"feature_repo": "plants", "web_port": free_port(), "append_seconds": 0.3}
    worker = subprocess.Popen(
        [str(package.python), "-m", "faust", "-A", "streaming", "worker", "-l", "info"],
        cwd=cwd,
        env=clean(**settings),
        stdout=subprocess.DEVNULL,
        stderr=(cwd / "worker.log").open("wb"),
    )
    try:
        emit = ("faust", "-A", "streaming", "emit", "--rate", "0", "--count", "300", "--keys", "20", "--seed", "4")
        sent = json.loads(package.run(*emit, cwd=cwd, **settings).stdout)
        assert sent["sent"] == 300
        wait_until_stored(plants / "data" / "readings", 300, cwd / "worker.log")
    finally:
        worker.terminate()
        assert worker.wait(20) == 0

    day = datetime.now(UTC).date() - timedelta(days=1)
    with sqlite3.connect(cwd / "source.db") as database:
        database.execute(
            "CREATE TABLE readings (plant TEXT, machine_no INT, heat REAL, state TEXT, at TEXT, stored_at TEXT)"
        )
        rows = [("north", number, 20.5, "runs", f"{day} 05:00:00", f"{day} 06:00:00") for number in range(10)]
        database.executemany("INSERT INTO readings VALUES (?, ?, ?, ?, ?, ?)", rows)
    database.close()
    source: dict[str, Any] = {"feature_repo": "plants", "source_url": "sqlite:///source.db", "reread_days": 0}
    luigi = ("luigi", "--module", "batch")
    package.run(*luigi, "Materialize", "--local-scheduler", cwd=cwd, **source)
    audit = package.run(*luigi, "Audit", "--local-scheduler", cwd=cwd, **source)
    assert "30 keys compared, none differs" in audit.stderr
    refused = package.run(*luigi, "Audit", "--view", "nope", "--local-scheduler", cwd=cwd, expect=35, **source)
    assert refused.stderr.splitlines()[-1].startswith("error: Audit nope: unknown feature view `nope`")
    reports = list(cwd.glob("data/batch/readings/**/report.html"))
    assert len(reports) == 2, "of the day, and of the audit: templates and styles are in the package"

    served = package.run("feast.cli.cli", *GET, cwd=cwd).stdout
    assert json.loads(served[served.index("{") :])["heat"] == [20.5]


GET = ("-c", "plants", "get-online-features", "-f", "readings:heat", "-e", "plant=north", "-e", "machine_no=7")


def wait_until_stored(folder: Path, count: int, log: Path) -> None:
    """Until so many rows are offline."""
    end = time.monotonic() + 60
    found = 0
    while found < count:
        if time.monotonic() > end:
            raise TimeoutError(f"{found} of {count} events are stored:\n{log.read_text()}")
        time.sleep(0.1)
        found = sum(pq.read_metadata(file).num_rows for file in folder.glob("stream-*.parquet"))
