"""Whether a body is an array of objects that readers can read. Pure.

Azure ML's model monitor reads all lines of its window in one Spark job, and one line of another kind fails the whole
window: ``data`` that is no array of objects, two names in an object that are equal, or equal but for case. DuckDB fails
on such names, too, also where they are in different rows. So these are refused, and their sender is told.

The body is checked by pieces of some rows each: between two of them other threads get on. A row that is larger than
that is checked without making objects of all that is in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import orjson

from proxy.capture.payload import MAX_DEPTH, json_value, outside_strings

PIECE_BYTES = 128 * 1024
LARGE_BYTES = 1024 * 1024  # of a single row
MOST_NAMES = 200_000  # of columns, and of names and objects in one large row: each costs time and memory
_BLANKS = b" \t\r\n"
_FIRST_NAME = re.compile(rb'[ \t\r\n]{0,9}(\{[ \t\r\n]{0,9}"[^"\\]{0,99}")')
_COMMA = re.compile(rb"[ \t\r\n]*,")
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)  # possessive: no input makes it go back
_SHOWN = 40
_BEGINNINGS = {b"{": "an object", b"[": "an array", b'"': "a string"}
_MSGSPECS_KINDS = {"array": "an array", "str": "a string", "bool": "true or false", "null": "null"}
_WORD = re.compile(rb"(true|false|null)(?![0-9A-Za-z_])")
_ANY_ROW = re.compile(rb"\}[ \t\r\n]*,(?=[ \t\r\n]*\{)")
_TOO_MANY = f"row {{}} has more than {MOST_NAMES} names and objects"
_TOO_DEEP = f"it nests deeper than {MAX_DEPTH} levels, which readers fail on"
_check_json = msgspec.json.Decoder(msgspec.Raw).decode
_rows_of_raw = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_raw_rows = msgspec.json.Decoder(list[msgspec.Raw]).decode
_NOT_THERE = re.compile(r"got `(\w+)` - at `\$\[(\d+)\]`")  # of msgspec's errors


class NotRowsError(ValueError):
    """The body is no such array. The message is a sentence about it, ``near`` what stands there."""

    def __init__(self, words: str, near: str = "") -> None:
        super().__init__(words)
        self.near = near


def check(body: bytes | bytearray) -> None:
    """Raises NotRowsError unless ``body`` is such an array; an empty one is."""
    start = len(body) - len(body.lstrip(_BLANKS))
    end = len(body.rstrip(_BLANKS))
    if start >= end:
        raise NotRowsError("the body is empty")
    if body[start : start + 1] != b"[":
        kind = _kind(body, start)
        if kind is None:
            raise _invalid(body, bytes(body[start:end]), start)
        raise NotRowsError(f"the body is {kind}, not an array of objects")
    _Rows(body, start + 1, end - 1).check()


class _Rows:
    """The rows between ``start`` and the last byte, which should be a bracket, at ``end``."""

    def __init__(self, body: bytes | bytearray, start: int, end: int) -> None:
        self._body = body
        self._end = end
        self._start = start  # of the next piece
        self._count = 0  # of rows before it
        self._columns: dict[str, str] = {}  # the names in all rows, by their lower case
        self._valid = False  # the rest is known to be JSON
        first = _FIRST_NAME.match(body, start, end)  # rows of a frame begin alike
        self._between = re.compile(rb"\}[ \t\r\n]*,(?=[ \t\r\n]*%b)" % re.escape(first[1] if first else b""))

    def check(self) -> None:
        while True:
            try:
                stop = self._guess()
                rows = self._piece(stop)
            except (LookupError, orjson.JSONDecodeError):
                stop = self._sure()
                try:
                    rows = self._piece(stop)
                except orjson.JSONDecodeError:  # a number beyond what readers take, or half a surrogate pair
                    raise _invalid(self._body, self._rest(), self._start - 1) from None
            if self._count and not rows:
                raise NotRowsError(f"the body is not valid JSON: no row follows the comma at byte {self._start - 1}")
            for names in {tuple(row) for row in rows}:
                _check_case(names, self._columns)
            if len(self._columns) > MOST_NAMES:
                raise NotRowsError(f"the rows have more than {MOST_NAMES} columns")
            if stop == self._end:
                return
            self._count += len(rows)
            self._start = self._body.find(b",", stop) + 1

    def _guess(self) -> int:
        """Where a row seems to end, PIECE_BYTES on or a little later. Raises LookupError.

        It may be within a string or another array. Then the piece is not valid JSON, which has but one reading.
        """
        for between in (self._between, _ANY_ROW):
            found = between.search(self._body, self._start + PIECE_BYTES, self._start + LARGE_BYTES)
            if found is not None and found.start() < self._end:
                return found.start() + 1
        if self._end - self._start > LARGE_BYTES:
            raise LookupError
        return self._end

    def _piece(self, stop: int) -> list[dict[str, Any]]:
        """The rows up to ``stop``. Raises NotRowsError, or JSONDecodeError if it is no JSON, and small."""
        closing = self._body[stop : stop + 1] if stop == self._end else b"]"
        piece = b"".join((b"[", memoryview(self._body)[self._start : stop], closing))
        return _small(piece, self._count) if len(piece) <= LARGE_BYTES + 2 else _large(piece, self._count)

    def _sure(self) -> int:
        """Where a row ends. Raises NotRowsError if the rest is no JSON."""
        if self._valid:
            return self._end_of_row()
        rest = self._rest()
        try:
            _check_json(rest)
            rest.decode()
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise _invalid(self._body, rest, self._start - 1) from None
        except RecursionError:
            raise NotRowsError(_TOO_DEEP) from None
        self._valid = True
        return self._end if sum(_names_and_objects(rest)) <= MOST_NAMES else self._end_of_row()

    def _rest(self) -> bytes:
        return b"".join((b"[", memoryview(self._body)[self._start : self._end + 1]))

    def _end_of_row(self) -> int:
        """Where the first row ends that ends PIECE_BYTES on or later, or else the last one. Raises NotRowsError."""
        depth = objects = 0
        number, behind = self._count, self._start
        for token in _TOKEN.finditer(self._body, self._start, self._end):
            mark = token[0][:1]
            if depth == 0:
                before = self._body[behind : token.start()].strip(_BLANKS + b",")
                if before or mark != b"{":
                    raise _no_row(number, _kind(before or mark, 0) or "a number")
            if mark in b"{[":
                depth += 1
                objects += mark == b"{"
                if objects > MOST_NAMES:
                    raise NotRowsError(_TOO_MANY.format(number))
            elif mark in b"}]":
                depth -= 1
                if depth == 0:
                    objects = 0
                    number += 1
                    behind = token.end()
                    if behind - self._start >= PIECE_BYTES and _COMMA.match(self._body, behind):
                        return behind
        return self._end


def _small(piece: bytes, rows_before: int) -> list[dict[str, Any]]:
    elements = orjson.loads(piece)
    for number, element in enumerate(elements, rows_before):
        if type(element) is not dict:
            raise _no_row(number, _kind_of(element))
    text = b"".join(outside_strings(piece))
    inner: list[dict[str, Any]] = []
    if text.count(b"[") + text.count(b"{") > len(elements) + 1:
        inner = list(_objects_within(elements))
    _check_names(piece, text.count(b":"), elements, inner)
    return list(elements)


def _large(piece: bytes, rows_before: int) -> list[dict[str, Any]]:
    """Of large rows, which are valid JSON, only their names and the objects within them are made objects of."""
    if sum(_names_and_objects(piece)) > MOST_NAMES:  # rows that were told apart
        for number, raw in enumerate(_raw_rows(piece), rows_before):
            if sum(_names_and_objects(bytes(raw))) > MOST_NAMES:
                raise NotRowsError(_TOO_MANY.format(number))
    try:
        rows = _rows_of_raw(piece)
    except msgspec.ValidationError as error:
        found = _NOT_THERE.search(str(error))
        kind, at = found.groups() if found else ("", 0)
        raise _no_row(rows_before + int(at), _MSGSPECS_KINDS.get(kind, "a number")) from None
    names = 0
    inner: list[dict[str, Any]] = []
    for number, (raw, cells) in enumerate(zip(_raw_rows(piece), rows, strict=True), rows_before):
        row = bytes(raw)
        counted = _names_and_objects(row)
        if json_value(b"[%b]" % row) is None:  # valid it is, but for what other readers want
            raise NotRowsError(f"row {number} is not UTF-8, or nests deeper than {MAX_DEPTH} levels")
        names += counted[0]
        if counted[1] > 1:
            texts = map(bytes, cells.values())
            inner += _objects_within([[orjson.loads(text)] for text in texts if b"{" in text])
    _check_names(piece, names, rows, inner)
    return rows


def _names_and_objects(json: bytes) -> tuple[int, int]:
    """How many names there are in valid JSON, and how many objects."""
    names = objects = 0
    for text in outside_strings(json):
        names += text.count(b":")
        objects += text.count(b"{")
    return names, objects


def _check_names(piece: bytes, names: int, rows: list[dict[str, Any]], inner: list[dict[str, Any]]) -> None:
    """``names`` is how many there are in the text; objects have each but once."""
    if names != sum(map(len, rows)) + sum(map(len, inner)):
        raise NotRowsError(f"an object has the name {_shown(_repeated(piece))} twice")
    for one in {tuple(value) for value in inner}:
        _check_case(one, {})


def _check_case(names: Iterable[str], seen: dict[str, str]) -> None:
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise NotRowsError(
                f"the names {_shown(other)} and {_shown(name)} are equal but for case, and Spark and DuckDB can't read a "
                "dataset with both; rename one of the columns"
            )


def _objects_within(values: list[Any]) -> Iterator[dict[str, Any]]:
    """Every object within ``values``, at any depth, but not those themselves."""
    level = values
    depth = 2  # of the body
    while level:
        if depth > MAX_DEPTH:
            raise NotRowsError(_TOO_DEEP)
        within: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                if level is not values:
                    yield value
                within += [one for one in value.values() if isinstance(one, dict | list)]
            else:
                within += [one for one in value if isinstance(one, dict | list)]
        level = within
        depth += 1


def _repeated(array: bytes) -> str:
    found = ""

    def note(pairs: list[tuple[str, Any]]) -> None:
        nonlocal found
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                found = name
            names.add(name)

    json.loads(array, object_pairs_hook=note, parse_int=str, parse_float=str)  # Python makes no int of 5000 digits
    return found


# --- words ---


def _kind(text: bytes | bytearray, at: int) -> str | None:
    """Of the JSON that begins there; None: it is none."""
    word = _WORD.match(text, at)
    if word is not None:
        return word[1].decode()
    first = bytes(text[at : at + 1])
    return "a number" if first in b"-0123456789" else _BEGINNINGS.get(first)


def _kind_of(value: Any) -> str:
    kinds: dict[type, str] = {list: "an array", str: "a string", bool: "true" if value else "false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _no_row(number: int, kind: str) -> NotRowsError:
    return NotRowsError(f"element {number} of the array is {kind}; each has to be an object, a row of the frame")


def _shown(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…")


def _invalid(body: bytes | bytearray, text: bytes, offset: int) -> NotRowsError:
    """``text`` is the body from ``offset`` on."""
    try:
        orjson.loads(text[:LARGE_BYTES])  # what is wrong further on is told without its place
    except orjson.JSONDecodeError as error:
        try:
            at = offset + len(text[:LARGE_BYTES].decode()[: error.pos].encode())
        except UnicodeDecodeError as coding:
            if coding.end == LARGE_BYTES and "end of data" in coding.reason:  # it is cut there by us
                return NotRowsError(f"the body is not valid JSON, behind byte {offset + LARGE_BYTES}")
            return NotRowsError(f"the body is not UTF-8, at byte {offset + coding.start}")
        if at < offset + LARGE_BYTES - 1 or len(text) <= LARGE_BYTES:
            near = bytes(body[max(0, at - _SHOWN // 2) : at + _SHOWN // 2]).decode(errors="replace")
            words = error.msg.partition(": line")[0]
            return NotRowsError(f"the body is not valid JSON: {words} at byte {at}", f"near {near!r}")
    return NotRowsError(f"the body is not valid JSON, behind byte {offset + LARGE_BYTES}")
