"""A server of the self-test's own, which shows what a model server behind the proxy receives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from proxy.selftest.differences import FORWARDED, REQUEST_ID, Difference, between_bodies, between_headers
from proxy.selftest.plan import Way
from proxy.selftest.wire import LostError, Message, Side, read_body, taken_apart
from proxy.settings import ForwardedHeaders, HostHeader, Proxy

STEPS = 5
STEP_SECONDS = 10.0
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_PATH = b"/payload-logger-selftest-in-step"


class Mirror:
    """Keeps each request as it came; sends the chunks of those to STREAM_PATH back one by one."""

    def __init__(self) -> None:
        self.received: list[Message] = []
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Mirror]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=2**20)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._tasks.add(task)
        try:
            while True:
                request = taken_apart(await reader.readuntil(b"\r\n\r\n"))
                if STREAM_PATH in request.start:
                    await _send_back(reader, writer)
                else:
                    await self._receive(request, reader, writer)
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _receive(self, request: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if request.values(b"expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.values(b"transfer-encoding") or request.values(b"content-length"):
            await read_body(reader, request)
        self.received.append(request)
        writer.write(_ANSWER[: -2 if request.start.startswith(b"HEAD ") else None])
        await writer.drain()


async def _send_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_STREAM)
    while size := int(line := await reader.readuntil(b"\r\n"), 16):
        writer.write(line + await reader.readexactly(size + 2))
    await reader.readexactly(2)
    writer.write(b"0\r\n\r\n")


async def steps_in_time(through: Side) -> int:
    """How many of STEPS pieces came back through the proxy, each before the next one was sent."""
    came = 0
    try:
        reader, writer = await through.connect()
    except LostError:
        return came
    try:
        async with asyncio.timeout(STEP_SECONDS):
            writer.write(b"POST %b HTTP/1.1\r\nHost: mirror\r\nTransfer-Encoding: chunked\r\n\r\n" % STREAM_PATH)
            for number in range(STEPS):
                piece = b"5\r\nstep%d\r\n" % number
                writer.write(piece)
                if not came:
                    await reader.readuntil(b"\r\n\r\n")
                if await reader.readexactly(len(piece)) != piece:
                    return came
                came += 1
            writer.write(b"0\r\n\r\n")
            await reader.readuntil(b"0\r\n\r\n")
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)
    return came


def received_otherwise(
    way: Way, host: bytes, received: Message, base_path: bytes, proxy: Proxy
) -> Iterator[Difference]:
    """How what the server received differs from what the client sent."""
    sent = taken_apart(way.head(b"", host))
    body = way.request.body
    sent.framing, sent.body = "none" if body is None else "chunked" if way.chunked else "length", body or b""
    method, target, version = sent.start.split(b" ")
    if received.start != b"%b %b%b HTTP/1.1" % (method, base_path, target):
        yield Difference("request line", f"{sent.start!r} → {received.start!r}")
    elif version != b"HTTP/1.1":
        yield Difference("version", f"{version.decode()} → HTTP/1.1", listed=True)
    addable = set() if sent.values(REQUEST_ID) else {REQUEST_ID}
    if proxy.forwarded_headers is not ForwardedHeaders.OFF:
        addable |= FORWARDED
    if proxy.host_header is HostHeader.UPSTREAM:
        addable.add(b"host")
    yield from between_headers(sent.headers, received.headers, frozenset(addable))
    if sent.framing != received.framing:
        yield Difference("framing", f"the body's framing: {sent.framing} → {received.framing}")
    yield from between_bodies(sent, received)
