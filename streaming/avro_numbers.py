"""What fastavro takes though no writer of Avro means it: numbers of more than ten bytes, and blocks of -2**63 items.

Its own code adds up such numbers wrongly and reads on. Few records can have one, which their bytes tell at a glance;
those are looked through once more.
"""

from __future__ import annotations

import re

from streaming.avro_schema import Node

_SUSPECT = re.compile(rb"[\x80-\xff]{10}|\xff{9}")
_LONGEST_VARINT = 10
_FEWEST_ITEMS = -(2**63)
_WIDTHS = {"null": 0, "boolean": 1, "float": 4, "double": 8}


def check_numbers(root: Node, value: bytes, start: int) -> None:
    """Look for such numbers in a record that fastavro has taken.

    Args:
        start: where in the value the record begins.

    Raises:
        ValueError: there is one.
    """
    if _SUSPECT.search(value, start):
        _end(root, value, start)


def _end(node: Node, value: bytes, at: int) -> int:
    """Where what begins there ends."""
    if node.kind == "record":
        for field in node.fields:
            at = _end(field.node, value, at)
        return at
    if node.kind in _WIDTHS or node.kind == "fixed":
        return at + _WIDTHS.get(node.kind, node.size)
    number, at = _long(value, at)
    if node.kind in ("bytes", "string"):
        return at + number
    if node.kind == "union":
        return _end(node.parts[number], value, at)
    return _blocks_end(node, value, number, at) if node.kind in ("array", "map") else at


def _blocks_end(node: Node, value: bytes, count: int, at: int) -> int:
    while count != 0:
        if count == _FEWEST_ITEMS:
            msg = f"a block of {count} items"
            raise ValueError(msg)
        if count < 0:
            _, at = _long(value, at)
        for _ in range(abs(count)):
            if node.kind == "map":
                size, at = _long(value, at)
                at += size
            at = _end(node.parts[0], value, at)
        count, at = _long(value, at)
    return at


def _long(value: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    bits = 0
    for index, byte in enumerate(value[at : at + _LONGEST_VARINT]):
        bits |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            bits &= 2**64 - 1
            return (bits >> 1) ^ -(bits & 1), at + index + 1
    msg = f"a number of more than {_LONGEST_VARINT} bytes"
    raise ValueError(msg)
