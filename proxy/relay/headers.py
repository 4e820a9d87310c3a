"""What the relay changes in a head, and nothing else is changed: pure functions over raw header bytes.

Names keep their case, headers their order and number, values their bytes. Sources: RFC 9110 §7.6 (message
forwarding), RFC 9112 §3.2 (request target) and §6 (framing).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from proxy.settings import ForwardedHeaders

RawHeaders = Iterable[tuple[bytes, bytes]]

# RFC 9110 §7.6.1, with the older names that RFC 2616 listed and that clients still send.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"proxy-connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    }
)
_USUAL_CONNECTION = frozenset({b"keep-alive", b"close"})  # what is dropped anyway
_NO_OPTIONS: frozenset[bytes] = frozenset()
# A Connection header can't name these: it would take away what frames, routes or identifies the message.
_NOT_CONNECTION_OPTIONS = frozenset({b"content-length", b"host", b"x-request-id", b"content-type", b"content-encoding"})
_FORWARDED = frozenset({b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"})
_TE_TRAILERS = (b"TE: trailers", b"Connection: TE")
_TRAILER = frozenset({b"trailer"})
# RFC 9110 §6.5.1: a trailer must not frame, route, authenticate or describe the content.
_NOT_TRAILERS = (
    HOP_BY_HOP
    | _FORWARDED
    | frozenset(
        {
            b"authorization",
            b"content-encoding",
            b"content-length",
            b"content-range",
            b"content-type",
            b"cookie",
            b"host",
            b"set-cookie",
            b"trailer",
            b"x-request-id",
        }
    )
)
MAX_REQUEST_ID = 100  # characters; the Azure inference server answers 431 above that

_BLANK_BEFORE_COLON = re.compile(rb"\r\n[^:\r]*[ \t]:")  # RFC 9112 §5.1
_CONTROLS = bytes(code for code in (*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F))


def is_clean(head: bytes) -> bool:
    """Whether a response head has no control characters, bare CR or LF, folded lines or blanks before a colon.

    aiohttp's response parser lets them by.
    """
    lines = head.count(b"\r\n")
    return (
        head.count(b"\r") == lines == head.count(b"\n")
        and b"\r\n " not in head
        and b"\r\n\t" not in head
        and len(head.translate(None, _CONTROLS)) == len(head)
        and ((b" :" not in head and b"\t:" not in head) or _BLANK_BEFORE_COLON.search(head) is None)
    )


def connection_options(headers: RawHeaders) -> frozenset[bytes]:
    """The header names that the message's Connection headers declare hop-by-hop, in lower case."""
    named: set[bytes] = set()
    for name, value in headers:
        if name.lower() == b"connection":
            if value.lower() in _USUAL_CONNECTION:
                continue
            named.update(option.strip(b" \t").lower() for option in value.split(b","))
    return frozenset(named - _NOT_CONNECTION_OPTIONS) if named else _NO_OPTIONS


def valid_request_id(value: bytes | None) -> bool:
    """Whether an incoming x-request-id is used as it is: 1 to 100 visible ASCII characters."""
    return value is not None and 0 < len(value) <= MAX_REQUEST_ID and all(0x21 <= byte <= 0x7E for byte in value)


def origin_form(target: bytes, base_path: bytes) -> tuple[bytes, bytes | None]:
    """The target for the model server, and the authority where the client named one (absolute form).

    ``base_path`` is the path of the upstream URL, without its last slash. The rest stays byte for byte.
    """
    authority = None
    if not target.startswith(b"/") and target != b"*":
        _, _, after_scheme = target.partition(b"://")
        cut = min(
            (at for at in (after_scheme.find(mark) for mark in (b"/", b"?")) if at >= 0), default=len(after_scheme)
        )
        authority = after_scheme[:cut].rpartition(b"@")[2]
        target = after_scheme[cut:]
        if not target.startswith(b"/"):
            target = b"/" + target
    if target == b"*":
        return target, authority
    return base_path + target, authority


@dataclass(frozen=True, slots=True)
class Forwarding:
    """What the relay tells the model server of the client."""

    mode: ForwardedHeaders
    client_address: bytes | None  # None over a unix socket
    scheme: bytes


def _forwarded(headers: RawHeaders, forwarding: Forwarding, host: bytes) -> list[bytes]:
    addresses: list[bytes] = []
    scheme, original_host = forwarding.scheme, host
    if forwarding.mode is ForwardedHeaders.APPEND:
        for name, value in headers:
            lower = name.lower()
            if lower == b"x-forwarded-for":
                addresses.append(value)
            elif lower == b"x-forwarded-proto":
                scheme = value
            elif lower == b"x-forwarded-host":
                original_host = value
    if forwarding.client_address is not None:
        addresses.append(forwarding.client_address)
    lines = [b"X-Forwarded-For: " + b", ".join(addresses)] if addresses else []
    lines.append(b"X-Forwarded-Proto: " + scheme)
    if original_host:
        lines.append(b"X-Forwarded-Host: " + original_host)
    return lines


def request_head(
    method: bytes,
    target: bytes,
    headers: RawHeaders,
    *,
    dropped: frozenset[bytes],
    host: bytes,
    set_host: bytes | None,
    request_id: bytes,
    has_request_id: bool,
    forwarding: Forwarding,
    chunked: bool,
    te_trailers: bool,
) -> bytes:
    """The head that goes to the model server.

    ``dropped`` are the client's connection options; ``set_host`` takes the place of the client's Host, and
    ``request_id`` that of its x-request-id unless ``has_request_id`` says that the client's own is good.
    """
    forwarded = forwarding.mode is not ForwardedHeaders.OFF
    if forwarded:
        dropped |= _FORWARDED
    if not chunked:
        dropped |= _TRAILER
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    client_host: bytes | None = None
    for name, value in headers:
        lower = name.lower()
        if lower in HOP_BY_HOP or lower in dropped:
            continue
        if lower == b"host":
            client_host = value
            if set_host is not None:
                value = set_host
        elif lower == b"x-request-id" and not has_request_id:
            continue
        lines.append(b"%b: %b" % (name, value))
    if client_host is None:  # HTTP/1.0
        lines.append(b"Host: " + (set_host or host))
    if not has_request_id:
        lines.append(b"x-request-id: " + request_id)
    if forwarded:
        lines.extend(_forwarded(headers, forwarding, client_host or b""))
    lines.extend(_TE_TRAILERS if te_trailers else ())
    lines.append(b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n")
    return b"\r\n".join(lines)


def response_head(
    status_line: bytes,
    headers: RawHeaders,
    *,
    request_id: bytes | None,
    chunked: bool,
    connection: bytes | None,
) -> bytes:
    """The head that goes to the client. ``request_id`` is added unless the model server sent one itself (or it is None)."""
    lines = [status_line]
    dropped: frozenset[bytes] | None = None
    for name, value in headers:
        lower = name.lower()
        if lower in HOP_BY_HOP:
            if lower == b"connection" and dropped is None:
                dropped = connection_options(headers)
            continue
        if lower == b"x-request-id":
            request_id = None
        elif lower == b"trailer" and not chunked:
            continue
        lines.append(b"%b: %b" % (name, value))
    if dropped:
        lines[1:] = [line for line in lines[1:] if line.partition(b":")[0].lower() not in dropped]
    if request_id is not None:
        lines.append(b"x-request-id: " + request_id)
    if connection is not None:
        lines.append(b"Connection: " + connection)
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def allowed_trailers(trailers: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Those trailer lines that may be passed on."""
    return tuple(line for line in trailers if line.partition(b":")[0].lower() not in _NOT_TRAILERS)
