"""What a head may hold, and what becomes of it on its way: blanks in lists, bytes that are no ASCII, sizes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.harness import exchange, model_server, proxy
from tests.relay.wire import GET, OK, Script, asking, connected, head, header, names, payload, relayed

ID = b"x-request-id: id-1"
OFF = {"proxy__forwarded_headers": "off"}
LIMIT = 128 * 1024  # of proxy.max_head_bytes


# --- A1: lists in Connection and TE ---

LISTED = (
    b"Connection:X-A\t,\tx-b,,",
    b"Connection: , ,x-C",
    b"CONNECTION:close-not ,X-d  ",
    b"Connection: keep-alive,x-e",
)


@pytest.mark.promise("A1")
@pytest.mark.parametrize("lines", [LISTED, LISTED[::-1]], ids=["first", "last"])
async def test_names_in_connection_are_found_whatever_stands_around_them(
    lines: tuple[bytes, ...], tmp_path: Path
) -> None:
    """Before the headers that they name or behind them, in one line or several, with blanks, tabs and empty items."""
    hop = (b"x-a: 1", b"X-B: 2", b"x-c: 3", b"X-C: 4", b"X-D: 5", b"X-E: 6", b"Close-Not: 7")
    sent = (*lines, *hop) if lines is LISTED else (*hop, *lines)
    script = Script(head(b"HTTP/1.1 200 OK", *sent, b"X-F: 7", ID, b"Content-Length: 2") + b"ok")
    async with asking(script, tmp_path, **OFF) as client:
        for _ in range(2):
            got = await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", *sent, b"X-F: 7", ID))
            assert got == head(b"HTTP/1.1 200 OK", b"X-F: 7", ID, b"Content-Length: 2") + b"ok"
    assert script.received == [head(b"GET /a HTTP/1.1", b"Host: h", b"X-F: 7", ID)] * 2


@pytest.mark.promise("A1")
async def test_hop_by_hop_headers_of_interim_answers_do_not_pass(tmp_path: Path) -> None:
    interim = head(b"HTTP/1.1 103 Early Hints", b"Connection: x-hop", b"X-Hop: 1", b"Keep-Alive: 5", b"Link: a")
    async with asking(Script(interim + OK), tmp_path) as client:
        client.write(GET)
        expected = head(b"HTTP/1.1 103 Early Hints", b"Link: a")
        assert await client.reader.readexactly(len(expected)) == expected
        assert payload(await client.response()) == b"ok"


@pytest.mark.promise("A1b", "A2")
async def test_connection_can_not_hide_where_a_client_comes_from(tmp_path: Path) -> None:
    script = Script()
    async with asking(script, tmp_path) as client:
        listed = b"Connection: X-Forwarded-For, X-Forwarded-Host, X-Forwarded-Proto, Host, X-Request-Id"
        await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", ID, b"X-Forwarded-For: 1.1.1.1", listed))
    (received,) = script.received
    assert header(received, b"X-Forwarded-For") == [b"1.1.1.1, 127.0.0.1"]
    assert header(received, b"X-Forwarded-Proto") == [b"http"]
    assert header(received, b"X-Forwarded-Host") == header(received, b"Host") == [b"h"]
    assert header(received, b"x-request-id") == [b"id-1"]


@pytest.mark.promise("A1a")
@pytest.mark.parametrize(
    ("lines", "passed"),
    [
        ((b"TE: trailers",), True),
        ((b"te:Trailers",), True),
        ((b"TE: gzip;q=0.5 ,\ttrailers , deflate",), True),
        ((b"TE: gzip, chunked",), False),
        ((b"TE:",), False),
        ((b"TE: trailers", b"Connection: te"), True),
    ],
)
async def test_of_te_only_trailers_pass(lines: tuple[bytes, ...], passed: bool, tmp_path: Path) -> None:
    script = Script()
    async with asking(script, tmp_path, **OFF) as client:
        await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", ID, *lines))
    assert script.received == [
        head(b"GET /a HTTP/1.1", b"Host: h", ID, *([b"TE: trailers", b"Connection: TE"] if passed else []))
    ]


@pytest.mark.promise("A1a", "A3a")
async def test_a_te_that_only_looks_like_trailers_does_not_pass(tmp_path: Path) -> None:
    script = Script()
    async with asking(script, tmp_path, **OFF) as client:
        for te in (b"TE: x-trailers", b"TE: trailers2", b'TE: gzip;a="trailers"'):
            await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", ID, te))
    assert [header(received, b"te") for received in script.received] == [[], [], []]


@pytest.mark.promise("A1a")
async def test_trailers_are_found_in_any_te_line(tmp_path: Path) -> None:
    script = Script()
    async with asking(script, tmp_path, **OFF) as client:
        await client.ask(head(b"GET /a HTTP/1.1", b"Host: h", ID, b"TE: gzip", b"TE: trailers"))
    assert [header(received, b"te") for received in script.received] == [[b"trailers"]]


# --- A2: Host ---


@pytest.mark.promise("A2a")
@pytest.mark.parametrize("host", ["pass", "upstream"])
@pytest.mark.parametrize("second", [b"Host: h", b"HOST:other", b"host: "])
async def test_two_hosts_are_none(host: str, second: bytes, tmp_path: Path) -> None:
    script = Script()
    async with asking(script, tmp_path, proxy__host_header=host) as client:
        client.write(head(b"GET /a HTTP/1.1", b"Host: h", b"A: 1", second))
        assert (await client.rest()).startswith(b"HTTP/1.1 400 ")
    assert script.received == []


@pytest.mark.promise("A2", "B6b")
async def test_x_forwarded_host_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """RFC 9112 §3.2.2: beside an absolute target the Host header is to be ignored."""
    script = Script()
    async with asking(script, tmp_path) as client:
        await client.ask(head(b"GET http://other:81/a HTTP/1.1", b"Host: h"))
    assert header(script.received[0], b"Host") == [b"other:81"]
    assert header(script.received[0], b"X-Forwarded-Host") == [b"other:81"]


# --- A3: what is repeated ---

NAMES = """
Accept Accept-Charset Accept-Encoding Accept-Language Accept-Ranges Age Allow Authorization Cache-Control Cookie
Content-Disposition Content-Encoding Content-Language Date Expect Expires Forwarded From If-Match If-Modified-Since
If-None-Match If-Range If-Unmodified-Since Last-Modified Link Location Origin Pragma Range Referer Retry-After
Set-Cookie Vary Via Warning WWW-Authenticate X-A traceparent tracestate
"""
ONCE = ["Content-Location", "Content-Range", "Content-Type", "ETag", "Max-Forwards", "Server", "User-Agent"]


@pytest.mark.promise("A3")
async def test_headers_of_any_name_may_come_twice(tmp_path: Path) -> None:
    """In an answer those, too, that are refused in a request."""
    twice = [f"{name}: {number}".encode() for number in (2, 1) for name in NAMES.split()]
    answers = [f"{name}: {number}".encode() for number in (2, 1) for name in ONCE]
    answer = head(b"HTTP/1.1 200 OK", *answers, *twice, ID, b"Content-Length: 0")
    request = head(b"GET /a HTTP/1.1", b"Host: h", *twice, ID)
    script = Script(answer)
    async with asking(script, tmp_path, **OFF) as client:
        assert await client.ask(request) == answer
    assert script.received == [request]


@pytest.mark.promise("A3")
@pytest.mark.parametrize("name", [*ONCE, "Host"])
async def test_few_headers_of_a_request_may_come_once_only(name: str, tmp_path: Path) -> None:
    script = Script()
    async with asking(script, tmp_path) as client:
        lines = [f"{spelling}: 1".encode() for spelling in (name, name.lower())]
        client.write(head(b"GET /a HTTP/1.1", *([] if name == "Host" else [b"Host: h"]), *lines))
        assert (await client.rest()).startswith(b"HTTP/1.1 400 ")
    assert script.received == []


@pytest.mark.promise("A3")
def test_the_documentation_names_the_headers_that_may_come_once_only() -> None:
    page = (Path(__file__).parent.parent.parent / "docs/transparency.md").read_text(encoding="utf-8")
    limits = page.partition("## Known limits")[2].partition("\n## ")[0]
    assert [name for name in [*ONCE, "Host"] if name not in limits] == []


@pytest.mark.promise("A3")
async def test_cookies_and_lists_are_not_joined_or_parted(tmp_path: Path) -> None:
    cookies = [b"Set-Cookie: a=%d; Expires=Mon, 02 Jan 2034 03:04:05 GMT" % number for number in range(50)]
    lists = [b"Vary: A", b"vary: a , B", b"Cache-Control: no-store", b"Cache-Control: private, max-age=0"]
    answer = head(b"HTTP/1.1 200 OK", *cookies[:25], *lists, *cookies[25:], ID, b"Content-Length: 0")
    script = Script(answer)
    asked = head(b"GET /a HTTP/1.1", b"Host: h", b"Cookie: a=1; b=2", b"Accept: a", b"Accept: b, c", b"Cookie: c", ID)
    async with asking(script, tmp_path, **OFF) as client:
        assert await client.ask(asked) == answer
    assert script.received == [asked]


# --- A4: bytes ---

HIGH = bytes(range(0x80, 0x100))
CONTROLS = [code for code in [*range(0x20), 0x7F] if code not in (0x09, 0x0A, 0x0D)]


@pytest.mark.promise("A4")
async def test_every_byte_from_0x80_on_passes_both_ways(tmp_path: Path) -> None:
    lines = [b"A: " + HIGH, b"B: a" + HIGH[::-1] + b"\tb", b"C: " + "ünïcödé \U0001f4a9".encode()]
    request = head(b"GET /a HTTP/1.1", b"Host: h", *lines, ID)
    answer = head(b"HTTP/1.1 200 " + HIGH, *lines, ID, b"Content-Length: 0")
    script = Script(answer)
    async with asking(script, tmp_path, **OFF) as client:
        for _ in range(2):
            assert await client.ask(request) == answer
    assert script.received == [request] * 2


@pytest.mark.promise("A4", "A4a")
@pytest.mark.parametrize("place", [b"A: b%cc", b"A%cb: c", b"x-request-id: b%cc", b"Content-Type: b%cc", b"Host: b%cc"])
async def test_control_characters_of_a_request_pass_nowhere(place: bytes, tmp_path: Path) -> None:
    """Not in a value, a name, an id that would be echoed, and not on their way into our own answer."""
    async with model_server(Script()) as model, proxy(model.url, tmp_path) as p:
        for code in [*CONTROLS, *((0x09, 0x0A, 0x0D) if place.startswith(b"A%c") else (0x0A, 0x0D))]:
            line = place % code
            lines = [line] if line.startswith(b"Host") else [b"Host: h", line]
            got = await exchange(p.port, head(b"GET /a HTTP/1.1", *lines))
            assert got.startswith(b"HTTP/1.1 400 "), line
            assert got.count(b"\n") == got.partition(b"\r\n\r\n")[0].count(b"\r\n") + 3, got
            assert not set(got) & set(CONTROLS)
        assert model.connections == 0


@pytest.mark.promise("A4", "A4a", "G22")
@pytest.mark.parametrize("place", [b"A: b%cc", b"A%cb: c", b"x-request-id: b%cc", b"Set-Cookie: b%cc"])
@pytest.mark.parametrize("status", [200, 204, 103])
async def test_control_characters_of_an_answer_pass_nowhere(place: bytes, status: int, tmp_path: Path) -> None:
    lines = [place % code for code in [*CONTROLS, 0x0A, 0x0D]]
    answers = [
        head(b"HTTP/1.1 %d Reason" % status, line, *([b"Content-Length: 2"] if status == 200 else [])) + OK
        for line in lines
    ]
    async with relayed(Script(*answers), tmp_path) as p:
        for _ in lines:
            got = await exchange(p.port, GET)
            assert got.startswith(b"HTTP/1.1 502 "), got
            assert not set(got) & set(CONTROLS)


@pytest.mark.promise("A4a")
@pytest.mark.parametrize("odd", [b"\r\nX: y", b"\x00", b"\n", b"\r", b"\t", b"\x7f", b"\xe9"])
@pytest.mark.parametrize(
    "line", [b"GET /secret%b HTTP/1.1", b"GET /a HTTP/1.1\r\nsecret%b: 1", b"GET /a HTTP/1.1\r\nB%b: secret"]
)
async def test_an_error_repeats_nothing_of_the_request(line: bytes, odd: bytes, tmp_path: Path) -> None:
    async with relayed(Script(), tmp_path) as p:
        got = await exchange(
            p.port, head(line % odd, *([] if odd == b"\r\nX: y" and b"\r\n" in line else [b"Host: h"]))
        )
    assert got[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 505 ")
    assert names(got) == [b"content-type", b"content-length", b"connection"]
    assert b"secret" not in got


# --- A5: sizes ---


@pytest.mark.promise("A5", "A3")
async def test_a_head_of_tokens_and_cookies_passes_both_ways(tmp_path: Path) -> None:
    """As a browser behind single sign-on sends it: 64 KiB in many lines."""
    lines = [b"Authorization: Bearer " + b"t" * 16_000]
    lines += [b"Cookie: c%d=%b" % (number, b"v" * 400) for number in range(100)]
    lines += [b"X-Token-%d: %b" % (number, b"w" * 80) for number in range(100)]
    request = head(b"GET /a HTTP/1.1", b"Host: h", ID, *lines)
    assert len(request) > 64 * 1024
    answer = head(b"HTTP/1.1 200 OK", ID, *(b"Set-" + line for line in lines), b"Content-Length: 2") + b"ok"
    script = Script(answer)
    async with asking(script, tmp_path, **OFF) as client:
        for at in range(2):
            if at:
                client.write(request[:-1])
                await asyncio.sleep(0)
                client.write(request[-1:])
            else:
                client.write(request)
            assert await client.response() == answer
    assert script.received == [request] * 2


@pytest.mark.promise("A5")
@pytest.mark.parametrize("way", ["request", "answer", "request line"])
@pytest.mark.parametrize("over", [0, 1])
async def test_the_limit_of_a_head_is_exact(way: str, over: int, tmp_path: Path) -> None:
    def filled(start: bytes, *lines: bytes) -> bytes:
        return head(start, *lines, b"A: " + b"a" * (LIMIT + over - len(head(start, *lines, b"A: "))))

    request, answer, status = GET, OK, 200
    if way == "request":
        request, status = filled(b"GET /a HTTP/1.1", b"Host: h"), 431 if over else 200
    elif way == "answer":
        answer, status = filled(b"HTTP/1.1 200 OK", b"Content-Length: 0"), 502 if over else 200
    else:
        line = b"GET /" + b"a" * (LIMIT + over - len(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")) + b" HTTP/1.1"
        request, status = head(line, b"Host: h"), 431 if over else 200
    script = Script(answer)
    async with relayed(script, tmp_path, **OFF) as p, connected(p.port) as client:
        got = await client.ask(request)
        assert got.startswith(b"HTTP/1.1 %d " % status)
    assert len(script.received) == (status != 431)


@pytest.mark.promise("A5", "C8")
@pytest.mark.parametrize(
    "request_",
    [
        head(b"HEAD /a HTTP/1.1", b"Host: h", b"Host: h"),
        head(b"HEAD /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: gzip"),
        head(b"HEAD /a HTTP/1.1", b"Host: h", b"A: " + b"a" * LIMIT),
        head(b"HEAD /" + b"a" * LIMIT + b" HTTP/1.1", b"Host: h"),
        b"\r" + head(b"HEAD /a HTTP/1.1", b"Host: h"),
    ],
    ids=lambda request: request[:40].decode(),
)
async def test_a_refused_head_request_gets_no_body(request_: bytes, tmp_path: Path) -> None:
    async with asking(Script(), tmp_path) as client:
        client.write(request_)
        got = await client.rest()
    assert got.startswith(b"HTTP/1.1 ")
    assert got.endswith(b"\r\n\r\n")


@pytest.mark.promise("A5")
async def test_how_many_headers_there_may_be_is_exact(tmp_path: Path) -> None:
    script = Script()
    async with relayed(script, tmp_path, proxy__max_headers=20) as p:
        for count, status in ((20, 200), (21, 431)):
            request = head(b"GET /a HTTP/1.1", b"Host: h", b"Connection: close", *[b"A: a"] * (count - 2))
            assert (await exchange(p.port, request)).startswith(b"HTTP/1.1 %d " % status)
    assert len(script.received) == 1
