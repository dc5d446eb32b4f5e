"""The tags that say what is right, and how grave it is if not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Float32, Int64, String

from headrace.conform import Reason, broken, conform
from headrace.contract import ViewContract
from headrace.errors import ConfigError
from headrace.rules import DEFAULT_MAX_PSI, DayRules, Limit, Rule, Severity
from streaming.formats import decoder_of
from streaming.judgement import judge
from streaming.settings import View
from tests.headrace.views import config, view

ERROR, WARNING = Severity.ERROR, Severity.WARNING
NONE_NULL = Limit(0, Severity.WARNING)
GOOD: dict[str, Any] = {"id": 1, "rate": 0.5, "kind": "a", "at": "2026-01-31 12:00:00", "made": "2026-01-31 12:00:00"}


def contract_of(home: Path, tags: Mapping[str, str], view_tags: Mapping[str, str] | None = None) -> ViewContract:
    fields = [Field(name="rate", dtype=Float32, tags=dict(tags)), Field(name="kind", dtype=String)]
    return ViewContract.from_feast(view(features=fields, tags=view_tags)[1], config(home))


@pytest.mark.parametrize(
    ("tags", "rule"),
    [
        ({}, Rule("rate")),
        ({"ge": "0"}, Rule("rate", ge=0, severity=ERROR)),
        ({"ge": "0", "severity": "warning"}, Rule("rate", ge=0, severity=WARNING)),
        ({"max_null_share": "0.1"}, Rule("rate", max_null_share=Limit(0.1, ERROR))),
        ({"max_null_share": "0.1 warning"}, Rule("rate", max_null_share=Limit(0.1, WARNING))),
        (
            {"max_null_share": "0", "severity": "warning"},
            Rule("rate", severity=WARNING, max_null_share=Limit(0, WARNING)),
        ),
        ({"max_psi": "0.1"}, Rule("rate", max_psi=Limit(0.1, WARNING))),
        ({"max_psi": "0.1 error"}, Rule("rate", max_psi=Limit(0.1, ERROR))),
        ({"max_psi": "0.1", "severity": "error"}, Rule("rate", max_psi=Limit(0.1, ERROR))),
        ({"max_psi": "0.1  error", "severity": "warning"}, Rule("rate", severity=WARNING, max_psi=Limit(0.1, ERROR))),
        ({"max_psi": "none"}, Rule("rate", max_psi=None)),
        ({"severity": "error"}, Rule("rate", max_psi=DEFAULT_MAX_PSI)),
    ],
)
def test_tags_of_a_field(tags: dict[str, str], rule: Rule, tmp_path: Path) -> None:
    contract = contract_of(tmp_path, tags)
    assert contract.rule("rate") == rule
    assert contract.rule("kind") == Rule("kind")


@pytest.mark.parametrize(
    ("tags", "rules"),
    [
        ({}, DayRules()),
        ({"min_rows": "10"}, DayRules(min_rows=Limit(10, ERROR))),
        ({"min_rows": "10 warning", "max_age_hours": "1.5"}, DayRules(Limit(10, WARNING), Limit(1.5, ERROR))),
        ({"max_age_hours": "6", "severity": "warning"}, DayRules(max_age_hours=Limit(6, WARNING))),
    ],
)
def test_tags_of_a_view(tags: dict[str, str], rules: DayRules, tmp_path: Path) -> None:
    assert contract_of(tmp_path, {}, tags).day_rules == rules


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ({}, {}),
        ({"online_within_s": "1", "offline_within_s": "10.5"}, {"online": 1.0, "offline": 10.5}),
        ({"offline_within_s": "1e3"}, {"offline": 1000.0}),
    ],
)
def test_objectives_of_a_view(tags: dict[str, str], found: dict[str, float], tmp_path: Path) -> None:
    assert contract_of(tmp_path, {}, tags).objectives.of_stores() == found


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"severity": "fatal"}, r"field `rate`: tag severity='fatal' is neither 'error' nor 'warning'"),
        ({"severity": ""}, r"tag severity='' is neither"),
        (
            {"max_null_share": "1.5"},
            r"='1\.5' is no number from 0 to 1, .* \{'max_null_share': '0\.05'\}",
        ),
        ({"max_null_share": "5%"}, r"tag max_null_share='5%' is no number"),
        ({"max_null_share": "0.1 fatal"}, r"tag max_null_share='0\.1 fatal' .* '0\.05 warning'"),
        ({"max_psi": "-1"}, r"tag max_psi='-1' is no number of at least 0"),
        ({"max_psi": "nan"}, r"tag max_psi='nan' is no number"),
        ({"max_psi": "inf"}, r"tag max_psi='inf' is no number"),
        ({"max_psi": ""}, r"tag max_psi='' is no number"),
        ({"ge": "nan"}, r"tag ge='nan' is no number"),
    ],
)
def test_a_wrong_tag_of_a_field_is_refused(tags: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"feature view `stats`: " + ".*" + message):
        contract_of(tmp_path, tags)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"min_rows": "many"}, r"tag min_rows='many' is no number of at least 0"),
        ({"min_rows": "1.5"}, r"tag min_rows='1\.5' is no whole number"),
        ({"max_age_hours": "-2 warning"}, r"tag max_age_hours='-2 warning' is no number"),
        ({"severity": "Warning"}, r"tag severity='Warning' is neither"),
        ({"online_within_s": "0"}, r"tag online_within_s='0' is no number of seconds above 0; .*'online_within_s'"),
        ({"offline_within_s": "inf"}, r"tag offline_within_s='inf' is no number of seconds"),
        ({"offline_within_s": "soon"}, r"tag offline_within_s='soon' is no number of seconds"),
    ],
)
def test_a_wrong_tag_of_a_view_is_refused(tags: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"feature view `stats`: " + message):
        contract_of(tmp_path, {}, tags)


@pytest.mark.parametrize("name", ["max_psi", "max_null_share"])
def test_join_keys_neither_drift_nor_are_null(name: str, tmp_path: Path) -> None:
    key = Entity(name="key", join_keys=["id"], value_type=ValueType.INT64)
    made = FeatureView(
        name="keyed",
        entities=[key],
        source=FileSource(name="keyed", path="data/keyed", timestamp_field="at"),
        schema=[Field(name="id", dtype=Int64, tags={name: "0.1"}), Field(name="x", dtype=Array(String))],
    )
    with pytest.raises(ConfigError, match=rf"`id`: tag {name} is for features, and the field is a join key; remove"):
        ViewContract.from_feast(made, config(tmp_path))


BROKEN = ({"rate": 7.0}, {"rate": None}, {"rate": float("nan")})


@pytest.mark.parametrize("severity", ["error", "warning"])
def test_a_row_that_breaks_a_warning_is_kept(severity: str, tmp_path: Path) -> None:
    contract = contract_of(tmp_path, {"le": "1", "nullable": "false", "severity": severity})
    table = pa.Table.from_pylist([{**GOOD, **change} for change in ({}, *BROKEN)])
    done = conform(contract, table, now_us=2**60, max_future_us=0)
    kept = [0] if severity == "error" else [0, 1, 2, 3]
    assert done.rows.tolist() == kept
    bad = broken(table["rate"].combine_chunks(), contract.rule("rate"))
    assert bad is not None
    assert bad.tolist() == [False, True, False, True]


def test_types_missing_fields_and_identity_are_errors_whatever_is_said(tmp_path: Path) -> None:
    contract = contract_of(tmp_path, {"le": "1", "severity": "warning"})
    rows = [{**GOOD, "id": None}, {**GOOD, "at": None}, {**GOOD, "at": "soon"}]
    done = conform(contract, pa.Table.from_pylist(rows), now_us=2**60, max_future_us=0)
    assert [reject.reason for reject in done.rejects] == [Reason.NULL, Reason.NULL, Reason.BAD_TIMESTAMP]
    lacking = pa.Table.from_pylist([GOOD]).drop_columns(["rate"])
    done = conform(contract, lacking, now_us=2**60, max_future_us=0)
    assert [reject.reason for reject in done.rejects] == [Reason.MISSING_FIELD]
    text = pa.Table.from_pylist([{**GOOD, "rate": "high"}])
    done = conform(contract, text, now_us=2**60, max_future_us=0)
    assert [reject.reason for reject in done.rejects] == [Reason.WRONG_TYPE]


def test_the_stream_keeps_it_too(tmp_path: Path) -> None:
    contract = contract_of(tmp_path, {"le": "1", "severity": "warning"})
    one = View(contract, transform=None)
    judged = judge(one, decoder_of(contract, None), [json.dumps({**GOOD, "rate": 7}).encode()], 300)
    assert judged.rejects == []
    assert judged.table.column("rate").to_pylist() == [7.0]


def test_bounds_hold_for_integers_that_no_float_has() -> None:
    bad = broken(pa.array([-(2**63), 2**53 + 1, 2**63 - 1, None], pa.int64()), Rule("trips", ge=0.0, le=2.0**62))
    assert bad is not None
    assert bad.tolist() == [True, False, True, False]
