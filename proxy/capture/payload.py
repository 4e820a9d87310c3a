"""How a body stands in the ``data`` of its line: as JSON, as a string, or in a file of its own. Pure.

JSON is embedded byte for byte, so that numbers keep their digits and keys their order; only CR and LF are dropped,
which in valid JSON stand between tokens. Text becomes a JSON string. Everything else goes to a file.
"""

from __future__ import annotations

import codecs
from email.message import Message
from enum import Enum
from functools import lru_cache

import msgspec
import orjson

_LINE_ENDS = b"\r\n"
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
_check_json = msgspec.json.Decoder(msgspec.Raw).decode


class Kind(Enum):
    """What a content type claims of a body."""

    JSON = "json"
    TEXT = "text"
    OTHER = "other"
    ABSENT = "absent"


@lru_cache(maxsize=1024)
def claim(content_type: str | None) -> tuple[Kind, str | None]:
    """What a Content-Type header claims, and the charset that it names."""
    if not content_type or not content_type.strip():
        return Kind.ABSENT, None
    header = Message()
    header["Content-Type"] = content_type.encode("ascii", "replace").decode()
    essence = content_type.partition(";")[0].strip().lower()
    charset = header.get_content_charset()
    if essence in ("application/json", "text/json") or essence.endswith("+json"):
        return Kind.JSON, charset
    if essence.startswith("text/") or essence.endswith(("+xml", "+yaml")) or essence in _TEXTUAL:
        return Kind.TEXT, charset
    return Kind.OTHER, charset


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

    Lone surrogates (``"\\ud800"``) and nesting beyond about 1000 count as invalid: readers fail on them.
    """
    try:
        _check_json(body)
        if not body.isascii():
            body.decode()
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    if b"\n" in body or b"\r" in body:
        return body.translate(None, _LINE_ENDS)
    return body


def _text(body: bytes, kind: Kind, charset: str | None) -> str | None:
    if kind is Kind.TEXT and charset is not None:
        text = _in_charset(body, charset)
        if text is not None:
            return text
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    if kind is Kind.TEXT or len(body.translate(None, _NOT_TEXT)) == len(body):
        return text
    return None


def _in_charset(body: bytes, charset: str) -> str | None:
    try:
        text, _ = codecs.lookup(charset).decode(body)
        # orjson refuses what some codecs (utf-7, raw_unicode_escape) let by: lone surrogates.
        text.encode()
    except (LookupError, ValueError, AttributeError, TypeError):
        return None
    return text if isinstance(text, str) else None
