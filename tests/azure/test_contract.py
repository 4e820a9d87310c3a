"""The same contract for every destination: what clients saw is there, once, as what it is; restarts and kills included."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
import duckdb
import pandas
import pytest

from tests.azure.destinations import NAMES, Destination, Stored, destination
from tests.drills.load import until

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
LARGE = json.dumps({"data": ["x" * 1000] * 5000}).encode()
LISTENING = re.compile(r"payload-logger \S+ on (\S+),")
STOPPED = re.compile(r"Stopped: received (\d+) events = delivered (\d+) \+ discarded (\d+).* \+ pending (\d+)")


@dataclass
class Seen:
    """What clients saw in full: the body of each request by its id, and that of its response."""

    requests: dict[str, bytes] = field(default_factory=dict)
    responses: dict[str, bytes] = field(default_factory=dict)

    async def send(self, url: str, path: str, body: bytes, content_type: str) -> None:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
            session.post(f"{url}{path}", data=io.BytesIO(body), headers={"Content-Type": content_type}) as answer,
        ):
            request_id = answer.headers["x-request-id"]
            self.responses[request_id] = await answer.read()
            self.requests[request_id] = body


@contextlib.asynccontextmanager
async def proxy(to: Destination, upstream: str, folder: Path, log_name: str) -> AsyncIterator[tuple[str, Any, Path]]:
    """The proxy as a process: its URL, the process and its log."""
    log_path = folder / f"{log_name}.log"
    command = [sys.executable, "-m", "proxy", "run", "--listen", "127.0.0.1:0"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "PAYLOAD_LOGGER_"))}
    settings = {"SPOOL_PATH": str(folder / "spool"), "STORAGE_SHIP_INTERVAL": "100ms", "LOGS_LEVEL": "debug"}
    environment = kept | to.environment | {f"PAYLOAD_LOGGER_{name}": value for name, value in settings.items()}
    with log_path.open("wb") as log:
        process = subprocess.Popen([*command, "--upstream", upstream, "--storage", to.url], env=environment, stderr=log)
    try:
        await until(lambda: LISTENING.search(log_path.read_text()) or process.poll() is not None, 60)
        found = LISTENING.search(log_path.read_text())
        assert found, log_path.read_text()
        yield f"http://{found[1]}", process, log_path
    finally:
        process.kill()
        await asyncio.to_thread(process.wait, 30)


async def stopped(process: Any, log_path: Path) -> tuple[int, ...]:
    """Stops the proxy: received, delivered, discarded, pending."""
    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait, 30) == 0
    found = STOPPED.search(log_path.read_text())
    assert found, log_path.read_text()
    return tuple(map(int, found.groups()))


def spooled(folder: Path) -> list[Path]:
    return [path for path in (folder / "spool").rglob("*") if path.is_file()]


def events(stored: Stored, collection: str) -> dict[str, dict[str, Any]]:
    """The events of a collection by request id; none stands there twice."""
    found: list[dict[str, Any]] = []
    for name, (content, content_type) in stored.items():
        if f"/{collection}/" in name and name.endswith(".jsonl"):
            assert not content or content.endswith(b"\n")
            assert content_type in (None, "application/x-ndjson")
            found += map(json.loads, content.splitlines())
    ids = Counter(event["xrequestid"] for event in found)
    assert not [one for one, count in ids.items() if count > 1]
    return {event["xrequestid"]: event for event in found}


def body(event: dict[str, Any], stored: Stored, to: Destination) -> bytes:
    """The body that the event stands for."""
    if event.get("datainblob") != "true":
        data = event["data"]
        return data.encode() if isinstance(data, str) else json.dumps(data).encode()
    assert event["data"].startswith(to.url + "/")
    name = unquote(urlsplit(event["data"]).path).removeprefix(unquote(urlsplit(to.url).path) + "/")
    content, content_type = stored[name]
    assert content_type in (None, event["datacontenttype"])
    return content


def check(seen: Seen, stored: Stored, to: Destination, *, exactly: bool = True) -> None:
    """``exactly``: nothing but what was seen is there. Killed proxies leave exchanges that nobody saw in full."""
    for collection, bodies in (("request", seen.requests), ("response", seen.responses)):
        found = events(stored, collection)
        assert set(bodies) <= set(found)
        assert not exactly or set(found) == set(bodies)
        for request_id, sent in bodies.items():
            recorded = body(found[request_id], stored, to)
            assert recorded == sent or json.loads(recorded) == json.loads(sent)


@pytest.mark.parametrize("name", NAMES)
async def test_what_clients_saw_is_there_once(
    name: str, tmp_path: Path, certificate: tuple[Path, Path], model: str
) -> None:
    seen = Seen()
    async with destination(name, tmp_path, certificate) as to:
        async with proxy(to, model, tmp_path, "proxy") as (url, process, log):
            for number in range(30):
                await seen.send(url, "/score", b'{"data":[[%d,3,5,2]]}' % number, "application/json")
            await seen.send(url, "/echo", "Grüße\nan alle".encode(), "text/plain; charset=utf-8")
            await seen.send(url, "/echo", PNG, "image/png")
            await seen.send(url, "/echo", LARGE, "application/json")
            assert await stopped(process, log) == (66, 66, 0, 0)
        stored = await to.content()
        check(seen, stored, to)
        assert not spooled(tmp_path)
        read_back(stored, tmp_path / "copy", len(seen.requests))


def read_back(stored: Stored, folder: Path, lines: int) -> None:
    """As its users read it."""
    for name, (content, _) in stored.items():
        if re.search(r"/(request|response)/", name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    found = duckdb.sql(f"FROM read_json('{folder}/*/*/request/**/*.jsonl', maximum_depth=1)").fetchall()
    assert len(found) == lines
    frames = [pandas.read_json(path, lines=True) for path in folder.glob("*/*/response/**/*.jsonl")]
    assert sum(map(len, frames)) == lines


async def test_tokens_that_last_five_seconds(tmp_path: Path, certificate: tuple[Path, Path], model: str) -> None:
    """They are asked for again and again, and nothing is lost; no secret of it is in a log or a file."""
    seen = Seen()
    async with destination("Azurite with tokens", tmp_path, certificate) as to:
        assert to.identity is not None
        async with proxy(to, model, tmp_path, "proxy") as (url, process, log):
            while len(to.identity.issued) < 4:
                await seen.send(url, "/score", b'{"data":[[6,3,5,2]]}', "application/json")
                await asyncio.sleep(0.05)
            received, *account = await stopped(process, log)
            assert account == [received, 0, 0]
        check(seen, await to.content(), to)
        secrets = [token.encode() for token in to.identity.issued] + [to.environment["IDENTITY_HEADER"].encode()]
        for path in tmp_path.rglob("*"):
            if path.is_file() and "azurite" not in path.parts:
                assert not [secret for secret in secrets if secret in path.read_bytes()], path


async def test_the_proxy_and_azurite_are_killed(tmp_path: Path, certificate: tuple[Path, Path], model: str) -> None:
    """SIGKILL for both, while they work; both come back, and it is all there, once.

    Azurite forgets what it acknowledged in its last five seconds. The files are still in the spool, and make it whole.
    """
    seen = Seen()

    async def traffic(url: str, requests: int) -> None:
        with contextlib.suppress(aiohttp.ClientError):
            for number in range(requests):
                await seen.send(url, "/score", b'{"data":[[%d,3,5,2]]}' % number, "application/json")

    async with destination("Azurite", tmp_path, certificate) as to:
        server = to.azurite
        assert server is not None
        async with proxy(to, model, tmp_path, "first") as (url, process, _):
            await traffic(url, 40)
            await until(lambda: events(to.read(), "request"), 30)
            clients = asyncio.gather(*(traffic(url, 10_000) for _ in range(4)))
            await until(lambda: len(seen.requests) > 200, 60)
            await asyncio.to_thread(server.kill)
            await until(lambda: len(seen.requests) > 400, 60)  # the traffic does not notice
            process.kill()
            await clients
        await asyncio.to_thread(server.start)
        async with proxy(to, model, tmp_path, "second") as (url, process, log):
            await traffic(url, 40)
            await asyncio.to_thread(server.stop)  # it saves everything: files of the first proxy may be gone by now
            await traffic(url, 40)
            await asyncio.to_thread(server.start)
            await traffic(url, 40)
            received, *account = await stopped(process, log)
            assert account == [received, 0, 0]
        check(seen, await to.content(), to, exactly=False)
        assert not spooled(tmp_path)
