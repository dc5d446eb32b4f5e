"""Files of an object store, by obstore: `s3://bucket/key`, and what it reaches besides, `gs://` and `az://`.

An object appears whole or not at all, stays as it is until it is removed, and is seen by everybody at once; there are
no folders, links, or temporary names. What is asked of a store is in the functions below, one request each.

Credentials, region and the like come from the environment, as the clouds' own tools have them; of S3 also from the
profile that `AWS_PROFILE` names. Without encryption only a loopback address is asked, or one that `AWS_ALLOW_HTTP`
allows. A process that was forked from one that had asked a store cannot ask it: the library's threads are not in it.
"""

from __future__ import annotations

import configparser
import errno
import io
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from headrace.errors import ConfigError, HeadraceError, TransientError

SCHEMES = ("s3", "gs", "az")

_TIMEOUT = timedelta(seconds=30)
_BULK_BYTES = 8 << 20
_BULK_TIMEOUT = timedelta(minutes=10)
"""Of a request with more than `_BULK_BYTES`; a smaller one that hangs is known to hang sooner."""
_CONNECT_TIMEOUT = timedelta(seconds=5)
_RETRIES = 3
_RETRY_TIMEOUT = timedelta(seconds=20)
_LISTED_AT_ONCE = 1000
_AHEAD_BYTES = 1 << 16
"""A read fetches as much at least: what follows a small piece is most often wanted next."""

_CODE = re.compile(r"<Code>([^<]{1,100})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})</Message>")
_DENIED = re.compile(r"status code:? 40[13]\b")
_REFUSALS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_STATUS = re.compile(r"status code:? (\d{3}[A-Za-z ]{0,40})")
_SECRET = re.compile(r"[^\s/\"'(]+@|\?\S+")
"""What of a URL may be one: who asks, and a signature in its query."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Stat(NamedTuple):
    """What a place says of a file.

    Attributes:
        mtime_ns: when its content was written.
        changed_s: when it came to its name; no tool sets that back.
        identity: differs between two files that had one name after each other.
    """

    size: int
    mtime_ns: int
    changed_s: float
    identity: int | str


@dataclass(frozen=True)
class Bucket:
    """Where objects lie. `endpoint` is of S3 alone; None is what the environment says, else Amazon's own."""

    scheme: str
    name: str
    endpoint: str | None = None

    def __str__(self) -> str:
        return f"{self.scheme}://{self.name}"


@dataclass(frozen=True)
class ObjectPath:
    """An object, or the prefix that others have in common, as `pathlib` has files and folders. Prints as its URL.

    Attributes:
        key: without a slash at either end; empty for the whole bucket.
        told: what the listing that it comes from said of it; None where none did.
    """

    bucket: Bucket
    key: str
    told: Stat | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, url: str, endpoint: str | None = None) -> ObjectPath:
        """The path of a URL.

        Raises:
            ConfigError: it names no bucket, or is of a store that is not known.
        """
        scheme, _, rest = url.partition("://")
        name, _, key = rest.partition("/")
        if scheme not in SCHEMES or not name or "@" in name:
            known = ", ".join(f"{scheme}://bucket/prefix" for scheme in SCHEMES)
            msg = f"expected the path of a folder or one of {known}, found {scheme}://{name.rpartition('@')[2]}"
            raise ConfigError(msg)
        key = key.rstrip("/")
        if key and {"", ".", ".."} & set(key.split("/")):
            msg = f"{url}: expected the prefix as the store has it, found a `//`, `.` or `..` in it; leave that out"
            raise ConfigError(msg)
        return cls(Bucket(scheme, name, (endpoint or None) if scheme == "s3" else None), key)

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}" if self.key else str(self.bucket)

    def __lt__(self, other: ObjectPath) -> bool:
        return self.key < other.key

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last ending of the name."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> ObjectPath:
        """The prefix before the last part."""
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def relative_to(self, folder: ObjectPath) -> PurePosixPath:
        """The rest of the key behind a prefix."""
        return PurePosixPath(self.key).relative_to(folder.key) if folder.key else PurePosixPath(self.key)

    def is_relative_to(self, folder: object) -> bool:
        """Whether it is that prefix, or behind it."""
        return (
            isinstance(folder, ObjectPath)
            and self.bucket == folder.bucket
            and (not folder.key or self.key == folder.key or self.key.startswith(f"{folder.key}/"))
        )

    def exists(self) -> bool:
        """Whether there is an object of that name, or one behind that prefix. Asks the store."""
        try:
            head(self)
        except FileNotFoundError:
            return next(listing(self), None) is not None
        return True


def head(path: ObjectPath) -> Stat:
    """What the store says of an object now.

    Raises:
        FileNotFoundError: there is none.
        TransientError: the store does not answer, or refuses.
    """
    import obstore  # noqa: PLC0415 - only who has an object store pays for it

    with _naming(path):
        return _stat(obstore.head(_store(path), path.key))


def listing(folder: ObjectPath, after: str = "") -> Iterator[tuple[str, Stat]]:
    """The objects behind a prefix, by their names from there on, in ascending order. A request for each thousand.

    Args:
        after: only names greater than this.

    Raises:
        TransientError: the store does not answer, or refuses.
    """
    import obstore  # noqa: PLC0415

    start = len(folder.key) + 1 if folder.key else 0
    offset = (f"{folder.key}/" if folder.key else "") + after if after else None
    with _naming(folder):
        found = obstore.list(_store(folder), folder.key or None, offset=offset, chunk_size=_LISTED_AT_ONCE)
        for chunk in found:
            for meta in chunk:
                yield meta["path"][start:], _stat(meta)


def read(path: ObjectPath, start: int, stop: int) -> memoryview:
    """The bytes `[start, stop)` of an object; of the very one that a listing told of, if it comes from one.

    Raises:
        FileNotFoundError: it is gone, or another has its name now.
        TransientError: the store does not answer, or refuses.
    """
    import obstore  # noqa: PLC0415

    if start >= stop:
        return memoryview(b"")
    options: Any = {"range": (start, stop)}
    if path.told is not None and path.told.identity:
        options["if_match"] = str(path.told.identity)
    with _naming(path):
        return memoryview(obstore.get(_store(path, stop - start), path.key, options=options).bytes())


def create(path: ObjectPath, data: bytes | memoryview) -> bool:
    """Make an object where there is none: a PUT with `If-None-Match: *`. Atomic, durable.

    Returns:
        False where the store says that the name is taken. It says so also of what a request made whose answer was lost,
        and S3 while another request for the name is under way (409): look at what is there.

    Raises:
        TransientError: the store does not answer, or refuses; whether the object was made is not known.
    """
    import obstore  # noqa: PLC0415
    from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415

    with _naming(path):
        try:
            obstore.put(
                _store(path, len(data)), path.key, memoryview(data).cast("B"), mode="create", use_multipart=False
            )
        except (AlreadyExistsError, PreconditionError):
            return False
    return True


def write(path: ObjectPath, data: bytes | memoryview) -> None:
    """Make an object, in the place of what is there. Atomic, durable."""
    import obstore  # noqa: PLC0415

    with _naming(path):
        obstore.put(_store(path, len(data)), path.key, memoryview(data).cast("B"), use_multipart=False)


def remove(path: ObjectPath) -> None:
    """Remove an object; one that is gone already is fine."""
    import obstore  # noqa: PLC0415

    with _naming(path), suppress(FileNotFoundError):
        obstore.delete(_store(path), path.key)


def check(folder: ObjectPath) -> None:
    """See that a prefix can be listed, before anything depends on it.

    Raises:
        ConfigError: there is no such bucket, or the credentials do not do.
        TransientError: the store does not answer.
    """
    try:
        next(listing(folder), None)
    except _RefusedError as error:
        raise ConfigError(str(error)) from None


def check_exclusive(path: ObjectPath) -> None:
    """See that the store makes an object once, by one that stays: on that rests that of two writers one wins.

    Raises:
        ConfigError: it makes it a second time, or refuses the credentials.
        TransientError: the store does not answer.
    """
    try:
        is_again = create(path, b"Headrace") and create(path, b"Headrace")
    except _RefusedError as error:
        raise ConfigError(str(error)) from None
    if is_again:
        msg = (
            f"{path}: expected {_where(path)} to refuse a PUT with `If-None-Match: *` where there is an object, "
            "it makes an object a second time: two writers would both believe that they won; use another store, "
            "or a newer version of it"
        )
        raise ConfigError(msg)


class ObjectReader(io.RawIOBase):
    """The bytes of one object, for readers that seek. Reads ahead a little.

    Thread-safe: each thread has a place of its own, as DuckDB lets its threads seek and read in one open file.
    """

    def __init__(self, path: ObjectPath) -> None:
        super().__init__()
        stat = path.told or head(path)
        self._path = replace(path, told=stat)
        self._places: dict[int, int] = {}
        self._held = (0, memoryview(b""))
        self.size = stat.size

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where this thread's next read begins."""
        return self._places.get(threading.get_ident(), 0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.IOBase`."""
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.size}[whence]
        self._places[threading.get_ident()] = place
        return place

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`; fills the buffer unless the object ends."""
        view = memoryview(buffer).cast("B")
        start = self.tell()
        stop = min(start + len(view), self.size)
        if start >= stop:
            return 0
        first, held = self._held
        if start < first or stop > first + len(held):
            # The end is read first and backwards: what lies before it is asked for next.
            ahead = max(stop, min(start + _AHEAD_BYTES, self.size))
            first = max(0, min(start, ahead - _AHEAD_BYTES))
            held = read(self._path, first, ahead)
            self._held = first, held
        view[: stop - start] = held[start - first : stop - first]
        self.seek(stop)
        return stop - start


def _stat(meta: Mapping[str, Any]) -> Stat:
    modified: datetime = meta["last_modified"]
    ns = (modified - _EPOCH) // timedelta(microseconds=1) * 1000
    return Stat(meta["size"], ns, ns / 1e9, meta["e_tag"] or meta["version"] or "")


def _store(path: ObjectPath, size: int = 0) -> Any:
    """The client of a path's bucket, for requests of a size. Made once a process."""
    if (first := _asking.setdefault("pid", os.getpid())) != os.getpid():
        msg = f"{path.bucket} cannot be asked in a process forked from {first}, which had asked a store already"
        raise TransientError(msg)
    return _client(path.bucket, size > _BULK_BYTES)


_asking: dict[str, int] = {}
"""Which process has asked a store: none that was forked from it can."""


@lru_cache(maxsize=64)
def _client(bucket: Bucket, is_bulk: bool) -> Any:
    from obstore.exceptions import BaseError  # noqa: PLC0415
    from obstore.store import AzureStore, GCSStore, S3Store  # noqa: PLC0415

    options = {
        "connect_timeout": _CONNECT_TIMEOUT,
        "timeout": _BULK_TIMEOUT if is_bulk else _TIMEOUT,
        "allow_http": _is_plain(bucket),
    }
    retries = {"max_retries": _RETRIES, "retry_timeout": _RETRY_TIMEOUT}
    common: dict[str, Any] = {"client_options": options, "retry_config": retries}
    try:
        if bucket.scheme == "gs":
            return GCSStore(bucket.name, **common)
        if bucket.scheme == "az":
            return AzureStore(bucket.name, **common)
        endpoint = {} if (url := _endpoint(bucket)) is None else {"endpoint": url}
        settings: dict[str, Any] = {**endpoint, **_credentials(), **common}
        return S3Store(bucket.name, **settings)
    except HeadraceError:
        raise
    except (BaseError, ValueError, OSError) as error:
        msg = f"{bucket}: the store cannot be used: {_said(error)}; look at its environment variables"
        raise ConfigError(msg) from None


def _endpoint(bucket: Bucket) -> str | None:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return bucket.endpoint or next((os.environ[name] for name in names if os.environ.get(name)), None)


def _is_plain(bucket: Bucket) -> bool:
    """Whether the store is asked without encryption.

    Raises:
        ConfigError: it would be, and is not on this machine; or its endpoint is no URL.
    """
    endpoint = _endpoint(bucket) if bucket.scheme == "s3" else None
    if endpoint is None:
        return False
    try:
        url = urlsplit(endpoint)
        is_url = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0 and "@" not in url.netloc
    except ValueError:
        is_url = False
    if not is_url:
        msg = f"{bucket}: expected an endpoint like https://host:port, found {_SECRET.sub('***@', endpoint)}"
        raise ConfigError(msg)
    if url.scheme == "https":
        return False
    host = url.hostname or ""
    try:
        is_loopback = ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if is_loopback or os.environ.get("AWS_ALLOW_HTTP", "").lower() in {"1", "true", "yes", "on"}:
        return True
    msg = (
        f"{bucket}: the endpoint http://{host} is neither encrypted nor on this machine; "
        "use https://, or set AWS_ALLOW_HTTP=true where the network is trusted"
    )
    raise ConfigError(msg)


def _credentials() -> dict[str, Any]:
    """What a profile has, where `AWS_PROFILE` names one and the environment has no keys, which come first everywhere.

    obstore itself knows the environment, and the machine's role.

    Raises:
        ConfigError: there is no such profile, or it has no keys and boto3 is not there to make some of it.
    """
    name = os.environ.get("AWS_PROFILE")
    if not name or (os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY")):
        return {}
    found: dict[str, str] = {}
    places = []
    for variable, default, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        file = Path(os.environ.get(variable) or default).expanduser()
        places.append(str(file))
        parser = configparser.RawConfigParser()
        parser.read(file, encoding="utf-8")
        found |= dict(parser[section]) if parser.has_section(section) else {}
    known = {
        "access_key_id": found.get("aws_access_key_id"),
        "secret_access_key": found.get("aws_secret_access_key"),
        "session_token": found.get("aws_session_token"),
        "region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or found.get("region"),
    }
    if known["access_key_id"] and known["secret_access_key"]:
        return {key: value for key, value in known.items() if value}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415
    except ImportError:
        msg = (
            f"AWS_PROFILE={name}: expected aws_access_key_id and aws_secret_access_key of it in {' or '.join(places)}, "
            "found none; put them there, or install boto3, which follows roles and single sign-on"
        )
        raise ConfigError(msg) from None
    region = {"region": known["region"]} if known["region"] else {}
    return {"credential_provider": Boto3CredentialProvider(), **region}


class _RefusedError(TransientError):
    """The store answers, and says no: the bucket, or the credentials. They may be made, and renewed."""


@contextmanager
def _naming(path: ObjectPath) -> Iterator[None]:
    """Say what a store's error means, in one line, without what was sent to it."""
    from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError  # noqa: PLC0415

    try:
        yield
    except PreconditionError:  # another object has the name now
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except (BaseError, OSError) as error:
        text = str(error)
        where, code = _where(path), _CODE.search(text)
        if "NoSuchBucket" in text or "NoSuchContainer" in text or "bucket does not exist" in text:
            msg = f"{path}: there is no bucket `{path.bucket.name}` at {where}; create it, or correct the path"
            raise _RefusedError(msg) from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        is_refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
        if is_refused or _DENIED.search(text) or (code is not None and code[1] in _REFUSALS):
            _client.cache_clear()  # the next one reads the credentials anew
            msg = (
                f"{path}: {where} refuses these credentials: {_said(error)}; correct them (AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role), or allow them to list, read, write and "
                "delete here"
            )
            raise _RefusedError(msg) from None
        msg = f"{path}: {where} does not do it: {_said(error)}"
        raise TransientError(msg) from None


def _where(path: ObjectPath) -> str:
    endpoint = _endpoint(path.bucket) if path.bucket.scheme == "s3" else None
    return endpoint.rpartition("@")[2] if endpoint else f"the {path.bucket.scheme} service"


def _said(error: BaseException) -> str:
    """What of an error is for people: the store's own words, or the innermost cause."""
    text = str(error)
    code, message, status = _CODE.search(text), _MESSAGE.search(text), _STATUS.search(text)
    if code is not None:
        return f"{code[1]}: {message[1]}" if message is not None else code[1]
    causes = re.findall(r"(?:Connection refused|timed out|TimedOut|dns error|connection reset|Connection reset)", text)
    if causes:
        return str(causes[-1]).lower()
    if status is not None:
        return f"status {status[1].strip()}"
    return _SECRET.sub("", " ".join(text.partition("Debug source")[0].split()))[:200]
