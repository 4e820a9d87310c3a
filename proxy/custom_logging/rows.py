"""Whether a body is an array of objects that every reader can read. Pure.

Azure ML's model monitor reads all lines of its window in one Spark job, and one line of another kind fails the whole
window: ``data`` that is no array of objects, two keys of an object that are equal, or equal but for case. DuckDB fails
on such keys, too. So these are refused, and their sender is told.

The body is parsed by pieces of some rows each: between two of them other threads get on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from proxy.capture.payload import MAX_DEPTH

PIECE_BYTES = 128 * 1024
_BLANK = b" \t\r\n"
_SHOWN_BYTES = 40
_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


class NotRowsError(ValueError):
    """The body is no array of objects; the message is a sentence about it."""


def check(body: bytes | bytearray) -> None:
    """Raises NotRowsError unless ``body`` is such an array; an empty one is."""
    start, end = _trimmed(body)
    if body[start : min(start + 1, end)] != b"[":
        raise NotRowsError(_other(body[start:end]))
    start += 1
    rows = 0
    while True:
        stop, found = _next(body, start, end)
        if rows and not found:
            raise NotRowsError(f"the body is not valid JSON: there is no row behind the comma at byte {start - 1}")
        _check(found, body, start, stop, rows)
        rows += len(found)
        if stop >= end - 1:
            return
        start = stop + 1


def _trimmed(body: bytes | bytearray) -> tuple[int, int]:
    start, end = 0, len(body)
    while start < end and body[start] in _BLANK:
        start += 1
    while end > start and body[end - 1] in _BLANK:
        end -= 1
    return start, end


def _next(body: bytes | bytearray, start: int, end: int) -> tuple[int, list[Any]]:
    """Where the next piece ends, and what is in it: as many elements as fit in PIECE_BYTES, or one more.

    ``},`` is taken for the end of an element. Where it was none, within a string or another array, the piece is not
    valid JSON: JSON has but one reading from its beginning on.
    """
    size = PIECE_BYTES
    while True:
        stop = body.find(b"},", start + size, end) + 1 or end - 1
        last = stop == end - 1
        try:
            return stop, orjson.loads(b"[" + body[start:stop] + (body[end - 1 : end] if last else b"]"))
        except orjson.JSONDecodeError as error:
            if last:
                raise NotRowsError(_invalid(body, start + error.pos - 1, error.msg)) from None
            size *= 2


def _check(elements: list[Any], body: bytes | bytearray, start: int, stop: int, rows_before: int) -> None:
    for number, element in enumerate(elements):
        if type(element) is not dict:
            kind = _KINDS.get(type(element), "a number")
            raise NotRowsError(
                f"element {rows_before + number} of the array is {kind}; each has to be an object, a row of the frame"
            )
    text = _outside_strings(bytes(body[start:stop]))
    objects: Iterable[dict[str, Any]] = elements
    if text.count(b"[") + text.count(b"{") > len(elements):
        objects = list(_objects(elements))
    if text.count(b":") != sum(map(len, objects)):
        raise NotRowsError(f"an object has the key {_repeated(bytes(body[start:stop]))!r} twice")
    for names in {tuple(one) for one in objects}:
        seen: dict[str, str] = {}
        for name in names:
            other = seen.setdefault(name.lower(), name)
            if other is not name:
                raise NotRowsError(
                    f"the names {other!r} and {name!r} are equal but for case, and Spark and DuckDB can't read a dataset "
                    "with both; rename one of the columns"
                )


def _objects(elements: list[Any]) -> Iterator[dict[str, Any]]:
    """Every object in ``elements``, at any depth."""
    level = elements
    depth = 2  # of the body
    while level:
        if depth > MAX_DEPTH:
            raise NotRowsError(f"it nests deeper than {MAX_DEPTH} levels, which readers fail on")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                yield value
                inner += [one for one in value.values() if isinstance(one, dict | list)]
            else:
                inner += [one for one in value if isinstance(one, dict | list)]
        level = inner
        depth += 1


def _outside_strings(text: bytes) -> bytes:
    """Valid JSON without its strings."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends a string
    return b"".join(text.split(b'"')[::2])


def _repeated(elements: bytes) -> str:
    found = ""

    def note(pairs: list[tuple[str, Any]]) -> None:
        nonlocal found
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                found = name
            names.add(name)

    json.loads(b"[%b]" % elements, object_pairs_hook=note)
    return found


def _other(body: bytes | bytearray) -> str:
    if not body:
        return "the body is empty"
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        return _invalid(body, error.pos, error.msg)
    return f"the body is {_KINDS.get(type(value), 'a number')}, not an array of objects"


def _invalid(body: bytes | bytearray, position: int, reason: str) -> str:
    near = bytes(body[max(0, position - _SHOWN_BYTES // 2) : position + _SHOWN_BYTES // 2]).decode(errors="replace")
    return f"the body is not valid JSON: {reason.partition(': line')[0]} at byte {position}, near {near!r}"
