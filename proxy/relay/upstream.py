"""Connections to the model server: where it is, a pool of idle ones, and the heads of its answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from proxy.relay.connection import KNOWN_HEAD_BYTES, READ_AHEAD_BYTES, Connection, HeadTooLong, NotHTTP
from proxy.relay.faults import UpstreamInvalid, UpstreamLost, UpstreamTimeout, UpstreamUnreachable
from proxy.relay.parsing import Limits, ResponseParser
from proxy.relay.response import Response

# A reused connection that dies within this time after a request went out, without a byte of answer, had been
# closed by the server when it was idle. One that dies later was at work on the request: that is not sent twice.
STALE_SECONDS = 1.0
MAX_IDLE_CONNECTIONS = 256


@dataclass(frozen=True, slots=True)
class UpstreamAddress:
    """The model server. ``base_path`` has no slash at its end; ``unix_path`` takes the place of host and port."""

    host: str
    port: int
    tls: bool
    base_path: bytes
    unix_path: str | None = None

    @classmethod
    def parse(cls, url: str) -> UpstreamAddress:
        """``http://…``, ``https://…`` or ``unix:/…`` as the settings have checked it."""
        if url.startswith("unix:"):
            return cls("localhost", 80, False, b"", url.removeprefix("unix:"))
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        return cls(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/").encode())

    @property
    def host_header(self) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}").encode()

    def __str__(self) -> str:
        return f"unix:{self.unix_path}" if self.unix_path else f"{self.host}:{self.port}"


def upstream_tls(authorities: str | None, *, verify: bool) -> ssl.SSLContext:
    """For an https upstream. ``authorities``: a PEM file, None for the system's. Raises OSError and ssl.SSLError."""
    context = ssl.create_default_context(cafile=authorities)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class UpstreamConnection(Connection):
    """One connection to the model server, used for one exchange at a time."""

    __slots__ = (
        "_arrivals",
        "_known",
        "_known_head",
        "_limits",
        "_parser",
        "answering",
        "ended",
        "idle",
        "idle_since",
        "on_lost",
        "sender",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, limits: Limits, on_lost: Callable[[UpstreamConnection], None]
    ) -> None:
        super().__init__(loop)
        self._limits = limits
        self._parser = ResponseParser(self, loop, limits)
        self._known_head = b""  # the last one, and what it means: servers repeat themselves
        self._known: Response | None = None
        self.idle = False
        self.idle_since = 0.0
        self.answering = False  # whether a byte of the answer has come
        self.ended = False  # by the server, in an orderly way: over TLS, with its goodbye (RFC 9112 §9.8)
        self.on_lost = on_lost
        self.sender: Connection | None = None  # whose request is on its way
        self._arrivals = select.poll()  # of bytes that the loop has not read yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            self._arrivals.register(sock.fileno(), select.POLLIN)

    def is_quiet(self) -> bool:
        """Whether nothing has arrived, not even the end. A system call. To be asked of an idle connection only."""
        return not self._arrivals.poll(0)

    def data_received(self, data: bytes) -> None:
        if self.idle:  # bytes that nobody asked for: the next answer could not be told from them
            self.abort()
            return
        self.answering = True
        super().data_received(data)

    def eof_received(self) -> bool | None:
        tls: ssl.SSLObject | None = None if self.transport is None else self.transport.get_extra_info("ssl_object")
        self.ended = tls is None or _said_goodbye(tls)
        return super().eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        if exc is not None and not self.idle:
            self._read_what_came()
        super().connection_lost(exc)
        self.on_lost(self)

    def _read_what_came(self) -> None:
        """What the server sent before it closed: a write that failed is told of before the loop has read that.

        Not over TLS, whose records the loop alone can read.
        """
        descriptor = -1 if self.tls else self.descriptor()
        with contextlib.suppress(OSError):
            while descriptor >= 0 and self._received_bytes <= READ_AHEAD_BYTES:
                data = os.read(descriptor, READ_AHEAD_BYTES)
                if not data:
                    break
                self.answering = True
                self._pieces.append(data)
                self._received_bytes += len(data)

    @property
    def is_to_blame(self) -> bool:
        """Whether it is the model server that is waited for: not if that is the client, to send on or to take."""
        if self.peer is not None:
            return True
        return self.awaited and (self.sender is None or not self.sender.awaited)

    async def receive_response(self) -> Response:
        """The next head of an answer, interim ones included. Raises UpstreamFault."""
        try:
            head = await self.receive_head(self._limits.max_head_bytes)
        except HeadTooLong:
            raise UpstreamInvalid("the model server's response head is too long") from None
        except NotHTTP:
            raise UpstreamInvalid("the model server does not answer in HTTP") from None
        if head is None:
            raise UpstreamLost("the model server closed the connection before its response head was complete")
        if head == self._known_head and self._known is not None:
            return self._known
        response = Response(self._parser.parse(head))
        if len(head) <= KNOWN_HEAD_BYTES:
            self._known_head, self._known = head, response
        return response


class Pool:
    """Connects to the model server and keeps idle connections, the last used on top. Not for several event loops."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: UpstreamAddress,
        *,
        tls: ssl.SSLContext | None,
        limits: Limits,
        connect_timeout_seconds: float,
        idle_timeout_seconds: float,
        keepalive_seconds: float,
    ) -> None:
        self.address = address
        self._loop = loop
        self._tls = tls
        self._limits = limits
        self._connect_timeout_seconds = connect_timeout_seconds
        self._idle_timeout_seconds = idle_timeout_seconds
        self._keepalive_seconds = keepalive_seconds
        self._idle: list[UpstreamConnection] = []
        self._quiet_since: dict[UpstreamConnection, float] = {}

    def __repr__(self) -> str:
        return f"<Pool {self.address}: {len(self._quiet_since)} connections, {len(self._idle)} idle>"

    @property
    def open_connections(self) -> int:
        """In use and idle."""
        return len(self._quiet_since)

    def take(self) -> UpstreamConnection | None:
        """An idle connection, if there is one."""
        while self._idle:
            connection = self._idle.pop()
            connection.idle = False
            if connection.lost:
                continue
            if not connection.is_quiet():  # bytes that nobody asked for, or the end: it would not be another answer's
                connection.abort()
                continue
            if self._loop.time() - connection.idle_since > self._keepalive_seconds:
                connection.close()
                continue
            connection.answering = False
            connection.stirred = True
            return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """A new connection. Raises UpstreamUnreachable or UpstreamTimeout."""
        address = self.address

        try:
            async with asyncio.timeout(self._connect_timeout_seconds):
                if address.unix_path is not None:
                    _, made = await self._loop.create_unix_connection(self._protocol, address.unix_path)
                else:
                    _, made = await self._loop.create_connection(
                        self._protocol, address.host, address.port, ssl=self._tls
                    )
        except TimeoutError:
            raise UpstreamTimeout(
                f"no connection to the model server within {self._connect_timeout_seconds:g} s"
            ) from None
        except (OSError, ssl.CertificateError) as error:
            raise UpstreamUnreachable(f"no connection to the model server: {_reason(error)}") from error
        connection = cast("UpstreamConnection", made)
        self._quiet_since[connection] = self._loop.time()
        return connection

    def _protocol(self) -> asyncio.Protocol:
        return cast("asyncio.Protocol", UpstreamConnection(self._loop, self._limits, self._forget))

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keeps a connection whose exchange is over, if it is fit for another one."""
        if (
            connection.lost
            or connection.has_input
            or not self._keepalive_seconds
            or len(self._idle) >= MAX_IDLE_CONNECTIONS
        ):
            connection.close()
            return
        connection.idle = True
        connection.idle_since = self._loop.time()
        self._idle.append(connection)

    def sweep(self) -> None:
        """To be called about once a second: ends connections that were idle, or silent within an exchange, for too long."""
        now = self._loop.time()
        for connection, since in list(self._quiet_since.items()):
            if connection.peer is not None and connection.has_left():
                connection.break_off()
            elif connection.idle:
                # One that is closing is not looked at again: over TLS that takes until the peer says goodbye, too.
                if not connection.lost and now - connection.idle_since > self._keepalive_seconds:
                    self._idle.remove(connection)
                    connection.close()
            elif connection.has_moved() or not connection.is_to_blame:
                self._quiet_since[connection] = now
            elif self._idle_timeout_seconds and now - since > self._idle_timeout_seconds:
                connection.fail(UpstreamTimeout(f"the model server sent nothing for {self._idle_timeout_seconds:g} s"))

    def close(self) -> None:
        """Closes every connection; those in use are reset."""
        for connection in list(self._quiet_since):
            if connection.idle:
                connection.close()
            else:
                connection.abort()
        self._idle.clear()

    def _forget(self, connection: UpstreamConnection) -> None:
        self._quiet_since.pop(connection, None)
        if connection.idle and connection in self._idle:
            self._idle.remove(connection)


def _said_goodbye(tls: ssl.SSLObject) -> bool:
    """Whether the peer's last record was the alert that ends its side: then there is nothing to read, else not yet."""
    try:
        return not tls.read(1)
    except ssl.SSLError:
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    if isinstance(error, OSError) and error.errno and error.strerror and not isinstance(error, ssl.SSLError):
        # asyncio's own words ("Connect call failed") don't say why; name resolution has negative numbers.
        return os.strerror(error.errno) if error.errno > 0 else error.strerror
    return str(error) or type(error).__name__
