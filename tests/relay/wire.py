"""Bytes on real sockets for the tests of the relay: a model server that plays a script, a client, a relay by itself."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from multidict import CIMultiDictProxy

from proxy.listeners import open_listeners
from proxy.relay.parsing import Limits
from proxy.relay.recording import Ending, NoRecorder, Recorder
from proxy.relay.server import Patience, Relay
from proxy.relay.upstream import Pool, UpstreamAddress
from tests.harness import Handler, Proxy, model_server, proxy

SECONDS = 10  # a test that waits longer than this has failed
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nping"


def head(*lines: bytes) -> bytes:
    return b"\r\n".join(lines) + b"\r\n\r\n"


def header(message: bytes, name: bytes) -> list[bytes]:
    """Every value of a header, as it was sent."""
    lines = message.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return [value[1:] for key, _, value in (line.partition(b":") for line in lines) if key.lower() == name.lower()]


def names(message: bytes) -> list[bytes]:
    """The names of all headers, in lower case."""
    return [line.partition(b":")[0].lower() for line in message.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]]


async def read_message(reader: asyncio.StreamReader, *, bodyless: bool = False) -> bytes:
    """One message as it stands on the wire, framing and trailers too; one without framing has no body."""
    message = await reader.readuntil(b"\r\n\r\n")
    if bodyless:
        return message
    if header(message, b"transfer-encoding"):
        size = 1
        while size:
            line = await reader.readline()
            size = int(line, 16)
            message += line + (await reader.readexactly(size + 2) if size else b"")
        while line != b"\r\n":
            line = await reader.readline()
            message += line
    elif length := header(message, b"content-length"):
        message += await reader.readexactly(int(length[0]))
    return message


def payload(message: bytes) -> bytes:
    """The body without its framing."""
    _, _, body = message.partition(b"\r\n\r\n")
    if not header(message, b"transfer-encoding"):
        return body
    pieces: list[bytes] = []
    while True:
        line, _, body = body.partition(b"\r\n")
        size = int(line, 16)
        if not size:
            return b"".join(pieces)
        pieces.append(body[:size])
        body = body[size + 2 :]


class Script:
    """A model server that answers request after request (the last answer serves all that follow), and keeps them.

    ``pieces`` sends the answer byte by byte; ``close`` ends the connection behind each answer.
    """

    def __init__(self, *answers: bytes, close: bool = False) -> None:
        self.received: list[bytes] = []
        self._answers = list(answers) or [OK]
        self._close = close

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            self.received.append(await read_message(reader))
            writer.write(self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])
            await writer.drain()
            if self._close:
                return


class Client:
    """One connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def ask(self, request: bytes, *, bodyless: bool = False) -> bytes:
        """Sends a request and reads one framed response."""
        self.write(request)
        return await self.response(bodyless=bodyless)

    async def response(self, *, bodyless: bool = False) -> bytes:
        return await read_message(self.reader, bodyless=bodyless)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection. Raises ConnectionError when that is an abort."""
        return await self.reader.read(-1)

    def reset(self) -> None:
        reset(self.writer)


def reset(writer: asyncio.StreamWriter) -> None:
    """Ends the connection with a RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(
    port: int, *, tls: ssl.SSLContext | None = None, unix_path: Path | None = None, seconds: float = SECONDS
) -> AsyncIterator[Client]:
    """A connection to the proxy; the block must end within ``seconds``."""
    if unix_path is not None:
        reader, writer = await asyncio.open_unix_connection(unix_path, limit=2**24)
    else:
        name = "localhost" if tls else None
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24, ssl=tls, server_hostname=name)
    try:
        async with asyncio.timeout(seconds):
            yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def slow_reader(port: int, request: bytes) -> AsyncIterator[socket.socket]:
    """A connection with a small receive buffer, on which ``request`` is sent; nothing is read but by the block."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, request)
        yield client


@contextlib.asynccontextmanager
async def relayed(handler: Handler, storage: Path, **settings: object) -> AsyncIterator[Proxy]:
    """The whole proxy before a model server made of ``handler``."""
    async with model_server(handler) as model, proxy(model.url, storage, **settings) as p:
        yield p


@contextlib.asynccontextmanager
async def asking(handler: Handler, storage: Path, **settings: object) -> AsyncIterator[Client]:
    """A client's connection to the whole proxy before a model server made of ``handler``."""
    async with relayed(handler, storage, **settings) as p, connected(p.port) as client:
        yield client


@contextlib.asynccontextmanager
async def bare_relay(
    upstream: str,
    recorder: Recorder | None = None,
    *,
    connect_timeout_seconds: float = 5,
    idle_timeout_seconds: float = 600,
    keepalive_seconds: float = 4,
    patience: Patience | None = None,
    max_connections: int = 0,
    tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[Relay, int]]:
    """The relay without the rest of the proxy, and its port. ``tls`` is for the model server."""
    loop = asyncio.get_running_loop()
    limits = Limits(128 * 1024, 256)
    pool = Pool(
        loop,
        UpstreamAddress.parse(upstream),
        tls=tls,
        limits=limits,
        connect_timeout_seconds=connect_timeout_seconds,
        idle_timeout_seconds=idle_timeout_seconds,
        keepalive_seconds=keepalive_seconds,
    )
    relay = Relay(
        loop,
        pool=pool,
        recorder=recorder or NoRecorder(),
        limits=limits,
        patience=patience or Patience(),
        max_connections=max_connections,
    )
    address = await relay.serve(open_listeners("127.0.0.1:0"), client_tls)
    try:
        yield relay, int(address.rpartition(":")[2])
    finally:
        await relay.drain(2)
        await relay.close()


class SlowRecorder:
    """Records on the test's word: each exchange is held until ``written`` is set, each piece until ``room`` is."""

    def __init__(self) -> None:
        self.written = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()
        self.finishing = asyncio.Event()
        self.request = b""
        self.response = b""
        self.endings: list[Ending] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def open(
        self, method: str, target: str, headers: CIMultiDictProxy[str], request_id: str, *, length: int | None
    ) -> SlowRecorder:
        return self

    def request_piece(self, data: bytes) -> Awaitable[None] | None:
        self.request += data
        return None if self.room.is_set() else self._wait()

    def request_complete(self) -> None:
        pass

    def response_head(self, status: int, headers: CIMultiDictProxy[str] | None, *, sized: bool) -> None:
        pass

    def response_piece(self, data: bytes) -> Awaitable[None] | None:
        self.response += data
        return None if self.room.is_set() else self._wait()

    async def _wait(self) -> None:
        await self.room.wait()

    def finish(self, ending: Ending) -> asyncio.Future[None] | None:
        self.endings.append(ending)
        self.finishing.set()
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def release() -> None:
            await self.written.wait()
            if not held.done():
                held.set_result(None)

        task = asyncio.create_task(release())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return held


async def eventually(condition: Callable[[], Any]) -> None:
    """Waits until the condition holds; for what no socket tells. Fails after SECONDS."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.002)
