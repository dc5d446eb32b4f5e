"""Arrow columns to Feast's wire formats: entity keys (version 3), values, and the order that decides which is newest.

Columnar where a type has a fast path, Feast's own serializer otherwise; both give the same bytes.

Source of the formats: Feast 0.67 `infra/key_encoding_utils.py`, `types/Value.proto`; protobuf's encoding page.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.protos.feast.types.Value_pb2 import ValueType as ValueTypeProto
from feast.type_map import PYTHON_LIST_VALUE_TYPE_TO_PROTO_VALUE, python_values_to_proto_values
from feast.value_type import ValueType

from headrace.contract import ViewContract
from headrace.errors import SchemaError

ORDER_BYTES = 33
"""Event time 8, created time 8, kind 1, origin or hash 16; all big-endian, so bytes compare as the order does."""

_KIND_STREAM = 1
_SIGN = np.uint64(1 << 63)
_LEN = 2
_FIXED32 = 5
_FIXED64 = 1
_VARINT = 0

Int64s = npt.NDArray[np.int64]
Masks = npt.NDArray[np.bool_]
Tails = npt.NDArray[np.uint8]
"""What breaks ties, 17 bytes a row: the kind, then epoch, partition and offset (kind 1) or a hash of the values (0)."""


@dataclass(frozen=True)
class Origin:
    """Where the rows of a stream come from: one partition in one epoch, and the offset of each row, ascending."""

    epoch: int
    partition: int
    offsets: Int64s

    def take(self, rows: Int64s) -> Origin:
        """The origin of these rows alone."""
        return Origin(self.epoch, self.partition, self.offsets[rows])


@dataclass(frozen=True)
class EncodedRows:
    """Rows in Feast's wire formats, one per key. All sequences have the same length and order.

    Attributes:
        keys: serialized entity keys.
        order: what decides which value is newest, `ORDER_BYTES` each; greater is newer.
        event_us: event times, microseconds since the epoch.
        created_us: created times likewise; None where absent.
        values: serialized values by feature name; empty bytes are null.
    """

    keys: list[bytes]
    order: list[bytes]
    event_us: list[int]
    created_us: list[int | None]
    values: Mapping[str, list[bytes]]

    def __len__(self) -> int:
        return len(self.keys)


def encode(contract: ViewContract, table: pa.Table, tails: Tails | None = None) -> EncodedRows:
    """Reduce rows to the newest of each key, and encode those.

    Args:
        table: in the contract's schema, any order.
        tails: aligned with the table; those of kind 0 are zeros, their hashes are filled in here. None: all are.
    """
    event = _times(table, contract.timestamp_field)
    created, has_created = _created(contract, table)
    rows = _candidates(contract, table, event, created, has_created, keep_ties=True)
    table = table.take(pa.array(rows))
    values = {contract.view_name(name): encode_values(contract, table, name) for name in contract.features}
    event, created, has_created = event[rows], created[rows], has_created[rows]
    own = hash_tails(values)
    if tails is not None:
        own = np.where(tails[rows, :1] == _KIND_STREAM, tails[rows], own)
    encoded = EncodedRows(
        keys=encode_keys(contract, table),
        order=order_keys(event, created, has_created, own),
        event_us=event.tolist(),
        created_us=[us if has else None for us, has in zip(created.tolist(), has_created.tolist(), strict=True)],
        values=values,
    )
    return newest(encoded)


def newest(rows: EncodedRows) -> EncodedRows:
    """Keep the greatest order of each key."""
    best: dict[bytes, int] = {}
    for index, (key, order) in enumerate(zip(rows.keys, rows.order, strict=True)):
        seen = best.get(key)
        if seen is None or rows.order[seen] <= order:
            best[key] = index
    if len(best) == len(rows):
        return rows
    keep = sorted(best.values())
    return EncodedRows(
        [rows.keys[i] for i in keep],
        [rows.order[i] for i in keep],
        [rows.event_us[i] for i in keep],
        [rows.created_us[i] for i in keep],
        {name: [column[i] for i in keep] for name, column in rows.values.items()},
    )


def order_keys(event_us: Int64s, created_us: Int64s, has_created: Masks, tails: npt.NDArray[np.uint8]) -> list[bytes]:
    """The total order as bytes. `tails` are the last 17 of each, from `stream_tails` or `hash_tails`.

    An absent created time is lower than any present one.
    """
    rows = len(event_us)
    out = np.zeros((rows, ORDER_BYTES), dtype=np.uint8)
    out[:, 0:8] = _sortable(event_us)
    out[:, 8:16] = np.where(has_created[:, None], _sortable(created_us), np.uint8(0))
    out[:, 16:33] = tails
    return _slices(out)


def stream_tails(origin: Origin) -> npt.NDArray[np.uint8]:
    """Kind 1, epoch, partition, offset: the place of a stream row among rows of the same times."""
    out = np.empty((len(origin.offsets), 17), dtype=np.uint8)
    out[:, 0] = _KIND_STREAM
    out[:, 1:9] = np.frombuffer(struct.pack(">II", origin.epoch, origin.partition), dtype=np.uint8)
    out[:, 9:17] = origin.offsets.astype(">u8").view(np.uint8).reshape(-1, 8)
    return out


def hash_tails(values: Mapping[str, Sequence[bytes]]) -> npt.NDArray[np.uint8]:
    """Kind 0 and a 128-bit hash of the encoded values, features by name: Feast gives no better tie-break."""
    names = sorted(values)
    tails = bytearray()
    for row in zip(*(values[name] for name in names), strict=True):
        digest = blake2b(digest_size=16)
        for value in row:
            digest.update(len(value).to_bytes(4, "little"))
            digest.update(value)
        tails += b"\x00" + digest.digest()
    return np.frombuffer(bytes(tails), dtype=np.uint8).reshape(-1, 17)


def encode_keys(contract: ViewContract, table: pa.Table) -> list[bytes]:
    """Serialized entity keys, equal to Feast's `serialize_entity_key(..., entity_key_serialization_version=3)`.

    Raises:
        SchemaError: a join key has a type that Feast cannot serialize as a key.
    """
    names = sorted(contract.join_keys)
    header = struct.pack("<I", len(names))
    for name in names:
        encoded = name.encode()
        header += struct.pack("<II", ValueTypeProto.STRING, len(encoded)) + encoded
    pieces = [_key_pieces(contract, table, name) for name in names]
    if len(pieces) == 1:
        return [header + piece for piece in pieces[0]]
    return [header + b"".join(parts) for parts in zip(*pieces, strict=True)]


def encode_values(contract: ViewContract, table: pa.Table, feature: str) -> list[bytes]:
    """One feature's values, equal to `ValueProto.SerializeToString()` of what Feast makes of them; empty is null."""
    column = _array(table, feature)
    name = contract.view_name(feature)
    value_type = next(f.dtype.to_value_type() for f in contract.feature_view.features if f.name == name)
    fast = _FAST_PATHS.get(value_type)
    if fast is None or column.type != fast[0]:
        return _encode_with_feast(column, value_type)
    _, field, wire, encoder = fast
    number = ValueProto.DESCRIPTOR.fields_by_name[field].number
    tag = _varint(number << 3 | wire)
    missing = column.is_null(nan_is_null=True)  # Feast takes NaN for null
    encoded = encoder(tag, column)
    if pc.any(missing).as_py():
        for row in np.flatnonzero(missing.to_numpy(zero_copy_only=False)):
            encoded[row] = b""
    return encoded


def _encode_with_feast(column: pa.Array, value_type: ValueType) -> list[bytes]:
    """Feast's own serializer. Given lists of which none has an item it would make nulls of them all; here they stay."""
    known = PYTHON_LIST_VALUE_TYPE_TO_PROTO_VALUE.get(value_type)
    if known is not None and not pc.any(pc.greater(pc.list_value_length(column), 0)).as_py():
        empty = ValueProto(**{known[1]: known[0]()}).SerializeToString()  # type: ignore[arg-type]
        return [empty if present else b"" for present in column.is_valid().to_pylist()]
    protos = python_values_to_proto_values(column.to_numpy(zero_copy_only=False), value_type)
    return [proto.SerializeToString() for proto in protos]


def encode_timestamps(event_us: Sequence[int]) -> list[bytes]:
    """`google.protobuf.Timestamp` of each time, serialized: seconds in field 1, nanoseconds in 2, zeros left out."""
    us = np.asarray(event_us, dtype=np.int64)
    seconds, micros = np.divmod(us, 1_000_000)
    first = _varint_fields(b"\x08", seconds)
    second = _varint_fields(b"\x10", micros * 1000)
    return [
        (a if s else b"") + (b if m else b"")
        for a, b, s, m in zip(first, second, seconds.tolist(), micros.tolist(), strict=True)
    ]


def _candidates(
    contract: ViewContract, table: pa.Table, event: Int64s, created: Int64s, has_created: Masks, *, keep_ties: bool
) -> Int64s:
    """The rows that may be the newest of their key: the last of each group of times, or all that tie for it."""
    if table.num_rows == 0:
        return np.empty(0, dtype=np.int64)
    codes = np.zeros(table.num_rows, dtype=np.int64)
    for name in contract.join_keys:
        encoded = _array(table, name).dictionary_encode(null_encoding="encode")
        codes = codes * max(len(encoded.dictionary), 1) + encoded.indices.to_numpy(zero_copy_only=False)
        codes = np.unique(codes, return_inverse=True)[1]
    by = np.lexsort((created, has_created, event, codes))  # stable: the later row is last among equals
    last = np.append(codes[by][1:] != codes[by][:-1], True)
    if not keep_ties:
        return np.sort(by[last])
    winner = np.repeat(by[last], np.diff(np.append(-1, np.flatnonzero(last))))
    ties = (event[by] == event[winner]) & (created[by] == created[winner]) & (has_created[by] == has_created[winner])
    return np.sort(by[ties])


def _times(table: pa.Table, name: str) -> Int64s:
    times: Int64s = _array(table, name).cast(pa.int64()).to_numpy(zero_copy_only=False)
    return times


def _created(contract: ViewContract, table: pa.Table) -> tuple[Int64s, Masks]:
    if contract.created_field is None:
        return np.zeros(table.num_rows, dtype=np.int64), np.zeros(table.num_rows, dtype=bool)
    column = _array(table, contract.created_field).cast(pa.int64())
    has: Masks = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
    return column.fill_null(0).to_numpy(zero_copy_only=False), has


def _array(table: pa.Table, name: str) -> pa.Array:
    combined = table.column(name).combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        return combined.chunk(0) if combined.num_chunks else pa.nulls(0, combined.type)
    return combined


def _key_pieces(contract: ViewContract, table: pa.Table, name: str) -> list[bytes]:
    """Type, length and bytes of one join key of each row."""
    column = _array(table, name)
    field = next(f for f in contract.feature_view.entity_columns if f.name == name)
    value_type = field.dtype.to_value_type()
    if value_type in (ValueType.INT64, ValueType.UNIX_TIMESTAMP):
        numbers = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        if value_type == ValueType.UNIX_TIMESTAMP:
            numbers = np.floor_divide(numbers, 1_000_000)
        kind = ValueTypeProto.INT64 if value_type == ValueType.INT64 else ValueTypeProto.UNIX_TIMESTAMP
        return _fixed(struct.pack("<II", kind, 8), numbers.astype("<i8"))
    if value_type == ValueType.INT32:
        numbers = column.to_numpy(zero_copy_only=False)
        return _fixed(struct.pack("<II", ValueTypeProto.INT32, 4), numbers.astype("<i4"))
    if value_type in (ValueType.STRING, ValueType.BYTES):
        kind = ValueTypeProto.STRING if value_type == ValueType.STRING else ValueTypeProto.BYTES
        return [struct.pack("<II", kind, len(v)) + v for v in column.cast(pa.binary()).to_pylist()]
    msg = (
        f"feature view `{contract.name}`: join key `{name}` has type {field.dtype}; "
        "Feast serializes keys of Int32, Int64, String, Bytes and UnixTimestamp only"
    )
    raise SchemaError(msg)


def _fixed(prefix: bytes, numbers: npt.NDArray[np.generic]) -> list[bytes]:
    """`prefix` and the little-endian bytes of each number."""
    width = numbers.dtype.itemsize
    out = np.empty((len(numbers), len(prefix) + width), dtype=np.uint8)
    out[:, : len(prefix)] = np.frombuffer(prefix, dtype=np.uint8)
    out[:, len(prefix) :] = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, width)
    return _slices(out)


def _encode_floats(tag: bytes, column: pa.Array) -> list[bytes]:
    numbers = column.fill_null(0.0).to_numpy(zero_copy_only=False)
    return _fixed(tag, numbers.astype(f"<f{numbers.dtype.itemsize}"))


def _encode_ints(tag: bytes, column: pa.Array) -> list[bytes]:
    return _varint_fields(tag, column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))


def _encode_bools(tag: bytes, column: pa.Array) -> list[bytes]:
    both = (tag + b"\x00", tag + b"\x01")
    return [both[bool(value)] for value in column.to_pylist()]


def _encode_bytes(tag: bytes, column: pa.Array) -> list[bytes]:
    return [
        b"" if value is None else tag + _varint(len(value)) + value for value in column.cast(pa.binary()).to_pylist()
    ]


_FAST_PATHS: Mapping[ValueType, tuple[pa.DataType, str, int, Callable[[bytes, pa.Array], list[bytes]]]] = {
    ValueType.FLOAT: (pa.float32(), "float_val", _FIXED32, _encode_floats),
    ValueType.DOUBLE: (pa.float64(), "double_val", _FIXED64, _encode_floats),
    ValueType.INT32: (pa.int32(), "int32_val", _VARINT, _encode_ints),
    ValueType.INT64: (pa.int64(), "int64_val", _VARINT, _encode_ints),
    ValueType.BOOL: (pa.bool_(), "bool_val", _VARINT, _encode_bools),
    ValueType.STRING: (pa.string(), "string_val", _LEN, _encode_bytes),
    ValueType.BYTES: (pa.binary(), "bytes_val", _LEN, _encode_bytes),
}


def _varint_fields(tag: bytes, numbers: Int64s) -> list[bytes]:
    """`tag` and the varint of each number; a negative one is its two's complement in 64 bits, ten bytes long."""
    rest = numbers.astype(np.int64).view(np.uint64)
    width = len(tag) + 10
    out = np.zeros((len(numbers), width), dtype=np.uint8)
    out[:, : len(tag)] = np.frombuffer(tag, dtype=np.uint8)
    lengths = np.full(len(numbers), len(tag) + 1, dtype=np.int64)
    for place in range(len(tag), width):
        more = rest > np.uint64(0x7F)
        low = (rest & np.uint64(0x7F)).astype(np.uint8)
        out[:, place] = np.where(more, low | np.uint8(0x80), low)
        if not more.any():
            break
        lengths += more
        rest = rest >> np.uint64(7)
    data = out.tobytes()
    return [data[start : start + n] for start, n in zip(range(0, len(data), width), lengths.tolist(), strict=True)]


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _sortable(times: Int64s) -> npt.NDArray[np.uint8]:
    """Signed numbers as eight big-endian bytes that compare as the numbers do."""
    shifted = times.astype(np.int64).view(np.uint64) ^ _SIGN
    return shifted.astype(">u8").view(np.uint8).reshape(-1, 8)


def _slices(matrix: npt.NDArray[np.uint8]) -> list[bytes]:
    """The rows of a matrix as byte strings."""
    data, width = matrix.tobytes(), matrix.shape[1]
    return [data[start : start + width] for start in range(0, len(data), width)]
