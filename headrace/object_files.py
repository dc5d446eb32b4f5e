"""Objects for DuckDB: a file system of `fsspec` that knows just the files of one query.

DuckDB has an extension of its own for S3, which it would have to fetch from the network. This way it reads by the same
client, endpoint and credentials as everything else, and asks nothing twice that the listing has said already.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from headrace.objects import SCHEMES, ObjectPath, ObjectReader
from headrace.place import stat_of


class ObjectFiles(AbstractFileSystem):  # type: ignore[misc]
    """What DuckDB asks of a file system, for objects by their URLs.

    Args:
        paths: the files; others do not exist here.
    """

    protocol = SCHEMES
    cachable = False

    def __init__(self, paths: Iterable[ObjectPath]) -> None:
        super().__init__()
        self._paths = {str(path): path for path in paths}

    def open(self, path: str, mode: str = "rb", **_: Any) -> ObjectReader:
        """The bytes of a file."""
        if mode != "rb":
            msg = f"{path}: expected to be read, found mode {mode}"
            raise ValueError(msg)
        return ObjectReader(self._path(path))

    def glob(self, path: str, **_: Any) -> list[str]:
        """The file itself: names are given one by one."""
        return [path] if path in self._paths else []

    def exists(self, path: str, **_: Any) -> bool:
        """Whether it is one of the files."""
        return path in self._paths

    def isfile(self, path: str) -> bool:
        """The same."""
        return path in self._paths

    def size(self, path: str) -> int:
        """In bytes."""
        return stat_of(self._path(path)).size

    def modified(self, path: str) -> datetime:
        """When it was written."""
        return datetime.fromtimestamp(stat_of(self._path(path)).mtime_ns / 1e9, UTC)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """See `fsspec`."""
        return {"name": path, "size": self.size(path), "type": "file"}

    def _path(self, path: str) -> ObjectPath:
        try:
            return self._paths[path]
        except KeyError:
            raise FileNotFoundError(path) from None
