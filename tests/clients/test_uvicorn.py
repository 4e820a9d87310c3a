"""uvicorn with FastAPI behind the proxy. It closes connections that were idle for 5 s, or for what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.typing import Subprotocol

from tests.clients.programs import Uvicorn, selftest, uvicorn
from tests.drills.load import until
from tests.harness import Proxy, proxy

IMPLEMENTATIONS = ["httptools", "h11"]
PATIENT = {"proxy__connect_timeout": "60s"}  # so many connections at once, on a busy machine


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Uvicorn]]:
    """One of each kind, which closes connections that were idle for a second."""
    folder = tmp_path_factory.mktemp("uvicorn")
    with contextlib.ExitStack() as stack:
        yield {
            http: stack.enter_context(uvicorn(folder, "--http", http, "--timeout-keep-alive", "1"))
            for http in IMPLEMENTATIONS
        }


@pytest.fixture(params=IMPLEMENTATIONS)
def server(request: pytest.FixtureRequest, servers: dict[str, Uvicorn]) -> Uvicorn:
    return servers[request.param]


@pytest.fixture
def uvicorn_by_default(tmp_path: Path) -> Iterator[Uvicorn]:
    with uvicorn(tmp_path) as running:
        yield running


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """As many connections as are asked for. aiohttp sends no POST twice by itself."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as client:
        yield client


class Posts:
    """POSTs through a proxy, and what became of each."""

    def __init__(self, client: aiohttp.ClientSession, p: Proxy, group: str = "") -> None:
        self._client = client
        self._proxy = p
        self._group = group
        self._name = uuid4().hex
        self.ids: list[str] = []

    async def one(self, together: int) -> int:
        """The port that the proxy used for it towards the server, which answers when ``together`` have come."""
        number = len(self.ids)
        request_id = f"{self._name}-{number}"
        self.ids.append(request_id)
        async with self._client.post(
            f"{self._proxy.url}/score?together={together}&group={self._group}",
            json={"data": [[number, 0.5]]},
            headers={"x-request-id": request_id},
        ) as answer:
            assert answer.status == 200, await answer.text()
            body = await answer.json()
            assert body["sums"] == [number + 0.5]
            return int(body["port"])

    async def at_once(self, count: int) -> list[int]:
        return await asyncio.gather(*(self.one(count) for _ in range(count)))

    async def check(self, handled: Counter[str]) -> None:
        """Each was handled once, and recorded once in each collection."""
        assert {one: handled[one] for one in self.ids} == dict.fromkeys(self.ids, 1)
        account = await self._proxy.recorded(2 * len(self.ids))
        assert (account.received, account.delivered, account.discarded) == (2 * len(self.ids), account.received, {})
        for collection in ("request", "response"):
            lines = self._proxy.lines(collection)
            assert sorted(line["xrequestid"] for line in lines) == sorted(self.ids)
            assert {line["capturestatus"] for line in lines} == {"complete"}
        assert {line["statuscode"] for line in self._proxy.lines("response")} == {200}
        assert not self._proxy.app.relay.faults


async def handled_by(client: aiohttp.ClientSession, server: Uvicorn) -> Counter[str]:
    async with client.get(f"{server.url}/handled") as answer:
        return Counter(await answer.json())


def connections(p: Proxy) -> tuple[int, int]:
    """To the server: all, and idle ones."""
    pool = p.app.relay.pool
    return len(pool._quiet_since), len(pool._idle)


# --- connections that the server closes when they are idle ---


@contextlib.contextmanager
def stopped(server: Uvicorn) -> Iterator[None]:
    """The server does nothing: what comes for it waits in the kernel, and its timers run out."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


async def posts_that_meet_closed_connections(server: Uvicorn, storage: Path, many: int) -> None:
    replaced: list[int] = []
    async with proxy(server.url, storage, proxy__upstream_keepalive="60s", **PATIENT) as p, session() as client:
        posts = Posts(client, p)
        await posts.at_once(many)
        for _ in range(3):
            await until(lambda: connections(p) == (0, 0))  # closed by uvicorn, seen by us
            used = {*await posts.at_once(many)}
            assert len(used) == many
            replaced.append(await collide(posts, p, server, used))
            await posts.at_once(many)
            if max(replaced) > many // 2:
                break
        assert len(posts.ids) >= 4 * many
        await posts.check(await handled_by(client, server))
    assert max(replaced) > many // 2, f"requests that met a closed connection, by break: {replaced}"


@pytest.fixture
def _whatever_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no question of how fast this machine is whether a request goes out again."""
    monkeypatch.setattr("proxy.relay.exchange.STALE_SECONDS", 30.0)


async def collide(posts: Posts, p: Proxy, server: Uvicorn, used: set[int]) -> int:
    """Sends requests over connections that uvicorn closes before it reads them; how many had to go on a new one.

    That is 0 if this machine was too slow to stop uvicorn within a second of its answers.
    """
    answered = time.monotonic()
    with stopped(server):
        await asyncio.sleep(answered + 1 - time.monotonic())  # what uvicorn waits for, too
        idle = connections(p)[1]
        sending = asyncio.create_task(posts.at_once(len(used)))
        await until(lambda: connections(p)[1] == 0)
    return idle - len({*await sending} & used)


@pytest.mark.promise("E16", "E16a")
@pytest.mark.usefixtures("_whatever_the_machine")
async def test_a_thousand_posts_meet_connections_that_uvicorn_closes(
    servers: dict[str, Uvicorn], tmp_path: Path
) -> None:
    """Four times 250 at once; in between 250 connections are idle for as long as uvicorn lets them.

    In one break the proxy sees them closed. In another uvicorn is stopped before its time-outs, and goes on when the next
    requests have been sent over all these connections. Its event loop sees to the time-outs first, and closes what it has
    not read.
    """
    await asyncio.gather(
        *(posts_that_meet_closed_connections(server, tmp_path / http, 250) for http, server in servers.items())
    )


@pytest.mark.promise("E16", "E16a")
@pytest.mark.usefixtures("_whatever_the_machine")
async def test_a_thousand_posts_around_the_five_seconds_of_uvicorn(uvicorn_by_default: Uvicorn, tmp_path: Path) -> None:
    """At its defaults, before a proxy with its own and one whose connections would stay for longer.

    250 connections each become idle at once. Then come as many requests, from before the proxy's limit until past uvicorn's;
    each is answered when all have come, so that each meets a connection that nobody has used in the meantime.
    """
    many = 250
    async with (
        proxy(uvicorn_by_default.url, tmp_path / "default", **PATIENT) as first,
        proxy(uvicorn_by_default.url, tmp_path / "longer", proxy__upstream_keepalive="60s", **PATIENT) as second,
        session() as client,
    ):
        both = Posts(client, first, "default"), Posts(client, second, "longer")
        await asyncio.gather(*(posts.at_once(many) for posts in both))
        idle_since = time.monotonic()

        async def later(posts: Posts, number: int) -> int:
            await asyncio.sleep(idle_since + 3.6 + 1.8 * number / many - time.monotonic())
            return await posts.one(many)

        await asyncio.gather(*(later(posts, number) for posts in both for number in range(many)))
        handled = await handled_by(client, uvicorn_by_default)
        for posts in both:
            await posts.check(handled)
    assert handled.total() == len(handled) == 4 * many


# --- what else FastAPI does ---


async def test_json_and_what_is_no_json(server: Uvicorn, tmp_path: Path) -> None:
    async with proxy(server.url, tmp_path / "data") as p, session() as client:
        posts = Posts(client, p)
        for _ in range(3):
            await posts.one(1)
        await posts.check(await handled_by(client, server))
        for path, body, status in (("/score", "{", 422), ("/score", '{"data": 1}', 422), ("/nowhere", "{}", 404)):
            told = []
            for url in (server.url, p.url):
                json_type = {"Content-Type": "application/json"}
                async with client.post(url + path, data=body, headers=json_type) as answer:
                    headers = [name for name, _ in answer.raw_headers]
                    told.append((answer.status, await answer.read(), headers))
            assert told[0][0] == status
            assert told[1] == (*told[0][:2], [*told[0][2], b"x-request-id"])


@pytest.mark.promise("D12")
async def test_a_stream_comes_as_it_is_made(server: Uvicorn, tmp_path: Path) -> None:
    tokens = ["a", "bc", "é", "d" * 10_000]
    async with proxy(server.url, tmp_path / "data") as p, session() as client:
        async with asyncio.timeout(30), client.post(f"{p.url}/stream", json=tokens) as answer:
            for token in tokens:
                wanted = token.encode()
                assert await answer.content.readexactly(len(wanted)) == wanted
                async with client.post(f"{server.url}/seen") as told:  # only now comes the next one
                    assert told.status == 200
            assert await answer.content.read() == b""
        await p.recorded(2)
        (line,) = p.lines("response")
        assert (line["data"], line["datacontenttype"]) == ("".join(tokens), "text/plain; charset=utf-8")


@pytest.mark.promise("F20")
async def test_a_websocket_endpoint(server: Uvicorn, tmp_path: Path) -> None:
    async with asyncio.timeout(30), proxy(server.url, tmp_path / "data") as p:
        url = p.url.replace("http:", "ws:")
        async with connect(f"{url}/chat", subprotocols=[Subprotocol("chat.v2")], proxy=None) as socket:
            assert socket.subprotocol == "chat.v2"
            for message in ("text", b"\x00\xff", "", "é" * 100_000):
                await socket.send(message)
                assert await socket.recv() == message
            await socket.send("close 4001 no more of this")
            with pytest.raises(ConnectionClosedError):
                await socket.recv()
            assert (socket.close_code, socket.close_reason) == (4001, "no more of this")
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"{url}/private", proxy=None)
        assert refused.value.response.status_code == 403
        await until(lambda: connections(p)[0] == connections(p)[1])
        await p.recorded(4)
        assert [line["statuscode"] for line in p.lines("response")] == [101, 403]


async def test_the_self_test_finds_no_difference(server: Uvicorn, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text('{"data": [[1, 2], [3], [4, 5]]}')
    for options in (["--path", "/openapi.json"], ["--path", "/tokens", "--body", str(tmp_path / "body.json")]):
        await selftest(server.url, *options, "--header", "Content-Type: application/json")
