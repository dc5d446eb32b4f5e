"""Records to columns: JSON objects of a view, decoded with the types of its schema, each bad one with its reason.

A record is decoded by itself, so that two objects in one record, or half of one, cannot shift their neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
import pyarrow as pa
from feast.types import Array, FeastType, Json, Map, Set, Struct, UnixTimestamp

from headrace.conform import Reason, Reject, Rows
from headrace.contract import ViewContract

_INT64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$")
_PATH = re.compile(r" - at `\$\.(?P<path>.*)`$")
_LONGEST_MESSAGE = 200


@dataclass(frozen=True)
class Decoded:
    """Records as columns. Every record is in exactly one of the three.

    Attributes:
        table: what could be decoded, in record order; integers as int64, floats as float64, times as text.
        rows: the index of the record of each row.
        rejects: one per bad record; `row` is the index of the record. Ascending.
        skipped: the indices of tombstones.
    """

    table: pa.Table
    rows: Rows
    rejects: list[Reject]
    skipped: Rows


class JsonDecoder:
    """Decodes the JSON objects of one view. Stateless after construction, thread-safe.

    Fields that the view does not have are ignored. A feature absent is a fault unless its rule says `nullable`;
    whether a null is one, is for `headrace.conform` to say.
    """

    def __init__(self, contract: ViewContract) -> None:
        self._names = contract.schema.names
        self._times = {field.name for field in contract.schema if pa.types.is_timestamp(field.type)}
        self._integers = [
            (f"f{index}", field.name) for index, field in enumerate(contract.schema) if pa.types.is_integer(field.type)
        ]
        times = (contract.timestamp_field, contract.created_field)
        forms = [
            _form(UnixTimestamp if field.name in times else contract.dtype(field.name), field.type)
            for field in contract.schema
        ]
        self._columns = [
            (name, attrgetter(f"f{index}"), form[1])
            for index, (name, form) in enumerate(zip(self._names, forms, strict=True))
        ]
        optional = {rule.column for rule in contract.rules if rule.nullable is True}
        self._decode = self._decoder([form[0] for form in forms], optional)
        # Some producers write the integer 3 as 3.0. Only records that fail are tried again so.
        loose = [float | _INT64 if form[0] is _INT64 else form[0] for form in forms]
        self._decode_loosely = self._decoder(loose, optional)

    def __call__(self, values: Sequence[bytes | None]) -> Decoded:
        """Decode the values of records. Never raises for what is in them."""
        decode = self._decode
        structs: list[Any] = []
        rows: list[int] = []
        skipped: list[int] = []
        rejects: list[Reject] = []
        for index, value in enumerate(values):
            if value is None:
                skipped.append(index)
                continue
            try:
                # Of what the view does not have, the decoder would look at no bytes beyond ASCII.
                structs.append(decode(value if value.isascii() else value.decode()))
            except Exception as error:  # noqa: BLE001 - hostile bytes raise more than the decoder's own errors
                outcome = self._second_look(value, index, error)
                if isinstance(outcome, Reject):
                    rejects.append(outcome)
                    continue
                structs.append(outcome)
            rows.append(index)
        indices = np.array(rows, dtype=np.int64)
        table, bad = self._table(structs)
        if bad:
            rejects.extend(Reject(rows[reject.row], reject.reason, reject.field, reject.message) for reject in bad)
            rejects.sort(key=lambda reject: reject.row)
            keep = np.setdiff1d(np.arange(len(rows)), [reject.row for reject in bad])
            table, indices = table.take(pa.array(keep)), indices[keep]
        return Decoded(table, indices, rejects, np.array(skipped, dtype=np.int64))

    def _decoder(self, kinds: list[Any], optional: set[str]) -> Callable[[bytes | str], Any]:
        fields: list[Any] = []
        for index, (name, kind) in enumerate(zip(self._names, kinds, strict=True)):
            fields.append((f"f{index}", kind | None, None) if name in optional else (f"f{index}", kind | None))
        renamed = {f"f{index}": name for index, name in enumerate(self._names)}
        row = msgspec.defstruct("Row", fields, rename=renamed, kw_only=True, gc=False)
        return msgspec.json.Decoder(row, dec_hook=_to_json_text).decode

    def _second_look(self, value: bytes, index: int, error: Exception) -> Any:
        """The struct after all, if integers were written as floats; else the reject."""
        if self._integers and isinstance(error, msgspec.ValidationError) and "got `float`" in str(error):
            try:
                row = self._decode_loosely(value)
            except Exception as again:  # noqa: BLE001 - as above
                return self._reject(index, again)
            for attribute, name in self._integers:
                number = getattr(row, attribute)
                if isinstance(number, float):
                    if not number.is_integer() or abs(number) >= 2**63:
                        message = f"field `{name}`: expected an integer, found {number!r}"
                        return Reject(index, Reason.WRONG_TYPE, name, message)
                    setattr(row, attribute, int(number))
            return row
        return self._reject(index, error)

    def _reject(self, index: int, error: Exception) -> Reject:
        text = str(error)
        if isinstance(error, msgspec.ValidationError):
            if missing := _MISSING.match(text):
                field = missing["field"]
                return Reject(index, Reason.MISSING_FIELD, field, f"field `{field}` is missing")
            if path := _PATH.search(text):
                field = self._field(path["path"])
                reason = Reason.BAD_TIMESTAMP if field in self._times else Reason.WRONG_TYPE
                expected = text[: path.start()].replace(" | null`", "`")
                return Reject(index, reason, field, f"field `{field}`: {expected}"[:_LONGEST_MESSAGE])
        return Reject(
            index, Reason.UNDECODABLE, None, f"no JSON object: {type(error).__name__}: {text}"[:_LONGEST_MESSAGE]
        )

    def _field(self, path: str) -> str:
        """The column of a path such as `rates[...]` or `name`; names may hold dots and brackets themselves."""
        fitting = [name for name in self._names if path == name or path.startswith((f"{name}[", f"{name}."))]
        return max(fitting, key=len, default=path)

    def _table(self, structs: list[Any]) -> tuple[pa.Table, list[Reject]]:
        arrays: list[pa.Array] = []
        bad: dict[int, Reject] = {}
        for name, getter, kind in self._columns:
            values = list(map(getter, structs))
            try:
                arrays.append(pa.array(values, kind))
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                arrays.append(self._one_by_one(name, values, kind, bad))
        return pa.Table.from_arrays(arrays, self._names), sorted(bad.values(), key=lambda reject: reject.row)

    @staticmethod
    def _one_by_one(name: str, values: list[Any], kind: pa.DataType, bad: dict[int, Reject]) -> pa.Array:
        """A column of which some values do not fit Arrow's type; those become null and rejects."""
        good: list[Any] = []
        for row, value in enumerate(values):
            try:
                pa.array([value], kind)
            except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
                message = f"field `{name}`: expected {kind}: {error}"[:_LONGEST_MESSAGE]
                bad.setdefault(row, Reject(row, Reason.WRONG_TYPE, name, message))
                good.append(None)
            else:
                good.append(value)
        return pa.array(good, kind)


class _JsonText(str):
    """JSON as text: whatever a field holds, or, as Feast has it, the JSON in the text that it holds."""

    __slots__ = ()


def _to_json_text(_: type, value: Any) -> _JsonText:
    return _JsonText(value if isinstance(value, str) else msgspec.json.encode(value).decode())


def _form(dtype: FeastType, kind: pa.DataType) -> tuple[Any, pa.DataType]:
    """What a value is in JSON, and as what it is taken to Arrow."""
    if dtype in (Map, Array(Map), Json):
        return _JsonText, pa.string()
    if isinstance(dtype, Struct):
        forms = {part.name: _form(dtype.fields[part.name], part.type) for part in kind}
        parts = TypedDict("Parts", {name: form[0] | None for name, form in forms.items()}, total=False)  # type: ignore[misc]
        return parts, pa.struct([(name, form[1]) for name, form in forms.items()])
    if isinstance(dtype, Array | Set):
        form, arrow = _form(dtype.base_type, kind.value_type)
        return list[form | None], pa.list_(arrow)  # type: ignore[valid-type]
    simple: list[tuple[Callable[[pa.DataType], bool], Any, pa.DataType]] = [
        (pa.types.is_integer, _INT64, pa.int64()),
        (pa.types.is_floating, float, pa.float64()),
        (pa.types.is_boolean, bool, pa.bool_()),
        (pa.types.is_binary, bytes, pa.binary()),
    ]
    return next(((form, arrow) for fits, form, arrow in simple if fits(kind)), (str, pa.string()))
