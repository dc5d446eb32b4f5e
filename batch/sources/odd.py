"""Values of any kind in columns of one type, and where a value goes that does not fit: to `__odd__`, as text.

A database keeps what it was given, a file what somebody wrote. So that a single odd value costs one row and not the
day, a column is read in its wide type (int64, double, text, ...), and a value that does not fit it is null there and
goes, as text, to the column `__odd__`: a JSON object of the row's odd values by column. `Clean` puts it back before it
judges.

A column that fits as a whole is converted as a whole. One that does not is halved until what does not fit stands among
a few rows, and these go one by one.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract import TIMESTAMP
from headrace.values import one_array

ODD = "__odd__"
"""The extra column of raw Parquet: JSON text, null for a row whose values all fit their columns."""

Misfits = dict[int, str]
"""The text of the values of a column that do not fit it, by row."""

_FEW = 64
_NO_LIST = 0
"""Fits no list, whatever its items."""
_ERRORS = (
    pa.ArrowInvalid,
    pa.ArrowTypeError,
    pa.ArrowNotImplementedError,
    OverflowError,
    TypeError,
    ValueError,
)
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?$"
_NO_NUMBER = r"^[+-]?([nN][aA][nN]|[iI][nN][fF]([iI][nN][iI][tT][yY])?)$"
_SHORT_INTEGER = r"^-?[0-9]{1,18}(\.0*)?$"
_TRUE, _FALSE = ("true", "t", "1"), ("false", "f", "0")


def to_arrow(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    """Rows of Python values to a table of `schema`, whose last column is `__odd__`. No value is lost.

    A whole float or decimal fits an integer, a finite number a double if it is finite there too (it is rounded), 0 and
    1 a boolean, JSON text a list or a struct, a decimal, a UUID or what has a JSON form a text. A text is no number.
    """
    odd: dict[int, dict[str, str]] = {}
    arrays = []
    for field, values in zip(schema, zip(*rows, strict=True), strict=False):
        array, misfits = _column(values, field.type, _prepare)
        arrays.append(array)
        _note(odd, field.name, misfits)
    return pa.Table.from_arrays([*arrays, _notes(odd, len(rows))], schema=schema)


def fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Columns of any type to a table of `schema`, whose last column is `__odd__`, by name. No value is lost.

    As `to_arrow`, and a text is a number or a boolean if it reads as one as a whole (`-1.5e3`, `NaN`, `Infinity`;
    `true`, `t`, `1`), and bytes are a text if they are UTF-8. Times are cut to microseconds; without a zone they are
    UTC.

    Args:
        table: may have misfits of its own in `__odd__`: their values are null.
    """
    odd: dict[int, dict[str, str]] = {}
    if ODD in table.column_names:
        notes = one_chunk(table.column(ODD))
        for row in np.flatnonzero(notes.is_valid().to_numpy(zero_copy_only=False)).tolist():
            odd[row] = {name: text for name, text in json.loads(notes[row].as_py()).items() if text is not None}
    arrays = []
    for field in schema:
        if field.name != ODD:
            array, misfits = _fitted(_plain(one_chunk(table.column(field.name))), field.type)
            arrays.append(array)
            _note(odd, field.name, misfits)
    return pa.Table.from_arrays([*arrays, _notes(odd, table.num_rows)], schema=schema)


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; copied only if it is not one."""
    return column.chunk(0) if column.num_chunks == 1 else one_array(column)


def _note(odd: dict[int, dict[str, str]], name: str, misfits: Misfits) -> None:
    for row, text in misfits.items():
        odd.setdefault(row, {})[name] = text


def _notes(odd: dict[int, dict[str, str]], rows: int) -> pa.Array:
    if not odd:
        return pa.nulls(rows, pa.string())
    return pa.array([json.dumps(odd[row]) if odd.get(row) else None for row in range(rows)], pa.string())


# Python values.


def _column(
    values: Sequence[Any], kind: pa.DataType, prepare: Callable[[Any, pa.DataType], Any]
) -> tuple[pa.Array, Misfits]:
    """A column in its type, and what does not fit it."""
    types = set(map(type, values))
    with suppress(*_ERRORS):
        if types <= {int, type(None)} and pa.types.is_boolean(kind):
            return _exact_boolean(pa.array(values, pa.int64()), kind), {}
        if types <= _as_they_are(kind):
            return pa.array(values, kind), {}
    prepared = [prepare(value, kind) for value in values]
    with suppress(*_ERRORS):
        return pa.array(prepared, kind), {}
    fitting: list[Any] = []
    misfits: Misfits = {}
    for row, value in enumerate(prepared):
        try:
            fitting.append(pa.array([value], kind)[0].as_py())
        except _ERRORS:
            fitting.append(None)
            misfits[row] = _text(values[row])
    return pa.array(fitting, kind), misfits


def _as_they_are(kind: pa.DataType) -> set[type]:
    """The types whose values need no preparation for a column of this kind."""
    none = type(None)
    if pa.types.is_integer(kind):
        return {int, none}
    if pa.types.is_floating(kind):
        return {float, none}
    return {str, none} if pa.types.is_string(kind) else {none}


def _prepare(value: Any, kind: pa.DataType) -> Any:
    """What stands in for a value in a database without the type: 0 and 1 for a boolean, JSON for a list.

    Arrow cuts a fraction and takes a boolean for a number without a word: such values become text, which is odd.
    """
    if value is None:
        return None
    if pa.types.is_boolean(kind):
        return bool(value) if type(value) is int and value in (0, 1) else value
    if pa.types.is_integer(kind) and isinstance(value, float | Decimal):
        return _whole(value)
    if pa.types.is_floating(kind) and isinstance(value, int | Decimal):
        return str(value) if isinstance(value, bool) else _rounded(value)
    if pa.types.is_string(kind):
        return _as_text(value)
    if pa.types.is_list(kind):
        return _prepare_list(value, kind.value_type)
    if pa.types.is_struct(kind):
        return _prepare_struct(value, kind)
    return value


def _whole(value: float | Decimal) -> Any:
    """The integer that it is; else text, which is odd."""
    is_near = math.isfinite(value) and -1e19 < value < 1e19
    return int(value) if is_near and value == int(value) else str(value)


def _rounded(value: int | Decimal) -> Any:
    """The double next to it; text, which is odd, where that is infinite and the value is not."""
    try:
        nearest = float(value)
    except (OverflowError, ValueError):  # an integer beyond any double, a signaling NaN
        return str(value)
    return str(value) if math.isinf(nearest) and not (isinstance(value, Decimal) and value.is_infinite()) else nearest


def _as_text(value: Any) -> Any:
    """The text of what a driver makes of a text, a decimal, a UUID or JSON; anything else stays what it is."""
    if isinstance(value, dict | list):
        return json.dumps(value, default=str)
    return str(value) if isinstance(value, Decimal | uuid.UUID) else value


def _prepare_list(value: Any, kind: pa.DataType) -> Any:
    """A list of prepared items, from JSON where it is text. What is no list is odd: Arrow would take letters."""
    value = _parsed(value)
    return [_prepare(item, kind) for item in value] if isinstance(value, list | tuple) else _NO_LIST


def _parsed(value: Any) -> Any:
    """What a text is as JSON; what is none stays text, which is neither list nor struct."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _prepare_struct(value: Any, kind: pa.DataType) -> Any:
    """A struct of prepared fields, from JSON where it is text; what it lacks is null, what is unknown is left out."""
    value = _parsed(value)
    if not isinstance(value, dict):
        return _NO_LIST
    return {field.name: _prepare(value.get(field.name), field.type) for field in kind}


def _text(value: Any) -> str:
    """A value as text that can be written anywhere: bytes that are no UTF-8 as Python writes them."""
    if isinstance(value, bytes | bytearray | memoryview):
        return repr(bytes(value))
    text = value if isinstance(value, str) else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # what SQLite calls text
        return repr(text.encode("utf-8", "surrogateescape"))
    return text


# Arrow columns.


def _plain(array: pa.Array) -> pa.Array:
    """A column without the wrappings that say how it is stored: extensions, dictionaries, large and view types."""
    kind = array.type
    if isinstance(kind, pa.UuidType):
        return pa.array([None if value is None else str(value) for value in array.to_pylist()], pa.string())
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(array.storage)
    if pa.types.is_dictionary(kind):
        return _plain(array.dictionary_decode())
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.string())
    if pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
        return array.cast(pa.binary())
    return array


def _fitted(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, Misfits]:
    """A plain column in its type, and what does not fit it."""
    if not (pa.types.is_list(kind) or pa.types.is_struct(kind)) or _is_list(array.type):
        try:
            return _exact(array, kind), {}
        except _ERRORS:
            pass
        if len(array) > _FEW:
            middle = len(array) // 2
            first, misfits = _fitted(array[:middle], kind)
            last, others = _fitted(array[middle:], kind)
            return pa.concat_arrays([first, last]), misfits | {middle + row: text for row, text in others.items()}
    return _column(_values(array), kind, _prepare_read)


def _values(array: pa.Array) -> list[Any]:
    """The values in Python; bytes that are UTF-8 as text; a time that Python does not have as its text."""
    values: list[Any] = []
    for scalar in array:
        try:
            value = scalar.as_py()
        except (OverflowError, ValueError):
            value = str(scalar.cast(pa.string()))
        if isinstance(value, bytes):
            with suppress(UnicodeDecodeError):
                value = value.decode()
        values.append(value)
    return values


def _prepare_read(value: Any, kind: pa.DataType) -> Any:
    """As `_prepare`, of a value that may have been written as text."""
    if isinstance(value, list) and pa.types.is_list(kind):
        return [_prepare_read(item, kind.value_type) for item in value]
    if isinstance(value, str):
        if pa.types.is_binary(kind):
            return value.encode()
        if pa.types.is_boolean(kind):
            return True if value.lower() in _TRUE else False if value.lower() in _FALSE else value
        if pa.types.is_integer(kind) and re.fullmatch(_NUMBER[1:-1], value):
            return _whole(Decimal(value))
        if pa.types.is_floating(kind) and re.fullmatch(_NUMBER[1:-1], value):
            return _rounded(Decimal(value))
        if pa.types.is_floating(kind) and re.fullmatch(_NO_NUMBER[1:-1], value):
            return float(value)
    return _prepare(value, kind)


def _exact(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """A plain column as a whole; raises one of `_ERRORS` if a value does not fit, or if it cannot be said at once."""
    source = array.type
    if pa.types.is_null(source):
        return pa.nulls(len(array), kind)
    if pa.types.is_binary(source) and not pa.types.is_binary(kind):
        array, source = array.cast(pa.string()), pa.string()
    if pa.types.is_string(source):
        array.validate(full=True)
    if pa.types.is_list(kind):
        return _exact_list(array, kind)
    if pa.types.is_timestamp(kind):
        return _exact_time(array, kind)
    if pa.types.is_integer(kind):
        return _exact_integer(array, kind)
    if pa.types.is_floating(kind):
        return _exact_double(array, kind)
    if pa.types.is_boolean(kind):
        return _exact_boolean(array, kind)
    if pa.types.is_binary(kind) and pa.types.is_string(source):
        return array.cast(kind)
    if pa.types.is_string(kind) and (
        pa.types.is_integer(source) or pa.types.is_decimal(source) or pa.types.is_date(source)
    ):
        return array.cast(kind)
    _must(source == kind)
    return array


def _exact_list(array: pa.Array, kind: pa.DataType) -> pa.Array:
    _must(_is_list(array.type))
    items = _exact(_plain(array.flatten()), kind.value_type)
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, items, mask=array.is_null())


def _exact_time(array: pa.Array, kind: pa.DataType) -> pa.Array:
    _must(pa.types.is_timestamp(array.type))
    if array.type == kind:
        return array
    if array.type.tz is None:
        array = pc.assume_timezone(array, "UTC")
    return array.cast(TIMESTAMP, safe=array.type.unit != "ns").cast(kind)


def _exact_integer(array: pa.Array, kind: pa.DataType) -> pa.Array:
    source = array.type
    if pa.types.is_floating(source):
        _must(_all(pc.less(pc.abs(array), 2.0**63)))
    elif pa.types.is_string(source):
        # Arrow would take hexadecimal.
        _must(_all(pc.match_substring_regex(array, _SHORT_INTEGER)))
        return pc.replace_substring_regex(array, r"\.0*$", "").cast(kind)
    else:
        _must(pa.types.is_integer(source) or pa.types.is_decimal(source))
    return array.cast(kind)


def _exact_double(array: pa.Array, kind: pa.DataType) -> pa.Array:
    source = array.type
    if pa.types.is_decimal(source):
        array = array.cast(pa.string())
    if pa.types.is_string(array.type):
        is_number = pc.match_substring_regex(array, _NUMBER)
        _must(_all(pc.or_(is_number, pc.match_substring_regex(array, _NO_NUMBER))))
        numbers = array.cast(kind)
        _must(not pc.any(pc.and_(is_number, pc.is_inf(numbers))).as_py())
        return numbers
    _must(pa.types.is_integer(source) or pa.types.is_floating(source))
    return array.cast(kind, safe=False)


def _exact_boolean(array: pa.Array, kind: pa.DataType) -> pa.Array:
    source = array.type
    if pa.types.is_integer(source):
        _must(_all(pc.is_in(array, pa.array([0, 1, None], source))))
    elif pa.types.is_string(source):
        lower = pc.utf8_lower(array)
        _must(_all(pc.is_in(lower, pa.array([*_TRUE, *_FALSE, None]))))
        return pc.if_else(array.is_valid(), pc.is_in(lower, pa.array(_TRUE)), pa.scalar(None, kind))
    else:
        _must(source == kind)
    return array.cast(kind)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _all(mask: pa.Array) -> bool:
    """Whether it holds of every value; nulls do not count."""
    return pc.all(mask).as_py() is not False


def _must(condition: bool) -> None:
    if not condition:
        raise ValueError
