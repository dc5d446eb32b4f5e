"""Whether a source is what it was: its columns and their types, as a view's last run took them.

`source.json` in the view's folder of the work folder says what that was. It is written before the receipt of a day that
was read, so that a day never counts whose columns nobody took.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from batch.folder import ViewFolder, locked, read_json, write_json
from batch.source import Source
from headrace.contract import ViewContract
from headrace.errors import SchemaError, TransientError

Columns = Mapping[str, str]
"""The declared types, by column."""

_ANY = "null"
"""The type of a column of a file in which nothing is: it is like any other."""


def taken(folder: ViewFolder, source: Source) -> Columns | None:
    """The columns of the source as they were taken last; None if they never were, or those of another source."""
    if not folder.source.exists():
        return None
    content = read_json(folder.source)
    columns: Columns = content["columns"]
    return columns if content["source"] == source.name else None


def check(before: Columns | None, source: Source, contract: ViewContract) -> None:
    """Refuse a source that is not what it was.

    A column that is new and that the view wants is no difference: the view was changed for it. Without columns (no
    file came) there is nothing to compare.

    Raises:
        SchemaError: names each column that differs, its type then and now.
    """
    if before is None or not source.columns:
        return
    now = source.columns
    differences = [
        f"column `{name}` was {was} and is {now[name]}" if name in now else f"column `{name}` ({was}) is gone"
        for name, was in before.items()
        if now.get(name) != was and _ANY not in (was, now.get(name))
    ]
    differences += [
        f"column `{name}` ({kind}) is new, and the view does not know it"
        for name, kind in now.items()
        if name not in before and name not in contract.schema.names
    ]
    if differences:
        msg = (
            f"source `{source.name}` of feature view `{contract.name}` is not what it was when it was last read: "
            f"{'; '.join(differences)}; nothing was read: if that is as it should be, repeat the command with "
            "--Ingest-accept-schema, as in `luigi --module batch Materialize --date D --Ingest-accept-schema`"
        )
        raise SchemaError(msg)


def take(folder: ViewFolder, source: Source, before: Columns | None) -> None:
    """Remember the columns of a source that was read; `before` is what `taken` said before it was.

    Raises:
        TransientError: another run took others meanwhile.
    """
    if not source.columns:
        return
    with locked(folder.lock("source"), lambda: None):
        now = taken(folder, source)
        found = {name: (now or {}).get(name, kind) if kind == _ANY else kind for name, kind in source.columns.items()}
        if now == found:
            return
        if now != before:
            msg = f"another run took other columns of source `{source.name}` meanwhile; it is looked at again"
            raise TransientError(msg)
        content: dict[str, Any] = {"source": source.name, "columns": found, "taken": datetime.now(UTC)}
        write_json(folder.source, content)
