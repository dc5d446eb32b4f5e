"""Many Avro records at once, field by field with NumPy, where a record holds no others: most events do not.

Avro has no offsets: where a field begins depends on every field before it. But the n-th fields of all records can be
read together, each from its record's own position. A record that is not plainly good is left to be read by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from streaming.avro_schema import Node

FEWEST = 100
"""Fewer records are read sooner one by one."""

_LONGEST_VARINT = 10
_LONG = 64
_PADDING = bytes(16)
"""A field is read before it is known whether it ends within its record."""

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def is_flat(root: Node) -> bool:
    """Whether the records of a schema can be read so."""
    return all(len(field.node.branches) == 1 and _is_flat(field.node) for field in root.fields)


def _is_flat(node: Node) -> bool:
    if node.kind == "union":
        return len(node.parts) == 2 and _is_flat(node.branches[0])
    return node.kind in _READERS


class FlatReader:
    """Reads records that were written with one flat schema. Made once a call."""

    def __init__(self, root: Node, values: Sequence[bytes], skip_bytes: int) -> None:
        self._root = root
        self._joined = b"".join([*values, _PADDING])
        self._bytes = np.frombuffer(self._joined, np.uint8)
        sizes = np.fromiter(map(len, values), np.int64, len(values))
        self._ends: Ints = np.cumsum(sizes)
        self._at: Ints = self._ends - sizes + skip_bytes
        self._good: Mask = np.ones(len(values), dtype=bool)

    def read(self) -> tuple[dict[str, pa.Array], Mask]:
        """The values of each field, by name, and which records are good: the values of others mean nothing."""
        every = np.arange(len(self._ends), dtype=np.int64)
        self._bound(every)
        columns = {field.name: self._field(field.node, every) for field in self._root.fields}
        return columns, self._good & (self._at == self._ends)

    def _bound(self, rows: Ints) -> None:
        """Keep positions within their records; where one had to be moved the record is not good."""
        ends = self._ends[rows]
        self._good[rows] &= self._at[rows] <= ends
        self._at[rows] = np.minimum(self._at[rows], ends)

    def _field(self, node: Node, rows: Ints) -> pa.Array:
        if node.kind == "union":
            return self._optional(node, rows)
        values: pa.Array = _READERS[node.kind](self, node, rows)
        self._bound(rows)
        return values

    def _optional(self, node: Node, rows: Ints) -> pa.Array:
        branch = self._longs(rows)
        self._bound(rows)
        self._good[rows] &= (branch == 0) | (branch == 1)
        null_branch = 0 if node.parts[0].kind == "null" else 1
        has_value = branch != null_branch
        values = self._field(node.branches[0], rows[has_value])
        places = np.cumsum(has_value) - 1
        return values.take(pa.array(places, mask=~has_value))

    def _longs(self, rows: Ints) -> Ints:
        """Variable-length, zigzag; one that does not end in time is not good."""
        at = self._at[rows]
        value = np.zeros(len(rows), dtype=np.uint64)
        open_ = np.arange(len(rows))
        for index in range(_LONGEST_VARINT):
            byte = self._bytes[at[open_]]
            value[open_] |= (byte & np.uint8(0x7F)).astype(np.uint64) << np.uint64(7 * index)
            at[open_] += 1
            open_ = open_[byte >= 0x80]
            if not len(open_):
                break
        self._good[rows[open_]] = False
        self._at[rows] = at
        zigzag: Ints = (value >> np.uint64(1)).astype(np.int64) ^ -(value & np.uint64(1)).astype(np.int64)
        return zigzag

    def _words(self, rows: Ints, kind: str) -> Any:
        """Numbers of a fixed width, little-endian."""
        width = np.dtype(kind).itemsize
        at = self._at[rows]
        words = self._bytes[at[:, None] + np.arange(width)].view(kind)[:, 0]
        self._at[rows] = at + width
        return words

    def _slices(self, rows: Ints, sizes: Ints) -> pa.Array:
        """Bytes of these sizes; where they are not within the record it is not good, and they are none."""
        left = self._ends[rows] - self._at[rows]
        fits = (sizes >= 0) & (sizes <= left)
        self._good[rows] &= fits
        sizes = np.where(fits, sizes, 0)
        starts = self._at[rows]
        self._at[rows] = starts + sizes
        offsets = np.append(0, np.cumsum(sizes))
        if offsets[-1] > _LONG * len(rows):  # then a copy of each is quicker, and indices take eight times the bytes
            pairs = zip(starts.tolist(), self._at[rows].tolist(), strict=True)
            return pa.array([self._joined[start:end] for start, end in pairs], pa.binary())
        gather = np.repeat(starts - offsets[:-1], sizes) + np.arange(offsets[-1])
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self._bytes[gather])]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(rows), buffers).cast(pa.binary())

    # -- one for each kind of field; the node is that of the field ---------------------------------------------------

    def _read_long(self, _: Node, rows: Ints) -> pa.Array:
        return pa.array(self._longs(rows))

    def _read_float(self, _: Node, rows: Ints) -> pa.Array:
        return pa.array(self._words(rows, "<f4")).cast(pa.float64())  # NumPy's own cast warns of some NaNs

    def _read_double(self, _: Node, rows: Ints) -> pa.Array:
        return pa.array(self._words(rows, "<f8"))

    def _read_boolean(self, _: Node, rows: Ints) -> pa.Array:
        return pa.array(self._words(rows, "u1") != 0)

    def _read_bytes(self, _: Node, rows: Ints) -> pa.Array:
        sizes = self._longs(rows)
        self._bound(rows)
        return self._slices(rows, sizes)

    def _read_string(self, node: Node, rows: Ints) -> pa.Array:
        raw = self._read_bytes(node, rows)
        try:
            return raw.cast(pa.string())
        except pa.ArrowInvalid:
            texts = [_text(value) for value in raw.to_pylist()]
            self._good[rows[[text is None for text in texts]]] = False
            return pa.array(texts, pa.string())

    def _read_fixed(self, node: Node, rows: Ints) -> pa.Array:
        return self._slices(rows, np.full(len(rows), node.size, dtype=np.int64))

    def _read_enum(self, node: Node, rows: Ints) -> pa.Array:
        index = self._longs(rows)
        known = (index >= 0) & (index < len(node.symbols))
        self._good[rows] &= known
        return pa.array(node.symbols, pa.string()).take(pa.array(np.where(known, index, 0)))


def _text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


_READERS: dict[str, Any] = {
    "int": FlatReader._read_long,
    "long": FlatReader._read_long,
    "float": FlatReader._read_float,
    "double": FlatReader._read_double,
    "boolean": FlatReader._read_boolean,
    "bytes": FlatReader._read_bytes,
    "string": FlatReader._read_string,
    "fixed": FlatReader._read_fixed,
    "enum": FlatReader._read_enum,
}
