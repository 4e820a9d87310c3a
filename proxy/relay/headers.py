"""What the relay changes in a head, and nothing else is changed: pure functions over raw header bytes.

Names keep their case, headers their order and number, values their bytes. Sources: RFC 9110 §7.6 (message
forwarding), RFC 9112 §3.2 (request target) and §6 (framing).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product

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
_USUAL_CONNECTION = frozenset({"keep-alive", "close"})  # which name no header
_NO_OPTIONS: frozenset[bytes] = frozenset()
# A Connection header can't name these: it would take away what frames, routes or identifies the message.
_NOT_CONNECTION_OPTIONS = frozenset({b"content-length", b"host", b"x-request-id", b"content-type", b"content-encoding"})
_FORWARDED = frozenset({b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"})


def _twins(names: Iterable[bytes]) -> frozenset[bytes]:
    """The names that a CGI or WSGI server takes for these: with underscores."""
    found = {
        b"".join(part + dash for part, dash in zip(name.split(b"-"), (*dashes, b""), strict=True))
        for name in names
        for dashes in product((b"-", b"_"), repeat=name.count(b"-"))
    }
    return frozenset(found).difference(names)


_ID_TWINS = _twins([b"x-request-id"])
_FORWARDED_TWINS = _twins(_FORWARDED)
_END = b"\r\n"
# RFC 9110 §6.5.1: a trailer must not frame, route, authenticate or describe the content.
_NOT_TRAILERS = (
    HOP_BY_HOP
    | _FORWARDED
    | _FORWARDED_TWINS
    | _ID_TWINS
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
MAX_LENGTH_DIGITS = 18  # of a Content-Length: 64 bits hold them, and every parser takes them
_HOST = re.compile(rb"[0-9A-Za-z\-._~!$&'()*+,;=%:\[\]]*")  # RFC 3986 §3.2
MAX_REQUEST_ID = 100  # characters; the Azure inference server answers 431 above that

# A response head by the letter (RFC 9112 §5): no control characters, bare CR or LF, folded lines, blanks before a colon.
# Possessive, so that no input makes it go back.
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*+\r\n"
_RESPONSE_HEAD = re.compile(rb"HTTP/1\.[01] " + _TEXT + rb"(?:[^\x00-\x20\x7f:]++:" + _TEXT + rb")*+\r\n")


def is_clean(head: bytes) -> bool:
    """Whether a response head has the form that the RFC gives it; aiohttp's response parser lets others by."""
    return _RESPONSE_HEAD.fullmatch(head) is not None


def connection_options(values: Iterable[str]) -> frozenset[bytes]:
    """The header names that a message's Connection headers declare hop-by-hop, in lower case."""
    named: set[bytes] = set()
    for value in values:
        if value.lower() not in _USUAL_CONNECTION:
            options = value.encode("utf-8", "surrogateescape").split(b",")
            named.update(option.strip(b" \t").lower() for option in options)
    return frozenset(named - _NOT_CONNECTION_OPTIONS) if named else _NO_OPTIONS


def is_last(connection: Iterable[str], *, http10: bool) -> bool:
    """Whether a message with these Connection headers is the last one on its connection (RFC 9112 §9.3)."""
    # ASCII: there is another letter, the Kelvin sign, whose lower case is k.
    options = {option.strip(" \t").lower() for value in connection if value.isascii() for option in value.split(",")}
    return "close" in options or (http10 and "keep-alive" not in options)


def content_length(values: Iterable[str]) -> int | None:
    """None: there is none, or more than a number of bytes can be. ``values`` are digits, which the parser has checked."""
    for value in values:
        return int(value) if len(value) <= MAX_LENGTH_DIGITS else None
    return None


def is_chunked(codings: list[str]) -> bool:
    """Whether these Transfer-Encoding headers mean chunked. With a Kelvin sign, whose lower case is k, they do not."""
    return len(codings) == 1 and codings[0].isascii() and codings[0].lower() == "chunked"


def valid_host(value: bytes) -> bool:
    """Whether it has the form of a Host header (RFC 9110 §7.2)."""
    return _HOST.fullmatch(value) is not None


def upgrade_protocols(connection: Iterable[str], upgrade: Iterable[str]) -> frozenset[str]:
    """What a message's Upgrade headers name, in lower case, if a Connection header says that they are meant (RFC 9110 §7.8)."""
    if not any(one.strip().lower() == "upgrade" for value in connection for one in value.split(",")):
        return frozenset()
    return frozenset(one.strip().lower() for value in upgrade for one in value.split(",")) - {""}


def valid_request_id(value: bytes | None) -> bool:
    """Whether an incoming x-request-id is used as it is: 1 to 100 visible ASCII characters."""
    return value is not None and 0 < len(value) <= MAX_REQUEST_ID and all(0x21 <= byte <= 0x7E for byte in value)


def origin_form(method: str, target: bytes, base_path: bytes) -> tuple[bytes, bytes | None]:
    """The target for the model server, and the authority where the client named one (absolute form).

    ``base_path`` is the path of the upstream URL, without its last slash. The rest stays byte for byte. OPTIONS of an
    authority alone is that of the server itself (RFC 9112 §3.2.4).
    """
    authority = None
    if not target.startswith(b"/") and target != b"*":
        _, _, after_scheme = target.partition(b"://")
        cut = min(
            (at for at in (after_scheme.find(mark) for mark in (b"/", b"?")) if at >= 0), default=len(after_scheme)
        )
        authority = after_scheme[:cut].rpartition(b"@")[2]
        target = after_scheme[cut:]
        if not target and method == "OPTIONS":
            target = b"*"
        elif not target.startswith(b"/"):
            target = b"/" + target
    if target == b"*":
        return target, authority
    return base_path + target, authority


class Forwarding:
    """What the relay tells the model server of one client. ``client_address`` is None over a unix socket."""

    __slots__ = ("_address", "_mode", "_scheme", "skipped")

    def __init__(self, mode: ForwardedHeaders, client_address: bytes | None, scheme: bytes) -> None:
        self._mode = mode
        self._address = client_address
        self._scheme = scheme
        # What of a request is not passed on as it is, by whether its body is chunked.
        skipped = HOP_BY_HOP | _ID_TWINS
        if mode is not ForwardedHeaders.OFF:
            skipped |= _FORWARDED | _FORWARDED_TWINS
        self.skipped = {True: skipped, False: skipped | {b"trailer"}}

    def lines(self, sent: list[tuple[bytes, bytes]], host: bytes) -> bytes:
        """The X-Forwarded lines, for those that the client ``sent`` (lower-case names) and its Host."""
        if self._mode is ForwardedHeaders.OFF:
            return b""
        addresses: list[bytes] = []
        scheme, original_host = self._scheme, host
        if self._mode is ForwardedHeaders.APPEND:
            for name, value in sent:
                if not value:
                    continue  # it says nothing
                if name == b"x-forwarded-for":
                    addresses.append(value)
                elif name == b"x-forwarded-proto":
                    scheme = value
                else:
                    original_host = value
        if self._address is not None:
            addresses.append(self._address)
        return b"%bX-Forwarded-Proto: %b\r\n%b" % (
            b"X-Forwarded-For: %b\r\n" % b", ".join(addresses) if addresses else b"",
            scheme,
            b"X-Forwarded-Host: %b\r\n" % original_host if original_host else b"",
        )


def request_head(
    method: bytes,
    target: bytes,
    headers: RawHeaders,
    *,
    dropped: frozenset[bytes],
    host: bytes,
    set_host: bytes | None,
    has_request_id: bool,
    forwarding: Forwarding,
    chunked: bool,
    te_trailers: bool,
    upgrade: bytes | None = None,
    authority: bytes | None = None,
) -> tuple[bytes, bytes]:
    """The head that goes to the model server: what stands before and behind the id that we give the request.

    ``dropped`` are the client's connection options; ``set_host`` takes the place of the client's Host. With
    ``has_request_id`` the client's own id is good, and nothing stands behind it: the first part is the whole head.
    ``upgrade`` are the protocols that the client would like to change to; ``authority`` is the host that its target names.
    """
    before = b""
    skipped = forwarding.skipped[chunked]
    parts = [method, b" ", target, b" HTTP/1.1\r\n"]
    sent: list[tuple[bytes, bytes]] = []
    client_host: bytes | None = None
    for name, value in headers:
        lower = name.lower()
        if lower in skipped or lower in dropped:
            if lower in _FORWARDED:
                sent.append((lower, value))
            continue
        if lower == b"host":
            client_host = value
            if set_host is not None:
                value = set_host
        elif lower == b"x-request-id" and not has_request_id:
            continue
        parts += (name, b": ", value, _END)
    if client_host is None:  # HTTP/1.0
        parts += (b"Host: ", set_host or host, _END)
    if not has_request_id:
        parts.append(b"x-request-id: ")
        before = b"".join(parts)
        parts = [_END]
    parts.append(forwarding.lines(sent, authority or client_host or b""))
    if upgrade is not None:
        parts += (b"Connection: Upgrade\r\nUpgrade: ", upgrade, _END)
    elif te_trailers:
        parts.append(b"TE: trailers\r\nConnection: TE\r\n")
    parts.append(b"Transfer-Encoding: chunked\r\n\r\n" if chunked else _END)
    return (b"".join(parts), b"") if has_request_id else (before, b"".join(parts))


def response_head(
    status_line: bytes,
    headers: RawHeaders,
    *,
    dropped: frozenset[bytes],
    with_request_id: bool,
    chunked: bool,
    connection: bytes | None,
    upgrade: bytes | None = None,
) -> tuple[bytes, bytes]:
    """The head that goes to the client: what stands before and behind the request's id.

    ``dropped`` are the model server's connection options. No id is added if the model server sent one itself, or
    without ``with_request_id``: then nothing stands behind it, and the first part is the whole head. ``upgrade`` is the
    protocol that the model server changes to.
    """
    before = b""
    parts = [status_line, _END]
    for name, value in headers:
        lower = name.lower()
        if lower in HOP_BY_HOP or lower in dropped or (lower == b"trailer" and not chunked):
            continue
        if lower == b"x-request-id":
            with_request_id = False
        parts += (name, b": ", value, _END)
    if with_request_id:
        parts.append(b"x-request-id: ")
        before = b"".join(parts)
        parts = [_END]
    if connection is not None:
        parts += (b"Connection: ", connection, _END)
    if upgrade is not None:
        parts += (b"Upgrade: ", upgrade, _END)
    parts.append(b"Transfer-Encoding: chunked\r\n\r\n" if chunked else _END)
    return (before, b"".join(parts)) if with_request_id else (b"".join(parts), b"")


def allowed_trailers(trailers: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Those trailer lines that may be passed on."""
    return tuple(line for line in trailers if line.partition(b":")[0].lower() not in _NOT_TRAILERS)
