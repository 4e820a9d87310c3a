"""Sockets that listen: opened here, so that they can outlive the process that takes the connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BACKLOG = 1024


def open_listeners(address: str, *, shared: bool = False) -> list[socket.socket]:
    """Bound sockets for ``HOST:PORT`` (one for each address of HOST) or ``unix:/PATH``. Raises OSError.

    shared: others may be bound to the same port; the kernel then deals the connections out to them (SO_REUSEPORT).
    """
    if address.startswith("unix:"):
        return [_unix(Path(address.removeprefix("unix:")))]
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, place in dict.fromkeys(found):
            try:
                listener = socket.socket(family, kind, protocol)
            except OSError:  # a family that this machine does not have
                continue
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.setblocking(False)
            listener.bind(place)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def shown(listener: socket.socket) -> str:
    """The address of a socket, as the settings have it."""
    name = listener.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


async def serve(protocol: Callable[[], asyncio.Protocol], listeners: Sequence[socket.socket]) -> list[asyncio.Server]:
    """Takes connections; the sockets are the servers' from then on. Raises OSError, and closes the sockets then."""
    loop = asyncio.get_running_loop()
    servers: list[asyncio.Server] = []
    try:
        for listener in listeners:
            make: Any = loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
            servers.append(await make(protocol, sock=listener, backlog=BACKLOG))
    except OSError:
        for server in servers:
            server.close()
        for listener in listeners:
            listener.close()
        raise
    return servers


def _unix(path: Path) -> socket.socket:
    """A socket that a process has left behind is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    return listener
