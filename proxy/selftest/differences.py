"""What differs between two messages, and what of it docs/transparency.md has on its list: pure.

The list stands here a second time, on purpose: what the traffic path takes for hop-by-hop is under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from proxy.selftest.plan import OWN_ID, Way
from proxy.selftest.wire import Headers, Message, Outcome

HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive proxy-authenticate proxy-authorization te transfer-encoding upgrade trailer".split()
)
FORWARDED = frozenset((b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"))
REQUEST_ID = b"x-request-id"
GATEWAY_STATUSES = (502, 504)  # which the proxy answers by itself where the server gives no answer
SHOWN_CHARACTERS = 60
SECRETS = frozenset((b"authorization", b"cookie", b"set-cookie", b"api-key", b"x-api-key"))


@dataclass(frozen=True, slots=True)
class Difference:
    """``place``: where, so that it can be told whether two direct answers differ there, too.

    ``listed``: whether docs/transparency.md has it.
    """

    place: str
    words: str
    listed: bool = False


def between(direct: Outcome, through: Outcome, way: Way) -> Iterator[Difference]:
    """What differs in what came through the proxy."""
    if len(through.answers) < len(direct.answers):
        came = f"{len(through.answers)} of {len(direct.answers)} answers came"
        yield Difference("answers", f"{came}: {through.lost or 'the connection was closed'}")
    if direct.lost and not direct.answers:
        ours = [answer for answer in through.answers if answer.status in GATEWAY_STATUSES]
        if through.answers and not ours:
            yield Difference("answers", f"{through.answers[0].status} where a direct request is not answered")
    elif not direct.lost and through.lost and len(through.answers) >= len(direct.answers):
        yield Difference("answers", through.lost)
    if way.closes and direct.closed and not through.closed:
        yield Difference("close", "the connection stays open where the server closes it")
    for one, other in zip(direct.answers, through.answers, strict=False):
        yield from _between_answers(one, other, way)


def _between_answers(direct: Message, through: Message, way: Way) -> Iterator[Difference]:
    if direct.start != through.start:
        listed = direct.start[8:] == through.start[8:] and through.start[:8] == b"HTTP/1.1"
        yield Difference("status", f"{_text(direct.start)} → {_text(through.start)}", listed)
    if [(one.start[8:], one.headers) for one in direct.interim] != [
        (one.start[8:], one.headers) for one in through.interim
    ]:
        yield Difference("interim answers", f"{_starts(direct.interim)} → {_starts(through.interim)}")
    addable = frozenset() if direct.values(REQUEST_ID) else frozenset((REQUEST_ID,))
    yield from between_headers(direct.headers, through.headers, addable)
    added = through.values(REQUEST_ID) if addable else []
    if way.header == OWN_ID and added and added != [OWN_ID.partition(b": ")[2].strip()]:
        yield Difference("id", f"the client's x-request-id comes back as {added}")
    unchunked = way.http10 and (direct.framing, through.framing) == ("chunked", "close")
    if direct.framing != through.framing:
        yield Difference("framing", f"the body's framing: {direct.framing} → {through.framing}", unchunked)
    yield from between_bodies(direct, through, unchunked=unchunked)


def between_bodies(direct: Message, through: Message, *, unchunked: bool = False) -> Iterator[Difference]:
    """Bodies without their framing, and trailers, for which there is no place in a body that is no longer chunked."""
    one, other = direct.body, through.body
    if one != other:
        at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        here, there = _text(one[at : at + 24]), _text(other[at : at + 24])
        sizes = f"{len(one)} bytes" if len(one) == len(other) else f"{len(one)} → {len(other)} bytes"
        yield Difference("body", f"the body, {sizes}, from byte {at} on: {here!r} → {there!r}")
    if direct.trailers != through.trailers:
        words = f"trailers: {list(direct.trailers)} → {list(through.trailers)}"
        yield Difference("trailers", words, listed=unchunked and not through.trailers)


def between_headers(sent: Headers, got: Headers, addable: frozenset[bytes]) -> Iterator[Difference]:
    """``addable``: what the list lets the proxy add or change here, in lower case."""
    named = {
        option.strip().lower() for key, value in sent if key.lower() == b"connection" for option in value.split(b",")
    }
    hop_by_hop = HOP_BY_HOP | named - {b"close", b"keep-alive", b""}
    before, after = _by_name(sent), _by_name(got)
    same = set()
    for name in {**before, **after}:
        one, other = before.get(name, []), after.get(name, [])
        if [(key, value.strip()) for key, value in one] == [(key, value.strip()) for key, value in other]:
            same.add(name)
            if one != other:
                yield Difference(f"blanks {_text(name)}", "blanks around values of headers: one before", listed=True)
        elif name in addable:
            yield Difference(f"header {_text(name)}", _change(one, other), listed=len(other) == 1)
        elif name in hop_by_hop:
            yield Difference(f"header {_text(name)}", _change(one, other), listed=not other or _usual(name, other))
        elif len(one) != len(other):
            yield Difference(f"number of {_text(name)}", _change(one, other))
        else:
            yield Difference(f"header {_text(name)}", _change(one, other))
    same -= hop_by_hop
    orders = [[key.lower() for key, _ in headers if key.lower() in same] for headers in (sent, got)]
    if orders[0] != orders[1]:
        names = [b", ".join(order).decode("latin-1") for order in orders]
        yield Difference("order", f"the order of headers: {names[0]} → {names[1]}")


def _usual(name: bytes, headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the proxy may say so for its own connection."""
    own = {b"connection": (b"close", b"keep-alive", b"te"), b"transfer-encoding": (b"chunked",), b"te": (b"trailers",)}
    return all(value.strip().lower() in own.get(name, ()) for _, value in headers)


def _by_name(headers: Headers) -> dict[bytes, list[tuple[bytes, bytes]]]:
    found: dict[bytes, list[tuple[bytes, bytes]]] = {}
    for name, value in headers:
        found.setdefault(name.lower(), []).append((name, value))
    return found


def _change(one: list[tuple[bytes, bytes]], other: list[tuple[bytes, bytes]]) -> str:
    if not one:
        return f"+ {_lines(other)}"
    return f"− {_lines(one)}" if not other else f"{_lines(one)} → {_lines(other)}"


def _lines(headers: list[tuple[bytes, bytes]]) -> str:
    return ", ".join(
        f"{_text(name)}: {'…' if name.lower() in SECRETS else _text(value.strip())}" for name, value in headers
    )


def _starts(messages: tuple[Message, ...]) -> str:
    return (
        "; ".join(f"{_text(message.start)} {_lines(list(message.headers))}".strip() for message in messages) or "none"
    )


def _text(data: bytes) -> str:
    text = data.decode("utf-8", "backslashreplace")
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
