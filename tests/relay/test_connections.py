"""E: how connections begin, are used again, and end on either side; what the client and the lines then say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Handler, Proxy, exchange, model_server, proxy
from tests.relay.wire import (
    GET,
    OK,
    POST,
    Script,
    connected,
    eventually,
    head,
    header,
    payload,
    read_message,
    relayed,
    reset,
)

CLOSING = head(b"GET /a HTTP/1.1", b"Host: h", b"Connection: close")
CHUNKED = head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked")


def error(answer: bytes) -> dict[str, Any]:
    """The JSON that the relay answers by itself."""
    assert header(answer, b"content-type") == [b"application/json"]
    assert header(answer, b"connection") == [b"close"]
    fault: dict[str, Any] = json.loads(payload(answer))["error"]
    assert fault["request_id"].encode() == header(answer, b"x-request-id")[0]
    assert answer.startswith(b"HTTP/1.1 %d " % fault["code"])
    return fault


async def last_line(p: Proxy, collection: str = "response") -> dict[str, Any]:
    await eventually(lambda: p.account().received and not p.account().pending)
    return p.lines(collection)[-1]


# --- the client leaves ---


@pytest.mark.promise("E14")
@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("when", ["before the head", "mid-stream", "mid-upload"])
async def test_the_model_server_is_told_when_the_client_leaves(how: str, when: str, tmp_path: Path) -> None:
    """E14: within a second, and it is recorded as 499."""
    at_work = asyncio.Event()
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if when == "mid-stream":
            writer.write(CHUNKED + b"5\r\ntoken\r\n")
        elif when == "mid-upload":
            await reader.readexactly(4)
        at_work.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async with relayed(handler, tmp_path) as p:
        async with connected(p.port) as client:
            client.write(POST.replace(b": 4", b": 9") if when == "mid-upload" else GET)
            await at_work.wait()
            if when == "mid-stream":
                await client.reader.readuntil(b"token")
            if how == "reset":
                client.reset()
        await asyncio.wait_for(gone.wait(), 1)
        line = await last_line(p)
        assert (line["statuscode"], line["capturestatus"]) == (499, "clientleft")
        assert line["bodybytes"] == (5 if when == "mid-stream" else 0)
        request = await last_line(p, "request")
        assert request["capturestatus"] == ("clientleft" if when == "mid-upload" else "complete")


@pytest.mark.promise("E14")
async def test_a_client_that_leaves_while_a_connection_is_made(tmp_path: Path) -> None:
    """E14: nothing is left of either connection."""
    async with full_backlog() as url, proxy(url, tmp_path) as p:
        async with connected(p.port) as client:
            client.write(GET)
            await eventually(lambda: any(connection.busy for connection in p.app.relay.connections))
        await eventually(lambda: not p.app.relay.connections)
        assert (await last_line(p))["statuscode"] == 499


# --- the model server can't be had ---


@contextlib.asynccontextmanager
async def full_backlog() -> AsyncIterator[str]:
    """The URL of a listener whose queue is full: the kernel answers no further connection."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Closes every connection at once."""


async def closes_after_the_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_message(reader)


async def resets_after_the_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_message(reader)
    reset(writer)


async def closes_within_its_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_message(reader)
    writer.write(OK[:30])


@pytest.mark.promise("E15", "E16")
@pytest.mark.parametrize(
    "handler", [nobody, closes_after_the_request, resets_after_the_request, closes_within_its_head]
)
@pytest.mark.parametrize("request_", [GET, POST])
async def test_an_upstream_that_is_lost_before_its_head(handler: Handler, request_: bytes, tmp_path: Path) -> None:
    """E15: 502 with the request id, recorded. A fresh connection is not tried twice."""
    async with model_server(handler) as model, proxy(model.url, tmp_path) as p:
        fault = error(await exchange(p.port, request_))
        assert (fault["code"], "closed the connection" in fault["message"]) == (502, True)
        line = await last_line(p)
        assert (line["statuscode"], line["capturestatus"]) == (502, "upstreamfailed")
        assert (line["xrequestid"], line["data"]["error"]) == (fault["request_id"], fault)
        assert (await last_line(p, "request"))["capturestatus"] == "complete"
        assert model.connections == 1


@pytest.mark.promise("E15")
async def test_an_upstream_that_refuses_and_comes_up_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """E15: 502 while it is down, also for HEAD; it recovers by itself, and the log says each once."""
    caplog.set_level(logging.INFO, "payload_logger.relay")
    async with model_server(nobody) as model:
        port = model.port
    async with proxy(f"http://127.0.0.1:{port}", tmp_path) as p:
        for _ in range(2):
            fault = error(await exchange(p.port, GET))
            assert (fault["code"], "refused" in fault["message"]) == (502, True)
        without_body = await exchange(p.port, head(b"HEAD /a HTTP/1.1", b"Host: h"))
        assert without_body.startswith(b"HTTP/1.1 502 ")
        assert without_body.endswith(b"\r\n\r\n")
        assert (await last_line(p))["statuscode"] == 502
        async with model_server(Script(), port):
            assert payload(await exchange(p.port, CLOSING)) == b"ok"
        assert (await last_line(p))["statuscode"] == 200
    lost = f"Upstream 127.0.0.1:{port}: no connection to the model server: Connection refused; clients get 502 until it answers."
    assert [record.getMessage() for record in caplog.records] == [lost, f"Upstream 127.0.0.1:{port} answers again."]


@pytest.mark.promise("E15")
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_connect_timeout(scheme: str, tmp_path: Path) -> None:
    """E15: 504, also when the TLS handshake does not end."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with contextlib.AsyncExitStack() as stack:
        if scheme == "http":
            url = await stack.enter_async_context(full_backlog())
        else:
            url = (await stack.enter_async_context(model_server(silent))).url.replace("http:", "https:")
        p = await stack.enter_async_context(proxy(url, tmp_path, proxy__connect_timeout=0.1))
        fault = error(await exchange(p.port, POST))
        assert (fault["code"], fault["message"]) == (504, "no connection to the model server within 0.1 s")
        line = await last_line(p)
        assert (line["statuscode"], line["capturestatus"]) == (504, "upstreamfailed")


# --- the model server fails or falls silent within an answer ---


@pytest.mark.promise("D13a", "E15")
@pytest.mark.usefixtures("quick_sweep")
@pytest.mark.parametrize("begun", [False, True])
async def test_the_idle_timeout(begun: bool, tmp_path: Path) -> None:
    """D13, E15: 504 before the head, an abort behind it; the model server's connection ends."""
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED + b"5\r\ntoken\r\n" if begun else b"")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async with relayed(handler, tmp_path, proxy__upstream_idle_timeout=0.1) as p, connected(p.port) as client:
        client.write(GET)
        if begun:
            await client.reader.readuntil(b"token\r\n")
            with pytest.raises(ConnectionResetError):
                await client.rest()
        else:
            assert error(await client.rest())["code"] == 504
        await gone.wait()
        line = await last_line(p)
        assert (line["statuscode"], line["capturestatus"]) == (200 if begun else 504, "upstreamfailed")


@pytest.mark.promise("D13a")
@pytest.mark.usefixtures("quick_sweep")
@pytest.mark.parametrize("way", ["download", "upload"])
async def test_what_flows_is_not_idle(way: str, tmp_path: Path) -> None:
    """D13: an exchange may take far longer than the idle time-out: here a byte each time, for five times as long."""
    came = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if way == "download":
            writer.write(head(b"HTTP/1.1 200 OK", b"Content-Length: 20"))
            for _ in range(20):
                await asyncio.sleep(0.05)
                writer.write(b"x")
        else:
            for _ in range(20):
                await reader.readexactly(1)
                came.set()
            writer.write(OK)

    async with relayed(handler, tmp_path, proxy__upstream_idle_timeout=0.2) as p, connected(p.port) as client:
        if way == "download":
            assert payload(await client.ask(GET)) == b"x" * 20
            return
        client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 20"))
        for _ in range(20):
            await asyncio.sleep(0.05)
            client.write(b"x")
            await came.wait()
            came.clear()
        assert payload(await client.response()) == b"ok"


BROKEN = {
    "shorter than its length": head(b"HTTP/1.1 200 OK", b"Content-Length: 9") + b"hello",
    "only a head": head(b"HTTP/1.1 200 OK", b"Content-Length: 9"),
    "chunked without its end": CHUNKED + b"5\r\nhello\r\n",
    "within a chunk": CHUNKED + b"9\r\nhello",
    "within the last chunk": CHUNKED + b"5\r\nhello\r\n0\r\n",
    "within the trailers": CHUNKED + b"5\r\nhello\r\n0\r\nA: b\r\n",
    "malformed chunk": CHUNKED + b"5\r\nhello\r\n+5\r\nworld\r\n0\r\n\r\n",
}


@pytest.mark.promise("C9")
@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("client_version", ["1.0", "1.1"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_broken_answer_is_an_abort(answer: bytes, client_version: str, how: str, tmp_path: Path) -> None:
    """C9: never a clean end, not even for an HTTP/1.0 client, which knows no other end than the close."""
    taken = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        start, _, rest = answer.partition(b"\r\n\r\n")
        writer.write(start + b"\r\n\r\n" + rest[:3])
        await taken.wait()  # so that the answer has begun for the client
        writer.write(rest[3:])
        await writer.drain()
        if how == "reset":
            reset(writer)

    async with relayed(handler, tmp_path) as p, connected(p.port) as client:
        client.write(GET.replace(b"1.1", client_version.encode()))
        await client.reader.readuntil(b"\r\n\r\n")
        taken.set()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        line = await last_line(p)
        assert (line["statuscode"], line["capturestatus"]) == (200, "upstreamfailed")


@pytest.mark.promise("C9", "C10")
@pytest.mark.parametrize("client_version", ["1.0", "1.1"])
async def test_a_reset_is_not_the_end_of_a_body_until_close(client_version: str, tmp_path: Path) -> None:
    """C9, C10: only an orderly close completes such a body."""
    taken = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(head(b"HTTP/1.1 200 OK") + b"half")
        await taken.wait()
        reset(writer)

    async with relayed(handler, tmp_path) as p, connected(p.port) as client:
        client.write(GET.replace(b"1.1", client_version.encode()))
        await client.reader.readuntil(b"half")
        taken.set()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        assert (await last_line(p))["capturestatus"] == "upstreamfailed"


# --- pooled connections ---


@pytest.mark.promise("E17a")
async def test_connections_are_reused(tmp_path: Path) -> None:
    """E17: one upstream connection serves one client after the other; one client's connection many requests."""
    async with model_server(Script()) as model, proxy(model.url, tmp_path) as p:
        for _ in range(3):
            async with connected(p.port) as client:
                for request in (GET, POST, GET):
                    assert payload(await client.ask(request)) == b"ok"
        assert model.connections == 1
        assert repr(p.app.relay.pool) == f"<Pool 127.0.0.1:{model.port}: 1 connections, 1 idle>"


@pytest.mark.promise("E16a", "E17a")
@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"proxy__upstream_keepalive": 0}, OK),
        ({}, head(b"HTTP/1.1 200 OK", b"Connection: close", b"Content-Length: 2") + b"ok"),
        ({}, head(b"HTTP/1.0 200 OK", b"Content-Length: 2") + b"ok"),
    ],
)
async def test_connections_that_are_not_reused(settings: dict[str, object], answer: bytes, tmp_path: Path) -> None:
    """E16, E17: the client's connection is none the worse."""
    async with (
        model_server(Script(answer)) as model,
        proxy(model.url, tmp_path, **settings) as p,
        connected(p.port) as client,
    ):
        for count in (1, 2):
            got = await client.ask(GET)
            assert (payload(got), header(got, b"connection")) == (b"ok", [])
            assert model.connections == count


@pytest.mark.promise("E16a")
@pytest.mark.usefixtures("quick_sweep")
async def test_idle_upstream_connections_are_closed(tmp_path: Path) -> None:
    """E16: before the model server does it."""
    ended = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(OK)
        assert await reader.read() == b""
        ended.set()

    async with relayed(handler, tmp_path, proxy__upstream_keepalive=0.1) as p, connected(p.port) as client:
        assert payload(await client.ask(GET)) == b"ok"
        await ended.wait()
        assert ": 0 connections, 0 idle" in repr(p.app.relay.pool)


@pytest.mark.promise("E16")
@pytest.mark.parametrize("request_", [GET, POST])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_stale_connection_is_replaced(request_: bytes, how: str, tmp_path: Path) -> None:
    """E16: a pooled connection that ends as the request arrives costs no client anything, POST or not."""
    served = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await read_message(reader)
        served += 1
        writer.write(OK)
        await read_message(reader)
        if how == "reset":
            reset(writer)

    async with model_server(handler) as model, proxy(model.url, tmp_path) as p, connected(p.port) as client:
        for count in range(1, 4):
            assert payload(await client.ask(request_)) == b"ok"
            assert (served, model.connections) == (count, count)
        assert len(p.lines("response")) == 3


@pytest.mark.promise("E16")
async def test_a_stale_connection_is_replaced_once(tmp_path: Path) -> None:
    """E16."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        if model.connections == 1:
            writer.write(OK)
            await read_message(reader)

    async with model_server(handler) as model, proxy(model.url, tmp_path) as p, connected(p.port) as client:
        assert payload(await client.ask(POST)) == b"ok"
        assert error(await client.ask(POST))["code"] == 502
        assert model.connections == 2


@pytest.mark.promise("E16")
@pytest.mark.parametrize(
    "sent", [b"HTTP/1.1 2", OK[:30], head(b"HTTP/1.1 103 Early Hints"), head(b"HTTP/1.1 100 Continue")]
)
async def test_no_second_try_once_a_byte_of_the_answer_has_come(sent: bytes, tmp_path: Path) -> None:
    """E16: the model server was at work on it."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(OK)
        await read_message(reader)
        writer.write(sent)

    async with model_server(handler) as model, proxy(model.url, tmp_path) as p, connected(p.port) as client:
        assert payload(await client.ask(POST)) == b"ok"
        client.write(POST)
        assert b"HTTP/1.1 502 " in await client.rest()
        assert model.connections == 1


@pytest.mark.promise("E16")
async def test_no_second_try_when_the_body_was_streamed(tmp_path: Path) -> None:
    """E16: what has gone by can't be sent again."""
    came = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(OK)
        await reader.readuntil(b"\r\n\r\npi")
        came.set()
        await reader.readexactly(2)

    async with model_server(handler) as model, proxy(model.url, tmp_path) as p, connected(p.port) as client:
        assert payload(await client.ask(GET)) == b"ok"
        client.write(POST[:-2])
        await came.wait()
        assert error(await client.ask(POST[-2:]))["code"] == 502
        assert model.connections == 1


@pytest.mark.promise("E16a")
async def test_a_server_that_closes_idle_connections(tmp_path: Path) -> None:
    """E16: as uvicorn does after five seconds; a POST never meets such a connection."""
    close = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(OK)
        await close.wait()

    settings = {"proxy__upstream_keepalive": 600}
    async with (
        model_server(handler) as model,
        proxy(model.url, tmp_path, **settings) as p,
        connected(p.port) as client,
    ):
        for count in (1, 2, 3):
            client.write(POST[:-4])  # in two pieces, so that no second try could mend it
            client.write(b"ping")
            assert payload(await client.response()) == b"ok"
            assert model.connections == count
            close.set()
            await eventually(lambda: ": 0 connections, 0 idle" in repr(p.app.relay.pool))
            close.clear()


@pytest.mark.promise("E17a")
@pytest.mark.parametrize("extra", [b"x", b"\r\n", OK])
async def test_unexpected_bytes_end_an_idle_upstream_connection(extra: bytes, tmp_path: Path) -> None:
    """E17: they are nobody's answer."""
    more = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(head(b"HTTP/1.1 200 OK", b"Content-Length: 1") + b"%d" % model.connections)
        await more.wait()
        writer.write(extra)
        await reader.read()

    settings = {"proxy__upstream_keepalive": 600}
    async with (
        model_server(handler) as model,
        proxy(model.url, tmp_path, **settings) as p,
        connected(p.port) as client,
    ):
        assert payload(await client.ask(GET)) == b"1"
        more.set()
        await eventually(lambda: ": 0 connections, 0 idle" in repr(p.app.relay.pool))
        more.clear()
        assert payload(await client.ask(GET)) == b"2"


# --- the client's connection ---


@pytest.mark.promise("E17")
async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    """E17: bodies and all, however they are cut."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            body = payload(await read_message(reader))
            writer.write(head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body)) + body)

    bodies = [b"%d" % number * (number % 7) for number in range(60)]
    requests = b"".join(
        head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked")
        + (b"%x\r\n%b\r\n" % (len(body), body) if body else b"")
        + b"0\r\nX-T: 1\r\n\r\n"
        if number % 3 == 0
        else head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: %d" % len(body)) + body + b"\r\n" * (number % 2)
        for number, body in enumerate(bodies)
    )
    async with relayed(echo, tmp_path) as p:
        for step in (len(requests), 7, 997):
            async with connected(p.port) as client:
                for at in range(0, len(requests), step):
                    client.write(requests[at : at + step])
                    await asyncio.sleep(0)
                assert [payload(await client.response()) for _ in bodies] == bodies
        assert len(p.lines("request")) == 3 * len(bodies)


@pytest.mark.promise("C10", "E17a")
@pytest.mark.parametrize(
    ("request_", "connection", "open_"),
    [
        (GET, [], True),
        (CLOSING, [b"close"], False),
        (head(b"GET /a HTTP/1.0"), [b"close"], False),
        (head(b"GET /a HTTP/1.0", b"Connection: keep-alive"), [b"keep-alive"], True),
        (head(b"GET /a HTTP/1.1", b"Host: h", b"Connection: X, Close"), [b"close"], False),
    ],
)
async def test_keep_alive(request_: bytes, connection: list[bytes], open_: bool, tmp_path: Path) -> None:
    """C10, E17."""
    async with relayed(Script(), tmp_path) as p, connected(p.port) as client:
        got = await client.ask(request_)
        assert (payload(got), header(got, b"connection")) == (b"ok", connection)
        if open_:
            assert payload(await client.ask(request_)) == b"ok"
        else:
            assert await client.rest() == b""


@pytest.mark.usefixtures("quick_sweep")
async def test_idle_clients_are_closed_and_busy_ones_are_not(tmp_path: Path) -> None:
    """E: keepalive_timeout."""
    go = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        await go.wait()
        writer.write(OK)

    async with (
        relayed(handler, tmp_path, proxy__keepalive_timeout=0.1) as p,
        connected(p.port) as busy,
        connected(p.port) as idle,
    ):
        busy.write(GET)
        assert await idle.rest() == b""
        go.set()
        assert payload(await busy.response()) == b"ok"
        assert await busy.rest() == b""


@pytest.mark.promise("E14")
async def test_a_client_that_says_nothing_or_leaves_within_its_head(tmp_path: Path) -> None:
    """E14: nothing reaches the model server, nothing is recorded."""
    script = Script()
    async with relayed(script, tmp_path) as p:
        for part in (b"", b"GET /a HTT", GET[:-2]):
            async with connected(p.port) as client:
                client.write(part)
            await eventually(lambda: not p.app.relay.connections)
        assert (script.received, p.account().received) == ([], 0)


# --- the end ---


@pytest.mark.promise("E18")
async def test_drain_lets_exchanges_finish(tmp_path: Path) -> None:
    """E18: what runs is finished and says close, idle connections end, new ones are refused."""
    at_work, go = asyncio.Event(), asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read_message(reader)
            if b"/slow" in request:
                at_work.set()
                await go.wait()
            writer.write(OK)

    async with relayed(handler, tmp_path) as p, connected(p.port) as idle, connected(p.port) as busy:
        assert payload(await idle.ask(GET)) == b"ok"
        busy.write(GET.replace(b"/a", b"/slow"))
        await at_work.wait()
        draining = asyncio.create_task(p.app.relay.drain(5))
        assert await idle.rest() == b""
        with pytest.raises(ConnectionRefusedError):
            await exchange(p.port, GET)
        assert not draining.done()
        go.set()
        got = await busy.rest()
        assert (payload(got), header(got, b"connection")) == (b"ok", [b"close"])
        busy.writer.close()
        assert await draining == 0
        assert (await last_line(p))["capturestatus"] == "complete"


@pytest.mark.promise("E18")
async def test_drain_ends_a_stream_that_began_before_it(tmp_path: Path) -> None:
    """E18: whole, though its head did not say close."""
    go = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(CHUNKED + b"5\r\ntoken\r\n")
        await go.wait()
        writer.write(b"0\r\n\r\n")

    async with relayed(handler, tmp_path) as p, connected(p.port) as client:
        client.write(GET)
        await client.reader.readuntil(b"token\r\n")
        draining = asyncio.create_task(p.app.relay.drain(5))
        await eventually(lambda: p.app.relay.draining)
        go.set()
        assert await client.rest() == b"0\r\n\r\n"
        client.writer.close()
        assert await draining == 0


@pytest.mark.promise("C9", "E18")
async def test_drain_cuts_what_takes_too_long(tmp_path: Path) -> None:
    """E18, C9: as an abort; recorded as not complete, and the model server is told."""
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(head(b"HTTP/1.1 200 OK") + b"token")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async with relayed(handler, tmp_path) as p, connected(p.port) as client:
        client.write(GET)
        await client.reader.readuntil(b"token")
        assert await p.app.relay.drain(0.05) == 1
        with pytest.raises(ConnectionResetError):
            await client.rest()
        await gone.wait()
        assert (await last_line(p))["capturestatus"] != "complete"


@pytest.mark.promise("E18")
async def test_close_without_drain_leaves_nothing(tmp_path: Path) -> None:
    """E18: also when the block that runs the proxy fails; the leak check sees the rest."""
    socket_path = tmp_path / "p.sock"
    with pytest.raises(FileExistsError):
        async with relayed(Script(), tmp_path / "data", proxy__listen=f"unix:{socket_path}"):
            socket_path.touch(exist_ok=False)
    assert not socket_path.exists()


# --- unix sockets, TLS ---


@pytest.mark.promise("A2")
async def test_unix_sockets_on_both_sides(tmp_path: Path) -> None:
    """A2: a client without an address adds none."""
    script = Script()
    listen, upstream = tmp_path / "proxy.sock", tmp_path / "model.sock"
    async with model_server(script, unix_path=upstream):
        async with proxy(f"unix:{upstream}", tmp_path / "data", proxy__listen=f"unix:{listen}") as p:
            async with connected(0, unix_path=listen) as client:
                for _ in range(2):
                    assert payload(await client.ask(POST)) == b"ok"
            assert p.app.address == f"unix:{listen}"
        assert not listen.exists()
    assert header(script.received[0], b"x-forwarded-for") == []
    assert header(script.received[0], b"x-forwarded-proto") == [b"http"]
    assert header(script.received[0], b"host") == [b"h"]


@pytest.mark.promise("E15")
async def test_a_unix_upstream_that_is_not_there(tmp_path: Path) -> None:
    """E15."""
    async with proxy(f"unix:{tmp_path}/none.sock", tmp_path / "data") as p:
        assert error(await exchange(p.port, GET))["code"] == 502


def server_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    return context


@pytest.mark.promise("A2")
async def test_tls_on_both_sides(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """A2, E: trusted through upstream_ca; X-Forwarded-Proto says https; connections are reused."""
    script = Script()
    settings = {
        "proxy__upstream_ca": str(certificate[0]),
        "proxy__tls_certificate": str(certificate[0]),
        "proxy__tls_key": str(certificate[1]),
    }
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    async with (
        model_server(script, tls=server_context(certificate)) as model,
        proxy(model.url, tmp_path, **settings) as p,
    ):
        for _ in range(2):
            async with connected(p.port, tls=trust) as client:
                for _ in range(2):
                    assert payload(await client.ask(POST)) == b"ok"
        assert model.connections == 1
        assert header(script.received[0], b"x-forwarded-proto") == [b"https"]


@pytest.mark.promise("C10")
@pytest.mark.parametrize("request_", [CLOSING, head(b"GET /a HTTP/1.0")])
async def test_the_end_of_a_tls_connection_is_prompt(
    request_: bytes, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    """C10: TLS has no half-closed state to linger in; an answer that ends with its connection may not wait for one."""
    settings = {"proxy__tls_certificate": str(certificate[0]), "proxy__tls_key": str(certificate[1])}
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    async with relayed(Script(), tmp_path, **settings) as p, connected(p.port, tls=trust) as client:
        client.write(request_)
        await client.response()
        assert await asyncio.wait_for(client.rest(), 1) == b""


@pytest.mark.promise("C9")
async def test_a_broken_answer_over_tls_is_an_abort(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """C9."""
    settings = {"proxy__tls_certificate": str(certificate[0]), "proxy__tls_key": str(certificate[1])}
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    script = Script(head(b"HTTP/1.1 200 OK", b"Content-Length: 9") + b"hello", close=True)
    async with relayed(script, tmp_path, **settings) as p, connected(p.port, tls=trust) as client:
        client.write(head(b"GET /a HTTP/1.0"))
        await client.reader.readuntil(b"hello")
        with pytest.raises((ConnectionResetError, ssl.SSLError)):
            await client.rest()


@pytest.mark.promise("C9", "C10")
@pytest.mark.parametrize("goodbye", [True, False])
async def test_over_tls_a_body_until_close_ends_with_a_goodbye(
    goodbye: bool, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    """RFC 9112 §9.8: a FIN can be anybody's."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(head(b"HTTP/1.1 200 OK") + b"hello")
        if not goodbye:
            await reader.readexactly(1)
            with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as raw:
                raw.shutdown(socket.SHUT_WR)

    async with (
        model_server(handler, tls=server_context(certificate)) as model,
        proxy(model.url, tmp_path, proxy__upstream_verify=False) as p,
        connected(p.port) as client,
    ):
        client.write(GET)
        await client.reader.readuntil(b"hello")
        if not goodbye:
            (upstream,) = p.app.relay.pool._quiet_since
            upstream.write(b"x")
        with contextlib.nullcontext() if goodbye else pytest.raises(ConnectionResetError):
            assert await client.rest() == b""
        await p.recorded(2)
        assert p.lines("response")[0]["capturestatus"] == ("complete" if goodbye else "upstreamfailed")


@pytest.mark.promise("E15")
@pytest.mark.parametrize("verify", [True, False])
async def test_an_untrusted_upstream(verify: bool, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """E15: 502 that says why, unless the operator wants no check."""
    words = "no connection to the model server: its certificate is not trusted (self-signed certificate)"
    async with (
        model_server(Script(), tls=server_context(certificate)) as model,
        proxy(model.url, tmp_path, proxy__upstream_verify=verify) as p,
    ):
        got = await exchange(p.port, CLOSING)
        if verify:
            assert error(got)["message"] == words
            assert (await last_line(p))["statuscode"] == 502
        else:
            assert payload(got) == b"ok"


@pytest.mark.promise("E15")
async def test_an_https_upstream_that_speaks_plain_http(tmp_path: Path) -> None:
    """E15."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with model_server(handler) as model, proxy(model.url.replace("http:", "https:"), tmp_path) as p:
        assert error(await exchange(p.port, GET))["code"] == 502


@pytest.mark.promise("E16a")
async def test_a_tls_upstream_that_ignores_the_close(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """E16: an idle connection whose close is not answered must not end the sweep, and so every later time-out."""
    monkeypatch.setattr("proxy.relay.server.SWEEP_SECONDS", 0.02)
    settings = {"proxy__upstream_verify": False, "proxy__upstream_keepalive": 0.05, "proxy__upstream_idle_timeout": 0.1}
    deaf: list[asyncio.StreamWriter] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        if deaf:
            await reader.read()  # an answer that never comes
            return
        deaf.append(writer)
        writer.write(OK)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    async with (
        model_server(handler, tls=server_context(certificate)) as model,
        proxy(model.url, tmp_path, **settings) as p,
    ):
        async with connected(p.port) as client:
            assert payload(await client.ask(GET)) == b"ok"
            await eventually(lambda: ": 1 connections, 0 idle" in repr(p.app.relay.pool))
            assert error(await client.ask(GET))["code"] == 504
        deaf[0].transport.abort()
