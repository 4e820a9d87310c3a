"""Requests and responses as bytes, and what the tests of recording ask of the proxy's files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.harness import Proxy, exchange

ORDER = (
    "specversion id source type datacontenttype time data path method contentrange datainblob correlationid xrequestid"
)


def _headers(headers: Iterable[tuple[str, str] | str | bytes]) -> bytes:
    lines = [f"{one[0]}: {one[1]}" if isinstance(one, tuple) else one for one in headers]
    return b"".join((line if isinstance(line, bytes) else line.encode("latin-1")) + b"\r\n" for line in lines)


def _chunks(body: bytes) -> bytes:
    """Two chunks, where there is enough for two, and the last one."""
    middle = (len(body) + 1) // 2
    pieces = [piece for piece in (body[:middle], body[middle:]) if piece]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _framed(body: bytes, chunked: bool) -> tuple[str, bytes]:
    return ("Transfer-Encoding: chunked", _chunks(body)) if chunked else (f"Content-Length: {len(body)}", body)


def request(
    body: bytes = b"",
    content_type: str | None = "application/json",
    *headers: tuple[str, str] | str | bytes,
    method: str = "POST",
    target: str | bytes = "/score",
    chunked: bool = False,
) -> bytes:
    """A request whose connection is closed after its response."""
    line = b" ".join((method.encode(), target if isinstance(target, bytes) else target.encode(), b"HTTP/1.1"))
    framing, framed = _framed(body, chunked)
    typed = [] if content_type is None else [f"Content-Type: {content_type}"]
    return line + b"\r\n" + _headers(["Host: h", "Connection: close", *typed, *headers, framing]) + b"\r\n" + framed


def response(
    body: bytes = b"",
    content_type: str | None = "application/json",
    *headers: tuple[str, str] | str | bytes,
    status: int = 200,
    chunked: bool = False,
) -> bytes:
    framing, framed = _framed(body, chunked)
    typed = [] if content_type is None else [f"Content-Type: {content_type}"]
    return b"HTTP/1.1 %d Reason\r\n" % status + _headers([*typed, *headers, framing]) + b"\r\n" + framed


async def send(p: Proxy, *given: Any, events: int = 2, **more: Any) -> bytes:
    """Sends ``request(…)`` and waits for ``events``; the response as it came."""
    before = p.account().received
    answer = await exchange(p.port, request(*given, **more))
    await p.recorded(before + events)
    return answer


async def pair(p: Proxy) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one request and the one response, once they are recorded."""
    assert (await p.recorded(2)).delivered == 2
    return only(p, "request"), only(p, "response")


def only(p: Proxy, collection: str) -> dict[str, Any]:
    """The one event of the collection. Its line is one line, its fields are in order, and no two are alike."""
    lines = p.raw_lines(collection)
    assert len(lines) == 1, lines
    return checked(lines[0])


def checked(line: bytes) -> dict[str, Any]:
    assert line.endswith(b"}\n")
    assert b"\r" not in line
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object comes last
        return dict(found)

    event: dict[str, Any] = json.loads(line.decode(), object_pairs_hook=keep)
    names = [name for name, _ in pairs]
    assert len({name.casefold() for name in names}) == len(names)
    known = [name for name in ORDER.split() if name in names]
    assert names[: len(known)] == known
    assert event["correlationid"] == event["xrequestid"]
    assert event["type"] == f"azureml.inference.{'request' if 'method' in event else 'response'}"
    return event


def body_file(event: dict[str, Any]) -> Path:
    """The file that the event points to."""
    assert event["datainblob"] == "true"
    assert event["data"].startswith("file:///")
    return Path(unquote(urlsplit(event["data"]).path))
