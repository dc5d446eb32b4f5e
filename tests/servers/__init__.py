"""Real servers for tests, campaigns and benchmarks, each a context manager.

Every server is a process of its own on a free loopback port, with its data in a temporary folder and its
output in a log file there; it is ended by its process id. Nothing here needs pytest::

    with Kafka() as kafka, Valkey() as valkey:
        kafka.create_topic("drivers", partitions=4)
        run(kafka.address, valkey.address)
"""

from __future__ import annotations

from tests.servers.brokers import Kafka, KafkaCluster, MockBroker, create_topic
from tests.servers.browser import Browser
from tests.servers.postgres import Postgres
from tests.servers.process import Server, ServerError, UnavailableError, free_port
from tests.servers.proxy import Mode, Proxy
from tests.servers.repository import copy_repository, environment, feast_apply, use_valkey
from tests.servers.s3 import Fault, FaultyNetwork, ObjectStore
from tests.servers.valkey import Valkey, ValkeySentinel

__all__ = [
    "Browser",
    "Fault",
    "FaultyNetwork",
    "Kafka",
    "KafkaCluster",
    "MockBroker",
    "Mode",
    "ObjectStore",
    "Postgres",
    "Proxy",
    "Server",
    "ServerError",
    "UnavailableError",
    "Valkey",
    "ValkeySentinel",
    "copy_repository",
    "create_topic",
    "environment",
    "feast_apply",
    "free_port",
    "use_valkey",
]
