"""Where a message body ends (RFC 9112 §6 and §7): pure, bytes in, bytes out.

aiohttp's parser reads the heads of messages only. The bodies are framed here because its parser keeps the
last trailer of a chunked body and puts it in front of the next message's headers (seen with 3.14.5), and
because trailers, which it swallows, can be passed on this way. See docs/decisions/0002-framing.md.

Every decoder has ``feed(data) -> payload`` and ``rest``: once ``done``, the bytes behind the body; before, what is to be fed
again, in another turn of the event loop, since bytes of many small chunks take long.
"""

from __future__ import annotations

import re
from typing import Protocol

MAX_CHUNKS_AT_ONCE = 256  # a third of a millisecond, however small they are
MAX_CHUNK_LINE_BYTES = 1024
MAX_EXTENSION_BYTES = 16 * 1024  # all chunk extensions of one body (as in CVE-2023-39326)
MAX_TRAILER_BYTES = 16 * 1024

# RFC 9112 §7.1: no sign, no 0x, no blanks around the size; 16 digits are 64 bits.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*")


class FramingError(Exception):
    """The body breaks the rules of its framing; the message says how."""


class BodyDecoder(Protocol):
    """Takes the bytes that follow a head and gives those that are payload."""

    done: bool
    rest: bytes
    trailers: tuple[bytes, ...]

    def feed(self, data: bytes) -> bytes:
        """The payload within ``data``, but for what is in ``rest`` then. Raises FramingError. Not to be called once ``done``."""


class LengthBody:
    """A body of Content-Length bytes; 0 stands for no body at all."""

    __slots__ = ("_left", "done", "rest")
    trailers: tuple[bytes, ...] = ()

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        left = self._left - len(data)
        if left > 0:
            self._left = left
            return data
        self.done = True
        if left == 0:
            return data
        self.rest = data[left:]
        return data[:left]


class CloseBody:
    """A response body that ends when its connection does; whoever reads it sees the end, not this."""

    __slots__ = ("done", "rest")
    trailers: tuple[bytes, ...] = ()

    def __init__(self) -> None:
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        return data


class ChunkedBody:
    """A body in chunks, read strictly; chunk extensions are dropped, trailers kept."""

    __slots__ = (
        "_after_data",
        "_extension_bytes",
        "_in_trailers",
        "_left",
        "_lines",
        "_partial",
        "_trailer_bytes",
        "done",
        "rest",
        "trailers",
    )

    def __init__(self) -> None:
        self._left = 0
        self._after_data = False
        self._in_trailers = False
        self._partial = b""
        self._extension_bytes = 0
        self._trailer_bytes = 0
        self.done = False
        self.rest = b""
        self.trailers: tuple[bytes, ...] = ()
        self._lines: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        if self._partial:
            data = self._partial + data
            self._partial = b""
        pieces: list[bytes] = []
        position, end = 0, len(data)
        while position < end and not self.done and len(pieces) < MAX_CHUNKS_AT_ONCE:
            if self._left:
                piece = data[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                self._after_data = not self._left
                continue
            newline = data.find(b"\n", position)
            if newline < 0:
                self._keep_partial(data[position:])
                position = end
                break
            self._take_line(data[position : newline + 1])
            position = newline + 1
        self.rest = data[position:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _keep_partial(self, partial: bytes) -> None:
        limit = 0 if self._after_data else MAX_TRAILER_BYTES if self._in_trailers else MAX_CHUNK_LINE_BYTES
        if len(partial) > limit + 1:  # its CR may have come already
            raise FramingError("a line of the chunked body is too long")
        self._partial = partial

    def _take_line(self, line: bytes) -> None:
        if line[-2:] != b"\r\n":
            raise FramingError("a line of the chunked body does not end in CRLF")
        line = line[:-2]
        if self._after_data:
            if line:
                raise FramingError("chunk data is longer than its size")
            self._after_data = False
        elif self._in_trailers:
            self._take_trailer(line)
        else:
            self._take_size(line)

    def _take_size(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None or len(line) > MAX_CHUNK_LINE_BYTES:
            raise FramingError("a chunk size is not valid")
        digits = match[1]
        self._extension_bytes += len(line) - len(digits)
        if self._extension_bytes > MAX_EXTENSION_BYTES:
            raise FramingError("chunk extensions are too long")
        self._left = int(digits, 16)
        self._in_trailers = self._left == 0

    def _take_trailer(self, line: bytes) -> None:
        if not line:
            self.trailers = tuple(self._lines)
            self.done = True
            return
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_TRAILER_BYTES:
            raise FramingError("trailers are too long")
        if _TRAILER_LINE.fullmatch(line) is None:
            raise FramingError("a trailer is not valid")
        self._lines.append(line)


def chunk(payload: bytes) -> bytes:
    """``payload`` (not empty) as one chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def last_chunk(trailers: tuple[bytes, ...] = ()) -> bytes:
    """What ends a chunked body."""
    if not trailers:
        return b"0\r\n\r\n"
    return b"0\r\n" + b"".join(line + b"\r\n" for line in trailers) + b"\r\n"
