"""Records to columns: Avro, plain by the view's schema, or framed with the id of a schema in a registry.

A record is decoded by itself and to its last byte. Records of several schemas may be mixed; each schema gives the same
columns of the same types.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
from fastavro import schemaless_reader
from feast.types import FeastType, UnixTimestamp

from headrace.conform import Reason, Reject, Rows, parse_timestamps
from headrace.contract import ViewContract
from headrace.errors import ConfigError, TransientError
from streaming.avro_columns import Form, form_of, parse_time
from streaming.avro_flat import FEWEST, FlatReader, is_flat
from streaming.avro_numbers import check_numbers
from streaming.avro_schema import AvroSchema, AvroSchemaError, Convert, Node, read_schema, resolve
from streaming.decode import Decoded
from streaming.schema_registry import MAGIC, PREFIX_BYTES, SchemaRegistry, UnknownSchemaError

UNKNOWN_S = 60.0
"""For so long an id that the registry does not know is not asked for again."""

DOUBT_S = 3.0
"""A producer registers before it sends, but the registry's replicas may be behind: for so long "unknown" is doubted."""

MOST_UNKNOWN = 100
"""The most unknown ids asked for in one go, so that garbage cannot keep the worker asking."""

_LONGEST_MESSAGE = 300

FAULTS = (ValueError, TypeError, OverflowError, ArithmeticError, LookupError, AttributeError, pa.ArrowException)
"""What a value that does not fit may raise on its way to a column."""


class NotYetKnownError(TransientError):
    """The registry does not know an id; perhaps it will in a moment."""


@dataclass(frozen=True)
class Column:
    """A column of the view in a schema: how its values are had from decoded records.

    Attributes:
        source: the field that has the values; None if none does.
        resolve: makes what the view's schema asks for of a value; None leaves it.
        default: what every value is without a field.
    """

    name: str
    source: str | None
    resolve: Convert | None
    default: Any
    form: Form
    is_time: bool

    def of_records(self, records: Sequence[Mapping[str, Any]]) -> pa.Array:
        """The values of records. Raises one of `FAULTS` if any of them does not fit."""
        source = self.source
        return self._array([self.default] * len(records) if source is None else [r[source] for r in records])

    def of_fields(self, fields: Mapping[str, pa.Array], rows: int) -> pa.Array:
        """The same of records that were read together."""
        if self.source is None:
            return self._array([self.default] * rows)
        if self.resolve is None and self.form.convert is None:
            return fields[self.source].cast(self.form.arrow)
        return self._array(fields[self.source].to_pylist())

    def _array(self, values: list[Any]) -> pa.Array:
        resolve, convert = self.resolve, self.form.convert
        if resolve is not None:
            values = [resolve(value) for value in values]
        if convert is parse_time:
            moments, bad = parse_timestamps(pa.array(values, pa.string()))
            if bad.any():
                msg = "a time that cannot be read"
                raise ValueError(msg)
            return moments
        if convert is not None:
            values = [None if value is None else convert(value) for value in values]
        return pa.array(values, self.form.arrow)


@dataclass(frozen=True)
class Plan:
    """How the records of one writer's schema become columns.

    Attributes:
        skip_bytes: where in a record the data begin.
        is_flat: whether many records may be read together.
    """

    schema: AvroSchema
    columns: tuple[Column, ...]
    skip_bytes: int
    is_flat: bool


@dataclass(frozen=True)
class Refusal:
    """Why no record of a schema is taken."""

    reason: Reason
    field: str | None
    message: str


class _FieldError(AvroSchemaError):
    """A schema that does not fit in one field."""

    def __init__(self, reason: Reason, field: str, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(reason, field, message)


@dataclass(frozen=True)
class _Given:
    """What a writer's schema gives for a field; see `Column`."""

    node: Node
    source: str | None
    resolve: Convert | None = None
    default: Any = None


@dataclass(frozen=True)
class Group:
    """The records of one schema, with their index in the slice."""

    plan: Plan
    rows: list[int]
    values: list[bytes]

    def tables(self, rejects: list[Reject]) -> list[tuple[pa.Table, Rows]]:
        """The columns of the records that are good, with their indices; the others are added to the rejects."""
        rows = np.array(self.rows, dtype=np.int64)
        done: list[tuple[pa.Table, Rows]] = []
        left = np.arange(len(rows))
        if self.plan.is_flat and len(rows) >= FEWEST:
            table, good = self._together()
            if table is not None:
                done.append((table, rows[good]))
                left = np.flatnonzero(~good)
        if len(left):
            done.append(self._one_by_one(rows, left.tolist(), rejects))
        return done

    def _together(self) -> tuple[pa.Table | None, Any]:
        """The good records, read together, and which they are. No table if a value of theirs does not fit."""
        columns = self.plan.columns
        reader = FlatReader(self.plan.schema.root, self.values, self.plan.skip_bytes)
        try:
            fields, good = reader.read()
            if not good.all():
                keep = pa.array(np.flatnonzero(good))
                fields = {name: values.take(keep) for name, values in fields.items()}
            arrays = [column.of_fields(fields, int(good.sum())) for column in columns]
        except FAULTS:
            return None, None
        return pa.Table.from_arrays(arrays, [column.name for column in columns]), good

    def _one_by_one(self, rows: Rows, which: list[int], rejects: list[Reject]) -> tuple[pa.Table, Rows]:
        """Some of the records, each read by itself."""
        records: list[Any] = []
        read: list[int] = []
        for index in which:
            try:
                records.append(_read(self.plan, self.values[index]))
            except Exception as error:  # noqa: BLE001 - hostile bytes raise more than the decoder's own errors
                message = f"no Avro record of its schema: {type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
                rejects.append(Reject(int(rows[index]), Reason.UNDECODABLE, None, message))
            else:
                read.append(index)
        table, bad = _table(self.plan, records)
        kept = rows[read]
        if bad:
            rejects.extend(replace(reject, row=int(kept[row])) for row, reject in bad.items())
            keep = np.setdiff1d(np.arange(len(records)), list(bad))
            table, kept = table.take(pa.array(keep)), kept[keep]
        return table, kept


class AvroDecoder:
    """Decodes the Avro records of one view. One thread at a time.

    With a registry every record is framed: magic byte 0, the schema's id in four bytes, the data. Without one none is.

    Raises:
        ConfigError: the view's schema cannot be read, or does not give what the view needs.
    """

    def __init__(self, contract: ViewContract, registry: SchemaRegistry | None) -> None:
        self._contract = contract
        self._registry = registry
        where = f"feature view `{contract.name}`: the schema_json of its AvroFormat"
        text = (contract.message_schema or "").strip()
        self._reader: AvroSchema | None = None
        if text:
            try:
                self._reader = read_schema(text)
                self._own = self._plan(self._reader, 0)
            except AvroSchemaError as error:
                msg = f"{where}: {error}; correct it, and run `feast apply`"
                raise ConfigError(msg) from error
        elif registry is None:
            msg = (
                f"{where} is empty; write the schema there, or set HEADRACE_SCHEMA_REGISTRY_URL if records name theirs"
            )
            raise ConfigError(msg)
        self._known: dict[int, Plan | Refusal] = {}
        self._unknown: dict[int, float] = {}
        self._doubted_s: float | None = None
        self._settled_s = -UNKNOWN_S

    def __call__(self, values: Sequence[bytes | None]) -> Decoded:
        """Decode the values of records. Never raises for what is in them.

        Raises:
            TransientError: the registry does not answer, or does not know an id that it may know in a moment. Nothing
                is lost by calling again.
        """
        if self._registry is not None:
            self._learn(values, self._registry)
        skipped = [index for index, value in enumerate(values) if value is None]
        rejects: list[Reject] = []
        groups: dict[int, Group] = {}
        for index, value in enumerate(values):
            if value is None:
                continue
            plan = self._plan_of(value)
            if isinstance(plan, Refusal):
                rejects.append(Reject(index, plan.reason, plan.field, plan.message))
                continue
            group = groups.get(id(plan))
            if group is None:
                group = groups[id(plan)] = Group(plan, [], [])
            group.rows.append(index)
            group.values.append(value)
        parts = [part for group in groups.values() for part in group.tables(rejects)]
        rejects.sort(key=lambda reject: reject.row)
        indices = np.concatenate([np.empty(0, dtype=np.int64), *(rows for _, rows in parts)])
        table = pa.concat_tables([table for table, _ in parts]) if parts else self._empty()
        if len(parts) > 1:
            order = np.argsort(indices)
            table, indices = table.take(pa.array(order)), indices[order]
        return Decoded(table, indices, rejects, np.array(skipped, dtype=np.int64))

    def _plan_of(self, value: bytes) -> Plan | Refusal:
        if self._registry is None:
            return self._own
        schema_id = _schema_id(value)
        if schema_id is None:
            return Refusal(
                Reason.UNDECODABLE,
                None,
                f"expected the magic byte 0 and a schema's id, found {value[:PREFIX_BYTES].hex() or 'no byte'}",
            )
        known = self._known.get(schema_id)
        if known is not None:
            return known
        asked = "is not known to the schema registry" if schema_id in self._unknown else "was not asked for"
        return Refusal(Reason.UNDECODABLE, None, f"schema id {schema_id} {asked}")

    def _empty(self) -> pa.Table:
        return pa.table({name: pa.nulls(0) for name in self._contract.schema.names})

    # -- schemas -----------------------------------------------------------------------------------------------------

    def _learn(self, values: Sequence[bytes | None], registry: SchemaRegistry) -> None:
        """Ask for the schemas of records that are not known yet, those of most records first."""
        now_s = time.monotonic()
        self._unknown = {key: since for key, since in self._unknown.items() if now_s - since < UNKNOWN_S}
        wanted = Counter(
            schema_id
            for value in values
            if value is not None and (schema_id := _schema_id(value)) is not None
            if schema_id not in self._known and schema_id not in self._unknown
        )
        unknown: list[int] = []
        for schema_id, _ in wanted.most_common():
            if len(unknown) == MOST_UNKNOWN:
                break
            try:
                self._known[schema_id] = self._plan_for(schema_id, registry)
            except UnknownSchemaError:
                unknown.append(schema_id)
        if unknown and self._is_doubtful():
            msg = f"{registry.url} does not know schema id {unknown[0]}"
            raise NotYetKnownError(msg)
        self._unknown.update(dict.fromkeys(unknown, time.monotonic()))
        self._doubted_s = None

    def _is_doubtful(self) -> bool:
        """Whether "unknown" may only be too early; said for a bounded time, and that not again for a while."""
        now_s = time.monotonic()
        if self._doubted_s is None:
            if now_s - self._settled_s < UNKNOWN_S:
                return False
            self._doubted_s = now_s
        if now_s - self._doubted_s < DOUBT_S:
            return True
        self._settled_s = now_s
        return False

    def _plan_for(self, schema_id: int, registry: SchemaRegistry) -> Plan | Refusal:
        registered = registry.schema(schema_id)
        where = f"schema id {schema_id}"
        if registered.kind != "AVRO":
            return Refusal(Reason.UNDECODABLE, None, f"{where} is {registered.kind}, the view expects AVRO")
        try:
            return self._plan(read_schema(registered.text, registered.references), PREFIX_BYTES)
        except _FieldError as error:
            return Refusal(error.refusal.reason, error.refusal.field, f"{where}: {error}"[:_LONGEST_MESSAGE])
        except AvroSchemaError as error:
            return Refusal(Reason.UNDECODABLE, None, f"{where}: {error}"[:_LONGEST_MESSAGE])

    def _plan(self, schema: AvroSchema, skip_bytes: int) -> Plan:
        """How records that were written by a schema become the view's columns.

        Raises:
            AvroSchemaError: it does not resolve to the view's own schema, or does not give what the view needs.
        """
        fields = self._resolved(schema.root)
        contract = self._contract
        columns = []
        for field in contract.schema:
            is_time = field.name in (contract.timestamp_field, contract.created_field)
            dtype: FeastType = UnixTimestamp if is_time else contract.dtype(field.name)
            if field.name not in fields and contract.rule(field.name).nullable is not True:
                msg = f"field `{field.name}` is missing, and the view does not tag it nullable"
                raise _FieldError(Reason.MISSING_FIELD, field.name, msg)
            given = fields.get(field.name, _Given(Node("null"), None))
            try:
                form = form_of(given.node, dtype, field.type)
            except AvroSchemaError as error:
                msg = f"field `{field.name}`: {error}"
                reason = Reason.BAD_TIMESTAMP if dtype == UnixTimestamp else Reason.WRONG_TYPE
                raise _FieldError(reason, field.name, msg) from None
            is_moment = dtype == UnixTimestamp
            columns.append(Column(field.name, given.source, given.resolve, given.default, form, is_moment))
        return Plan(schema, tuple(columns), skip_bytes, is_flat(schema.root))

    def _resolved(self, writer: Node) -> dict[str, _Given]:
        """The fields that a writer's schema gives, by name.

        Of the view's own schema only the fields that are the view's columns are wanted.
        """
        if self._reader is None or self._reader.root == writer:
            return {field.name: _Given(field.node, field.name) for field in writer.fields}
        written = {field.name: field for field in writer.fields}
        found: dict[str, _Given] = {}
        for field in self._reader.root.fields:
            if field.name not in self._contract.schema.names:
                continue
            source = next((written[name] for name in (field.name, *field.aliases) if name in written), None)
            if source is None:
                if field.default:
                    found[field.name] = _Given(field.node, None, default=field.default[0])
                continue
            try:
                node, convert = resolve(source.node, field.node)
            except AvroSchemaError as error:
                msg = f"field `{field.name}`: {error}"
                raise _FieldError(Reason.WRONG_TYPE, field.name, msg) from None
            found[field.name] = _Given(node, source.name, convert)
        return found


def _schema_id(value: bytes) -> int | None:
    """The id that a record is framed with; None if it is not framed."""
    if len(value) < PREFIX_BYTES or value[0] != MAGIC:
        return None
    return int.from_bytes(value[1:PREFIX_BYTES], "big")


def _read(plan: Plan, value: bytes) -> Any:
    """A record, to its last byte."""
    data = BytesIO(value[plan.skip_bytes :] if plan.skip_bytes else value)
    record = schemaless_reader(data, plan.schema.decoding, None)
    left = len(value) - plan.skip_bytes - data.tell()
    if left:
        msg = f"{left} bytes are left after the record"
        raise ValueError(msg)
    check_numbers(plan.schema.root, value, plan.skip_bytes)
    return record


def _table(plan: Plan, records: Sequence[Any]) -> tuple[pa.Table, dict[int, Reject]]:
    """Records as columns, and the bad ones by row; those are null where they are bad."""
    bad: dict[int, Reject] = {}
    arrays = []
    for column in plan.columns:
        try:
            arrays.append(column.of_records(records))
        except FAULTS:
            arrays.append(_cell_by_cell(column, records, bad))
    return pa.Table.from_arrays(arrays, [column.name for column in plan.columns]), bad


def _cell_by_cell(column: Column, records: Sequence[Any], bad: dict[int, Reject]) -> pa.Array:
    parts = [pa.array([], column.form.arrow)]
    for row, record in enumerate(records):
        try:
            parts.append(column.of_records([record]))
        except FAULTS as error:
            reason = Reason.BAD_TIMESTAMP if column.is_time else Reason.WRONG_TYPE
            message = f"field `{column.name}`: {error}"[:_LONGEST_MESSAGE]
            bad.setdefault(row, Reject(row, reason, column.name, message))
            parts.append(pa.nulls(1, column.form.arrow))
    return pa.concat_arrays(parts)
