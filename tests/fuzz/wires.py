"""The strict model server, a client that sees how its connection ends, and a proxy between them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from proxy.relay.server import Relay
from tests.fuzz.strict import Message, NotHttp, Short, read_request
from tests.harness import Proxy, proxy
from tests.relay.wire import bare_relay

SECONDS = 20  # a wait that is longer has failed
SENTINEL = b"GET /sentinel HTTP/1.1\r\nHost: h\r\n\r\n"
SENTINEL_ANSWER = b"the answer to the sentinel"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

Result = TypeVar("Result")


class Recorder:
    """A model server that takes requests by the letter alone, and numbers its answers.

    ``arrived``: whole requests in the order of their arrival; ``cut``: what had come of those that did not become
    whole; ``refused``: what was no HTTP, and why. ``play`` answers a request in place of the usual number.
    ``changed`` is set by whatever happens here or at a client.
    """

    def __init__(self) -> None:
        self.port = 0
        self.play: Callable[[Peer], Awaitable[None]] | None = None
        self.early = False  # answers as soon as a head is there
        self.exact = True  # as ``read_request`` has it
        self.peers: set[Peer] = set()
        self.changed = asyncio.Event()
        self.clear()

    def clear(self) -> None:
        """For the next case."""
        self.arrived: list[Message] = []
        self.cut: list[bytes] = []
        self.refused: list[tuple[str, bytes]] = []
        self.played = 0
        self.pieces = 0
        for peer in [peer for peer in self.peers if peer.received]:  # of a case that failed
            peer.transport.abort()
            peer.received = b""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Recorder]:
        server = await asyncio.get_running_loop().create_server(lambda: Peer(self), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for peer in list(self.peers):
                peer.transport.abort()
            await self.until(lambda: not self.peers)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def settled(self) -> None:
        """Waits until no connection is within a request or an answer: it came to its end, or the connection did."""
        await self.until(lambda: not any(peer.received or peer.playing for peer in self.peers))

    @property
    def begun(self) -> bool:
        return any(peer.received for peer in self.peers)


class Peer(asyncio.Protocol):
    """One connection to the recorder."""

    transport: asyncio.Transport

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.received = b""
        self.playing: asyncio.Task[None] | None = None
        self._answered_early = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.recorder.peers.add(self)
        self.recorder.changed.set()

    def data_received(self, data: bytes) -> None:
        recorder = self.recorder
        recorder.changed.set()
        recorder.pieces += 1
        self.received += data
        while self.received:
            try:
                message, self.received = read_request(self.received, exact=recorder.exact)
            except Short as short:
                if recorder.early and short.in_body and not self._answered_early:
                    self._answered_early = True
                    self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly")
                return
            except NotHttp as found:
                recorder.refused.append((str(found), self.received))
                self.received = b""
                self.transport.abort()
                return
            recorder.arrived.append(message)
            if self._answered_early:
                self._answered_early = False
            elif message.target.endswith(b"/sentinel") or recorder.play is None:
                self.transport.write(numbered(message, len(recorder.arrived))[0])
            else:
                self.playing = asyncio.create_task(self._play(recorder.play))

    async def _play(self, play: Callable[[Peer], Awaitable[None]]) -> None:
        await play(self)
        self.playing = None
        self.recorder.played += 1
        self.recorder.changed.set()

    async def send(self, pieces: Iterable[bytes], how: str) -> None:
        """Sends each piece by itself; then ``how``: keep, close or reset."""
        for piece in pieces:
            if self.transport.is_closing():
                return
            self.transport.write(piece)
            await apart()
        if how == "reset":
            with contextlib.suppress(OSError):  # it is closed already
                sock = self.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.transport.abort()
        elif how == "close":
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.recorder.peers.discard(self)
        self.recorder.changed.set()
        if self.received:
            self.recorder.cut.append(self.received)


def numbered(request: Message, number: int) -> tuple[bytes, Message]:
    """The recorder's usual answer, as bytes and as it is to be read."""
    body = SENTINEL_ANSWER if request.target.endswith(b"/sentinel") else b"answer %d" % number
    length = b"%d" % len(body)
    message = Message(b"HTTP/1.1 200 OK", ((b"Content-Length", length),), "length", body)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: " + length + b"\r\n\r\n"
    if request.method == b"HEAD":
        return head, Message(message.start, message.headers, "none")
    return head + body, message


class Wire(asyncio.Protocol):
    """A client's connection. ``ended``: not yet "", or "closed" in an orderly way, or "reset"."""

    transport: asyncio.Transport

    def __init__(self, changed: asyncio.Event) -> None:
        self.received = b""
        self.ended = ""
        self.lost = False
        self.changed = changed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.changed.set()

    def eof_received(self) -> None:
        self.ended = "closed"
        self.changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = self.ended or ("reset" if exc else "closed")
        self.lost = True
        self.changed.set()

    async def send(self, pieces: Iterable[bytes]) -> None:
        """Each piece is received by itself, if the receiver runs on this loop."""
        for piece in pieces:
            if self.ended:
                return
            self.transport.write(piece)
            await apart()


async def apart() -> None:
    """Lets the loop deliver what was written before more is: it reads in one round what was sent in the last."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@dataclass
class Bench:
    """A strict model server, and a proxy before it at ``port``; ``whole`` if there is more of it than the relay."""

    recorder: Recorder
    relay: Relay
    port: int
    whole: Proxy | None = None

    @property
    def upstream(self) -> bytes:
        return b"127.0.0.1:%d" % self.recorder.port

    @contextlib.asynccontextmanager
    async def client(self, port: int | None = None) -> AsyncIterator[Wire]:
        """A connection to the proxy, or to another ``port``."""
        loop, recorder = asyncio.get_running_loop(), self.recorder
        _, wire = await loop.create_connection(lambda: Wire(recorder.changed), "127.0.0.1", port or self.port)
        try:
            yield wire
        finally:
            wire.transport.close()
            await recorder.until(lambda: wire.lost)


@contextlib.asynccontextmanager
async def bench(storage: Path | None = None, **settings: object) -> AsyncIterator[Bench]:
    """With the relay alone, or with the whole proxy that records to ``storage``."""
    async with contextlib.AsyncExitStack() as stack:
        recorder = await stack.enter_async_context(Recorder().serving())
        url = f"http://127.0.0.1:{recorder.port}"
        running: Proxy | None = None
        if storage is None:
            relay, port = await stack.enter_async_context(bare_relay(url))
        else:
            running = await stack.enter_async_context(proxy(url, storage, **settings))
            relay, port = running.app.relay, running.port
        made = Bench(recorder, relay, port, running)
        yield made
        async with asyncio.timeout(SECONDS):
            while relay.connections:  # each of its clients has left; it has yet to see it
                await asyncio.sleep(0)
        if running is not None:
            account = await running.recorded(0)
            assert account.delivered == account.received, account
        assert relay.defects == 0


@contextlib.contextmanager
def benched(storage: Path | None = None) -> Iterator[tuple[Bench, Callable[[Coroutine[Any, Any, Result]], Result]]]:
    """A bench that lasts for many runs of a loop, as a test with ``@given`` needs it; and what runs a coroutine there."""
    # Thousands of bad answers would be as many lines, all kept by pytest.
    with _quiet(logging.getLogger("payload_logger.relay")), asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        made = runner.run(stack.enter_async_context(bench(storage)))
        try:
            yield made, runner.run
        except BaseException as error:
            failed = error
            runner.run(stack.__aexit__(type(failed), failed, failed.__traceback__))
            raise
        runner.run(stack.aclose())


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
