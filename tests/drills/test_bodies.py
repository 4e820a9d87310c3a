"""Drill 8: large bodies both ways, recorded in files: nothing of them is lost, and they take no memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from proxy.settings import MIB
from tests.drills.conftest import Figure
from tests.drills.load import ProxyProcess, Traffic, proxy_process
from tests.drills.sizes import LARGE_MIB, patiently
from tests.harness import ModelServer, model_server

GROWTH_BYTES = 64 * MIB
_BLOCK = random.Random(8).randbytes(MIB - 8)


def body(name: str, length_mib: int) -> Iterator[bytes]:
    """Bytes in which no MiB is like another one."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    for number in range(length_mib):
        yield (seed + number).to_bytes(8, "big") + _BLOCK


class Sums(dict[tuple[str, str], str]):
    """sha256 of what each party got: (request id, ``sent`` | ``model`` | ``answered`` | ``client``)."""

    async def pass_on(self, key: tuple[str, str], writer: asyncio.StreamWriter, pieces: Iterator[bytes]) -> None:
        total = hashlib.sha256()
        for piece in pieces:
            total.update(piece)
            writer.write(piece)
            await writer.drain()
        self[key] = total.hexdigest()

    async def take(self, key: tuple[str, str], reader: asyncio.StreamReader, length: int) -> None:
        total = hashlib.sha256()
        while length:
            piece = await reader.read(min(length, MIB))
            assert piece, "cut off"
            total.update(piece)
            length -= len(piece)
        self[key] = total.hexdigest()


@pytest.fixture
async def sums() -> Sums:
    return Sums()


@pytest.fixture
async def large_model(sums: Sums) -> AsyncIterator[ModelServer]:
    """Takes a body and answers with another one as large."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
            name = head.split(b"\r\nx-request-id:", 1)[1].split(b"\r\n", 1)[0].strip().decode()
            await sums.take((name, "model"), reader, length)
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/x-tensor\r\nContent-Length: %d\r\n\r\n" % length
            )
            await sums.pass_on((name, "answered"), writer, body(f"answer to {name}", length // MIB))

    async with model_server(handler) as served:
        yield served


async def exchange(port: int, sums: Sums, name: str, length_mib: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MIB)
    writer.write(
        f"POST /infer HTTP/1.1\r\nHost: model\r\nContent-Type: application/x-tensor\r\nx-request-id: {name}\r\n"
        f"Content-Length: {length_mib * MIB}\r\nConnection: close\r\n\r\n".encode()
    )
    await sums.pass_on((name, "sent"), writer, body(name, length_mib))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    await sums.take((name, "client"), reader, length_mib * MIB)
    writer.close()
    await writer.wait_closed()


def recorded(storage: Path, collection: str) -> dict[str, str]:
    """sha256 of each recorded body, by request id."""
    found = {}
    for path in storage.rglob(f"{collection}/**/*.jsonl"):
        for line in path.read_bytes().splitlines():
            event = json.loads(line)
            if event.get("datainblob") == "true":
                with Path(unquote(event["data"].removeprefix("file://"))).open("rb") as file:
                    found[event["xrequestid"]] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


async def drill(proxy: ProxyProcess, storage: Path, sums: Sums, *, at_once: int, length_mib: int) -> int:
    """Sends ``at_once`` exchanges with bodies of that length and compares; growth of the peak of memory, in bytes."""
    await Traffic().send(proxy.port, "warm-up", 3, body=b"".join(body("warm-up", 1)))
    proxy.forget_peak_memory()
    before = proxy.peak_memory_bytes()
    names = [f"large-{number}" for number in range(at_once)]
    await asyncio.gather(*(exchange(proxy.port, sums, name, length_mib) for name in names))
    growth = proxy.peak_memory_bytes() - before
    print(f"{at_once} x {length_mib} MiB each way: peak of memory {before / MIB:.0f} MiB + {growth / MIB:.1f} MiB")
    proxy.signal(signal.SIGTERM)
    assert await proxy.exit_status() == 0
    assert "not whole" not in proxy.log()

    requests, responses = recorded(storage, "request"), recorded(storage, "response")
    for name in names:
        assert sums[name, "sent"] == sums[name, "model"] == requests[name]
        assert sums[name, "answered"] == sums[name, "client"] == responses[name]
    assert len({sums[name, party] for name in names for party in ("sent", "answered")}) == 2 * at_once
    assert not list(storage.rglob("*.part"))
    return growth


@patiently
@pytest.mark.promise("C11")
@pytest.mark.parametrize(("at_once", "length_mib"), [(1, 256), (8, LARGE_MIB)])
async def test_large_bodies_take_no_memory_and_stay_whole(
    large_model: ModelServer, sums: Sums, tmp_path: Path, figure: Figure, at_once: int, length_mib: int
) -> None:
    storage = tmp_path / "data"
    # After max_hold without progress bodies are given up, as on a disk that hangs; a busy machine must not look like one.
    room = f"{4 * at_once * length_mib}MiB"
    async with proxy_process(large_model.url, storage, spool__max_hold="20s", spool__max_bytes=room) as proxy:
        growth = await drill(proxy, storage, sums, at_once=at_once, length_mib=length_mib)
    figure(
        f"{at_once} bodies of {length_mib} MiB at once, each way",
        f"all hashes equal, memory + {growth / MIB:.0f} MiB",
    )
    assert growth <= GROWTH_BYTES


@pytest.mark.promise("C11")
async def test_the_drill_finds_bodies_that_are_held_in_memory(
    large_model: ModelServer, sums: Sums, tmp_path: Path
) -> None:
    """The negative control: the same with settings that hold every body until its end."""
    storage = tmp_path / "data"
    async with proxy_process(
        large_model.url,
        storage,
        spool__max_hold="20s",
        capture__max_inline_bytes="1GiB",
        capture__memory_bytes="1GiB",
    ) as proxy:
        growth = await drill(proxy, storage, sums, at_once=2, length_mib=32)
    assert growth > GROWTH_BYTES
