"""Reads HTTP/1.1 by the letter of RFC 9112, twice: by the expressions below, and by h11. Both must agree.

``read_request`` and ``read_response`` are pure. ``Recorder`` is a model server that takes nothing else.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import h11

Headers = tuple[tuple[bytes, bytes], ...]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])")
# RFC 9112 §4 wants the blank behind the status even where no reason follows; nobody minds if it is missing.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD = re.compile(
    rb"(" + _TOKEN + rb"):[ \t]*((?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*"
)
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_LENGTH = re.compile(rb"[0-9]{1,20}")  # h11 takes no more
_MOST_BYTES = 200  # of a body that is completed for a client that did not
_LARGEST_HEAD = 1 << 20


class NotHttp(Exception):
    """The bytes break a rule; ``in_body`` says that the head was fine."""

    def __init__(self, why: str, *, in_body: bool = False) -> None:
        super().__init__(why)
        self.in_body = in_body


class Short(Exception):
    """The message is not whole yet; ``missing`` would bring it further. None: too much is missing."""

    def __init__(self, missing: bytes | None, *, in_body: bool = False) -> None:
        super().__init__(missing)
        self.missing = missing
        self.in_body = in_body


@dataclass(frozen=True)
class Message:
    """One message. ``framing``: none, length, chunked or close. Header names and values are as they were sent."""

    start: bytes
    headers: Headers
    framing: str
    payload: bytes = b""
    trailers: Headers = ()

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]

    def options(self) -> set[bytes]:
        """What the Connection headers say, in lower case."""
        return {one.strip(b" \t").lower() for value in self.values(b"connection") for one in value.split(b",")}

    @property
    def method(self) -> bytes:
        return self.start.split(b" ")[0]

    @property
    def target(self) -> bytes:
        return self.start.split(b" ")[1]

    @property
    def status(self) -> int:
        return int(self.start.split(b" ")[1])

    @property
    def version(self) -> bytes:
        """Of a request."""
        return self.start[-3:]

    @property
    def last(self) -> bool:
        """Whether this request is the last on its connection (RFC 9112 §9.3)."""
        options = self.options()
        return b"close" in options or (self.version == b"1.0" and b"keep-alive" not in options)


def read_request(data: bytes, *, exact: bool = False) -> tuple[Message, bytes]:
    """The first request in ``data``, and what follows it. Raises NotHttp and Short.

    ``exact``: h11 must take the very bytes; else it is spared chunk extensions and the trailers that frame nothing
    though they seem to, of which it takes less than the RFC allows, and which the proxy drops.
    """
    start, headers, body = _head(data)
    line = _REQUEST_LINE.fullmatch(start)
    if line is None:
        raise NotHttp("request line")
    old = line[3] == b"0"
    hosts = sum(name.lower() == b"host" for name, _ in headers)
    if hosts > 1 or not (hosts or old):
        raise NotHttp("Host")
    framing, length = _framing(headers, old=old)
    judge = h11.Connection(h11.SERVER, max_incomplete_event_size=_LARGEST_HEAD)
    message, rest = _body(start, headers, framing or "none", length or 0, body)
    asked = data[: len(data) - len(rest)] if exact else data[: len(data) - len(body)] + _plain(message)
    _ask_h11(judge, asked.lstrip(b"\r\n"), message)
    return message, rest


def read_response(data: bytes, method: bytes, *, ended: bool = False) -> tuple[Message, bytes]:
    """The first answer in ``data`` to ``method``, interim ones included, and what follows it. Raises NotHttp and Short.

    ``ended``: the sender has closed the connection in an orderly way.
    """
    start, headers, body = _head(data, skip=False)
    line = _STATUS_LINE.fullmatch(start)
    if line is None:
        raise NotHttp("status line")
    framing, length = _framing(headers, old=line[1] == b"0")
    status = int(line[2])
    if status == 101:
        raise NotHttp("101 that nobody asked for")
    if method == b"HEAD" or status < 200 or status in (204, 304):
        framing = "none"
    elif framing is None:
        if not ended:
            raise Short(None, in_body=True)
        framing = "close"
    judge = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LARGEST_HEAD)
    judge.send(h11.Request(method=method, target="/", headers=[("Host", "h")]))
    judge.send(h11.EndOfMessage())
    message, rest = _body(start, headers, framing, length or 0, body)
    _ask_h11(judge, data[: len(data) - len(body)] + _plain(message), message)
    return message, rest


def _head(data: bytes, *, skip: bool = True) -> tuple[bytes, Headers, bytes]:
    """First line, headers, and the bytes behind the head."""
    if skip:  # RFC 9112 §2.2: a server ignores empty lines before a request line
        data = data.lstrip(b"\r\n")
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        raise Short(b"\r\n\r\n")
    start, *lines = head.split(b"\r\n")
    return start, tuple(_field(line) for line in lines), body


def _field(line: bytes, *, in_body: bool = False) -> tuple[bytes, bytes]:
    field = _FIELD.fullmatch(line)
    if field is None:
        raise NotHttp(f"field line {line[:60]!r}", in_body=in_body)
    return field[1], field[2]


def _framing(headers: Headers, *, old: bool) -> tuple[str | None, int | None]:
    """RFC 9112 §6: how the body is framed, if it is, and its length."""
    lengths = [value for name, value in headers if name.lower() == b"content-length"]
    codings = [value.lower() for name, value in headers if name.lower() == b"transfer-encoding"]
    if codings:
        if lengths or old or codings != [b"chunked"]:
            raise NotHttp("Transfer-Encoding")
        return "chunked", None
    if not lengths:
        return None, None
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]) or int(lengths[0]) >= 2**64:
        raise NotHttp("Content-Length")
    return "length", int(lengths[0])


def _body(start: bytes, headers: Headers, framing: str, length: int, data: bytes) -> tuple[Message, bytes]:
    if framing == "none":
        return Message(start, headers, framing), data
    if framing == "close":
        return Message(start, headers, framing, data), b""
    if framing == "length":
        left = length - len(data)
        if left > 0:
            raise Short(b"x" * left if left <= _MOST_BYTES else None, in_body=True)
        return Message(start, headers, framing, data[:length]), data[length:]
    payload, trailers, rest = _chunks(data)
    return Message(start, headers, framing, payload, trailers), rest


def _chunks(data: bytes) -> tuple[bytes, Headers, bytes]:
    payload = b""
    while True:
        line, data = _line(data, b"0")
        found = _CHUNK_LINE.fullmatch(line)
        if found is None:
            raise NotHttp(f"chunk line {line[:60]!r}", in_body=True)
        size = int(found[1], 16)
        if not size:
            break
        chunk, end, data = data[:size], data[size : size + 2], data[size + 2 :]
        if not b"\r\n".startswith(end):
            raise NotHttp("end of a chunk", in_body=True)
        if len(end) < 2:
            left = size - len(chunk)
            raise Short(b"x" * left + b"\r\n"[len(end) :] if left <= _MOST_BYTES else None, in_body=True)
        payload += chunk
    trailers: list[tuple[bytes, bytes]] = []
    while True:
        line, data = _line(data, b"")
        if not line:
            return payload, tuple(trailers), data
        trailers.append(_field(line, in_body=True))


def _line(data: bytes, empty: bytes) -> tuple[bytes, bytes]:
    line, end, rest = data.partition(b"\n")
    if not end:
        raise Short(b"\n" if line.endswith(b"\r") else (line and b"\r\n") or empty + b"\r\n", in_body=True)
    if not line.endswith(b"\r"):
        raise NotHttp("bare LF", in_body=True)
    return line[:-1], rest


def _plain(message: Message) -> bytes:
    """The body, framed in the plainest way."""
    if message.framing != "chunked":
        return message.payload
    chunks = b"%x\r\n%b\r\n" % (len(message.payload), message.payload) if message.payload else b""
    return chunks + b"0\r\n" + b"".join(b"%b: %b\r\n" % one for one in _unframed(message.trailers)) + b"\r\n"


def _ask_h11(judge: h11.Connection, data: bytes, message: Message) -> None:
    """Raises NotHttp if h11 does not take ``data`` for exactly this message."""
    try:
        judge.receive_data(data)
        if message.framing == "close":
            judge.receive_data(b"")
        head, *rest = _events(judge)
    except h11.ProtocolError as error:
        raise NotHttp(f"h11: {error}") from None
    assert isinstance(head, h11.Request | h11.Response | h11.InformationalResponse)
    # h11 writes the values that frame in its own way.
    assert _unframed(head.headers.raw_items()) == _unframed(message.headers), (head, message)
    payload = b"".join(bytes(event.data) for event in rest if isinstance(event, h11.Data))
    assert payload == message.payload, (payload, message)
    if isinstance(head, h11.InformationalResponse):
        return
    assert rest, message
    end = rest[-1]
    assert isinstance(end, h11.EndOfMessage), (rest, message)
    trailers = [(name.lower(), value) for name, value in _unframed(message.trailers)]
    assert _unframed(end.headers) == trailers, (end, message)
    assert judge.trailing_data[0] == b"", message


def _unframed(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [one for one in headers if one[0].lower() not in (b"content-length", b"transfer-encoding")]


def _events(judge: h11.Connection) -> Iterator[h11.Event]:
    while True:
        event = judge.next_event()
        if isinstance(event, type):  # NEED_DATA, PAUSED
            return
        assert isinstance(event, h11.Event)
        yield event
        if isinstance(event, h11.EndOfMessage):
            return


@dataclass(frozen=True)
class Stream:
    """What a client's bytes hold: ``messages``, then an ``end``, and the ``rest`` from there on.

    whole: nothing more; last: the connection was to end there; head, body: the next message breaks a rule in that
    part of it; short: its body is not whole.
    """

    messages: tuple[Message, ...]
    end: str
    rest: bytes = b""
    why: str = ""


def read_stream(data: bytes) -> Stream:
    """All requests of one connection."""
    messages: list[Message] = []
    while data.lstrip(b"\r\n"):
        try:
            message, data = read_request(data)
        except NotHttp as found:
            return Stream(tuple(messages), "body" if found.in_body else "head", data, str(found))
        except Short as found:
            return Stream(tuple(messages), "short" if found.in_body else "head", data, "not whole")
        messages.append(message)
        if message.last:
            return Stream(tuple(messages), "last", data)
    return Stream(tuple(messages), "whole")


@dataclass(frozen=True)
class Answers:
    """What a model server's bytes hold as answer to one request: ``interims``, then ``final``, if it is whole and valid.

    ``why`` not, else; ``rest``: what follows.
    """

    interims: tuple[Message, ...]
    final: Message | None
    rest: bytes = b""
    why: str = ""


def read_answers(data: bytes, method: bytes, *, ended: bool) -> Answers:
    """``ended``: the sender has closed the connection behind ``data`` in an orderly way."""
    interims: list[Message] = []
    while True:
        try:
            message, data = read_response(data, method, ended=ended)
        except NotHttp as found:
            return Answers(tuple(interims), None, data, str(found))
        except Short:
            return Answers(tuple(interims), None, data, "not whole")
        if message.status >= 200:
            return Answers(tuple(interims), message, data)
        interims.append(message)


def completed(data: bytes) -> bytes:
    """``data`` with what its last request still wants, unless that is too much."""
    left = data
    with contextlib.suppress(NotHttp):
        while left.lstrip(b"\r\n"):
            try:
                left = read_request(left)[1]
            except Short as found:
                if found.missing is None:
                    break
                data, left = data + found.missing, left + found.missing
    return data
