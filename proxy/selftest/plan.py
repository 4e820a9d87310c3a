"""What the self-test sends: the request that the user named, in ways that mean the same. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from proxy.config import ConfigError

DEFAULT_COUNT = 50  # timed requests each way
DEFAULT_SAFE_COUNT = 200  # where the request changes nothing
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # RFC 9110 §9.2.1
HEADER_BYTES = (4_000, 8_000, 16_000, 32_000, 64_000)  # values of a long header; the usual limits are a little above
OWN_ID = b"x-request-id: selftest-1\r\n"
_DEFAULT_HEADERS = ("User-Agent: payload-logger-selftest", "Accept: */*")
_OUR_HEADERS = frozenset(("connection", "content-length", "expect", "transfer-encoding", "upgrade", "x-request-id"))
_HEADER = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+: *[^\x00-\x08\x0a-\x1f\x7f]*")
_METHOD = re.compile(r"[A-Z][A-Z-]*")
_PATH = re.compile(r"/[\x21-\x7e]*")


@dataclass(frozen=True, slots=True)
class Named:
    """A request. ``headers`` are whole lines, each with its line end; ``body`` None: it has none."""

    method: str
    path: str
    headers: bytes
    body: bytes | None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to send a request. ``header`` is one more line, with its line end."""

    name: str
    request: Named
    http10: bool = False
    header: bytes = b""
    chunked: bool = False
    byte_by_byte: bool = False
    times: int = 1
    pipelined: bool = False

    @property
    def closes(self) -> bool:
        return self.http10 or self.header == b"Connection: close\r\n"

    @property
    def expects(self) -> bool:
        return self.header == b"Expect: 100-continue\r\n"

    def head(self, base_path: bytes, host: bytes) -> bytes:
        request = self.request
        version = b"HTTP/1.0" if self.http10 else b"HTTP/1.1"
        start = b"%b %b%b %b\r\n" % (request.method.encode(), base_path, request.path.encode(), version)
        framing = b""
        if request.body is not None:
            framing = (
                b"Transfer-Encoding: chunked\r\n" if self.chunked else b"Content-Length: %d\r\n" % len(request.body)
            )
        return b"%bHost: %b\r\n%b%b%b\r\n" % (start, host, request.headers, framing, self.header)

    def body(self) -> bytes:
        """As it is framed: in up to three chunks."""
        body = self.request.body or b""
        if not self.chunked:
            return body
        cuts = sorted({0, min(1, len(body)), len(body) // 2, len(body)})
        chunks = [body[start:end] for start, end in pairwise(cuts)]
        return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the user asked for. ``host`` None: the server's own; ``count``: timed requests each way."""

    request: Named
    host: bytes | None
    count: int
    timeout_seconds: float
    quick: bool

    @property
    def plainest(self) -> Way:
        return Way(name="Content-Length" if self.request.body is not None else "as it is", request=self.request)

    def ways(self) -> list[Way]:
        request = self.request
        found = [self.plainest]
        if request.body is not None:
            found += [
                Way(name="chunked", request=request, chunked=True),
                Way(name="Expect: 100-continue", request=request, header=b"Expect: 100-continue\r\n"),
            ]
        found += [
            Way(name="byte by byte", request=request, byte_by_byte=True),
            Way(name="answer compressed", request=request, header=b"Accept-Encoding: gzip, deflate, br, zstd\r\n"),
            Way(name="with an x-request-id", request=request, header=OWN_ID),
            Way(name="Connection: close", request=request, header=b"Connection: close\r\n"),
            Way(name="HTTP/1.0", request=request, http10=True),
            Way(name="twice on a connection", request=request, times=2),
            Way(name="two at once, pipelined", request=request, times=2, pipelined=True),
        ]
        if request.method == "GET" and request.body is None:
            head, options = (Named(method, request.path, request.headers, None) for method in ("HEAD", "OPTIONS"))
            found += [Way(name="HEAD, twice", request=head, times=2), Way(name="OPTIONS", request=options)]
        return found

    def long_header(self, size: int) -> Way:
        return Way(name="long header", request=self.request, header=b"X-Selftest: %b\r\n" % (b"a" * size))

    @property
    def warm_up(self) -> int:
        return self.count // 10

    @property
    def most(self) -> int:
        """How many requests the server gets at most where nothing differs."""
        compared = 3 * sum(way.times for way in self.ways())
        alone = 2 if self.quick else 3
        return compared + alone + 2 * (self.count + self.warm_up + len(HEADER_BYTES))


def plan(
    *,
    path: str,
    method: str | None,
    headers: Sequence[str],
    body: bytes | None,
    content_type: str | None,
    count: int | None,
    timeout_seconds: float,
    quick: bool,
) -> Plan:
    """What the arguments ask for. Raises ConfigError, which names every one that is wrong."""
    method = method or ("GET" if body is None else "POST")
    lines = list(headers)
    if content_type is not None or (body is not None and "content-type" not in map(_name, lines)):
        lines.append(f"Content-Type: {content_type or 'application/json'}")
    checks = {
        f"--path: {path!r} is not a path; it begins with / and is visible ASCII (%XX for all else)": _PATH.fullmatch(
            path
        ),
        f"--method: {method!r} is not a method that a proxy passes on": _METHOD.fullmatch(method)
        and method not in ("CONNECT", "TRACE"),
        "--content-type: there is no body; name one with --body FILE": content_type is None or body is not None,
        f"--count: {count} is less than 0": count is None or count >= 0,
        f"--timeout: {timeout_seconds:g} is not more than 0": timeout_seconds > 0,
    }
    wrong = [words for words, good in checks.items() if not good]
    for line in lines:
        if not _HEADER.fullmatch(line):
            wrong.append(f"--header: {_name(line)!r} is not a header; use 'NAME: VALUE'")
        elif _name(line) in _OUR_HEADERS:
            wrong.append(f"--header: {_name(line)} is set by the self-test itself, in several ways")
    if wrong:
        raise ConfigError(wrong)
    if count is None:
        count = DEFAULT_SAFE_COUNT if method in SAFE_METHODS and body is None else DEFAULT_COUNT
    hosts = [line.partition(":")[2].strip().encode() for line in lines if _name(line) == "host"]
    given = {_name(line) for line in lines}
    lines = [line for line in _DEFAULT_HEADERS if _name(line) not in given] + [
        line for line in lines if _name(line) != "host"
    ]
    request = Named(method, path, b"".join(line.encode() + b"\r\n" for line in lines), body)
    return Plan(
        request=request, host=hosts[0] if hosts else None, count=count, timeout_seconds=timeout_seconds, quick=quick
    )


def _name(line: str) -> str:
    return line.partition(":")[0].strip().lower()
