"""When a side goes, what is sent twice, what waits behind what; and a real WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from proxy.config import load
from proxy.settings import MIB
from tests.harness import model_server, proxy
from tests.relay.wire import (
    GET,
    OK,
    POST,
    Script,
    bare_relay,
    connected,
    eventually,
    head,
    header,
    payload,
    read_message,
    relayed,
    reset,
)

CHUNKED = head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked")
UPLOAD = head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked")


class AtWork:
    """A model server that reads a head, says ``begins`` and notes when its connection ends."""

    def __init__(self, begins: bytes = b"", *, reads: bool = True) -> None:
        self.came = asyncio.Event()
        self.gone = asyncio.Event()
        self._begins = begins
        self._reads = reads

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if not self._reads:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(self._begins)
        self.came.set()
        try:
            while await reader.read(MIB):
                pass
        finally:
            self.gone.set()


# --- E14: the client goes ---


@pytest.mark.promise("E14")
@pytest.mark.parametrize("begins", [b"", CHUNKED + b"5\r\ntoken\r\n"], ids=["before the head", "mid-stream"])
@pytest.mark.parametrize("request_", [GET, POST, UPLOAD + b"4\r\nping\r\n"], ids=["GET", "POST", "upload"])
async def test_a_client_that_ends_its_own_side_is_gone(begins: bytes, request_: bytes, tmp_path: Path) -> None:
    """As docs/transparency.md says: it can't be told from one that left."""
    model = AtWork(begins)
    async with relayed(model, tmp_path) as p, connected(p.port) as client:
        client.write(request_)
        await model.came.wait()
        client.writer.write_eof()
        await asyncio.wait_for(model.gone.wait(), 1)
        await p.recorded(2)
        (line,) = p.lines("response")
        assert (line["statuscode"], line["capturestatus"]) == (499, "clientleft")


@pytest.mark.promise("E14", "D13")
async def test_a_client_that_leaves_while_it_reads_nothing(tmp_path: Path) -> None:
    """The relay waits for it to take more of its answer just then."""
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head(b"HTTP/1.1 200 OK"))
        try:
            while True:
                writer.write(bytes(MIB))
                await writer.drain()
        finally:
            gone.set()

    async with relayed(handler, tmp_path) as p:
        async with connected(p.port) as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.write(GET)
            await eventually(lambda: any(one._writing_paused for one in p.app.relay.connections))
            client.reset()
        await asyncio.wait_for(gone.wait(), 1)
        await p.recorded(2)
        assert p.lines("response")[0]["statuscode"] == 499


@pytest.mark.promise("E14")
@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("more", ["upload", "pipelined"])
async def test_a_client_that_leaves_with_much_on_its_way(more: str, how: str, tmp_path: Path) -> None:
    """It has sent more than the relay takes in: a body that the model server does not read yet, or further requests."""
    model = AtWork(reads=more == "pipelined")
    async with relayed(model, tmp_path) as p:
        _, writer = await asyncio.open_connection("127.0.0.1", p.port)
        upload = head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: %d" % (64 * MIB))
        writer.write(upload if more == "upload" else GET)
        await model.came.wait()
        (one,) = p.app.relay.connections
        async with asyncio.timeout(10):
            while not one._reading_paused or one.awaited:
                writer.write(bytes(65536) if more == "upload" else GET * 2000)
                await writer.drain()
                await asyncio.sleep(0)
            while writer.transport.get_write_buffer_size():  # the rest is the kernel's
                await asyncio.sleep(0)
        if how == "reset":
            reset(writer)
        else:
            writer.transport.abort()
        try:
            async with asyncio.timeout(5):
                while p.app.relay.pool._quiet_since:  # the model server's connection
                    await asyncio.sleep(0.01)
        finally:
            one.cut()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.promise("E14")
async def test_pipelined_requests_of_a_client_that_left_are_not_served(tmp_path: Path) -> None:
    served = asyncio.Event()
    seen = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        while True:
            await read_message(reader)
            seen += 1
            served.set()
            await reader.read()

    async with relayed(handler, tmp_path) as p:
        async with connected(p.port) as client:
            client.write(GET * 50)
            await served.wait()
        await eventually(lambda: not p.app.relay.connections)
        await p.recorded(2)
        assert (seen, p.account().received) == (1, 2)


# --- E15, E16: the second try ---


@pytest.mark.promise("E15", "A3a")
@pytest.mark.parametrize("sent", [b"own-1", b"", b"not valid"])
async def test_an_error_has_the_id_under_which_it_is_recorded(sent: bytes, tmp_path: Path) -> None:
    async with proxy("http://127.0.0.1:1", tmp_path) as p, connected(p.port) as client:
        got = await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", b"x-request-id: " + sent))
        await p.recorded(2)
        (line,) = p.lines("response")
    (request_id,) = header(got, b"x-request-id")
    assert (sent == b"own-1") is (request_id == b"own-1")
    assert b'"request_id":"%b"' % request_id in payload(got)
    assert line["xrequestid"] == request_id.decode()


@pytest.mark.promise("E16")
@pytest.mark.parametrize(
    "request_",
    [
        UPLOAD + b"4\r\nping\r\n0\r\nX-Sum: 1\r\n\r\n",
        head(b"PUT /a HTTP/1.1", b"Host: h", b"Content-Length: 100000") + bytes(range(250)) * 400,
        head(b"DELETE /a HTTP/1.1", b"Host: h"),
    ],
    ids=["chunked", "large", "none"],
)
async def test_what_is_sent_again_is_the_same(request_: bytes, tmp_path: Path) -> None:
    received: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(OK)
        received.append(await read_message(reader))

    async with model_server(handler) as model, bare_relay(model.url) as (_, port), connected(port) as client:
        assert payload(await client.ask(GET)) == b"ok"
        while client.writer.transport.get_write_buffer_size():
            await asyncio.sleep(0)
        client.write(request_)
        got = await client.response()
    if len(request_) < 64 * 1024:
        assert payload(got) == b"ok"
        assert model.connections == 2
    else:  # it may have come in pieces, and is not sent again then
        assert (payload(got) == b"ok") is (model.connections == 2)
    assert len(received) == 1


@pytest.mark.promise("E16")
async def test_a_request_that_a_fresh_connection_died_of_is_not_sent_again(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_message(reader))

    async with model_server(handler) as model, proxy(model.url, tmp_path) as p:
        for count in (1, 2, 3):
            async with connected(p.port) as client:
                assert (await client.ask(POST)).startswith(b"HTTP/1.1 502 ")
            assert len(seen) == model.connections == count


@pytest.mark.promise("E16a")
def test_idle_connections_are_kept_for_less_than_the_servers_of_python_do() -> None:
    """uvicorn closes them after 5 s; gunicorn's 2 s are met by trying again."""
    assert 0 < load(overrides={}, environ={}).settings.proxy.upstream_keepalive < 5


# --- E17: pipelining ---


@pytest.mark.promise("E17")
async def test_no_answer_overtakes_another(tmp_path: Path) -> None:
    """The model server has one request of a client at a time, however many have come."""
    go_on = asyncio.Event()
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            path = (await read_message(reader)).split(b" ")[1]
            seen.append(path)
            if path == b"/slow":
                await go_on.wait()
            writer.write(head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(path)) + path)

    slow, fast = (head(b"GET /%b HTTP/1.1" % name, b"Host: h") for name in (b"slow", b"fast"))
    async with relayed(handler, tmp_path) as p, connected(p.port) as client, connected(p.port) as other:
        client.write(slow + fast + fast)
        await eventually(lambda: seen)
        assert payload(await other.ask(fast)) == b"/fast"
        assert seen == [b"/slow", b"/fast"]
        go_on.set()
        assert [payload(await client.response()) for _ in range(3)] == [b"/slow", b"/fast", b"/fast"]


@pytest.mark.promise("E17", "G21")
@pytest.mark.parametrize(
    "last",
    [
        head(b"GET /a HTTP/1.1", b"Host: h", b"Connection: close"),
        head(b"GET /a HTTP/1.0", b"Host: h"),
        head(b"GET /a HTTP/1.1", b"Host: h", b"Host: h"),
    ],
)
async def test_nothing_behind_the_last_request_is_served(last: bytes, tmp_path: Path) -> None:
    script = Script()
    async with relayed(script, tmp_path) as p, connected(p.port) as client:
        client.write(GET + last + GET)
        got = await client.rest()
    assert got.count(b"HTTP/1.1 ") == 2
    assert len(script.received) == (1 if last.count(b"Host") > 1 else 2)


# --- F20: a real WebSocket ---


@pytest.mark.promise("F20")
async def test_a_websocket_speaks_through_the_proxy(tmp_path: Path) -> None:
    """Subprotocol, compression, text, bytes, ping and pong, a large message, and the closing codes of both sides."""
    heard: list[object] = []

    async def talk(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=("v1.chat", "v2.chat"), max_msg_size=0)
        await socket.prepare(request)
        heard.append(socket.ws_protocol)
        async for message in socket:
            if message.data == "end":
                await socket.close(code=4001, message=b"enough")
            elif message.type is aiohttp.WSMsgType.TEXT:
                await socket.send_str(message.data.upper())
            else:
                await socket.send_bytes(message.data[::-1])
        heard.append(socket.close_code)
        return socket

    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=400, text="no")

    app = web.Application()
    app.router.add_get("/chat", talk)
    app.router.add_get("/none", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with (
            asyncio.timeout(20),
            proxy(f"http://127.0.0.1:{runner.addresses[0][1]}", tmp_path) as p,
            aiohttp.ClientSession() as session,
        ):
            for ending in ("ours", "theirs"):
                async with session.ws_connect(
                    p.url + "/chat", protocols=("v9.chat", "v2.chat"), compress=15, max_msg_size=0
                ) as socket:
                    assert socket.protocol == "v2.chat"
                    assert socket.compress == 15
                    await socket.send_str("héllo")
                    assert await socket.receive_str() == "HÉLLO"
                    large = bytes(range(256)) * 4 * 1024 * 5
                    await socket.send_bytes(large)
                    assert await socket.receive_bytes() == large[::-1]
                    await socket.ping(b"?")
                    if ending == "ours":
                        await socket.close(code=4002)
                    else:
                        await socket.send_str("end")
                        message = await socket.receive()
                        assert (message.type, message.extra) == (aiohttp.WSMsgType.CLOSE, "enough")
                        assert socket.close_code == 4001
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                await session.ws_connect(p.url + "/none")
            assert refusal.value.status == 400
            await p.recorded(6)
            assert [line["statuscode"] for line in p.lines("response")] == [101, 101, 400]
    finally:
        await runner.cleanup()
    assert heard[:3] == ["v2.chat", 4002, "v2.chat"]
