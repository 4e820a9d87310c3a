"""The ``websockets`` client and server on either side of the proxy, with all that it makes of a tunnel."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from tests.harness import Proxy, proxy
from tests.relay.wire import eventually

pytestmark = pytest.mark.promise("F20")

SECONDS = 30  # a test that waits for longer has failed
Handler = Callable[[ServerConnection], Awaitable[None]]


async def echo(socket: ServerConnection) -> None:
    async for message in socket:
        await socket.send(message)


@contextlib.asynccontextmanager
async def serving(handler: Handler, storage: Path, **settings: object) -> AsyncIterator[Proxy]:
    """The proxy before a WebSocket server, until the block ends within SECONDS.

    Neither the server nor the client ends a connection because the other does not: such a test fails.
    """

    def refuse(socket: ServerConnection, request: Request) -> Response | None:
        if request.path.startswith("/private"):
            return socket.respond(HTTPStatus.FORBIDDEN, "not for you\n")
        return None

    async with (
        asyncio.timeout(SECONDS),
        serve(
            handler,
            "127.0.0.1",
            0,
            process_request=refuse,
            max_size=None,
            close_timeout=None,
        ) as server,
    ):
        port = server.sockets[0].getsockname()[1]
        async with proxy(f"http://127.0.0.1:{port}", storage, **settings) as p:
            yield p
            await eventually(lambda: not p.app.relay.connections)


def talking(p: Proxy, path: str = "/talk", **options: object) -> connect:
    given = {"proxy": None, "max_size": None, "close_timeout": None, "ping_interval": None, **options}
    return connect(p.url.replace("http:", "ws:") + path, **given)  # type: ignore[arg-type]


MESSAGES: dict[str, str | bytes] = {
    "text": "Größe ✓ \U0001f600",
    "binary": bytes(range(256)),
    "empty text": "",
    "empty binary": b"",
    "what looks like HTTP": b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    "126": b"x" * 126,
    "65536": b"x" * 65536,
    "large": b"0123456789abcdef" * 512 * 1024,
    "large text": "é" * 1_000_000,
}


@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_messages_come_back_as_they_were_sent(compression: str | None, tmp_path: Path) -> None:
    async with serving(echo, tmp_path) as p, talking(p, compression=compression) as socket:
        deflates = [isinstance(one, PerMessageDeflate) for one in socket.protocol.extensions]
        assert deflates == ([True] if compression else [])
        for message in MESSAGES.values():
            await socket.send(message)
            assert await socket.recv() == message


async def test_an_exchange_is_recorded_when_the_tunnel_opens(tmp_path: Path) -> None:
    async with serving(echo, tmp_path) as p, talking(p, "/chat?a=%2F") as socket:
        assert socket.response is not None
        await p.recorded(2)
        (request,), (response,) = p.lines("request"), p.lines("response")
        assert (request["path"], request["data"], response["data"]) == ("/chat?a=%2F", None, None)
        assert (response["statuscode"], response["capturestatus"]) == (101, "complete")
        assert response["xrequestid"] == socket.response.headers["x-request-id"]
        await socket.send("said")
        assert await socket.recv() == "said"
        assert p.account().received == 2


async def test_fragments_stay_fragments(tmp_path: Path) -> None:
    heard: list[list[str | bytes]] = []

    async def handler(socket: ServerConnection) -> None:
        for _ in range(2):
            heard.append([piece async for piece in socket.recv_streaming()])
            await socket.send(heard[-1][:-1])  # `websockets` adds an empty frame

    async with serving(handler, tmp_path) as p, talking(p, compression=None) as socket:
        for sent in (["a", "", "b" * 100_000], [b"\x00", b"\xff" * 70_000]):
            await socket.send(sent)
            assert [piece async for piece in socket.recv_streaming()] == [*sent, sent[0][:0]]
            assert heard[-1] == [*sent, sent[0][:0]]


@pytest.mark.parametrize("who", ["client", "server"])
async def test_pings_are_answered_by_the_other_side(who: str, tmp_path: Path) -> None:
    done = asyncio.Event()

    async def handler(socket: ServerConnection) -> None:
        if who == "server":
            await (await socket.ping(b"are you there"))
            done.set()
        await socket.wait_closed()

    async with serving(handler, tmp_path) as p, talking(p) as socket:
        if who == "client":
            await (await socket.ping(b"are you there"))
        else:
            await done.wait()


@pytest.mark.parametrize(("offered", "taken"), [(["v1"], "v1"), (["v1", "v2"], "v2"), (["v3"], None), (None, None)])
async def test_subprotocols(offered: list[str] | None, taken: str | None, tmp_path: Path) -> None:
    seen: list[str | None] = []

    async def handler(socket: ServerConnection) -> None:
        seen.append(socket.subprotocol)

    def choose(socket: ServerConnection, offers: list[Subprotocol]) -> Subprotocol | None:
        return max((one for one in offers if one in ("v1", "v2")), default=None)

    async with serve(handler, "127.0.0.1", 0, subprotocols=[Subprotocol("v1")], select_subprotocol=choose) as server:  # type: ignore[arg-type]
        port = server.sockets[0].getsockname()[1]
        async with proxy(f"http://127.0.0.1:{port}", tmp_path) as p, talking(p, subprotocols=offered) as socket:
            assert socket.subprotocol == taken
    assert seen == [taken]


CLOSES = [
    (1000, ""),
    (1000, "done"),
    (1001, "going away"),
    (1011, ""),
    (4000, "the model is gone: é"),
    (4999, "x" * 123),
]


@pytest.mark.parametrize("who", ["client", "server"])
async def test_each_side_is_told_how_the_other_closed(who: str, tmp_path: Path) -> None:
    heard: asyncio.Queue[tuple[int | None, str | None]] = asyncio.Queue()

    async def handler(socket: ServerConnection) -> None:
        code, reason = CLOSES[int(await socket.recv())]
        if who == "server":
            await socket.close(code, reason)
        else:
            await socket.wait_closed()
        heard.put_nowait((socket.close_code, socket.close_reason))

    async with serving(handler, tmp_path) as p:
        for number, (code, reason) in enumerate(CLOSES):
            async with talking(p) as socket:
                await socket.send(str(number))
                if who == "client":
                    await socket.close(code, reason)
                else:
                    with pytest.raises(ConnectionClosedOK if code in (1000, 1001) else ConnectionClosedError):
                        await socket.recv()
                assert (socket.close_code, socket.close_reason) == (code, reason)
                assert await heard.get() == (code, reason)


@pytest.mark.parametrize("by_reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_side_that_is_lost_is_lost_for_the_other(who: str, by_reset: bool, tmp_path: Path) -> None:
    """1006: the connection ended without a word."""
    lost = asyncio.Event()

    def lose(socket: ServerConnection | ClientConnection) -> None:
        if by_reset:
            linger = struct.pack("ii", 1, 0)
            socket.transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, linger)
        socket.transport.abort()

    async def handler(socket: ServerConnection) -> None:
        if who == "server":
            lose(socket)
            return
        with pytest.raises(ConnectionClosedError):
            await socket.recv()
        assert socket.close_code == 1006
        lost.set()

    async with serving(handler, tmp_path) as p, talking(p) as socket:
        if who == "client":
            lose(socket)
            await lost.wait()
        else:
            with pytest.raises(ConnectionClosedError):
                await socket.recv()
            assert socket.close_code == 1006


async def test_a_refusal_is_an_ordinary_answer(tmp_path: Path) -> None:
    async with serving(echo, tmp_path) as p:
        with pytest.raises(InvalidStatus) as refused:
            await talking(p, "/private/a")
        answer = refused.value.response
        assert (answer.status_code, answer.body) == (403, b"not for you\n")
        await p.recorded(2)
        (line,) = p.lines("response")
        assert (line["statuscode"], line["data"]) == (403, "not for you\n")
        assert line["xrequestid"] == answer.headers["x-request-id"]


async def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    async with serve(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
    async with proxy(f"http://127.0.0.1:{port}", tmp_path) as p:
        with pytest.raises(InvalidStatus) as refused:
            await talking(p)
        assert refused.value.response.status_code == 502


async def test_fifty_at_once(tmp_path: Path) -> None:
    arrived = asyncio.Barrier(50)

    async def talk(p: Proxy, number: int) -> list[str | bytes]:
        async with talking(p) as socket:
            await arrived.wait()
            for turn in range(20):
                await socket.send(f"{number}.{turn}" if turn % 2 else f"{number}.{turn}".encode() * 1000)
            return [await socket.recv() for _ in range(20)]

    async with serving(echo, tmp_path) as p:
        told = await asyncio.gather(*(talk(p, number) for number in range(50)))
        account = await p.recorded(100)
        assert (account.received, account.delivered) == (100, 100)
    for number, messages in enumerate(told):
        assert messages == [
            f"{number}.{turn}" if turn % 2 else f"{number}.{turn}".encode() * 1000 for turn in range(20)
        ]


async def test_both_speak_at_once(tmp_path: Path) -> None:
    """Neither waits until the other has listened."""
    count, size = 64, 256 * 1024

    async def handler(socket: ServerConnection) -> None:
        await asyncio.gather(send(socket), receive(socket))

    async def send(socket: ServerConnection | ClientConnection) -> None:
        for number in range(count):
            await socket.send(bytes([number]) * size)

    async def receive(socket: ServerConnection | ClientConnection) -> None:
        for number in range(count):
            assert await socket.recv() == bytes([number]) * size

    async with serving(handler, tmp_path) as p, talking(p, compression=None) as socket:
        await asyncio.gather(send(socket), receive(socket))
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 1000


async def test_over_tls(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    settings = {"proxy__tls_certificate": str(certificate[0]), "proxy__tls_key": str(certificate[1])}
    async with serving(echo, tmp_path, **settings) as p:
        address = {"host": "127.0.0.1", "port": p.port, "ssl": trust}
        async with connect("wss://localhost/talk", proxy=None, max_size=None, close_timeout=None, **address) as socket:  # type: ignore[arg-type]
            for message in MESSAGES.values():
                await socket.send(message)
                assert await socket.recv() == message
            await socket.close(4000, "enough")
        assert (socket.close_code, socket.close_reason) == (4000, "enough")
