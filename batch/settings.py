"""The settings of the batch chain: `HEADRACE_*` variables or a `.env` file, read once a process."""

from __future__ import annotations

from datetime import date
from functools import lru_cache, partial
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from pydantic import Field, SecretStr, field_validator

from headrace.secret_files import filled
from headrace.settings import Settings, load


class BatchSettings(Settings):
    """What the tasks need to know, too. None of it is a task parameter, so none of it reaches the scheduler.

    Attributes:
        source_url: the database of the views with a source table, as a SQLAlchemy URL: `sqlite:///data/source.db`
            (relative to the working directory). `${NAME}` in it is the variable or the file of that name in the
            folder of secrets, quoted as a URL wants it.
        window: which day a row belongs to: the day on which it arrived (`created`), or that of its event
            time.
        reread_days: how many days before the requested one are read again with it.
        start_date: the first day that is read again; nothing before it is caught up. None: no such bound.
        max_reject_share: the gate closes when more than this share of the rows read was rejected.
        allow_empty_day: whether the gate lets a day without any row pass.
        max_future_s: how far an event may be dated ahead of the time when it was read.
        chunk_rows: rows in memory at once while reading.
        compact_grace_s: how long a file that was merged or replaced stays for those who read it: longer than the
            longest read.
        batch_keep_days: how long `batch_folder` keeps the rows of a day that was published, and the reports and
            receipts of upkeep tasks; `Compact` removes what is older. Receipts and reports of days stay.
        batch_webhook_url: where a failure is told of, by a POST of JSON. None: nowhere.
    """

    source_url: SecretStr | None = None
    window: Literal["arrival", "event"] = "arrival"
    reread_days: int = Field(2, ge=0, le=31)
    start_date: date | None = None
    max_reject_share: float = Field(0.1, ge=0, le=1)
    allow_empty_day: bool = True
    max_future_s: float = Field(300, ge=0)
    chunk_rows: int = Field(65_536, ge=1)
    compact_grace_s: float = Field(3600, ge=0)
    batch_keep_days: float = Field(14, ge=0)
    batch_webhook_url: SecretStr | None = None

    @field_validator("source_url")
    @classmethod
    def _fill_in_secrets(cls, url: SecretStr | None) -> SecretStr | None:
        return url and SecretStr(filled(url.get_secret_value(), "the URL", partial(quote, safe="")))

    @field_validator("batch_webhook_url")
    @classmethod
    def _is_url(cls, url: SecretStr | None) -> SecretStr | None:
        parts = urlsplit(url.get_secret_value()) if url is not None else None
        if parts is not None and not (parts.scheme in {"http", "https"} and parts.hostname):
            msg = "expected a URL that begins with https:// or http://"
            raise ValueError(msg)
        return url

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may show: URLs that hold a login, and the database's password."""
        urls = [url.get_secret_value() for url in (self.source_url, self.batch_webhook_url) if url is not None]
        passwords = [urlsplit(url).password or "" for url in urls]
        return tuple(text for text in (*urls, *passwords, *map(unquote, passwords)) if text)


@lru_cache(maxsize=1)
def settings() -> BatchSettings:
    """The settings of this process.

    Raises:
        ConfigError: names every variable that is wrong.
    """
    return load(BatchSettings)
