"""C7, C9, C10, G21: where bodies end. Whatever the pieces that a body comes in, the result is the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.relay.framing import (
    MAX_CHUNK_LINE_BYTES,
    MAX_EXTENSION_BYTES,
    MAX_TRAILER_BYTES,
    BodyDecoder,
    ChunkedBody,
    CloseBody,
    FramingError,
    LengthBody,
    chunk,
    last_chunk,
)

Result = tuple[bytes, tuple[bytes, ...], bytes, bool]
quick = settings(database=None, deadline=None, max_examples=150)

TOKEN = st.text("!#$%&'*+-.^_`|~0123456789ABCXYZabcxyz", min_size=1, max_size=8).map(str.encode)
TEXT = st.binary(max_size=12).map(lambda raw: bytes(b for b in raw if b == 9 or (b >= 0x20 and b != 0x7F)))
TRAILERS = st.lists(st.tuples(TOKEN, TEXT).map(lambda pair: pair[0] + b":" + pair[1]), max_size=3).map(tuple)
CHUNKS = st.lists(
    st.tuples(st.binary(min_size=1, max_size=40), st.sampled_from([b"%x", b"%X", b"000%x"]), TEXT, st.booleans()),
    max_size=5,
)
REST = st.sampled_from([b"", b"GET / HTTP/1.1\r\n\r\n", b"\r\n", b"0\r\n\r\n"])


def decoded(decoder: BodyDecoder, pieces: list[bytes]) -> Result:
    """Payload, trailers, all that follows the body, and whether the body came to its end."""
    payload = rest = b""
    for piece in pieces:
        if decoder.done:
            rest += piece
            continue
        payload += decoder.feed(piece)
        rest += decoder.rest
    return payload, decoder.trailers, rest, decoder.done


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(bounds) if start < end]


def single_bytes(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@pytest.mark.promise("C7", "C10a")
@quick
@given(chunks=CHUNKS, trailers=TRAILERS, rest=REST, places=st.lists(st.integers(0, 1000), max_size=6))
def test_chunks_in_any_pieces_give_the_same_payload_trailers_and_rest(
    chunks: list[tuple[bytes, bytes, bytes, bool]], trailers: tuple[bytes, ...], rest: bytes, places: list[int]
) -> None:
    """C7, C10."""
    body = b"".join(
        (size % len(data)) + (b" ;" + extension if extended else b"") + b"\r\n" + data + b"\r\n"
        for data, size, extension, extended in chunks
    )
    message = body + last_chunk(trailers) + rest
    expected = (b"".join(data for data, *_ in chunks), trailers, rest, True)
    assert decoded(ChunkedBody(), [message]) == expected
    assert decoded(ChunkedBody(), single_bytes(message)) == expected
    assert decoded(ChunkedBody(), cut(message, places)) == expected


@pytest.mark.promise("C7")
def test_a_chunked_body_may_be_cut_at_every_two_places() -> None:
    """C7: exhaustively, for a body that has everything."""
    message = b"5;a=b\r\nhel\r\n\r\n00A \t; x\r\n0\r\n\r\n5\r\n12\r\n0\r\nA: b\r\nX-Sum:\x80\r\n\r\nrest"
    expected = (b"hel\r\n0\r\n\r\n5\r\n12", (b"A: b", b"X-Sum:\x80"), b"rest", True)
    for first in range(len(message)):
        for second in range(first, len(message)):
            assert decoded(ChunkedBody(), cut(message, [first, second])) == expected


@pytest.mark.promise("C7", "C9a")
@quick
@given(payload=st.binary(max_size=60), rest=st.binary(max_size=20), places=st.lists(st.integers(0, 100), max_size=5))
def test_a_length_in_any_pieces_gives_the_same_payload_and_rest(payload: bytes, rest: bytes, places: list[int]) -> None:
    """C7, C9: what is longer than its Content-Length is not payload."""
    message = payload + rest
    expected = (payload, (), rest, True)
    assert decoded(LengthBody(len(payload)), [message] if message else []) == expected
    assert decoded(LengthBody(len(payload)), single_bytes(message)) == expected
    assert decoded(LengthBody(len(payload)), cut(message, places)) == expected


@pytest.mark.promise("C9")
@pytest.mark.parametrize("length", [1, 5, 2**40])
def test_a_body_that_is_shorter_than_its_length_is_not_done(length: int) -> None:
    """C9."""
    body = LengthBody(length)
    assert body.feed(b"1234"[: length - 1]) == b"1234"[: length - 1]
    assert not body.done


@pytest.mark.promise("C10")
def test_a_body_until_close_takes_everything_and_has_no_end_of_its_own() -> None:
    """C10."""
    body = CloseBody()
    assert body.feed(b"0\r\n\r\n") == b"0\r\n\r\n"
    assert (body.done, body.rest, body.trailers) == (False, b"", ())


@pytest.mark.promise("C9")
@pytest.mark.parametrize("end", range(1, len(b"4\r\nping\r\n0\r\nA: b\r\n\r\n")))
def test_a_chunked_body_without_its_end_is_not_done(end: int) -> None:
    """C9: nothing but the empty line behind the last chunk ends it."""
    for pieces in ([b"4\r\nping\r\n0\r\nA: b\r\n\r\n"[:end]], single_bytes(b"4\r\nping\r\n0\r\nA: b\r\n\r\n"[:end])):
        assert not decoded(ChunkedBody(), pieces)[3]


MALFORMED = {
    "plus": b"+5\r\nhello\r\n0\r\n\r\n",
    "minus": b"-5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "blank before the size": b" 5\r\nhello\r\n0\r\n\r\n",
    "blank behind the size": b"5 \r\nhello\r\n0\r\n\r\n",
    "no size": b"\r\nhello\r\n0\r\n\r\n",
    "no size but an extension": b";a=b\r\nhello\r\n0\r\n\r\n",
    "not hexadecimal": b"5g\r\nhello\r\n0\r\n\r\n",
    "digits of another script": "٥\r\nhello\r\n0\r\n\r\n".encode(),
    "17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "17 digits that overflow": b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "bare LF behind the size": b"5\nhello\r\n0\r\n\r\n",
    "bare CR behind the size": b"5\rhello\r\n0\r\n\r\n",
    "CR CR LF behind the size": b"5\r\r\nhello\r\n0\r\n\r\n",
    "bare LF in an extension": b"5;a\n=b\r\nhello\r\n0\r\n\r\n",
    "bare CR in an extension": b"5;a\r=b\r\nhello\r\n0\r\n\r\n",
    "NUL in an extension": b"5;a=\x00\r\nhello\r\n0\r\n\r\n",
    "data longer than its size": b"5\r\nhello!\r\n0\r\n\r\n",
    "data shorter than its size": b"5\r\nhell\r\n0\r\n\r\n",
    "no CRLF behind the data": b"5\r\nhello0\r\n\r\n",
    "bare LF behind the data": b"5\r\nhello\n0\r\n\r\n",
    "two CRs behind the data": b"5\r\nhello\r\r\n0\r\n\r\n",
    "long chunk line": b"5;" + b"a" * MAX_CHUNK_LINE_BYTES + b"\r\nhello\r\n0\r\n\r\n",
    "chunk line without an end": b"5;" + b"a" * MAX_CHUNK_LINE_BYTES,
    "extensions without an end": (b"1;" + b"a" * 1000 + b"\r\nx\r\n") * (MAX_EXTENSION_BYTES // 1000 + 1),
    "bare LF ends it": b"0\r\n\n",
    "trailer without a colon": b"0\r\nA\r\n\r\n",
    "trailer without a name": b"0\r\n: b\r\n\r\n",
    "trailer with a blank before its colon": b"0\r\nA : b\r\n\r\n",
    "folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "NUL in a trailer": b"0\r\nA: \x00\r\n\r\n",
    "bare CR in a trailer": b"0\r\nA: b\rc\r\n\r\n",
    "bare LF behind a trailer": b"0\r\nA: b\n\r\n",
    "long trailer": b"0\r\nA: " + b"b" * MAX_TRAILER_BYTES + b"\r\n\r\n",
    "trailer without an end": b"0\r\nA: " + b"b" * MAX_TRAILER_BYTES,
    "trailers without an end": b"0\r\n" + b"A: bcdefghijklm\r\n" * (MAX_TRAILER_BYTES // 15 + 1),
    "a request in the place of a trailer": b"0\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n",
}


@pytest.mark.promise("A4a", "G21a")
@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_chunks_are_refused(message: bytes) -> None:
    """G21: whole, byte by byte, and cut in two anywhere."""
    for pieces in ([message], single_bytes(message)):
        with pytest.raises(FramingError):
            decoded(ChunkedBody(), pieces)
    for place in range(1, min(len(message), 80)):
        with pytest.raises(FramingError):
            decoded(ChunkedBody(), cut(message, [place]))


@pytest.mark.promise("G21a")
@pytest.mark.parametrize(
    "message",
    [
        b"5;" + b"a" * (MAX_CHUNK_LINE_BYTES - 2) + b"\r\nhello\r\n0\r\n\r\n",
        b"0000000000000005\r\nhello\r\n0\r\nA:" + b"b" * (MAX_TRAILER_BYTES - 2) + b"\r\n\r\n",
    ],
    ids=["chunk line", "trailer"],
)
def test_lines_of_the_longest_length_are_taken_in_any_pieces(message: bytes) -> None:
    """G21: a limit does not depend on where the network cut."""
    assert decoded(ChunkedBody(), [message])[0] == b"hello"
    assert decoded(ChunkedBody(), single_bytes(message))[0] == b"hello"


SCRAPS = st.lists(st.sampled_from([b"0", b"5", b"a", b";", b"\r\n", b"\n", b"\r", b":", b" ", b"hello", b"\x00"]))


@pytest.mark.promise("G21a")
@quick
@given(scraps=SCRAPS)
def test_no_input_is_taken_differently_byte_by_byte(scraps: list[bytes]) -> None:
    """G21: what one cutting refuses, another one must not accept."""
    message = b"".join(scraps)

    def outcome(pieces: list[bytes]) -> Result | None:
        try:
            return decoded(ChunkedBody(), pieces)
        except FramingError:
            return None

    assert outcome([message] if message else []) == outcome(single_bytes(message))


@pytest.mark.promise("C7")
def test_what_is_written_can_be_read() -> None:
    """C7."""
    data = bytes(range(256)) * 3
    assert decoded(ChunkedBody(), [chunk(data) + last_chunk((b"A: b",))]) == (data, (b"A: b",), b"", True)
    assert chunk(data).startswith(b"300\r\n")
    assert last_chunk() == b"0\r\n\r\n"
