"""Where a view's rows come from: a table or files, read a day at a time as Arrow, in chunks, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any, Protocol

import pyarrow as pa
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.exc import ArgumentError

from batch.settings import BatchSettings
from batch.sources.drops import DATE, open_drops
from batch.sources.postgres import open_postgres
from batch.sources.table import open_table
from headrace.contract import ViewContract
from headrace.errors import ConfigError


class Source(Protocol):
    """A view's source, looked at and found fit. Holds no connection and no open file.

    Attributes:
        name: of the table, or the pattern of the files.
        columns: all that it has, with their types as declared there.
        schema: of the rows that `read` yields: the columns wanted, in wide types, and `__odd__` (`batch.sources.odd`).
        window_column: the column whose time says to which day a row belongs; None where the files' names say it.
        ignored: columns that the view does not know.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - as the class says

    @property
    def columns(self) -> Mapping[str, str]: ...  # noqa: D102

    @property
    def schema(self) -> pa.Schema: ...  # noqa: D102

    @property
    def window_column(self) -> str | None: ...  # noqa: D102

    @property
    def ignored(self) -> tuple[str, ...]: ...  # noqa: D102

    def read(self, day: date, chunk_rows: int) -> Iterator[pa.Table]:
        """Yield the rows of a day, `[day 00:00, next day 00:00)` UTC, in chunks and in any order.

        All are of one state of the source. Memory: a few chunks.

        Raises:
            TransientError: the source cannot be reached, ended the read, or was changed meanwhile.
        """
        ...

    def rows_of_no_day(self) -> int | None:
        """How many rows no day reads: those without a time in the window's column; None where it costs too much.

        Call it after `read`. Its cost does not grow with the history.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the receipt says of the source beside its name. Call it after `read`."""
        ...


def open_source(settings: BatchSettings, contract: ViewContract, day: date | None = None) -> Source:
    """Look at a view's source before anything is read.

    Args:
        day: the day that is to be read; None for the look before any, which does not see what is dropped day by day.

    Raises:
        ConfigError: no source, no database, no such table, no file, or no column that tells the day.
        SchemaError: the source lacks columns that the view wants, or has some of another kind.
        TransientError: the database does not answer, or a file cannot be read.
    """
    if contract.source_files is not None:
        window_column = "" if DATE in contract.source_files else _window_column(settings, contract)
        return open_drops(settings.feature_repo, contract, contract.source_files, window_column, day)
    if contract.source_table is None:
        raise no_source(contract.name)
    window_column = _window_column(settings, contract)
    url = _url(settings.source_url)
    opened = open_postgres if url.get_backend_name() == "postgresql" else open_table
    return opened(url, contract, contract.source_table, window_column)


def no_source(*views: str) -> ConfigError:
    """What to say of views without a source."""
    return ConfigError(
        f"feature view {', '.join(f'`{name}`' for name in views)} has no source; name its table or its files in the "
        'view\'s tags, as in tags={"source_table": "<table>"} or tags={"source_files": "../drops/{date}/*.parquet"}, '
        "and apply"
    )


def _window_column(settings: BatchSettings, contract: ViewContract) -> str:
    if settings.window == "event":
        return contract.timestamp_field
    if contract.created_field is None:
        msg = (
            f"feature view `{contract.name}` has no created timestamp, by which the day of arrival is told; "
            "give its FileSource a created_timestamp_column, or set HEADRACE_WINDOW=event"
        )
        raise ConfigError(msg)
    return contract.created_field


def _url(url: SecretStr | None) -> sa.URL:
    if url is None:
        msg = "no source database: set HEADRACE_SOURCE_URL, for example to sqlite:///data/source.db"
        raise ConfigError(msg)
    try:
        return sa.make_url(url.get_secret_value())
    except ArgumentError:
        msg = (
            "HEADRACE_SOURCE_URL is no SQLAlchemy URL, such as sqlite:///data/source.db or postgresql://user@host/name"
        )
        raise ConfigError(msg) from None
