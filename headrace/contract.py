"""What a feature view promises: its columns and types, its value rules, and where its rows come from and go to.

A `ViewContract` is read from the registry through Feast, once a process. It is the only thing the stream and the batch
chain know of a view, so a new view is a change in the feature repository and nowhere else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from feast import FeatureView, KafkaSource, RepoConfig
from feast.feature_view import DUMMY_ENTITY_ID
from feast.field import Field
from feast.infra.offline_stores.file_source import FileSource
from feast.types import (
    Array,
    Bool,
    Bytes,
    Decimal,
    FeastType,
    Float32,
    Float64,
    ImageBytes,
    Int32,
    Int64,
    Invalid,
    Json,
    Map,
    PdfBytes,
    Set,
    String,
    Struct,
    TimeUuid,
    UnixTimestamp,
    Uuid,
)

from headrace.errors import ConfigError
from headrace.objects import ObjectPath
from headrace.place import File
from headrace.rules import DayRules, Objectives, Rule, day_rules, field_rule, objectives

TIMESTAMP = pa.timestamp("us", tz="UTC")
"""The one type of every time column: microseconds, UTC."""


@dataclass(frozen=True)
class Transform:
    """A view's transformation: a pure function of a table that keeps its rows and their order.

    Attributes:
        name: as tagged, `module:function`.
        function: `pyarrow.Table -> pyarrow.Table`; a boolean column `SKIP_COLUMN` in the result marks rows to skip.
        hash: SHA-256 of the module's source, hexadecimal, the first 16 digits.
    """

    SKIP_COLUMN = "__skip__"

    name: str
    function: Callable[[pa.Table], pa.Table]
    hash: str


@dataclass(frozen=True)
class ViewContract:
    """One feature view as the rest of Headrace sees it.

    Columns have the names of the source: of the events, the source table and the segments. Only where the view maps a
    field (`field_mapping` of its source) does Feast know it by another name, see `view_name`.

    Attributes:
        join_keys: their columns; none for a view without an entity, whose one row has the empty key.
        features: their columns, in the view's order.
        schema: the columns of every segment, in order: join keys, features, event timestamp, created timestamp.
        field_mapping: by column the name of a mapped field in the view.
        rules: of the join keys and features, those without a tag included.
        day_rules: what a day of the batch chain must be like.
        objectives: how fresh the stream shall keep it.
        directory: the view's folder of segments, absolute, or the prefix of an object store.
        topic, bootstrap_servers, message_format, message_schema: of the view's `KafkaSource`; None without one.
            The format is lower-case: `json`, `avro`, `proto`.
        source_table: the view's tag of that name, the table that the batch chain reads; None without one.
        source_files: the view's tag of that name, the files that it reads instead; None without one.
        transform: the view's tag of that name, `module:function`; None without one.
        retain_days: the view's tag of that name, how many days of history retention keeps; None without one: all.
    """

    name: str
    project: str
    feature_view: FeatureView = field(repr=False)
    join_keys: tuple[str, ...]
    features: tuple[str, ...]
    timestamp_field: str
    created_field: str | None
    schema: pa.Schema
    field_mapping: Mapping[str, str]
    rules: tuple[Rule, ...]
    day_rules: DayRules
    objectives: Objectives
    directory: File
    topic: str | None
    bootstrap_servers: str | None
    message_format: str | None
    message_schema: str | None
    source_table: str | None
    source_files: str | None
    transform: str | None
    retain_days: int | None

    @classmethod
    def from_feast(cls, view: FeatureView, config: RepoConfig) -> ViewContract:
        """Read a view's contract.

        Raises:
            ConfigError: the view has no `FileSource` to hold its history, maps fields differently in its two sources,
                lacks a type or has one that cannot be served, has columns whose names differ by case alone, or has a
                tag that cannot be understood.
        """
        source = view.batch_source
        if not isinstance(source, FileSource):
            msg = (
                f"feature view `{view.name}`: expected a FileSource (or a KafkaSource/PushSource with "
                f"batch_source=FileSource(...)), found {type(source).__name__}; "
                "declare one whose path is the view's folder"
            )
            raise ConfigError(msg)
        stream = view.stream_source if isinstance(view.stream_source, KafkaSource) else None
        if stream is not None and stream.field_mapping and dict(stream.field_mapping) != dict(source.field_mapping):
            msg = (
                f"feature view `{view.name}`: the field_mapping of its KafkaSource, {dict(stream.field_mapping)}, "
                f"is not that of its batch_source, {dict(source.field_mapping)}; declare the same for both"
            )
            raise ConfigError(msg)
        mapped = {name: column for column, name in source.field_mapping.items() if column != name}
        entities = [column for column in view.entity_columns if column.name != DUMMY_ENTITY_ID]
        created = mapped.get(source.created_timestamp_column, source.created_timestamp_column) or None
        timestamp = mapped.get(source.timestamp_field, source.timestamp_field)
        fields = [*entities, *view.features]
        columns = [
            _column(view, field, mapped.get(field.name, field.name), is_key=index < len(entities))
            for index, field in enumerate(fields)
        ]
        columns.append(pa.field(timestamp, TIMESTAMP))
        if created is not None:
            columns.append(pa.field(created, TIMESTAMP))
        _refuse_alike(view, [column.name for column in columns])
        options = stream.kafka_options if stream is not None else None
        message_format = options.message_format if options is not None else None
        return cls(
            name=view.name,
            project=config.project,
            feature_view=view,
            join_keys=tuple(mapped.get(column.name, column.name) for column in entities),
            features=tuple(mapped.get(field.name, field.name) for field in view.features),
            timestamp_field=timestamp,
            created_field=created,
            schema=pa.schema(columns),
            field_mapping={column: name for name, column in mapped.items()},
            rules=tuple(
                field_rule(view, field, mapped.get(field.name, field.name), is_key=index < len(entities))
                for index, field in enumerate(fields)
            ),
            day_rules=day_rules(view),
            objectives=objectives(view),
            directory=directory_of(source, config),
            topic=options.topic if options is not None else None,
            bootstrap_servers=options.kafka_bootstrap_servers if options is not None else None,
            message_format=_format_name(message_format),
            message_schema=getattr(message_format, "schema_json", None) or None,
            source_table=view.tags.get("source_table") or None,
            source_files=_source_files(view),
            transform=view.tags.get("transform") or None,
            retain_days=_retain_days(view),
        )

    @property
    def has_source(self) -> bool:
        """Whether the batch chain has anything to read for it."""
        return self.source_table is not None or self.source_files is not None

    def view_name(self, column: str) -> str:
        """What Feast calls a column."""
        return self.field_mapping.get(column, column)

    def dtype(self, column: str) -> FeastType:
        """The Feast type of a join key or feature."""
        return self._dtypes[self.view_name(column)]

    def rule(self, column: str) -> Rule:
        """The rule of a column; an empty one where none is declared."""
        return self._rules.get(column) or Rule(column)

    @cached_property
    def _dtypes(self) -> Mapping[str, FeastType]:
        """By the name in the view. Each batch asks for each column."""
        return {field.name: field.dtype for field in (*self.feature_view.entity_columns, *self.feature_view.features)}

    @cached_property
    def _rules(self) -> Mapping[str, Rule]:
        return {rule.column: rule for rule in self.rules}


def directory_of(source: FileSource, config: RepoConfig) -> File:
    """The absolute path of a file source, relative ones taken from the feature repository; or its URL.

    Raises:
        ConfigError: the URL is of no object store that is known.
    """
    if "://" in source.path:
        return ObjectPath.parse(source.path, source.s3_endpoint_override)
    return Path(FileSource.get_uri_for_file_path(config.repo_path, source.path)).resolve()


def load_transform(contract: ViewContract, repo_path: Path) -> Transform | None:
    """Load the transformation that a view names, by path from the feature repository.

    Raises:
        ConfigError: there is no such file or function.
    """
    if contract.transform is None:
        return None
    module_name, _, function_name = contract.transform.partition(":")
    path = Path(repo_path) / (module_name.replace(".", "/") + ".py")
    where = f"feature view `{contract.name}`: tag transform={contract.transform!r}"
    if not path.is_file():
        msg = f"{where} expects the file {path}, which does not exist; write `module:function`, its module being there"
        raise ConfigError(msg)
    spec = importlib.util.spec_from_file_location(f"headrace_transform_{module_name}", path)
    if spec is None or spec.loader is None:  # cannot happen for a .py file that exists
        msg = f"{where}: {path} cannot be loaded as a Python module"
        raise ConfigError(msg)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    if not callable(function):
        msg = f"{where} expects a function {function_name!r} in {path}; define it there"
        raise ConfigError(msg)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Transform(contract.transform, function, digest)


def _column(view: FeatureView, field: Field, name: str, *, is_key: bool) -> pa.Field:
    """A column of the segments, or a clear refusal of what could never be served."""
    where = f"feature view `{view.name}`: field `{field.name}`"
    if field.dtype == Invalid:
        msg = f"{where} has no type; declare its dtype in the schema"
        raise ConfigError(msg)
    if is_key and field.dtype not in _KEY_TYPES:
        msg = (
            f"{where} is a join key of type {field.dtype}; Feast serializes keys of Int32, Int64, String, Bytes and "
            "UnixTimestamp only; use one of these"
        )
        raise ConfigError(msg)
    kind = _arrow_type(field.dtype)
    if kind is None or field.dtype == Set(Json):  # which has an Arrow type, but no value type
        msg = (
            f"{where} has type {field.dtype}, which Feast cannot take from a table; use another, such as String or Json"
        )
        raise ConfigError(msg)
    return pa.field(name, kind)


def _refuse_alike(view: FeatureView, names: Sequence[str]) -> None:
    """Where names differ by case alone: DuckDB and Spark would read one column for both."""
    lower: dict[str, str] = {}
    for name in names:
        if (other := lower.setdefault(name.lower(), name)) != name:
            msg = (
                f"feature view `{view.name}`: expected columns that differ by more than case, found `{other}` and "
                f"`{name}`, which readers of Parquet do not tell apart; rename one of them"
            )
            raise ConfigError(msg)


_KEY_TYPES = (Int32, Int64, String, Bytes, UnixTimestamp)

_ITEMS: Mapping[FeastType, pa.DataType] = {
    Bool: pa.bool_(),
    Int32: pa.int32(),
    Int64: pa.int64(),
    Float32: pa.float32(),
    Float64: pa.float64(),
    String: pa.string(),
    Uuid: pa.string(),
    TimeUuid: pa.string(),
    Decimal: pa.string(),
    Json: pa.string(),
    Bytes: pa.binary(),
    UnixTimestamp: TIMESTAMP,
}
"""Types that may be alone or in a collection."""


def _arrow_type(dtype: FeastType) -> pa.DataType | None:
    """The Arrow type of a column that Feast's own readers of the folder take for `dtype`; None if there is none.

    Maps are JSON text: Feast fails on Arrow's map type, and a struct would give every row the entries of all.
    """
    if dtype in (PdfBytes, ImageBytes):
        return pa.binary()
    if dtype == Map or (isinstance(dtype, Array) and dtype.base_type == Map):
        return pa.string()
    if isinstance(dtype, Struct):
        fields = {name: _arrow_type(inner) for name, inner in dtype.fields.items() if _fits_struct(inner)}
        if len(fields) < len(dtype.fields) or None in fields.values():
            return None
        return pa.struct(list(fields.items()))
    if isinstance(dtype, Array) and isinstance(dtype.base_type, Struct):
        item = _arrow_type(dtype.base_type)
        return None if item is None else pa.list_(item)
    if isinstance(dtype, Array | Set):
        return _collection_type(dtype)
    return _ITEMS.get(dtype)


def _collection_type(dtype: Array | Set) -> pa.DataType | None:
    base = dtype.base_type
    item = _collection_type(base) if isinstance(base, Array | Set) else _ITEMS.get(base)
    return None if item is None else pa.list_(item)


def _fits_struct(dtype: FeastType) -> bool:
    """Feast takes what a struct holds by the look of it, which tells neither sets nor maps nor lists of lists."""
    if isinstance(dtype, Array):
        return not isinstance(dtype.base_type, Array | Set) and dtype.base_type != Map
    return not isinstance(dtype, Set) and dtype != Map


def _source_files(view: FeatureView) -> str | None:
    files = view.tags.get("source_files") or None
    if files is not None and view.tags.get("source_table"):
        msg = (
            f"feature view `{view.name}` has the tags source_table={view.tags['source_table']!r} and "
            f"source_files={files!r}; its rows come from one of them: remove the other"
        )
        raise ConfigError(msg)
    return files


def _retain_days(view: FeatureView) -> int | None:
    text = view.tags.get("retain_days")
    if text is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        msg = (
            f"feature view `{view.name}`: tag retain_days={text!r} is no whole number of days from 1 to 99999; "
            "write it as in {'retain_days': '90'}, or remove it to keep everything"
        )
        raise ConfigError(msg)
    return int(text)


def _format_name(message_format: Any) -> str | None:
    """`JsonFormat` → `json`, and so on; None for None."""
    if message_format is None:
        return None
    return type(message_format).__name__.removesuffix("Format").lower()
