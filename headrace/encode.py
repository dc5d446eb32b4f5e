"""Rows to what the online stores hold: entity keys (version 3), values, and the order that decides which is newest.

Source of the formats: Feast 0.67 `infra/key_encoding_utils.py`; for values see `headrace.values`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureView
from feast.feature_view import DUMMY_ENTITY_ID
from feast.protos.feast.types.Value_pb2 import ValueType as ValueTypeProto
from feast.types import Bytes, FeastType, Int32, Int64, String, UnixTimestamp

from headrace.contract import ViewContract
from headrace.errors import SchemaError
from headrace.values import BINARY, fixed, joined, one_array, rows_of, serialize, to_list, varints, without_null

ORDER_BYTES = 33
"""Event time 8, created time 8, kind 1, origin or schema and hash 16; big-endian: bytes compare as the order does."""

UNTIL_KIND = 17
"""Before it a row's times and kind."""
_UNTIL_SCHEMA = 21

_KIND_STREAM = 1
_SIGN = np.uint64(1 << 63)
_HASH_KEYS = ("headrace order 0", "headrace order 1")

Int64s = npt.NDArray[np.int64]
Masks = npt.NDArray[np.bool_]
Tails = npt.NDArray[np.uint8]
"""What breaks ties, 17 bytes a row: the kind, then epoch, partition and offset (kind 1), or schema and hash (0)."""


@dataclass(frozen=True)
class Origin:
    """Where the rows of a stream come from: one partition in one epoch, and the offset of each row, ascending."""

    epoch: int
    partition: int
    offsets: Int64s


@dataclass(frozen=True)
class EncodedRows:
    """Rows in Feast's wire formats, one per key. All sequences have the same length and order.

    Attributes:
        keys: serialized entity keys.
        order: what decides which value is newest, `ORDER_BYTES` each; greater is newer.
        event_us: event times, microseconds since the epoch.
        created_us: created times likewise; None where absent.
        values: serialized values by feature name, `large_binary` without nulls; empty bytes are null.
    """

    keys: list[bytes]
    order: list[bytes]
    event_us: list[int]
    created_us: list[int | None]
    values: Mapping[str, pa.Array]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Int64s) -> EncodedRows:
        """These rows alone, in the order given."""
        at = rows.tolist()
        return EncodedRows(
            [self.keys[i] for i in at],
            [self.order[i] for i in at],
            [self.event_us[i] for i in at],
            [self.created_us[i] for i in at],
            {name: column.take(pa.array(rows, pa.int64())) for name, column in self.values.items()},
        )


def encode(contract: ViewContract, table: pa.Table, tails: Tails | None = None) -> EncodedRows:
    """Reduce rows to the newest of each key, and encode those.

    Args:
        table: in the contract's schema, any order.
        tails: aligned with the table; those of kind 0 are zeros, their hashes are filled in here. None: all are.

    Raises:
        SchemaError: a join key or the event time is null, or a value cannot be served.
    """
    event, _ = _times(contract, table, contract.timestamp_field)
    created, has_created = _times(contract, table, contract.created_field)
    rows, tied = _candidates(_key_codes(contract, table), event, created, has_created)
    if len(rows) < table.num_rows:
        table = table.take(pa.array(rows))
        tails = None if tails is None else tails[rows]
    encoded = encode_each(contract, table, tails)
    return newest(encoded) if tied else encoded


def encode_each(contract: ViewContract, table: pa.Table, tails: Tails | None = None) -> EncodedRows:
    """Encode every row, aligned with the table: as `encode`, but keys may come several times."""
    event, _ = _times(contract, table, contract.timestamp_field)
    created, has_created = _times(contract, table, contract.created_field)
    known = created.astype(object)
    known[~has_created] = None
    values = {contract.view_name(name): _serialized(contract, table, name) for name in contract.features}
    tails = np.zeros((table.num_rows, 17), dtype=np.uint8) if tails is None else tails
    return EncodedRows(
        keys=to_list(encode_keys(contract, table)),
        order=order_keys(
            event, created, has_created, _with_hashes(tails, values, lambda: schema_id(contract.feature_view))
        ),
        event_us=event.tolist(),
        created_us=known.tolist(),
        values={name: without_null(column, b"") for name, column in values.items()},
    )


def newest(rows: EncodedRows) -> EncodedRows:
    """Keep the greatest order of each key."""
    if len(set(rows.keys)) == len(rows):
        return rows
    best: dict[bytes, int] = {}
    for index, (key, order) in enumerate(zip(rows.keys, rows.order, strict=True)):
        seen = best.get(key)
        if seen is None or rows.order[seen] <= order:
            best[key] = index
    return rows.take(np.array(sorted(best.values()), dtype=np.int64))


def order_keys(event_us: Int64s, created_us: Int64s, has_created: Masks, tails: npt.NDArray[np.uint8]) -> list[bytes]:
    """The total order as bytes. `tails` are the last 17 of each, from `stream_tails` or `hash_tails`.

    An absent created time is lower than any present one.
    """
    rows = len(event_us)
    out = np.zeros((rows, ORDER_BYTES), dtype=np.uint8)
    out[:, 0:8] = _sortable(event_us)
    out[:, 8:16] = np.where(has_created[:, None], _sortable(created_us), np.uint8(0))
    out[:, 16:33] = tails
    return to_list(rows_of(out))


def stream_tails(origin: Origin) -> npt.NDArray[np.uint8]:
    """Kind 1, epoch, partition, offset: the place of a stream row among rows of the same times."""
    out = np.empty((len(origin.offsets), 17), dtype=np.uint8)
    out[:, 0] = _KIND_STREAM
    out[:, 1:9] = np.frombuffer(struct.pack(">II", origin.epoch, origin.partition), dtype=np.uint8)
    out[:, 9:17] = origin.offsets.astype(">u8").view(np.uint8).reshape(-1, 8)
    return out


def hash_tails(values: Mapping[str, pa.Array], schema: bytes) -> Tails:
    """Kind 0, the schema's id, and a 96-bit hash of the encoded values: Feast gives no better tie-break.

    Args:
        values: by feature, `large_binary`; empty bytes are null.
    """
    columns = {name: pc.if_else(pc.equal(pc.binary_length(c), 0), None, c) for name, c in values.items()}
    return _with_hashes(np.zeros((len(next(iter(columns.values()))), 17), dtype=np.uint8), columns, lambda: schema)


def schema_id(view: FeatureView) -> bytes:
    """Four bytes that tell apart what a view's features and their types were."""
    features = sorted(f"{feature.name}:{feature.dtype}" for feature in view.features)
    return blake2b("\n".join(features).encode(), digest_size=_UNTIL_SCHEMA - UNTIL_KIND).digest()


def is_older(order: bytes, than: bytes) -> bool:
    """Whether a row of one order has to give way to a row of another.

    Hashes of rows that were encoded under different schemas say nothing of each other: then neither is older. So a row
    that is applied again after its view changed replaces itself.
    """
    same_times = order[:UNTIL_KIND] == than[:UNTIL_KIND] and order[UNTIL_KIND - 1 : UNTIL_KIND] == b"\x00"
    if same_times and order[UNTIL_KIND:_UNTIL_SCHEMA] != than[UNTIL_KIND:_UNTIL_SCHEMA]:
        return False
    return order < than


def _with_hashes(tails: Tails, values: Mapping[str, pa.Array], schema: Callable[[], bytes]) -> Tails:
    """The tails, those of kind 0 with the schema's id, asked for if there are any, and their hashes.

    Hashed is the concatenation of the serialized values by name, a zero byte for null: each is one field of a message,
    so it tells where it ends. The hash is the first 96 bits of two of 64, little-endian, of `pandas.util.hash_array`
    under two fixed keys: SipHash-2-4, mixed by the finalizer of SplitMix64. It is public, fast on columns, and no
    secret is needed here.
    """
    plain = np.flatnonzero(tails[:, 0] != _KIND_STREAM)
    if not len(plain):
        return tails
    columns = [values[name] for name in sorted(values)]
    if len(plain) < len(tails):
        columns = [column.take(pa.array(plain)) for column in columns]
    rows = joined(columns, null=b"\x00").to_numpy(zero_copy_only=False)
    halves = [pd.util.hash_array(rows, hash_key=key, categorize=False).astype("<u8") for key in _HASH_KEYS]
    out = tails.copy()
    out[plain, 1:5] = np.frombuffer(schema(), dtype=np.uint8)
    out[plain, 5:] = np.column_stack(halves).view(np.uint8)[:, :12]
    return out


def encode_keys(contract: ViewContract, table: pa.Table) -> pa.Array:
    """Serialized entity keys, equal to Feast's `serialize_entity_key(..., entity_key_serialization_version=3)`.

    `large_binary`, without nulls.

    Raises:
        SchemaError: a join key is null.
    """
    pieces = [_key_piece(contract, table, name) for name in serialized_keys(contract)]
    return joined([pa.repeat(pa.scalar(key_header(contract), BINARY), table.num_rows), *pieces])


def serialized_keys(contract: ViewContract) -> list[str]:
    """The columns of the join keys in the order of a serialized entity key: that of their names in the view."""
    return sorted(contract.join_keys, key=contract.view_name)


def key_header(contract: ViewContract) -> bytes:
    """What every serialized entity key of a view begins with: the names of the join keys."""
    names = sorted(map(contract.view_name, contract.join_keys)) or [DUMMY_ENTITY_ID]
    header = struct.pack("<I", len(names))
    for name in names:
        header += struct.pack("<II", ValueTypeProto.STRING, len(name.encode())) + name.encode()
    if not contract.join_keys:  # Feast gives the one row of such a view an empty text for its key
        header += struct.pack("<II", ValueTypeProto.STRING, 0)
    return header


def encode_values(contract: ViewContract, table: pa.Table, feature: str) -> pa.Array:
    """One feature's values, equal to `ValueProto.SerializeToString()` of what Feast makes of them; empty is null.

    `large_binary`, without nulls.

    Where Feast has none or several answers, `headrace.values` says what is meant.

    Args:
        feature: its column.

    Raises:
        SchemaError: a value cannot be served.
    """
    return without_null(_serialized(contract, table, feature), b"")


def encode_timestamps(event_us: Sequence[int]) -> pa.Array:
    """`google.protobuf.Timestamp` of each time, serialized: seconds in field 1, nanoseconds in 2, zeros left out."""
    seconds, micros = np.divmod(np.asarray(event_us, dtype=np.int64), 1_000_000)
    empty = pa.scalar(b"", BINARY)
    fields = [
        pc.if_else(pa.array(numbers != 0), varints(numbers, tag), empty)
        for tag, numbers in ((b"\x08", seconds), (b"\x10", micros * 1000))
    ]
    return joined(fields)


def _serialized(contract: ViewContract, table: pa.Table, feature: str) -> pa.Array:
    """One feature's values; null is null."""
    column, kind = one_array(table.column(feature)), contract.schema.field(feature).type
    try:
        return serialize(contract.dtype(feature), column if column.type == kind else column.cast(kind))
    except ValueError as error:
        msg = f"feature view `{contract.name}`: feature `{feature}` holds a value that cannot be served: {error}"
        raise SchemaError(msg) from error


def _candidates(codes: Int64s | None, event: Int64s, created: Int64s, has_created: Masks) -> tuple[Int64s, bool]:
    """The rows that may be the newest of their key, all that tie for it among them; and whether any do."""
    if codes is None:
        return np.arange(len(event)), False
    by = np.lexsort((created, has_created, event, codes))
    last = np.append(codes[by][1:] != codes[by][:-1], True)
    winner = np.repeat(by[last], np.diff(np.append(-1, np.flatnonzero(last))))
    ties = (event[by] == event[winner]) & (created[by] == created[winner]) & (has_created[by] == has_created[winner])
    return np.sort(by[ties]), bool(ties.sum() > last.sum())


def _key_codes(contract: ViewContract, table: pa.Table) -> Int64s | None:
    """A number for each row, equal where the keys are; None where no two are."""
    numbers = None
    if len(contract.join_keys) == 1:
        column = one_array(table.column(contract.join_keys[0]))
        _refuse_nulls(contract, column, contract.join_keys[0])
        numbers = _key_numbers(column)
    if numbers is None:
        encoded = encode_keys(contract, table).dictionary_encode()
        numbers = encoded.indices.to_numpy().astype(np.int64)
        return None if len(encoded.dictionary) == table.num_rows else numbers
    ascending = np.sort(numbers)
    return numbers if (ascending[1:] == ascending[:-1]).any() else None


def _times(contract: ViewContract, table: pa.Table, name: str | None) -> tuple[Int64s, Masks]:
    """A column of times in microseconds, and which of them are there; none where the view has no such column.

    Raises:
        SchemaError: an event time is null.
    """
    if name is None:
        return np.zeros(table.num_rows, dtype=np.int64), np.zeros(table.num_rows, dtype=bool)
    column = one_array(table.column(name)).cast(pa.int64())
    if name == contract.timestamp_field:
        _refuse_nulls(contract, column, name)
    has: Masks = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
    return without_null(column, 0).to_numpy(zero_copy_only=False), has


def _key_piece(contract: ViewContract, table: pa.Table, name: str) -> pa.Array:
    """Type, length and bytes of one join key of each row."""
    column = one_array(table.column(name))
    _refuse_nulls(contract, column, name)
    kind = KEY_KINDS[contract.dtype(name)]
    numbers = _key_numbers(column)
    if numbers is not None:
        width = 4 if column.type == pa.int32() else 8
        return fixed(struct.pack("<II", kind, width), numbers.astype(f"<i{width}"))
    values = column.cast(pa.binary()).cast(BINARY)
    lengths = pc.binary_length(values).to_numpy(zero_copy_only=False)
    return joined([fixed(struct.pack("<I", kind), lengths.astype("<u4")), values])


KEY_KINDS: Mapping[FeastType, int] = {
    Int32: ValueTypeProto.INT32,
    Int64: ValueTypeProto.INT64,
    String: ValueTypeProto.STRING,
    Bytes: ValueTypeProto.BYTES,
    UnixTimestamp: ValueTypeProto.UNIX_TIMESTAMP,
}
"""What a serialized entity key says of the type of a join key."""


def _key_numbers(column: pa.Array) -> Int64s | None:
    """Whole numbers and times as Feast has them in keys, times in seconds, rounded down; None for text and bytes."""
    if pa.types.is_timestamp(column.type):
        seconds: Int64s = np.floor_divide(column.cast(pa.int64()).to_numpy(zero_copy_only=False), 1_000_000)
        return seconds
    if pa.types.is_integer(column.type):
        numbers: Int64s = column.to_numpy(zero_copy_only=False).astype(np.int64)
        return numbers
    return None


def _refuse_nulls(contract: ViewContract, column: pa.Array, name: str) -> None:
    if column.null_count:
        msg = (
            f"feature view `{contract.name}`: column `{name}` is null in {column.null_count} rows; "
            "a row without its join keys and event time cannot be served: remove it from the source"
        )
        raise SchemaError(msg)


def _sortable(times: Int64s) -> npt.NDArray[np.uint8]:
    """Signed numbers as eight big-endian bytes that compare as the numbers do."""
    shifted = times.astype(np.int64).view(np.uint64) ^ _SIGN
    return shifted.astype(">u8").view(np.uint8).reshape(-1, 8)
