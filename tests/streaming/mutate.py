"""Hostile records: good events of a view, broken in their bytes, in their structure, and in what is around them.

A corpus gives values, good ones and such as its own format can be broken; what any format can suffer is done here:
damaged bytes, keys, headers, timestamps, tombstones. Everything follows from a seed.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

Corpus = Callable[[random.Random], bytes]
"""Gives a value; each call another."""

Headers = list[tuple[str, str | bytes | None]]


@dataclass(frozen=True, slots=True)
class Sent:
    """A record to send; a timestamp of None is now."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None


def fuzzed(corpus: Corpus, count: int, seed: int) -> Iterator[Sent]:
    """So many records; about two of three values are as the corpus gives them, the others are damaged."""
    chance = random.Random(seed)
    for _ in range(count):
        value: bytes | None = corpus(chance)
        draw = chance.random()
        if draw < 0.35:
            for _ in range(chance.choice((1, 1, 1, 2, 5))):
                value = chance.choice(DAMAGES)(value or b"", chance)
        elif draw < 0.37:
            value = chance.choice((None, None, b"", b" ", b"\0", b"\xef\xbb\xbf" + (value or b"")))
        yield Sent(_key(chance), value, _headers(chance), _timestamp(chance))


def _flip(value: bytes, chance: random.Random) -> bytes:
    if not value:
        return value
    place = chance.randrange(len(value))
    return value[:place] + bytes((value[place] ^ 1 << chance.randrange(8),)) + value[place + 1 :]


def _cut(value: bytes, chance: random.Random) -> bytes:
    start, end = _span(value, chance)
    return value[:start] + value[end:]


def _end(value: bytes, chance: random.Random) -> bytes:
    return value[: chance.randrange(len(value) + 1)]


def _insert(value: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(value) + 1)
    return value[:place] + chance.choice(PIECES) + value[place:]


def _replace(value: bytes, chance: random.Random) -> bytes:
    start, end = _span(value, chance)
    return value[:start] + chance.choice(PIECES) + value[end:]


def _double(value: bytes, chance: random.Random) -> bytes:
    start, end = _span(value, chance)
    return value[:end] + value[start:end] + value[end:]


def _swap(value: bytes, chance: random.Random) -> bytes:
    start, end = _span(value, chance)
    return value[end:] + value[start:end] + value[:start]


def _twice(value: bytes, chance: random.Random) -> bytes:
    return value + chance.choice((b"", b"\n", b" ", b",", b"\0")) + value


def _span(value: bytes, chance: random.Random) -> tuple[int, int]:
    start = chance.randrange(len(value) + 1)
    return start, min(len(value), start + chance.choice((1, 1, 2, 4, 8, 40)))


DAMAGES: Sequence[Callable[[bytes, random.Random], bytes]] = (
    _flip, _flip, _flip, _flip, _cut, _cut, _end, _insert, _insert, _replace, _double, _swap, _twice,
)  # fmt: skip

PIECES: Sequence[bytes] = (
    b"\0", b"\xff", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf0\x9f\x98\x80", b"\xef\xbb\xbf",
    b"\xe2\x80\xa8", b"\x7f", b"\x1f", b"\n", b" ", b"\t", b"\\", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"0",
    b"9", b".", b"e", b"E5", b"\\u0000", b"\\ud800", b"\\udc00", b"\\ud83d\\ude00", b"\\n", b"\\x", b"null", b"true",
    b"NaN", b"//", b"/**/", b"1e400", b"00", b"+", b"'", b"\x00\x00\x00\x00\x01", b"A" * 300,
)  # fmt: skip
"""What is put into a value: pieces that a parser may stumble over."""


def _key(chance: random.Random) -> bytes | None:
    draw = chance.random()
    if draw < 0.9:
        return b"[%d]" % chance.randrange(1000)
    if draw < 0.999:
        return chance.choice((None, b"", b"\0", b"\xff\xfe", b"{", b"x" * 300))
    return b"k" * 20_000


def _headers(chance: random.Random) -> Headers:
    draw = chance.random()
    if draw < 0.9:
        return []
    if draw < 0.999:
        return chance.choice(HEADERS)
    return [(f"h{number}", b"v" * 20) for number in range(500)]


HEADERS: Sequence[Headers] = (
    [("trace", b"1-2-3")],
    [("", b""), ("", None)],
    [("x", None)],
    [("same", b"1"), ("same", b"2"), ("same", b"1")],
    [("bytes", b"\xff\xfe\x00")],
    [("naïve ключ 鍵", "значение".encode())],
    [("headrace.reason", b"forged"), ("headrace.offset", b"-1"), ("headrace.partition", b"x")],
    [("large", b"v" * 5000)],
)


def _timestamp(chance: random.Random) -> int | None:
    draw = chance.random()
    return None if draw < 0.95 else chance.choice((1, 2**31, 2**41, 2**52, 253_402_300_800_000))


class JsonCorpus:
    """Events of a view in JSON; half of them broken in structure, each in one way or two."""

    def __init__(self, contract: ViewContract) -> None:
        self._names = [json.dumps(field.name).encode() for field in contract.schema]
        self._choices: list[Sequence[bytes]] = []
        for field in contract.schema:
            if field.name == contract.timestamp_field:
                self._choices.append([b'"2021-01-%02d 12:00:00"' % day for day in range(1, 31)])
            elif field.name == contract.created_field:
                self._choices.append([b'"2021-02-01T12:00:00.5Z"', b"null"])
            elif field.name in contract.join_keys:
                self._choices.append([b"%d" % number for number in range(50)])
            else:
                rule = contract.rule(field.name)
                good = GOOD_SHARES if rule.le is not None else _good(contract.dtype(field.name))
                self._choices.append(good if rule.ge is None else [v for v in good if not v.startswith(b"-")])

    def __call__(self, chance: random.Random) -> bytes:
        parts = [(name, chance.choice(good)) for name, good in zip(self._names, self._choices, strict=True)]
        draw = chance.random()
        if draw < 0.5:
            return _object(parts)
        for _ in range(chance.choice((1, 1, 1, 2))):
            place = chance.randrange(len(parts)) if parts else 0
            kind = chance.random()
            if kind < 0.6 and parts:
                parts[place] = (parts[place][0], chance.choice(HOSTILE))
            elif kind < 0.7 and parts:
                parts[place] = (parts[place][0], chance.choice(TIMES))
            elif kind < 0.75 and parts:
                del parts[place]
            elif kind < 0.82:
                parts.insert(place, (chance.choice(self._names), chance.choice(HOSTILE)))
            elif kind < 0.9:
                parts.insert(place, (b'"unknown"', chance.choice(HOSTILE)))
            elif kind < 0.93 and parts:
                parts[place] = (_escaped(parts[place][0]), parts[place][1])
            elif kind < 0.96:
                chance.shuffle(parts)
            elif kind < 0.9605:
                parts.insert(place, (chance.choice((*self._names, b'"deep"')), chance.choice(DEEP)))
            elif kind < 0.97:
                return chance.choice((b"[%s]", b"%s,", b"[%s", b"{%s}", b'"%s"', b"%s}", b"\n %s\t\r\n")) % _object(
                    parts
                )
        return _object(parts)


def _object(parts: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"{" + b",".join([name + b":" + value for name, value in parts]) + b"}"


def _escaped(name: bytes) -> bytes:
    return b'"\\u%04x' % name[1] + name[2:]


HOSTILE: Sequence[bytes] = (
    b"null", b"true", b"false", b"0", b"-0", b"-0.0", b"0.0", b"1", b"-1", b"1.0", b"1.5", b"1e0", b"1E2", b"3e-1",
    b"1e400", b"-1e400", b"1e-400", b"1e308", b"3.4028235e38", b"3.4028236e38", b"3.5e38", b"1.00000001", b"-1e-50",
    b"2147483647", b"2147483648", b"-2147483648", b"-2147483649", b"2147483648.0", b"9007199254740993",
    b"9007199254740993.0", b"9223372036854775807", b"9223372036854775808", b"9223372036854775807.0",
    b"-9223372036854775808", b"-9223372036854775809", b"-9223372036854775808.0", b"18446744073709551615",
    b"18446744073709551616", b"1" + b"0" * 30, b"1" * 5000, b"0." + b"1" * 400, b"1" * 400 + b".5", b"NaN", b"Infinity",
    b"-Infinity", b"nan", b"01", b"+1", b".5", b"5.", b"1e", b"0x10", b"1_000", b'""', b'" "', b'"1"', b'"0.5"',
    b'"null"', b'"NaN"', b'"\\u0000"', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\ud83d\\ude00"', b'"\xff"', b'"\xc3"',
    b'"\xed\xa0\x80"', b'"\x01"', b'"\n"', b'"\\x"', b'"\\u12"', b'"tab\\t"', b"[]", b"[null]", b"[1]", b"[1,2.5]",
    b'["a",null]', b"[[]]", b"[[1],[null],null]", b"[1,]", b"{}", b'{"a":1}', b'{"a":1,"a":"2"}', b'{"":null}',
    b'{"a":{"b":[{}]}}', b'{"n":1,"n":"x"}', b'{"n":1.0}', b'{"n":null,"more":[1]}', b"[{}]", b'[{"a":1},{"b":null}]',
    b'"{}"', b'"[{}]"', b'"{\\"a\\":1}"', b'"{\\"a\\":NaN}"', b'"[1"', b'"aGk="', b'"aGk"', b'"aG k="', b'"aGl="',
    b'"a==="', b'"_-=="', b'"00000000-0000-0000-0000-000000000000"', b'"0000000000000000000000000000000g"', b'"1e5"',
    b'"1e9999999999"', b'".5"', b'"-Infinity"', b'"sNaN"', b'"1\\n"', b'"' + b"x" * 3000 + b'"', b"\xef\xbb\xbf1",
    b'{"a":18446744073709551616}', b'{"a":9223372036854775808}', b'{"a":1e400}', b'{"a":"\\ud800"}', b'{"\\ud800":1}',
    b'{"\xff":1}', b"[1e999]", b'["\xff"]', b'["\\ud800"]', b"[9223372036854775808]", b"[1.0]", b"[true,1]",
)  # fmt: skip
"""Values of every kind, good for some type and bad for others."""

TIMES: Sequence[bytes] = tuple(
    json.dumps(text).encode()
    for text in (
        "2021-01-31 12:00:00", "2021-01-31T12:00:00", "2021-01-31T12:00:00Z", "2021-01-31T12:00:00z",
        "2021-01-31T12:00:00+01:00", "2021-01-31T12:00:00-0130", "2021-01-31T12:00:00+05", "2021-01-31 12:00:00.1",
        "2021-01-31 12:00:00.123456", "2021-01-31 12:00:00.123456789", "2021-01-31 12:00:00.1234567890",
        "2021-01-31 12:00:00.", "2021-01-31 12:00:00,5", "2021-01-31 12:00", "2021-01-31 12:00+01:00",
        "2021-01-31T12:00:00.5+01:00", "2021-01-31 12:00:60", "2021-01-31 24:00:00", "2021-01-31 12:60:00",
        "2021-02-30 12:00:00", "2024-02-29 12:00:00", "2021-13-01 12:00:00", "2021-00-10 12:00:00", "2021-01-31",
        "20210131T120000", "20210131T120000.000000Z", "2021-W05-6T12:00:00.0", "2021-031T12:00:00.000Z",
        "2021-01-31_12:00:00", "2021-01-31 12:00:00 ", " 2021-01-31 12:00:00", "2021-01-31 12:00:00\n",
        "2021-01-31 12:00:00+24:00", "2021-01-31 12:00:00+23:59", "2021-01-31 12:00:00+00:60",
        "2021-01-31 12:00:00-00:00", "0001-01-01 00:00:00", "0001-01-01 00:00:00+01:00", "0000-01-01 00:00:00",
        "9999-12-31 23:59:59.999999", "9999-12-31 23:59:59.999999999", "9999-12-31 23:59:59-01:00",
        "10000-01-01 00:00:00", "1969-12-31 23:59:59.999999", "1677-09-21 00:12:43", "2262-04-11 23:47:17",
        "२०२१-01-31 12:00:00", "2021-01-31 12:00:00 UTC", "2021-01-31 12:00:00+01:00:00", "1767000000", "now", "",
        "2021-01-31T12:00:00.123456789012Z", "-026-01-31 12:00:00", "2021-1-31 12:00:00.0", "2021-01-31t12:00:00",
    )
)  # fmt: skip

_NESTS = ((b"[", b"]"), (b'{"a":[', b"]}"), (b'{"a":', b""))
DEEP: Sequence[bytes] = (
    *(opening * depth + closing * depth for depth in (10, 100, 400, 20_000) for opening, closing in _NESTS),
    b"[" * 100_000 + b"]" * 100_000,
    b"[" * 100_000,
)
"""Nests, none about as deep as Python's own bound: how deep that is, depends on who calls."""

GOOD_SHARES: Sequence[bytes] = (b"0", b"1", b"0.5", b"0.1", b"0.333333333", b"1e-3", b"0.999999999")

_ITEMS: Mapping[FeastType, Sequence[Any]] = {
    Bool: (True, False),
    Int32: (0, 1, 42, 2**31 - 1, -(2**31)),
    Int64: (0, 7, 2**63 - 1, -(2**63), 2**53 + 1),
    Float32: (0.0, 0.5, 1, 0.1, -2.5, 1e38),
    Float64: (0.0, 0.5, 1, 0.1, -2.5, 1e300, 5e-324),
    String: ("", "text", "naïve", "鍵", "\x00", "😀", "\\", '"'),
    Bytes: tuple(base64.b64encode(data).decode() for data in (b"", b"\0", b"hi", b"\xff" * 40)),
    UnixTimestamp: ("2021-01-31 12:00:00", "2021-01-31T12:00:00.5+01:00", "1969-12-31 23:59:59"),
    Uuid: ("12345678-1234-5678-1234-567812345678", "12345678123456781234567812345678"),
    TimeUuid: ("c232ab00-9414-11ec-b3c8-9f6bdeced846",),
    Decimal: ("0", "1.5", "-12345678901234567890.123456789", "1e-5"),
    Json: (None, 1, "1", '{"a": [1]}', {"a": [1, None]}, [True], 0.5),
    Map: ({}, {"a": 1}, {"a": {"b": [1.5]}}, '{"a": 1}'),
    Array(Map): ([], [{}], [{"a": 1}, {"b": None}], '[{"a": 1}]'),
}


def _good(dtype: FeastType) -> list[bytes]:
    """Good values of a type, in JSON."""
    return [json.dumps(value, ensure_ascii=False).encode() for value in _values(dtype)]


def _values(dtype: FeastType) -> Sequence[Any]:
    if dtype in _ITEMS:
        return _ITEMS[dtype]
    if isinstance(dtype, Struct):
        parts = {name: _values(part) for name, part in dtype.fields.items()}
        return [{}, *({name: some[turn % len(some)] for name, some in parts.items()} for turn in range(4))]
    assert isinstance(dtype, Array | Set)
    items = list(_values(dtype.base_type))
    return [[], items[:1], items, items[::-1][:3]]
