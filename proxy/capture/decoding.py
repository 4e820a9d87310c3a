"""Undoes Content-Encoding on the recorded copy, in bounded steps: pure, bytes in, bytes out."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import brotli  # type: ignore[import-untyped]

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STEP_BYTES = 256 * 1024
MAX_CODINGS = 4
MAX_MEMBERS = 4096  # of one gzip or zstd body; bgzip writes one for each 64 kB
_INPUT_BYTES = 16 * 1024  # handed over at a time: what follows the end of a member is copied
_CODINGS = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate", "br": "br", "zstd": "zstd"}


class Undecodable(Exception):
    """The body is not what its Content-Encoding says, or unpacks to more than the limit."""


def codings(header: str) -> tuple[str, ...] | None:
    """The codings of a Content-Encoding header, in the order in which they were applied; None if one is unknown.

    More than MAX_CODINGS count as unknown, too.
    """
    names = [name.strip().lower() for name in header.split(",")]
    known = tuple(_CODINGS.get(name, "") for name in names if name and name != "identity")
    return None if "" in known or len(known) > MAX_CODINGS else known


def decoded(pieces: Iterable[bytes], encodings: tuple[str, ...], limit_bytes: int) -> Iterator[bytes]:
    """``pieces`` unpacked, in pieces of at most about STEP_BYTES. Raises Undecodable, also past ``limit_bytes`` (0: none)."""
    stream: Iterator[bytes] = iter(pieces)
    for encoding in reversed(encodings):
        stream = _unpacked(stream, encoding, limit_bytes)
    return stream


def _unpacked(pieces: Iterator[bytes], encoding: str, limit_bytes: int) -> Iterator[bytes]:
    """One coding undone. The limit holds for each: a coding in between can unpack to much of which nothing is left."""
    member: _Member | None = None
    members = total = 0
    for data in _cut(pieces):
        more = False  # a full step leaves output behind
        while data or more:
            if member is None:
                members += 1
                if members > MAX_MEMBERS:
                    raise Undecodable(f"has more than {MAX_MEMBERS} members")
                member = _member(encoding, data)
            try:
                piece = member.decompress(data, STEP_BYTES)
            except (zlib.error, brotli.error, zstd.ZstdError) as error:
                raise Undecodable(str(error)) from error
            total += len(piece)
            if limit_bytes and total > limit_bytes:
                raise Undecodable(f"unpacks to more than {limit_bytes} bytes")
            if piece:
                yield piece
            if member.eof:
                data, more, member = member.unused_data, False, None
            else:
                data, more = member.unconsumed_tail, bool(piece)
    if member is not None:
        raise Undecodable("ends within its compressed data")


def _cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for start in range(0, len(piece), _INPUT_BYTES):
            yield piece[start : start + _INPUT_BYTES]


class _Member(Protocol):
    """``zlib.decompressobj``, and what looks like it."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Brotli:
    unused_data = unconsumed_tail = b""  # a body has one member, and the library keeps its input

    def __init__(self) -> None:
        self._stream = brotli.Decompressor()

    @property
    def eof(self) -> bool:
        return bool(self._stream.is_finished())

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return bytes(self._stream.process(data, output_buffer_limit=max_length))


class _Zstd:
    unconsumed_tail = b""  # the library keeps its input

    def __init__(self) -> None:
        # RFC 9659: on the web a window is at most 8 MB. The format allows gigabytes.
        self._stream = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 23})

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._stream.decompress(data, max_length)


def _member(encoding: str, first: bytes) -> _Member:
    if encoding == "br":
        return _Brotli()
    if encoding == "zstd":
        return _Zstd()
    if encoding == "gzip":
        return zlib.decompressobj(16 + zlib.MAX_WBITS)
    # RFC 9110 §8.4.1.2: "deflate" is zlib's format, but some send the bare stream, whose first byte can't be zlib's 0x?8.
    return zlib.decompressobj(zlib.MAX_WBITS if first[0] & 0x0F == zlib.DEFLATED else -zlib.MAX_WBITS)
