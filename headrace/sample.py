"""A share of a view's keys, chosen by a hash of the key alone: the same keys offline and online, and others each time.

DuckDB hashes both, so that offline the choice is made while Parquet is scanned, before anything is grouped. That takes
the keys of the online store back from their serialized form, in columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract import TIMESTAMP, ViewContract
from headrace.encode import KEY_KINDS, Int64s, Masks, key_header, serialized_keys
from headrace.errors import ConfigError
from headrace.values import binary

_HEAD = 8
"""Before each join key: its type and its length, four bytes each."""

_WIDTHS = {pa.int32(): 4, pa.int64(): 8, TIMESTAMP: 8}

_LAST_SECOND = (1 << 63) // 1_000_000 - 1
_HASHES = 1 << 64


@dataclass(frozen=True)
class Sample:
    """Which keys.

    Whether a key is in it depends on the key and the seed alone. Of samples of other seeds each has a key with the
    same probability, the share, and independently: after n of them a part of `(1 - share) ** n` was in none.

    Attributes:
        share: how many of all keys, about; above 0 and below 1.
        seed: another one is another sample; from 0 to below 2**63.

    Raises:
        ConfigError: the share is outside its bounds.
    """

    share: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            msg = f"a sample of {self.share:g} of the keys: expected a share above 0 and below 1"
            raise ConfigError(msg)

    def condition(self, contract: ViewContract, columns: Sequence[str]) -> str:
        """It as SQL over the join keys, in their order and in the contract's types; not for views without one."""
        # Of a time the serialized key has the seconds alone.
        kinds = [contract.schema.field(name).type for name in contract.join_keys]
        keys = [
            f"date_trunc('second', {column})" if kind == TIMESTAMP else column
            for column, kind in zip(columns, kinds, strict=True)
        ]
        below = min(max(1, round(self.share * _HASHES)), _HASHES - 1)
        return f"hash(xor(hash({', '.join(keys)}), {self.seed}::UBIGINT)) < {below}::UBIGINT"

    def chosen(self, con: duckdb.DuckDBPyConnection, contract: ViewContract, keys: Sequence[bytes]) -> list[bytes]:
        """Those of some serialized entity keys that are in it, in their order.

        In every sample are the key of a view without join keys, and what is not of this view as it is now, such as
        keys of an older version: to find what does not belong there costs little.
        """
        if not contract.join_keys:
            return list(keys)
        table, is_read = decode_keys(contract, keys)
        columns = [f"c{i}" for i in range(table.num_columns)]
        numbered = table.rename_columns(columns).append_column("number", pa.array(np.flatnonzero(is_read)))
        con.register("sampled", numbered)
        found = con.execute(f"SELECT number FROM sampled WHERE {self.condition(contract, columns)}").fetchnumpy()
        con.unregister("sampled")
        taken = ~is_read
        taken[found["number"]] = True
        return [keys[i] for i in np.flatnonzero(taken).tolist()]


def decode_keys(contract: ViewContract, keys: Sequence[bytes]) -> tuple[pa.Table, Masks]:
    """The join keys in serialized entity keys, in columns: what `headrace.encode.encode_keys` was given.

    Returns:
        The join keys of those that could be read, in their order, in the contract's types, times to the second; and
        which could be: the others have another version or other join keys, or are damaged.
    """
    sizes = np.array([len(key) for key in keys], dtype=np.int64)
    ends = np.cumsum(sizes)
    data = np.frombuffer(b"".join(keys), dtype=np.uint8)
    header = np.frombuffer(key_header(contract), dtype=np.uint8)
    rows = np.flatnonzero(sizes >= len(header))
    rows = rows[(_bytes_at(data, (ends - sizes)[rows], len(header)) == header).all(axis=1)]
    at = (ends - sizes)[rows] + len(header)
    spans: dict[str, tuple[Int64s, Int64s]] = {}
    for name in serialized_keys(contract):
        has_head = at + _HEAD <= ends[rows]
        rows, at, spans = _kept(has_head, rows, at, spans)
        heads = _bytes_at(data, at, _HEAD).view("<u4").astype(np.int64)
        kind, size, at = heads[:, 0], heads[:, 1], at + _HEAD
        width = _WIDTHS.get(contract.schema.field(name).type)
        fits = (kind == KEY_KINDS[contract.dtype(name)]) & (at + size <= ends[rows])
        spans[name] = at, size
        rows, at, spans = _kept(fits if width is None else fits & (size == width), rows, at, spans)
        at = at + spans[name][1]
    rows, _, spans = _kept(at == ends[rows], rows, at, spans)
    fields = [contract.schema.field(name) for name in contract.join_keys]
    columns = [_values(data, *spans[field.name], field.type) for field in fields]
    is_whole = np.ones(len(rows), dtype=bool)
    for column in columns:
        is_whole &= column.is_valid().to_numpy(zero_copy_only=False)
    is_read = np.zeros(len(keys), dtype=bool)
    is_read[rows[is_whole]] = True
    return pa.table(columns, schema=pa.schema(fields)).filter(pa.array(is_whole)), is_read


def _kept(
    those: Masks, rows: Int64s, at: Int64s, spans: dict[str, tuple[Int64s, Int64s]]
) -> tuple[Int64s, Int64s, dict[str, tuple[Int64s, Int64s]]]:
    """Go on with those alone."""
    if those.all():
        return rows, at, spans
    return rows[those], at[those], {name: (start[those], size[those]) for name, (start, size) in spans.items()}


def _bytes_at(data: npt.NDArray[np.uint8], at: Int64s, width: int) -> npt.NDArray[np.uint8]:
    """So many bytes from each place on, a row each."""
    return np.ascontiguousarray(data[at[:, None] + np.arange(width)])


def _values(data: npt.NDArray[np.uint8], at: Int64s, sizes: Int64s, kind: pa.DataType) -> pa.Array:
    """The values that lie at some places; null where one has to be text of UTF-8, or a time, and is not."""
    width = _WIDTHS.get(kind)
    if width is not None:
        numbers = _bytes_at(data, at, width).view(f"<i{width}").ravel()
        if kind != TIMESTAMP:
            return pa.array(numbers)
        return pa.array(numbers * 1_000_000, mask=np.abs(numbers) > _LAST_SECOND).cast(kind)
    offsets = np.append(0, np.cumsum(sizes))
    places = np.repeat(at - offsets[:-1], sizes) + np.arange(offsets[-1])
    values = binary(data[places], offsets)
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        return pa.array([_text(value) for value in values.to_pylist()], kind)


def _text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None
