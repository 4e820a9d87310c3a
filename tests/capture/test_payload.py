"""How bodies stand in ``data``: any JSON verbatim, any other bytes as text or not at all."""

from __future__ import annotations

import json
import time
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.capture import payload
from proxy.capture.event import LineFormat
from proxy.capture.payload import Kind, claim, embedded, json_value

MANY = settings(deadline=None, max_examples=400)
LINE_ENDS = b"\r\n"

# Any JSON text, token by token: json.dumps would never write such blanks, digits and escapes.
BLANKS = st.text(" \t\r\n", max_size=3)
NUMBERS = st.from_regex(r"-?(0|[1-9][0-9]{0,60})(\.[0-9]{1,60})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
PAIRS = st.characters(min_codepoint=0x10000).map(
    lambda c: "".join(f"\\u{unit:04x}" for unit in (0xD7C0 + (ord(c) >> 10), 0xDC00 + (ord(c) & 0x3FF)))
)
CHARACTERS = (
    st.characters(codec="utf-8", min_codepoint=0x20, exclude_characters='"\\')
    | st.sampled_from(["\\" + letter for letter in '"\\/bfnrt'])
    | st.integers(0, 0xD7FF).map(lambda code: f"\\u{code:04X}")
    | PAIRS
)
STRINGS = st.lists(CHARACTERS, max_size=6).map(lambda parts: f'"{"".join(parts)}"')


def _spaced(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*(one for part in parts for one in (BLANKS, part)), BLANKS).map("".join)


def _nested(below: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arrays = st.lists(_spaced(below), max_size=4).map(lambda items: f"[{','.join(items)}]")
    members = _spaced(STRINGS, st.just(":"), below)
    objects = st.lists(members, max_size=4).map(lambda items: f"{{{','.join(items)}}}")
    return arrays | objects


JSON_TEXTS = _spaced(
    st.recursive(NUMBERS | STRINGS | st.sampled_from(["true", "false", "null"]), _nested, max_leaves=12)
)


def exactly(text: str | bytes) -> Any:
    """What a JSON text says, with the digits of its numbers, the order of its keys, and keys that come twice."""
    return json.loads(text, parse_int=lambda d: ("n", d), parse_float=lambda d: ("n", d), object_pairs_hook=tuple)


def line_of(data: bytes, content_type: str = "application/json") -> bytes:
    return LineFormat("request", "/s").line(
        event_id="e", content_type=content_type, time=b"t", data=data, range_=b"r", request_id="i"
    )


@MANY
@given(text=JSON_TEXTS)
def test_any_json_stays_as_it_is_on_one_line(text: str) -> None:
    body = text.encode()
    value = json_value(body)
    assert value is not None
    assert value == body.translate(None, LINE_ENDS)  # digits, blanks, escapes, order: all of it
    assert exactly(value) == exactly(body)
    line = line_of(value)
    assert line.endswith(b"\n")
    assert not set(line[:-1]) & set(LINE_ENDS)
    assert dict(exactly(line))["data"] == exactly(body)
    assert embedded(body, "application/json") == (value, "application/json")


NOT_JSON = [
    b"",
    b" ",
    b"1 2",
    b"[1,]",
    b"{'a':1}",
    b"NaN",
    b"[Infinity]",
    b"01",
    b"1.",
    b"+1",
    b"tru",
    b"[1]\x00",
    b"\x0b[1]",
    b"\xef\xbb\xbf[1]",  # RFC 8259 §8.1: no byte order mark
    b'"\xff"',
    b'"\xed\xa0\x80"',  # a surrogate in UTF-8
    b'"a\rb"',
    b'"a\nb"',
    b'"\x01"',
    b'"\\ud800"',
    b'{"\\udc00":1}',
    b'"\\u00"',
    b"[" * 5000 + b"]" * 5000,
    b"[" * 1_000_000,
    '{"a":1}'.encode("utf-16"),
]


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:16]))
def test_what_readers_fail_on_is_not_taken_for_json(body: bytes) -> None:
    assert json_value(body) is None
    found = embedded(body, "application/json")
    if found is not None:  # a string of the same characters, which is valid JSON where the body was not
        assert json.loads(found[0]) == body.decode()
        assert not set(found[0]) & set(LINE_ENDS)
        found[0].decode()


@pytest.mark.parametrize(
    ("depth", "kept"), [(1, True), (99, True), (100, True), (101, False), (500, False), (990, False), (2000, False)]
)
@pytest.mark.parametrize(
    ("opened", "inside", "closed"),
    [
        ("[", "[]", "]"),
        ('{"a":', "{}", "}"),
        ('["[[{{",', r'["\\\"[{\\"]', ',"}}]]"]'),
        ('["]","}\\"",', "[0]", ',"[","{"]'),  # brackets in strings that would close what is open
        ("[[],{},", "[]", ",[]]"),
    ],
)
def test_json_nests_as_deep_as_all_readers_can_follow(
    opened: str, inside: str, closed: str, depth: int, kept: bool
) -> None:
    body = (opened * (depth - 1) + inside + closed * (depth - 1)).encode()
    assert depth > 200 or depth_of(json.loads(body)) == depth
    assert (json_value(body) is not None) == kept


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@settings(deadline=None, max_examples=100)
@given(text=JSON_TEXTS, around=st.integers(80, 101), piece_bytes=st.integers(1, 300))
def test_the_depth_is_exact_whatever_the_strings_hold(text: str, around: int, piece_bytes: int) -> None:
    body = ('["\\"[",[],[[[]],2],' * around + text + "]" * around).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payload, "_PIECE_BYTES", piece_bytes)  # cut anywhere
        kept = json_value(body) is not None
    assert kept == (around + max(3, depth_of(json.loads(text))) <= 100)


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", (Kind.JSON, None)),
        ("Application/JSON; charset=UTF-8", (Kind.JSON, "utf-8")),
        ("text/json", (Kind.JSON, None)),
        ("application/vnd.api+json;v=1", (Kind.JSON, None)),
        ("application/problem+JSON ", (Kind.JSON, None)),
        ("application/jsonp", (Kind.OTHER, None)),
        ("text/plain", (Kind.TEXT, None)),
        ('text/plain ; format=flowed ; Charset = "ISO-8859-1"', (Kind.TEXT, "iso-8859-1")),
        ("text/plain; x-charset=utf-16", (Kind.TEXT, None)),
        ("text/event-stream", (Kind.TEXT, None)),
        ("application/x-www-form-urlencoded", (Kind.TEXT, None)),
        ("application/x-ndjson", (Kind.TEXT, None)),
        ("image/svg+xml", (Kind.TEXT, None)),
        ("application/octet-stream", (Kind.OTHER, None)),
        ("multipart/form-data; boundary=x", (Kind.OTHER, None)),
        ("nonsense", (Kind.OTHER, None)),
        (";;;", (Kind.OTHER, None)),
        ("caf\udce9/json", (Kind.OTHER, None)),
        ("", (Kind.ABSENT, None)),
        ("  ", (Kind.ABSENT, None)),
        (None, (Kind.ABSENT, None)),
    ],
)
def test_what_a_content_type_claims(content_type: str | None, expected: tuple[Kind, str | None]) -> None:
    assert claim(content_type) == expected


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b"a\r\nb\x00", "text/plain", ("a\r\nb\x00", "text/plain")),
        ("caf\xe9".encode("latin-1"), "text/plain; charset=latin-1", ("café", "text/plain; charset=latin-1")),
        ("日本".encode("shift_jis"), "text/html; charset=Shift_JIS", ("日本", "text/html; charset=Shift_JIS")),
        ("né".encode("utf-16"), "text/plain; charset=utf-16", ("né", "text/plain; charset=utf-16")),
        ("né".encode(), "text/plain; charset=klingon", ("né", "text/plain; charset=klingon")),
        (b"a=1&b=%20", "application/x-www-form-urlencoded", ("a=1&b=%20", "application/x-www-form-urlencoded")),
        (b"data: x\n\n", "text/event-stream", ("data: x\n\n", "text/event-stream")),
        (b"[1]\n[2]\n", "application/x-ndjson", ("[1]\n[2]\n", "application/x-ndjson")),
        (b"just text\t\x1b[0m", "application/octet-stream", ("just text\t\x1b[0m", "application/octet-stream")),
        (b"{oops", "application/json", ("{oops", "application/json")),
        (b"  [1]", None, ([1], "application/json")),
        (b'{"a":1}', "", ({"a": 1}, "application/json")),
        (b"[1", None, ("[1", "text/plain")),
        (b"12", None, ("12", "text/plain")),
        ("\u2028\u0085".encode(), "text/plain", ("\u2028\u0085", "text/plain")),
        (b"\x00\x01", "application/octet-stream", None),
        (b"\x00\x01", "application/json", None),
        (b"\x00\x01", None, None),
        (b"caf\xe9", "text/plain", None),
        (b"\xff", "text/plain; charset=utf-8", None),
        (b"\xff", "application/json; charset=latin-1", None),  # RFC 8259: JSON has no charset
        (b"PK\x03\x04", "application/zip", None),
    ],
)
def test_text_or_a_file(body: bytes, content_type: str | None, expected: tuple[Any, str] | None) -> None:
    found = embedded(body, content_type)
    assert (None if found is None else (json.loads(found[0]), found[1])) == expected


CHARSETS = ["latin-1", "ISO-8859-8", "utf-7", "utf-16", "utf-16le", "UTF-32", "shift_jis", "euc-kr", "gb18030", "big5"]
TYPES = st.sampled_from(
    [None, "application/json", "a/b+json", "text/plain", "image/png", *(f"text/x; charset={name}" for name in CHARSETS)]
) | st.text(st.characters(max_codepoint=0xFF), max_size=40)


@MANY
@given(body=st.binary() | st.text().map(str.encode) | JSON_TEXTS.map(str.encode), content_type=TYPES)
def test_any_bytes_under_any_type_are_kept_or_refused(body: bytes, content_type: str | None) -> None:
    found = embedded(body, content_type)
    if found is None:
        assert claim(content_type)[0] is not Kind.TEXT or not _is_utf8(body)
        return
    value, found_type = found
    line = line_of(value, found_type)
    assert not set(line[:-1]) & set(LINE_ENDS)
    data = json.loads(line)["data"]
    if value == body.translate(None, LINE_ENDS) and claim(content_type)[0] in (Kind.JSON, Kind.ABSENT):
        assert exactly(value) == exactly(body)
    else:
        assert isinstance(data, str)
        charset = claim(content_type)[1] or "utf-8"
        assert data.encode() == body or data == body.decode(charset)


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


# A client chooses the charset: Python knows more codecs than there are charsets.
@pytest.mark.parametrize(
    "charset", ["zlib", "bz2", "hex", "base64", "rot13", "uu", "quopri", "idna", "undefined", "unicode_escape", "utf-7"]
)
@pytest.mark.parametrize("body", [rb"caf\xe9 \d +AGE- xn--a", b"61"])
def test_a_charset_that_is_none_is_not_used(charset: str, body: bytes) -> None:
    found = embedded(body, f"text/plain; charset={charset}")
    assert found is not None
    assert json.loads(found[0]) == body.decode()


def test_a_charset_can_not_unpack() -> None:
    bomb = zlib.compress(bytes(50_000_000))
    tracemalloc.start()
    try:
        assert embedded(bomb, "text/plain; charset=zlib") is None
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content_type",
    [
        'a/b;"' + ";" * 100_000,
        "a/b" + ";" * 100_000,
        "text/plain" + "; charset" * 12_000,
        "text/plain;" + " " * 100_000,
        'text/plain; charset="' + "=" * 100_000,
    ],
    ids=lambda content_type: content_type[:16],
)
def test_a_content_type_takes_no_time(content_type: str) -> None:
    began = time.process_time()
    claim(content_type)
    assert time.process_time() - began < 0.5  # email.message needs eight seconds for the first of these


def test_content_types_are_the_clients_to_choose_and_take_no_memory() -> None:
    tracemalloc.start()
    try:
        for number in range(1100):
            claim(f"text/plain; x={number:050000}")
        assert tracemalloc.get_traced_memory()[0] < 10_000_000
    finally:
        tracemalloc.stop()
