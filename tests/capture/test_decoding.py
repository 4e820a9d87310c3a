"""Undoing Content-Encoding: whole, in any pieces, stacked, cut short, hostile."""

from __future__ import annotations

import gzip
import io
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.capture.decoding import STEP_BYTES, Undecodable, codings, decoded

try:
    from compression import zstd
except ImportError:
    from backports import zstd

MANY = settings(deadline=None, max_examples=300)
FEWER = settings(deadline=None, max_examples=100)


def bare_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


def named_gzip(body: bytes) -> bytes:
    """With a file name and a time, as the command line tool writes it."""
    file = io.BytesIO()
    with gzip.GzipFile("name.json", "wb", fileobj=file, mtime=1) as packer:
        packer.write(body)
    return file.getvalue()


def streamed_zstd(body: bytes) -> bytes:
    """With a checksum, without the length in the head, flushed in the middle."""
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.checksum_flag: 1})
    half = len(body) // 2
    return packer.compress(body[:half], packer.FLUSH_BLOCK) + packer.compress(body[half:]) + packer.flush()


def streamed_brotli(body: bytes) -> bytes:
    packer = brotli.Compressor(quality=1)
    half = len(body) // 2
    return packer.process(body[:half]) + packer.flush() + packer.process(body[half:]) + packer.finish()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip with a name": ("gzip", named_gzip),
    "gzip stored": ("gzip", lambda body: gzip.compress(body, 0)),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare_deflate),
    "br": ("br", brotli.compress),
    "br streamed": ("br", streamed_brotli),
    "zstd": ("zstd", zstd.compress),
    "zstd streamed": ("zstd", streamed_zstd),
}
EVERY_CODING = pytest.mark.parametrize(("coding", "pack"), PACKERS.values(), ids=PACKERS.keys())
BODIES = st.binary(max_size=200) | st.builds(lambda seed, times: seed * times, st.binary(min_size=1), st.just(5000))


def unpack(packed: bytes | Iterable[bytes], *encodings: str, limit_bytes: int = 0) -> bytes:
    pieces = [packed] if isinstance(packed, bytes) else packed
    return b"".join(decoded(pieces, encodings, limit_bytes))


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """``data`` in pieces, some of them empty."""
    ends = sorted(cut % (len(data) + 1) for cut in cuts)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


@EVERY_CODING
@FEWER
@given(body=BODIES, cuts=st.lists(st.integers(min_value=0), max_size=8))
def test_any_body_in_any_pieces(coding: str, pack: Callable[[bytes], bytes], body: bytes, cuts: list[int]) -> None:
    packed = pack(body)
    assert unpack(packed, coding) == body
    assert unpack(split(packed, cuts), coding) == body


@EVERY_CODING
def test_byte_by_byte_and_longer_than_a_step(coding: str, pack: Callable[[bytes], bytes]) -> None:
    body = b"".join(b"%d," % number for number in range(200_000)) + bytes(3 * STEP_BYTES)
    packed = pack(body)
    assert unpack([packed[at : at + 1] for at in range(len(packed))] if len(packed) < 10**6 else packed, coding) == body
    pieces = list(decoded([packed], (coding,), 0))
    assert b"".join(pieces) == body
    assert max(map(len, pieces)) <= 2 * STEP_BYTES


@EVERY_CODING
@pytest.mark.parametrize("size", [STEP_BYTES - 1, STEP_BYTES, STEP_BYTES + 1, 2 * STEP_BYTES])
def test_a_body_that_ends_with_a_step(coding: str, pack: Callable[[bytes], bytes], size: int) -> None:
    packed = pack(b"a" * size)
    for cut in (1, 2, 10, len(packed) - 1):
        assert unpack([packed[:cut], packed[cut:]], coding) == b"a" * size


@EVERY_CODING
@pytest.mark.parametrize("body", [b"", b"x", b'{"data": [1.50, 2]}' * 50], ids=len)
def test_every_cut_is_noticed(coding: str, pack: Callable[[bytes], bytes], body: bytes) -> None:
    packed = pack(body)
    for length in range(1, len(packed)):
        with pytest.raises(Undecodable):
            unpack(packed[:length], coding)


@EVERY_CODING
def test_what_follows_the_end_is_noticed(coding: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(b"[1, 2, 3]")
    for pieces in ([packed + b"junk"], [packed, b"junk"], [packed, b"", b"\xff"]):
        with pytest.raises(Undecodable):
            unpack(pieces, coding)


@MANY
@given(
    garbage=st.binary(max_size=300)
    | st.builds(
        lambda packed, at, bits: (
            packed[: at % len(packed)] + bytes([packed[at % len(packed)] ^ bits]) + packed[at % len(packed) + 1 :]
        ),
        st.sampled_from([pack(b'{"data": [[1, 2.5, "x"]]}' * 9) for _, pack in PACKERS.values()]),
        st.integers(min_value=0),
        st.integers(1, 255),
    ),
    coding=st.sampled_from(["gzip", "deflate", "br", "zstd"]),
    cuts=st.lists(st.integers(min_value=0), max_size=3),
)
def test_any_garbage_is_refused_or_read_alike_in_any_pieces(garbage: bytes, coding: str, cuts: list[int]) -> None:
    found = []
    for pieces in ([garbage], split(garbage, cuts)):
        try:
            found.append(unpack(pieces, coding, limit_bytes=10_000_000))
        except Undecodable:
            found.append(None)
    assert found[0] == found[1]


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
@FEWER
@given(parts=st.lists(st.binary(max_size=300), min_size=2, max_size=6), cuts=st.lists(st.integers(min_value=0)))
def test_members_one_after_another(coding: str, parts: list[bytes], cuts: list[int]) -> None:
    packed = [PACKERS[coding][1](part) for part in parts]
    assert unpack(b"".join(packed), coding) == b"".join(parts)
    assert unpack(packed, coding) == b"".join(parts)
    assert unpack(split(b"".join(packed), cuts), coding) == b"".join(parts)
    with pytest.raises(Undecodable):
        unpack(b"".join(packed)[:-1], coding)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("gzip", ("gzip",)),
        (" GZIP ", ("gzip",)),
        ("x-gzip", ("gzip",)),
        ("deflate, gzip", ("deflate", "gzip")),
        ("gzip,identity,br", ("gzip", "br")),
        ("zstd,", ("zstd",)),
        ("identity", ()),
        ("", ()),
        ("compress", None),
        ("gzip, aes128gcm", None),
        ("utf-8", None),
        (", ".join(["gzip"] * 1000), None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_codings_of_a_header(header: str, expected: tuple[str, ...] | None) -> None:
    assert codings(header) == expected


@FEWER
@given(
    body=BODIES,
    names=st.lists(st.sampled_from(list(PACKERS)), min_size=2, max_size=4),
    cuts=st.lists(st.integers(min_value=0), max_size=5),
)
def test_codings_on_top_of_one_another(body: bytes, names: list[str], cuts: list[int]) -> None:
    packed = body
    for name in names:
        packed = PACKERS[name][1](packed)
    encodings = codings(", ".join(PACKERS[name][0] for name in names))
    assert encodings is not None
    assert unpack(split(packed, cuts), *encodings) == body


# --- hostile input ---


@EVERY_CODING
def test_the_limit_is_exact(coding: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(bytes(1_000_000))
    assert unpack(packed, coding, limit_bytes=1_000_000) == bytes(1_000_000)
    with pytest.raises(Undecodable, match="more than 999999 bytes"):
        unpack(packed, coding, limit_bytes=999_999)


def twice(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda body: pack(pack(body))


BOMBS = {
    name: ((coding,) * times, packer)
    for name, (coding, pack) in PACKERS.items()
    if "stored" not in name
    for times, packer in ((1, pack), (2, twice(pack)))
}
BOMBS = {f"{name}, {len(encodings)}": (encodings, pack) for name, (encodings, pack) in BOMBS.items()} | {
    "gzip in br": (("gzip", "br"), lambda body: brotli.compress(gzip.compress(body)))
}


@pytest.mark.parametrize(("encodings", "pack"), BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_takes_no_memory(encodings: tuple[str, ...], pack: Callable[[bytes], bytes]) -> None:
    packed = pack(bytes(10_000_000))
    assert len(packed) < 20_000
    tracemalloc.start()
    try:
        seen = 0
        for piece in decoded([packed], encodings, 0):
            seen += len(piece)
        assert seen == 10_000_000
        with pytest.raises(Undecodable, match="more than 1000000 bytes"):
            for _ in decoded([packed], encodings, 1_000_000):
                pass
        assert tracemalloc.get_traced_memory()[1] < 8 * STEP_BYTES
    finally:
        tracemalloc.stop()


def test_a_layer_that_unpacks_to_much_and_yields_nothing_is_a_bomb_too() -> None:
    empty_blocks = b"\0\0\0\xff\xff" * 2_000_000 + b"\x01\0\0\xff\xff"  # 10 MB of deflate that stand for nothing
    packed = gzip.compress(empty_blocks)
    assert unpack(packed, "deflate", "gzip") == b""
    with pytest.raises(Undecodable, match="more than 1000000 bytes"):
        unpack(packed, "deflate", "gzip", limit_bytes=1_000_000)


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_members_without_end_take_no_time(coding: str) -> None:
    packed = PACKERS[coding][1](b"") * 200_000
    began = time.process_time()
    with pytest.raises(Undecodable, match="members"):
        unpack(packed, coding)
    assert time.process_time() - began < 1


def test_many_members_of_one_file_are_read() -> None:
    """As bgzip writes them, one for each 64 kB."""
    parts = [b"%d" % number * 1000 for number in range(1000)]
    assert unpack(b"".join(map(gzip.compress, parts)), "gzip") == b"".join(parts)


def test_a_zstd_window_that_the_web_does_not_allow_is_not_provided_for() -> None:
    """RFC 9659: 8 MB. Decoders would take 128 MB for one body."""

    def packed(window_log: int) -> bytes:
        packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window_log})
        return packer.compress(b"x" * 100) + packer.flush()

    assert unpack(packed(23), "zstd") == b"x" * 100
    with pytest.raises(Undecodable):
        unpack(packed(24), "zstd")
