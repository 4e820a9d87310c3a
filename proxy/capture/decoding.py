"""Undoes Content-Encoding on the recorded copy, in bounded steps: pure, bytes in, bytes out."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from aiohttp.compression_utils import BrotliDecompressor, ZLibDecompressor, ZSTDDecompressor

STEP_BYTES = 256 * 1024
_CODINGS = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate", "br": "br", "zstd": "zstd"}


class Undecodable(Exception):
    """The body is not what its Content-Encoding says, or unpacks to more than the limit."""


def codings(header: str) -> tuple[str, ...] | None:
    """The codings of a Content-Encoding header, in the order in which they were applied; None if one is unknown."""
    names = [name.strip().lower() for name in header.split(",")]
    known = [_CODINGS.get(name) for name in names if name and name != "identity"]
    return None if None in known else tuple(name for name in known if name is not None)


def decoded(pieces: Iterable[bytes], encodings: tuple[str, ...], limit_bytes: int) -> Iterator[bytes]:
    """``pieces`` unpacked, in pieces of at most about STEP_BYTES. Raises Undecodable, also past ``limit_bytes`` (0: none)."""
    stream: Iterator[bytes] = iter(pieces)
    for encoding in reversed(encodings):
        stream = _unpacked(stream, encoding)
    total = 0
    for piece in stream:
        total += len(piece)
        if limit_bytes and total > limit_bytes:
            raise Undecodable(f"unpacks to more than {limit_bytes} bytes")
        yield piece


def _unpacked(pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decompressor: ZLibDecompressor | BrotliDecompressor | ZSTDDecompressor | None = None
    try:
        for data in pieces:
            if decompressor is None:
                decompressor = _decompressor(encoding, data)
            piece = decompressor.decompress_sync(data, STEP_BYTES)
            while piece:
                yield piece
                piece = decompressor.decompress_sync(b"", STEP_BYTES) if decompressor.data_available else b""
        if isinstance(decompressor, ZLibDecompressor) and not decompressor.eof:
            raise Undecodable("ends within its compressed data")
    except Undecodable:
        raise
    except Exception as error:  # each library has exceptions of its own, brotli's without a common base
        raise Undecodable(str(error)) from error


def _decompressor(encoding: str, first: bytes) -> ZLibDecompressor | BrotliDecompressor | ZSTDDecompressor:
    if encoding == "br":
        return BrotliDecompressor()
    if encoding == "zstd":
        return ZSTDDecompressor()
    # RFC 9110 §8.4.1.2: "deflate" is zlib's format, but some send the bare stream, whose first byte can't be zlib's 0x?8.
    bare = encoding == "deflate" and (not first or first[0] & 0x0F != zlib.DEFLATED)
    return ZLibDecompressor(encoding=encoding, suppress_deflate_header=bare)
