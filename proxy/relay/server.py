"""The clients' side: listeners, one task per connection, and the end of idle connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from pathlib import Path
from typing import cast

from proxy import listeners
from proxy.relay.connection import KNOWN_HEAD_BYTES, Connection, HeadTooLong, NotHTTP
from proxy.relay.exchange import Exchange, fault_answer
from proxy.relay.faults import ConnectionRefused, Fault, RequestFault, UpstreamFault
from proxy.relay.handshakes import Handshakes
from proxy.relay.headers import Forwarding
from proxy.relay.parsing import Limits, RequestParser
from proxy.relay.recording import Recorder
from proxy.relay.request import Request, Route
from proxy.relay.traffic import Traffic
from proxy.relay.upstream import Pool
from proxy.settings import ForwardedHeaders

logger = logging.getLogger("payload_logger.relay")

SWEEP_SECONDS = 1.0
LINGER_SECONDS = 2.0
IDLE_STOP_SECONDS = 0.3  # what idle connections get for a last request when the relay stops
LINGER_BYTES = 4 * 1024 * 1024
MAX_EMPTY_HEADS = 16  # of two empty lines each, before a request


class Downstream(Connection):
    """A client's connection. Its task takes one request after the other; when the client goes, the task is cancelled."""

    __slots__ = (
        "_fresh",
        "_known",
        "_known_head",
        "_parser",
        "_relay",
        "_task",
        "busy",
        "closing",
        "expecting",
        "forwarding",
        "left",
        "tunnelling",
        "unframed",
        "waiting_since",
    )

    def __init__(self, relay: Relay) -> None:
        super().__init__(relay.loop)
        self._relay = relay
        self._parser = RequestParser(self, relay.loop, relay.limits)
        self._known_head = b""  # the last one, and what it means: clients repeat themselves
        self._known: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self.forwarding: Forwarding
        self.busy = False
        self.expecting = False  # whether it waits for a 100 before it sends the body: then it is not waited for
        self.left = True  # whose doing the end of the connection is, if it ends: the client's, unless we ``cut`` it
        self.closing = False
        self.tunnelling = False
        self.unframed = False  # whether an answer is under way whose end is the connection's
        self.waiting_since = relay.loop.time()  # for this client
        self._fresh = True  # it has asked for nothing yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.forwarding = Forwarding(
            self._relay.forwarded_headers,
            peer[0].encode() if isinstance(peer, tuple) else None,
            b"https" if self.tls else b"http",
        )
        self.waiting_since = self._loop.time()
        self.closing = self._relay.draining
        if self.tls and not self._relay.handshakes.done(self):  # it was ended just now
            self.abort()
            return
        room = self._relay.make_room()
        if room is Room.NONE:
            self.abort()
            return
        self._relay.connections.add(self)
        serve = self._serve() if room is Room.FREE else self._refuse()
        self._task = self._loop.create_task(serve, name="client")

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._relay.connections.discard(self)
        if self._task is not None and not self.tunnelling:  # what came before is still to be passed on
            self._task.cancel()

    @property
    def awaited(self) -> bool:
        return self._waiter is not None and not self.expecting

    def eof_received(self) -> bool | None:
        if self.unframed:  # an orderly end would make a part look like a whole
            self.abort()
        return super().eof_received()

    def stop(self) -> None:
        """Takes no further request: closes now if idle, else after the exchange in flight."""
        self.closing = True
        if not self.busy and not self.has_input:
            self._end_idle()

    def _end_idle(self) -> None:
        """Ends an idle connection; when it is called again, even if the client does not say goodbye."""
        if not self.lost:
            self.close()
        elif not self.unsent_bytes():
            self.let_go()

    def cut(self) -> None:
        """Ends the exchange in flight, too."""
        self.left = self.lost
        self.abort()
        if self._task is not None:
            self._task.cancel()

    async def _serve(self) -> None:
        try:
            while True:
                request = await self._receive_request()
                if request is None:
                    break
                self.busy = True
                if not await Exchange(self._relay, self, request).run():
                    await self._linger()
                    break
                self.busy = False
                self.stirred = True
        except asyncio.CancelledError:
            if not self.lost:  # a stop of the whole relay, not the client
                raise
        except Exception:
            # A defect of ours: this client's connection ends, the others go on.
            logger.exception("An exchange failed by a defect of payload-logger; its connection was closed.")
            self._relay.defects += 1
            self.abort()
        finally:
            self.close()
            self._task = None

    async def _receive_request(self) -> Request | None:
        """The next request; None when there is none. What is not valid is answered here."""
        head: bytes | None = b""
        empty_since = 0.0
        empty = 0
        try:
            while (head := await self.receive_head(self._relay.limits.max_head_bytes)) is not None:
                if head == self._known_head:
                    return self._known
                while head.startswith(b"\r\n"):  # RFC 9112 §2.2: empty lines before a request line are ignored
                    head = head[2:]
                if head:
                    self._fresh = False
                    request = Request(self._parser.parse(head), self.forwarding, self._relay.route)
                    if len(head) <= KNOWN_HEAD_BYTES:
                        self._known_head, self._known = head, request
                    return request
                empty += 1
                if empty > MAX_EMPTY_HEADS:
                    raise RequestFault("there are empty lines where a request should be")
                empty_since = empty_since or self._loop.time()
                self.partial_since = empty_since  # they prolong nothing
            return None
        except HeadTooLong as long:
            head = long.data
            fault = (
                RequestFault("the request line is longer than proxy.max_head_bytes allows", 414, "head_too_large")
                if long.in_start_line
                else RequestFault(
                    "the request's head is longer than proxy.max_head_bytes allows", 431, "head_too_large"
                )
            )
        except NotHTTP as other:
            fault = RequestFault(str(other))
        except RequestFault as refused:
            fault = refused
        await self._answer_fault(fault, head_only=head is not None and head.lstrip(b"\r\n").startswith(b"HEAD "))
        return None

    async def _refuse(self) -> None:
        """There is no room for this connection."""
        self.busy = True
        fault = ConnectionRefused("there are too many connections; proxy.max_connections allows no more")
        await self._answer_fault(fault, head_only=False)
        self.close()
        self._task = None

    async def _answer_fault(self, fault: Fault, *, head_only: bool) -> None:
        self._relay.count_fault(fault)
        answer, body = fault_answer(fault.status, str(fault), "", head_only=head_only)
        self.write(answer + body)
        await self._linger()

    async def _linger(self) -> None:
        """Closes in a way that lets the client read the answer though it is still sending (RFC 9112 §9.6)."""
        await self.drain()
        if self.transport is None or self.transport.is_closing() or not self.transport.can_write_eof():
            return  # TLS: to close it says goodbye, waits for the peer to do so too, and reads on until then
        self.write_eof()
        left = LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while left > 0 and (data := await self.receive()):
                    left -= len(data)

    # --- time ---

    def look(self, now: float) -> None:
        """Ends what has waited for this client for too long. To be called about once a second."""
        moved = self.has_moved()
        unsent = self._unsent_bytes
        if moved and self.peer is not None:
            self.peer.stirred = True
        if moved or not (unsent or self.awaited):
            self.waiting_since = now  # if anything is waited for, it is the model server
        waited = now - self.waiting_since
        patience = self._relay.patience
        if self.busy and self.has_left():
            self.break_off()
        elif unsent:
            if patience.idle_seconds and waited > patience.idle_seconds:
                self._relay.faults["client_idle"] += 1
                self.break_off()
        elif self.partial_since:
            if now - self.partial_since > patience.head_seconds:
                words = f"the request's head did not arrive within {patience.head_seconds:g} s (proxy.head_timeout)"
                self.interrupt(RequestFault(words, HTTPStatus.REQUEST_TIMEOUT, "head_timeout"))
        elif self.tunnelling:
            pass  # the pool looks after it
        elif not self.busy:
            keepalive = patience.keepalive_seconds
            if waited > (min(patience.head_seconds, keepalive) if self._fresh else keepalive):
                self._end_idle()
        elif patience.idle_seconds and waited > patience.idle_seconds:
            words = f"nothing came of the request's body for {patience.idle_seconds:g} s (proxy.client_idle_timeout)"
            self.interrupt(RequestFault(words, HTTPStatus.REQUEST_TIMEOUT, "body_timeout"))


class Room(Enum):
    """What a new connection finds."""

    FREE = 1
    FOR_A_REFUSAL = 2
    NONE = 3


@dataclass(frozen=True, slots=True)
class Patience:
    """How long clients are waited for. 0 of ``idle_seconds``: no limit."""

    head_seconds: float = 30.0  # for a whole head, from its first byte on, and for the first one of a connection
    idle_seconds: float = (
        60.0  # within an exchange: for the next bytes of its body, and until it takes some of the answer
    )
    keepalive_seconds: float = 620.0  # between two exchanges


class Relay:
    """Listens, relays, and stops in an orderly way.

    Use: ``await relay.serve(sockets)`` for each address, ``await relay.drain(seconds)``, ``await relay.close()``.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        pool: Pool,
        recorder: Recorder,
        limits: Limits,
        patience: Patience,
        max_connections: int = 0,
        forwarded_headers: ForwardedHeaders = ForwardedHeaders.APPEND,
        rewrite_host: bool = False,
    ) -> None:
        self.loop = loop
        self.pool = pool
        self.recorder = recorder
        self.limits = limits
        self.forwarded_headers = forwarded_headers
        self.route = Route(pool.address.base_path, pool.address.host_header, rewrite_host=rewrite_host)
        self.connections: set[Downstream] = set()
        self.draining = False
        self.patience = patience
        self.traffic = Traffic()
        self.faults: Counter[str] = Counter()  # by their reasons
        self.defects = 0
        self._max_connections = max_connections
        self._servers: list[asyncio.Server] = []
        self._unix_paths: list[Path] = []
        self.upstream_trouble: str | None = None  # what the model server failed with, until it answers again
        self.handshakes = Handshakes(self)
        self._sweeper = loop.create_task(self._sweep(), name="relay-sweep")

    async def serve(self, sockets: list[socket.socket], tls: ssl.SSLContext | None = None) -> str:
        """Takes connections from bound sockets; the address of the first. Raises OSError."""
        address = listeners.shown(sockets[0])
        if address.startswith("unix:"):
            self._unix_paths.append(Path(address.removeprefix("unix:")))
        if tls is None:
            self._servers += await listeners.serve(self._accept, sockets)
        else:
            for listener in sockets:
                self.handshakes.listen(listener, tls, self.patience.head_seconds)
        return address

    def _accept(self) -> asyncio.Protocol:
        return cast("asyncio.Protocol", Downstream(self))

    def expect(self) -> Downstream | None:
        """A client that is to shake hands first; None if there is no room, not even for a refusal."""
        return None if self.make_room() is Room.NONE else Downstream(self)

    async def drain(self, seconds: float, at_once: asyncio.Event | None = None) -> int:
        """Stops accepting, lets the exchanges in flight finish; the number of those that were cut in the end.

        That is after ``seconds``, or when ``at_once`` is set. An idle connection lasts for a moment longer: a request may
        be on its way, which is answered, and told that it was the last one.
        """
        self._stop_listening()
        for connection in list(self.connections):
            connection.closing = True
        now = self.loop.time()
        deadline, idle_end = now + seconds, now + min(seconds, IDLE_STOP_SECONDS)
        while (
            (self.connections or self.handshakes) and now < deadline and not (at_once is not None and at_once.is_set())
        ):
            if now >= idle_end:
                self.handshakes.end_all()
                for connection in list(self.connections):
                    connection.stop()
            await asyncio.sleep(0.02)
            now = self.loop.time()
        cut = [connection for connection in self.connections if connection.busy]
        for connection in list(self.connections):
            connection.cut()
        return len(cut)

    async def close(self) -> None:
        """Ends everything that ``drain`` left, or all at once."""
        self._stop_listening()
        self._sweeper.cancel()
        self.handshakes.end_all()
        for connection in list(self.connections):
            connection.cut()
        while self.connections or self.handshakes.tasks:
            for connection in list(self.connections):
                connection.abort()
            await asyncio.sleep(0)
        self.pool.close()
        await asyncio.sleep(0)

    def _stop_listening(self) -> None:
        self.draining = True
        self.handshakes.stop_listening()
        for server in self._servers:
            server.close()
        while self._unix_paths:
            self._unix_paths.pop().unlink(missing_ok=True)

    def count_fault(self, fault: Fault) -> None:
        """Counts what the relay answered by itself, and says once when the model server goes and when it is back."""
        self.faults[fault.reason] += 1
        if isinstance(fault, UpstreamFault) and self.upstream_trouble is None:
            self.upstream_trouble = str(fault)
            logger.warning("Upstream %s: %s; clients get %d until it answers.", self.pool.address, fault, fault.status)

    def recording_failed(self, error: Exception) -> None:
        if not self.defects:
            logger.error(
                "An exchange could not be recorded, by a defect of payload-logger; its traffic goes on.", exc_info=error
            )
        self.defects += 1

    def upstream_answered(self) -> None:
        if self.upstream_trouble is not None:
            self.upstream_trouble = None
            logger.info("Upstream %s answers again.", self.pool.address)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                self.pool.sweep()
                self._sweep_clients()
            except Exception:
                self.defects += 1
                logger.exception("The sweep of idle connections failed by a defect of payload-logger; it goes on.")

    def _sweep_clients(self) -> None:
        now = self.loop.time()
        for connection in list(self.connections):
            connection.look(now)

    def make_room(self) -> Room:
        """For one more connection; if need be, the slowest handshake ends for it, or what has been idle for longest."""
        count = len(self.connections) + len(self.handshakes)
        if not self._max_connections or count < self._max_connections:
            return Room.FREE
        idlest: Downstream | None = None
        since = self.loop.time() - SWEEP_SECONDS  # who came just now may be about to ask
        slowest = self.handshakes.oldest()
        if slowest is not None and slowest.waiting_since < since:
            self.handshakes.end(slowest)
            return Room.FREE
        for connection in self.connections:
            waiting_since = connection.partial_since or connection.waiting_since
            if (
                waiting_since < since
                and not connection.busy
                and (connection.partial_since or not connection.stirred)
                and not connection.unsent_bytes()
            ):
                idlest, since = connection, waiting_since
        if idlest is None:
            return Room.FOR_A_REFUSAL if count < 2 * self._max_connections else Room.NONE
        self.connections.discard(idlest)
        idlest.let_go()
        return Room.FREE
