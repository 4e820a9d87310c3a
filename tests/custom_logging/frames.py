"""Frames as bytes on real sockets, and the endpoint on a spool of its own, without the proxy around it.

Whatever a test does, at its end nothing may be left behind: no memory held, no event unaccounted for, no unfinished
file, no line that readers fail on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from proxy.config import load
from proxy.custom_logging.endpoint import FrameEndpoint
from proxy.ledger import Account
from proxy.listeners import open_listeners
from proxy.settings import Durability, Settings
from proxy.spool.files import Files
from tests.spool.workbench import MIB, HungFiles, Running, place, spool

SECONDS = 10  # what takes longer than this has failed
ROWS = b'[{"a":1}]'
COLLECTIONS = ("model_inputs", "model_outputs")


@dataclass(frozen=True)
class Answer:
    status: int
    text: str


RECORDED = Answer(200, "recorded")
ACCEPTED = Answer(202, "accepted; the disk has yet to confirm it")
BATCHED = Answer(202, "accepted; it is recorded when custom_logging.batch_window is over")


def frame(
    body: bytes = ROWS,
    *headers: bytes,
    collection: str | None = "model_inputs",
    content_type: bytes | None = b"application/json",
    length: int | None = -1,
    line: bytes = b"POST /modeldata/log HTTP/1.1",
) -> bytes:
    """A request. length: what it claims (None: nothing)."""
    lines = [line, b"Host: h"]
    if collection is not None:
        lines.append(f"ce-type: azureml.inference.{collection}".encode())
    if content_type is not None:
        lines.append(b"Content-Type: " + content_type)
    if length is not None:
        lines.append(b"Content-Length: %d" % (len(body) if length == -1 else length))
    return b"\r\n".join([*lines, *headers]) + b"\r\n\r\n" + body


def chunked(body: bytes, size: int, *headers: bytes, last: bytes = b"0\r\n\r\n", **more: Any) -> bytes:
    """A request whose body comes in chunks of ``size``."""
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + last
    return frame(framed, b"Transfer-Encoding: chunked", *headers, length=None, **more)


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.answer()

    async def answer(self) -> Answer:
        async with asyncio.timeout(SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
            body = await self.reader.readexactly(length)
        assert b"\r\ncontent-type: text/plain; charset=utf-8\r\n" in head
        return Answer(int(head.split(b" ", 2)[1]), body.decode())

    async def rest(self) -> bytes:
        """What comes until the other side ends the connection."""
        async with asyncio.timeout(SECONDS):
            return await self.reader.read(-1)


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask(port: int, request: bytes) -> Answer:
    """The answer to a request on a connection of its own, as the SDK sends it."""
    async with connection(port) as client:
        return await client.ask(request)


@dataclass
class Served:
    """The endpoint, and what is behind it."""

    endpoint: FrameEndpoint
    port: int
    running: Running

    async def ask(self, request: bytes) -> Answer:
        return await ask(self.port, request)

    @property
    def account(self) -> Account:
        return self.running.ledger.account()

    @property
    def held_bytes(self) -> int:
        """Of the memory for bodies, and of that for frames that arrive."""
        return self.running.spool.memory.held_bytes + self.endpoint._arriving.held_bytes

    def raw_lines(self, collection: str = "model_inputs") -> list[bytes]:
        """As they are in the files, which are not those of large frames."""
        return self.running.bench.content(collection)

    def lines(self, collection: str = "model_inputs") -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.raw_lines(collection)]

    def rows(self, collection: str = "model_inputs") -> list[Any]:
        """The data of each line."""
        return [line["data"] if "data" in line else referred(line) for line in self.lines(collection)]

    def files(self) -> list[Path]:
        """All that is on the disk, but for what is in the journal's folder."""
        return sorted(path for path in (self.running.bench.root / "data").rglob("*") if path.is_file())

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():
                await asyncio.sleep(0.002)

    async def idle(self) -> None:
        """Waits until all that came is written or discarded, and no memory is held."""
        await self.running.settled(SECONDS)
        await self.until(lambda: self.held_bytes == 0)


def referred(line: Mapping[str, Any]) -> Any:
    """What is in the local file that a line points to."""
    return json.loads(Path(unquote(urlsplit(line["dataref"]).path)).read_bytes())


def settings(folder: Path, collections: Mapping[str, Any] | None = None, **overrides: object) -> Settings:
    """Settings as ``section__key=value``."""
    given = {name: {"enabled": True} for name in COLLECTIONS} if collections is None else dict(collections)
    return load(
        overrides={
            "storage.url": str(folder / "data"),
            "proxy.listen": "127.0.0.1:0",
            "custom_logging.listen": "127.0.0.1:0",
            "data_collector": {"collections": given},
            **{key.replace("__", "."): value for key, value in overrides.items()},
        },
        environ={},
    ).settings


@contextlib.asynccontextmanager
async def served(
    folder: Path,
    *,
    kind: type[Files] = Files,
    durability: Durability = Durability.WRITTEN,
    max_hold_seconds: float = 60,
    memory_bytes: int = 64 * MIB,
    max_bytes: int = 0,
    collections: Mapping[str, Any] | None = None,
    **overrides: object,
) -> AsyncIterator[Served]:
    """The endpoint on a free port. By default an answer waits for its line, however long that takes."""
    given = settings(folder, collections, capture__memory_bytes=memory_bytes, **overrides)
    options = given.sdk_endpoint
    assert options is not None
    async with spool(
        folder,
        durability=durability,
        max_hold_seconds=max_hold_seconds,
        memory_bytes=memory_bytes,
        max_bytes=max_bytes,
        kind=kind,
    ) as running:
        for name in given.data_collector.collections:
            running.bench.places[name] = place(folder / "data", name)
        endpoint = FrameEndpoint(given, options, running.spool)
        address = await endpoint.serve(open_listeners(options.listen))
        one = Served(endpoint, int(address.rpartition(":")[2]), running)
        try:
            yield one
        finally:
            if issubclass(kind, HungFiles):
                kind.gate.set()
            await endpoint.close()
        await one.idle()
        running.check_account()
        check_files(one)


def check_files(one: Served) -> None:
    """Every line is one that Azure ML's monitor and DuckDB read, and every other file belongs to a line."""
    lines = [line for name in one.running.bench.places for line in one.raw_lines(name)]
    referred_to = {check_line(line).get("dataref") for line in lines}
    others = {path for path in one.files() if not (path.suffix == ".jsonl" and path.name.startswith("a" * 32))}
    assert {path.as_uri() for path in others} == referred_to - {None}


def check_line(line: bytes) -> dict[str, Any]:
    """What readers need of a line."""
    assert line.endswith(b"\n")
    assert not {*b"\r\n"} & {*line[:-1]}
    fields: list[tuple[str, Any]] = json.loads(line, object_pairs_hook=list)
    names = [name for name, _ in fields]
    assert names[:6] == ["specversion", "id", "source", "type", "datacontenttype", "time"]
    assert names[6] in ("data", "dataref")
    assert names[7:10] == ["contentrange", "correlationid", "xrequestid"]
    assert len({name.lower() for name in names}) == len(names), "readers tell names apart without case"
    found: dict[str, Any] = json.loads(line)
    rows = found["data"] if "data" in found else referred(found)
    assert isinstance(rows, list)
    assert all(isinstance(row, dict) for row in rows)
    assert found["id"]
    assert found["correlationid"] == found["xrequestid"] != ""
    return found
