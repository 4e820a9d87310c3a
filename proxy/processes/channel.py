"""How the supervisor and a worker speak: messages as lines of JSON, over a pair of sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from typing import Any, TypeAlias

import orjson

Message: TypeAlias = dict[str, Any]

_LONGEST_BYTES = 64 * 1024 * 1024


class Channel:
    """One end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, end: socket.socket) -> Channel:
        end.setblocking(False)
        return cls(*await asyncio.open_connection(sock=end, limit=_LONGEST_BYTES))

    def send(self, message: Mapping[str, Any]) -> None:
        """Does not wait; what the other end does not live to see is lost."""
        if not self._writer.is_closing():
            self._writer.write(orjson.dumps(message) + b"\n")

    async def flush(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def receive(self) -> Message | None:
        """The next message; None: the other end is gone."""
        try:
            line = await self._reader.readline()
        except ConnectionError:
            return None
        message: Message | None = orjson.loads(line) if line.endswith(b"\n") else None
        return message

    def close(self) -> None:
        self._writer.close()
