"""Requests and answers on sockets of the self-test's own, as they stand on the wire.

Nothing of the traffic path reads or writes here, so that a defect of its framing can't hide itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import perf_counter

from proxy.relay.upstream import UpstreamAddress
from proxy.selftest.plan import Way

Headers = tuple[tuple[bytes, bytes], ...]

LONGEST_HEAD_BYTES = 1024 * 1024
PIECE_BYTES = 64 * 1024
CLOSE_SECONDS = 2.0  # how long a server may take to close where it was asked to
CONTINUE_SECONDS = 1.0  # how long a client waits for 100 Continue before it sends the body all the same, as curl does
BYTES_ONE_BY_ONE = 2048  # of a request that is sent byte by byte; the rest follows at once
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] [1-9][0-9]{2}( .*)?")


class LostError(Exception):
    """There was no whole answer; the message says why."""


@dataclass(slots=True)
class Message:
    """A message taken apart, not changed: ``headers`` have the blanks around their values, ``body`` no framing.

    ``framing``: none, length, chunked or close. ``first_seconds``: when the first piece of the body was there.
    """

    start: bytes
    headers: Headers
    framing: str = "none"
    body: bytes = b""
    trailers: tuple[bytes, ...] = ()
    interim: tuple[Message, ...] = ()
    first_seconds: float = 0.0
    seconds: float = 0.0

    def values(self, name: bytes) -> list[bytes]:
        return [value.strip() for key, value in self.headers if key.lower() == name]

    @property
    def status(self) -> int:
        return int(self.start[9:12])

    @property
    def last(self) -> bool:
        """Whether its connection takes no further request."""
        options = b",".join(self.values(b"connection")).lower()
        kept = b"keep-alive" in options if self.start.startswith(b"HTTP/1.0") else b"close" not in options
        return self.framing == "close" or not kept


@dataclass(slots=True)
class Outcome:
    """What came of a request that was sent in some way. ``lost`` says why an answer was not whole, or did not come."""

    answers: list[Message] = field(default_factory=list)
    closed: bool = False
    lost: str = ""


class Side:
    """A server that is asked: the user's own, or the proxy before it. ``sent`` counts the requests."""

    def __init__(
        self, address: UpstreamAddress, *, host: bytes, tls: ssl.SSLContext | None, timeout_seconds: float
    ) -> None:
        self._address = address
        self.host = host
        self._tls = tls
        self._timeout_seconds = timeout_seconds
        self.sent: Counter[str] = Counter()

    async def send(self, way: Way) -> Outcome:
        """Sends a request on a connection of its own, or ``way.times`` of them."""
        outcome = Outcome()
        try:
            async with Link(self) as link:
                for number in range(way.times):
                    if not number:
                        await link.write(way, way.times if way.pipelined else 1)
                    elif link.over:
                        break
                    elif not way.pipelined:
                        await link.write(way)
                    outcome.answers.append(await link.read(way.request.method))
                outcome.closed = await link.closes_within(CLOSE_SECONDS) if way.closes else link.over
        except LostError as lost:
            outcome.lost = str(lost)
        return outcome

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises LostError."""
        address = self._address
        try:
            async with asyncio.timeout(self._timeout_seconds):
                if address.unix_path is not None:
                    return await asyncio.open_unix_connection(address.unix_path, limit=LONGEST_HEAD_BYTES)
                return await asyncio.open_connection(
                    address.host, address.port, ssl=self._tls, limit=LONGEST_HEAD_BYTES
                )
        except TimeoutError:
            raise LostError(f"no connection within {self._timeout_seconds:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise LostError(f"its certificate is not trusted: {error.verify_message} (proxy.upstream_ca)") from None
        except ssl.SSLError as error:
            raise LostError(f"it does not speak TLS as is needed here: {error.reason}") from None
        except OSError as error:
            raise LostError(f"no connection: {(error.strerror or str(error)).rpartition(': ')[2]}") from None

    def head(self, way: Way) -> bytes:
        return way.head(self._address.base_path, self.host)

    @contextlib.asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raises LostError for whatever goes wrong on a connection within the block."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                yield
        except TimeoutError:
            raise LostError(f"no whole answer within {self._timeout_seconds:g} s") from None
        except asyncio.IncompleteReadError as error:
            raise LostError(f"the connection ended {'within' if error.partial else 'before'} the answer") from None
        except asyncio.LimitOverrunError:
            raise LostError("the answer's head is over 1 MiB") from None
        except OSError:
            raise LostError("the connection was reset") from None
        except ValueError:
            raise LostError("the answer's framing is not valid") from None


class Link:
    """A connection that is kept from request to request as long as the other side does so."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._reader = asyncio.StreamReader()
        self._writer: asyncio.StreamWriter | None = None
        self._started = 0.0
        self._early_head = b""  # what came while the body waited for 100 Continue
        self._last = True  # no further request may follow on the connection

    async def __aenter__(self) -> Link:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()
        await asyncio.sleep(0)  # the loop closes the socket

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None

    @property
    def over(self) -> bool:
        """Whether the other side takes no further request on this connection."""
        return self._last or self._reader.at_eof()

    async def ask(self, way: Way) -> Message:
        """Raises LostError."""
        await self.write(way)
        answer = await self.read(way.request.method)
        if self.over:
            self._close()  # servers may wait for that
        return answer

    async def write(self, way: Way, times: int = 1) -> None:
        """Sends a request, on a new connection if this one is over. Raises LostError."""
        if self.over:
            self._close()
            self._reader, self._writer = await self._side.connect()
        assert self._writer is not None  # noqa: S101
        self._last = True  # unless its answer says otherwise
        self._side.sent[str(way.request)] += times
        self._started = perf_counter()
        head, body = self._side.head(way), way.body()
        if way.expects:
            self._writer.write(head)
            if not await self._may_continue():
                return
            head = b""
        message = (head + body) * times
        if way.byte_by_byte:
            for at in range(min(BYTES_ONE_BY_ONE, len(message))):
                if self._writer.is_closing():
                    return
                self._writer.write(message[at : at + 1])
                await asyncio.sleep(0)  # each its own segment
            message = message[BYTES_ONE_BY_ONE:]
        self._writer.write(message)  # and the answer is read at once: it may come before all of this has left

    async def _may_continue(self) -> bool:
        """Whether to send the body: the server said so, or nothing for CONTINUE_SECONDS."""
        async with self._side.in_time():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONTINUE_SECONDS):
                    self._early_head = await self._reader.readuntil(b"\r\n\r\n")
        return self._early_head[9:12] in (b"", b"100")

    async def read(self, method: str) -> Message:
        """Raises LostError."""
        interim: list[Message] = []
        head, self._early_head = self._early_head, b""
        async with self._side.in_time():
            while True:
                answer = await read_answer(self._reader, method, head, self._started)
                if answer.status >= 200:
                    break
                interim.append(answer)
                head = b""
        answer.interim = tuple(interim)
        self._last = answer.last
        return answer

    async def closes_within(self, seconds: float) -> bool:
        """Whether the other side ends the connection in that time."""
        try:
            async with asyncio.timeout(seconds):
                return not await self._reader.read(1)
        except TimeoutError:
            return False
        except OSError:
            return True


async def read_answer(reader: asyncio.StreamReader, method: str, head: bytes, started: float) -> Message:
    """The next answer to ``method``, an interim one too; ``head`` is its head if that was read already.

    Raises LostError, and what a broken connection raises.
    """
    message = taken_apart(head or await reader.readuntil(b"\r\n\r\n"))
    if not _STATUS_LINE.fullmatch(message.start):
        raise LostError(f"it does not answer in HTTP/1.1: {message.start[:40]!r}")
    if method != "HEAD" and message.status >= 200 and message.status not in (204, 304):
        await read_body(reader, message, started)
    return message


def taken_apart(head: bytes) -> Message:
    """``head`` ends in an empty line."""
    start, *lines = head[:-4].split(b"\r\n")
    return Message(start, tuple((name, value) for name, _, value in (line.partition(b":") for line in lines)))


async def read_body(reader: asyncio.StreamReader, message: Message, started: float = 0.0) -> None:
    """Reads the body of an answer into ``message``, with when its first piece came and when it was whole."""
    pieces: list[bytes] = []
    if message.values(b"transfer-encoding"):
        message.framing = "chunked"
        body = _chunks(reader, message)
    elif length := message.values(b"content-length"):
        message.framing = "length"
        body = _length(reader, int(length[0]))
    else:
        message.framing = "close"
        body = _until_close(reader)
    async for piece in body:
        if not pieces:
            message.first_seconds = perf_counter() - started
        pieces.append(piece)
    message.seconds = perf_counter() - started
    message.body = b"".join(pieces)


async def _length(reader: asyncio.StreamReader, left: int) -> AsyncIterator[bytes]:
    while left:
        data = await reader.read(min(left, PIECE_BYTES))
        if not data:
            raise asyncio.IncompleteReadError(b"?", left)
        left -= len(data)
        yield data


async def _until_close(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(PIECE_BYTES):
        yield data


async def _chunks(reader: asyncio.StreamReader, message: Message) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        yield await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise ValueError
    trailers = []
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        trailers.append(line)
    message.trailers = tuple(trailers)
