"""A, B, C: what each side receives through the running proxy, compared as bytes."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

import pytest

from proxy import ids
from tests.harness import exchange, model_server, proxy
from tests.relay.wire import GET, OK, Script, asking, connected, head, header, names, payload, relayed

ID = b"x-request-id: id-1"  # with it and with forwarded_headers off, nothing at all is added
PACKED = gzip.compress(b'{"data": [1]}', mtime=0)
OFF = {"proxy__forwarded_headers": "off"}


# --- the same bytes ---

REQUESTS = {
    "no body": head(b"GET /a HTTP/1.1", b"Host: h", ID),
    "POST without a body": head(b"POST /a HTTP/1.1", b"Host: h", ID),
    "Content-Length: 0": head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 0", ID),
    "Content-Length": head(b"POST /a HTTP/1.1", b"hOST: h", b"content-LENGTH: 4", ID) + b"ping",
    "GET with a body": head(b"GET /a HTTP/1.1", b"Host: h", b"Content-Length: 4", ID) + b"ping",
    "chunked": head(b"PUT /a HTTP/1.1", b"Host: h", ID, b"Transfer-Encoding: chunked") + b"4\r\nping\r\n0\r\n\r\n",
    "gzip": head(b"POST /a HTTP/1.1", b"Host: h", ID, b"Content-Encoding: gzip", b"Content-Length: %d" % len(PACKED))
    + PACKED,
    "deflate that is none": head(
        b"POST /a HTTP/1.1", b"Host: h", ID, b"Content-Encoding: deflate", b"Content-Length: 3"
    )
    + b"\x00\xff\n",
    "order, number, case": head(
        b"GET /a HTTP/1.1", b"X-b: 2", b"x-A: 1", b"Host: h", b"X-B: 3", b"Cookie: a=1", b"cookie: b=2", ID, b"X-b: 2"
    ),
    "bytes from 0x80": head(b"GET /a HTTP/1.1", b"Host: h", ID, b"A: \xff\x80", "B: été".encode(), b"C: a\tb"),
    "empty value": head(b"GET /a HTTP/1.1", b"Host: h", ID, b"A: ", b"B: c"),
    "range": head(b"GET /a HTTP/1.1", b"Host: h", b"Range: bytes=0-1,5-", b'If-Range: "x"', ID),
    "other secrets and conditions": head(
        b"DELETE /a HTTP/1.1", b"Host: h", b"Authorization: Bearer \xc3\xa9", b'If-Match: "a", "b"', b"Via: 1.0 x", ID
    ),
}


@pytest.mark.promise("A3", "A3a", "A4", "C7", "C7a", "C10b")
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
async def test_a_request_arrives_as_it_was_sent(request_: bytes, tmp_path: Path) -> None:
    """A3, A4, C7: no User-Agent, Accept, Accept-Encoding or Content-Type is added, no framing changed."""
    script = Script()
    async with asking(script, tmp_path, **OFF) as client:
        await client.ask(request_)
        await client.ask(request_)  # and the same again on used connections
    assert script.received == [request_, request_]


RESPONSES = {
    "Content-Length": head(b"HTTP/1.1 200 OK", b"content-LENGTH: 4", ID) + b"pong",
    "Content-Length: 0": head(b"HTTP/1.1 404 Not Found", b"Content-Length: 0", ID),
    "chunked": head(b"HTTP/1.1 200 OK", ID, b"Transfer-Encoding: chunked") + b"4\r\npong\r\n0\r\n\r\n",
    "empty, chunked": head(b"HTTP/1.1 200 OK", ID, b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "own reason": head(b"HTTP/1.1 299 Fa\xc3\xa7on \xff", ID, b"Content-Length: 0"),
    "no reason": head(b"HTTP/1.1 200 ", ID, b"Content-Length: 0"),
    "unknown status": head(b"HTTP/1.1 599 Odd", ID, b"Content-Length: 0"),
    "gzip": head(b"HTTP/1.1 200 OK", ID, b"Content-Encoding: gzip", b"Content-Length: %d" % len(PACKED)) + PACKED,
    "br that is none": head(b"HTTP/1.1 200 OK", ID, b"Content-Encoding: br", b"Content-Length: 3") + b"\x00\xff\n",
    "Set-Cookie": head(
        b"HTTP/1.1 200 OK",
        b"Set-Cookie: a=1; Path=/, x",
        b"A: 1",
        b"set-cookie: b=2",
        b"a: 2",
        ID,
        b"Content-Length: 0",
    ),
    "bytes from 0x80": head(b"HTTP/1.1 200 OK", ID, b"A: \xff\x80", "B: été".encode(), b"Content-Length: 0"),
    "partial": head(b"HTTP/1.1 206 Partial Content", ID, b"Content-Range: bytes 0-1/9", b"Content-Length: 2") + b"ab",
    "redirect with a cookie": head(
        b"HTTP/1.1 307 Temporary Redirect", b"Location: http://elsewhere/", b"Set-Cookie: a=1", ID, b"Content-Length: 0"
    ),
    "duplicates": head(
        b"HTTP/1.1 200 OK", b"Server: a", b"Server: b", b"Date: x", b"ETag: 1", b"ETag: 1", ID, b"Content-Length: 0"
    ),
}


@pytest.mark.promise("A3", "A3a", "A4", "B6c", "C7", "C7a", "C10b")
@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "byte by byte"])
async def test_a_response_arrives_as_it_was_sent(response: bytes, cut: bool, tmp_path: Path) -> None:
    """A3, A4, B6, C7, C10: no Server, Date or Content-Type is added, no redirect followed."""
    requests: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            for piece in [response[at : at + 1] for at in range(len(response))] if cut else [response]:
                writer.write(piece)
                await asyncio.sleep(0)  # each its own segment

    async with asking(handler, tmp_path) as client:
        for _ in range(2):
            got = await client.ask(GET)
            assert got.partition(b"\r\n\r\n")[0] == response.partition(b"\r\n\r\n")[0]
            assert payload(got) == payload(response)
            if not cut:
                assert got == response
    assert len(requests) == 2
    assert b"cookie" not in names(requests[1])


@pytest.mark.promise("C11a")
@pytest.mark.parametrize("limit", [0, 10])
async def test_a_capture_limit_never_changes_the_traffic(limit: int, tmp_path: Path) -> None:
    """C11."""
    body = bytes(range(256)) * 4096
    response = head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), ID) + body
    script = Script(response)
    async with asking(script, tmp_path, capture__max_body_bytes=limit, **OFF) as client:
        request = head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: %d" % len(body), ID) + body
        assert await client.ask(request) == response
    assert script.received == [request]


# --- what is taken away ---

HOP = (
    b"Connection: keep-alive, X-Hop ,x-other",
    b"Proxy-Connection: keep-alive",
    b"Keep-Alive: timeout=5",
    b"Proxy-Authenticate: Basic",
    b"Proxy-Authorization: Basic x",
    b"X-Hop: 1",
    b"X-OTHER: 2",
    b"TE: gzip",
    b"Trailer: X",
    b"Upgrade: h2c",
)


@pytest.mark.promise("A1")
async def test_hop_by_hop_headers_do_not_pass(tmp_path: Path) -> None:
    """A1: both ways, with every name that Connection lists."""
    script = Script(head(b"HTTP/1.1 200 OK", b"A: 1", *HOP, ID, b"Content-Length: 0"))
    async with asking(script, tmp_path, **OFF) as client:
        got = await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", b"A: 1", *HOP, ID))
    assert script.received == [head(b"GET /a HTTP/1.1", b"Host: h", b"A: 1", ID)]
    assert got == head(b"HTTP/1.1 200 OK", b"A: 1", ID, b"Content-Length: 0")


@pytest.mark.promise("A1b")
async def test_connection_can_not_strip_what_frames_a_message(tmp_path: Path) -> None:
    """A1: else the model server would take the body for the next request."""
    script = Script(head(b"HTTP/1.1 200 OK", b"Connection: content-length", b"Content-Length: 2", ID) + b"ok")
    request = (
        head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 4", b"Connection: Content-Length, host", ID) + b"ping"
    )
    async with asking(script, tmp_path, **OFF) as client:
        got = await client.ask(request)
    assert script.received == [head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 4", ID) + b"ping"]
    assert got == head(b"HTTP/1.1 200 OK", b"Content-Length: 2", ID) + b"ok"


@pytest.mark.promise("A1a")
async def test_te_trailers_is_passed_on(tmp_path: Path) -> None:
    """A1."""
    script = Script()
    async with asking(script, tmp_path, **OFF) as client:
        await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", b"TE: trailers", b"Connection: TE", ID))
    assert script.received == [head(b"GET /a HTTP/1.1", b"Host: h", ID, b"TE: trailers", b"Connection: TE")]


# --- what is added ---


@pytest.mark.promise("A2", "A2a")
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("append", ([b"1.1.1.1, 127.0.0.1"], [b"https"], [b"public"])),
        ("replace", ([b"127.0.0.1"], [b"http"], [b"h"])),
        ("off", ([b"1.1.1.1"], [b"https"], [b"public"])),
    ],
)
@pytest.mark.parametrize("host", ["pass", "upstream"])
async def test_forwarding(mode: str, host: str, expected: tuple[list[bytes], ...], tmp_path: Path) -> None:
    """A2: X-Forwarded-* in the three modes, Host in both."""
    script = Script()
    sent = (b"X-Forwarded-For: 1.1.1.1", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: public")
    settings = {"proxy__forwarded_headers": mode, "proxy__host_header": host}
    async with model_server(script) as model, proxy(model.url, tmp_path, **settings) as p, connected(p.port) as client:
        await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", *sent))
        await client.ask(head(b"GET /a HTTP/1.1", b"Host: h"))
    first, second = script.received
    found = tuple(header(first, b"X-Forwarded-" + name) for name in (b"For", b"Proto", b"Host"))
    assert found == expected
    assert header(first, b"host") == [b"h" if host == "pass" else model.url.removeprefix("http://").encode()]
    assert (b"x-forwarded-for" in names(second)) is (mode != "off")


@pytest.mark.promise("A2", "A3")
@pytest.mark.parametrize("mode", ["append", "replace", "off"])
async def test_what_some_servers_take_for_ours_does_not_pass(mode: str, tmp_path: Path) -> None:
    """CGI and WSGI know no difference between - and _."""
    forwarded = [b"X_Forwarded_For", b"x-forwarded_proto", b"X_FORWARDED-HOST"]
    ids = [b"X_Request_ID", b"x-request_id"]
    script = Script()
    async with relayed(script, tmp_path, proxy__forwarded_headers=mode) as p, connected(p.port) as client:
        await client.ask(
            head(b"GET /a HTTP/1.1", b"Host: h", *(name + b": 6.6.6.6" for name in [*forwarded, *ids]), b"A_B: 1")
        )
    passed = [name for name in names(script.received[0]) if b"_" in name]
    assert passed == ([name.lower() for name in forwarded] if mode == "off" else []) + [b"a_b"]


@pytest.mark.promise("A3a")
@pytest.mark.parametrize("sent", [b"a", b"A-b_c.9~", b"x" * 100])
async def test_a_valid_request_id_is_used(sent: bytes, tmp_path: Path) -> None:
    """A3: the same one upstream, downstream and in the lines."""
    script = Script()
    async with relayed(script, tmp_path) as p, connected(p.port) as client:
        got = await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", b"X-Request-ID: " + sent))
        line = p.lines("response")[0]
    assert header(script.received[0], b"x-request-id") == header(got, b"x-request-id") == [sent]
    assert line["xrequestid"] == sent.decode()


@pytest.mark.promise("A3a", "A4a")
@pytest.mark.parametrize("sent", [None, b"", b"a b", b"x" * 101, b"\xc3\xa9", b'a"\xff'])
async def test_a_request_id_is_made_where_none_is_valid(sent: bytes | None, tmp_path: Path) -> None:
    """A3, A4."""
    script = Script()
    async with relayed(script, tmp_path) as p, connected(p.port) as client:
        got = await client.ask(
            head(b"GET /a HTTP/1.1", b"Host: h", *([] if sent is None else [b"X-Request-ID: " + sent]))
        )
        line = p.lines("request")[0]
    made = header(got, b"x-request-id")
    assert header(script.received[0], b"x-request-id") == made
    assert len(made) == 1
    assert len(made[0]) == len(ids.uuid4())
    assert line["xrequestid"] == made[0].decode()


@pytest.mark.promise("A3a")
async def test_the_model_servers_own_request_id_is_kept(tmp_path: Path) -> None:
    """A3."""
    async with asking(
        Script(head(b"HTTP/1.1 200 OK", b"X-Request-Id: theirs", b"Content-Length: 0")), tmp_path
    ) as client:
        got = await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", b"X-Request-ID: mine"))
    assert header(got, b"x-request-id") == [b"theirs"]


# --- limits ---


@pytest.mark.promise("A5")
@pytest.mark.parametrize("size", [16_000, 64_000, 120_000])
async def test_large_heads_pass_both_ways(size: int, tmp_path: Path) -> None:
    """A5."""
    large = b"Cookie: " + b"c" * size
    script = Script(head(b"HTTP/1.1 200 OK", ID, large, b"Content-Length: 0"))
    request = head(b"GET /a HTTP/1.1", b"Host: h", ID, large)
    async with asking(script, tmp_path, **OFF) as client:
        got = await client.ask(request)
    assert script.received == [request]
    assert header(got, b"cookie") == [b"c" * size]


@pytest.mark.promise("A5", "G21")
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head(b"GET /a HTTP/1.1", b"Host: h", b"A: " + b"a" * 140_000), 431),
        (head(b"GET /a HTTP/1.1", b"Host: h", *[b"A: " + b"a" * 1000] * 140), 431),
        (head(b"GET /" + b"a" * 140_000 + b" HTTP/1.1", b"Host: h"), 414),
        (head(b"GET /a HTTP/1.1", b"Host: h", *[b"A: a"] * 256), 431),
        (b"GET /a HTTP/1.1\r\nHost: h\r\n" + b"A: a\r\n" * 30_000, 431),
    ],
    ids=["a value", "all values", "the target", "too many", "without an end"],
)
async def test_heads_over_the_limit_are_refused(request_: bytes, status: int, tmp_path: Path) -> None:
    """A5: the connection is closed, nothing reaches the model server."""
    script = Script()
    async with asking(script, tmp_path) as client:
        client.write(request_)
        got = await client.rest()
    assert got.startswith(b"HTTP/1.1 %d " % status)
    assert header(got, b"connection") == [b"close"]
    assert script.received == []


@pytest.mark.promise("A5", "G22")
async def test_a_response_head_over_the_limit_is_not_passed_on(tmp_path: Path) -> None:
    """A5, G22."""
    async with asking(Script(head(b"HTTP/1.1 200 OK", b"A: " + b"a" * 140_000)), tmp_path) as client:
        assert (await client.ask(GET)).startswith(b"HTTP/1.1 502 ")


# --- the request line ---

TARGETS = [
    b"/a%2Fb/%2e%2E/x",
    b"//a//",
    b"/a/../b/./c",
    b"/;a=b;c",
    b"/a?",
    b"/?a=1&a=2&&",
    b"/%zz%",
    b"/%C3%A9?q=%c3",
    b"/a?b?c#d",
]
TARGETS += [b"/\\a|b^`{}<>\"'", b"/" + b"x" * 60_000, b"/~user/*?*=!$&'()+,;=:@"]


@pytest.mark.promise("B6", "B6a")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target[:20].decode())
@pytest.mark.parametrize("base", ["", "/", "/v1/models", "/v1/"])
async def test_targets_pass_byte_for_byte(target: bytes, base: str, tmp_path: Path) -> None:
    """B6: below the base path of the upstream, joined with one slash."""
    script = Script()
    async with model_server(script) as model, proxy(model.url + base, tmp_path) as p:
        await exchange(p.port, b"GET " + target + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        recorded = p.lines("request")[0]["path"] if not target.startswith(b"/?") else None
    assert script.received[0].split(b" ")[1] == base.rstrip("/").encode() + target
    assert recorded in (None, target.decode())


@pytest.mark.promise("A2a", "B6b")
@pytest.mark.parametrize(
    ("start", "expected", "host"),
    [
        (b"GET http://other:81/a?b HTTP/1.1", b"GET /v1/a?b HTTP/1.1", b"other:81"),
        (b"GET http://other HTTP/1.1", b"GET /v1/ HTTP/1.1", b"other"),
        (b"OPTIONS * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"h"),
        (b"PROPFIND /a HTTP/1.1", b"PROPFIND /v1/a HTTP/1.1", b"h"),
        (b"QUERY /a HTTP/1.1", b"QUERY /v1/a HTTP/1.1", b"h"),
        (b"PATCH /a HTTP/1.1", b"PATCH /v1/a HTTP/1.1", b"h"),
        (b"FOO /a HTTP/1.1", b"FOO /v1/a HTTP/1.1", b"h"),
        (b"Foo-Bar http://other/a HTTP/1.1", b"Foo-Bar /v1/a HTTP/1.1", b"other"),
        (b"!#$%&'*+-.^_`|~09Az /a HTTP/1.1", b"!#$%&'*+-.^_`|~09Az /v1/a HTTP/1.1", b"h"),
        (b"x" * 100 + b" /a HTTP/1.1", b"x" * 100 + b" /v1/a HTTP/1.1", b"h"),
    ],
)
async def test_other_forms_and_methods(start: bytes, expected: bytes, host: bytes, tmp_path: Path) -> None:
    """B6: the authority of the absolute form takes the place of Host (RFC 9112 §3.2.2)."""
    script = Script()
    async with model_server(script) as model, proxy(model.url + "/v1", tmp_path) as p, connected(p.port) as client:
        await client.ask(head(start, b"Host: h"))
    assert script.received[0].split(b"\r\n")[0] == expected
    assert header(script.received[0], b"host") == [host]


@pytest.mark.promise("D12", "E17")
@pytest.mark.parametrize(
    "interim",
    [
        head(b"HTTP/1.1 103 Early Hints", b"Connection: close", b"Link: </a>"),
        head(b"HTTP/1.0 100 Continue"),
        head(b"HTTP/1.0 103 Early Hints", b"Connection: close") * 3,
    ],
)
async def test_an_interim_answer_ends_no_connection(interim: bytes, tmp_path: Path) -> None:
    """Whatever it says of that."""
    script = Script(interim + OK)
    async with model_server(script) as model, proxy(model.url, tmp_path) as p, connected(p.port) as client:
        for _ in range(2):
            client.write(GET)
            for _ in range(interim.count(b"HTTP/")):
                got = await client.response(bodyless=True)
                assert got.split(b"\r\n")[0] == b"HTTP/1.1 " + interim.split(b"\r\n")[0][9:]
                assert header(got, b"connection") == []
            assert payload(await client.response()) == b"ok"
        assert model.connections == 1


@pytest.mark.promise("A2a", "B6b", "G21")
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head(b"CONNECT model:443 HTTP/1.1", b"Host: h"), 405),
        (head(b"TRACE /a HTTP/1.1", b"Host: h"), 405),
        *(
            (head(method + b" /a HTTP/1.1", b"Host: h"), 400)
            for method in (
                b"get",
                b"Post",
                b"heaD",
                b"connect",
                b"trace",
                b"PRI",
                b"",
                b"F@O",
                b"F\xc3\xb6",
                b"x" * 101,
                b"F\tO",
            )
        ),
        (head(b"GET /a HTTP/1.1"), 400),
        (head(b"GET /a HTTP/1.1", b"Host: h", b"Host: h"), 400),
        (head(b"GET a HTTP/1.1", b"Host: h"), 400),
        (head(b"GET /a HTTP/2.0", b"Host: h"), 505),
        (head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: gzip, chunked"), 501),
    ],
)
async def test_what_is_not_passed_on(request_: bytes, status: int, tmp_path: Path) -> None:
    """A2, B6: refused here, with a small JSON body; the connection is closed."""
    script = Script()
    async with asking(script, tmp_path) as client:
        client.write(request_)
        got = await client.rest()
    assert got.startswith(b"HTTP/1.1 %d " % status)
    assert b'"code":%d' % status in payload(got)
    assert script.received == []


@pytest.mark.promise("B6c")
async def test_no_proxy_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B6."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with asking(Script(), tmp_path) as client:
        assert payload(await client.ask(GET)) == b"ok"


# --- bodies that are not there, too long, too short ---

BODYLESS = [
    (b"HEAD", head(b"HTTP/1.1 200 OK", b"Content-Length: 5", ID)),
    (b"HEAD", head(b"HTTP/1.1 200 OK", ID)),
    (b"GET", head(b"HTTP/1.1 204 No Content", ID)),
    (b"GET", head(b"HTTP/1.1 304 Not Modified", b"Content-Length: 5", b'ETag: "a"', ID)),
    (b"GET", head(b"HTTP/1.1 304 Not Modified", ID)),
]


@pytest.mark.promise("C8", "E17a")
@pytest.mark.parametrize(("method", "response"), BODYLESS)
@pytest.mark.parametrize("wrong", [b"", b"hello", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"])
async def test_no_body_where_there_is_none(method: bytes, response: bytes, wrong: bytes, tmp_path: Path) -> None:
    """C8, E17: headers are kept; a body that the upstream wrongly sends goes nowhere, nor into the next answer."""
    async with asking(Script(response + wrong, OK), tmp_path) as client:
        assert await client.ask(head(method + b" /a HTTP/1.1", b"Host: h"), bodyless=True) == response
        assert payload(await client.ask(GET)) == b"ok"


@pytest.mark.promise("C8", "E17a")
@pytest.mark.parametrize(
    ("method", "response"),
    [
        (b"HEAD", head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked", ID)),
        (b"GET", head(b"HTTP/1.1 204 No Content", b"Transfer-Encoding: chunked", ID)),
        (b"GET", head(b"HTTP/1.1 204 No Content", b"Content-Length: 5", ID)),
        (b"GET", head(b"HTTP/1.1 304 Not Modified", b"Transfer-Encoding: chunked", ID)),
    ],
)
async def test_a_wrong_body_that_comes_late_is_not_the_next_answer(
    method: bytes, response: bytes, tmp_path: Path
) -> None:
    """C8, E17: a head that announces a body where none may be costs the upstream connection."""
    second = asyncio.Event()
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        if connections > 1:
            second.set()
            writer.write(OK)
            return
        writer.write(response)
        await reader.readuntil(b"\r\n\r\n")  # here the next request would come
        writer.write(b"5\r\nhello\r\n0\r\n\r\n")

    async with asking(handler, tmp_path) as client:
        await client.ask(head(method + b" /a HTTP/1.1", b"Host: h"), bodyless=True)
        assert payload(await client.ask(GET)) == b"ok"
    assert second.is_set()


@pytest.mark.promise("C9a", "E17a")
async def test_an_upstream_longer_than_its_length_is_cut(tmp_path: Path) -> None:
    """C9, E17: and its connection not used again."""
    script = Script(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", OK)
    async with model_server(script) as model, proxy(model.url, tmp_path) as p, connected(p.port) as client:
        assert payload(await client.ask(GET)) == b"ok"
        assert payload(await client.ask(GET)) == b"ok"
        assert model.connections == 2


@pytest.mark.promise("C10")
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize(
    "body", [b"hello", b"", b"0\r\n\r\n", bytes(100_000)], ids=["text", "empty", "looks chunked", "large"]
)
async def test_a_body_until_close(version: bytes, body: bytes, tmp_path: Path) -> None:
    """C10: it ends with the connection, and in no other way."""
    async with asking(Script(head(b"HTTP/%s 200 OK" % version, ID) + body, close=True), tmp_path) as client:
        client.write(GET)
        assert await client.rest() == head(b"HTTP/1.1 200 OK", ID, b"Connection: close") + body


@pytest.mark.promise("C10")
@pytest.mark.parametrize("connection", [(), (b"Connection: keep-alive",)])
async def test_an_http_1_0_client_gets_no_chunks(connection: tuple[bytes, ...], tmp_path: Path) -> None:
    """C10: nor trailers, nor interim responses."""
    response = head(b"HTTP/1.1 103 Early Hints", b"Link: a") + head(
        b"HTTP/1.1 200 OK", b"Trailer: X-Sum", ID, b"Transfer-Encoding: chunked"
    )
    async with asking(Script(response + b"4\r\npong\r\n1\r\n!\r\n0\r\nX-Sum: 1\r\n\r\n"), tmp_path) as client:
        client.write(head(b"GET /a HTTP/1.0", *connection))
        assert await client.rest() == head(b"HTTP/1.1 200 OK", ID, b"Connection: close") + b"pong!"


@pytest.mark.promise("A2a", "C7")
async def test_an_http_1_0_request_goes_on_as_1_1_with_a_host(tmp_path: Path) -> None:
    """A2, C7."""
    script = Script()
    async with model_server(script) as model, proxy(model.url, tmp_path, **OFF) as p, connected(p.port) as client:
        client.write(head(b"POST /a HTTP/1.0", ID, b"Content-Length: 4") + b"ping")
        assert payload(await client.rest()) == b"ok"
    host = model.url.removeprefix("http://").encode()
    assert script.received == [head(b"POST /a HTTP/1.1", ID, b"Content-Length: 4", b"Host: " + host) + b"ping"]


# --- trailers, interim responses ---


@pytest.mark.promise("C10a")
async def test_trailers_pass_both_ways(tmp_path: Path) -> None:
    """C10: but for those that would act as headers."""
    response = head(b"HTTP/1.1 200 OK", b"Trailer: X-Sum", ID, b"Transfer-Encoding: chunked") + b"4\r\npong\r\n"
    script = Script(response + b"0\r\nX-Sum: 1\r\nSet-Cookie: a\r\nx-SUM:2\r\n\r\n")
    request = head(b"POST /a HTTP/1.1", b"Host: h", b"Trailer: X-Sum", ID, b"Transfer-Encoding: chunked")
    async with asking(script, tmp_path, **OFF) as client:
        got = await client.ask(request + b"4\r\nping\r\n0\r\nX-Sum: 3\r\nHost: evil\r\n\r\n")
    assert got == response + b"0\r\nX-Sum: 1\r\nx-SUM:2\r\n\r\n"
    assert script.received == [request + b"4\r\nping\r\n0\r\nX-Sum: 3\r\n\r\n"]


@pytest.mark.promise("C10a", "E17a")
@pytest.mark.parametrize("pause", [False, True], ids=["at once", "afterwards"])
async def test_a_trailer_is_no_header_of_the_next_message(pause: bool, tmp_path: Path) -> None:
    """C10, E17: aiohttp's own parser keeps the last trailer and puts it before the next message's headers."""
    chunked = head(b"HTTP/1.1 200 OK", ID, b"Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\nX-Evil: 1\r\n\r\n"
    plain = head(b"HTTP/1.1 200 OK", ID, b"Content-Length: 2") + b"ok"
    script = Script(chunked, plain)
    first = (
        head(b"POST /a HTTP/1.1", b"Host: h", ID, b"Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\nX-Evil: 1\r\n\r\n"
    )
    second = head(b"GET /b HTTP/1.1", b"Host: h", ID)
    async with model_server(script) as model, proxy(model.url, tmp_path, **OFF) as p, connected(p.port) as client:
        if pause:
            assert await client.ask(first) == chunked
            assert await client.ask(second) == plain
        else:
            assert [await client.ask(first + second), await client.response()] == [chunked, plain]
        assert model.connections == 1
    assert script.received == [first, second]


@pytest.mark.promise("F19")
async def test_100_continue_comes_from_the_model_server(tmp_path: Path) -> None:
    """F19: the body is not asked for before the model server asks for it."""
    heads: asyncio.Queue[bytes] = asyncio.Queue()
    ready = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.put_nowait(await reader.readuntil(b"\r\n\r\n"))
        await ready.wait()
        writer.write(head(b"HTTP/1.1 100 Continue"))
        assert await reader.readexactly(4) == b"ping"
        writer.write(OK)

    async with asking(handler, tmp_path) as client:
        client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 4", b"Expect: 100-continue"))
        assert header(await heads.get(), b"expect") == [b"100-continue"]
        interim = asyncio.create_task(client.reader.readuntil(b"\r\n\r\n"))
        await asyncio.sleep(0)
        assert not interim.done()
        ready.set()
        assert await interim == head(b"HTTP/1.1 100 Continue")
        assert payload(await client.ask(b"ping")) == b"ok"


@pytest.mark.promise("D12a", "F19")
async def test_a_refused_expectation(tmp_path: Path) -> None:
    """F19, D12: the final answer comes without the body; what follows is not taken for a request."""
    refusal = head(b"HTTP/1.1 417 Expectation Failed", b"Content-Length: 0", ID)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refusal)
        await reader.read()

    async with asking(handler, tmp_path) as client:
        client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 4", b"Expect: 100-continue"))
        assert await client.rest() == refusal[:-2] + b"Connection: close\r\n\r\n"


@pytest.mark.promise("C8", "F19a")
async def test_interim_responses_are_passed_on(tmp_path: Path) -> None:
    """C8, F19: 102, 103 and what there may be, before the final head, as often as they come."""
    interim = head(b"HTTP/1.1 103 Early Hints", b"Link: </a.css>", b"X: \xff") + head(b"HTTP/1.1 102 Processing")
    final = head(b"HTTP/1.1 200 OK", ID, b"Content-Length: 2") + b"ok"
    async with asking(Script(interim + final), tmp_path) as client:
        for _ in range(2):
            client.write(GET)
            assert await client.reader.readexactly(len(interim + final)) == interim + final


BAD_ANSWERS = [
    *(
        head(b"HTTP/1.1 200 OK", *lines) + b"0\r\n\r\n"
        for lines in (
            [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
            [b"Content-Length: 5", b"Content-Length: 5"],
            [b"Content-Length: 5", b"Content-Length: 3"],
            *([b"Content-Length: " + size] for size in (b"+5", b"-5", b"0x5", b"5, 5", b"0_5", b"9" * 20)),
            *(
                [b"Transfer-Encoding: " + te]
                for te in (b"gzip, chunked", b"xchunked", b"identity", b"chunked, chunked")
            ),
            [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
            [b"Content-Length : 5"],
            [b"Transfer-Encoding : chunked"],
            [b"A: b\x00", b"Content-Length: 5"],
            [b"A: b", b" folded", b"Content-Length: 5"],
        )
    ),
    b"HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nok",
    head(b"HTTP/1.1 2000 OK", b"Content-Length: 2") + b"ok",
    head(b"HTTP/1.1 099 OK", b"Content-Length: 2") + b"ok",
    head(b"HTTP/3.0 200 OK", b"Content-Length: 2") + b"ok",
    b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
]


@pytest.mark.promise("G22")
@pytest.mark.parametrize("response", BAD_ANSWERS, ids=lambda response: response[:70].decode("latin-1"))
async def test_an_answer_that_breaks_the_rules_is_not_passed_on(response: bytes, tmp_path: Path) -> None:
    """G22: 502 before a byte of it has gone out; the upstream connection is not used again."""
    script = Script(response, OK)
    async with model_server(script) as model, proxy(model.url, tmp_path) as p:
        got = await exchange(p.port, GET)
        assert got.startswith(b"HTTP/1.1 502 "), got
        assert p.lines("response")[0]["capturestatus"] == "upstreamfailed"
        assert payload(await exchange(p.port, GET, until_close=False)) == b"ok"
        assert model.connections == 2


@pytest.mark.promise("C11a")
async def test_probes_are_relayed_though_they_are_not_recorded(tmp_path: Path) -> None:
    """A3."""
    async with relayed(Script(), tmp_path) as p, connected(p.port) as client:
        assert payload(await client.ask(head(b"GET /health HTTP/1.1", b"Host: h"))) == b"ok"
        assert p.account().received == 0
