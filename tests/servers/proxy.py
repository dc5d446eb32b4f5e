"""A network that can be broken: a TCP proxy on the loopback, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

CHUNK_BYTES = 1 << 16


class Mode(enum.Enum):
    """What the network does now."""

    OPEN = "open"
    STALLED = "stalled"
    """Connections stay, and carry nothing in either direction; what was sent arrives when the network is open."""
    MUTE = "mute"
    """What clients send arrives, what servers answer is lost."""
    CUT = "cut"
    """Connections are reset, and so is every new one."""


class Proxy:
    """Forwards connections to a port of this machine, which may be set or change at any time.

    Args:
        target: the port to forward to.
    """

    def __init__(self, target: int = 0) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._mode = Mode.OPEN
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)

    @property
    def address(self) -> str:
        """`host:port`, for clients."""
        return f"127.0.0.1:{self.port}"

    def set(self, mode: Mode) -> None:
        """Change what the network does; returns when it does so. A connection that lost bytes is reset."""
        self._do(self._set(mode))

    def drop(self) -> None:
        """Reset every present connection, once; new ones are as before."""
        self._do(self._drop())

    def start(self) -> Self:
        """Begin to forward."""
        self._thread.start()
        self._do(self._serve())
        return self

    def close(self) -> None:
        """End."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, work: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self) -> None:
        self._flows.set()
        self._server = await asyncio.start_server(self._accept, sock=self._listener)

    async def _end(self) -> None:
        self._server.close()
        await self._drop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _set(self, mode: Mode) -> None:
        was, self._mode = self._mode, mode
        if Mode.CUT in {was, mode} or was is Mode.MUTE:
            await self._drop()
        if mode is Mode.STALLED:
            self._flows.clear()
        else:
            self._flows.set()

    async def _drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        self._writers.add(writer)
        try:
            if self._mode is not Mode.CUT:
                answers, forward = await asyncio.open_connection("127.0.0.1", self.target)
                ends.append(forward)
                self._writers.add(forward)
                await asyncio.gather(
                    self._pump(reader, forward, is_answer=False), self._pump(answers, writer, is_answer=True)
                )
        except (OSError, asyncio.CancelledError):
            pass  # one side has gone: so does the other
        finally:
            for end in ends:
                self._writers.discard(end)
                end.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._flows.wait()
            if not (is_answer and self._mode is Mode.MUTE):
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
