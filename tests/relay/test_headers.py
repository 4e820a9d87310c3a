"""A, B: what is changed in a head, as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.relay.headers import (
    HOP_BY_HOP,
    Forwarding,
    allowed_trailers,
    connection_options,
    is_clean,
    origin_form,
    request_head,
    response_head,
    valid_request_id,
)
from proxy.settings import ForwardedHeaders

Headers = list[tuple[bytes, bytes]]
OFF = Forwarding(ForwardedHeaders.OFF, b"10.0.0.1", b"http")


def options(headers: Headers) -> frozenset[bytes]:
    values = (value for name, value in headers if name.lower() == b"connection")
    return connection_options(value.decode("utf-8", "surrogateescape") for value in values)


def request(headers: Headers, *, forwarding: Forwarding = OFF, **changes: object) -> list[bytes]:
    """The lines of the head that goes to the model server."""
    arguments: dict[str, object] = {
        "dropped": options(headers),
        "host": b"model:5001",
        "set_host": None,
        "has_request_id": True,
        "forwarding": forwarding,
        "chunked": False,
        "te_trailers": False,
        **changes,
    }
    before, after = request_head(b"POST", b"/score", headers, **arguments)  # type: ignore[arg-type]
    head = before + b"id-1" + after if after else before
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /score HTTP/1.1"
    assert lines[-2:] == [b"", b""]
    return lines[1:-2]


def response(headers: Headers, *, request_id: bytes | None = None, chunked: bool = False) -> list[bytes]:
    """The lines of the head that goes to the client."""
    before, after = response_head(
        b"HTTP/1.1 200 OK",
        headers,
        dropped=options(headers),
        with_request_id=request_id is not None,
        chunked=chunked,
        connection=None,
    )
    head = before + request_id + after if request_id and after else before
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert lines[-2:] == [b"", b""]
    return lines[1:-2]


NAMES = st.text("!#$%&'*+-.^_`|~0123456789ABCXYZabcxyz", min_size=1, max_size=8).map(lambda name: f"Q{name}".encode())
VALUES = st.binary(max_size=20).map(lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F).strip())


@pytest.mark.promise("A3", "A3a", "A4")
@settings(database=None, deadline=None)
@given(headers=st.lists(st.tuples(NAMES, VALUES)))
def test_end_to_end_headers_keep_number_order_case_and_bytes(headers: Headers) -> None:
    """A3, A4: both ways; nothing is added."""
    expected = [name + b": " + value for name, value in headers]
    assert request([(b"Host", b"h"), *headers]) == [b"Host: h", *expected]
    assert response(headers) == expected


@pytest.mark.promise("A1")
@pytest.mark.parametrize("name", sorted(HOP_BY_HOP))
def test_hop_by_hop_headers_are_stripped(name: bytes) -> None:
    """A1."""
    for spelling in (name, name.upper(), name.title()):
        assert request([(b"Host", b"h"), (spelling, b"x")]) == [b"Host: h"]
        assert response([(spelling, b"x")]) == []


@pytest.mark.promise("A1")
def test_headers_that_connection_names_are_stripped() -> None:
    """A1: in any case, from every Connection header, and wherever they stand."""
    headers = [(b"X-One", b"1"), (b"Connection", b"x-one , X-TWO,,"), (b"connection", b"x-Three"), (b"X-Two", b"2")]
    headers += [(b"x-three", b"3"), (b"X-Two", b"22"), (b"X-Four", b"4")]
    assert options(headers) >= {b"x-one", b"x-two", b"x-three"}
    assert request([(b"Host", b"h"), *headers]) == [b"Host: h", b"X-Four: 4"]
    assert response(headers) == [b"X-Four: 4"]


@pytest.mark.promise("A1b")
@pytest.mark.parametrize("name", [b"Content-Length", b"Host", b"x-request-id", b"Content-Type", b"Content-Encoding"])
def test_connection_can_not_name_what_frames_or_routes(name: bytes) -> None:
    """A1: else a client could desynchronise the model server."""
    headers = [(b"Connection", name), (name, b"5")]
    others = [] if name == b"Host" else [b"Host: model:5001"]
    assert request(headers) == [name + b": 5", *others]
    assert response(headers) == [name + b": 5"]


@pytest.mark.promise("A1a")
def test_te_trailers_alone_is_passed_on() -> None:
    """A1: with the Connection option that it needs on the next hop."""
    headers = [(b"Host", b"h"), (b"TE", b"gzip, trailers"), (b"Connection", b"TE")]
    assert request(headers, te_trailers=True) == [b"Host: h", b"TE: trailers", b"Connection: TE"]


@pytest.mark.promise("C10a")
def test_trailer_is_kept_where_trailers_can_follow() -> None:
    """C10."""
    headers = [(b"Host", b"h"), (b"Trailer", b"X-Sum")]
    assert request(headers, chunked=True) == [b"Host: h", b"Trailer: X-Sum", b"Transfer-Encoding: chunked"]
    assert request(headers) == [b"Host: h"]
    assert response(headers[1:], chunked=True) == [b"Trailer: X-Sum", b"Transfer-Encoding: chunked"]
    assert response(headers[1:]) == []


CLIENT_SENT = [(b"x-forwarded-for", b"1.1.1.1"), (b"X-Forwarded-For", b"2.2.2.2"), (b"X-Forwarded-Proto", b"https")]


@pytest.mark.promise("A2")
@pytest.mark.parametrize(
    ("mode", "headers", "expected"),
    [
        ("append", [], [b"X-Forwarded-For: 10.0.0.1", b"X-Forwarded-Proto: http", b"X-Forwarded-Host: h"]),
        (
            "append",
            CLIENT_SENT,
            [
                b"X-Forwarded-For: 1.1.1.1, 2.2.2.2, 10.0.0.1",
                b"X-Forwarded-Proto: https",
                b"X-Forwarded-Host: h",
            ],
        ),
        (
            "append",
            [(b"X-Forwarded-Host", b"public")],
            [b"X-Forwarded-For: 10.0.0.1", b"X-Forwarded-Proto: http", b"X-Forwarded-Host: public"],
        ),
        (
            "append",
            [(name, b"") for name in (b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host")],
            [b"X-Forwarded-For: 10.0.0.1", b"X-Forwarded-Proto: http", b"X-Forwarded-Host: h"],
        ),
        ("replace", CLIENT_SENT, [b"X-Forwarded-For: 10.0.0.1", b"X-Forwarded-Proto: http", b"X-Forwarded-Host: h"]),
        ("off", [], []),
        ("off", CLIENT_SENT, [name + b": " + value for name, value in CLIENT_SENT]),
    ],
)
def test_forwarded_headers(mode: str, headers: Headers, expected: list[bytes]) -> None:
    """A2."""
    forwarding = Forwarding(ForwardedHeaders(mode), b"10.0.0.1", b"http")
    assert request([(b"Host", b"h"), *headers], forwarding=forwarding) == [b"Host: h", *expected]


@pytest.mark.promise("A2")
def test_forwarded_headers_without_an_address() -> None:
    """A2: a client over a unix socket has none."""
    forwarding = Forwarding(ForwardedHeaders.APPEND, None, b"https")
    assert request([(b"Host", b"h")], forwarding=forwarding) == [
        b"Host: h",
        b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: h",
    ]


@pytest.mark.promise("A2a")
def test_host_is_kept_set_or_added() -> None:
    """A2: rewriting keeps its place; HTTP/1.0 may have none."""
    headers = [(b"A", b"1"), (b"hOsT", b"h"), (b"B", b"2")]
    assert request(headers) == [b"A: 1", b"hOsT: h", b"B: 2"]
    assert request(headers, set_host=b"model") == [b"A: 1", b"hOsT: model", b"B: 2"]
    assert request([]) == [b"Host: model:5001"]
    assert request([], set_host=b"other") == [b"Host: other"]


@pytest.mark.promise("A3a")
def test_the_request_id_is_kept_or_replaced() -> None:
    """A3: one published exception, both ways."""
    headers = [(b"Host", b"h"), (b"X-Request-ID", b"mine")]
    assert request(headers) == [b"Host: h", b"X-Request-ID: mine"]
    assert request(headers, has_request_id=False) == [b"Host: h", b"x-request-id: id-1"]
    assert response([(b"A", b"1")], request_id=b"id-1") == [b"A: 1", b"x-request-id: id-1"]
    assert response([(b"X-Request-Id", b"theirs")], request_id=b"id-1") == [b"X-Request-Id: theirs"]


@pytest.mark.promise("A4a")
@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (b"a", True),
        (b"!~", True),
        (b"x" * 100, True),
        (b"x" * 101, False),
        (b"", False),
        (None, False),
        (b"a b", False),
        (b"a\tb", False),
        (b"a\x7f", False),
        (b"\xc3\xa9", False),
        (b"a\r\nSet-Cookie: b", False),
        (b"a\x00", False),
    ],
)
def test_valid_request_id(value: bytes | None, valid: bool) -> None:
    """A4: an id is echoed, so it is checked."""
    assert valid_request_id(value) is valid


@pytest.mark.promise("B6", "B6a", "B6b")
@pytest.mark.parametrize(
    ("target", "base", "expected"),
    [
        (b"/score", b"", (b"/score", None)),
        (b"/score", b"/v1", (b"/v1/score", None)),
        (b"/", b"/v1", (b"/v1/", None)),
        (b"//a/../%2F;b?c?d=&", b"/v1", (b"/v1//a/../%2F;b?c?d=&", None)),
        (b"/?", b"", (b"/?", None)),
        (b"*", b"/v1", (b"*", None)),
        (b"http://h:80/a?b", b"/v1", (b"/v1/a?b", b"h:80")),
        (b"http://h?b/c", b"", (b"/?b/c", b"h")),
        (b"http://user:pw@h/a", b"", (b"/a", b"h")),
        (b"http://[::1]:8/a://b", b"", (b"/a://b", b"[::1]:8")),
        (b"/http://h/a", b"", (b"/http://h/a", None)),
    ],
)
def test_origin_form(target: bytes, base: bytes, expected: tuple[bytes, bytes | None]) -> None:
    """B6."""
    assert origin_form("GET", target, base) == origin_form("OPTIONS", target, base) == expected


@pytest.mark.promise("B6b")
@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", b"HTTP://h", (b"/v1/", b"h")),
        ("OPTIONS", b"http://h:80", (b"*", b"h:80")),
        ("OPTIONS", b"http://h?", (b"/v1/?", b"h")),
        ("OPTIONS", b"http://h/", (b"/v1/", b"h")),
    ],
)
def test_options_of_an_authority_alone(method: str, target: bytes, expected: tuple[bytes, bytes | None]) -> None:
    assert origin_form(method, target, b"/v1") == expected


@pytest.mark.promise("A4", "A4a", "G22")
@pytest.mark.parametrize(
    ("head", "clean"),
    [
        (b"HTTP/1.1 200 OK\r\nA: b\tc\xe9\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nA: b\r\n\tc\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\nA: b\r\n\r\n", False),
        (b"HTTP/1.1 200 : OK\r\nA: b : c\r\nB:c :\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nA: b\r\nTransfer-Encoding : chunked\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length\t: 2\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nA: b\n\rc\r\n\r\n", False),
        *((b"HTTP/1.1 200 OK\r\nA: %c\r\n\r\n" % code, False) for code in (0, 1, 8, 0x0B, 0x0C, 0x1F, 0x7F)),
    ],
)
def test_is_clean(head: bytes, clean: bool) -> None:
    """A4, G22."""
    assert is_clean(head) is clean


@pytest.mark.promise("C10a")
def test_trailers_that_would_act_as_headers_are_not_passed_on() -> None:
    """C10: RFC 9110 §6.5.1."""
    kept = (b"X-Sum: 1", b"Server-Timing: a", b"x-sum:2")
    bad: tuple[bytes, ...] = (
        b"Content-Length: 5",
        b"TRANSFER-ENCODING: chunked",
        b"host:x",
        b"Set-Cookie: a",
        b"X-Request-Id: b",
    )
    bad += (b"Authorization: c", b"X-Forwarded-For: d", b"Connection: close", b"Trailer: e", b"Content-Type: f")
    assert allowed_trailers((bad[0], kept[0], *bad[1:], *kept[1:])) == kept
