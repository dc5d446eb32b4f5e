"""Columns of features to Feast's serialized `Value`s: columnar, without a Python object for each item.

What is stored and what is served, by Feast type:

| Feast type | column of a segment | online |
|---|---|---|
| Bool, Int32, Int64, Float32, Float64, String | as named | as Feast; NaN is null |
| Bytes, PdfBytes, ImageBytes | binary | `bytes_val` |
| UnixTimestamp | timestamp[us, UTC] | whole seconds, rounded down; null is Feast's smallest integer |
| Uuid, TimeUuid, Decimal, Json | text | their text, as given |
| Map, Array(Map) | text, a JSON object or array of objects | `map_val`, `map_list_val`, types by Feast's inference |
| Struct, Array(Struct) | struct, list of struct | `struct_val`, `struct_list_val`, types by Feast's inference |
| Array, Set of Bool, Int32, ..., Json | list | typed lists; timestamps in lists rounded toward zero |
| Array, Set of Array or Set of those | list of list | `list_val`, `set_val` of lists; empty ones within are null |
| ScalarMap, ZonedTimestamp, Set(Json), and what else Feast has no value type for | refused by the contract | |

Where Feast's own conversion hangs on a row's neighbours or fails, a value is what it would be by itself:

- integers beside nulls are exact (Feast goes through floats), empty bytes in a column of them stay (Feast makes nulls);
- a null item of a list is the default that Feast declares for its type, also in integers and sets, where Feast fails:
  zero, false, an empty text, NaN, the smallest timestamp, the JSON `null`;
- items of a set are ascending, each once; entries of a map are sorted by key. Feast's order of both is random;
- a list within a map that is empty, mixed or holds nulls or lists is a `list_val`, which reads back as it was.

Source of the formats: Feast 0.67 `type_map.py`, `types/Value.proto`; protobuf's encoding page.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from feast.protos.feast.types.Value_pb2 import Map as MapProto
from feast.protos.feast.types.Value_pb2 import MapList, RepeatedValue
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.type_map import VALUE_TYPE_TO_PROTO_VALUE_MAP, python_values_to_proto_values
from feast.types import Array, FeastType, Json, Map, Set, Struct, UnixTimestamp

BINARY = pa.large_binary()
"""Every array of bytes here: 64-bit offsets, so that a chunk of embeddings may be larger than 2 GB."""

Int64s = npt.NDArray[np.int64]

_VARINT, _FIXED64, _LEN, _FIXED32 = 0, 1, 2, 5
_NO_TIME = -(2**63)
_FIRST = b"\x0a"
"""Field 1, length-delimited: the only field of all list messages."""


def serialize(dtype: FeastType, column: pa.Array) -> pa.Array:
    """The serialized `Value` of each row, as `large_binary`; null where Feast has a `Value` without content.

    Args:
        column: of the type that the contract gives to `dtype`.

    Raises:
        ValueError: a map's text is no JSON object, or holds an integer beyond 64 bits.
    """
    if (convert := _converter(dtype)) is not None:
        protos = [None if row is None else convert(row) for row in column.to_pylist()]
        return pa.array([p and p.SerializeToString(deterministic=True) for p in protos], BINARY)
    field = VALUE_TYPE_TO_PROTO_VALUE_MAP.get(dtype.to_value_type(), "bytes_val")
    if isinstance(dtype, Array | Set):
        if isinstance(dtype.base_type, Array | Set):
            return _masked(_nested(field, column), column)
        null = "null" if dtype.base_type == Json else ""
        return _masked(_list(field, column, unique=isinstance(dtype, Set), null=null), column)
    if dtype == UnixTimestamp:
        return varints(_seconds(column, np.floor_divide), _tag(field, _VARINT))
    if pa.types.is_floating(column.type):
        kind = _FIXED32 if column.type == pa.float32() else _FIXED64
        present = pc.if_else(pc.is_nan(column), None, column)  # Feast takes NaN for null
        return _masked(fixed(_tag(field, kind), _numbers(column, 0.0)), present)
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return _masked(varints(_numbers(column.cast(pa.int64()), 0), _tag(field, _VARINT)), column)
    return prefixed(_tag(field, _LEN), column.cast(pa.binary()).cast(BINARY))


def canonical(value: ValueProto) -> bytes:
    """The bytes of a message that Feast made, as `serialize` has them: sets ascending, each item once, maps by key."""
    kind = value.WhichOneof("val")
    if kind is not None and kind in _SETS:
        items = set(getattr(value, kind).val)
        numbers = sorted(item for item in items if item == item)  # noqa: PLR0124 - NaN is not equal to itself
        nans = sorted((item for item in items if item != item), key=lambda nan: struct.pack(">d", nan))  # noqa: PLR0124
        value = ValueProto(**{kind: type(getattr(value, kind))(val=[*numbers, *nans[:1]])})
    return value.SerializeToString(deterministic=True)


_SETS = frozenset(name for kind, name in VALUE_TYPE_TO_PROTO_VALUE_MAP.items() if kind.name.endswith("_SET"))
_SETS -= {"set_val"}  # a set of lists, which Feast keeps as a list


def fixed(prefix: bytes, numbers: npt.NDArray[Any]) -> pa.Array:
    """`prefix` and the little-endian bytes of each number."""
    raw = np.ascontiguousarray(numbers, dtype=numbers.dtype.newbyteorder("<")).view(np.uint8)
    out = np.empty((len(numbers), len(prefix) + numbers.dtype.itemsize), dtype=np.uint8)
    out[:, : len(prefix)] = np.frombuffer(prefix, dtype=np.uint8)
    out[:, len(prefix) :] = raw.reshape(-1, numbers.dtype.itemsize)
    return rows_of(out)


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column as an array of its own, whose buffers begin with its first value."""
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        return combined.chunk(0) if combined.num_chunks else pa.nulls(0, column.type)
    return combined


def rows_of(matrix: npt.NDArray[np.uint8]) -> pa.Array:
    """The rows of a matrix of bytes."""
    return binary(matrix, np.arange(len(matrix) + 1, dtype=np.int64) * matrix.shape[1])


def binary(data: npt.NDArray[Any] | pa.Buffer, offsets: Int64s) -> pa.Array:
    """Byte strings that lie one after the other; `offsets` has one more than there are."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(offsets)), pa.py_buffer(data)]
    return pa.Array.from_buffers(BINARY, len(offsets) - 1, buffers)


def varints(numbers: Int64s, tag: bytes = b"") -> pa.Array:
    """`tag` and the varint of each number; a negative one is its two's complement in 64 bits, ten bytes long."""
    rest = np.ascontiguousarray(numbers, dtype=np.int64).view(np.uint64)
    lengths = np.ones(len(rest), dtype=np.int64)
    longest = int(rest.max(initial=0))
    places = max(1, -(-longest.bit_length() // 7))
    for place in range(1, places):
        lengths += rest >= np.uint64(1 << 7 * place)
    out = np.empty((len(rest), len(tag) + places), dtype=np.uint8)
    out[:, : len(tag)] = np.frombuffer(tag, dtype=np.uint8)
    for place in range(places):
        more = (lengths > place + 1).astype(np.uint8) << np.uint8(7)
        out[:, len(tag) + place] = (rest >> np.uint64(7 * place)).astype(np.uint8) & np.uint8(0x7F) | more
    if int(lengths.min(initial=places)) == places:
        return rows_of(out)
    used = np.arange(out.shape[1]) < (lengths + len(tag))[:, None]
    return binary(out[used], _offsets(lengths + len(tag)))


def prefixed(tag: bytes, payload: pa.Array, *, keep_empty: bool = True) -> pa.Array:
    """A length-delimited field of each payload: tag, length, payload. Null stays null.

    Without `keep_empty` an empty payload gives no field at all.
    """
    lengths = pc.binary_length(payload)
    head = varints(_numbers(lengths, 0), tag)
    if not keep_empty:
        head = pc.if_else(pc.equal(lengths, 0), pa.scalar(b"", BINARY), head)
    return joined([head, payload])


def joined(parts: list[pa.Array], null: bytes | None = None) -> pa.Array:
    """The parts of each row, one after the other. A null part makes the row null, or stands for `null`."""
    handling = (
        {"null_handling": "emit_null"} if null is None else {"null_handling": "replace", "null_replacement": null}
    )
    return pc.binary_join_element_wise(*parts, pa.scalar(b"", BINARY), **handling)


def to_list(serialized: pa.Array) -> list[bytes]:
    """As Python's bytes, empty for null."""
    filled: list[bytes] = without_null(serialized, b"").to_pylist()
    return filled


def without_null(column: pa.Array, null: Any) -> pa.Array:
    """The column with its nulls filled; itself, at no cost, where there are none."""
    return column.fill_null(null) if column.null_count else column


def _list(field: str, column: pa.Array, *, unique: bool, null: str = "", within: bool = False) -> pa.Array:
    """The `Value` of each typed list; a null list is an empty one.

    Args:
        unique: it is a set.
        null: what a null text is.
        within: it is in a list itself; timestamps are rounded down there and in sets, else toward zero.
    """
    items, lengths = _items(column)
    if pa.types.is_timestamp(items.type):
        items = pa.array(_seconds(items, np.floor_divide if unique or within else _toward_zero))
    if unique:
        items, lengths = _distinct(items, lengths)
    offsets = _offsets(lengths)
    if pa.types.is_floating(items.type):
        numbers = _numbers(items, np.nan)
        message = prefixed(_FIRST, binary(numbers, offsets * numbers.itemsize), keep_empty=False)
    elif pa.types.is_integer(items.type) or pa.types.is_boolean(items.type):
        numbers = _numbers(items.cast(pa.int64()), 0)
        message = prefixed(_FIRST, _grouped(varints(numbers), offsets), keep_empty=False)
    else:
        texts = items.fill_null(null if pa.types.is_string(items.type) else null.encode())
        message = _grouped(prefixed(_FIRST, texts.cast(pa.binary()).cast(BINARY)), offsets)
    return prefixed(_tag(field, _LEN), message)


def _nested(field: str, column: pa.Array) -> pa.Array:
    """The `Value` of each list of lists. Sets within are lists, as Feast has it, and null and empty ones are null."""
    items, lengths = _items(column)
    if _is_list(items.type.value_type):
        inner = _nested("list_val", items)
    else:
        inner = _list(_INFERRED_LISTS[items.type.value_type], items, unique=False, within=True)
    some = pc.greater(pc.list_value_length(items), 0).fill_null(False)
    values = prefixed(_FIRST, pc.if_else(some, inner, pa.scalar(b"", BINARY)))
    return prefixed(_tag(field, _LEN), _grouped(values, _offsets(lengths)))


_INFERRED_LISTS: Mapping[pa.DataType, str] = {
    pa.string(): "string_list_val",
    pa.binary(): "bytes_list_val",
    pa.bool_(): "bool_list_val",
    pa.int32(): "int32_list_val",
    pa.int64(): "int64_list_val",
    pa.float32(): "float_list_val",
    pa.float64(): "double_list_val",
    pa.timestamp("us", tz="UTC"): "unix_timestamp_list_val",
}
"""What Feast makes of a list within a list: it looks at the items, not at the declared type."""


def _items(column: pa.Array) -> tuple[pa.Array, Int64s]:
    """The items of all lists, one after the other, and how many each list has; none for null."""
    return column.flatten(), _numbers(pc.list_value_length(column), 0)


def _distinct(items: pa.Array, lengths: Int64s) -> tuple[pa.Array, Int64s]:
    """The items of each list ascending, each once, nulls last. Of NaNs, which are one, that with the smallest bits."""
    ranks = pc.rank(items, tiebreaker="dense").to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    by = np.lexsort((_nan_bits(items), ranks, owner))  # stable: of equal ones the first stays
    first = np.ones(len(by), dtype=bool)
    first[1:] = (owner[by][1:] != owner[by][:-1]) | (ranks[by][1:] != ranks[by][:-1])
    return items.take(pa.array(by[first])), np.bincount(owner[by[first]], minlength=len(lengths)).astype(np.int64)


def _nan_bits(items: pa.Array) -> npt.NDArray[np.uint64]:
    """The bits of NaNs; 0 for what is none."""
    if not pa.types.is_floating(items.type):
        return np.zeros(len(items), dtype=np.uint64)
    numbers = items.to_numpy(zero_copy_only=False).astype(np.float64)
    return np.where(np.isnan(numbers), numbers.view(np.uint64), np.uint64(0))


def _grouped(items: pa.Array, offsets: Int64s) -> pa.Array:
    """The items of each list joined. They lie one after the other already, so only the offsets change."""
    _, bounds, data = items.buffers()
    ends = np.frombuffer(bounds, dtype=np.int64, count=len(items) + 1 + items.offset)[items.offset :]
    return binary(data if data is not None else pa.py_buffer(b""), ends[offsets])


def _seconds(column: pa.Array, divide: Callable[[Int64s, int], Int64s]) -> Int64s:
    """Times in whole seconds, null as Feast's integer for it."""
    us = _numbers(column.cast(pa.int64()), 0)
    seconds = divide(us, 1_000_000)
    seconds[column.is_null().to_numpy(zero_copy_only=False)] = _NO_TIME
    return seconds


def _toward_zero(us: Int64s, unit: int) -> Int64s:
    """Seconds as `int(datetime.timestamp())` gives them: a quotient rounded to a float, then cut."""
    seconds = (us / unit).astype(np.int64)
    far = np.flatnonzero(np.abs(us) >= 1 << 53)  # NumPy rounds these twice
    seconds[far] = [int(value / unit) for value in us[far].tolist()]
    return seconds


def _masked(serialized: pa.Array, like: pa.Array) -> pa.Array:
    """Null where `like` is."""
    if like.null_count == 0:
        return serialized
    valid = pa.array(like.is_valid().to_numpy(zero_copy_only=False)).buffers()[1]
    return pa.Array.from_buffers(BINARY, len(serialized), [valid, *serialized.buffers()[1:]])


def _numbers(column: pa.Array, null: float) -> npt.NDArray[Any]:
    """A numeric column with nulls filled."""
    filled: npt.NDArray[Any] = without_null(column, null).to_numpy(zero_copy_only=False)
    return filled


def _offsets(lengths: Int64s) -> Int64s:
    out = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


@cache
def _tag(field: str, wire: int) -> bytes:
    """The tag of a field of `Value`."""
    encoded: bytes = varints(np.array([ValueProto.DESCRIPTOR.fields_by_name[field].number << 3 | wire]))[0].as_py()
    return encoded


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _converter(dtype: FeastType) -> Callable[[Any], ValueProto] | None:
    """How a row of a type without a columnar form becomes a message; None for all others."""
    if dtype == Map:
        return lambda text: ValueProto(map_val=_map(parse_map(text)))
    if isinstance(dtype, Struct):
        return lambda row: ValueProto(struct_val=_map(row))
    if isinstance(dtype, Array) and dtype.base_type == Map:
        return lambda text: ValueProto(map_list_val=_maps(parse_maps(text)))
    if isinstance(dtype, Array) and isinstance(dtype.base_type, Struct):
        return lambda rows: ValueProto(struct_list_val=_maps(rows))
    return None


def parse_map(text: str) -> dict[str, Any]:
    """A map from its JSON text.

    Raises:
        ValueError: the text is no JSON object, or holds what a message cannot: an integer beyond 64 bits, half a
            surrogate pair.
    """
    parsed = _parse(text)
    if not isinstance(parsed, dict):
        msg = f"expected a JSON object, found {type(parsed).__name__}"
        raise ValueError(msg)
    return parsed


def parse_maps(text: str) -> list[dict[str, Any]]:
    """A list of maps from its JSON text.

    Raises:
        ValueError: the text is no JSON array of objects, or as `parse_map` says.
    """
    parsed = _parse(text)
    if not isinstance(parsed, list) or not all(isinstance(item, dict) for item in parsed):
        msg = "expected a JSON array of objects"
        raise ValueError(msg)
    return parsed


def _parse(text: str) -> Any:
    parsed = json.loads(text, parse_int=_int64)
    if "\\u" in text:
        json.dumps(parsed, ensure_ascii=False).encode()
    return parsed


def _int64(digits: str) -> int:
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        msg = f"integer {digits} is beyond 64 bits"
        raise ValueError(msg)
    return number


def _map(entries: Mapping[str, Any]) -> MapProto:
    return MapProto(val={key: _value(item) for key, item in entries.items()})


def _maps(rows: list[Any]) -> MapList:
    return MapList(val=[_map(row or {}) for row in rows])


def _value(item: Any) -> ValueProto:
    """An entry of a map: what Feast infers, and for lists that it cannot take one value for each item."""
    if item is None:
        return ValueProto()
    if isinstance(item, bytes):  # Feast fails on empty ones
        return ValueProto(bytes_val=item)
    if isinstance(item, dict):
        return ValueProto(map_val=_map(item))
    if not isinstance(item, list):
        return python_values_to_proto_values([item])[0]
    if item and all(isinstance(part, dict) for part in item):
        return ValueProto(map_list_val=_maps(item))
    try:
        return python_values_to_proto_values([item])[0]
    except (TypeError, ValueError):
        return ValueProto(list_val=RepeatedValue(val=[_value(part) for part in item]))
