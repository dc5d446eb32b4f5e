"""Hostile records in Avro: schemas of every form that a column may have, and records of them, broken in structure.

Values are made and written in one go, byte by byte: no writer of Avro writes what is wanted here.
"""

from __future__ import annotations

import json
import random
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from feast.types import (
    Array,
    Bool,
    Bytes,
    Decimal,
    FeastType,
    Float32,
    Float64,
    Int32,
    Int64,
    Json,
    Map,
    Set,
    String,
    Struct,
    TimeUuid,
    UnixTimestamp,
    Uuid,
)

from headrace.contract import ViewContract
from tests.streaming.mutate import TIMES

Schema = Any
"""As JSON has it; no name is used twice. What a text or number is made of may be said by `of`, which Avro ignores."""

Schemas = Mapping[int, Schema | None]
"""What is registered, by id; None is what the view cannot use."""

DAY_US = 86_400_000_000
START_US = 1_612_137_600_000_000
UNKNOWN_IDS = (0, 9_999, 2**31, 2**32 - 1)
_UNITS = {"millis": (1, 1000), "micros": (1, 1), "nanos": (1000, 1)}
_DEEPEST = 50
_MANY_LEVELS = 4
"""Deeper than this there is one item of each, or a record would be too large."""


class Forms:
    """Makes schemas that a view can use, at random.

    Args:
        is_flat: whether no field has parts or is of several types, as most events are.
    """

    def __init__(self, chance: random.Random, *, is_flat: bool = False) -> None:
        self._chance = chance
        self._is_flat = is_flat
        self._names = 0

    def schema(self, contract: ViewContract) -> Schema:
        """A schema of a view's events: its columns in any order, some of them nullable, and others."""
        fields = []
        for field in contract.schema:
            is_time = field.name in (contract.timestamp_field, contract.created_field)
            kind = self._form(UnixTimestamp if is_time else contract.dtype(field.name))
            if field.name not in (*contract.join_keys, contract.timestamp_field):
                kind = self._nullable(kind)
            fields.append({"name": field.name, "type": kind})
        unknown: list[Schema] = ["string", "bytes", "double", self._named("fixed", size=4)]
        if not self._is_flat:
            unknown += [["null", "long", "string"], _array("float"), _map("null"), self._deep(), self._form(Map)]
        fields += [{"name": f"unknown{n}", "type": kind} for n, kind in enumerate(self._chance.sample(unknown, 2))]
        self._chance.shuffle(fields)
        return self._named("record", fields=fields)

    def _form(self, dtype: FeastType) -> Schema:
        forms = self._forms(dtype)
        return self._chance.choice([form for form in forms if not (self._is_flat and isinstance(form, list))])

    def _nullable(self, form: Schema) -> Schema:
        branches = form if isinstance(form, list) else [form]
        return self._chance.choice((form, ["null", *branches], [*branches, "null"]))

    def _named(self, kind: str, **more: Any) -> Schema:
        self._names += 1
        return {"type": kind, "name": f"N{self._names}", **more}

    def _enum(self) -> Schema:
        return self._named("enum", symbols=["A", "B", "C"])

    def _deep(self) -> Schema:
        inner: Schema = "int"
        for _ in range(self._chance.randrange(2, _DEEPEST)):
            inner = _array(inner) if self._chance.random() < 0.7 else _map(inner)
        return inner

    def _forms(self, dtype: FeastType) -> list[Schema]:
        decimal = {"logicalType": "decimal", "precision": 12, "scale": self._chance.choice((0, 2, 5))}
        whole = {"of": "whole"}
        uuids = {"type": "string", "of": "uuid"}
        fixed_uuid = self._named("fixed", size=16, logicalType="uuid")
        date = {"type": "int", "logicalType": "date"}
        if dtype in (Int32, Int64):
            long = {"type": "long", "of": "int"} if dtype == Int32 else "long"
            plain: list[Schema] = ["int", long, {"type": "double", **whole}, {"type": "float", **whole}]
            return [*plain, ["int", long], {"type": "bytes", **decimal, **whole}]
        if dtype in (Float32, Float64):
            double = {"type": "double", "of": "single"} if dtype == Float32 else "double"
            plain = ["float", double, "int", "long", {"type": "bytes", **decimal}]
            return [*plain, ["int", "float"], ["long", double]]
        if dtype == String:
            plain = ["string", self._enum(), {**uuids, "logicalType": "uuid"}, fixed_uuid, date]
            return [*plain, ["string", self._enum()]]
        if dtype == UnixTimestamp:
            units = [f"{zone}timestamp-{unit}" for zone in ("", "local-") for unit in _UNITS]
            return [*({"type": "long", "logicalType": unit} for unit in units), date, {"type": "string", "of": "time"}]
        if dtype == Decimal:
            fixed = self._named("fixed", size=self._chance.choice((6, 8, 30)), **decimal)
            return [{"type": "bytes", **decimal}, fixed, "int", "long", {"type": "string", "of": "decimal"}]
        if isinstance(dtype, Struct):
            parts = {name: self._nullable(self._form(part)) for name, part in dtype.fields.items()}
            left_out = self._chance.choice((*parts, None))
            named = [{"name": name, "type": form} for name, form in parts.items() if name != left_out]
            return [self._named("record", fields=[*named, {"name": "unknown", "type": "string"}])]
        if dtype == Array(Map):
            return [{"type": "string", "of": "maps"}, _array(_map("long")), _array(self._form(Map))]
        if isinstance(dtype, Array | Set):
            form = self._form(dtype.base_type)
            takes_no_null = dtype.base_type in (Uuid, TimeUuid, Decimal) or isinstance(dtype.base_type, Struct)
            return [_array(form), _array(form if takes_no_null or isinstance(form, list) else ["null", form])]
        simple: dict[FeastType, Callable[[], list[Schema]]] = {
            Bool: lambda: ["boolean"],
            Bytes: lambda: ["bytes", self._named("fixed", size=3), self._named("fixed", size=12)],
            Uuid: lambda: [uuids, {**uuids, "logicalType": "uuid"}, fixed_uuid],
            TimeUuid: lambda: [uuids, fixed_uuid],
            Map: lambda: [_map("long"), _map(["null", "string", "double"]), self._any_record()],
            Json: lambda: [
                {"type": "string", "of": "json"}, self._enum(), "long", "double", "bytes", date, fixed_uuid,
                self._deep(), {"type": "bytes", **decimal}, _array(["null", "long", "string"]), _map("boolean"),
                self._any_record(), ["long", "boolean", "double"],
            ],
        }  # fmt: skip
        return simple[dtype]()

    def _any_record(self) -> Schema:
        kinds: list[FeastType] = [String, Bytes, Decimal, UnixTimestamp, Float64]
        return self._named(
            "record", fields=[{"name": f"p{n}", "type": self._nullable(self._form(k))} for n, k in enumerate(kinds)]
        )


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _map(values: Schema) -> Schema:
    return {"type": "map", "values": values}


def varint(number: int) -> bytes:
    """A long as Avro writes it."""
    rest = (number << 1) ^ (number >> 63)
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*out, rest])


VARINTS: Sequence[bytes] = (
    *map(varint, (0, 1, -1, 2, -2, 63, -64, 300, 2**31, -(2**31) - 1, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1)),
    *(b"\x80" * size + end for size in (1, 4, 8, 9, 10, 11, 19, 63, 64, 300) for end in (b"\0", b"\1", b"\2")),
    b"\xff" * 9 + b"\x7f", b"\xff" * 9 + b"\x01", b"\xff" * 10 + b"\x01", b"\xff" * 5000, b"",
)  # fmt: skip
"""Numbers, lengths, counts and choices: too large, below zero, longer than they need be, without end."""

INTS = (0, 1, 2, 7, 42, -1, 1000, 2**31 - 1, -(2**31))
LONGS = (*INTS, 2**53 + 1, 2**63 - 1, -(2**63), 10**15)
SINGLES = (0.0, -0.0, 0.5, 1.0, 0.1, -2.5, 1e38, 3.0, 1e10, float("nan"), float("inf"), float("-inf"))
DOUBLES = (*SINGLES, 1e300, 5e-324, 3.4028236e38, 2.0**53, 9.3e18)
NUMBERS: Mapping[str, Sequence[int | float]] = {
    "int": INTS,
    "long": LONGS,
    "float": SINGLES,
    "double": DOUBLES,
    "single": SINGLES,
    "key": range(50),
    "share": (0, 1, 0.5, 0.1, 0.25),
    "count": (0, 1, 7, 1000),
    "whole": (0.0, -0.0, 1.0, -7.0, 1e9, -(2.0**31)),
}
"""Numbers by what they are to be."""

WORDS = (b"", b"text", "naïve".encode(), "鍵".encode(), b"\0", "😀😀😀😀".encode(), b"x" * 200, "ключ доступа".encode())
NO_WORDS = (b"\xff", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ok\x80", b"\xe2\x80", b"\xff" * 20)
TEXTS: Mapping[str, Sequence[bytes]] = {
    "uuid": (*(str(uuid.UUID(int=n << 120)).encode() for n in range(9)), b"A" * 32),
    "time": (b"2021-01-31 12:00:00", b"2021-01-31T12:00:00.5+01:00", b"1969-12-31 23:59:59"),
    "decimal": (b"0", b"1.5", b"-12345678901234567890.123456789", b"1e-5"),
    "json": (b"1", b"null", b'{"a": [1]}', b"[true]", b'"text"', b"0.5"),
    "maps": (b"[]", b"[{}]", b'[{"a": 1}]'),
}
"""Texts by what they are to hold."""

NO_TEXTS: Mapping[str, Sequence[bytes]] = {
    "uuid": (b"no uuid", b"", b"0" * 31 + b"g"),
    "time": tuple(json.loads(text).encode() for text in TIMES),
    "decimal": (b"much", b"1.", b".", b"1e", b"NaN", b"sNaN", b"1\n", b"Infinity"),
    "json": (b"[1", b"text", b"[1] ", b"", b"NaN", b'{"a":1e400}'),
    "maps": (b"{}", b"[1]", b"", b"null", b'[{"a":18446744073709551616}]'),
}
"""The same, most of which do not."""


class Records:
    """Records of one schema: each call gives another, of each two one is broken, in one place or more."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._odds = 1.5 / _places(schema)
        self._is_broken = False
        self._level = 0

    def __call__(self, chance: random.Random) -> bytes:
        """A record."""
        self._is_broken = chance.random() < 0.5
        return self._value(self._schema, chance)

    def _value(self, schema: Schema, chance: random.Random) -> bytes:
        if isinstance(schema, list):
            index = chance.randrange(len(schema))
            return self._long(index, chance) + self._value(schema[index], chance)
        kind = schema if isinstance(schema, str) else schema["type"]
        about = {} if isinstance(schema, str) else schema
        if kind == "record":
            return b"".join([self._value(field["type"], chance) for field in about["fields"]])
        if kind == "array":
            return self._blocks(lambda: self._value(about["items"], chance), chance)
        if kind == "map":
            keys = iter(("a", "b", "ключ", "") if chance.random() < 0.9 else ("a", "b", "a"))
            return self._blocks(
                lambda: self._sized(next(keys).encode(), chance) + self._value(about["values"], chance), chance
            )
        if kind in ("bytes", "fixed"):
            return self._bytes(kind, about, chance)
        return self._simple(kind, about, chance)

    def _simple(self, kind: str, about: Mapping[str, Any], chance: random.Random) -> bytes:
        made_of = about.get("of", "")
        if kind == "string":
            good, bad = TEXTS.get(made_of, WORDS), NO_TEXTS.get(made_of, ())
            return self._sized(chance.choice((*bad, *NO_WORDS) if self._is_hit(chance) else good), chance)
        if kind == "boolean":
            return chance.choice((b"\2", b"\xff") if self._is_hit(chance) else (b"\0", b"\1"))
        if kind in ("float", "double"):
            number = chance.choice(NUMBERS[kind if self._is_hit(chance) else made_of or kind])
            return struct.pack("<f" if kind == "float" else "<d", number)
        if kind == "enum":
            return self._long(chance.randrange(len(about["symbols"])), chance)
        if kind == "null":
            return b""
        return self._long(self._whole(kind, about, chance), chance)

    def _whole(self, kind: str, about: Mapping[str, Any], chance: random.Random) -> int:
        logical = about.get("logicalType")
        if self._is_hit(chance):
            return int(chance.choice(LONGS))
        if logical is None:
            return int(chance.choice(NUMBERS[about.get("of", kind)]))
        moment_us = START_US + chance.randrange(30) * DAY_US + chance.choice((0, 0, 1_000, 123_456))
        if logical == "date":
            return moment_us // DAY_US
        more, less = _UNITS[logical.rpartition("-")[2]]
        return moment_us * more // less + (chance.choice((0, 999)) if more > 1 else 0)

    def _bytes(self, kind: str, about: Mapping[str, Any], chance: random.Random) -> bytes:
        size = about.get("size") or chance.choice((1, 3, 9))
        if about.get("logicalType") != "decimal":
            data = chance.randbytes(size) if kind == "fixed" else chance.choice((b"", b"\0", b"hi", b"\xff" * 40))
        elif kind == "bytes" and self._is_hit(chance):
            data = chance.choice((b"", b"\x7f" * 64, b"\x80" * 65, b"\0" * 3000))
        else:
            power = 10 ** about["scale"] if about.get("of") == "whole" else 1
            data = (chance.choice((0, 1, -1, 7, -42, 99)) * power).to_bytes(max(size, 5), "big", signed=True)
        return data if kind == "fixed" else self._sized(data, chance)

    def _blocks(self, item: Callable[[], bytes], chance: random.Random) -> bytes:
        out = b""
        self._level += 1
        counts = chance.choice(
            ((), (1,), (2,), (3,), (1, 1), (2, 1)) if self._level < _MANY_LEVELS else ((), (1,), (1,))
        )
        for count in counts:
            items = b"".join([item() for _ in range(count)])
            if chance.random() < 0.3:
                out += self._long(-count, chance) + self._long(len(items), chance) + items
            else:
                out += self._long(count, chance) + items
        self._level -= 1
        return out + self._long(0, chance)

    def _sized(self, data: bytes, chance: random.Random) -> bytes:
        return self._long(len(data), chance) + data

    def _long(self, number: int, chance: random.Random) -> bytes:
        return chance.choice(VARINTS) if self._is_hit(chance) else varint(number)

    def _is_hit(self, chance: random.Random) -> bool:
        return self._is_broken and chance.random() < self._odds


def _places(schema: Schema) -> int:
    """About how many places of a record can be broken."""
    if isinstance(schema, list):
        return 1 + max(map(_places, schema))
    if isinstance(schema, str):
        return 1
    parts = [field["type"] for field in schema.get("fields", ())] + [
        schema[n] for n in ("items", "values") if n in schema
    ]
    return 1 + sum(map(_places, parts))


class Framed:
    """Records of several schemas, framed with their ids; of some the frame is broken, or the id is another's."""

    def __init__(self, schemas: Schemas) -> None:
        self._ids = [*schemas, *UNKNOWN_IDS]
        self._records = [(number, Records(schema)) for number, schema in schemas.items() if schema is not None]

    def __call__(self, chance: random.Random) -> bytes:
        """A record."""
        number, records = chance.choice(self._records)
        draw = chance.random()
        if draw < 0.03:
            number = chance.choice(self._ids)
        value = framed(number, records(chance))
        if draw < 0.97:
            return value
        return chance.choice(
            (value[5:], value[1:], value[:5] + value, value[: chance.randrange(6)], b"\1" + value[1:],
             b"\xc3\1" + value, b"Obj\1" + value, value[:1] + value[4:0:-1] + value[5:])
        )  # fmt: skip


def framed(number: int, data: bytes) -> bytes:
    """Data behind the id of their schema."""
    return b"\0" + number.to_bytes(4, "big") + data
