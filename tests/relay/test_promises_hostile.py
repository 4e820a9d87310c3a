"""Requests and answers that two readers could read in two ways."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from tests.harness import exchange, model_server, proxy
from tests.relay.wire import (
    GET,
    OK,
    POST,
    Client,
    Script,
    bare_relay,
    connected,
    eventually,
    head,
    header,
    payload,
    read_message,
)

NEXT = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
POST_LINE = b"POST /a HTTP/1.1\r\nHost: h\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
NOTHING = b"0\r\n\r\n"


def codes(answers: bytes) -> list[int]:
    """Of each answer; errors quote nothing that looks like a status line."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def code(answer: bytes) -> int:
    (one,) = codes(answer)
    return one


FRAMINGS = {
    "CL and TE": [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
    "TE and CL": [b"Transfer-Encoding: chunked", b"Content-Length: 5"],
    "TE and CL 0": [b"Transfer-Encoding: chunked", b"Content-Length: 0"],
    "TE twice": [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
    "TE, then identity": [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
    "identity, then TE": [b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"],
    "two in one": [b"Transfer-Encoding: chunked, chunked"],
    "identity": [b"Transfer-Encoding: identity"],
    "identity and CL": [b"Transfer-Encoding: identity", b"Content-Length: 5"],
    "xchunked": [b"Transfer-Encoding: xchunked"],
    "chunkedx": [b"Transfer-Encoding: chunkedx"],
    "gzip": [b"Transfer-Encoding: gzip"],
    "gzip first": [b"Transfer-Encoding: gzip, chunked"],
    "gzip last": [b"Transfer-Encoding: chunked, gzip"],
    "empty TE": [b"Transfer-Encoding:"],
    "empty item": [b"Transfer-Encoding: ,chunked"],
    "quoted": [b'Transfer-Encoding: "chunked"'],
    "parameter": [b"Transfer-Encoding: chunked;a=b"],
    "two words": [b"Transfer-Encoding: chunked x"],
    "vertical tab before": [b"Transfer-Encoding: \x0bchunked"],
    "form feed behind": [b"Transfer-Encoding: chunked\x0c"],
    "NUL behind": [b"Transfer-Encoding: chunked\x00"],
    "high byte": [b"Transfer-Encoding: chunked\xa0"],
    "long s": ["Transfer-Encoding: chunked\u0131".encode()],
    "blank before the colon": [b"Transfer-Encoding : chunked"],
    "tab before the colon": [b"Transfer-Encoding\t: chunked"],
    "folded": [b"Transfer-Encoding:", b" chunked"],
    "folded with a tab": [b"A: b", b"\tTransfer-Encoding: chunked"],
    "folded first": [b" Transfer-Encoding: chunked"],
    "two lengths": [b"Content-Length: 5", b"Content-Length: 6"],
    "the same length twice": [b"Content-Length: 5", b"Content-Length: 5"],
    "lengths in a list": [b"Content-Length: 5,5"],
    "lengths in a list with a blank": [b"Content-Length: 5, 6"],
    "empty length": [b"Content-Length:"],
    "length with a plus": [b"Content-Length: +5"],
    "negative length": [b"Content-Length: -1"],
    "hexadecimal length": [b"Content-Length: 0x5"],
    "length with an underscore": [b"Content-Length: 1_0"],
    "length with a point": [b"Content-Length: 5.0"],
    "length with an exponent": [b"Content-Length: 5e0"],
    "length with a letter": [b"Content-Length: 5a"],
    "two numbers": [b"Content-Length: 5 5"],
    "digits of another script": ["Content-Length: ٥".encode()],
    "length over 64 bits": [b"Content-Length: 18446744073709551621"],
    "length over 63 bits": [b"Content-Length: 9223372036854775813999"],
    "length of 100 digits": [b"Content-Length: " + b"9" * 100],
    "blank before the colon of a length": [b"Content-Length : 5"],
    "folded length": [b"Content-Length:", b" 5"],
}


@pytest.mark.promise("G21")
@pytest.mark.parametrize("lines", FRAMINGS.values(), ids=FRAMINGS)
async def test_odd_framing_is_refused_and_nothing_passes(lines: list[bytes], tmp_path: Path) -> None:
    """Not the request, not what could be taken for another one behind it; and the connection ends."""
    async with model_server(Script()) as model, proxy(model.url, tmp_path) as p:
        for behind in (b"", NOTHING + NEXT, b"hello" + NEXT):
            got = await exchange(p.port, head(b"POST /a HTTP/1.1", b"Host: h", *lines) + behind)
            assert code(got) in (400, 501)
            assert header(got, b"connection") == [b"close"]
        assert model.connections == 0


@pytest.mark.promise("G21")
@pytest.mark.parametrize(
    "lines",
    [
        [b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 5"],
        [b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: chunked", b"Connection: keep-alive"],
    ],
)
async def test_an_http_1_0_request_has_no_transfer_coding(lines: list[bytes], tmp_path: Path) -> None:
    async with model_server(Script()) as model, proxy(model.url, tmp_path) as p:
        got = await exchange(p.port, head(b"POST /a HTTP/1.0", b"Host: h", *lines) + NOTHING + NEXT)
        assert code(got) in (400, 501)
        assert model.connections == 0


HEADS = {
    "bare LF behind the request line": b"GET /a HTTP/1.1\nHost: h\r\n\r\n",
    "bare LF behind a header": b"GET /a HTTP/1.1\r\nHost: h\nA: b\r\n\r\n",
    "bare CR behind the request line": b"GET /a HTTP/1.1\rHost: h\r\n\r\n",
    "bare CR behind a header": b"GET /a HTTP/1.1\r\nHost: h\rA: b\r\n\r\n",
    "CR CR LF": b"GET /a HTTP/1.1\r\nHost: h\r\r\nA: b\r\n\r\n",
    "LF CR": b"GET /a HTTP/1.1\r\nHost: h\n\rA: b\r\n\r\n",
    "NUL in a value": b"GET /a HTTP/1.1\r\nHost: h\r\nA: b\x00c\r\n\r\n",
    "NUL in a name": b"GET /a HTTP/1.1\r\nHost: h\r\nA\x00: b\r\n\r\n",
    "NUL in the target": b"GET /a\x00 HTTP/1.1\r\nHost: h\r\n\r\n",
    "blank before the colon": b"GET /a HTTP/1.1\r\nHost : h\r\n\r\n",
    "blank in a name": b"GET /a HTTP/1.1\r\nHost: h\r\nA b: c\r\n\r\n",
    "no name": b"GET /a HTTP/1.1\r\nHost: h\r\n: c\r\n\r\n",
    "no colon": b"GET /a HTTP/1.1\r\nHost: h\r\nA\r\n\r\n",
    "high byte in a name": b"GET /a HTTP/1.1\r\nHost: h\r\n\xc3\xa9: c\r\n\r\n",
    "brackets in a name": b"GET /a HTTP/1.1\r\nHost: h\r\nA(b): c\r\n\r\n",
    "folded": b"GET /a HTTP/1.1\r\nHost: h\r\nA: b\r\n c\r\n\r\n",
    "folded with a tab": b"GET /a HTTP/1.1\r\nHost: h\r\nA: b\r\n\tc\r\n\r\n",
    "folded to nothing": b"GET /a HTTP/1.1\r\nHost: h\r\nA: b\r\n \r\n\r\n",
    "blank before the first header": b"GET /a HTTP/1.1\r\n Host: h\r\n\r\n",
    "blank before the request line": b" GET /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "two blanks behind the method": b"GET  /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "two blanks before the version": b"GET /a  HTTP/1.1\r\nHost: h\r\n\r\n",
    "a tab behind the method": b"GET\t/a HTTP/1.1\r\nHost: h\r\n\r\n",
    "blank in the target": b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
    "blank behind the version": b"GET /a HTTP/1.1 \r\nHost: h\r\n\r\n",
    "something behind the version": b"GET /a HTTP/1.1 x\r\nHost: h\r\n\r\n",
    "no version": b"GET /a\r\nHost: h\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: h\r\n\r\n",
    "HTTP/1.2": b"GET /a HTTP/1.2\r\nHost: h\r\n\r\n",
    "HTTP/1.10": b"GET /a HTTP/1.10\r\nHost: h\r\n\r\n",
    "HTTP/01.1": b"GET /a HTTP/01.1\r\nHost: h\r\n\r\n",
    "HTTP/0.9": b"GET /a HTTP/0.9\r\nHost: h\r\n\r\n",
    "HTTP/2.0": b"GET /a HTTP/2.0\r\nHost: h\r\n\r\n",
    "http/1.1": b"GET /a http/1.1\r\nHost: h\r\n\r\n",
    "RTSP": b"GET /a RTSP/1.1\r\nHost: h\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no Host": b"GET /a HTTP/1.1\r\nA: b\r\n\r\n",
    "two Hosts": b"GET /a HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n",
}


@pytest.mark.promise("G21")
@pytest.mark.parametrize("request_", HEADS.values(), ids=HEADS)
async def test_odd_heads_are_refused_and_nothing_passes(request_: bytes, tmp_path: Path) -> None:
    """Also behind a good request, byte by byte, and with a body's length."""
    async with model_server(Script()) as model, proxy(model.url, tmp_path) as p:
        with_length = request_[:-2] + b"Content-Length: 5\r\n\r\nhello" if b"SM" not in request_ else request_
        for sent in (request_, request_ + NEXT, with_length + NEXT):
            got = await exchange(p.port, sent)
            assert code(got) in (400, 501, 505), sent
            assert header(got, b"connection") == [b"close"]
        async with connected(p.port) as client:
            for at in range(len(request_)):
                client.write(request_[at : at + 1])
                await asyncio.sleep(0)
            assert code(await client.response()) in (400, 501, 505)
        assert model.connections == 0
        assert codes(await exchange(p.port, GET + request_ + NEXT)) in ([200, 400], [200, 505])
        assert model.connections == 1


CHUNKS = {
    "plus": b"+5\r\nhello\r\n",
    "0x": b"0x5\r\nhello\r\n",
    "minus": b"-5\r\nhello\r\n",
    "17 digits": b"00000000000000005\r\nhello\r\n",
    "17 digits that overflow": b"1" + b"0" * 15 + b"5\r\nhello\r\n",
    "blank before": b" 5\r\nhello\r\n",
    "blank behind": b"5 \r\nhello\r\n",
    "bare LF": b"5\nhello\r\n",
    "bare LF behind the data": b"5\r\nhello\n0\n\n",
    "bare CR": b"5\rhello\r\n",
    "longer": b"5\r\nhello!\r\n",
    "shorter": b"5\r\nhell\r\n",
    "LF in an extension": b"5;a\n\r\nhello\r\n",
    "NUL in an extension": b"5;\x00\r\nhello\r\n",
    "one long extension": b"5;" + b"a" * 5000 + b"\r\nhello\r\n",
    "an extension without an end": b"5;" + b"a" * 100_000,
    "many extensions": (b"1;" + b"a" * 1000 + b"\r\nx\r\n") * 100,
    "many small extensions": b"1;a\r\nx\r\n" * 20_000,
    "one long trailer": b"0\r\nA: " + b"b" * 50_000 + b"\r\n\r\n",
    "many trailers": b"0\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    "trailers without an end": b"0\r\n" + b"A: b\r\n" * 20_000,
    "a request for trailers": NOTHING[:3] + NEXT,
    "folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "CR in a trailer": b"0\r\nA: b\rc\r\n\r\n",
    "NUL in a trailer": b"0\r\nA: \x00\r\n\r\n",
}


@pytest.mark.promise("G21", "G21a", "A4a")
@pytest.mark.parametrize("body", CHUNKS.values(), ids=CHUNKS)
async def test_odd_chunks_are_refused_and_the_body_never_ends(body: bytes, tmp_path: Path) -> None:
    """However much of it has passed by then, the model server is never told that the body is whole."""
    passed: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed.append(b"")
        try:
            while data := await reader.read(65536):
                passed[-1] += data
        except ConnectionResetError:
            pass

    async with model_server(handler) as model, proxy(model.url, tmp_path) as p:
        got = await exchange(p.port, POST_LINE + CHUNKED + b"\r\n" + body + NOTHING + NEXT)
        assert code(got) == 400
        assert header(got, b"connection") == [b"close"]
        await p.recorded(2)
        assert p.lines("request")[0]["capturestatus"] == "requestrefused"
        assert model.connections <= 1
    for seen in passed:
        assert b"\r\n0\r\n" not in seen.partition(b"\r\n")[2]
        assert b"smuggled" not in seen


# --- G21c: many at once ---


@pytest.mark.promise("G21c", "E17", "D13")
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "reads nothing at first"])
async def test_ten_thousand_pipelined_requests(reads: bool) -> None:
    """In order and one at a time; while the client reads none of the answers, the relay takes in no more requests."""
    count, size = 10_000, 10_000
    at_once = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal at_once
        while True:
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
            at_once += 1
            assert at_once == 1
            writer.write(head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % size) + path.ljust(size))
            at_once -= 1

    async def send(client: Client) -> None:
        filler = b"X: " + b"x" * 500
        for number in range(count):
            client.write(head(b"GET /%d HTTP/1.1" % number, b"Host: h", filler))
            await client.writer.drain()

    async with model_server(handler) as model, bare_relay(model.url) as (relay, port):
        async with connected(port, seconds=100) as client:
            if not reads:
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            sending = asyncio.create_task(send(client))
            await eventually(lambda: relay.connections)
            (one,) = relay.connections
            if not reads:
                await eventually(lambda: one._writing_paused and one._reading_paused)
                assert one.transport is not None
                assert one._received_bytes + one.transport.get_write_buffer_size() < 2**20
                client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            for number in range(count):
                assert payload(await client.response()).rstrip() == b"/%d" % number
            await sending
        assert model.connections == 1
        assert not relay.faults


# --- G22: answers ---

ANSWERS = {
    "CL and TE": [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
    "two lengths": [b"Content-Length: 5", b"Content-Length: 6"],
    "the same length twice": [b"Content-Length: 0", b"Content-Length: 0"],
    "lengths in a list": [b"Content-Length: 0, 0"],
    "length with a plus": [b"Content-Length: +0"],
    "length over 64 bits": [b"Content-Length: " + b"9" * 22],
    "unknown coding": [b"Transfer-Encoding: gzip, chunked"],
    "coding twice": [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
    "identity": [b"Transfer-Encoding: identity"],
    "folded": [b"A: b", b" c"],
    "blank before the colon": [b"Content-Length : 5"],
    "bare CR": [b"A: b\rContent-Length: 5"],
    "bare LF": [b"A: b\nContent-Length: 5"],
}


@pytest.mark.promise("G22")
@pytest.mark.parametrize("lines", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize(
    ("method", "start"),
    [
        (b"HEAD", b"200 OK"),
        (b"GET", b"204 No Content"),
        (b"GET", b"304 Not Modified"),
        (b"GET", b"100 Continue"),
        (b"GET", b"103 Early Hints"),
        (b"POST", b"500 Internal Server Error"),
    ],
)
async def test_heads_of_answers_without_a_body_are_checked_too(
    method: bytes, start: bytes, lines: list[bytes], tmp_path: Path
) -> None:
    script = Script(head(b"HTTP/1.1 " + start, *lines) + OK, OK)
    async with model_server(script) as model, proxy(model.url, tmp_path) as p:
        got = await exchange(
            p.port, POST.replace(b"POST", method) if method == b"POST" else GET.replace(b"GET", method)
        )
        assert code(got) == 502
        assert payload(await exchange(p.port, GET, until_close=False)) == b"ok"
        assert model.connections == 2


@pytest.mark.promise("G22", "C9")
@pytest.mark.parametrize("body", [body for name, body in CHUNKS.items() if "without" not in name], ids=lambda b: b[:20])
async def test_odd_chunks_of_an_answer_never_look_whole(body: bytes, tmp_path: Path) -> None:
    answer = head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked")
    go_on = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(answer + b"2\r\nok\r\n")
        await go_on.wait()
        writer.write(body + NOTHING)
        await reader.read()

    async with model_server(handler) as model, proxy(model.url, tmp_path) as p, connected(p.port) as client:
        client.write(GET)
        await client.reader.readuntil(b"ok\r\n")
        go_on.set()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        await p.recorded(2)
        assert p.lines("response")[0]["capturestatus"] == "upstreamfailed"
