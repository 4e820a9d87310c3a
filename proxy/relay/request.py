"""What a request's head means for its way to the model server."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from aiohttp.http import HttpVersion10, HttpVersion11
from multidict import CIMultiDictProxy

from proxy.relay.faults import RequestFault
from proxy.relay.framing import BodyDecoder, ChunkedBody, LengthBody
from proxy.relay.headers import (
    Forwarding,
    connection_options,
    content_length,
    is_chunked,
    is_last,
    origin_form,
    request_head,
    upgrade_protocols,
    valid_host,
    valid_request_id,
)
from proxy.relay.parsing import RequestHead

_VERSIONS = (HttpVersion11, HttpVersion10)
_NOT_TUNNELLED = frozenset({"h2c", "h2"})
_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Route:
    """Where requests go: ``base_path`` without its last slash, ``host`` for the Host header."""

    base_path: bytes
    host: bytes
    rewrite_host: bool


class Request:
    """A checked request. It follows from the bytes of the head, the client and the route alone, and is never changed.

    ``length`` is the body's in bytes; None: not known in advance. ``client_id`` is the x-request-id that the client sent,
    if it is valid; ``upgrade``, the protocols that the model server may change to.
    """

    __slots__ = (
        "_after_id",
        "_before_id",
        "chunked",
        "client_id",
        "expects_continue",
        "headers",
        "http10",
        "last",
        "length",
        "method",
        "target",
        "upgrade",
    )

    def __init__(self, head: RequestHead, forwarding: Forwarding, route: Route) -> None:
        """Raises RequestFault."""
        headers = head.headers
        if head.version not in _VERSIONS:
            raise RequestFault(
                "only HTTP/1.1 and HTTP/1.0 are spoken", HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "version"
            )
        self.method: str = head.method
        self.target: str = head.path
        self.headers: CIMultiDictProxy[str] = headers
        self.http10: bool = head.version == HttpVersion10
        self.last = is_last(headers.getall("connection", ()), http10=self.http10)  # on its connection
        self.chunked = "transfer-encoding" in headers
        self.length = self._length()
        self.expects_continue = not self.http10 and "expect" in headers and _expects_continue(headers.getall("expect"))
        incoming = list(headers.getall("x-request-id", ()))
        valid = len(incoming) == 1 and valid_request_id(incoming[0].encode("utf-8", "surrogateescape"))
        self.client_id = incoming[0] if valid else None
        self.upgrade = self._upgrade()
        target, authority = origin_form(self.method, self.target.encode("utf-8", "surrogateescape"), route.base_path)
        for host in (headers.get("host", "").encode("utf-8", "surrogateescape"), authority or b""):
            if not valid_host(host):
                raise RequestFault("the request's host is not valid")
        self._before_id, self._after_id = request_head(
            self.method.encode(),
            target,
            head.raw_headers,
            dropped=connection_options(headers.getall("connection", ())),
            host=route.host,
            set_host=route.host if route.rewrite_host else authority,
            has_request_id=valid,
            forwarding=forwarding,
            chunked=self.chunked,
            te_trailers=any(
                member.partition(";")[0].strip(" \t").lower() == "trailers"
                for value in headers.getall("te", ())
                for member in value.split(",")
            ),
            upgrade=_joined(headers.getall("upgrade")) if self.upgrade else None,
            authority=authority,
        )

    def _upgrade(self) -> frozenset[str]:
        """HTTP/2 is no protocol to tunnel: its requests would pass unseen. A body would have to be passed first."""
        if self.http10 or self.length != 0 or "upgrade" not in self.headers:
            return _NONE
        wanted = upgrade_protocols(self.headers.getall("connection", ()), self.headers.getall("upgrade"))
        return _NONE if wanted & _NOT_TUNNELLED else wanted

    def _length(self) -> int | None:
        """RFC 9112 §6.3."""
        if not self.chunked:
            length = content_length(self.headers.getall("content-length", ("0",)))
            if length is None:
                raise RequestFault("the request's Content-Length is not valid")
            return length
        if self.http10:
            raise RequestFault("Transfer-Encoding is not allowed in HTTP/1.0")
        if not is_chunked(self.headers.getall("transfer-encoding")):
            raise RequestFault("only the chunked transfer encoding is supported", HTTPStatus.NOT_IMPLEMENTED, "coding")
        return None

    def body(self) -> BodyDecoder:
        """Reads this request's body."""
        return ChunkedBody() if self.length is None else LengthBody(self.length)

    def head(self, request_id: str) -> bytes:
        """The head for the model server."""
        if not self._after_id:
            return self._before_id
        return self._before_id + request_id.encode() + self._after_id


def _expects_continue(values: list[str]) -> bool:
    return any(
        expectation.strip(" \t").lower() == "100-continue" for value in values for expectation in value.split(",")
    )


def _joined(values: list[str]) -> bytes:
    return ", ".join(values).encode("utf-8", "surrogateescape")
