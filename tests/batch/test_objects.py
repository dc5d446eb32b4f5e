"""The batch chain with its history in an object store, by the commands that a person types."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.batch.place import DEFINITIONS, D, Place, good_rides, place_in
from tests.servers import ObjectStore
from tests.servers.repository import feast_apply

pytestmark = pytest.mark.slow


@pytest.fixture
def on_objects(template: Path, tmp_path: Path, object_store: ObjectStore) -> Place:
    """A place whose views have their folders in a bucket, applied by `feast apply`."""
    object_store.bucket("batch")
    place = place_in(tmp_path / "place", template)
    there = f'path=f"s3://batch/{tmp_path.name}/{{name}}", s3_endpoint_override="{object_store.url}"'
    old = 'path=f"../data/offline/{name}"'
    assert old in DEFINITIONS
    (place.repo / "definitions.py").write_text(DEFINITIONS.replace(old, there), encoding="utf-8")
    feast_apply(place.repo)
    return place


def test_a_day_goes_the_whole_way_and_is_corrected(
    on_objects: Place, object_store: ObjectStore, tmp_path: Path
) -> None:
    folder = object_store.data / "batch" / tmp_path.name / "rides"
    on_objects.insert("rides", good_rides(D))
    on_objects.run("Materialize", "--view", "rides", "--date", str(D), "--local-scheduler")
    before = [path.name for path in folder.iterdir()]
    assert [name.startswith(f"batch-{D}-") for name in before] == [True]
    assert on_objects.receipt("rides", D, "offline.json")["rows"] == 20
    on_objects.execute("DELETE FROM rides WHERE rider = 'rider 3'")
    next_day = D + timedelta(days=1)
    on_objects.run("Materialize", "--view", "rides", "--date", str(next_day), "--local-scheduler")
    assert on_objects.receipt("rides", D, "offline.json", next_day)["withdrawn"] == 1
    assert len(list(folder.iterdir())) == 1
    assert [path.name for path in folder.iterdir()] != before
    done = on_objects.run("Audit", "--view", "rides", "--local-scheduler")
    assert "19" in done.stdout + done.stderr
