"""What is left of one exchange, or of one direction of a connection, is never taken for something else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.harness import model_server
from tests.relay.wire import (
    GET,
    OK,
    Script,
    bare_relay,
    connected,
    eventually,
    header,
    payload,
    read_message,
    relayed,
)


def code(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.promise("E17a")
async def test_bytes_that_the_loop_has_not_read_yet_are_not_the_next_answer() -> None:
    """They wait in the kernel when the connection is taken again."""
    writers: list[asyncio.StreamWriter] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while True:
            await read_message(reader)
            writer.write(OK)

    async with model_server(handler) as model, bare_relay(model.url) as (relay, port), connected(port) as client:
        assert payload(await client.ask(GET)) == b"ok"
        await eventually(lambda: relay.pool._idle)
        (idle,) = relay.pool._idle
        assert idle.transport is not None
        idle.transport.pause_reading()
        writers[0].write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON")
        await eventually(lambda: not idle.is_quiet())
        assert payload(await client.ask(GET)) == b"ok"
        assert model.connections == 2
        await eventually(lambda: relay.pool.open_connections == 1)


@pytest.mark.promise("E16", "F20")
async def test_a_stale_connection_that_an_upgrade_was_sent_on_is_closed() -> None:
    """It may end by halves, for the tunnel that could have come."""
    ended = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal ended
        await read_message(reader)
        writer.write(OK)
        if b"upgrade" in (await read_message(reader)).lower():
            ended += 1

    upgrade = b"GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with model_server(handler) as model, bare_relay(model.url) as (relay, port):
        for number in range(1, 4):
            async with connected(port) as client:
                await client.ask(GET)
                await eventually(lambda: relay.pool._idle)
                assert code(await client.ask(upgrade)) == 200
                assert ended == number
            await eventually(lambda: relay.pool.open_connections == 0)


@pytest.mark.promise("C9")
@pytest.mark.parametrize(
    ("version", "answer"),
    [
        (b"1.0", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\npart1\r\n"),
        (b"1.1", b"HTTP/1.1 200 OK\r\n\r\npart1"),
    ],
)
async def test_who_ends_its_side_gets_no_part_that_looks_whole(version: bytes, answer: bytes) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(answer)
        await reader.read()

    async with model_server(handler) as model, bare_relay(model.url) as (_, port), connected(port) as client:
        client.write(b"GET /a HTTP/%b\r\nHost: h\r\n\r\n" % version)
        assert (await client.reader.readuntil(b"part1")).endswith(b"part1")
        client.writer.write_eof()
        with pytest.raises(ConnectionResetError):
            await client.rest()


@pytest.mark.promise("G21")
@pytest.mark.parametrize(
    "sent",
    [
        b"\n\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n",
        b"\r\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
)
async def test_what_servers_read_in_different_ways_is_refused(sent: bytes, tmp_path: Path) -> None:
    script = Script()
    async with relayed(script, tmp_path) as p, connected(p.port) as client:
        assert code(await client.ask(sent)) == 400
    assert script.received == []


@pytest.mark.promise("A3")
async def test_one_of_several_request_ids_is_not_the_id(tmp_path: Path) -> None:
    script = Script()
    async with relayed(script, tmp_path) as p, connected(p.port) as client:
        answer = await client.ask(
            b"GET /a HTTP/1.1\r\nHost: h\r\nx-request-id: a\r\nX-Request-ID: %b\r\n\r\n" % (b"z" * 120)
        )
    (passed,) = header(script.received[0], b"x-request-id")
    assert passed not in (b"a", b"z" * 120)
    assert header(answer, b"x-request-id") == [passed]
