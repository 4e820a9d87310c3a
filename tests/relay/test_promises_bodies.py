"""Where bodies end, how they flow, and how long they may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.relay.server import Patience, Relay
from proxy.settings import MIB
from tests.harness import exchange, model_server, proxy
from tests.relay.wire import (
    GET,
    OK,
    Script,
    asking,
    bare_relay,
    connected,
    eventually,
    head,
    header,
    payload,
    read_message,
    relayed,
)

ID = b"x-request-id: id-1"
OFF = {"proxy__forwarded_headers": "off"}
VOLUME = 64 * MIB  # more than the kernel takes in on both hops


# --- C7, C8: what there is, and what there is not ---


@pytest.mark.promise("C7")
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS"])
async def test_no_body_gets_no_framing(method: bytes, tmp_path: Path) -> None:
    """Neither on the way there (a POST without a body, too) nor on the way back."""
    answer = head(b"HTTP/1.1 204 No Content", ID)
    script = Script(answer)
    request = head(method + b" /a HTTP/1.1", b"Host: h", ID)
    async with asking(script, tmp_path, **OFF) as client:
        for _ in range(2):
            assert await client.ask(request, bodyless=True) == answer
    assert script.received == [request] * 2


@pytest.mark.promise("C7")
async def test_each_message_is_framed_as_it_was_sent_whatever_came_before(tmp_path: Path) -> None:
    """On the same connections: sized, chunked, none, sized."""
    requests = [
        head(b"POST /a HTTP/1.1", b"Host: h", ID, b"Content-Length: 4") + b"ping",
        head(b"POST /a HTTP/1.1", b"Host: h", ID, b"Transfer-Encoding: chunked") + b"4\r\nping\r\n0\r\n\r\n",
        head(b"POST /a HTTP/1.1", b"Host: h", ID),
        head(b"POST /a HTTP/1.1", b"Host: h", ID, b"Content-Length: 0"),
        head(b"POST /a HTTP/1.1", b"Host: h", ID, b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    ]
    answers = [
        head(b"HTTP/1.1 200 OK", ID, b"Transfer-Encoding: chunked") + b"4\r\npong\r\n0\r\n\r\n",
        head(b"HTTP/1.1 200 OK", ID, b"Content-Length: 4") + b"pong",
        head(b"HTTP/1.1 200 OK", ID, b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head(b"HTTP/1.1 204 No Content", ID),
        head(b"HTTP/1.1 200 OK", ID, b"Content-Length: 0"),
    ]
    script = Script(*answers * 3)
    async with asking(script, tmp_path, **OFF) as client:
        got = [await client.ask(request) for request in requests * 3]
    assert got == answers * 3
    assert script.received == requests * 3


@pytest.mark.promise("C8")
@pytest.mark.parametrize(
    ("method", "start"), [(b"HEAD", b"200 OK"), (b"GET", b"304 Not Modified"), (b"GET", b"204 No Content")]
)
async def test_a_length_without_a_body_stays(method: bytes, start: bytes, tmp_path: Path) -> None:
    lines = (b"Content-Length: 12345", b"Content-Type: a/b", b"Content-Encoding: gzip", b'ETag: "a"', ID)
    answer = head(b"HTTP/1.1 " + start, *lines)
    async with asking(Script(answer), tmp_path) as client:
        for _ in range(2):
            assert await client.ask(head(method + b" /a HTTP/1.1", b"Host: h"), bodyless=True) == answer


@pytest.mark.promise("C8", "F19a")
async def test_an_interim_answer_has_no_length(tmp_path: Path) -> None:
    """RFC 9110 §8.6: a client might wait for its body, or take the next head for it."""
    interim = head(b"HTTP/1.1 103 Early Hints", b"Link: a", b"Content-Length: 5")
    async with asking(Script(interim + OK), tmp_path) as client:
        client.write(GET)
        expected = head(b"HTTP/1.1 103 Early Hints", b"Link: a")
        assert await client.reader.readexactly(len(expected)) == expected
        assert payload(await client.response()) == b"ok"


@pytest.mark.promise("C8", "G22")
@pytest.mark.parametrize("wrong", [b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"\x00"])
async def test_a_body_of_an_interim_answer_is_no_answer(wrong: bytes, tmp_path: Path) -> None:
    interim = head(b"HTTP/1.1 103 Early Hints", b"Content-Length: 5")
    async with relayed(Script(interim + wrong + OK, OK), tmp_path) as p:
        got = await exchange(p.port, GET)
        assert got.startswith(head(b"HTTP/1.1 103 Early Hints") + b"HTTP/1.1 502 ")
        assert wrong not in got
        assert payload(await exchange(p.port, GET, until_close=False)) == b"ok"


# --- C9, C10: the end ---


@pytest.mark.promise("C9a", "E17a")
@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize(
    "answer",
    [
        head(b"HTTP/1.1 200 OK", ID, b"Transfer-Encoding: chunked") + b"2\r\nok\r\n0\r\n\r\n",
        head(b"HTTP/1.1 200 OK", ID, b"Content-Length: 2") + b"ok",
        head(b"HTTP/1.1 200 OK", ID, b"Content-Length: 0"),
    ],
    ids=["chunked", "sized", "empty"],
)
async def test_what_follows_an_answer_is_nobodys(answer: bytes, late: bool, tmp_path: Path) -> None:
    evil = head(b"HTTP/1.1 200 OK", b"Content-Length: 4") + b"evil"
    go_on = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(answer if late else answer + evil)
        await go_on.wait()
        writer.write(evil)
        await reader.read()

    settings = {"proxy__upstream_keepalive": 600}
    async with (
        model_server(handler) as model,
        proxy(model.url, tmp_path, **settings) as p,
        connected(p.port) as client,
    ):
        for count in (1, 2):
            assert await client.ask(GET) == answer
            assert model.connections == count
            if late:
                go_on.set()
            await eventually(lambda: ": 0 connections, 0 idle" in repr(p.app.relay.pool))
            go_on.clear()


@pytest.mark.promise("C10b")
@pytest.mark.parametrize(
    "answer",
    [
        head(b"HTTP/1.1 206 Partial Content", b"Content-Range: bytes 2-5/9", ID, b"Content-Length: 4") + b"cdef",
        head(
            b"HTTP/1.1 206 Partial Content",
            b"Content-Type: multipart/byteranges; boundary=b",
            ID,
            b"Content-Length: 30",
        )
        + b"--b\r\n\r\n0123456789\r\n\r\n\r\n--b--\r\n",
        head(b"HTTP/1.1 206 Partial Content", b"Content-Range: bytes 2-3/*", ID, b"Transfer-Encoding: chunked")
        + b"2\r\ncd\r\n0\r\n\r\n",
        head(b"HTTP/1.1 416 Range Not Satisfiable", b"Content-Range: bytes */9", ID, b"Content-Length: 0"),
    ],
)
async def test_ranges_are_between_client_and_server(answer: bytes, tmp_path: Path) -> None:
    lines = (b"Range: bytes=2-5,-1", b'If-Range: W/"a"', b"Accept-Ranges: bytes", ID)
    request = head(b"GET /a HTTP/1.1", b"Host: h", *lines)
    script = Script(answer)
    async with asking(script, tmp_path, **OFF) as client:
        assert await client.ask(request) == answer
    assert script.received == [request]


@pytest.mark.promise("C10a", "A4")
async def test_trailers_keep_number_order_case_and_bytes(tmp_path: Path) -> None:
    trailers = b"X-B: 2\r\nx-A:1\r\nX-B:\t3 \r\nX-C: " + bytes(range(0x80, 0x100)) + b"\r\nEmpty:\r\n"
    message = b"4\r\nping\r\n0\r\n" + trailers + b"\r\n"
    request = head(b"POST /a HTTP/1.1", b"Host: h", ID, b"Transfer-Encoding: chunked") + message
    answer = head(b"HTTP/1.1 200 OK", ID, b"Transfer-Encoding: chunked") + message
    script = Script(answer)
    async with asking(script, tmp_path, **OFF) as client:
        assert await client.ask(request) == answer
    assert script.received == [request]


# --- C11, D13: bodies of any size, at the pace of who reads them ---


async def send_chunks(writer: asyncio.StreamWriter, size: int) -> None:
    """VOLUME bytes in chunks of that size."""
    block = bytes(64 * 1024)
    for _ in range(VOLUME // size):
        writer.write(b"%x\r\n" % size)
        for _ in range(size // len(block)):
            writer.write(block)
            await writer.drain()
        writer.write(b"\r\n")
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def count_chunks(reader: asyncio.StreamReader) -> int:
    """The bytes of a chunked body, in whatever chunks it comes."""
    count = 0
    while size := int(await reader.readline(), 16):
        count += size
        assert (await reader.readexactly(size + 2)).endswith(b"\r\n")
    assert await reader.readline() == b"\r\n"
    return count


@pytest.mark.promise("C11", "D13")
@pytest.mark.parametrize("way", ["download", "upload"])
@pytest.mark.parametrize("size", [64 * 1024, VOLUME], ids=["chunks", "one chunk"])
async def test_chunked_bodies_wait_for_who_reads_them(way: str, size: int) -> None:
    """Of 64 MiB the relay holds less than one, though nobody says how long the body will be."""
    go_on = asyncio.Event()
    counted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if way == "upload":
            await go_on.wait()
            await reader.readuntil(b"\r\n\r\n")
            counted.set_result(await count_chunks(reader))
            writer.write(OK)
        else:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked"))
            await send_chunks(writer, size)

    async def held(relay: Relay) -> int:
        """The bytes that wait in the relay when it neither gets rid of any nor takes in more."""
        await eventually(lambda: relay.connections and relay.pool._quiet_since)
        (one,), (other,) = relay.connections, relay.pool._quiet_since
        source, sink = (one, other) if way == "upload" else (other, one)
        await eventually(lambda: source._reading_paused and sink._writing_paused)
        assert sink.transport is not None
        return source._received_bytes + sink.transport.get_write_buffer_size()

    async with model_server(handler) as model, bare_relay(model.url) as (relay, port), connected(port) as client:
        if way == "upload":
            client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked"))
            sending = asyncio.create_task(send_chunks(client.writer, size))
            assert await held(relay) < MIB
            go_on.set()
            assert payload(await client.response()) == b"ok"
            assert await counted == VOLUME
            await sending
        else:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.write(GET)
            assert await held(relay) < MIB
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            await client.reader.readuntil(b"\r\n\r\n")
            assert await count_chunks(client.reader) == VOLUME


@pytest.mark.promise("C11a")
@pytest.mark.parametrize("limits", [(0, 0), (10, 5), (10, 100_000)], ids=str)
async def test_limits_of_what_is_recorded_leave_chunks_alone(limits: tuple[int, int], tmp_path: Path) -> None:
    body = bytes(range(256)) * 1024
    chunked = b"%x\r\n%b\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(body), body)
    script = Script(head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked") + chunked)
    settings = {"capture__max_body_bytes": limits[0], "capture__max_inline_bytes": limits[1]}
    async with asking(script, tmp_path, **settings, **OFF) as client:
        got = await client.ask(head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked") + chunked)
    for message in (got, script.received[0]):
        assert payload(message) == body
        assert message.endswith(b"\r\n0\r\nX-Sum: 1\r\n\r\n")


# --- D13a: time ---


@pytest.fixture
async def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[Relay, float], None]:
    """Puts the loop's clock forward by some seconds, with all that looks at it before and afterwards."""
    ahead = 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: time.monotonic() + ahead)

    def forward(relay: Relay, seconds: float) -> None:
        nonlocal ahead
        for step in (0.0, seconds):
            ahead += step
            relay.pool.sweep()
            relay._sweep_clients()

    return forward


@pytest.mark.promise("D13a")
@pytest.mark.parametrize("way", ["download", "upload"])
async def test_an_exchange_may_last_for_a_day(way: str, pass_time: Callable[[Relay, float], None]) -> None:
    """A byte every eight minutes, where ten of silence (twelve, for the model server) are the limit."""
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    count = 200

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if way == "upload":
            while piece := await reader.read(1):
                pieces.put_nowait(piece)
            return
        writer.write(head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % (count + 1)))
        while piece := await pieces.get():
            writer.write(piece)

    async with (
        model_server(handler) as model,
        bare_relay(model.url, patience=Patience(idle_seconds=600), idle_timeout_seconds=700) as (relay, port),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)  # whose time-outs are not ours to pass
        length = b"Content-Length: %d" % (count + 1)
        writer.write(head(b"POST /a HTTP/1.1", b"Host: h", length) if way == "upload" else GET)
        if way == "download":
            await reader.readuntil(b"\r\n\r\n")
        for _ in range(count):
            if way == "upload":
                writer.write(b"x")
                assert await pieces.get() == b"x"
            else:
                pieces.put_nowait(b"x")
                assert await reader.readexactly(1) == b"x"
            pass_time(relay, 480)
            await asyncio.sleep(0)  # whoever waits for a moment that has passed has it now
        assert not relay.faults
        pass_time(relay, 160 if way == "upload" else 260)  # too much of it in all
        if way == "upload":
            assert header(await read_message(reader), b"connection") == [b"close"]
            assert relay.faults == {"body_timeout": 1}
        else:
            with pytest.raises(ConnectionResetError):
                await reader.read()
            assert relay.faults == {"upstream_timeout": 1}
        writer.close()
        pieces.put_nowait(b"")
