"""Avro schemas: read, made safe to decode with, and resolved, a writer's against a reader's.

Records are decoded with the writer's schema alone, and logical types are left to `streaming.avro_columns`: what is read
is plain values, quickly, and fastavro's code for skipping fields, which does not notice the end of its input, never
runs. What the reader's schema asks for is then done to the values, by functions made once a pair of schemas.

Source: Apache Avro 1.12, https://avro.apache.org/docs/1.12.0/specification/
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastavro import parse_schema
from fastavro.schema import SchemaParseException, UnknownType

MOST_NODES = 20_000
"""Named types are written out where they are used, and a small text can name very many."""

MOST_LEVELS = 64
"""Values are taken apart level by level, on the stack."""

Convert = Callable[[Any], Any]

_MOMENTS = tuple(f"{zone}timestamp-{unit}" for zone in ("", "local-") for unit in ("millis", "micros", "nanos"))
_LOGICAL: Mapping[str, tuple[str, ...]] = {
    "int": ("date", "time-millis"),
    "long": ("time-micros", *_MOMENTS),
    "string": ("uuid",),
    "bytes": ("decimal",),
    "fixed": ("decimal", "uuid", "duration"),
}
"""Logical types by what they may annotate; any other is to be ignored."""

_LARGEST_SCALE = 76
_NUMBERS = ("int", "long", "float", "double")


class AvroSchemaError(ValueError):
    """A schema that cannot be read, is not safe to decode with, or does not resolve. The message says where."""


@dataclass(frozen=True)
class Node:
    """A type with everything that it is made of, its names resolved.

    Attributes:
        kind: a primitive's name, or `fixed`, `enum`, `array`, `map`, `record`, `union`.
        logical: its logical type; None without one.
        scale: of a decimal.
        size: of a fixed, bytes.
        symbols, default: of an enum; the default is None without one.
        parts: an array's items or a map's values; a union's branches.
        fields: a record's.
    """

    kind: str
    logical: str | None = None
    scale: int = 0
    size: int = 0
    symbols: tuple[str, ...] = ()
    default: str | None = None
    parts: tuple[Node, ...] = ()
    fields: tuple[FieldNode, ...] = ()

    @property
    def branches(self) -> tuple[Node, ...]:
        """What a value that is not null may be."""
        all_branches = self.parts if self.kind == "union" else (self,)
        return tuple(branch for branch in all_branches if branch.kind != "null")

    def __str__(self) -> str:
        if self.kind == "union":
            return f"[{', '.join(str(part) for part in self.parts)}]"
        if self.parts:
            return f"{self.kind} of {self.parts[0]}"
        return f"{self.kind} ({self.logical})" if self.logical is not None else self.kind


@dataclass(frozen=True)
class FieldNode:
    """A field of a record. `default` is a tuple of its one value as decoding would give it; empty without one."""

    name: str
    node: Node
    aliases: tuple[str, ...] = ()
    default: tuple[Any, ...] = ()


@dataclass(frozen=True)
class AvroSchema:
    """A schema whose root is a record.

    Attributes:
        root: the record.
        decoding: what fastavro decodes with: no logical types, and no index below zero is taken.
    """

    root: Node
    decoding: Any


def read_schema(text: str, references: Sequence[str] = ()) -> AvroSchema:
    """Read a schema.

    Args:
        references: the schemas that it names types of, each after those that it needs itself.

    Raises:
        AvroSchemaError: it is no schema of a record, is recursive (a record could nest deeper than the stack is), or
            has an array of items that take no bytes (a few bytes could claim any number of them).
    """
    try:
        named: dict[str, Any] = {}
        for reference in references:
            parse_schema(json.loads(reference), named, _write_hint=False)
        root = _Expansion(named).node(parse_schema(json.loads(text), named, _write_hint=False), ())
        if root.kind != "record":
            msg = f"expected a record, found {root}"
            raise AvroSchemaError(msg)
        plain: dict[str, Any] = {}
        for reference in references:
            parse_schema(_without_logical_types(json.loads(reference)), plain)
        return AvroSchema(root, _guarded(parse_schema(_without_logical_types(json.loads(text)), plain)))
    except AvroSchemaError:
        raise
    except (
        SchemaParseException,
        UnknownType,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        msg = f"no Avro schema: {type(error).__name__}: {error}"
        raise AvroSchemaError(msg[:500]) from error


class _Expansion:
    """Makes nodes of a schema that fastavro has parsed."""

    def __init__(self, named: Mapping[str, Any]) -> None:
        self._named = named
        self._made = 0
        self._level = 0

    def node(self, schema: Any, within: tuple[str, ...]) -> Node:
        """The node of a schema that stands within the records of these names."""
        self._made += 1
        self._level += 1
        if self._made > MOST_NODES:
            msg = f"the schema has more than {MOST_NODES} parts when its named types are written out"
            raise AvroSchemaError(msg)
        if self._level > MOST_LEVELS:
            msg = f"the schema is nested deeper than {MOST_LEVELS} levels"
            raise AvroSchemaError(msg)
        made = self._node(schema, within)
        self._level -= 1
        return made

    def _node(self, schema: Any, within: tuple[str, ...]) -> Node:
        if isinstance(schema, list):
            return Node("union", parts=tuple(self.node(branch, within) for branch in schema))
        if isinstance(schema, str):
            return self.node(self._named[schema], within) if schema in self._named else Node(schema)
        kind = schema["type"]
        if not isinstance(kind, str) or kind in self._named:
            return self.node(kind, within)
        if kind in ("record", "error"):
            return self._record(schema, within)
        if kind == "array":
            items = self.node(schema["items"], within)
            if _least_bytes(items) == 0:
                msg = f"the schema has an array of {items}, which takes no bytes: a few bytes could claim any number"
                raise AvroSchemaError(msg)
            return Node(kind, parts=(items,))
        if kind == "map":
            return Node(kind, parts=(self.node(schema["values"], within),))
        if kind == "enum":
            return Node(kind, symbols=tuple(schema["symbols"]), default=schema.get("default"))
        return _annotated(kind, schema)

    def _record(self, schema: Mapping[str, Any], within: tuple[str, ...]) -> Node:
        name = schema["name"]
        if name in within:
            msg = f"the schema is recursive in `{name}`, and a record could nest deeper than the stack is"
            raise AvroSchemaError(msg)
        return Node("record", fields=tuple(self._field(field, (*within, name)) for field in schema["fields"]))

    def _field(self, field: Mapping[str, Any], within: tuple[str, ...]) -> FieldNode:
        node = self.node(field["type"], within)
        default = (_default(field["default"], node),) if "default" in field else ()
        return FieldNode(field["name"], node, tuple(field.get("aliases") or ()), default)


def _annotated(kind: str, schema: Mapping[str, Any]) -> Node:
    """A primitive or a fixed, with its logical type if that is one."""
    logical = schema.get("logicalType")
    known = logical if logical in _LOGICAL.get(kind, ()) else None
    scale = (schema.get("scale") or 0) if known == "decimal" else 0
    if scale > _LARGEST_SCALE:
        msg = f"the scale of a decimal is {scale}; expected at most {_LARGEST_SCALE}"
        raise AvroSchemaError(msg)
    size = schema["size"] if kind == "fixed" else 0
    if not isinstance(size, int) or size < 0:
        msg = f"the size of the fixed `{schema['name']}` is {size!r}"
        raise AvroSchemaError(msg)
    return Node(kind, known, scale=scale, size=size)


def _least_bytes(node: Node) -> int:
    """The least number of bytes that a value takes, as far as telling none from some needs it."""
    if node.kind == "record":
        return sum(_least_bytes(field.node) for field in node.fields)
    return {"null": 0, "fixed": node.size}.get(node.kind, 1)


def _default(value: Any, node: Node) -> Any:
    """A default as JSON in the schema, as decoding would give it. Of a union any branch may take it."""
    if node.kind in ("bytes", "fixed") and isinstance(value, str):
        return value.encode("latin-1")
    if node.kind in ("float", "double") and value is not None:
        return float(value)
    if node.kind == "array":
        return [_default(item, node.parts[0]) for item in value]
    if node.kind == "map":
        return {key: _default(item, node.parts[0]) for key, item in value.items()}
    if node.kind == "record":
        return {
            field.name: _default(value[field.name], field.node) if field.name in value else field.default[0]
            for field in node.fields
        }
    if node.kind == "union" and value is not None and len(node.branches) == 1:
        return _default(value, node.branches[0])
    return value


def _without_logical_types(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _without_logical_types(value) for key, value in schema.items() if key != "logicalType"}
    if isinstance(schema, list):
        return [_without_logical_types(value) for value in schema]
    return schema


class _Choices(list[Any]):
    """A union's branches or an enum's symbols. A list takes -1 for its last, and so would fastavro."""

    def __len__(self) -> int:
        """None, as far as fastavro sees: its compiled code adds the length to an index below zero."""
        return 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < super().__len__():
            msg = f"choice {index} of {super().__len__()} in a union or enum"
            raise IndexError(msg)
        return super().__getitem__(index)


def _guarded(parsed: Any) -> Any:
    """A parsed schema, changed in place, in which choices are taken by `_Choices`."""
    for schema in (parsed, *parsed["__named_schemas"].values()):
        _guard(schema)
    return parsed


def _guard(schema: Any) -> Any:
    if isinstance(schema, list):
        return _Choices(_guard(branch) for branch in schema)
    if isinstance(schema, dict):
        if "symbols" in schema:
            schema["symbols"] = _Choices(schema["symbols"])
        for key in ("items", "values"):
            if key in schema:
                schema[key] = _guard(schema[key])
        for field in schema.get("fields", ()):
            field["type"] = _guard(field["type"])
    return schema


def resolve(writer: Node, reader: Node) -> tuple[Node, Convert | None]:
    """How a value of the writer's type becomes one of the reader's.

    Fields go by name and the reader's aliases; names of types are not compared. Of a value's logical type the writer's
    word counts, so that a column that went from milliseconds to microseconds is right in every record; the reader's
    counts where the writer has none. A null is handed on even where the reader's type has none: whether it may be one
    is for the view's rules to say.

    Returns:
        The type of the result, and the function that makes it; None if values stay as they are.

    Raises:
        AvroSchemaError: they do not resolve.
    """
    if writer == reader:
        return writer, None
    if writer.kind == "union":
        return _resolve_union(writer, reader)
    if reader.kind == "union":
        for branch in sorted(reader.branches, key=lambda branch: branch.kind != writer.kind):
            try:
                return resolve(writer, branch)
            except AvroSchemaError:
                continue
        if writer.kind == "null":
            return writer, None
        raise _mismatch(writer, reader)
    if writer.kind == reader.kind == "record":
        return _resolve_record(writer, reader)
    if writer.kind == reader.kind and writer.kind in ("array", "map"):
        part, convert = resolve(writer.parts[0], reader.parts[0])
        made = replace(reader, parts=(part,))
        if convert is None:
            return made, None
        if writer.kind == "array":
            return made, lambda items: [convert(item) for item in items]
        return made, lambda entries: {key: convert(value) for key, value in entries.items()}
    if writer.kind == reader.kind == "enum":
        return _resolve_enum(writer, reader)
    return _resolve_simple(writer, reader)


def _resolve_union(writer: Node, reader: Node) -> tuple[Node, Convert | None]:
    has_null = any(part.kind == "null" for part in writer.parts)
    if len(writer.branches) == 1:
        part, convert = resolve(writer.branches[0], reader)
        if not has_null:
            return part, convert
        inner = part.branches
        made = Node("union", parts=(Node("null"), *inner))
        return made, None if convert is None else lambda value: None if value is None else convert(value)
    found = [resolve(branch, reader) for branch in writer.branches]
    if any(convert is not None for _, convert in found):
        msg = f"{writer} is a choice of several types, which are not read as {reader}; let the view's schema have both"
        raise AvroSchemaError(msg)
    parts = dict.fromkeys(branch for node, _ in found for branch in node.branches)
    return Node("union", parts=(*((Node("null"),) if has_null else ()), *parts)), None


def _resolve_record(writer: Node, reader: Node) -> tuple[Node, Convert | None]:
    written = {field.name: field for field in writer.fields}
    fields: list[FieldNode] = []
    steps: list[tuple[str, str | None, Convert | None, Any]] = []
    for field in reader.fields:
        source = next((written[name] for name in (field.name, *field.aliases) if name in written), None)
        if source is None:
            if not field.default:
                msg = f"field `{field.name}` has no default, and the writer does not have it"
                raise AvroSchemaError(msg)
            fields.append(field)
            steps.append((field.name, None, None, field.default[0]))
            continue
        try:
            node, convert = resolve(source.node, field.node)
        except AvroSchemaError as error:
            msg = f"field `{field.name}`: {error}"
            raise AvroSchemaError(msg) from None
        fields.append(replace(field, node=node))
        steps.append((field.name, source.name, convert, None))
    made = Node("record", fields=tuple(fields))
    if [(name, None) for name in written] == [(source, convert) for _, source, convert, _ in steps] and all(
        name == source for name, source, _, _ in steps
    ):
        return made, None

    def convert_record(record: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: default if source is None else (record[source] if convert is None else convert(record[source]))
            for name, source, convert, default in steps
        }

    return made, convert_record


def _resolve_enum(writer: Node, reader: Node) -> tuple[Node, Convert | None]:
    known = frozenset(reader.symbols)
    if known.issuperset(writer.symbols):
        return reader, None

    def convert_symbol(symbol: str) -> str:
        if symbol in known:
            return symbol
        if reader.default is None:
            msg = f"`{symbol}` is no symbol of the view's enum, which has no default"
            raise ValueError(msg)
        return reader.default

    return reader, convert_symbol


def _resolve_simple(writer: Node, reader: Node) -> tuple[Node, Convert | None]:
    if writer.kind == reader.kind:
        if writer.size != reader.size:
            raise _mismatch(writer, reader)
        return (reader if writer.logical is None else writer), None
    wider = writer.kind in _NUMBERS and reader.kind in _NUMBERS[_NUMBERS.index(writer.kind) :]
    if wider and reader.kind == "long":
        return (reader if writer.logical is None else replace(writer, kind="long")), None
    if wider:
        return reader, float
    if (writer.kind, reader.kind) == ("string", "bytes"):
        return reader, str.encode
    if (writer.kind, reader.kind) == ("bytes", "string"):
        return reader, bytes.decode
    raise _mismatch(writer, reader)


def _mismatch(writer: Node, reader: Node) -> AvroSchemaError:
    return AvroSchemaError(f"the writer's {writer} cannot be read as {reader}")
