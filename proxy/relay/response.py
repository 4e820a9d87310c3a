"""What a response's head means for its way to the client."""

from __future__ import annotations

from aiohttp.http import HttpVersion10
from multidict import CIMultiDictProxy

from proxy.relay.faults import UpstreamInvalid
from proxy.relay.framing import BodyDecoder, ChunkedBody, CloseBody, LengthBody
from proxy.relay.headers import (
    connection_options,
    content_length,
    is_chunked,
    is_last,
    response_head,
    upgrade_protocols,
)
from proxy.relay.parsing import ResponseHead

_NOT_INTERIM = frozenset({b"content-length"})  # RFC 9110 §8.6


class Response:
    """A checked response head, interim ones included. It follows from its bytes alone; only what it remembers changes."""

    __slots__ = (
        "_dropped",
        "_length",
        "_raw_headers",
        "_rendered",
        "_status_line",
        "chunked",
        "headers",
        "last",
        "status",
    )

    def __init__(self, head: ResponseHead) -> None:
        """Raises UpstreamInvalid."""
        headers = head.headers
        self.status: int = head.code
        self.headers: CIMultiDictProxy[str] = headers
        self.last = is_last(headers.getall("connection", ()), http10=head.version == HttpVersion10)  # on its connection
        encodings = headers.getall("transfer-encoding", None)
        self.chunked = encodings is not None
        if encodings is not None and not is_chunked(encodings):
            raise UpstreamInvalid("the model server's transfer encoding is not supported")
        if self.chunked and head.version == HttpVersion10:
            raise UpstreamInvalid("the model server used a transfer encoding in HTTP/1.0")
        lengths = headers.getall("content-length", None)
        self._length = None if lengths is None else content_length(lengths)
        if lengths is not None and self._length is None:
            raise UpstreamInvalid("the model server's Content-Length is not valid")
        self._status_line = b"HTTP/1.1 %d %b" % (self.status, head.reason.encode("utf-8", "surrogateescape"))
        self._raw_headers = head.raw_headers
        self._dropped = connection_options(headers.getall("connection", ()))
        self._rendered: tuple[bool, bytes | None, bytes, bytes] | None = None

    def body(self, method: str) -> BodyDecoder:
        """Reads the body of this answer to ``method`` (RFC 9112 §6.3)."""
        if method == "HEAD" or self.bodyless:
            return LengthBody(0)
        if self.chunked:
            return ChunkedBody()
        return CloseBody() if self._length is None else LengthBody(self._length)

    @property
    def bodyless(self) -> bool:
        """Whether there is no body, whatever the headers say."""
        return self.status < 200 or self.status in (204, 304)

    @property
    def may_have_wrong_body(self) -> bool:
        """A server that wrongly sends a body with such an answer would have it taken for its next one."""
        return self.bodyless and (self.chunked or self._length is not None)

    def head(self, request_id: str, *, chunked: bool, connection: bytes | None) -> bytes:
        """The head for the client. ``request_id`` is added unless the model server sent one itself."""
        rendered = self._rendered
        if rendered is None or rendered[0] is not chunked or rendered[1] != connection:
            before, after = response_head(
                self._status_line,
                self._raw_headers,
                dropped=self._dropped,
                with_request_id=True,
                chunked=chunked,
                connection=connection,
            )
            self._rendered = rendered = (chunked, connection, before, after)
        if not rendered[3]:
            return rendered[2]
        return rendered[2] + request_id.encode() + rendered[3]

    def switches_to(self, wanted: frozenset[str]) -> bool:
        """Whether it changes to protocols that all are among those that were ``wanted``."""
        chosen = upgrade_protocols(self.headers.getall("connection", ()), self.headers.getall("upgrade", ()))
        return bool(chosen) and chosen <= wanted

    def switching_head(self, request_id: str) -> bytes:
        """The head for the client of an answer that changes the protocol."""
        before, after = response_head(
            self._status_line,
            self._raw_headers,
            dropped=self._dropped | _NOT_INTERIM,
            with_request_id=True,
            chunked=False,
            connection=b"Upgrade",
            upgrade=", ".join(self.headers.getall("upgrade")).encode("utf-8", "surrogateescape"),
        )
        return before + request_id.encode() + after if after else before

    def interim_head(self) -> bytes:
        """The head for the client of an answer that another one follows (RFC 9110 §15.2)."""
        head, _ = response_head(
            self._status_line,
            self._raw_headers,
            dropped=self._dropped | _NOT_INTERIM,
            with_request_id=False,
            chunked=False,
            connection=None,
        )
        return head
