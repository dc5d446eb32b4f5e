"""What may change of a view while its history stays: columns come and go, types widen; nothing else."""

from __future__ import annotations

import pyarrow as pa

from headrace.contract import ViewContract

_WIDENS = {pa.int32(): (pa.int64(), pa.float64()), pa.float32(): (pa.float64(),)}
"""Types that hold every value of another, exactly."""


def conflict(contract: ViewContract, former: pa.Schema) -> str | None:
    """Why a view cannot go on over the rows that it has, in words; None if it can.

    A column that the rows lack is null in them, one that the view has no more is not read.

    Args:
        former: of the newest rows, in the form of `ViewContract.schema`.
    """
    where = f"feature view `{contract.name}`"
    advice = "apply the former declaration again, or declare a view of another name with a folder of its own"
    for name in (*contract.join_keys, contract.timestamp_field):
        if name not in former.names:
            kind = "join key" if name in contract.join_keys else "timestamp field"
            return f"{where}: expected the {kind} `{name}` in the rows that it has, found {former.names}; {advice}"
    for column in contract.schema:
        if column.name in former.names and not _holds(column.type, former.field(column.name).type):
            return (
                f"{where}: column `{column.name}` is {column.type} now, and {former.field(column.name).type} in the "
                f"rows that it has, not all of which can be so; {advice}"
            )
    return None


def _holds(kind: pa.DataType, former: pa.DataType) -> bool:
    """Whether a type has all values of the former one."""
    if pa.types.is_list(kind) and pa.types.is_list(former):
        return _holds(kind.value_type, former.value_type)
    if pa.types.is_struct(kind) and pa.types.is_struct(former):  # a field more is one that is null
        names = {field.name for field in former}
        return all(_holds(field.type, former.field(field.name).type) for field in kind if field.name in names)
    return kind == former or kind in _WIDENS.get(former, ())
