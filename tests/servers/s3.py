"""A real S3 server: `versitygw` on a folder; and a network in between that counts requests and loses answers."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote

from tests.servers.process import Server, UnavailableError, free_port, is_listening

if TYPE_CHECKING:
    from types import TracebackType

VERSION = "v1.8.0"
INSTALL = f"CGO_ENABLED=0 GOBIN=/usr/local/bin go install github.com/versity/versitygw/cmd/versitygw@{VERSION}"

KEY, SECRET = "headrace-test", "not-a-secret-outside-tests"


class ObjectStore(Server):
    """An S3 server that keeps objects as files; buckets are made by `bucket`."""

    name = "s3"

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()
        self.data = self.folder / "data"
        self.data.mkdir()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def bucket(self, name: str) -> Path:
        """Make a bucket; the folder in which its objects lie."""
        folder = self.data / name
        folder.mkdir(exist_ok=True)
        return folder

    def credentials(self) -> dict[str, str]:
        """The environment of a client."""
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}

    def command(self) -> Sequence[str]:
        program = shutil.which("versitygw")
        if program is None:
            raise UnavailableError(f"no `versitygw`; {INSTALL}")
        return [program, "--port", f"127.0.0.1:{self.port}", "--quiet", "--keep-alive", "posix", str(self.data)]

    def environment(self) -> dict[str, str]:
        return {"ROOT_ACCESS_KEY": KEY, "ROOT_SECRET_KEY": SECRET}

    def is_ready(self) -> bool:
        return is_listening(self.port)


class Fault(enum.Enum):
    """What becomes of a request."""

    SLOW_DOWN = "slow down"
    """503, and nothing is done."""
    ERROR_AFTER = "error after"
    """It is done, and answered with 500."""
    CUT_AFTER = "cut after"
    """It is done, and the connection is reset instead of an answer."""
    MUTE_AFTER = "mute after"
    """It is done, and never answered."""
    CUT_BEFORE = "cut before"
    """The connection is reset, and nothing is done."""
    DONE_TWICE = "done twice"
    """It is answered with 200, also where it was refused: as if nothing had been asked of what is there."""


Judge = Callable[[str, str], Fault | None]
"""What becomes of a request, by its method and the path with the query."""


class FaultyNetwork:
    """Forwards HTTP requests to a port of this machine, notes them, and does with them as a test says.

    Attributes:
        requests: method and path of each, in order.
        judge: asked for each; None lets all pass.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.requests: list[tuple[str, str]] = []
        self.judge: Judge | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"http-{self.port}", daemon=True)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def once(self, method: str, fault: Fault, times: int = 1, part: str = "") -> None:
        """Let the next requests of a method, whose path has a part, come to a fault; all others pass."""
        left = times

        def judge(found: str, path: str) -> Fault | None:
            nonlocal left
            if found != method or part not in path or left == 0:
                return None
            left -= 1
            return fault

        self.judge = judge

    def count(self) -> int:
        """How many requests there were since the last call."""
        found, self.requests = len(self.requests), []
        return found

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._accept, sock=self._listener)

    async def _end(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                answers, forward = await asyncio.open_connection("127.0.0.1", self.target)
                ends.append(forward)
                while await self._exchange(reader, writer, answers, forward):
                    pass
        finally:
            for end in ends:
                end.transport.abort()
            self._tasks.discard(task)

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        forward: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; False ends the connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        body = await _body(reader, head)
        self.requests.append((method, unquote(path)))
        fault = self.judge(method, unquote(path)) if self.judge is not None else None
        if fault is Fault.CUT_BEFORE:
            return False
        if fault is Fault.SLOW_DOWN:
            await _say(writer, b"503 Slow Down", b"<Error><Code>SlowDown</Code></Error>")
            return True
        forward.write(head + body)
        await forward.drain()
        answer = await answers.readuntil(b"\r\n\r\n")
        status = int(answer.split(b" ", 2)[1])
        content = b"" if method == "HEAD" or status in {204, 304} else await _body(answers, answer)
        if fault is Fault.CUT_AFTER:
            return False
        if fault is Fault.MUTE_AFTER:
            await asyncio.sleep(3600)
        if fault is Fault.ERROR_AFTER:
            await _say(writer, b"500 Internal Server Error", b"<Error><Code>InternalError</Code></Error>")
            return True
        if fault is Fault.DONE_TWICE:
            answer, content = b'HTTP/1.1 200 OK\r\netag: "0"\r\ncontent-length: 0\r\n\r\n', b""
        writer.write(answer + content)
        await writer.drain()
        return True


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The body that a head announces, as it is on the wire."""
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        pieces = []
        while True:
            size = await reader.readuntil(b"\r\n")
            pieces += [size, await reader.readexactly(int(size, 16) + 2)]
            if int(size, 16) == 0:
                return b"".join(pieces)
    return await reader.readexactly(int(fields.get(b"content-length", b"0")))


async def _say(writer: asyncio.StreamWriter, status: bytes, body: bytes) -> None:
    writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()
