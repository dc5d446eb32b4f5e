"""What `Compact` removes from the work folder, what it leaves there, and what can still be done with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from luigi.execution_summary import LuigiStatusCode

from batch.backfill import Backfill
from batch.tasks import Clean, Materialize, OfflineStore
from batch.upkeep import Audit, Compact, now
from headrace.errors import ConfigError
from tests.batch.conftest import forget
from tests.batch.place import D, Place, build, good_rides

DAY_S = 86_400
LONG_AGO = now() - timedelta(days=40)


def age(folder: Path, days: float) -> None:
    """Let everything in a folder be that much older."""
    for path in [folder, *folder.rglob("*")]:
        moment = path.stat().st_mtime - days * DAY_S
        os.utime(path, (moment, moment))


def rows_of(place: Place, day: object) -> set[str]:
    """The files of rows that the runs of a day have."""
    found = (place.root / "data/batch/rides").glob(f"run=*/day={day}/*.parquet")
    return {f"{path.parent.parent.name}/{path.name}" for path in found}


def test_rows_that_were_published_go_and_the_rest_stays(here: Place) -> None:
    here.insert("rides", [*good_rides(D), {**good_rides(D, 1)[0], "rider": "bad", "stops": -1}])
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    day = here.root / f"data/batch/rides/run={D}/day={D}"
    before = {path.name for path in day.iterdir()}
    offline = here.offline("rides")
    assert build(Audit(view="rides", at=LONG_AGO), Compact(view="rides", at=LONG_AGO)) == LuigiStatusCode.SUCCESS
    age(here.root / "data/batch/rides", 13.9)
    assert build(Compact(view="rides", at=LONG_AGO + timedelta(hours=1))) == LuigiStatusCode.SUCCESS
    assert {path.name for path in day.iterdir()} == before
    age(here.root / "data/batch/rides", 0.2)
    assert build(Compact(view="rides", at=LONG_AGO + timedelta(hours=2))) == LuigiStatusCode.SUCCESS
    assert {path.name for path in day.iterdir()} == before - {"raw.parquet", "kept.parquet"}
    upkeep = {path.name.partition("=")[0] for path in (here.root / "data/batch/rides").glob("*=*T*")}
    assert upkeep == {"compact"}, "the audit is gone, and of compactions the first"
    assert len(list((here.root / "data/batch/rides").glob("compact=*"))) == 2
    forget()
    assert Materialize(view="rides", date=D).complete()
    assert here.offline("rides").equals(offline)


def test_a_day_that_was_never_published_keeps_its_rows(here: Place, configure: Callable[..., None]) -> None:
    configure(max_reject_share=0)
    here.insert("rides", [*good_rides(D, 5), {**good_rides(D, 1)[0], "stops": -1}])
    assert build(OfflineStore(view="rides", date=D)) != LuigiStatusCode.SUCCESS
    age(here.root / "data/batch/rides", 100)
    before = rows_of(here, D)
    assert build(Compact(view="rides", at=LONG_AGO)) == LuigiStatusCode.SUCCESS
    assert rows_of(here, D) == before
    configure(max_reject_share=0.5)
    later = D + timedelta(days=1)
    assert build(OfflineStore(view="rides", date=D, run_date=later)) == LuigiStatusCode.SUCCESS
    age(here.root / f"data/batch/rides/run={later}", 20)
    assert build(Compact(view="rides", at=LONG_AGO + timedelta(hours=1))) == LuigiStatusCode.SUCCESS
    assert rows_of(here, D) == {f"run={run}/rejects.parquet" for run in (D, later)}


@pytest.mark.parametrize("step", ["Clean", "ExploreAndValidate", "OfflineStore"])
def test_a_day_whose_rows_are_gone_is_redone_from_the_source(here: Place, step: str) -> None:
    stop = D + timedelta(days=2)
    here.insert("rides", [*good_rides(D, 3), *good_rides(D + timedelta(days=1), 4)])
    backfill = Backfill(view="rides", start=D, stop=stop)  # type: ignore[call-arg]
    assert build(backfill) == LuigiStatusCode.SUCCESS
    age(here.root / f"data/batch/rides/run={D}", 20)
    assert build(Compact(view="rides", at=LONG_AGO)) == LuigiStatusCode.SUCCESS
    assert rows_of(here, D) == {f"run={D}/rejects.parquet"}
    here.insert("rides", [{**good_rides(D, 1)[0], "rider": "late"}])
    forced: dict[str, Any] = {"view": "rides", "start": D, "stop": stop, "force_from": step}
    dry = Backfill(**forced, dry_run=True)  # type: ignore[call-arg]
    assert build(dry) == LuigiStatusCode.SUCCESS
    plan = json.loads(dry.receipt().read_text(encoding="utf-8"))["plan"]
    assert f"would redo 2 days from {step} on, 2 of them published; 1 must be read from the source again" in plan
    assert build(Backfill(**forced)) == LuigiStatusCode.SUCCESS
    assert here.offline("rides").num_rows == 8


def test_a_receipt_that_is_missing_by_hand_is_said(here: Place) -> None:
    here.insert("rides", good_rides(D, 3))
    assert build(OfflineStore(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    age(here.root / "data/batch/rides", 20)
    assert build(Compact(view="rides", at=LONG_AGO)) == LuigiStatusCode.SUCCESS
    day = here.root / f"data/batch/rides/run={D}/day={D}"
    (day / "clean.json").unlink()
    with pytest.raises(ConfigError, match=r"raw\.parquet is gone: .* --force-from Ingest"):
        Clean(view="rides", date=D).work()
