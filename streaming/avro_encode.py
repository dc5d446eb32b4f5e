"""Made-up events as Avro: values as JSON has them, fitted to whatever schema the topic's records are written with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from io import BytesIO
from typing import Any

from fastavro import schemaless_writer

from headrace.errors import ConfigError
from streaming.avro_columns import parse_time
from streaming.avro_schema import AvroSchemaError, FieldNode, Node, read_schema
from streaming.schema_registry import MAGIC, Registered, SchemaRegistry, UnknownSchemaError

_PER_SECOND = {"millis": 1_000, "micros": 1_000_000, "nanos": 1_000_000_000}


class AvroEncoder:
    """Encodes events by one schema, framed with its id if it has one.

    Raises:
        ConfigError: the schema cannot be read.
    """

    def __init__(self, where: str, text: str, references: tuple[str, ...] = (), schema_id: int | None = None) -> None:
        try:
            self._schema = read_schema(text, references)
        except AvroSchemaError as error:
            msg = f"{where}: {error}"
            raise ConfigError(msg) from error
        self._prefix = b"" if schema_id is None else bytes([MAGIC]) + schema_id.to_bytes(4, "big")

    @property
    def is_framed(self) -> bool:
        """Whether records name their schema."""
        return bool(self._prefix)

    def nullable(self) -> set[str]:
        """The fields that may be null."""
        return {field.name for field in self._schema.root.fields if _takes_null(field.node)}

    def __call__(self, event: Mapping[str, Any]) -> bytes:
        """An event; fields of the schema that it lacks have their default, null, or nothing in particular."""
        data = BytesIO()
        data.write(self._prefix)
        schemaless_writer(data, self._schema.decoding, _fit_record(self._schema.root, event))
        return data.getvalue()


def registered_schema(registry: SchemaRegistry, topic: str) -> Registered:
    """The schema to write a topic's records with: the latest of its subject. Registers nothing.

    Raises:
        ConfigError: there is none, or none of Avro.
        RegistryError: the registry does not answer.
    """
    subject = f"{topic}-value"
    try:
        found = registry.latest(subject)
    except UnknownSchemaError:
        msg = f"{registry.url} has no schema of the subject `{subject}`; register one there first, `emit` does not"
        raise ConfigError(msg) from None
    if found.kind != "AVRO":
        msg = f"{registry.url}: the latest schema of `{subject}` is {found.kind}, the view expects AVRO"
        raise ConfigError(msg)
    return found


def _takes_null(node: Node) -> bool:
    return node.kind == "null" or any(part.kind == "null" for part in node.parts if node.kind == "union")


def _fit_record(node: Node, event: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: _fit_field(field, event) for field in node.fields}


def _fit_field(field: FieldNode, event: Mapping[str, Any]) -> Any:
    if field.name in event:
        return _fit(field.node, event[field.name])
    return field.default[0] if field.default else _fit(field.node, None)


def _fit(node: Node, value: Any) -> Any:
    """A value as the schema wants it, or nothing in particular (0, an empty text) where it has no such form."""
    if value is None and _takes_null(node):
        return None
    if node.kind == "union":
        return _fit(node.branches[0], value)
    if node.kind == "record":
        return _fit_record(node, value if isinstance(value, Mapping) else {})
    if node.kind == "array":
        return [_fit(node.parts[0], item) for item in value] if isinstance(value, list) else []
    if node.kind == "map":
        return {}
    if node.kind == "enum":
        return value if value in node.symbols else node.symbols[0]
    if node.kind == "string":
        return value if isinstance(value, str) else ""
    if node.kind == "boolean":
        return bool(value)
    if node.kind in ("bytes", "fixed"):
        return _fit_bytes(node, value)
    return _fit_number(node, value)


def _fit_bytes(node: Node, value: Any) -> bytes:
    if node.logical == "decimal":
        unscaled = int(Decimal(str(value if isinstance(value, int | float) else 0)).scaleb(node.scale))
        return unscaled.to_bytes(node.size or (unscaled.bit_length() + 8) // 8, "big", signed=True)
    data = value.encode() if isinstance(value, str) else b""
    return data[: node.size].ljust(node.size, b"\0") if node.kind == "fixed" else data


def _fit_number(node: Node, value: Any) -> Any:
    if isinstance(value, str) and node.kind in ("int", "long"):
        try:
            moment_us = parse_time(datetime.fromisoformat(value).isoformat())
        except ValueError:
            return 0
        if node.logical == "date":
            return moment_us // 86_400_000_000
        return moment_us * _PER_SECOND.get((node.logical or "micros").rpartition("-")[2], 1_000_000) // 1_000_000
    number = value if isinstance(value, int | float) else 0
    return int(number) if node.kind in ("int", "long") else float(number)
