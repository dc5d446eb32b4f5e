"""The rules in a view's tags: what values a column may have, what a day must be like, and how grave it is if not.

Tags of other names are the user's own. docs/how-to/gate.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from feast import FeatureView
from feast.field import Field
from feast.types import Bool, Float32, Float64, Int32, Int64, String

from headrace.errors import ConfigError

_BOUNDS = ("ge", "le", "gt", "lt")


class Severity(StrEnum):
    """How grave a broken rule is.

    Attributes:
        ERROR: a row that breaks a rule is rejected; a day that does closes the gate.
        WARNING: it is kept, and passes; the day's report tells of it.
    """

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Limit:
    """A bound on a figure of a day, inclusive."""

    bound: float
    severity: Severity


DEFAULT_MAX_PSI = Limit(0.25, Severity.WARNING)


@dataclass(frozen=True)
class Rule:
    """The values a column may have, from the tags of its `Field`.

    Attributes:
        column: the column's name.
        ge, le, gt, lt: bounds, inclusive and exclusive; None is unbounded. NaN satisfies no bound.
        isin: the allowed values, as text; None allows any.
        nullable: True and False as tagged. None, the default, lets a value be null but wants its field in a message.
        severity: of the above. Types, missing fields, and nulls in join keys and event times are errors whatever it is.
        max_null_share: the share of a day's rows in which the column may be null, from 0 to 1; None is unbounded.
        max_psi: how far a day may drift from the days before it, for features; None is unbounded.
    """

    column: str
    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    lt: float | None = None
    isin: tuple[str, ...] | None = None
    nullable: bool | None = None
    severity: Severity = Severity.ERROR
    max_null_share: Limit | None = None
    max_psi: Limit | None = DEFAULT_MAX_PSI

    def __str__(self) -> str:
        signs = {"ge": ">=", "le": "<=", "gt": ">", "lt": "<"}
        parts = [f"{signs[b]} {getattr(self, b):g}" for b in _BOUNDS if getattr(self, b) is not None]
        if self.isin is not None:
            parts.append(f"one of {', '.join(self.isin)}")
        return " and ".join(parts)


@dataclass(frozen=True)
class DayRules:
    """What a day of a view must be like, from the view's tags.

    Attributes:
        min_rows: the least rows kept; None is unbounded.
        max_age_hours: how long before the day's end its newest event may lie; None is unbounded.
    """

    min_rows: Limit | None = None
    max_age_hours: Limit | None = None


@dataclass(frozen=True)
class Objectives:
    """How fresh a view of the stream shall be, from the view's tags `online_within_s` and `offline_within_s`.

    Attributes:
        online_s, offline_s: within so many seconds after they were produced 99 in 100 events can be read from it;
            None is no objective.
    """

    online_s: float | None = None
    offline_s: float | None = None

    def of_stores(self) -> dict[str, float]:
        """Those that are declared, by store: `online`, `offline`."""
        of_both = {"online": self.online_s, "offline": self.offline_s}
        return {store: within_s for store, within_s in of_both.items() if within_s is not None}


def objectives(view: FeatureView) -> Objectives:
    """The objectives in a view's tags.

    Raises:
        ConfigError: a tag is no number above 0.
    """

    def seconds(name: str) -> float | None:
        if name not in view.tags:
            return None
        found = _number(view.tags[name])
        if not (found > 0 and math.isfinite(found)):
            msg = (
                f"feature view `{view.name}`: tag {name}={view.tags[name]!r} is no number of seconds above 0; "
                f"write it as in {{'{name}': '2.5'}}"
            )
            raise ConfigError(msg)
        return found

    return Objectives(seconds("online_within_s"), seconds("offline_within_s"))


def field_rule(view: FeatureView, field: Field, column: str, *, is_key: bool) -> Rule:
    """The rule in a field's tags.

    Raises:
        ConfigError: a tag cannot be understood, or does not fit the field's type.
    """
    tags: Mapping[str, str] = field.tags or {}
    where = f"feature view `{view.name}`: field `{field.name}`"
    values: dict[str, Any] = {}
    for bound in _BOUNDS:
        if bound in tags:
            values[bound] = _number(tags[bound])
            if math.isnan(values[bound]):
                msg = f"{where}: tag {bound}={tags[bound]!r} is no number; write it as in {{'{bound}': '0.5'}}"
                raise ConfigError(msg)
            if field.dtype not in (Int32, Int64, Float32, Float64):
                msg = f"{where}: tag {bound} bounds numbers, the field is of type {field.dtype}; remove the tag"
                raise ConfigError(msg)
    if "isin" in tags:
        if field.dtype not in (Int32, Int64, Float32, Float64, Bool, String):
            msg = f"{where}: tag isin lists numbers or texts, the field is of type {field.dtype}; remove the tag"
            raise ConfigError(msg)
        values["isin"] = tuple(part.strip() for part in tags["isin"].split(","))
    if "nullable" in tags:
        if tags["nullable"] not in ("true", "false"):
            msg = f"{where}: tag nullable={tags['nullable']!r} is neither 'true' nor 'false'"
            raise ConfigError(msg)
        values["nullable"] = tags["nullable"] == "true"
    for name in ("max_null_share", "max_psi"):
        if is_key and name in tags:
            msg = f"{where}: tag {name} is for features, and the field is a join key; remove the tag"
            raise ConfigError(msg)
    values["severity"] = _severity(tags, where) or Severity.ERROR
    values["max_null_share"] = _limit(tags, where, "max_null_share", 0, 1, example="0.05")
    if tags.get("max_psi") == "none":
        values["max_psi"] = None
    elif "max_psi" in tags:
        values["max_psi"] = _limit(tags, where, "max_psi", 0, math.inf, example="0.25", default=Severity.WARNING)
    return Rule(column, **values)


def day_rules(view: FeatureView) -> DayRules:
    """The rules for a day in a view's tags.

    Raises:
        ConfigError: a tag cannot be understood.
    """
    where = f"feature view `{view.name}`"
    rows = _limit(view.tags, where, "min_rows", 0, math.inf, example="1000")
    if rows is not None and rows.bound != int(rows.bound):
        msg = (
            f"{where}: tag min_rows={view.tags['min_rows']!r} is no whole number; write it as in {{'min_rows': '1000'}}"
        )
        raise ConfigError(msg)
    return DayRules(rows, _limit(view.tags, where, "max_age_hours", 0, math.inf, example="6"))


def _severity(tags: Mapping[str, str], where: str) -> Severity | None:
    text = tags.get("severity")
    if text is None:
        return None
    if text not in tuple(Severity):
        msg = f"{where}: tag severity={text!r} is neither 'error' nor 'warning'"
        raise ConfigError(msg)
    return Severity(text)


def _limit(
    tags: Mapping[str, str],
    where: str,
    name: str,
    low: float,
    high: float,
    *,
    example: str,
    default: Severity = Severity.ERROR,
) -> Limit | None:
    """A tag such as `0.05` or `0.05 warning`; without a word its severity is the tag `severity`, else the default."""
    declared = _severity(tags, where)
    if name not in tags:
        return None
    text, _, word = tags[name].strip().partition(" ")
    bound, word = _number(text), word.strip()
    is_known = not word or word in tuple(Severity)
    if not low <= bound <= high or math.isinf(bound) or not is_known:
        span = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        msg = (
            f"{where}: tag {name}={tags[name]!r} is no number {span}, with or without a severity; "
            f"write it as in {{'{name}': '{example}'}} or {{'{name}': '{example} warning'}}"
        )
        raise ConfigError(msg)
    return Limit(bound, Severity(word) if word else declared or default)


def _number(text: str) -> float:
    """NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
