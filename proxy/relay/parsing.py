"""Reads the heads of messages: aiohttp's C parser, and the checks that it leaves out.

It is the C extension that is meant, since the pure-Python fallback is more lenient.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp.http_parser
from aiohttp.http import HttpProcessingError, HttpRequestParser, HttpResponseParser
from aiohttp.http_exceptions import InvalidURLError, LineTooLong
from multidict import CIMultiDictProxy

from proxy.relay.faults import RequestFault, UpstreamInvalid
from proxy.relay.headers import is_clean

# RFC 9110 §9 and RFC 5789. One that is equal to them but for case is none, but some servers take it for one.
_METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"})
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,100}")


def require_c_parser() -> None:
    """Raises RuntimeError unless aiohttp's C parser is in use."""
    if aiohttp.http_parser.HttpRequestParser is aiohttp.http_parser.HttpRequestParserPy:
        raise RuntimeError("aiohttp's C extension is missing; its fallback parser is too lenient for a proxy")


class Head(Protocol):
    """What aiohttp's parser gives of a message's head. Undecodable bytes are surrogate escapes."""

    @property
    def version(self) -> Any: ...
    @property
    def headers(self) -> CIMultiDictProxy[str]: ...
    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]: ...
    @property
    def should_close(self) -> bool: ...


class RequestHead(Head, Protocol):
    """A request's head."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...


class ResponseHead(Head, Protocol):
    """A response's head."""

    @property
    def code(self) -> int: ...
    @property
    def reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest heads that are read, from either side."""

    max_head_bytes: int
    max_headers: int


class RequestParser:
    """Reads the heads of one connection's requests."""

    __slots__ = ("_parser",)

    def __init__(self, connection: object, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        self._parser: Any = _parser(HttpRequestParser, connection, loop, limits)

    def parse(self, head: bytes) -> RequestHead:
        """``head`` ends in an empty line. Raises RequestFault."""
        if head.count(b" ", 0, head.find(b"\r")) != 2:  # the parser takes several for one
            raise RequestFault("the request is not valid HTTP/1.1: invalid request line")
        end = head.find(b" ")
        method = head[:end]
        if method in _METHODS:
            return self._parse(head)
        if _TOKEN.fullmatch(method) is None or method.upper() in _METHODS or method == b"PRI":  # of HTTP/2
            raise RequestFault("the request is not valid HTTP/1.1: invalid method")
        message: Any = self._parse(b"POST" + head[end:])  # the parser knows some methods only
        other: RequestHead = message._replace(method=method.decode())
        return other

    def _parse(self, head: bytes) -> RequestHead:
        if head.partition(b"\r\n")[0].rpartition(b" ")[2][:5] in (b"RTSP/", b"ICE/1", b"ICE/2"):
            raise RequestFault("only HTTP/1.1 and HTTP/1.0 are spoken", 505, "version")
        try:
            messages, upgraded, _ = self._parser.feed_data(head)
        except LineTooLong:
            raise RequestFault(
                "the request's head is longer than proxy.max_head_bytes allows", 431, "head_too_large"
            ) from None
        except InvalidURLError:
            raise RequestFault("the request's target is not valid") from None
        except HttpProcessingError as error:
            if "Too many headers" in error.message:
                words = "the request has more headers than proxy.max_headers allows"
                raise RequestFault(words, 431, "head_too_large") from None
            raise RequestFault(_first_line(error.message)) from None
        if upgraded:  # or it would take what follows for another protocol; whether it is one, the model server says
            self._parser.set_upgraded(False)
        if len(messages) != 1:
            raise RequestFault("the request's head is not valid")
        message: RequestHead = messages[0][0]
        return message


class ResponseParser:
    """Reads the heads of one connection's responses."""

    __slots__ = ("_connection", "_limits", "_loop", "_parser")

    def __init__(self, connection: object, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        self._connection = connection
        self._loop = loop
        self._limits = limits
        self._parser: Any = _parser(HttpResponseParser, connection, loop, limits)

    def parse(self, head: bytes) -> ResponseHead:
        """``head`` ends in an empty line. Raises UpstreamInvalid."""
        if not is_clean(head):
            raise UpstreamInvalid("the model server's response head has invalid characters or line ends")
        try:
            messages, upgraded, _ = self._parser.feed_data(head)
        except HttpProcessingError:
            raise UpstreamInvalid("the model server's response head is not valid HTTP/1.1") from None
        if upgraded:
            self._parser.set_upgraded(False)
        if len(messages) != 1:
            raise UpstreamInvalid("the model server's response head is not valid HTTP/1.1")
        message: ResponseHead = messages[0][0]
        if not 100 <= message.code <= 999:
            raise UpstreamInvalid("the model server's status is not valid")
        if message.code < 200 and message.should_close:  # it would read no more; but an interim answer ends nothing
            self._parser = _parser(HttpResponseParser, self._connection, self._loop, self._limits)
        return message


def _parser(kind: Any, connection: object, loop: asyncio.AbstractEventLoop, limits: Limits) -> Any:
    return kind(
        connection,  # used only to hold back a body, and this parser sees none
        loop,
        2**16,
        response_with_body=False,
        auto_decompress=False,
        max_line_size=limits.max_head_bytes,
        max_field_size=limits.max_head_bytes,
        max_headers=limits.max_headers,
    )


def _first_line(message: str) -> str:
    """aiohttp's parser messages quote the input on further lines; clients get the reason only."""
    return "the request is not valid HTTP/1.1: " + message.split("\n", 1)[0].strip().rstrip(":")
