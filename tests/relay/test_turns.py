"""No message holds the event loop for long, whatever small parts it is made of: the others get their turns."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from typing import Any

import pytest

from proxy.relay.exchange import MAX_INTERIM_AT_ONCE
from proxy.relay.framing import MAX_CHUNKS_AT_ONCE
from tests.harness import model_server
from tests.relay.wire import GET, OK, Script, SlowRecorder, bare_relay, connected, head, payload, read_message

CHUNKS = 100 * MAX_CHUNKS_AT_ONCE
MANY = b"1\r\nx\r\n" * CHUNKS + b"0\r\n\r\n"


class Turns:
    """Counts what happens within one turn of the event loop."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._turn = 0
        self._next()

    def _next(self) -> None:
        self._turn += 1
        asyncio.get_running_loop().call_soon(self._next)

    def count(self, number: int) -> None:
        self._counts[self._turn] += number

    @property
    def most(self) -> int:
        return max(self._counts.values())


class CountingRecorder(SlowRecorder):
    """Counts the bytes of bodies."""

    def __init__(self) -> None:
        super().__init__()
        self.written.set()
        self.turns = Turns()

    def request_piece(self, data: bytes) -> Awaitable[None] | None:
        self.turns.count(len(data))
        return super().request_piece(data)

    def response_piece(self, data: bytes) -> Awaitable[None] | None:
        self.turns.count(len(data))
        return super().response_piece(data)


class CountingTransport(asyncio.Transport):
    """Counts writes."""

    def __init__(self, wrapped: asyncio.Transport) -> None:
        super().__init__()
        self.turns = Turns()
        self._wrapped = wrapped

    def write(self, data: Any) -> None:
        self.turns.count(1)
        self._wrapped.write(data)

    def is_closing(self) -> bool:
        return self._wrapped.is_closing()

    def close(self) -> None:
        self._wrapped.close()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._wrapped.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._wrapped.get_write_buffer_size()


@pytest.mark.promise("G21b")
async def test_an_upload_of_small_chunks() -> None:
    script, recorder = Script(), CountingRecorder()
    async with model_server(script) as model, bare_relay(model.url, recorder) as (_, port), connected(port) as client:
        post = head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked")
        assert payload(await client.ask(post + MANY)) == b"ok"
    assert payload(script.received[0]) == recorder.request == b"x" * CHUNKS
    assert recorder.turns.most <= 2 * MAX_CHUNKS_AT_ONCE  # the end of one read, and of the next its first


@pytest.mark.promise("G21b")
async def test_an_answer_of_small_chunks() -> None:
    script, recorder = Script(head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked") + MANY), CountingRecorder()
    async with model_server(script) as model, bare_relay(model.url, recorder) as (_, port), connected(port) as client:
        for _ in range(2):
            assert payload(await client.ask(GET)) == b"x" * CHUNKS
        assert model.connections == 1
    assert recorder.turns.most <= 2 * MAX_CHUNKS_AT_ONCE  # the end of one read, and of the next its first


@pytest.mark.promise("G21b")
async def test_answers_that_another_one_follows() -> None:
    go_on = asyncio.Event()
    processing = b"HTTP/1.1 102 Processing\r\n\r\n"

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(processing)
        await go_on.wait()
        writer.write(processing * 1000 + OK)

    async with model_server(model) as served, bare_relay(served.url) as (relay, port), connected(port) as client:
        assert (await client.ask(GET, bodyless=True)).startswith(b"HTTP/1.1 102 ")
        (one,) = relay.connections
        assert one.transport is not None
        one.transport = transport = CountingTransport(one.transport)
        go_on.set()
        for _ in range(1000):
            assert (await client.response(bodyless=True)).startswith(b"HTTP/1.1 102 ")
        assert payload(await client.response()) == b"ok"
        assert transport.turns.most <= 2 * MAX_INTERIM_AT_ONCE


@pytest.mark.promise("G21b")
async def test_empty_lines() -> None:
    """A few before a request are ignored."""
    script = Script()
    async with model_server(script) as model, bare_relay(model.url) as (relay, port):
        async with connected(port) as client:
            assert payload(await client.ask(b"\r\n" * 8 + GET)) == b"ok"
            assert payload(await client.ask(b"\r\n" * 9 + GET)) == b"ok"
        async with connected(port) as client:
            assert b'"there are empty lines where a request should be"' in await client.ask(b"\r\n" * 100_000)
        assert relay.faults == {"invalid_request": 1}
    assert len(script.received) == 2
