"""D: bytes go on as they come, no faster than they are taken, and the last of them when the exchange is recorded."""

from __future__ import annotations

import asyncio
import functools
import socket
from pathlib import Path

import pytest

from proxy.relay.recording import Ending
from tests.harness import model_server
from tests.relay.wire import GET, OK, POST, Script, SlowRecorder, asking, bare_relay, connected, head, payload

CHUNKED = head(b"HTTP/1.1 200 OK", b"Content-Type: text/event-stream", b"Transfer-Encoding: chunked")
UPLOAD = head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked")
VOLUME = 64 * 1024 * 1024
BLOCK = bytes(256 * 1024)
# What may be on its way when nobody reads: the kernel's buffers of both hops (up to 10 MiB each) and the relay's.
IN_FLIGHT = 26 * 1024 * 1024


# --- promptness ---


@pytest.mark.promise("D12")
@pytest.mark.parametrize("framing", ["chunked", "length", "until close"])
async def test_the_head_and_each_token_go_out_as_they_come(framing: str, tmp_path: Path) -> None:
    """D12: the model server goes on only when the client has read what came before: head, tokens, a heartbeat."""
    tokens = [b"data: a\n\n", b": heartbeat\n\n", b"d", b"ata: b\n\n", b"data: [DONE]\n\n"]
    taken = asyncio.Event()
    start = {
        "chunked": CHUNKED,
        "length": head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(b"".join(tokens))),
        "until close": head(b"HTTP/1.1 200 OK"),
    }[framing]

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(start)
        for token in tokens:
            await taken.wait()
            taken.clear()
            writer.write(b"%x\r\n%b\r\n" % (len(token), token) if framing == "chunked" else token)
        await taken.wait()
        writer.write(b"0\r\n\r\n" if framing == "chunked" else b"")

    async with asking(handler, tmp_path) as client:
        client.write(GET)
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
        for token in tokens:
            taken.set()
            expected = b"%x\r\n%b\r\n" % (len(token), token) if framing == "chunked" else token
            assert await client.reader.readexactly(len(expected)) == expected
        taken.set()
        if framing == "chunked":
            assert await client.reader.readexactly(5) == b"0\r\n\r\n"


@pytest.mark.promise("D12")
async def test_a_chunk_goes_on_before_it_is_whole(tmp_path: Path) -> None:
    """D12: a large chunk is not collected."""
    taken = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED + b"8\r\nhalf")
        await taken.wait()
        writer.write(b"done\r\n0\r\n\r\n")

    async with asking(handler, tmp_path) as client:
        client.write(GET)
        await client.reader.readuntil(b"half\r\n")
        taken.set()
        assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(b"done\r\n0\r\n\r\n")


@pytest.mark.promise("D12")
@pytest.mark.parametrize(
    "pieces",
    [
        [UPLOAD, b"1\r\na\r\n", b"2\r\nbc\r\n", b"0\r\n\r\n"],
        [head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 6"), b"a", b"bc", b"def"],
    ],
    ids=["chunked", "length"],
)
async def test_the_request_goes_on_as_it_comes(pieces: list[bytes], tmp_path: Path) -> None:
    """D12: the client sends each piece when the model server has the one before."""
    came: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.put_nowait(await reader.readuntil(b"\r\n\r\n"))
        for piece in pieces[1:]:
            came.put_nowait(await reader.readexactly(len(piece)))
        writer.write(OK)

    async with asking(handler, tmp_path) as client:
        client.write(pieces[0])
        assert (await came.get()).startswith(b"POST /a HTTP/1.1\r\n")
        for piece in pieces[1:]:
            client.write(piece)
            assert await came.get() == piece
        assert payload(await client.response()) == b"ok"


# --- both ways at once ---


@pytest.mark.promise("D12a")
async def test_an_answer_may_begin_while_the_upload_runs(tmp_path: Path) -> None:
    """D12: each side says a word when it has heard the other one's."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED)
        while (line := await reader.readline()) != b"0\r\n":
            word = await reader.readexactly(int(line, 16) + 2)
            writer.write(line + word.upper())
        assert await reader.readline() == b"\r\n"
        writer.write(b"0\r\n\r\n")

    async with asking(handler, tmp_path) as client:
        client.write(UPLOAD)
        await client.reader.readuntil(b"\r\n\r\n")
        for word in (b"a", b"bc", b"d" * 1000):
            client.write(b"%x\r\n%b\r\n" % (len(word), word))
            expected = b"%x\r\n%b\r\n" % (len(word), word.upper())
            assert await client.reader.readexactly(len(expected)) == expected
        client.write(b"0\r\n\r\n")
        assert await client.reader.readexactly(5) == b"0\r\n\r\n"


@pytest.mark.promise("D12a")
async def test_much_both_ways_at_once_does_not_deadlock() -> None:
    """D12: an echo of 64 MiB through buffers of a few."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % VOLUME))
        left = VOLUME
        while left:
            data = await reader.read(len(BLOCK))
            left -= len(data)
            writer.write(data)
            await writer.drain()

    async with model_server(handler) as model, bare_relay(model.url) as (_, port), connected(port) as client:

        async def send() -> None:
            client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: %d" % VOLUME))
            for _ in range(VOLUME // len(BLOCK)):
                client.write(BLOCK)
                await client.writer.drain()

        sending = asyncio.create_task(send())
        await client.reader.readuntil(b"\r\n\r\n")
        received = 0
        while received < VOLUME:
            received += len(await client.reader.read(len(BLOCK)))
        await sending


@pytest.mark.promise("D12a")
@pytest.mark.parametrize(
    "upload", [UPLOAD + b"5\r\nhello\r\n", POST[:-4].replace(b" 4", b" 99999999") + b"x" * 100_000]
)
async def test_a_final_answer_may_come_before_the_upload_is_done(upload: bytes, tmp_path: Path) -> None:
    """D12: it arrives whole though the client is still sending, and both connections end."""
    answer = head(b"HTTP/1.1 413 Content Too Large", b"Content-Length: 2") + b"no"
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        try:
            while await reader.read(65536):
                pass
        finally:
            gone.set()

    async with asking(handler, tmp_path) as client:
        client.write(upload)
        got = await client.response()
        assert got.startswith(b"HTTP/1.1 413 Content Too Large\r\n")
        assert b"\r\nConnection: close\r\n" in got
        client.write(b"more of it")
        assert await client.rest() == b""
        await gone.wait()


@pytest.mark.promise("G21a")
async def test_a_malformed_upload_ends_the_exchange(tmp_path: Path) -> None:
    """G21: the answer is 400; the model server sees its connection end, never the end of the body."""
    came = asyncio.Event()
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append(await reader.readexactly(10))
        came.set()
        try:
            seen.append(await reader.read())
        except ConnectionResetError:
            seen.append(b"reset")

    async with asking(handler, tmp_path) as client:
        client.write(UPLOAD + b"5\r\nhello\r\n")
        await came.wait()
        client.write(b"+1\r\na\r\n0\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 400 ")
    assert seen == [b"5\r\nhello\r\n", b"reset"]


# --- back-pressure ---


def small_buffers(writer: asyncio.StreamWriter) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 64 * 1024)


async def write_all(writer: asyncio.StreamWriter, stalled: asyncio.Event) -> int:
    """Writes VOLUME bytes; how many of them had gone when the peer first took no more for half a second."""
    at = 0
    for count in range(VOLUME // len(BLOCK)):
        writer.write(BLOCK)
        try:
            async with asyncio.timeout(None if stalled.is_set() else 0.5):
                await writer.drain()
        except TimeoutError:
            at = count * len(BLOCK)
            stalled.set()
            await writer.drain()
    return at


@pytest.mark.promise("C11", "D13")
@pytest.mark.usefixtures("quick_sweep")
async def test_a_slow_reader_makes_the_model_server_wait() -> None:
    """C11, D13: for far longer than the idle time-out, and all of it arrives in the end."""
    stalled = asyncio.Event()
    written: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        small_buffers(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % VOLUME))
        written.set_result(await write_all(writer, stalled))

    relay = functools.partial(bare_relay, idle_timeout_seconds=0.1)
    async with model_server(handler) as model, relay(model.url) as (_, port), connected(port) as client:
        small_buffers(client.writer)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.write(GET)
        await stalled.wait()
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await client.reader.readuntil(b"\r\n\r\n")
        received = 0
        while received < VOLUME:
            received += len(await client.reader.read(2**20))
        assert 0 < await written < IN_FLIGHT


@pytest.mark.promise("C11", "D13")
async def test_a_slow_model_server_makes_the_client_wait() -> None:
    """C11, D13: the same for uploads."""
    go = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await go.wait()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        await reader.readuntil(b"\r\n\r\n")
        left = VOLUME
        while left:
            left -= len(await reader.read(2**20))
        writer.write(OK)

    async with model_server(handler) as model, bare_relay(model.url) as (_, port), connected(port) as client:
        small_buffers(client.writer)
        client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: %d" % VOLUME))
        writing = asyncio.create_task(write_all(client.writer, go))
        assert payload(await client.response()) == b"ok"
        assert 0 < await writing < IN_FLIGHT


@pytest.mark.promise("D13")
async def test_a_recorder_without_room_slows_both_ways() -> None:
    """D13: a body flows no faster than it can be kept, and not a byte of it overtakes its record."""
    recorder = SlowRecorder()
    recorder.written.set()
    recorder.room.clear()
    script = Script(OK)
    async with model_server(script) as model, bare_relay(model.url, recorder) as (_, port), connected(port) as client:
        client.write(POST)
        while not recorder.request:
            await asyncio.sleep(0)
        assert model.connections == 0
        recorder.room.set()
        assert payload(await client.response()) == b"ok"
    assert (recorder.request, recorder.response) == (b"ping", b"ok")


# --- the end is held until it is recorded ---


@pytest.mark.promise("D12")
@pytest.mark.parametrize(
    ("response", "before"),
    [
        (OK, b""),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0"), b""),
        (CHUNKED + b"2\r\nok\r\n0\r\n\r\n", b""),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 4") + b"|ok" + b"|ok", None),
        (CHUNKED + b"|1\r\na\r\n|1\r\nb\r\n0\r\n\r\n", CHUNKED + b"1\r\na\r\n1\r\nb\r\n"),
        (CHUNKED + b"|1\r\na\r\n|0\r\nX: 1\r\n\r\n", CHUNKED + b"1\r\na\r\n"),
    ],
    ids=["whole", "empty", "whole, chunked", "length", "last token with the end", "trailers"],
)
async def test_what_completes_a_response_is_held(response: bytes, before: bytes | None) -> None:
    """D12: never the first byte, never a token; only what makes the client believe that it has it all."""
    recorder = SlowRecorder()
    parts = response.split(b"|")
    if before is None:
        before = parts[0] + parts[1]
    go_on = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            if part is not parts[-1]:
                await go_on.wait()
                go_on.clear()
        await reader.read()

    async with model_server(handler) as model, bare_relay(model.url, recorder) as (_, port), connected(port) as client:
        request = head(b"GET /a HTTP/1.1", b"Host: h", b"x-request-id: i")
        client.write(request)
        with_id = before.replace(b"\r\nTransfer-Encoding", b"\r\nx-request-id: i\r\nTransfer-Encoding")
        if b"Content-Length" in before:
            with_id = before.replace(b"\r\n\r\n", b"\r\nx-request-id: i\r\n\r\n")
        got = b""
        for _ in parts[1:]:
            got += await client.reader.readuntil(b"\r\n\r\n") if not got else await client.reader.read(1000)
            go_on.set()
        await recorder.finishing.wait()
        while len(got) < len(with_id):
            got += await client.reader.read(1000)
        assert got == with_id
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.read(1), 0.05)
        recorder.written.set()
        rest = await client.reader.read(1000)
        assert rest
        assert payload(got + rest) == payload(response.replace(b"|", b""))
    assert recorder.endings == [Ending.COMPLETE]


@pytest.mark.promise("D12")
async def test_the_close_that_completes_a_response_is_held() -> None:
    """D12: also for a body that ends with its connection."""
    recorder = SlowRecorder()
    script = Script(head(b"HTTP/1.1 200 OK") + b"all", close=True)
    async with model_server(script) as model, bare_relay(model.url, recorder) as (_, port), connected(port) as client:
        client.write(GET)
        await client.reader.readuntil(b"all")
        await recorder.finishing.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.rest(), 0.05)
        recorder.written.set()
        assert await client.rest() == b""


@pytest.mark.promise("D12", "E15")
async def test_an_answer_of_the_relay_is_held_too() -> None:
    """D12, E15: 502 is recorded before it is seen."""
    recorder = SlowRecorder()
    async with model_server(Script(close=True)) as model:
        port_of_nobody = model.port
    async with bare_relay(f"http://127.0.0.1:{port_of_nobody}", recorder) as (_, port), connected(port) as client:
        client.write(GET)
        await recorder.finishing.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.read(1), 0.05)
        recorder.written.set()
        assert (await client.rest()).startswith(b"HTTP/1.1 502 ")
    assert recorder.endings == [Ending.UPSTREAM_FAILED]


@pytest.mark.promise("E14")
async def test_a_client_that_leaves_while_its_answer_is_held_disturbs_nobody() -> None:
    """E14."""
    recorder = SlowRecorder()
    async with model_server(Script()) as model, bare_relay(model.url, recorder) as (relay, port):
        async with connected(port) as client:
            client.write(GET)
            await recorder.finishing.wait()
        while relay.connections:
            await asyncio.sleep(0)
        recorder.written.set()
        async with connected(port) as client:
            assert payload(await client.ask(GET)) == b"ok"
        assert relay.defects == 0
