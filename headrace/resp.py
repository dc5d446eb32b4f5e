"""Redis's wire protocol, by columns: one command for each of many rows, without a Python object for each argument.

Source: RESP, https://redis.io/docs/latest/develop/reference/protocol-spec/, "Sending commands to a Redis server".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.values import BINARY, joined


def commands(parts: Sequence[bytes | pa.Array]) -> pa.Array:
    """The bytes of one command a row, as `large_binary`.

    Args:
        parts: the command's name and arguments: bytes that all rows share, or a `large_binary` array, without nulls, of
            one for each row. At least one is an array; all arrays have the same length.
    """
    pieces: list[pa.Array | pa.Scalar] = []
    shared = b"*%d\r\n" % len(parts)
    for part in parts:
        if isinstance(part, bytes):
            shared += b"$%d\r\n%s\r\n" % (len(part), part)
            continue
        lengths = pc.binary_length(part)
        extremes = pc.min_max(lengths)
        if extremes["min"] == extremes["max"]:
            pieces += [pa.scalar(shared + b"$%s\r\n" % str(extremes["min"]).encode(), BINARY), part]
        else:
            digits = lengths.cast(pa.large_string()).cast(BINARY)
            pieces += [pa.scalar(shared + b"$", BINARY), digits, pa.scalar(b"\r\n", BINARY), part]
        shared = b"\r\n"
    return joined([*pieces, pa.scalar(shared, BINARY)])


def as_bytes(packed: pa.Array) -> memoryview:
    """Commands one after the other; not a copy."""
    _, offsets, data = packed.buffers()
    if not len(packed):
        return memoryview(b"")
    ends = np.frombuffer(offsets, dtype=np.int64)
    return memoryview(data)[ends[packed.offset] : ends[packed.offset + len(packed)]]
