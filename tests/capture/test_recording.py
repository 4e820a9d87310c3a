"""What the running proxy records of what passes: real sockets on both sides, real files behind."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import socket
import tempfile
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.capture.policy import sample_position
from tests.capture.traffic import body_file, checked, only, pair, request, response, send
from tests.harness import Proxy, answers, exchange, model_server, proxy, read_request

JSON = "application/json"
OK = response(b"[1]")
MIB = 1024 * 1024


@contextlib.asynccontextmanager
async def proxied(tmp_path: Path, *responses: bytes, **overrides: Any) -> AsyncIterator[Proxy]:
    """The proxy before a model that gives these answers in turn."""
    async with model_server(answers(*(responses or (OK,)))) as model, proxy(model.url, tmp_path, **overrides) as p:
        yield p


# --- payloads ---

BOM = "\ufeff"
BINARY = object()
PAYLOADS = [
    # body, Content-Type, data, datacontenttype (if it is not the header)
    (b'{"b": 1.50, "a":\r\n [1e2, "\xc3\xa9\\u00e9"]}\n', JSON, {"b": 1.5, "a": [100.0, "éé"]}, None),
    (b"[1,\n2]", "application/vnd.x+json; charset=utf-8", [1, 2], None),
    (b"null", JSON, None, None),
    (b'"text"', JSON, "text", None),
    (b"{oops\r\n", JSON, "{oops\r\n", None),
    (BOM.encode() + b"[1]", JSON, BOM + "[1]", None),
    (b'["\\ud800"]', JSON, '["\\ud800"]', None),
    (b'["\xff"]', JSON, BINARY, None),
    (b"line\r\nline\x00", "text/plain", "line\r\nline\x00", None),
    ("caf\xe9".encode("latin-1"), "text/plain; charset=iso-8859-1", "café", None),
    (b"caf\xe9", "text/plain", BINARY, None),
    (b"x", "text/plain; charset=zlib", "x", None),
    (b"a=1&b=%20", "application/x-www-form-urlencoded", "a=1&b=%20", None),
    (b"data: a\n\ndata: b\n\n", "text/event-stream", "data: a\n\ndata: b\n\n", None),
    (b"plain after all\n", "application/octet-stream", "plain after all\n", None),
    (b"\x89PNG\r\n\x1a\n\x00", "image/png", BINARY, None),
    (b"--b\r\n\r\n\x00\x01\r\n--b--", "multipart/form-data; boundary=b", BINARY, None),
    (b' {"a": 1}', None, {"a": 1}, JSON),
    (b"hello", None, "hello", "text/plain"),
    (b"\x00\x01", None, BINARY, "application/octet-stream"),
    (b"", JSON, None, JSON),
    (b"", "text/plain", None, "text/plain"),
    (b"", None, None, JSON),
]


@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
@pytest.mark.parametrize(("body", "content_type", "data", "found_type"), PAYLOADS)
async def test_a_body_stands_in_its_line(
    tmp_path: Path, body: bytes, content_type: str | None, data: Any, found_type: str | None, chunked: bool
) -> None:
    async with proxied(tmp_path, response(body, content_type, chunked=chunked)) as p:
        await send(p, body, content_type, chunked=chunked)
        for event in await pair(p):
            assert event["datacontenttype"] == (found_type or content_type)
            total = "*" if chunked else len(body)
            assert event["contentrange"] == (f"bytes 0-{len(body) - 1}/{total}" if body else "bytes */0")
            assert (event["capturestatus"], event["bodybytes"]) == ("complete", len(body))
            if data is BINARY:
                file = body_file(event)
                assert file.read_bytes() == body
                assert (file.name, file.suffix) == (event["id"], "")
                collection = event["type"].rpartition(".")[2]
                assert file.parent == next(path for path in p.files(collection) if path.suffix == ".jsonl").parent
            else:
                assert event["data"] == data
                assert "datainblob" not in event
        if data is not BINARY and content_type == JSON and isinstance(data, dict):
            assert body.replace(b"\r\n", b"").strip() in p.raw_lines("request")[0]


BODIES = st.binary(max_size=300) | st.sampled_from([body for body, *_ in PAYLOADS]) | st.text().map(str.encode)
TYPES = st.sampled_from([content_type for _, content_type, *_ in PAYLOADS]) | st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters="\x7f"), min_size=1
)
ENCODINGS = st.sampled_from([None, None, None, "gzip", "deflate", "br", "zstd", "gzip, br", "identity", "utf-8", "x,y"])


@settings(deadline=None, max_examples=12)
@given(sent=st.lists(st.tuples(BODIES, TYPES, ENCODINGS, st.booleans()), min_size=1, max_size=25))
def test_any_bytes_of_any_type_and_coding(sent: list[tuple[bytes, str | None, str | None, bool]]) -> None:
    """Each gives a valid line; what is in no line is, byte for byte, in a file."""

    async def all_of_it(folder: Path) -> None:
        async with proxied(folder) as p:
            for number, (body, content_type, encoding, chunked) in enumerate(sent):
                coded = () if encoding is None else (("Content-Encoding", encoding),)
                await send(p, body, content_type, ("x-request-id", str(number)), *coded, chunked=chunked)
            assert p.account().delivered == 2 * len(sent)
            events = {int(event["correlationid"]): event for event in map(checked, p.raw_lines("request"))}
        for number, (body, _, encoding, _) in enumerate(sent):
            event = events[number]
            assert event["bodybytes"] == len(body)
            if "datainblob" in event:
                assert body_file(event).read_bytes() == body
            elif not body:
                assert event["data"] is None
            elif encoding is None:
                assert event["contentrange"].startswith(f"bytes 0-{len(body) - 1}/")

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(all_of_it(Path(folder)))


# --- Content-Encoding ---


def stored_zstd(body: bytes) -> bytes:
    """A zstd frame with the body as it is: no compressor needed."""
    return b"\x28\xb5\x2f\xfd\x20" + bytes([len(body)]) + (len(body) << 3 | 1).to_bytes(3, "little") + body


CODED = b'{"data":\n [1.50, "\xc3\xa9"]}'
CODINGS = [
    (["gzip"], gzip.compress(CODED)),
    (["X-GZIP"], gzip.compress(CODED)),
    (["gzip"], gzip.compress(CODED[:9]) + gzip.compress(CODED[9:])),
    (["deflate"], zlib.compress(CODED)),
    (["deflate"], zlib.compress(CODED, wbits=-15)),
    (["br"], brotli.compress(CODED)),
    (["zstd"], stored_zstd(CODED)),
    (["gzip, br"], brotli.compress(gzip.compress(CODED))),
    (["gzip", "br"], brotli.compress(gzip.compress(CODED))),
    (["identity"], CODED),
    (["utf-8"], CODED),
]


@pytest.mark.promise("C7a")
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
@pytest.mark.parametrize(("encodings", "packed"), CODINGS)
async def test_the_copy_is_decoded_the_traffic_is_not(
    tmp_path: Path, encodings: list[str], packed: bytes, chunked: bool
) -> None:
    seen: list[bytes] = []
    headers = [("Content-Encoding", encoding) for encoding in encodings]
    answer = response(packed, JSON, *headers, chunked=chunked)

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await read_request(reader))
        writer.write(answer)

    async with model_server(model) as server, proxy(server.url, tmp_path) as p:
        sent = request(packed, JSON, *headers, chunked=chunked)
        got = await exchange(p.port, sent)
        assert payload(sent) == payload(seen[0] + seen[1]) == payload(got) == packed
        for event in await pair(p):
            assert event["data"] == {"data": [1.5, "é"]}
            assert event["capturestatus"] == "complete"
            assert event["contentencoding"] == ", ".join(encodings)
            assert event["bodybytes"] == len(packed)
            assert event["contentrange"] == f"bytes 0-{len(CODED) - 1}/{'*' if chunked else len(CODED)}"
        assert b'"data":{"data": [1.50, "\xc3\xa9"]},' in p.raw_lines("request")[0]


def payload(message: bytes) -> bytes:
    """The body of a message, without its framing."""
    head, _, body = message.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return body
    found = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        found, body = found + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return found


@pytest.mark.promise("C7a")
@pytest.mark.parametrize(
    ("packed", "content_type", "data"),
    [
        (gzip.compress(CODED)[:-1], JSON, BINARY),
        (gzip.compress(CODED) + b"\x00\x01", JSON, BINARY),
        (b"\x00garbage", JSON, BINARY),
        (gzip.compress(bytes(3 * MIB)), JSON, BINARY),  # over max_decoded_bytes
        (gzip.compress(b"x" * 3 * MIB), "text/plain; charset=latin-1", BINARY),
        (CODED, JSON, {"data": [1.5, "é"]}),  # not packed at all, as careless clients send it
        (b"not packed", "text/plain", "not packed"),
    ],
    ids=["cut", "more", "garbage", "bomb", "bomb as text", "plain JSON", "plain text"],
)
async def test_what_can_not_be_decoded_is_kept_as_it_was_sent(
    tmp_path: Path, packed: bytes, content_type: str, data: Any
) -> None:
    async with proxied(tmp_path, capture__max_decoded_bytes=2 * MIB, capture__max_inline_bytes=MIB) as p:
        await send(p, packed, content_type, ("Content-Encoding", "gzip"))
        event, _ = await pair(p)
        assert event["capturestatus"] == "undecodable"
        assert (event["datacontenttype"], event["contentencoding"]) == (content_type, "gzip")
        assert event["contentrange"] == f"bytes 0-{len(packed) - 1}/{len(packed)}"
        if data is BINARY:
            assert body_file(event).read_bytes() == packed
        else:
            assert event["data"] == data


@pytest.mark.parametrize("content_type", [JSON, "text/plain", None])
async def test_nothing_packed_is_nothing(tmp_path: Path, content_type: str | None) -> None:
    async with proxied(tmp_path) as p:
        await send(p, gzip.compress(b""), content_type, ("Content-Encoding", "gzip"))
        event, _ = await pair(p)
        assert (event["data"], event["contentrange"], event["capturestatus"]) == (None, "bytes */0", "complete")


@pytest.mark.parametrize(("content_type", "name"), [(JSON, "{id}.jsonl"), ("image/bmp", "{id}")])
async def test_what_is_too_large_for_a_line_once_it_is_decoded(tmp_path: Path, content_type: str, name: str) -> None:
    body = b"[" + b"0, " * 40_000 + b"0]"
    async with proxied(tmp_path, capture__max_inline_bytes="64KiB") as p:
        await send(p, gzip.compress(body), content_type, ("Content-Encoding", "gzip"))
        event, _ = await pair(p)
        assert body_file(event).read_bytes() == body
        assert body_file(event).name == name.format(id=event["id"])
        assert event["contentrange"] == f"bytes 0-{len(body) - 1}/{len(body)}"
        assert (event["capturestatus"], event["bodybytes"]) == ("complete", len(gzip.compress(body)))


# --- large bodies ---

LARGE = b"[" + b"12345678," * 20_000 + b"1]"


@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
@pytest.mark.parametrize(
    ("content_type", "encoding", "large"),
    [
        (JSON, None, True),
        ("text/csv", None, True),
        (JSON, "identity", True),
        ("image/bmp", None, False),
        (None, None, False),
        (JSON, "gzip", False),
    ],
)
async def test_a_large_body_goes_to_a_file_of_its_own(
    tmp_path: Path, content_type: str | None, encoding: str | None, large: bool, chunked: bool
) -> None:
    coded = [("Content-Encoding", encoding)] if encoding else []
    answer = response(LARGE, content_type, *coded, chunked=chunked)
    async with proxied(tmp_path, answer, capture__max_inline_bytes="64KiB") as p:
        got = await send(p, LARGE, content_type, *coded, chunked=chunked)
        assert payload(got) == LARGE
        for event in await pair(p):
            file = body_file(event)
            assert file.read_bytes() == LARGE
            assert event["contentrange"] == f"bytes 0-{len(LARGE) - 1}/{'*' if chunked else len(LARGE)}"
            assert (event["capturestatus"], event["bodybytes"]) == ("complete", len(LARGE))
            collection = event["type"].rpartition(".")[2]
            lines = next(path for path in p.files(collection) if path.suffix == ".jsonl")
            deployment = tmp_path / "local-endpoint" / "default"
            rolled_time = lines.parent.relative_to(deployment / collection)
            if large:
                assert file == deployment / rolled_time / f"{event['id']}.jsonl"
            else:
                assert file == deployment / collection / rolled_time / event["id"]


@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
async def test_a_large_body_is_not_held(tmp_path: Path, chunked: bool) -> None:
    """One that is announced goes to its file from the first byte, another one when it outgrows its line."""
    pieces = [bytes([letter]) * 1000 for letter in b"abcde"]
    came: asyncio.Queue[bytes] = asyncio.Queue()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            await reader.readuntil(piece)
            await came.put(piece)
        if chunked:
            await reader.readuntil(b"0\r\n\r\n")
        writer.write(OK)
        await reader.read(-1)

    async with model_server(model) as server, proxy(server.url, tmp_path, capture__max_inline_bytes=2500) as p:
        head, _, _ = request(b"".join(pieces), "text/plain", chunked=chunked).partition(b"\r\n\r\n")
        framed = [b"3e8\r\n%b\r\n" % piece for piece in pieces] if chunked else pieces
        reader, writer = await asyncio.open_connection("127.0.0.1", p.port)
        writer.write(head + b"\r\n\r\n")
        held = []
        for piece, sent in zip(pieces, framed, strict=True):
            writer.write(sent)
            assert await came.get() == piece
            held.append(p.app.relay.recorder.spool.memory.held_bytes)  # type: ignore[attr-defined]
        writer.write(b"0\r\n\r\n" if chunked else b"")
        await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        assert held == ([1000, 2000, 0, 0, 0] if chunked else [0, 0, 0, 0, 0])
        event, _ = await pair(p)
        assert body_file(event).read_bytes() == b"".join(pieces)
        assert event["capturestatus"] == "complete"


@pytest.mark.parametrize(
    ("size", "in_line"), [(0, True), (1, True), (1023, True), (1024, True), (1025, False), (5000, False)]
)
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
async def test_the_limit_of_a_line_is_exact(tmp_path: Path, size: int, in_line: bool, chunked: bool) -> None:
    async with proxied(tmp_path, capture__max_inline_bytes=1024) as p:
        await send(p, b"x" * size, "text/plain", chunked=chunked)
        event, _ = await pair(p)
        assert ("datainblob" not in event) == in_line
        assert (event["data"] or "" if in_line else body_file(event).read_text()) == "x" * size


@pytest.mark.promise("C11a")
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
@pytest.mark.parametrize("inline_bytes", [MIB, 500, 0])
@pytest.mark.parametrize(("limit", "kept"), [(1000, 1000), (len(LARGE), len(LARGE))])
async def test_a_body_over_the_capture_limit_is_cut(
    tmp_path: Path, limit: int, kept: int, inline_bytes: int, chunked: bool
) -> None:
    overrides = {"capture__max_body_bytes": limit, "capture__max_inline_bytes": inline_bytes}
    async with proxied(tmp_path, response(LARGE, "text/plain", chunked=chunked), **overrides) as p:
        assert payload(await send(p, LARGE, "text/plain", chunked=chunked)) == LARGE  # the traffic is never cut
        for event in await pair(p):
            found = body_file(event).read_bytes() if "datainblob" in event else event["data"].encode()
            assert found == LARGE[:kept]
            assert event["capturestatus"] == ("complete" if kept == len(LARGE) else "truncated")
            assert event["bodybytes"] == len(LARGE)
            assert event["contentrange"] == f"bytes 0-{kept - 1}/{'*' if chunked else len(LARGE)}"


async def test_a_packed_body_over_the_capture_limit_is_truncated_not_undecodable(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"a": 1}')
    async with proxied(tmp_path, capture__max_body_bytes=20) as p:
        await send(p, packed, JSON, ("Content-Encoding", "gzip"))
        event, _ = await pair(p)
        assert event["capturestatus"] == "truncated"
        assert body_file(event).read_bytes() == packed[:20]
        assert event["contentrange"] == f"bytes 0-19/{len(packed)}"


async def test_bodies_that_do_not_fit_in_memory_go_to_files_and_nothing_is_lost(tmp_path: Path) -> None:
    bodies = {f"id-{number}": json.dumps([number] * 4000).encode() for number in range(24)}
    gate = asyncio.Event()
    begun = 0

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal begun
        _, body = await read_request(reader)
        begun += 1
        if begun == len(bodies):
            gate.set()  # all requests are held at once
        await gate.wait()
        writer.write(response(body))
        await writer.drain()

    async with model_server(model) as server, proxy(server.url, tmp_path, capture__memory_bytes="64KiB") as p:
        sent = [request(body, JSON, ("x-request-id", name)) for name, body in bodies.items()]
        await asyncio.gather(*(exchange(p.port, one) for one in sent))
        account = await p.recorded(2 * len(bodies))
        assert (account.delivered, account.discarded, account.bodies_cut) == (2 * len(bodies), {}, 0)
        for collection in ("request", "response"):
            events = [checked(line) for line in p.raw_lines(collection)]
            files = [event for event in events if "datainblob" in event]
            assert {event["correlationid"] for event in events} == set(bodies)
            assert all(event["capturestatus"] == "complete" for event in events)
            assert all(
                event["data"] == json.loads(bodies[event["correlationid"]]) for event in events if event not in files
            )
            assert all(body_file(event).read_bytes() == bodies[event["correlationid"]] for event in files)
            assert files
        assert p.app.relay.recorder.spool.memory.held_bytes == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("encoding", [None, "gzip"])
async def test_a_body_that_the_disk_does_not_take_is_said_to_be_lost(
    tmp_path: Path, extended: bool, encoding: str | None
) -> None:
    body = gzip.compress(LARGE) if encoding else LARGE
    coded = [("Content-Encoding", encoding)] if encoding else []
    overrides = {
        "spool__max_bytes": "32KiB",
        "capture__max_inline_bytes": 1024,
        "capture__extended_fields": extended,
    }
    async with proxied(tmp_path, **overrides) as p:
        await send(p, body, JSON, *coded)
        event, answer = await pair(p)
        assert (event["data"], "datainblob" in event) == (None, False)
        assert event["contentrange"] == f"bytes */{len(body)}"  # says without further fields that something was here
        assert answer["data"] == [1]
        assert p.account().bodies_cut == 1
        if extended:
            assert (event["capturestatus"], event["bodybytes"]) == ("lost", len(body))
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1024]


# --- exchanges that don't end well ---


async def abandoned(port: int, sent: bytes, until: asyncio.Event | bytes) -> None:
    """A client that sends, waits for an event or for bytes, and leaves."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        async with asyncio.timeout(5):
            if isinstance(until, bytes):
                await reader.readuntil(until)
            else:
                await until.wait()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.promise("E14")
@pytest.mark.parametrize(
    ("encoding", "part"), [(None, b'{"data": '), ("gzip", gzip.compress(b"{}")[:15])], ids=["plain", "gzip"]
)
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
async def test_a_client_that_leaves_while_it_sends(
    tmp_path: Path, encoding: str | None, part: bytes, chunked: bool
) -> None:
    came = asyncio.Event()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(part)
        came.set()
        await reader.read(-1)

    coded = f"Content-Encoding: {encoding}\r\n" if encoding else ""
    framing = "Transfer-Encoding: chunked" if chunked else "Content-Length: 100"
    head = f"POST /score HTTP/1.1\r\nHost: h\r\nContent-Type: {JSON}\r\n{coded}{framing}\r\n\r\n".encode()
    async with model_server(model) as server, proxy(server.url, tmp_path) as p:
        await abandoned(p.port, head + (b"%x\r\n%b\r\n" % (len(part), part) if chunked else part), came)
        event, answer = await pair(p)
        found = body_file(event).read_bytes() if encoding else event["data"].encode()
        assert found == part
        assert (event["capturestatus"], event["bodybytes"]) == ("clientleft", len(part))
        assert event["contentrange"] == f"bytes 0-{len(part) - 1}/{'*' if chunked else 100}"
        assert (answer["statuscode"], answer["capturestatus"]) == (499, "clientleft")
        assert (answer["data"], answer["bodybytes"]) == (None, 0)


@pytest.mark.promise("E14")
@pytest.mark.parametrize("large", [False, True], ids=["in the line", "in a file"])
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
async def test_a_client_that_leaves_while_it_receives(tmp_path: Path, chunked: bool, large: bool) -> None:
    piece = b"token, " * 30

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 9999"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n" + framing + b"\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        await reader.read(-1)

    inline_bytes = 64 if large else 64 * 1024
    async with model_server(model) as server, proxy(server.url, tmp_path, capture__max_inline_bytes=inline_bytes) as p:
        await abandoned(p.port, request(b"[1]"), piece)
        event, answer = await pair(p)
        assert (event["data"], event["capturestatus"]) == ([1], "complete")
        assert (answer["statuscode"], answer["capturestatus"]) == (499, "clientleft")
        found = body_file(answer).read_bytes() if large else answer["data"].encode()
        assert found == piece
        assert answer["bodybytes"] == len(piece)
        assert answer["contentrange"] == f"bytes 0-{len(piece) - 1}/{'*' if chunked else 9999}"


@pytest.mark.promise("C9")
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
async def test_a_model_that_breaks_off_its_answer(tmp_path: Path, chunked: bool) -> None:
    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 100"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + framing + b"\r\n\r\n")
        writer.write(b"6\r\n[1, 2,\r\n" if chunked else b"[1, 2,")
        await writer.drain()

    async with model_server(model) as server, proxy(server.url, tmp_path) as p:
        with contextlib.suppress(ConnectionError):
            await exchange(p.port, request(b"[1]"))
        event, answer = await pair(p)
        assert event["capturestatus"] == "complete"
        assert (answer["statuscode"], answer["capturestatus"]) == (200, "upstreamfailed")
        assert (answer["data"], answer["bodybytes"]) == ("[1, 2,", 6)
        assert answer["contentrange"] == f"bytes 0-5/{'*' if chunked else 100}"


@pytest.mark.promise("E15")
async def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with proxy(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path) as p:
            got = await send(p, b"[1]")
            await check_own_answer(p, got, 502)


@pytest.mark.promise("E15")
async def test_a_model_that_says_nothing(tmp_path: Path) -> None:
    async def model(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async with model_server(model) as server, proxy(server.url, tmp_path, proxy__upstream_idle_timeout=0.1) as p:
        await check_own_answer(p, await send(p, b"[1]"), 504)


async def test_a_model_that_speaks_something_else(tmp_path: Path) -> None:
    async with proxied(tmp_path, b"220 smtp.example ready\r\n\r\n") as p:
        await check_own_answer(p, await send(p, b"[1]"), 502)


async def check_own_answer(p: Proxy, got: bytes, status: int) -> None:
    assert got.startswith(b"HTTP/1.1 %d " % status)
    event, answer = await pair(p)
    assert (event["data"], event["capturestatus"]) == ([1], "complete")
    assert (answer["statuscode"], answer["capturestatus"]) == (status, "upstreamfailed")
    assert answer["data"] == json.loads(payload(got))
    assert answer["data"]["error"]["code"] == status
    assert answer["datacontenttype"] == JSON
    assert answer["contentrange"] == f"bytes 0-{len(payload(got)) - 1}/{len(payload(got))}"


async def test_a_request_that_is_not_valid(tmp_path: Path) -> None:
    async with proxied(tmp_path) as p:
        head = b"POST /score HTTP/1.1\r\nHost: h\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
        got = await exchange(p.port, head + b"3\r\nabc\r\n-1\r\n")
        assert got.startswith(b"HTTP/1.1 400 ")
        event, answer = await pair(p)
        assert (event["capturestatus"], answer["capturestatus"]) == ("requestrefused", "requestrefused")
        assert answer["statuscode"] == answer["data"]["error"]["code"] == 400


@pytest.mark.promise("D12a")
async def test_a_model_that_answers_before_it_has_read_the_request(tmp_path: Path) -> None:
    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"begin")
        writer.write(response(b'{"error": "too large"}', status=413))
        await reader.read(-1)

    head = b"POST /score HTTP/1.1\r\nHost: h\r\nContent-Type: text/plain\r\nContent-Length: 1000\r\n\r\nbegin"
    async with model_server(model) as server, proxy(server.url, tmp_path) as p:
        assert (await exchange(p.port, head)).startswith(b"HTTP/1.1 413 ")
        event, answer = await pair(p)
        assert (event["data"], event["capturestatus"], event["bodybytes"]) == ("begin", "truncated", 5)
        assert event["contentrange"] == "bytes 0-4/1000"
        assert (answer["statuscode"], answer["capturestatus"]) == (413, "complete")


# --- statuses, methods, times ---


@pytest.mark.parametrize("status", [200, 201, 204, 304, 307, 400, 401, 404, 413, 422, 424, 429, 500, 502, 503, 599])
async def test_every_status_is_recorded(tmp_path: Path, status: int) -> None:
    body = b"" if status in (204, 304) else b'{"error": null}'
    async with proxied(tmp_path, response(body, status=status)) as p:
        await send(p, b"[1]")
        _, answer = await pair(p)
        assert answer["statuscode"] == status
        assert answer["capturestatus"] == "complete"
        assert answer["data"] == (json.loads(body) if body else None)


async def test_a_stream_of_events_is_one_string(tmp_path: Path, model: str) -> None:
    async with proxy(model, tmp_path) as p:
        got = await send(p, b"{}", target="/stream?tokens=3&delay=0.01")
        event, answer = await pair(p)
        assert event["path"] == "/stream?tokens=3&delay=0.01"
        assert answer["data"] == payload(got).decode()
        assert answer["data"] == "".join(f'data: {{"token": "t{n}"}}\n\n' for n in range(3)) + "data: [DONE]\n\n"
        assert answer["datacontenttype"] == "text/event-stream"
        assert answer["contentrange"] == f"bytes 0-{len(answer['data']) - 1}/*"
        assert answer["durationms"] >= 30


@pytest.mark.promise("C8")
async def test_head_has_no_body(tmp_path: Path) -> None:
    async with proxied(tmp_path, b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 5000000\r\n\r\n") as p:
        await send(p, b"", None, method="HEAD")
        event, answer = await pair(p)
        assert (event["method"], event["data"]) == ("HEAD", None)
        assert (answer["data"], answer["contentrange"], answer["bodybytes"]) == (None, "bytes */0", 0)
        assert (answer["datacontenttype"], answer["capturestatus"]) == ("image/png", "complete")


@pytest.mark.promise("C10")
async def test_a_response_that_ends_with_its_connection(tmp_path: Path) -> None:
    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[1, 2]")
        await writer.drain()

    async with model_server(model) as server, proxy(server.url, tmp_path) as p:
        await send(p, b"[1]")
        _, answer = await pair(p)
        assert (answer["data"], answer["contentrange"], answer["capturestatus"]) == ([1, 2], "bytes 0-5/*", "complete")


async def test_times(tmp_path: Path) -> None:
    """``time`` is that of the heads, in UTC; ``durationms`` goes from the request's head to the response's end."""
    pause = 0.08

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await asyncio.sleep(pause)  # the model's work
        writer.write(OK)

    async with model_server(model) as server, proxy(server.url, tmp_path) as p:
        before = time.time()
        await send(p, b"[1]")
        after = time.time()
        event, answer = await pair(p)
        asked, answered = (_seconds(one["time"]) for one in (event, answer))
        assert before - 0.001 <= asked <= answered - pause + 0.002 <= after
        assert pause * 1000 - 1 <= answer["durationms"] <= (after - before) * 1000 + 1


def _seconds(timestamp: str) -> float:
    whole, _, fraction = timestamp.removesuffix("Z").partition(".")
    assert len(fraction) == 3
    return float(f"{int(time.mktime(time.strptime(whole, '%Y-%m-%dT%H:%M:%S')) - time.timezone)}.{fraction}")


# --- headers, paths, ids ---


async def test_captured_headers_and_no_others(tmp_path: Path) -> None:
    names = ["X-Tenant-Id", "x-many", "X-Latin", "X-Utf8", "X-Absent", "X-Empty", "Content-Type", "X-Quoted"]
    secrets = [
        ("Authorization", "Bearer s3cret"),
        ("Cookie", "k=s3cret"),
        ("X-Api-Key", "s3cret"),
        ("X-Other", "s3cret"),
    ]
    async with proxied(tmp_path, data_collector__request_logging__capture_headers=names) as p:
        await send(
            p,
            b"[1]",
            JSON,
            ("x-TENANT-id", "t1"),
            ("X-Many", "a"),
            ("X-Many", "b"),
            b"X-Latin: caf\xe9",
            b"X-Utf8: caf\xc3\xa9",
            "X-Empty:",
            ("X-Quoted", 'a"\\b\tc'),
            *secrets,
        )
        await pair(p)
        event = only(p, "request")
        assert list(event)[list(event).index("xrequestid") + 1 :] == [
            *("capturestatus", "bodybytes"),
            *("xtenantid", "xmany", "xlatin", "xutf8", "xempty", "contenttype", "xquoted"),
        ]
        found = [event[name] for name in ("xtenantid", "xmany", "xlatin", "xutf8", "xempty", "contenttype", "xquoted")]
        assert found == ["t1", "a, b", "café", "café", "", JSON, 'a"\\b\tc']
        for path in (*p.files("request"), *p.files("response")):
            assert b"s3cret" not in path.read_bytes()


async def test_a_secret_is_recorded_only_where_it_is_named(tmp_path: Path) -> None:
    async with proxied(tmp_path, data_collector__request_logging__capture_headers=["authorization"]) as p:
        await send(p, b"[1]", JSON, ("Authorization", "Bearer named"), ("Cookie", "unnamed"))
        await pair(p)
        assert only(p, "request")["authorization"] == "Bearer named"
        assert b"unnamed" not in b"".join(p.raw_lines("request") + p.raw_lines("response"))


async def test_names_of_captured_headers_that_collide(tmp_path: Path) -> None:
    async with proxied(tmp_path, data_collector__request_logging__capture_headers=["Data", "data-", "X_Data"]) as p:
        await send(p, b'{"data": [1]}', JSON, ("Data", "1"), ("data-", "2"), ("X_Data", "3"))
        await pair(p)
        event = only(p, "request")
        assert event["data"] == {"data": [1]}
        assert (event["headerdata"], event["headerdata2"], event["xdata"]) == ("1", "2", "3")


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("header", "recorded"),
    [
        (TRACE, True),
        ("cc" + TRACE[2:], True),  # a version that is yet to come
        ("ff" + TRACE[2:], False),
        (TRACE.upper(), False),
        (TRACE + "0", False),
        ("00-" + "0" * 32 + TRACE[35:], False),
        (TRACE[:36] + "0" * 16 + "-01", False),
        ('"},{', False),
    ],
)
async def test_the_trace_is_in_both_lines(tmp_path: Path, header: str, recorded: bool) -> None:
    async with proxied(tmp_path) as p:
        await send(p, b"[1]", JSON, ("Traceparent", header))
        assert [event.get("traceparent") for event in await pair(p)] == [header if recorded else None] * 2


async def test_without_extended_fields_there_are_no_headers_and_no_fractions(tmp_path: Path) -> None:
    overrides = {
        "capture__extended_fields": "False",
        "data_collector__request_logging__capture_headers": ["X-Tenant"],
    }
    async with proxied(tmp_path, **overrides) as p:
        await send(p, gzip.compress(b"[1]"), JSON, ("X-Tenant", "t"), ("Content-Encoding", "gzip"))
        documented = (
            "specversion id source type datacontenttype time data path method contentrange correlationid xrequestid"
        )
        for event in await pair(p):
            expected = [name for name in documented.split() if "method" in event or name not in ("path", "method")]
            assert list(event) == expected
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", event["time"])


@pytest.mark.promise("B6")
@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/score?q=%20a&b", "/score?q=%20a&b"),
        (b"/a//../b;c=1?", "/a//../b;c=1?"),
        (b'/"quoted"\\', '/"quoted"\\'),
        (b"http://h/absolute?x", "http://h/absolute?x"),
    ],
)
async def test_the_path_is_as_it_was_sent(tmp_path: Path, target: bytes, path: str) -> None:
    async with proxied(tmp_path) as p:
        await send(p, b"[1]", target=target)
        event, _ = await pair(p)
        assert event["path"] == path


@pytest.mark.promise("B6")
@pytest.mark.parametrize("target", [b"/sc\xe9", b"/score?\xff", "/é".encode()])
async def test_a_path_that_is_no_path_is_refused_before_it_is_an_exchange(tmp_path: Path, target: bytes) -> None:
    """RFC 3986 §2: a URI is ASCII."""
    async with proxied(tmp_path) as p:
        assert (await send(p, b"[1]", target=target, events=0)).startswith(b"HTTP/1.1 400 ")
        assert p.account().received == 0


@pytest.mark.parametrize(
    ("header", "kept"),
    [(b"abc", True), (b"a" * 100, True), (b'q"\\{}', True), (b"a" * 101, False), (b"a b", False), (b"\xe9", False)],
)
async def test_the_clients_request_id(tmp_path: Path, header: bytes, kept: bool) -> None:
    async with proxied(tmp_path) as p:
        await send(p, b"[1]", JSON, b"X-Request-ID: " + header)
        event, answer = await pair(p)
        assert event["correlationid"] == answer["correlationid"]
        assert (event["correlationid"].encode() == header) == kept
        assert kept or re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", event["correlationid"])


# --- what is recorded at all, and where ---


@pytest.mark.parametrize(
    ("collections", "recorded"),
    [
        ({"request": {"enabled": "True"}, "response": {"enabled": "False"}}, {"request"}),
        ({"response": {"enabled": True}}, {"response"}),
        ({"request": {"enabled": False}, "response": {"enabled": False}}, set()),
        ({"request": {"enabled": "true", "sampling_rate": 0}, "response": {"enabled": "true"}}, {"response"}),
    ],
)
async def test_collections_are_enabled_or_not(tmp_path: Path, collections: Any, recorded: set[str]) -> None:
    async with proxied(tmp_path, data_collector__collections=collections) as p:
        assert payload(await send(p, b"[2]", events=len(recorded))) == b"[1]"
        assert p.account().received == p.account().delivered == len(recorded)
        found = {path.parts[len(tmp_path.parts) + 2] for path in tmp_path.rglob("*.jsonl")}
        assert found == recorded


async def test_sampling_is_by_the_request_id_and_nests(tmp_path: Path) -> None:
    collections = {"request": {"enabled": True, "sampling_rate": 0.6}, "response": {"enabled": True}}
    ids = [f"request-{number}" for number in range(120)]
    wanted = {
        "request": {name for name in ids if sample_position(name) < 0.6},
        "response": {name for name in ids if sample_position(name) < 0.3},
    }
    overrides = {"data_collector__collections": collections, "data_collector__sampling_rate": 0.3}
    async with proxied(tmp_path / "a", **overrides) as p, proxied(tmp_path / "b", **overrides) as replica:
        for one in (p, replica):
            for name in ids:
                await exchange(one.port, request(b"[1]", JSON, ("x-request-id", name)))
            await one.recorded(sum(map(len, wanted.values())))
            for collection, names in wanted.items():
                found = [event["correlationid"] for event in one.lines(collection)]
                assert found == [name for name in ids if name in names]
    assert wanted["response"] < wanted["request"]
    assert 20 < len(wanted["response"]) < 55
    assert 50 < len(wanted["request"]) < 95


async def test_ids_of_ours_are_sampled_too_and_stay_pairs(tmp_path: Path) -> None:
    async with proxied(tmp_path, data_collector__sampling_rate="0.5") as p:
        for _ in range(80):
            await exchange(p.port, request(b"[1]"))
        await p.recorded(2)
        asked, answered = ([event["xrequestid"] for event in p.lines(name)] for name in ("request", "response"))
        assert asked == answered
        assert 15 < len(asked) < 65  # one in a hundred million fails


@pytest.mark.parametrize(
    ("overrides", "recorded"),
    [
        ({}, ["POST /score", "GET /v1/models", "POST /health"]),
        (
            {"capture__exclude": []},
            ["POST /score", "GET /v1/models", "POST /health", "GET /health", "HEAD /", "GET /ready"],
        ),
        ({"capture__include": ["POST *"]}, ["POST /score", "POST /health"]),
        ({"capture__include": ["/score", "/v1/*"], "capture__exclude": ["GET *"]}, ["POST /score"]),
    ],
)
async def test_paths_that_are_recorded(tmp_path: Path, overrides: dict[str, Any], recorded: list[str]) -> None:
    sent = ["GET /health", "HEAD /", "GET /ready", "POST /score?a=/health", "GET /v1/models", "POST /health"]
    async with proxied(tmp_path, response(b""), **overrides) as p:
        for line in sent:
            method, target = line.split()
            await exchange(p.port, request(b"", None, method=method, target=target))
        account = await p.recorded(2 * len(recorded))
        assert account.received == 2 * len(recorded)
        found = {f"{event['method']} {event['path'].partition('?')[0]}" for event in p.lines("request")}
        assert found == set(recorded)


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("azureml://datastores/store/paths/my/asset", "storage/my/asset"),
        ("azureml://subscriptions/S/resourcegroups/R/workspaces/W/datastores/D/paths/x/", "storage/x"),
        ("file://{tmp_path}/else%20where", "else where"),
        ("{tmp_path}/plain", "plain"),
    ],
)
async def test_a_root_of_its_own(tmp_path: Path, path: str, folder: str) -> None:
    """A custom ``data.path`` is the root itself: no endpoint, deployment or collection is added."""
    data = {"name": "asset", "path": path.format(tmp_path=tmp_path), "version": 1}
    collections = {"request": {"enabled": "True", "data": data}, "response": {"enabled": "True"}}
    overrides = {"data_collector__collections": collections, "capture__max_inline_bytes": 1000}
    async with proxied(tmp_path / "storage", **overrides) as p:
        await send(p, b"\x00\x01", "image/png")
        await send(p, b"[" + b"1," * 1000 + b"1]")
        root = tmp_path / folder
        (lines,) = root.glob("[0-9]*/*/*/*/*.jsonl")
        binary, large = map(checked, lines.read_bytes().splitlines(keepends=True))
        assert body_file(binary) == lines.parent / binary["id"]
        assert body_file(binary).read_bytes() == b"\x00\x01"
        assert (
            body_file(large)
            == root.parent / f"{root.name}-large" / lines.parent.relative_to(root) / f"{large['id']}.jsonl"
        )
        assert len(p.lines("response")) == 2
        for answer in p.files("response"):
            assert answer.is_relative_to(tmp_path / "storage/local-endpoint/default/response")


@pytest.mark.parametrize(
    ("rate", "folders"),
    [
        ("minute", "%Y/%m/%d/%H/%M"),
        ("Hour", "%Y/%m/%d/%H"),
        ("Day", "%Y/%m/%d"),
        ("MONTH", "%Y/%m"),
        ("Year", "%Y"),
    ],
)
async def test_rolling_rates(tmp_path: Path, rate: str, folders: str) -> None:
    async with proxied(tmp_path, data_collector__rolling_rate=rate, endpoint_name="e", name="d") as p:
        before = time.gmtime()
        await send(p, b"\x00", "image/png")
        after = time.gmtime()
        event, _ = await pair(p)
        partitions = {time.strftime(folders, moment) for moment in (before, after)}
        for collection in ("request", "response"):
            lines = next(path for path in p.files(collection) if path.suffix == ".jsonl")
            assert str(lines.parent.relative_to(tmp_path / "e/d" / collection)) in partitions
        assert body_file(event).parent == next(path for path in p.files("request") if path.suffix == ".jsonl").parent
