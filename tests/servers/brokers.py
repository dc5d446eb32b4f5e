"""Brokers: a real Apache Kafka, and the embedded one of the demonstration."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import shutil
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from tests.servers.process import Server, ServerError, Startable, UnavailableError, free_port, is_listening

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.servers.proxy import Proxy

ROOT = Path(__file__).parents[2]
POM = Path(__file__).with_name("kafka") / "pom.xml"
JARS = ROOT / ".cache" / "kafka"
"""Where Maven puts the jars (git-ignored); fetched once per content of the pom."""

HELP = "install a Java runtime (17 or newer) and Maven: `apt-get install openjdk-17-jre-headless maven`"
TOPIC_TIMEOUT_S = 20.0


def create_topic(
    address: str,
    name: str,
    *,
    partitions: int = 4,
    replication: int = 1,
    config: Mapping[str, str] | None = None,
) -> str:
    """Create a topic on a real broker and return its name when every partition has a leader.

    Raises:
        ServerError: The broker refused, or the topic did not appear.
    """
    admin = AdminClient({"bootstrap.servers": address})
    new = NewTopic(name, num_partitions=partitions, replication_factor=replication, config=dict(config or {}))
    try:
        admin.create_topics([new])[name].result(TOPIC_TIMEOUT_S)
    except KafkaException as exc:
        raise ServerError(f"topic `{name}` was not created on {address}: {exc}") from exc
    deadline = time.monotonic() + TOPIC_TIMEOUT_S
    while time.monotonic() < deadline:
        found = admin.list_topics(name, timeout=TOPIC_TIMEOUT_S).topics[name].partitions
        if len(found) == partitions and all(part.leader >= 0 for part in found.values()):
            return name
        time.sleep(0.05)
    raise ServerError(f"topic `{name}` has no leader for every partition after {TOPIC_TIMEOUT_S:.0f} s")


class Kafka(Server):
    """One Apache Kafka broker in KRaft mode; its port and data stay over `stop` and `start`.

    Topics are not created by being asked for. Group sessions may be as short as one second, so that tests of
    failover are short too.

    Args:
        heap: the largest Java heap.
        proxy: clients may also come through it, and are told its port; forwards here from the start.
        config: further broker properties, which win over those set here.
        listeners: further listeners beside the plain one: security protocol by name.
        scram: passwords of SCRAM users, by name.
        java: further options of the Java machine.
    """

    name = "kafka"
    start_timeout_s = 90.0

    def __init__(
        self,
        *,
        heap: str = "512m",
        proxy: Proxy | None = None,
        config: Mapping[str, str] | None = None,
        listeners: Mapping[str, str] | None = None,
        scram: Mapping[str, str] | None = None,
        java: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._listeners = {name: (protocol, free_port()) for name, protocol in (listeners or {}).items()}
        self._scram, self._options = dict(scram or {}), tuple(java)
        self.port, self.controller_port = free_port(), free_port()
        # An id that begins with a dash would be taken for an option.
        self.cluster = "h" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")[1:]
        self._advertised: dict[str, int] = {}
        if proxy is not None:
            proxy.target = free_port()
            self._listeners["PROXIED"] = ("PLAINTEXT", proxy.target)
            self._advertised["PROXIED"] = proxy.port
        self._heap = heap
        self._config = dict(config or {})
        self._properties = self.folder / "server.properties"

    @property
    def address(self) -> str:
        """`host:port`, the bootstrap servers."""
        return f"127.0.0.1:{self.port}"

    def address_of(self, listener: str) -> str:
        """`host:port` of a further listener."""
        return f"127.0.0.1:{self._listeners[listener][1]}"

    def create_topic(self, name: str, *, partitions: int = 4, config: Mapping[str, str] | None = None) -> str:
        """Create a topic and return its name when every partition has a leader."""
        return create_topic(self.address, name, partitions=partitions, config=config)

    def configure(self, config: Mapping[str, str]) -> None:
        """Set further broker properties; before the first start."""
        self._config |= config

    def command(self) -> Sequence[str]:
        if not self._properties.exists():
            self._format()
        return [*self._java(), "kafka.Kafka", str(self._properties)]

    def is_ready(self) -> bool:
        if not is_listening(self.port):
            return False
        with contextlib.suppress(KafkaException):
            return bool(
                AdminClient({"bootstrap.servers": self.address, "log_level": 0}).list_topics(timeout=2.0).brokers
            )
        return False

    def _java(self) -> list[str]:
        return [
            "java",
            f"-Xmx{self._heap}",
            "-Xms128m",
            "-XX:+UseSerialGC",
            *self._options,
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-cp",
            f"{fetch_jars()}/*",
        ]

    def _format(self) -> None:
        """Write the properties and the metadata of an empty cluster."""
        protocols = {"PLAINTEXT": "PLAINTEXT"} | {name: protocol for name, (protocol, _) in self._listeners.items()}
        ports = {"PLAINTEXT": self.port} | {name: port for name, (_, port) in self._listeners.items()}
        served = ",".join(f"{name}://127.0.0.1:{port}" for name, port in ports.items())
        advertised = ",".join(f"{name}://127.0.0.1:{port}" for name, port in (ports | self._advertised).items())
        properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self.controller_port}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"{served},CONTROLLER://127.0.0.1:{self.controller_port}",
            "advertised.listeners": advertised,
            "listener.security.protocol.map": ",".join(
                f"{name}:{protocol}" for name, protocol in {**protocols, "CONTROLLER": "PLAINTEXT"}.items()
            ),
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(self.folder / "data"),
            "auto.create.topics.enable": "false",
            "num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            "log.cleaner.backoff.ms": "500",
            "offsets.topic.num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            **self._config,
        }
        text = "".join(f"{key}={value}\n" for key, value in properties.items())
        draft = self._properties.with_suffix(".draft")
        draft.write_text(text, encoding="utf-8")
        formatting = [*self._java(), "kafka.tools.StorageTool", "format", "-t", self.cluster, "-c", str(draft)]
        for user, password in self._scram.items():
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                formatting += ["--add-scram", f"{mechanism}=[name={user},password={password}]"]
        done = subprocess.run(formatting, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ServerError(f"Kafka's storage was not formatted:\n{done.stdout}{done.stderr}")
        draft.rename(self._properties)


class KafkaCluster(Startable):
    """Brokers that are controllers too, in one KRaft cluster: any one may be lost, and the others go on.

    Args:
        nodes: how many.
    """

    def __init__(self, nodes: int = 3) -> None:
        self.nodes = [Kafka(heap="256m") for _ in range(nodes)]
        voters = ",".join(f"{n}@127.0.0.1:{node.controller_port}" for n, node in enumerate(self.nodes, 1))
        for number, node in enumerate(self.nodes, 1):
            node.cluster = self.nodes[0].cluster
            node.configure(
                {
                    "node.id": str(number),
                    "controller.quorum.voters": voters,
                    "offsets.topic.replication.factor": str(nodes),
                    "transaction.state.log.replication.factor": str(nodes),
                    "min.insync.replicas": str(nodes // 2 + 1),
                    "log.cleaner.dedupe.buffer.size": "4194304",
                    "broker.session.timeout.ms": "3000",
                    "broker.heartbeat.interval.ms": "500",
                }
            )

    @property
    def address(self) -> str:
        """`host:port` of every node."""
        return ",".join(node.address for node in self.nodes)

    def create_topic(self, name: str, *, partitions: int = 4) -> str:
        """Create a topic that every node has."""
        return create_topic(self.address, name, partitions=partitions, replication=len(self.nodes))

    def start(self) -> Self:
        """Start the nodes, at once: none serves before most of them do."""
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            for started in [pool.submit(node.start) for node in self.nodes]:
                started.result()
        return self

    def close(self) -> None:
        """Stop the nodes and remove their folders."""
        for node in self.nodes:
            node.kill()
            node.close()


def fetch_jars() -> Path:
    """Return the folder of Kafka's jars, fetching them with Maven when the cache has none for this pom.

    Several processes may call it at once: one fetches, the others wait.

    Raises:
        UnavailableError: Java or Maven is missing, or Maven could not fetch the jars.
    """
    if shutil.which("java") is None:
        raise UnavailableError(f"real Kafka needs `java`: {HELP}")
    folder, stamp, pom = JARS / "jars", JARS / "pom.xml", POM.read_bytes()
    JARS.mkdir(parents=True, exist_ok=True)
    with (JARS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_bytes() == pom:
            return folder
        if shutil.which("mvn") is None:
            raise UnavailableError(f"real Kafka needs `mvn`: {HELP}")
        shutil.rmtree(folder, ignore_errors=True)
        maven = [
            "mvn",
            "-q",
            "-B",
            "-f",
            str(POM),
            "dependency:copy-dependencies",
            f"-DoutputDirectory={folder}",
        ]
        done = subprocess.run(maven, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(f"Maven could not fetch Kafka's jars:\n{done.stdout}{done.stderr}")
        stamp.write_bytes(pom)
    return folder


class MockBroker(Server):
    """The embedded broker of the demonstration: quick to start, forgets everything when it ends.

    A topic is made when it is first asked for, always with four partitions; it keeps a few MB a partition. It
    chooses its own port, another one at each start.

    Args:
        topics: topics to make at start.
    """

    name = "mock-broker"

    def __init__(self, topics: Sequence[str] = ()) -> None:
        super().__init__()
        self._file = self.folder / "address"
        self._topics = tuple(topics)

    @property
    def address(self) -> str:
        """`host:port`, the bootstrap servers."""
        return self._file.read_text(encoding="utf-8").strip()

    def command(self) -> Sequence[str]:
        self._file.unlink(missing_ok=True)
        return [sys.executable, "-m", "demo.broker", "--address-file", str(self._file), *self._topics]

    def environment(self) -> Mapping[str, str]:
        return {"PYTHONPATH": str(ROOT)}

    def is_ready(self) -> bool:
        return self._file.exists()
