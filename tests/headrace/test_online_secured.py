"""The Redis store through TLS, as a user who may do no more than it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from feast import FeatureStore
from redis import Redis
from redis.exceptions import NoPermissionError

from headrace.audit import audit
from headrace.contract import ViewContract
from headrace.encode import encode
from headrace.errors import TransientError
from headrace.online import online_store, server_ids, write_online
from tests.headrace.views import applied, rows
from tests.servers import UnavailableError, Valkey
from tests.servers.certificates import Authority, Certificate
from tests.servers.tls import TlsFront

PASSWORD = "Valkey-pass:w0rd=1"  # noqa: S105 - of a server that lives for a test
RIGHTS = (
    "-@all +hget +hmget +hset +hdel +hexists +expire +exists +watch +multi +exec +evalsha +script|load "
    "+get +set +del +scan +info +select +client|setinfo"
)
"""As in `docs/how-to/security.md`."""


@dataclass(frozen=True)
class Place:
    """A Valkey behind TLS, that wants a certificate and a user."""

    server: Valkey
    authority: Authority
    stranger: Authority
    client: Certificate
    port: int
    admin: Any

    def address(self, host: str = "localhost", password: str = PASSWORD, authority: Authority | None = None) -> str:
        """A `connection_string`."""
        ca = (authority or self.authority).file
        own = f"ssl_certfile={self.client.file},ssl_keyfile={self.client.key}"
        return f'{host}:{self.port},ssl=true,ssl_ca_certs={ca},{own},username=headrace,password="{password}"'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("secured")
    try:
        authority, stranger = Authority(folder / "own"), Authority(folder / "stranger", "stranger")
        served = authority.sign("valkey", hosts=("DNS:localhost",))
        with Valkey() as server, TlsFront(server.port, served, clients=authority) as front:
            admin: Any = Redis(port=server.port)
            patterns = ["~*test", "~headrace:mark:test:*", "~headrace:types:test:*"]
            words = ["on", "resetchannels", "resetkeys", *patterns, f">{PASSWORD}", *RIGHTS.split()]
            admin.execute_command("ACL SETUSER", "headrace", *words)
            yield Place(server, authority, stranger, authority.sign("client"), front.port, admin)
    except UnavailableError as exc:
        pytest.skip(str(exc))


def opened(place: Place, home: Path, connection: str, **options: Any) -> tuple[FeatureStore, ViewContract]:
    online = {"type": "headrace.redis.HeadraceRedisOnlineStore", "connection_string": connection}
    store, (contract,) = applied(home, online | {"key_ttl_seconds": 3600} | options)
    return store, contract


def events(contract: ViewContract, at: int) -> Any:
    return rows(contract, [{"id": n, "at": at, "value": float(at), "count": n} for n in range(300)])


def test_a_user_with_the_least_rights_can_do_everything(place: Place, tmp_path: Path) -> None:
    place.admin.execute_command("ACL LOG", "RESET")
    store, contract = opened(place, tmp_path, place.address())
    view, target = contract.feature_view, online_store(store)
    assert len(server_ids(store)) == 1
    assert write_online(store, contract, events(contract, 1)) == 300
    assert write_online(store, contract, events(contract, 5)) == 300
    assert write_online(store, contract, events(contract, 2)) == 0
    answer = store.get_online_features(["stats:value"], [{"id": n} for n in range(300)]).to_dict()
    assert answer["value"] == [5.0] * 300
    encoded = encode(contract, events(contract, 5))
    seen = target.read_stored(store.config, view, encoded.keys)
    assert all(target.replace_exact(store.config, view, seen, encode(contract, events(contract, 4))))
    assert {key for keys in target.stored_keys(store.config, view) for key in keys} == set(encoded.keys)
    assert target.read_mark(store.config, view) is None
    assert target.swap_mark(store.config, view, None, {"v": 1})
    assert audit(store, contract).diverged == 300  # online only
    store.apply([view], objects_to_delete=[], partial=True)
    target.teardown(store.config, [view], [])
    assert place.admin.dbsize() == 0
    assert place.admin.execute_command("ACL LOG") == []


def test_to_wait_for_replicas_takes_one_right_more(place: Place, tmp_path: Path) -> None:
    place.admin.execute_command("ACL LOG", "RESET")
    store, contract = opened(place, tmp_path, place.address(), replicas_to_wait=1)
    with pytest.raises(TransientError, match=r"NoPermissionError.*'wait'"):
        write_online(store, contract, events(contract, 1))
    place.admin.execute_command("ACL LOG", "RESET")
    place.admin.execute_command("ACL SETUSER", "headrace", "+wait")
    with pytest.raises(TransientError, match="0 of 1 replicas"):
        write_online(store, contract, events(contract, 1))
    assert place.admin.execute_command("ACL LOG") == []
    place.admin.execute_command("ACL SETUSER", "headrace", "-wait")
    place.admin.flushall()


def test_other_projects_are_out_of_reach(place: Place) -> None:
    client: Any = Redis(port=place.server.port, username="headrace", password=PASSWORD)
    place.admin.hset(b"\x02\x00id-other", "field", "value")
    with pytest.raises(NoPermissionError, match="No permissions to access a key"):
        client.hget(b"\x02\x00id-other", "field")
    place.admin.flushall()


def test_who_is_not_let_in_is_told_why_and_tells_no_secret(place: Place, tmp_path: Path) -> None:
    store, _ = opened(place, tmp_path, place.address())
    faults = {
        "invalid username-password pair": place.address(password=PASSWORD[::-1]),
        "certificate verify failed.*self.signed": place.address(authority=place.stranger),
        "IP address mismatch": place.address(host="127.0.0.1"),
    }

    def refusal(connection: str) -> str:
        config = store.config.model_copy()
        config._online_store = store.config.online_store.model_copy(update={"connection_string": connection})
        with pytest.raises(TransientError) as caught:
            type(online_store(store))().server_ids(config)
        return str(caught.value)

    with ThreadPoolExecutor() as pool:  # each is tried for a while
        refusals = dict(zip(faults, pool.map(refusal, faults.values()), strict=True))
    for words, text in refusals.items():
        assert re.search(words, text)
        assert PASSWORD not in text
        assert PASSWORD[::-1] not in text
