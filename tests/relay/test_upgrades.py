"""Upgrades: what is offered to the model server, and the tunnel that follows its 101."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from proxy.relay.server import Patience
from proxy.relay.upstream import UpstreamConnection
from proxy.settings import MIB
from tests.harness import model_server
from tests.relay.wire import (
    GET,
    OK,
    Client,
    Script,
    bare_relay,
    connected,
    eventually,
    head,
    header,
    names,
    payload,
    read_message,
    relayed,
    reset,
    slow_reader,
)

UPGRADE = head(
    b"GET /chat?a=%2F HTTP/1.1", b"Host: h", b"Connection: keep-alive, Upgrade", b"Upgrade: x/1, WebSocket", b"X: 1"
)
SWITCH = head(
    b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Accept: abc"
)
OPEN = b"HTTP/1.1 101 "

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Switching:
    """A model server that changes the protocol, then does what ``talk`` says; it keeps the requests' heads."""

    def __init__(self, talk: Talk, answer: bytes = SWITCH) -> None:
        self.received: list[bytes] = []
        self._talk = talk
        self._answer = answer

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.received.append(await read_message(reader))
        writer.write(self._answer)
        await self._talk(reader, writer)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the other side has ended its direction; then one more word."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write(b"bye")
    await writer.drain()


async def switched(client: Client, request: bytes = UPGRADE) -> bytes:
    """The head of the answer."""
    client.write(request)
    return await client.reader.readuntil(b"\r\n\r\n")


@pytest.mark.promise("F20")
async def test_bytes_pass_both_ways_and_each_side_may_end_first(tmp_path: Path) -> None:
    server = Switching(echo)
    async with relayed(server, tmp_path) as p, connected(p.port) as client:
        answer = await switched(client)
        assert answer.startswith(OPEN + b"Switching Protocols\r\n")
        assert header(answer, b"Upgrade") == [b"websocket"]
        assert header(answer, b"Connection") == [b"Upgrade"]
        assert header(answer, b"Sec-WebSocket-Accept") == [b"abc"]
        assert len(header(answer, b"x-request-id")) == 1
        for data in (b"\x00\xffGET / HTTP/1.1\r\n\r\n", b"", b"x" * MIB):
            client.write(data)
            assert await client.reader.readexactly(len(data)) == data
        client.writer.write_eof()
        assert await client.rest() == b"bye"
        await eventually(lambda: not p.app.relay.connections)
        account = await p.recorded(1)
        (line,) = p.lines("response")
    (received,) = server.received
    assert received.startswith(b"GET /chat?a=%2F HTTP/1.1\r\n")
    assert (header(received, b"Upgrade"), header(received, b"Connection")) == ([b"x/1, WebSocket"], [b"Upgrade"])
    assert header(received, b"X") == [b"1"]
    assert (account.received, account.delivered) == (2, 2)
    assert (line["statuscode"], line["data"], line["capturestatus"]) == (101, None, "complete")


@pytest.mark.promise("F20")
async def test_the_server_may_end_its_side_first(tmp_path: Path) -> None:
    heard = asyncio.get_running_loop().create_future()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"last word")
        writer.write_eof()
        heard.set_result(await reader.read(-1))

    async with relayed(Switching(talk), tmp_path) as p, connected(p.port) as client:
        await switched(client)
        assert await client.rest() == b"last word"
        client.write(b"still here")
        client.writer.write_eof()
        assert await heard == b"still here"
        await eventually(lambda: not p.app.relay.connections)


@pytest.mark.promise("F20")
async def test_what_comes_with_the_heads_passes_too(tmp_path: Path) -> None:
    async with (
        relayed(Switching(echo, SWITCH + b"hello"), tmp_path) as p,
        connected(p.port) as client,
    ):
        await switched(client, UPGRADE + b"eager")
        assert await client.reader.readexactly(10) == b"helloeager"
        client.writer.write_eof()
        assert await client.rest() == b"bye"


@pytest.mark.promise("F20")
@pytest.mark.parametrize("answer", [OK, head(b"HTTP/1.1 400 Bad Request", b"Content-Length: 0")])
async def test_a_server_that_refuses_is_an_ordinary_answer(answer: bytes, tmp_path: Path) -> None:
    script = Script(answer, OK)
    async with relayed(script, tmp_path) as p, connected(p.port) as client:
        got = await client.ask(UPGRADE)
        assert got.split(b"\r\n")[0] == answer.split(b"\r\n")[0]
        assert payload(got) == payload(answer)
        assert payload(await client.ask(GET)) == b"ok"  # on the same connections
    assert len(script.received) == 2


NOT_OFFERED = {
    "no upgrade": GET,
    "not in Connection": head(b"GET /a HTTP/1.1", b"Host: h", b"Upgrade: websocket"),
    "no protocol": head(b"GET /a HTTP/1.1", b"Host: h", b"Connection: Upgrade"),
    "empty protocol": head(b"GET /a HTTP/1.1", b"Host: h", b"Connection: Upgrade", b"Upgrade: ,"),
    "HTTP/2": head(
        b"GET /a HTTP/1.1", b"Host: h", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: H2C", b"HTTP2-Settings: a"
    ),
    "HTTP/2 too": head(b"GET /a HTTP/1.1", b"Host: h", b"Connection: Upgrade", b"Upgrade: websocket, h2c"),
    "a body": head(b"POST /a HTTP/1.1", b"Host: h", b"Connection: Upgrade", b"Upgrade: websocket", b"Content-Length: 1")
    + b"x",
    "chunks": head(
        b"POST /a HTTP/1.1", b"Host: h", b"Connection: Upgrade", b"Upgrade: websocket", b"Transfer-Encoding: chunked"
    )
    + b"0\r\n\r\n",
    "HTTP/1.0": head(b"GET /a HTTP/1.0", b"Host: h", b"Connection: Upgrade", b"Upgrade: websocket"),
}


@pytest.mark.promise("A1", "F20")
@pytest.mark.parametrize("case", NOT_OFFERED)
async def test_what_is_not_offered_and_may_not_be_taken(case: str, tmp_path: Path) -> None:
    script = Script(OK, SWITCH)
    async with relayed(script, tmp_path) as p:
        async with connected(p.port) as client:
            assert payload(await client.ask(NOT_OFFERED[case])) == b"ok"
        async with connected(p.port) as client:
            answer = await client.ask(NOT_OFFERED[case])
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"switched protocols without being asked to" in answer
    for received in script.received:
        assert not {b"upgrade", b"connection", b"http2-settings"} & {*names(received)}


@pytest.mark.promise("F20", "G22")
@pytest.mark.parametrize(
    "lines",
    [
        (b"Upgrade: other", b"Connection: Upgrade"),
        (b"Upgrade: websocket, other", b"Connection: Upgrade"),
        (b"Upgrade: websocket",),
        (b"Connection: Upgrade",),
        (),
    ],
)
async def test_a_switch_to_something_else_is_no_answer(lines: tuple[bytes, ...], tmp_path: Path) -> None:
    async with (
        relayed(Switching(echo, head(b"HTTP/1.1 101 Switching Protocols", *lines)), tmp_path) as p,
        connected(p.port) as client,
    ):
        assert (await client.ask(UPGRADE)).startswith(b"HTTP/1.1 502 ")
        assert p.app.relay.faults == {"upstream_invalid": 1}


@pytest.mark.promise("F20")
@pytest.mark.parametrize("who", ["client", "server"])
async def test_an_abort_of_one_side_is_one_for_the_other(who: str, tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if who == "server":
            await reader.readexactly(1)
            reset(writer)
            return
        try:
            await reader.read(-1)
        except ConnectionResetError:
            ended.set()

    async with relayed(Switching(talk), tmp_path) as p, connected(p.port) as client:
        await switched(client)
        if who == "client":
            client.reset()
            await ended.wait()
        else:
            client.write(b"x")
            with pytest.raises(ConnectionResetError):
                await client.rest()
        await eventually(lambda: not p.app.relay.connections)


@pytest.mark.promise("F20", "D13")
async def test_a_side_that_does_not_read_slows_the_other(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await echo(reader, writer)

    size = 64 * MIB
    async with relayed(Switching(talk), tmp_path) as p, connected(p.port) as client:
        await switched(client)
        sent = asyncio.create_task(send(client, size))
        (one,) = p.app.relay.connections
        await eventually(lambda: one._reading_paused)
        assert one._received_bytes < MIB
        go_on.set()
        assert len(await client.reader.readexactly(size)) == size
        await sent
        client.writer.write_eof()
        assert await client.rest() == b"bye"


async def send(client: Client, size: int) -> None:
    for _ in range(size // MIB):
        client.write(b"x" * MIB)
        await client.writer.drain()


@pytest.mark.promise("F20")
async def test_over_tls_what_a_client_sent_before_it_left_arrives(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    heard = asyncio.get_running_loop().create_future()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set_result(await reader.read(-1))

    settings = {"proxy__tls_certificate": str(certificate[0]), "proxy__tls_key": str(certificate[1])}
    async with relayed(Switching(talk), tmp_path, **settings) as p:
        async with connected(p.port, tls=trust) as client:
            await switched(client)
            client.write(b"x" * MIB)
            await client.writer.drain()
        assert len(await heard) == MIB
        await eventually(lambda: not p.app.relay.connections)


@pytest.mark.usefixtures("quick_sweep")
@pytest.mark.promise("F20")
@pytest.mark.parametrize("sent", [0, 64 * MIB], ids=["silent", "full"])
@pytest.mark.parametrize("who", ["client", "server"])
async def test_an_abort_is_one_for_a_side_that_does_not_read(who: str, sent: int) -> None:
    """Whether what it was sent is read or waits: the proxy reads no more of a side whose bytes the other does not take."""
    aborted = asyncio.Event()
    begun = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if who == "server":
            writer.write(b"x" * sent)
            await begun.wait()
            reset(writer)
            return
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await begun.wait()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        try:
            while await reader.read(MIB):
                pass
        except ConnectionResetError:
            aborted.set()

    async with (
        model_server(Switching(talk)) as server,
        bare_relay(server.url) as (relay, port),
        connected(port) as client,
    ):
        await switched(client)
        (end,) = relay.connections
        await eventually(lambda: end.peer)
        other = end.peer
        assert other is not None
        source, sink = (end, other) if who == "client" else (other, end)
        if who == "client":
            client.write(b"x" * sent)
        else:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        if sent:
            await eventually(lambda: source._reading_paused and sink._writing_paused)
        if who == "client":
            client.reset()
            await eventually(lambda: sink.lost)
            begun.set()
            await aborted.wait()
        else:
            begun.set()
            await eventually(lambda: sink.lost)
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            with pytest.raises(ConnectionResetError):
                await client.rest()
        await eventually(lambda: not relay.connections)
        await eventually(lambda: not relay.pool.open_connections)


@pytest.mark.usefixtures("quick_sweep")
@pytest.mark.promise("F20")
async def test_what_came_before_an_orderly_end_passes_to_a_side_that_reads_late() -> None:
    go_on = asyncio.Event()
    heard = asyncio.get_running_loop().create_future()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()  # so that the client's end is that of both directions
        await go_on.wait()
        heard.set_result(len(await reader.read(-1)))

    async with model_server(Switching(talk)) as server, bare_relay(server.url) as (relay, port):
        async with connected(port) as client:
            await switched(client)
            assert await client.rest() == b""
            (end,) = relay.connections
            end._pause_reading()  # as it is while the other side takes nothing
            client.write(b"x" * 1000)
        end.look(asyncio.get_running_loop().time())
        go_on.set()
        assert end.transport is not None
        end._reading_paused = False
        end.transport.resume_reading()
        assert await heard == 1000
        await eventually(lambda: not relay.connections)


@pytest.mark.usefixtures("quick_sweep")
@pytest.mark.promise("F20")
@pytest.mark.parametrize("ended", [False, True])
async def test_a_tunnel_in_which_nothing_moves_is_reset(ended: bool) -> None:
    """For the time that the model server may be silent; how long clients are kept between requests does not matter."""
    reset_too = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if ended:
            writer.write_eof()  # so that nobody waits for us
        with pytest.raises(ConnectionResetError):
            await reader.read(-1)
        reset_too.set()

    async with (
        model_server(Switching(talk)) as server,
        bare_relay(server.url, patience=Patience(keepalive_seconds=0.01), idle_timeout_seconds=0.2) as (relay, port),
        connected(port) as client,
    ):
        await switched(client)
        if ended:
            assert await client.rest() == b""
        else:
            with pytest.raises(ConnectionResetError):
                await client.rest()
        await reset_too.wait()
        await eventually(lambda: not relay.connections)


@pytest.mark.promise("F20", "D13")
async def test_a_side_that_takes_little_at_a_time_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.relay.server.SWEEP_SECONDS", 1000.0)  # we do it

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x" * 16 * MIB)
        await reader.read(-1)

    async with model_server(Switching(talk)) as server, bare_relay(server.url, idle_timeout_seconds=1) as (relay, port):
        loop = asyncio.get_running_loop()
        async with slow_reader(port, UPGRADE) as client:
            await eventually(lambda: any(one._writing_paused and one.peer for one in relay.connections))
            (end,) = relay.connections
            upstream = end.peer
            assert isinstance(upstream, UpstreamConnection)
            await eventually(lambda: upstream._reading_paused)
            for _ in range(3):
                end.has_moved()
                upstream.has_moved()
                for _ in range(8):
                    await loop.sock_recv(client, 16 * 1024)
                await eventually(lambda: end.unsent_bytes() < end._unsent_bytes)
                end.look(loop.time())
                relay.pool._quiet_since[upstream] -= 1000
                relay.pool.sweep()
                assert not upstream.lost
            relay.pool._quiet_since[upstream] -= 1000
            for _ in range(2):
                end.look(loop.time())
                relay.pool.sweep()
                relay.pool._quiet_since[upstream] -= 1000
            assert upstream.lost


@pytest.mark.promise("E18", "F20")
async def test_a_stop_ends_tunnels_when_its_time_is_over(tmp_path: Path) -> None:
    async with (
        relayed(Switching(echo), tmp_path, proxy__drain_seconds=0.1) as p,
        connected(p.port) as client,
    ):
        await switched(client)
        assert await p.app.relay.drain(0.05) == 1
        with pytest.raises(ConnectionResetError):
            await client.rest()
