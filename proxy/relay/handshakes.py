"""Accepts clients that speak TLS, and knows of them before they are connections: a handshake, too, takes a place."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, cast

from proxy.listeners import BACKLOG

if TYPE_CHECKING:
    from proxy.relay.server import Downstream, Relay

ACCEPT_RETRY_SECONDS = 1.0


class Handshakes:
    """Clients of TLS listeners that have connected and not yet shaken hands. ``len`` is their number."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._listeners: list[socket.socket] = []
        self._clients: dict[Downstream, asyncio.Task[None]] = {}  # the oldest first
        self.tasks: set[asyncio.Task[None]] = set()  # with those that are about to end

    def __len__(self) -> int:
        return len(self._clients)

    def listen(self, listener: socket.socket, tls: ssl.SSLContext, seconds: float) -> None:
        """Takes connections from a bound socket; each has ``seconds`` for its handshake. Raises OSError."""
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._listeners.append(listener)
        self._watch(listener, tls, seconds)

    def stop_listening(self) -> None:
        while self._listeners:
            listener = self._listeners.pop()
            self._relay.loop.remove_reader(listener)
            listener.close()

    def oldest(self) -> Downstream | None:
        return next(iter(self._clients), None)

    def done(self, client: Downstream) -> bool:
        """It is a connection now, or will never be. Whether it was under way."""
        return self._clients.pop(client, None) is not None

    def end(self, client: Downstream) -> None:
        self._clients.pop(client).cancel()

    def end_all(self) -> None:
        for client in list(self._clients):
            self.end(client)

    def _watch(self, listener: socket.socket, tls: ssl.SSLContext, seconds: float) -> None:
        if listener in self._listeners:
            self._relay.loop.add_reader(listener, self._accept, listener, tls, seconds)

    def _accept(self, listener: socket.socket, tls: ssl.SSLContext, seconds: float) -> None:
        loop = self._relay.loop
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # it has gone, or another process has it
            return
        except OSError as error:  # as asyncio does where there are no more files
            loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": error})
            loop.remove_reader(listener)
            loop.call_later(ACCEPT_RETRY_SECONDS, self._watch, listener, tls, seconds)
            return
        accepted.setblocking(False)
        client = self._relay.expect()
        if client is None:
            accepted.close()
            return
        task = loop.create_task(self._shake(client, accepted, tls, seconds), name="handshake")
        self._clients[client] = task
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _shake(self, client: Downstream, accepted: socket.socket, tls: ssl.SSLContext, seconds: float) -> None:
        try:
            with contextlib.suppress(OSError):  # it speaks no TLS, has gone, is too slow
                await self._relay.loop.connect_accepted_socket(
                    lambda: cast("asyncio.Protocol", client), accepted, ssl=tls, ssl_handshake_timeout=seconds
                )
        finally:
            self.done(client)
