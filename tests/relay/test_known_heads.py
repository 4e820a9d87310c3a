"""A head that comes again on its connection is not parsed again (docs/decisions/0006-known-heads.md), and nobody can tell."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path

import pytest

from tests.harness import model_server, proxy
from tests.relay.wire import OK, Script, connected, head, header, payload

REQUESTS = [
    head(b"GET /a HTTP/1.1", b"Host: h"),
    head(b"GET /b HTTP/1.1", b"Host: h"),
    head(b"GET /a HTTP/1.1", b"Host: i"),
    head(b"GET /a HTTP/1.1", b"Host: h", b"X-Request-Id: own-1"),
    head(b"GET /a HTTP/1.1", b"Host: h", b"X-Request-Id: own-2"),
    head(b"GET /a HTTP/1.1", b"Host: h", b"X-Request-Id: not valid"),
    head(b"GET /a HTTP/1.1", b"Host: h", b"Connection: x-hop", b"X-Hop: 1"),
    head(b"GET /a HTTP/1.1", b"Host: h", b"Connection: y-hop", b"X-Hop: 1"),
    head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 4") + b"ping",
    head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 4") + b"pong",
    head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 5") + b"pings",
    head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked") + b"4\r\nping\r\n0\r\n\r\n",
]
ANSWERS = [
    OK,
    OK.replace(b"ok", b"no"),
    OK.replace(b"200 OK", b"200 Ok"),
    head(b"HTTP/1.1 404 Not Found", b"Content-Length: 0"),
    head(b"HTTP/1.1 200 OK", b"X-Request-Id: theirs", b"Content-Length: 2") + b"ok",
    head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked") + b"2\r\nok\r\n0\r\n\r\n",
    head(b"HTTP/1.1 200 OK", b"Connection: x-hop", b"X-Hop: 1", b"Content-Length: 2") + b"ok",
    head(b"HTTP/1.1 204 No Content"),
]
OUR_ID = re.compile(rb"x-request-id: [0-9a-f-]{36}(?=\r\n)")


@pytest.mark.promise("A1", "A3", "A3a")
async def test_any_order_of_heads_is_treated_like_each_by_itself(tmp_path: Path) -> None:
    """A1–A5 hold for what is remembered: 400 exchanges over one connection each way, against fresh ones."""
    choice = random.Random(3).choice
    plan = [(choice(REQUESTS), choice(ANSWERS)) for _ in range(200)]
    plan += [one for one in plan[:100] for _ in range(2)]  # and each twice in a row
    served: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}
    ids: list[bytes] = []
    for known in (False, True):
        script = Script(*(answer for _, answer in plan))
        async with (
            model_server(script) as model,
            proxy(model.url, tmp_path / str(known), proxy__upstream_keepalive=600 if known else 0) as p,
        ):
            async with connected(p.port) as client:
                for request, answer in plan:
                    if known:
                        got = await client.ask(request)
                    else:
                        async with connected(p.port) as fresh:
                            got = await fresh.ask(request)
                    sent = script.received[-1]
                    ids += OUR_ID.findall(sent)
                    assert set(header(sent, b"x-request-id")) in ({b"own-1"}, {b"own-2"}, our_ids(sent))
                    if answer != ANSWERS[4]:
                        assert header(got, b"x-request-id") == header(sent, b"x-request-id")
                    pair = OUR_ID.sub(b"x-request-id: ID", sent), OUR_ID.sub(b"x-request-id: ID", got)
                    assert served.setdefault((request, answer), pair) == pair
            assert len(script.received) == len(plan)
            if known:
                assert model.connections == 1
    assert len(set(ids)) == len(ids), "an id was given twice"


def our_ids(message: bytes) -> set[bytes]:
    return {line.removeprefix(b"x-request-id: ") for line in OUR_ID.findall(message)}


@pytest.mark.promise("C10")
async def test_one_answer_serves_clients_of_both_versions(tmp_path: Path) -> None:
    """C10: the same head from the model server is written anew for another kind of client."""
    chunked = ANSWERS[5]
    async with (
        model_server(Script(chunked)) as model,
        proxy(model.url, tmp_path) as p,
        connected(p.port) as client,
    ):
        for _ in range(2):
            got = await client.ask(REQUESTS[0])
            assert header(got, b"transfer-encoding") == [b"chunked"]
            assert payload(got) == b"ok"
            async with connected(p.port) as old:
                old.write(head(b"GET /a HTTP/1.0", b"Host: h"))
                got = await old.rest()
                assert header(got, b"transfer-encoding") == []
                assert header(got, b"connection") == [b"close"]
                assert payload(got) == b"ok"
        assert model.connections == 1


@pytest.mark.promise("B6")
async def test_a_head_is_known_by_every_byte_in_any_pieces(tmp_path: Path) -> None:
    one, other = (head(b"GET /%b HTTP/1.1" % name, b"Host: h") for name in (b"same", b"some"))
    script = Script(OK)
    async with model_server(script) as model, proxy(model.url, tmp_path) as p, connected(p.port) as client:
        for request in (one, one, other, one, b"\r\n" + one, one + other, other[:20]):
            client.write(request)
            if request == other[:20]:
                await asyncio.sleep(0)
                client.write(other[20:])
            await client.response()
        await client.response()
    paths = [message.split(b" ")[1] for message in script.received]
    assert paths == [b"/same", b"/same", b"/some", b"/same", b"/same", b"/same", b"/some", b"/some"]
