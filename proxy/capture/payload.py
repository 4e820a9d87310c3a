"""How a body stands in the ``data`` of its line: as JSON, as a string, or in a file of its own. Pure.

JSON is embedded byte for byte, so that numbers keep their digits and keys their order; only CR and LF are dropped,
which in valid JSON stand between tokens. Text becomes a JSON string. Everything else goes to a file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from itertools import accumulate

import msgspec
import orjson

MAX_DEPTH = 100  # of JSON in a line: at 128 levels DuckDB gives up the whole dataset, at 1000 Spark the line
_LINE_ENDS = b"\r\n"
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# What no text has: C0 controls but tab, LF, FF, CR and ESC (terminal output), and DEL.
_NOT_TEXT = bytes(code for code in range(0x20) if code not in (0x09, 0x0A, 0x0C, 0x0D, 0x1B)) + b"\x7f"
_TEXTUAL = frozenset(
    {
        "application/x-www-form-urlencoded",
        "application/x-ndjson",
        "application/ndjson",
        "application/jsonl",
        "application/x-jsonlines",
        "application/json-seq",
        "application/xml",
        "application/yaml",
        "application/x-yaml",
        "application/toml",
        "application/sql",
        "application/graphql",
        "application/javascript",
    }
)
_REMEMBERED_CHARACTERS = 128  # content types are the client's to choose, and to make as long as a head may be
_CHARSET = re.compile(r';[ \t]*charset[ \t]*=[ \t]*"?([\w.:+-]+)', re.ASCII | re.IGNORECASE)
# Python's codecs are more than charsets: some unpack (zlib), some take quadratic time (punycode), and unknown names
# are remembered for ever.
_KNOWN_CHARSET = re.compile(
    r"utf-?8|utf-?(16|32)([bl]e)?|(us-)?ascii|latin-?1|iso-?8859-\d{1,2}|windows-125\d|cp125\d|koi8-[ru]"
    r"|shift[_-]jis|euc-(jp|kr)|iso-2022-jp|gb2312|gbk|gb18030|big5"
)
_PIECE_BYTES = 64 * 1024
_OPENS = ord("[")
_NO_BACKSLASH = re.compile(rb"[^\\]")
_check_json = msgspec.json.Decoder(msgspec.Raw).decode


class Kind(Enum):
    """What a content type claims of a body."""

    JSON = "json"
    TEXT = "text"
    OTHER = "other"
    ABSENT = "absent"


def claim(content_type: str | None) -> tuple[Kind, str | None]:
    """What a Content-Type header claims, and the charset that it names, in lower case."""
    if content_type is None:
        return Kind.ABSENT, None
    return _remembered_claim(content_type) if len(content_type) <= _REMEMBERED_CHARACTERS else _claim(content_type)


def _claim(content_type: str) -> tuple[Kind, str | None]:
    if not content_type.strip():
        return Kind.ABSENT, None
    essence = content_type.partition(";")[0].strip().lower()
    # email.message takes seconds for a header full of semicolons.
    found = _CHARSET.search(content_type)
    charset = found[1].lower() if found else None
    if essence in ("application/json", "text/json") or essence.endswith("+json"):
        return Kind.JSON, charset
    if essence.startswith("text/") or essence.endswith(("+xml", "+yaml")) or essence in _TEXTUAL:
        return Kind.TEXT, charset
    return Kind.OTHER, charset


_remembered_claim = lru_cache(maxsize=1024)(_claim)


def embedded(body: bytes, content_type: str | None) -> tuple[bytes, str] | None:
    """The JSON value for ``data`` and the ``datacontenttype``; None where the body belongs into a file of its own."""
    kind, charset = claim(content_type)
    if kind is Kind.JSON or (kind is Kind.ABSENT and body.lstrip()[:1] in (b"{", b"[")):
        value = json_value(body)
        if value is not None:
            return value, content_type or "application/json"
    text = _text(body, kind, charset)
    if text is None:
        return None
    return orjson.dumps(text), content_type or "text/plain"


def json_value(body: bytes) -> bytes | None:
    """``body`` without line ends if it is one JSON value in valid UTF-8, else None.

    Lone surrogates (``"\\ud800"``) and nesting beyond MAX_DEPTH count as invalid: readers fail on them.
    """
    try:
        _check_json(body)
        if not body.isascii():
            body.decode()
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    if _is_deep(body):
        return None
    if b"\n" in body or b"\r" in body:
        return body.translate(None, _LINE_ENDS)
    return body


def _is_deep(json: bytes) -> bool:
    """Whether valid JSON nests deeper than MAX_DEPTH. Goes by pieces: between two of them other threads get on."""
    if json.count(b"[") + json.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for text in outside_strings(json):
        brackets = text.translate(_ONE_KIND, _NO_BRACKETS)
        leaves = brackets.replace(b"[]", b"").replace(b"[]", b"")  # two levels less: rows of numbers are gone
        if depth + 2 + leaves.count(b"[") > MAX_DEPTH and max(_depths(brackets, depth)) > MAX_DEPTH:
            return True
        depth += 2 * leaves.count(b"[") - len(leaves)
    return False


def outside_strings(json: bytes) -> Iterator[bytes]:
    """Valid JSON without its strings, by pieces."""
    in_string = 0
    for piece in _pieces(json):
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends a string
        parts = piece.split(b'"')
        yield b"".join(parts[in_string::2])
        in_string ^= (len(parts) - 1) & 1


def _pieces(json: bytes) -> Iterator[bytes]:
    """Cut at any place but within an escape sequence."""
    start = 0
    while start < len(json):
        found = _NO_BACKSLASH.search(json, start + _PIECE_BYTES - 1)
        end = found.end() if found else len(json)
        yield json[start:end]
        start = end


def _depths(brackets: bytes, depth: int) -> Iterator[int]:
    return accumulate((1 if bracket == _OPENS else -1 for bracket in brackets), initial=depth)


def _text(body: bytes, kind: Kind, charset: str | None) -> str | None:
    if kind is Kind.TEXT and charset is not None and _KNOWN_CHARSET.fullmatch(charset):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            return body.decode(charset)
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    if kind is Kind.TEXT or len(body.translate(None, _NOT_TEXT)) == len(body):
        return text
    return None
