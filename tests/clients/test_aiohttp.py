"""aiohttp on both sides, each with what it makes of HTTP by itself."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tests.harness import Proxy, proxy

BLOB = bytes(range(256)) * 4096  # a MiB
TEXT = "größer " * 50_000


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def _json(request: web.Request) -> web.Response:
    return web.json_response({"got": await request.json(), "type": request.content_type})


async def _body(request: web.Request) -> web.Response:
    """What came, and how."""
    names = ("Transfer-Encoding", "Content-Length", "Content-Encoding", "Expect")
    told = {name: request.headers[name] for name in names if name in request.headers}
    return web.json_response({"sha256": digest(await request.read()), "headers": told})


async def _form(request: web.Request) -> web.Response:
    parts = []
    async for part in await request.multipart():
        assert isinstance(part, aiohttp.BodyPartReader)
        parts.append([part.name, part.filename, part.headers["Content-Type"], digest(bytes(await part.read()))])
    return web.json_response(parts)


async def _compressed(request: web.Request) -> web.Response:
    response = web.Response(text=TEXT)
    response.enable_compression()
    return response


async def _chunked(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    for start in range(0, len(BLOB), 100_000):
        await response.write(BLOB[start : start + 100_000])
    await response.write_eof()
    return response


async def _login(request: web.Request) -> web.Response:
    response = web.HTTPSeeOther("/whoami")
    for name in ("user", "session", "theme"):
        response.set_cookie(name, f"{name} of max", path="/", httponly=name == "session")
    raise response


async def _whoami(request: web.Request) -> web.Response:
    return web.json_response(dict(request.cookies))


async def _socket(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(protocols=("scores",), heartbeat=20)
    await socket.prepare(request)
    async for message in socket:
        if message.type is aiohttp.WSMsgType.BINARY:
            await socket.send_bytes(message.data)
        elif message.data == "close":
            await socket.close(code=4002, message=b"as you like")
        else:
            await socket.send_json({"said": message.data, "compressed": socket.compress})
    return socket


async def _fails(request: web.Request) -> web.Response:
    raise web.HTTPTooManyRequests(headers={"Retry-After": "7"}, text="slow down")


@pytest.fixture
async def server() -> AsyncIterator[str]:
    application = web.Application(client_max_size=2**24)
    application.router.add_post("/json", _json)
    application.router.add_route("*", "/body", _body)
    application.router.add_post("/form", _form)
    application.router.add_get("/compressed", _compressed)
    application.router.add_get("/chunked", _chunked)
    application.router.add_post("/login", _login)
    application.router.add_get("/whoami", _whoami)
    application.router.add_get("/socket", _socket)
    application.router.add_get("/fails", _fails)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


@contextlib.asynccontextmanager
async def through(server: str, storage: Path) -> AsyncIterator[tuple[Proxy, aiohttp.ClientSession]]:
    async with (
        asyncio.timeout(60),
        proxy(server, storage) as p,
        aiohttp.ClientSession(p.url, cookie_jar=aiohttp.CookieJar(unsafe=True)) as session,
    ):
        yield p, session


async def test_json(server: str, tmp_path: Path) -> None:
    async with through(server, tmp_path) as (p, session):
        sent = {"data": [[1.5, None, "é"]], "big": 2**60}
        async with session.post("/json", json=sent) as answer:
            assert (answer.status, await answer.json()) == (200, {"got": sent, "type": "application/json"})
            request_id = answer.headers["x-request-id"]
        await p.recorded(2)
        (request,), (response,) = p.lines("request"), p.lines("response")
    assert (request["data"], response["data"]["got"]) == (sent, sent)
    assert request["xrequestid"] == response["xrequestid"] == request_id


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 50_000):
        yield data[start : start + 50_000]


@pytest.mark.promise("C7", "C7a", "F19")
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "QUERY"])
async def test_uploads_of_every_framing(server: str, tmp_path: Path, method: str) -> None:
    async with through(server, tmp_path) as (p, session):
        for options, told in (
            ({"data": BLOB}, {"Content-Length": str(len(BLOB))}),
            ({"data": pieces(BLOB)}, {"Transfer-Encoding": "chunked"}),
            ({"data": BLOB, "compress": "gzip"}, {"Transfer-Encoding": "chunked", "Content-Encoding": "gzip"}),
            ({"data": BLOB, "compress": "deflate"}, {"Transfer-Encoding": "chunked", "Content-Encoding": "deflate"}),
            ({"data": BLOB, "expect100": True}, {"Content-Length": str(len(BLOB)), "Expect": "100-continue"}),
        ):
            async with session.request(method, "/body", **options) as answer:
                assert await answer.json() == {"sha256": digest(BLOB), "headers": told}
        account = await p.recorded(10)
        assert (account.received, account.discarded) == (10, {})
        files = [Path(line["data"].removeprefix("file://")) for line in p.lines("request")]
        assert [path.read_bytes() == BLOB for path in files] == [True] * 5


async def test_a_form_of_several_parts(server: str, tmp_path: Path) -> None:
    async with through(server, tmp_path) as (_, session):
        form = aiohttp.FormData()
        form.add_field("rows", "[[1, 2]]", content_type="application/json")
        form.add_field("image", BLOB, filename='scan "1" é.png', content_type="image/png")
        form.add_field("empty", b"", filename="nothing", content_type="application/octet-stream")
        async with session.post("/form", data=form) as answer:
            parts = await answer.json()
    assert [part[0] for part in parts] == ["rows", "image", "empty"]
    assert [part[2] for part in parts] == ["application/json", "image/png", "application/octet-stream"]
    assert [part[3] for part in parts] == [digest(b"[[1, 2]]"), digest(BLOB), digest(b"")]


@pytest.mark.promise("C7a")
@pytest.mark.parametrize("coding", ["gzip", "deflate", "identity"])
async def test_compressed_answers(server: str, coding: str, tmp_path: Path) -> None:
    async with through(server, tmp_path) as (p, session):
        async with session.get("/compressed", headers={"Accept-Encoding": coding}) as answer:
            assert answer.headers.get("Content-Encoding") == (None if coding == "identity" else coding)
            assert await answer.text() == TEXT
        await p.recorded(2)
        (line,) = p.lines("response")
        assert (line["data"], line.get("contentencoding", "identity")) == (TEXT, coding)


async def test_an_answer_in_chunks(server: str, tmp_path: Path) -> None:
    async with through(server, tmp_path) as (p, session):
        async with session.get("/chunked") as answer:
            assert answer.headers["Transfer-Encoding"] == "chunked"
            assert await answer.read() == BLOB
        await p.recorded(2)
        (line,) = p.lines("response")
        assert Path(line["data"].removeprefix("file://")).read_bytes() == BLOB


@pytest.mark.promise("A3", "B6c")
async def test_cookies_and_redirects_are_the_clients(server: str, tmp_path: Path) -> None:
    async with through(server, tmp_path) as (p, session):
        async with session.post("/login") as answer:
            assert [one.status for one in answer.history] == [303]
            assert len(answer.history[0].headers.getall("Set-Cookie")) == 3
            assert await answer.json() == {name: f"{name} of max" for name in ("user", "session", "theme")}
        async with aiohttp.ClientSession(p.url) as another, another.get("/whoami") as answer:
            assert await answer.json() == {}
        await p.recorded(6)
        assert [line["statuscode"] for line in p.lines("response")] == [303, 200, 200]


@pytest.mark.promise("F20")
@pytest.mark.parametrize("compress", [0, 15])
async def test_a_websocket(server: str, compress: int, tmp_path: Path) -> None:
    async with (
        through(server, tmp_path) as (_, session),
        session.ws_connect("/socket", protocols=("scores", "x"), compress=compress, heartbeat=20) as socket,
    ):
        assert (socket.protocol, bool(socket.compress)) == ("scores", bool(compress))
        await socket.send_str("é" * 70_000)
        assert await socket.receive_json() == {"said": "é" * 70_000, "compressed": compress}
        await socket.send_bytes(BLOB)
        assert await socket.receive_bytes() == BLOB
        await socket.ping(b"x")
        await socket.send_str("close")
        last = await socket.receive()
        assert (last.type, last.data, last.extra) == (aiohttp.WSMsgType.CLOSE, 4002, "as you like")
        assert socket.close_code == 4002


async def test_errors(server: str, tmp_path: Path) -> None:
    async with through(server, tmp_path) as (_, session):
        async with session.get("/fails") as answer:
            assert (answer.status, answer.reason) == (429, "Too Many Requests")
            assert (answer.headers["Retry-After"], await answer.text()) == ("7", "slow down")
        async with session.head("/body") as answer:
            assert (answer.status, await answer.read()) == (200, b"")
            assert int(answer.headers["Content-Length"]) > 0
        async with session.get("/nowhere") as answer:
            assert answer.status == 404


@pytest.mark.promise("E14")
async def test_a_client_that_gives_up(tmp_path: Path) -> None:
    """Its task is cancelled, as by a deadline of its own: the server's handler is, too."""
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.Response:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return web.Response()

    runner = web.ServerRunner(web.Server(handler, handler_cancellation=True))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]

    async def ask(session: aiohttp.ClientSession) -> None:
        await session.post("/score", json=[1])

    async with through(f"http://{host}:{port}", tmp_path) as (p, session):
        asking = asyncio.ensure_future(ask(session))
        await begun.wait()
        asking.cancel()
        await cancelled.wait()
        await p.recorded(2)
        (line,) = p.lines("response")
        assert (line["statuscode"], line["capturestatus"]) == (499, "clientleft")
    await runner.cleanup()
