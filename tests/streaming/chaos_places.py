"""What the workers of a campaign keep their data in: the stores of one machine, or those of many."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feast.infra.online_stores.helpers import _redis_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from headrace.audit import audit
from headrace.repository import open_store
from tests.servers import Fault as ObjectFault
from tests.servers import FaultyNetwork, Mode, ObjectStore, Postgres, Valkey, feast_apply
from tests.servers.valkey import ValkeyCluster
from tests.streaming.chaos import FIRST_KEY, KEYS, TIPS, Campaign, Fault
from tests.streaming.conftest import Network, Stream
from tests.streaming.oracle import KEY, Forgotten, contract_of, read_offline

OBJECT_FAULTS = (ObjectFault.SLOW_DOWN, ObjectFault.ERROR_AFTER, ObjectFault.CUT_AFTER, ObjectFault.CUT_BEFORE)
FAILING_SHARE = 0.4
"""Of the requests to the object store, while it fails."""

MENDED_WITHIN_S = 300.0
"""After a failover: workers that are killed again and again, or without a store, come to it later."""


@dataclass
class OneMachine:
    """A local folder, one Valkey, and a registry in SQLite. See `tests.streaming.chaos.Place`."""

    stream: Stream
    network: Network
    valkey: Valkey
    workers = 3
    round_s = 35.0
    a_round: Mapping[str, int] = field(
        default_factory=lambda: {
            "kill -9": 5,
            "SIGTERM": 1,
            "zombie": 1,
            "join and leave": 1,
            "broker restart": 1,
            "store frozen": 1,
            "store network": 1,
            "broker network": 2,
        }
    )
    ways: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {"store network": (Mode.STALLED.value, Mode.MUTE.value, Mode.CUT.value)}
    )

    def __post_init__(self) -> None:
        repo = self.stream.repo
        self.reader_repo = repo.parent.parent / "reader" / repo.name
        shutil.copytree(repo, self.reader_repo)
        shutil.copytree(repo.parent / "data", self.reader_repo.parent / "data")
        file = self.reader_repo / "feature_store.yaml"
        text = file.read_text(encoding="utf-8")
        assert self.network.store.address in text
        file.write_text(text.replace(self.network.store.address, self.valkey.address), encoding="utf-8")

    def apply(self, fault: Fault, campaign: Campaign) -> None:
        """Freeze the server, or break the way to it."""
        if fault.kind == "store frozen":
            self.valkey.freeze()
            campaign.later(fault.seconds, self.valkey.thaw)
        else:
            self.network.store.set(Mode(fault.how))
            campaign.later(fault.seconds, lambda: self.network.store.set(Mode.OPEN))

    def mend(self) -> None:
        """Let the server go on."""
        self.valkey.thaw()

    def forgotten(self, polls: Sequence[tuple[float, float]]) -> list[Forgotten]:
        """Nothing is."""
        del polls
        return []

    def check(self) -> None:
        """Nothing more."""

    def figures(self) -> Mapping[str, object]:
        """None."""
        return {}


@dataclass
class Failover:
    """A master was lost.

    Attributes:
        keys: the drivers that it had.
        lost: those whose newest value its replica did not have, with its event time, nanoseconds.
        killed_s, replaced_s: when it was killed, and when its replica had taken its place.
        mended_s: how long after that no driver's value was older than before.
    """

    how: str
    keys: frozenset[int]
    lost: Mapping[int, int]
    killed_s: float
    replaced_s: float
    mended_s: float = 0.0


SHORT = {
    "kill -9": 1,
    "zombie": 1,
    "master lost": 1,
    "slots move": 1,
    "objects fail": 1,
    "registry restart": 1,
    "feast apply": 1,
}
CAMPAIGN = SHORT | {
    "kill -9": 3,
    "SIGTERM": 1,
    "broker network": 1,
    "master frozen": 1,
    "objects fail": 2,
    "object store restart": 1,
}
IS_CAMPAIGN = os.environ.get("HEADRACE_TEST_CAMPAIGN") == "1"


@dataclass
class ManyMachines:
    """S3, Redis Cluster, and a registry in PostgreSQL. See `tests.streaming.chaos.Place`.

    What concerns the cluster is done one after the other, as an operator does: a failover, slots that move.

    Attributes:
        way: to the object store.
    """

    stream: Stream
    reader_repo: Path
    objects: ObjectStore
    way: FaultyNetwork
    cluster: ValkeyCluster
    postgres: Postgres
    workers = 4
    round_s = 10.0
    a_round: Mapping[str, int] = field(default_factory=lambda: CAMPAIGN if IS_CAMPAIGN else SHORT)
    ways: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {
            # A replica that is in step loses next to nothing.
            "master lost": ("behind", "behind", "in step"),
            # A request that is never answered is given up after half a minute.
            "objects fail": ("one", "any", "never") if IS_CAMPAIGN else ("one", "any"),
        }
    )

    def __post_init__(self) -> None:
        self.failovers: list[Failover] = []
        self.counts: Counter[str] = Counter()
        self.applied: list[str] = []
        store = open_store(self.stream.repo)
        config, view = store.config, contract_of(self.stream.repo).name
        version = config.entity_key_serialization_version
        self._stamp_field = f"_ts:{view}".encode()
        self._hashes = {
            driver: _redis_key(config.project, _entity(driver), entity_key_serialization_version=version)
            for driver in range(FIRST_KEY, FIRST_KEY + KEYS)
        }

    def apply(self, fault: Fault, campaign: Campaign) -> None:
        """See `a_round`."""
        chance = random.Random(repr(fault))
        thread, work = {
            "master lost": ("cluster", lambda: self._lose_master(fault, campaign, chance)),
            "master frozen": ("cluster", lambda: self._freeze_master(fault, chance)),
            "slots move": ("cluster", lambda: self._move_slots(chance)),
            "objects fail": ("network", lambda: self._fail_objects(fault, chance)),
            "object store restart": ("objects", lambda: _restart(self.objects.kill, self.objects.start, fault)),
            "registry restart": ("registry", lambda: _restart(self.postgres.stop, self.postgres.start, fault)),
            "feast apply": ("apply", lambda: self._add_column(campaign)),
        }[fault.kind]
        campaign.beside(thread, work)

    def mend(self) -> None:
        """Start and thaw what is not there."""
        self.way.judge = None
        for server in (self.objects, self.postgres, *self.cluster.nodes, *self.cluster.replicas):
            with contextlib.suppress(ProcessLookupError):
                server.start().thaw()

    def forgotten(self, polls: Sequence[tuple[float, float]]) -> list[Forgotten]:
        """The first poll that may see it ended after a master was killed; the last began when it was replaced."""
        begun_s, ended_s = zip(*polls, strict=True)
        return [
            Forgotten(one.keys, bisect_left(ended_s, one.killed_s), bisect_left(begun_s, one.replaced_s))
            for one in self.failovers
        ]

    def check(self) -> None:
        """Values of columns that were added agree, too, and there are files of before and of afterwards."""
        contract = contract_of(self.stream.repo)
        assert set(self.applied) <= set(contract.features)
        found = audit(open_store(self.stream.repo), contract)
        assert found.diverged == 0, (dict(found.counts), found.examples)
        offline = read_offline(contract, self.stream.topic)
        having = Counter(name for others in offline.more.values() for name in others)
        assert all(0 < having[name] < len(offline.rows) for name in self.applied), having

    def figures(self) -> Mapping[str, object]:
        """What the failovers lost, and how it was mended."""
        mended = [f"{one.mended_s:.1f}" for one in self.failovers if one.lost]
        return {
            "slots moved": self.counts["slots moved"],
            "requests to the object store that failed": self.counts["failed"],
            "failovers, of replicas that were behind": sum(one.how == "behind" for one in self.failovers),
            "drivers on a lost master": sum(len(one.keys) for one in self.failovers),
            "of them, newest value lost": sum(len(one.lost) for one in self.failovers),
            "seconds until they were mended": " ".join(mended) or "none",
            "columns added": len(self.applied),
            "applies that failed": self.counts["applies that failed"],
        }

    # -- the cluster ---------------------------------------------------------------------------------------------------

    def _lose_master(self, fault: Fault, campaign: Campaign, chance: random.Random) -> None:
        number = chance.randrange(len(self.cluster.nodes))
        master, replica = self.cluster.nodes[number], self.cluster.replicas[number]
        had = self._drivers_of(master)
        if fault.how == "behind":
            replica.freeze()
            _client(master).execute_command("CLIENT KILL TYPE replica")  # else it reads from its socket what was sent
            time.sleep(fault.seconds)
        before = self._stamps(master, had)
        killed_s = time.monotonic()
        if fault.how == "behind":
            master.kill()
            replica.thaw()
            lost = self._older(replica, before)
            self.cluster.promote(replica)
        else:
            self.cluster.lose(number)
            lost = self._older(replica, before)  # at least: workers write there already
        replaced_s = time.monotonic()
        failover = Failover(fault.how, frozenset(had), lost, killed_s, replaced_s)
        self.failovers.append(failover)
        campaign.say(f"failover of {len(had)} drivers, {len(lost)} older")
        if lost:
            campaign.beside("mending", lambda: self._await_mended(failover, campaign))
        self.cluster.take_back(number)

    def _await_mended(self, failover: Failover, campaign: Campaign) -> None:
        """Return when no driver's value is older than before the failover, on whatever server it is by now."""
        older = failover.lost
        while older:
            waited_s = time.monotonic() - failover.replaced_s
            assert waited_s < MENDED_WITHIN_S, f"{sorted(older)} are older than before the failover"
            time.sleep(0.1)
            for node in self.cluster.nodes + self.cluster.replicas:
                with contextlib.suppress(RedisError):  # it is away, or has become a replica
                    of_node = self._drivers_of(node) & older.keys()
                    still = self._older(node, {driver: older[driver] for driver in of_node})
                    older = {driver: older[driver] for driver in older.keys() - of_node | still.keys()}
        failover.mended_s = time.monotonic() - failover.replaced_s
        campaign.say(f"the {len(failover.lost)} of the failover are mended, after {failover.mended_s:.1f} s")

    def _freeze_master(self, fault: Fault, chance: random.Random) -> None:
        master = chance.choice(self.cluster.nodes)
        master.freeze()
        time.sleep(fault.seconds)
        master.thaw()

    def _move_slots(self, chance: random.Random) -> None:
        slots = sorted({key_slot(name) for name in self._hashes.values()})
        for slot in chance.sample(slots, 8):
            owner = self.cluster.owner(slot)
            to = chance.choice([node for node in self.cluster.nodes if node is not owner])
            self.cluster.move_slot(slot, to, pause_s=0.05)
            self.counts["slots moved"] += 1

    def _drivers_of(self, master: Valkey) -> set[int]:
        slots = self.cluster._slots(master)
        return {driver for driver, name in self._hashes.items() if key_slot(name) in slots}

    def _older(self, server: Valkey, before: Mapping[int, int]) -> dict[int, int]:
        """The drivers of whom a server has nothing, or an older value, and which it should have."""
        now = self._stamps(server, before)
        return {driver: stamp for driver, stamp in before.items() if now.get(driver, -1) < stamp}

    def _stamps(self, server: Valkey, drivers: Iterable[int]) -> dict[int, int]:
        """The event times that a server has of some drivers, nanoseconds."""
        names = sorted(drivers)
        pipeline = _client(server).pipeline(transaction=False)
        pipeline.execute_command("READONLY")  # it may be a replica
        for driver in names:
            pipeline.hget(self._hashes[driver], self._stamp_field)
        found = dict(zip(names, pipeline.execute()[1:], strict=True))
        return {driver: Timestamp.FromString(text).ToNanoseconds() for driver, text in found.items() if text}

    # -- the other two -------------------------------------------------------------------------------------------------

    def _fail_objects(self, fault: Fault, chance: random.Random) -> None:
        always = chance.choice(OBJECT_FAULTS)

        def judge(method: str, path: str) -> ObjectFault | None:
            del path
            if method not in {"PUT", "GET", "HEAD"} or chance.random() > FAILING_SHARE:
                return None
            self.counts["failed"] += 1
            return always if fault.how == "one" else chance.choice(OBJECT_FAULTS)

        if fault.how == "never":
            self.way.once("PUT", ObjectFault.MUTE_AFTER)
            self.counts["failed"] += 1
        else:
            self.way.judge = judge
        time.sleep(fault.seconds)
        self.way.judge = None

    def _add_column(self, campaign: Campaign) -> None:
        """Add the next column, by `feast apply` as a person does it: again, where a server is away."""
        if len(self.applied) == len(TIPS):
            return
        name = TIPS[len(self.applied)]
        add_column(self.stream.repo, name)
        while True:
            try:
                feast_apply(self.stream.repo)
                break
            except RuntimeError as error:
                self.counts["applies that failed"] += 1
                campaign.say(f"feast apply failed: {str(error).strip().splitlines()[-1]}")
        self.applied.append(name)
        campaign.say(f"{name} was added")


def add_column(repo: Path, name: str) -> None:
    """Declare one more feature, between others; not applied."""
    definitions = repo / "definitions.py"
    text = definitions.read_text(encoding="utf-8")
    place = text.index('        Field(\n            name="acc_rate"')
    more = f'        Field(name="{name}", dtype=Float32, tags={{"nullable": "true"}}),\n'
    definitions.write_text(text[:place] + more + text[place:], encoding="utf-8")


def written_again(logs: Path) -> int:
    """How many values the workers say that they wrote once more, for an online store that may have forgotten."""
    said = r"were applied again, (\d+) keys written"
    return sum(int(n) for log in logs.glob("worker-*.log") for n in re.findall(said, log.read_text(errors="replace")))


def _entity(driver: int) -> EntityKey:
    return EntityKey(join_keys=[KEY], entity_values=[Value(int64_val=driver)])


def _client(server: Valkey) -> Any:
    return Redis(port=server.port)


def _restart(end: Callable[[], None], start: Callable[[], object], fault: Fault) -> None:
    end()
    time.sleep(fault.seconds)
    start()
