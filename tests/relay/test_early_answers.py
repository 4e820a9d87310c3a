"""An answer that comes while the request is still on its way to the model server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import model_server, proxy
from tests.relay.wire import OK, Script, bare_relay, connected, eventually, head, payload, reset

SIZE = 32 * 1024 * 1024  # more than the kernel and the relay take in together


@pytest.mark.promise("D12a", "E17a")
async def test_a_connection_that_does_not_have_the_whole_request_is_not_used_again(tmp_path: Path) -> None:
    """D12, E17: else the next client's request would be taken for the rest of this one's body."""
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            line = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0]
            seen.append(line)
            if b"/big" in line:
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # it never reads the body
            writer.write(OK)
            await writer.drain()
            if b"/big" in line:
                await asyncio.Event().wait()

    big = head(b"POST /big HTTP/1.1", b"Host: h", b"Content-Length: %d" % SIZE) + bytes(SIZE)
    async with model_server(handler) as model, proxy(model.url, tmp_path) as p, connected(p.port) as first:
        first.write(big)
        answer = await first.response()
        assert b"\r\nConnection: close\r\n" in answer
        async with connected(p.port) as second:
            second.write(head(b"GET /victim HTTP/1.1", b"Host: v"))
            assert (await second.response()).startswith(b"HTTP/1.1 200 ")
        assert seen == [b"POST /big HTTP/1.1", b"GET /victim HTTP/1.1"]
        assert model.connections == 2


@pytest.mark.promise("C11a")
async def test_a_recorder_that_fails_costs_the_recording_only(tmp_path: Path) -> None:
    """Promise 2: whichever call fails, in the request's head, its body or the response's."""

    class Broken:
        def __init__(self, at: str) -> None:
            self.at = at

        def __getattr__(self, name: str) -> object:
            def call(*_: object, **__: object) -> object:
                if name == self.at:
                    raise RuntimeError(name)
                return self if name == "open" else None

            return call

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(4)
            writer.write(OK)

    async with model_server(handler) as model, proxy(model.url, tmp_path) as p:
        for at in ("open", "request_piece", "request_complete", "response_head", "response_piece", "finish"):
            p.app.relay.recorder = Broken(at)  # type: ignore[assignment]
            async with connected(p.port) as client:
                client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 4"))
                client.write(b"ping")
                assert (await client.response()).endswith(b"ok"), at
        assert p.app.relay.defects == 6


async def test_faults_at_once_leave_no_exception_behind(tmp_path: Path) -> None:
    """Compiled, a fault that waits for its recording could become the context of every later exception."""
    async with proxy("http://127.0.0.1:1", tmp_path) as p:

        async def refused() -> bytes:
            async with connected(p.port) as client:
                client.write(head(b"GET /a HTTP/1.1", b"Host: h"))
                return await client.rest()

        for _ in range(4):
            answers = await asyncio.gather(*(refused() for _ in range(25)))
            assert {answer[:12] for answer in answers} == {b"HTTP/1.1 502"}
        handled: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: handled.set_result(sys.exc_info()))
        assert await handled == (None, None, None)


async def test_a_lost_recording_is_counted_and_gives_back_what_it_holds(tmp_path: Path) -> None:
    """Promise 4: its events are discarded for a reason, and no memory or file stays behind."""

    class Failing:
        def __init__(self, real: Any) -> None:
            self.real = real

        def open(self, *arguments: Any, **named: Any) -> Failing:
            return Failing(self.real.open(*arguments, **named))

        def response_piece(self, data: bytes) -> None:
            raise RuntimeError(data)

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

    async with model_server(Script(OK)) as model, proxy(model.url, tmp_path, capture__max_inline_bytes=100_000) as p:
        recorder: Any = p.app.relay.recorder
        p.app.relay.recorder = Failing(recorder)  # type: ignore[assignment]
        for size in (10_000, 200_000):  # in memory, and in a file
            async with connected(p.port) as client:
                client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: %d" % size) + bytes(size))
                assert (await client.response()).endswith(b"ok")
        account = p.app.ledger.account()
        assert (account.received, account.discarded) == (4, {"render_failed": 4})
        assert recorder.spool.memory.held_bytes == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.promise("D12a", "E16")
async def test_an_answer_that_came_before_the_server_closed_is_not_lost_with_the_upload() -> None:
    """The write that fails is told of before the answer has been read."""
    answer = head(b"HTTP/1.1 413 Content Too Large", b"Content-Length: 3", b"Connection: close") + b"big"

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(4)
        writer.write(answer)
        reset(writer)

    async with model_server(handler) as model, bare_relay(model.url) as (relay, port), connected(port) as client:
        client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 1000000"))
        await eventually(lambda: relay.pool.open_connections)
        (upstream,) = relay.pool._quiet_since
        assert upstream.transport is not None
        upstream.transport.pause_reading()
        client.write(b"ping")
        await eventually(lambda: not upstream.is_quiet())
        while not upstream.lost:
            client.write(b"more")
            await asyncio.sleep(0)
        assert payload(await client.response()) == b"big"
        assert not relay.faults
