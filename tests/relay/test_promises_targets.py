"""What is asked for: targets, methods, and what a proxy must not do of its own accord."""

from __future__ import annotations

import asyncio
import string
from pathlib import Path

import pytest

from tests.harness import exchange, model_server, proxy
from tests.relay.wire import GET, OK, Script, asking, connected, head, header, names, payload

# As IANA has them registered, but for CONNECT, TRACE and HTTP/2's PRI.
METHODS = """
ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT COPY DELETE GET LABEL LINK LOCK MERGE MKACTIVITY MKCALENDAR MKCOL
MKREDIRECTREF MKWORKSPACE MOVE OPTIONS ORDERPATCH PATCH POST PROPFIND PROPPATCH PUT QUERY REBIND REPORT SEARCH UNBIND
UNCHECKOUT UNLINK UNLOCK UPDATE UPDATEREDIRECTREF VERSION-CONTROL
"""


@pytest.mark.promise("B6b")
async def test_every_registered_method_passes_with_and_without_a_body(tmp_path: Path) -> None:
    script = Script()
    async with asking(script, tmp_path) as client:
        for method in METHODS.split():
            start = f"{method} /a HTTP/1.1".encode()
            assert payload(await client.ask(head(start, b"Host: h"))) == b"ok"
            assert payload(await client.ask(head(start, b"Host: h", b"Content-Length: 4") + b"ping")) == b"ok"
            bare, filled = script.received[-2:]
            assert bare.startswith(start + b"\r\n")
            assert filled.startswith(start + b"\r\n")
            assert (header(bare, b"content-length"), payload(filled)) == ([], b"ping")


TARGETS = [
    b"/?",
    b"/??",
    b"/?&&=&",
    b"/a?a=1&a=1&b&b=",
    b"/%",
    b"/%4",
    b"/%G0%zz?%",
    b"/%00%0d%0a%20",
    b"/%2f%2F%252F",
    b"///",
    b"//host/a",
    b"/..",
    b"/../../a/..;/b",
    b"/./",
    b"/a//..//b/",
    b"/;",
    b"/a;v=1/b;w=2?c;d",
    b"/%E2%82%AC/%e2%82%ac",
    b"/a:b@c:80",
    b"/http://h/a?http://i",
    b"/" + string.punctuation.replace("#", "").encode(),
    b"/a?" + string.punctuation.replace("#", "").encode(),
]


@pytest.mark.promise("B6", "B6a")
@pytest.mark.parametrize("form", [b"", b"http://other"], ids=["origin form", "absolute form"])
@pytest.mark.parametrize("base", ["", "/v1%2F;a"])
async def test_odd_targets_pass_byte_for_byte(form: bytes, base: str, tmp_path: Path) -> None:
    script = Script()
    async with model_server(script) as model, proxy(model.url + base, tmp_path) as p, connected(p.port) as client:
        for target in TARGETS:
            assert payload(await client.ask(head(b"GET " + form + target + b" HTTP/1.1", b"Host: h"))) == b"ok"
            assert script.received[-1].split(b" ")[1] == base.encode() + target


@pytest.mark.promise("B6b")
async def test_options_of_the_server_itself(tmp_path: Path) -> None:
    script = Script()
    async with model_server(script) as model, proxy(model.url + "/v1", tmp_path) as p, connected(p.port) as client:
        assert payload(await client.ask(head(b"OPTIONS * HTTP/1.1", b"Host: h"))) == b"ok"
        await p.recorded(2)
        assert p.lines("request")[0]["path"] == "*"
    assert script.received[0].startswith(b"OPTIONS * HTTP/1.1\r\n")


@pytest.mark.promise("B6b")
@pytest.mark.parametrize("start", [b"CONNECT h:443", b"CONNECT h:443/", b"TRACE /a", b"TRACE *", b"CONNECT /a"])
async def test_connect_and_trace_go_nowhere(start: bytes, tmp_path: Path) -> None:
    """Neither does what follows: it could be meant for a tunnel."""
    async with model_server(Script()) as model, proxy(model.url, tmp_path) as p:
        got = await exchange(p.port, head(start + b" HTTP/1.1", b"Host: h") + GET)
        assert got[:13] in (b"HTTP/1.1 405 ", b"HTTP/1.1 400 ")
        allowed = [b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"]
        assert header(got, b"allow") == (allowed if got[9:12] == b"405" else [])
        assert got.count(b"HTTP/1.1 ") == 1
        assert model.connections == 0


@pytest.mark.promise("B6b", "A4a")
@pytest.mark.parametrize(
    "target", [b"*", b"http://", b"http:///a", b"http://h:99999/", b"http://[::1/", b"http://h:x/"]
)
async def test_what_is_no_target_is_not_repeated(target: bytes, tmp_path: Path) -> None:
    async with model_server(Script()) as model, proxy(model.url, tmp_path) as p:
        got = await exchange(p.port, head(b"GET %b HTTP/1.1" % target, b"Host: h"))
        assert b'"message":"the request\'s target is not valid"' in got
        assert model.connections == 0


@pytest.mark.promise("B6c")
@pytest.mark.parametrize("status", [300, 301, 302, 303, 305, 307, 308])
async def test_a_redirect_is_the_clients_to_follow(status: int, tmp_path: Path) -> None:
    visited = Script()
    async with model_server(visited) as elsewhere:
        answer = head(
            b"HTTP/1.1 %d Elsewhere" % status,
            b"Location: %s/b" % elsewhere.url.encode(),
            b"Set-Cookie: a=1",
            b"x-request-id: id-1",
            b"Content-Length: 2",
        )
        script = Script(answer + b"go")
        async with asking(script, tmp_path) as client:
            for _ in range(2):
                assert await client.ask(GET) == answer + b"go"
        assert elsewhere.connections == 0
    assert len(script.received) == 2
    assert all(b"cookie" not in names(received) for received in script.received)


@pytest.mark.promise("B6c")
@pytest.mark.parametrize("status", [401, 407, 408, 425, 429, 503])
async def test_nothing_is_tried_again_because_of_a_status(status: int, tmp_path: Path) -> None:
    answer = head(
        b"HTTP/1.1 %d Not now" % status,
        b"WWW-Authenticate: Basic",
        b"Retry-After: 0",
        b"x-request-id: id-1",
        b"Content-Length: 0",
    )
    script = Script(answer, OK)
    async with asking(script, tmp_path) as client:
        assert await client.ask(GET) == answer
        assert payload(await client.ask(GET)) == b"ok"
    assert len(script.received) == 2


@pytest.mark.promise("B6c")
@pytest.mark.parametrize("upper", [False, True])
async def test_a_proxy_of_the_environment_is_not_asked(
    upper: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a .netrc read."""

    async def forbidden(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head(b"HTTP/1.1 200 OK", b"Content-Length: 5") + b"wrong")

    (tmp_path / "netrc").write_text("default login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    script = Script()
    async with model_server(forbidden) as other:
        for name in ("http_proxy", "https_proxy", "all_proxy", "ws_proxy"):
            monkeypatch.setenv(name.upper() if upper else name, other.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        async with asking(script, tmp_path / "data") as client:
            assert payload(await client.ask(GET)) == b"ok"
        assert other.connections == 0
    assert b"authorization" not in names(script.received[0])
