"""Real servers and sockets for the tests: a scripted model server, a raw client, the proxy between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.app import App, running
from proxy.config import load
from proxy.ledger import Account

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Proxy:
    """A proxy that runs in this process."""

    app: App

    @property
    def port(self) -> int:
        return int(self.app.address.rpartition(":")[2])

    @property
    def url(self) -> str:
        return f"http://{self.app.address}"

    @property
    def frames_url(self) -> str:
        """Where the SDK posts to."""
        return f"http://{self.app.custom_logging_address}/modeldata/log"

    def account(self) -> Account:
        return self.app.ledger.account()

    def files(self, collection: str) -> list[Path]:
        """Every file of the collection, oldest name first."""
        return sorted(path for path in self.app.places[collection].root.rglob("*") if path.is_file())

    def raw_lines(self, collection: str) -> list[bytes]:
        return [
            line
            for path in self.files(collection)
            if path.suffix == ".jsonl"
            for line in path.read_bytes().splitlines(keepends=True)
        ]

    def lines(self, collection: str) -> list[dict[str, Any]]:
        """Every event of the collection, in the order of writing."""
        return [json.loads(line) for line in self.raw_lines(collection)]

    async def recorded(self, events: int) -> Account:
        """Waits until ``events`` are no longer pending; fails after five seconds."""
        async with asyncio.timeout(5):
            while (account := self.account()).received < events or account.pending:
                await asyncio.sleep(0.005)
        return account


@contextlib.asynccontextmanager
async def proxy(upstream: str, storage: Path, **overrides: object) -> AsyncIterator[Proxy]:
    """The proxy before ``upstream``, on a free port. Settings as ``section__key=value``."""
    settings = load(
        overrides={
            "proxy.upstream": upstream,
            "proxy.listen": "127.0.0.1:0",
            "storage.url": str(storage),
            "proxy.drain_seconds": 2,
            **({"custom_logging.listen": "127.0.0.1:0"} if _has_frames(**overrides) else {}),
            **{key.replace("__", "."): value for key, value in overrides.items()},
        },
        environ={},
    ).settings
    async with running(settings) as app:
        yield Proxy(app)
    for thread in threading.enumerate():
        if thread.name == "spool-writer":  # it says that it is done a moment before it ends
            thread.join(1)


def _has_frames(*, data_collector: Any = None, **_: object) -> bool:
    collections = (data_collector or {}).get("collections", {})
    return not set(collections) <= {"request", "response"}


@dataclass
class ModelServer:
    """A model server on a free port, made of one function per connection."""

    port: int
    connections: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"


@contextlib.asynccontextmanager
async def model_server(
    handler: Handler, port: int = 0, *, tls: ssl.SSLContext | None = None, unix_path: Path | None = None
) -> AsyncIterator[ModelServer]:
    """Runs ``handler(reader, writer)`` for every connection; the writer is closed when it returns."""
    tasks: set[asyncio.Task[Any]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        served.connections += 1
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    if unix_path is not None:
        server = await asyncio.start_unix_server(connected, unix_path, limit=2**24)
        served = ModelServer(0)
    else:
        server = await asyncio.start_server(connected, "127.0.0.1", port, limit=2**24, ssl=tls)
        served = ModelServer(server.sockets[0].getsockname()[1], scheme="https" if tls else "http")
    try:
        yield served
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body (as it stands on the wire, chunk framing and all) of one request."""
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    if b"\r\ntransfer-encoding: chunked" in lower:
        body = b""
        while not body.endswith(b"0\r\n\r\n"):
            body += await reader.readline()
        return head, body
    if b"\r\ncontent-length:" in lower:
        length = int(lower.split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
        return head, await reader.readexactly(length)
    return head, b""


def answers(*responses: bytes) -> Handler:
    """A handler that gives one response per request, in turn (the last one for all that follow)."""
    given = list(responses)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                await read_request(reader)
            except asyncio.IncompleteReadError:
                return
            writer.write(given.pop(0) if len(given) > 1 else given[0])
            await writer.drain()

    return handler


async def exchange(port: int, request: bytes, *, until_close: bool = True) -> bytes:
    """Sends ``request`` and reads what comes until the peer closes (or, else, one Content-Length response)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(10):
            if until_close:
                return await reader.read(-1)
            return await read_response(reader)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until_refused(port: int) -> None:
    """Waits until nobody is let in at a port any more: who says that it stops may do so an instant later."""
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:  # it waited to be let in
                continue
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def read_response(reader: asyncio.StreamReader) -> bytes:
    """One response with Content-Length, as it stands on the wire."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
    return head + await reader.readexactly(length)
