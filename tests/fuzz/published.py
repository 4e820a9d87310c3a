"""What the proxy changes: the list of docs/transparency.md as code. What differs in any other way is a defect.

Nothing here comes from the proxy: this is written down a second time, from what is published.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.fuzz.strict import Headers, Message

HOP_BY_HOP = {
    b"connection",
    b"proxy-connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"te",
    b"transfer-encoding",
    b"upgrade",
}
# What a Connection header names in vain: it frames, routes, identifies or describes the message.
NOT_TO_BE_NAMED = {b"content-length", b"host", b"x-request-id", b"content-type", b"content-encoding"}
FORWARDED = {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"}
UNDERSCORED = FORWARDED | {b"x-request-id"}  # with underscores, they are dropped
# "trailers pass, but for those that frame, route or authenticate" (RFC 9110 §6.5.1)
NOT_AS_TRAILERS = HOP_BY_HOP | FORWARDED
NOT_AS_TRAILERS |= {b"content-length", b"content-encoding", b"content-range", b"content-type", b"trailer"}
NOT_AS_TRAILERS |= {b"x_request_id", b"x_forwarded_for", b"x_forwarded_proto", b"x_forwarded_host"}  # and by halves
NOT_AS_TRAILERS |= {b"host", b"authorization", b"cookie", b"set-cookie", b"x-request-id"}

ID = re.compile(rb"[\x21-\x7e]{1,100}")
OUR_ID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
OUR_REFUSALS = {400, 405, 414, 431, 501, 505}  # of a request; 408 where it came too slowly
OUR_FAILURES = {502, 504}  # of the model server

Pattern = re.Pattern[bytes]


@dataclass
class Expected:
    """A message as it must arrive. ``added``: what the proxy adds, wherever it stands; by a pattern where we can't know it."""

    start: bytes
    headers: Headers
    framing: str
    payload: bytes
    trailers: Headers
    added: list[tuple[bytes, bytes | Pattern]] = field(default_factory=list)

    def differences(self, arrived: Message) -> list[str]:
        """What is not as it must be; empty if all is well."""
        found = []
        headers = list(arrived.headers)
        for name, value in self.added:
            places = [
                at
                for at, (key, given) in enumerate(headers)
                if key.lower() == name
                and (given == value if isinstance(value, bytes) else value.fullmatch(given) is not None)
            ]
            if not places:
                found.append(f"{name!r} was not added as {value!r}")
            else:
                del headers[places[-1]]
        for what, expected, got in (
            ("first line", self.start, arrived.start),
            ("headers", self.headers, tuple(headers)),
            ("framing", self.framing, arrived.framing),
            ("payload", self.payload, arrived.payload),
            ("trailers", self.trailers, arrived.trailers),
        ):
            if expected != got:
                found.append(f"{what}: {expected!r} became {got!r}")
        return found


def towards_model_server(request: Message, *, upstream: bytes, client: bytes = b"127.0.0.1") -> Expected:
    """``upstream`` is the model server's own Host; the settings are the defaults."""
    authority, target = _origin_form(request.method, request.target)
    chunked = request.framing == "chunked"
    dropped = _dropped(request, chunked=chunked) | FORWARDED
    ids = request.values(b"x-request-id")
    has_id = len(ids) == 1 and ID.fullmatch(ids[0]) is not None
    if not has_id:
        dropped |= {b"x-request-id"}
    headers = tuple(
        (name, authority if name.lower() == b"host" and authority is not None else value)
        for name, value in request.headers
        if name.lower() not in dropped and name.lower().replace(b"_", b"-") not in UNDERSCORED - {name.lower()}
    )
    expected = Expected(
        request.method + b" " + target + b" HTTP/1.1",
        headers,
        request.framing,
        request.payload,
        _trailers(request),
    )
    if not has_id:
        expected.added.append((b"x-request-id", OUR_ID))
    hosts = request.values(b"host")
    if not hosts:  # HTTP/1.0
        expected.added.append((b"host", upstream if authority is None else authority))
    expected.added += _forwarding(request, hosts if authority is None else [authority], client)
    members = [member.split(b";")[0] for value in request.values(b"te") for member in value.split(b",")]
    if any(member.strip(b" \t").lower() == b"trailers" for member in members):
        expected.added += [(b"te", b"trailers"), (b"connection", b"TE")]
    if chunked:
        expected.added.append((b"transfer-encoding", b"chunked"))
    return expected


def _forwarding(request: Message, hosts: list[bytes], client: bytes) -> list[tuple[bytes, bytes | Pattern]]:
    addresses, schemes, names = (
        [value for value in request.values(b"x-forwarded-" + name) if value] for name in (b"for", b"proto", b"host")
    )
    lines: list[tuple[bytes, bytes | Pattern]] = [
        (b"x-forwarded-for", b", ".join([*addresses, client])),
        (b"x-forwarded-proto", schemes[-1] if schemes else b"http"),
    ]
    host = names[-1] if names else hosts[-1] if hosts else b""
    return [*lines, (b"x-forwarded-host", host)] if host else lines


def _origin_form(method: bytes, target: bytes) -> tuple[bytes | None, bytes]:
    """The authority of an absolute-form target, and the target for the model server."""
    absolute = re.fullmatch(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)(.*)", target)
    if absolute is None:
        return None, target
    authority, path = absolute[1].rpartition(b"@")[2], absolute[2]
    if not path and method == b"OPTIONS":
        return authority, b"*"
    return authority, path if path.startswith(b"/") else b"/" + path


def towards_client(response: Message, request: Message, request_id: bytes) -> Expected:
    """The answer to ``request`` as its client must get it; ``request_id`` is the one that went to the model server."""
    chunked = response.framing == "chunked"
    unchunked = chunked and request.version == b"1.0"
    dropped = _dropped(response, chunked=chunked and not unchunked)
    if response.status < 200:
        dropped |= {b"content-length"}  # RFC 9110 §8.6
    expected = Expected(
        b"HTTP/1.1 %d %b" % (response.status, response.start[13:]),
        tuple((name, value) for name, value in response.headers if name.lower() not in dropped),
        "close" if unchunked else response.framing,
        response.payload,
        () if unchunked else _trailers(response),
    )
    if response.status < 200:
        return expected
    if not response.values(b"x-request-id"):
        expected.added.append((b"x-request-id", request_id))
    if closes(expected.framing, request):
        expected.added.append((b"connection", b"close"))
    elif request.version == b"1.0":
        expected.added.append((b"connection", b"keep-alive"))
    if chunked and not unchunked:
        expected.added.append((b"transfer-encoding", b"chunked"))
    return expected


def closes(framing: str, request: Message) -> bool:
    """Whether the client's connection ends with an answer in this framing."""
    return framing == "close" or request.last


def _dropped(message: Message, *, chunked: bool) -> set[bytes]:
    named = HOP_BY_HOP | (message.options() - NOT_TO_BE_NAMED)
    return named if chunked else named | {b"trailer"}


def _trailers(message: Message) -> Headers:
    return tuple((name, value) for name, value in message.trailers if name.lower() not in NOT_AS_TRAILERS)
