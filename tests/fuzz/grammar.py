"""Strategies: valid messages as bytes, what is done to them, and the pieces that they are sent in."""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import strategies as st

from tests.fuzz.published import HOP_BY_HOP, NOT_AS_TRAILERS

Draw = st.DrawFn

# Without CONNECT and TRACE, which are refused.
METHODS = b"""GET HEAD POST PUT DELETE OPTIONS PATCH COPY LOCK MKCOL MOVE PROPFIND PROPPATCH SEARCH UNLOCK BIND REBIND UNBIND
ACL REPORT MKACTIVITY CHECKOUT MERGE M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE PURGE MKCALENDAR LINK UNLINK QUERY
BREW x-y_z!""".split()
_TOKEN = "!#$%&'*+-.^_`|~0123456789ABCXYZabcxyz"
# Headers that mean something; where the grammar wants them it writes them itself. Some may not come twice.
_SPECIAL = HOP_BY_HOP | NOT_AS_TRAILERS
_SPECIAL |= {b"expect", b"sec-websocket-key1", b"user-agent", b"server", b"etag", b"max-forwards", b"content-location"}

method = st.sampled_from([*[b"GET", b"POST"] * 8, b"HEAD", b"HEAD", *METHODS])
token = st.text(_TOKEN, min_size=1, max_size=8).map(str.encode)
name = token.filter(lambda one: one.lower() not in _SPECIAL)
blank = st.sampled_from([b" ", b" ", b" ", b"", b"\t", b"  ", b" \t "])
_text = st.binary(max_size=12).map(lambda raw: bytes(one for one in raw if one == 9 or (one >= 0x20 and one != 0x7F)))
value = st.one_of(
    _text.map(lambda raw: raw.strip(b" \t")),
    st.sampled_from(
        [b"", b"a", b"a, b", b'"q,\\"; x"', b"\xff\x80", "été".encode(), b"chunked", b"5", b"a: b", b"=?x?="]
    ),
)
target = st.one_of(
    st.sampled_from(
        b"""/ /score /a//b/../c/. /%2F%00%zz% /a? /?a=b&a=b&&c /a;b=c //h/a /:1 /a?b?c /%C3%A9 /"<>\\^`{|} /* /http://x/ /a#b
        http://other/x?y http://o:1 http://u:p@o?q""".split()
    ),
    st.text("abc%/.;?&=+~:@!$'()*,-_[]", max_size=16).map(lambda text: b"/" + text.encode()),
)
# At most one of each in a message.
_REQUEST_FIELDS = st.sampled_from(
    [
        b"Connection: x-a, X-B",
        b"Connection: keep-alive",
        b"connection: Content-Length, Host, x-a",
        b"Connection:",
        b"Keep-Alive: timeout=5",
        b"Proxy-Connection: keep-alive",
        b"Proxy-Authorization: Basic eA==",
        b"TE: trailers",
        b"TE: deflate;q=0.5, Trailers",
        b"TE: gzip",
        b"Trailer: x-sum",
        b"X-Request-Id: own-1",
        b"x-request-id: not valid",
        b"x-request-id: " + b"x" * 101,
        b"x-request-id:",
        b"X-Forwarded-For: 10.0.0.1",
        b"x-forwarded-proto: https",
        b"X-FORWARDED-HOST: public",
        b"Expect: 100-continue",
        b"User-Agent: \xc3\xa9",
        b"Accept-Encoding: br, *;q=0",
        b"Content-Type: application/json",
        b"Authorization: Bearer x",
        b"Cookie: a=1; b",
        b"Range: bytes=0-1",
        b"X-A: 1",
        b"x-b: 2",
    ]
)
_RESPONSE_FIELDS = st.sampled_from(
    [
        b"Connection: x-a, X-B",
        b"connection: Content-Length, x-a",
        b"Connection: keep-alive",
        b"Connection: close",
        b"Keep-Alive: timeout=5",
        b"Proxy-Authenticate: Basic",
        b"Upgrade: h2c",
        b"Trailer: x-sum",
        b"X-Request-Id: theirs",
        b"Server: x/1",
        b"Date: Thu, 01 Jan 1970 00:00:00 GMT",
        b"Set-Cookie: a=1",
        b"set-cookie: b=2",
        b"Content-Type: text/event-stream",
        b"Location: http://elsewhere/",
        b"X-A: 1",
        b"x-b: 2",
        b"Vary: *",
    ]
)
_ENCODED = [
    (b"gzip", gzip.compress(b'{"data": [1]}', mtime=0)),
    (b"deflate", zlib.compress(b"data" * 9)),
    (b"gzip", b"no gzip at all"),
    (b"br", b"\x00\xff\r\n\r\n"),
    (b"zstd, gzip", b""),
]
payload = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"0\r\n\r\n", b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\r\n\r\n\r\n"]
    ),
)
large_payload = st.sampled_from([64 * 1024, 64 * 1024 + 1, 300_000]).map(lambda size: (bytes(range(251)) * 1200)[:size])


@st.composite
def fields(draw: Draw, special: st.SearchStrategy[bytes]) -> list[bytes]:
    """Header lines that frame nothing."""
    lines = draw(st.lists(special, max_size=4, unique_by=lambda line: line.partition(b":")[0].lower()))
    plain = draw(st.lists(st.tuples(name, blank, value, blank), max_size=4))
    lines += [b"%b:%b%b%b" % one for one in plain]
    return draw(st.permutations(lines)) if len(lines) > 1 else lines


@st.composite
def chunked(draw: Draw, body: bytes) -> bytes:
    """``body`` in chunks, with extensions and trailers."""
    out = b""
    places = draw(st.lists(st.integers(0, len(body)), max_size=4))
    for start, end in pairwise([0, *sorted(places), len(body)]):
        if start < end:
            size = draw(st.sampled_from([b"%x", b"%X", b"000%x", b"%x;a=b", b'%x ; q="\\";"']))
            out += size % (end - start) + b"\r\n" + body[start:end] + b"\r\n"
    out += draw(st.sampled_from([b"0", b"0", b"0000", b"0;last"])) + b"\r\n"
    trailer = st.tuples(
        st.one_of(name, st.sampled_from([b"X-Sum", b"Content-Length", b"host", b"Set-Cookie"])), blank, value
    )
    for one in draw(st.lists(trailer, max_size=2)):
        out += b"%b:%b%b\r\n" % one
    return out + b"\r\n"


@st.composite
def framed(
    draw: Draw, framings: tuple[str, ...], body: bytes | None, *, bodyless: bool = False
) -> tuple[list[bytes], bytes]:
    """Header lines that frame a body, and the body as it is sent."""
    framing = draw(st.sampled_from(framings))
    lines: list[bytes] = []
    if framing in ("none", "close"):
        body = b"" if framing == "none" else draw(payload)
    else:
        if body is None and draw(st.integers(0, 5)) == 0:
            coding, body = draw(st.sampled_from(_ENCODED))
            lines.append(b"Content-Encoding: " + coding)
        elif body is None:
            body = draw(payload)
        if framing == "length":
            lines.append(
                draw(st.sampled_from([b"Content-Length: %d", b"content-LENGTH:%d", b"Content-Length:  00%d "]))
                % len(body)
            )
        else:
            lines.append(draw(st.sampled_from([b"Transfer-Encoding: chunked", b"transfer-encoding:Chunked\t"])))
            body = draw(chunked(body))
    return lines, b"" if bodyless else body


@st.composite
def request(draw: Draw, *, closing: bool = False, large: bool = False, old: bool = False) -> bytes:
    """One valid request; ``closing``: it may be the last on its connection; ``old``: it is of HTTP/1.0, then."""
    verb = draw(method)
    where = draw(st.sampled_from([b"*", draw(target)])) if verb == b"OPTIONS" else draw(target)
    lines = draw(fields(_REQUEST_FIELDS))
    if closing:
        lines = [line for line in lines if not line.lower().startswith(b"connection")]
        lines.append(draw(st.sampled_from([b"Connection: close", b"connection: x-a, Close"])))
    framings = ("none", "length") if old else ("none", "length", "chunked", "chunked")
    framing, body = draw(framed(framings, draw(large_payload) if large else None))
    hosts = (
        [] if old and draw(st.booleans()) else [draw(st.sampled_from([b"Host: h", b"hOST:h:8080", b"Host: [::1]:1"]))]
    )
    lines = draw(st.permutations([*hosts, *lines, *framing]))
    version = b"1.0" if old else b"1.1"
    return b"%b %b HTTP/%b\r\n" % (verb, where, version) + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


@dataclass(frozen=True)
class Answer:
    """What a model server sends; ``how`` it goes on: keep, close, or reset the connection."""

    sent: bytes
    how: str


@st.composite
def answer(draw: Draw, verb: bytes, *, large: bool = False) -> Answer:
    """A valid answer to a request with the method ``verb``."""
    interims = draw(st.lists(interim(), max_size=2)) if draw(st.integers(0, 4)) == 0 else []
    status = draw(st.sampled_from([*[200] * 8, 201, 204, 206, 299, 304, 307, 404, 422, 500, 503, 599, 700, 999]))
    bodyless = verb == b"HEAD" or status in (204, 304)
    lines = draw(fields(_RESPONSE_FIELDS))
    version = draw(st.sampled_from([b"1.1"] * 9 + [b"1.0"]))
    framings = (
        ("length", "length", "close")
        if version == b"1.0"
        else ("length", "length", "length", "chunked", "chunked", "close")
    )
    framing, body = draw(framed(framings, draw(large_payload) if large else None, bodyless=bodyless))
    lines = draw(st.permutations([*lines, *framing])) if framing else lines
    reason = draw(st.sampled_from([b" OK", b" OK", b" ", b" Fa\xc3\xa7on \xff", b" Not  Found", b""]))
    head = b"HTTP/%b %d%b\r\n" % (version, status, reason) + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
    ends = not (bodyless or framing)
    return Answer(
        b"".join(interims) + head + body, "close" if ends else draw(st.sampled_from(["keep", "keep", "keep", "close"]))
    )


@st.composite
def interim(draw: Draw) -> bytes:
    lines = draw(
        st.lists(
            st.sampled_from([b"Link: </a>; rel=preload", b"X-A: 1", b"Content-Length: 3", b"Connection: x-a"]),
            max_size=2,
            unique=True,
        )
    )
    start = draw(st.sampled_from([b"HTTP/1.1 100 Continue", b"HTTP/1.1 102 Processing", b"HTTP/1.1 103 Early Hints"]))
    return start + b"\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


# --- mutation ---

_LENGTHS = b"0|5|+5|-1|0x5|5,5|5, 6|05|5 5|99999999999999999999|1e1||5;|\xb2"
_CODINGS = (
    b'chunked|identity|xchunked|gzip, chunked|chunked, identity|\x0bchunked|chunked;|"chunked"|,chunked|chunked,|'
)
_CODINGS += b"|chun\xe2\x84\xaaed"
_LINES = [
    *(b"Content-Length: " + value for value in _LENGTHS.split(b"|")),
    *(b"Transfer-Encoding: " + value for value in _CODINGS.split(b"|")),
    b"Transfer-Encoding : chunked",
    b"Transfer_Encoding: chunked",
    b"Content-Length : 5",
    b"Content-Length\t: 5",
    b"Content_Length: 5",
    b" Content-Length: 5",
    b"X: y\r\n Transfer-Encoding: chunked",
    b"X: y\rTransfer-Encoding: chunked",
    b"X: y\nTransfer-Encoding: chunked",
    b"X:\r\n\tfolded",
    b"Host: evil",
    b"Host:",
    b"Connection: close",
    b"Connection: content-length",
    b"Connection: transfer-encoding",
    b"Connection: host",
    b"Expect: 100-continue",
    b"Expect: x",
    b"X: \x00",
    b"\x00: x",
    b"X\x80: y",
    b"X(: y",
    b": y",
    b"X",
    b"X: \x7f",
    b"X: \x0b",
    b"x-request-id: a\rb",
    b"x-request-id: a\nSet-Cookie: b",
    b"GET /b HTTP/1.1",
    b"HTTP/1.1 200 OK",
    b"0",
]
_ENDS = [
    b"\n",
    b"\r",
    b"",
    b"\r\r\n",
    b"\n\r",
    b"\r\n ",
    b"\r\n\t",
    b"\x00\r\n",
    b" \r\n",
    b"\x0b\r\n",
    b"\r\n\r\n",
    b"\n\n",
    b"\r\n\n",
    b";\n",
]
_COLONS = [b" :", b"\t:", b": :", b";", b"", b"\x00:", b":\r\n ", b":\x0b", b"::", b"="]
_BYTES = [bytes([one]) for one in b"\r\n\x00 \t:;,+-_0x9afF\x0b\x0c\x1c\x7f\x80\x85\xa0\xff/*?#@\\"]
_BYTES += [
    b"\r\n",
    b"\r\n\r\n",
    b"0\r\n\r\n",
    b"0x",
    b"00000000000000000",
    b"fffffffffffffffff",
    b"HTTP/1.1",
    b"HTTP/2.0",
    b" ",
]

_place = st.integers(0, 2**16)


@dataclass(frozen=True)
class Mutation:
    """``kind`` of change at a ``place`` of the first message's head, or of what follows it; ``what`` is put there."""

    kind: str
    in_head: bool
    place: int
    what: bytes = b""
    size: int = 0


def _mutation(kind: str, *what: bytes, sizes: st.SearchStrategy[int] | None = None) -> st.SearchStrategy[Mutation]:
    inserted = st.sampled_from(what or (b"",))
    return st.builds(Mutation, st.just(kind), st.booleans(), _place, inserted, st.just(0) if sizes is None else sizes)


mutation = st.one_of(
    _mutation("line", *_LINES),
    _mutation("line", *_LINES),
    _mutation("end", *_ENDS),
    _mutation("colon", *_COLONS),
    _mutation("insert", *_BYTES),
    _mutation("number", *_BYTES, sizes=st.sampled_from([0, 0, 99])),
    _mutation("replace", *_BYTES, sizes=st.integers(1, 3)),
    _mutation("delete", sizes=st.integers(1, 12)),
    _mutation("repeat", sizes=st.integers(1, 40)),
    _mutation("truncate"),
)
mutations = st.lists(mutation, min_size=1, max_size=2)

_PLACES = {
    "line": re.compile(rb"\r\n()"),
    "end": re.compile(rb"\r\n"),
    "colon": re.compile(rb":"),
    "number": re.compile(rb"(?:(?<=\n)|(?<=: )|^)[0-9A-Fa-f]+\b"),
}


def mutated(data: bytes, changes: list[Mutation]) -> bytes:
    for change in changes:
        border = data.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else len(data)
        head, rest = data[:border], data[border:]
        data = _changed(head, change) + rest if change.in_head or not rest else head + _changed(rest, change)
    return data


def _changed(data: bytes, change: Mutation) -> bytes:
    what, size = change.what, change.size
    if change.kind in _PLACES:
        found = list(_PLACES[change.kind].finditer(data))
        if not found:
            return data + what
        begin, end = found[change.place % len(found)].span()
        if change.kind == "line":
            return data[:end] + what + b"\r\n" + data[end:]
        if change.kind == "number":  # before it or behind it
            begin = end = end if size else begin
        return data[:begin] + what + data[end:]
    at = change.place % (len(data) + 1)
    if change.kind == "truncate":
        return data[:at]
    if change.kind == "repeat":
        return data[: at + size] + data[at:]
    return data[:at] + what + data[at + size :]


# --- pieces ---

cuts = st.lists(_place, max_size=6)


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(bounds) if start < end]


def single_bytes(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]
