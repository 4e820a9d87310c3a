"""Whether a body is an array of objects that every reader can read: against what Python's own parser says of it."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.custom_logging import rows
from proxy.custom_logging.rows import NotRowsError, check
from tests.capture.test_payload import BLANKS, JSON_TEXTS, NUMBERS, STRINGS


def refusal(body: bytes, *sizes: int) -> NotRowsError:
    """Of a body that is checked with these PIECE_BYTES, LARGE_BYTES and MOST_NAMES; without words if it is taken."""
    frame = bytearray(body)
    refused = NotRowsError("")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("PIECE_BYTES", "LARGE_BYTES", "MOST_NAMES"), sizes, strict=False):
            patch.setattr(rows, name, size)
        try:
            check(frame)
        except NotRowsError as error:
            refused = error
    assert frame == body
    frame += b"x"  # nobody holds a view of it
    assert f"{refused}{refused.near}".isprintable()
    assert len(str(refused)) < 250 > len(refused.near)
    if refused.near:
        assert "is not valid JSON: " in str(refused)
        assert re.match("near ['\"]", refused.near)
    return refused


def verdict(body: bytes, *sizes: int) -> str:
    """What is said of it; "" if it is taken."""
    return str(refusal(body, *sizes))


# --- the oracle: by Python's own parser, which is told to be as strict as readers are ---

EMPTY = "the body is empty"
INVALID = "is not valid JSON|is not UTF-8"
NO_ARRAY = ", not an array of objects"
NO_OBJECT = "each has to be an object"
TWICE = "has the name .* twice"
BUT_FOR_CASE = "equal but for case"
DEEP = "deeper than 100 levels"
INFINITE = "number is infinity|is not valid JSON, behind byte"  # readers take it, orjson doesn't
TOO_MANY = "row .* has more than .* names and objects"
WIDE_FRAME = "rows have more than .* columns"


class Pairs(list[tuple[str, Any]]):
    """An object."""


class Found:
    """What is wrong with a body: what it is refused for, and what it may be refused for."""

    def __init__(self) -> None:
        self.certain: set[str] = set()
        self.possible: set[str] = set()

    def number(self, text: str) -> str:
        if math.isinf(float(text)):
            self.possible.add(INFINITE)
        return text


def no_constant(name: str) -> None:
    raise ValueError(name)


def faults(body: bytes, most_names: int, *, whole: bool = True) -> Found:
    found = Found()
    if not body.strip(b" \t\r\n"):
        found.certain.add(EMPTY)
        return found
    try:
        hooks: dict[str, Any] = {"parse_constant": no_constant, "parse_int": found.number, "parse_float": found.number}
        value = json.loads(body.decode(), object_pairs_hook=Pairs, **hooks)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates
    except ValueError:
        found.certain.add(INVALID)
        found.possible.add(NO_ARRAY)  # by its beginning
        for row in re.finditer(b"}", body) if whole else ():  # or by the rows before
            before = faults(body[: row.end()] + b"]", most_names, whole=False)
            if INVALID not in before.certain:
                found.possible |= before.certain | before.possible
        return found
    if type(value) is not list:
        found.certain.add(NO_ARRAY)
        return found
    found.certain |= {NO_OBJECT for element in value if type(element) is not Pairs} | set(_faults(value, 1))
    columns = [name for row in value if type(row) is Pairs for name, _ in row]
    if equal_but_for_case(columns):
        found.certain.add(BUT_FOR_CASE)
    if len(set(columns)) > most_names:
        found.certain.add(WIDE_FRAME)
    found.possible |= {TOO_MANY for row in value if _size(row) > most_names}
    names: dict[tuple[str, ...], list[str]] = {}
    _by_path(value, (), names)
    found.possible |= {BUT_FOR_CASE for one in names.values() if equal_but_for_case(one)}
    return found


def _faults(value: Any, depth: int) -> Iterator[str]:
    if depth > 100:
        yield DEEP
    if type(value) is Pairs:
        names = [name for name, _ in value]
        if len(set(names)) < len(names):
            yield TWICE
        if equal_but_for_case(names):
            yield BUT_FOR_CASE
        inner = [one for _, one in value]
    else:
        inner = value
    for one in inner:
        if isinstance(one, list):
            yield from _faults(one, depth + 1)


def _size(value: Any) -> int:
    """Names and objects."""
    inner = [one for _, one in value] if type(value) is Pairs else value if type(value) is list else []
    return (1 + len(inner) if type(value) is Pairs else 0) + sum(map(_size, inner))


def _by_path(value: Any, path: tuple[str, ...], names: dict[tuple[str, ...], list[str]]) -> None:
    """Readers make one structure of all objects at a path; that of an array's elements is its own."""
    if type(value) is Pairs:
        for name, one in value:
            names.setdefault(path, []).append(name)
            _by_path(one, (*path, name.lower()), names)
    elif type(value) is list:
        for one in value:
            _by_path(one, path, names)


def equal_but_for_case(names: list[str]) -> bool:
    return len({name.lower() for name in names}) < len(set(names))


def agree(body: bytes, piece_bytes: int, large_bytes: int, most_names: int) -> None:
    said = verdict(body, piece_bytes, large_bytes, most_names)
    found = faults(body, most_names)
    if found.certain:
        assert said, found.certain
    if said:
        assert any(re.search(one, said) for one in found.certain | found.possible), (said, vars(found))


# --- bodies: mostly arrays of objects, with what looks like an end of one where there is none ---

NAMES = st.sampled_from(
    ['"a"', '"A"', '"\\u0061"', '"b"', '"},"', '"}],"', '"[{"', '":"', '"\\""', '"\\\\"', '"\\\\\\"},"', '"ß"', '"K"', '"\u212a"']
)  # fmt: skip
TRICKY = st.sampled_from(['"},{"', '"},"', '"\\"},"', '"},\\\\"', '"]"', '[{},{}]', '{"a":[{},{"A":{}}]}', '"é},"'])  # fmt: skip
VALUES = NUMBERS | STRINGS | TRICKY | st.sampled_from(["true", "false", "null", "[]", "{}"])


def _objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.tuples(BLANKS, NAMES | STRINGS, BLANKS, values, BLANKS).map(
        lambda m: f"{m[0]}{m[1]}:{m[2]}{m[3]}{m[4]}"
    )
    return st.lists(members, max_size=4).map(lambda found: f"{{{','.join(found)}}}")


def _arrays(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(st.tuples(BLANKS, values, BLANKS).map("".join), max_size=5).map(
        lambda found: f"[{','.join(found)}]"
    )


NESTED = st.recursive(VALUES, lambda below: _objects(below) | _arrays(below), max_leaves=8)
FRAMES = st.tuples(BLANKS, _arrays(_objects(NESTED)), BLANKS).map("".join)
MIXED = _arrays(_objects(VALUES) | NESTED)
SIZES = st.integers(1, 60) | st.just(rows.PIECE_BYTES)
LARGE = st.integers(5, 60) | st.just(rows.LARGE_BYTES)
MOST = st.integers(1, 20) | st.just(rows.MOST_NAMES)


@settings(deadline=None, max_examples=250)
@given(text=FRAMES | MIXED | JSON_TEXTS, size=SIZES, large=LARGE, most=MOST)
@example(text='[{"a":"},"},{"b":[{},{"A":{},"a":1}]}]', size=1, large=5, most=20)
@example(text='[{"a":1},{"b":[{},[1,{}]]},{"c":{"d":1}},{}]', size=1, large=5, most=5)
def test_any_json_is_judged_as_by_pythons_parser(text: str, size: int, large: int, most: int) -> None:
    agree(text.encode(), size, large, most)


@settings(deadline=None, max_examples=120)
@given(text=FRAMES, size=SIZES, large=LARGE, most=MOST, data=st.data())
def test_a_body_that_was_damaged_is_judged_as_by_pythons_parser(
    text: str, size: int, large: int, most: int, data: st.DataObject
) -> None:
    """A byte is missing, or there is one too many, or it is cut."""
    body = text.encode()
    at = data.draw(st.integers(0, len(body)))
    more = data.draw(st.sampled_from([b"", *b', } { ] [ " \\ x \x00 \xff },{ 1'.split(b" ")]))
    rest = data.draw(st.sampled_from([body[at:], body[at + 1 :], b""]))
    agree(body[:at] + more + rest, size, large, most)


@settings(deadline=None, max_examples=50)
@given(elements=st.lists(_objects(VALUES), min_size=1, max_size=5))
def test_where_it_is_cut_makes_no_difference(elements: list[str]) -> None:
    body = f"[{','.join(elements)}]".encode()
    cuts = [(at, *more) for at in range(1, len(body) + 1) for more in ((), (10,), (10, 10))]
    found = {verdict(body, *sizes) for sizes in cuts}
    assert len({not said for said in found if not re.search(f"{INFINITE}|{TOO_MANY}|{WIDE_FRAME}", said)}) <= 1


# --- pieces ---

ROWS = [
    '{"a":"},"}', '{"a":"\\"},"}', '{"a":"\\\\"}', '{"},":1}', '{"a":[{"b":1},{"b":2}]}', "{}", '{ "a" : "é},{" } ',
    '{"a":{"b":{"c":1},"d":{}},"e":[[],{}]}', '{"a":"[{\\"b\\":1},"}',
]  # fmt: skip


@pytest.mark.parametrize("bad", ["7", "null", "[{}]", '"},"', "true"])
def test_the_element_that_is_no_object_is_named_wherever_it_is_cut(bad: str) -> None:
    for at in range(len(ROWS) + 1):
        body = f"[{','.join([*ROWS[:at], bad, *ROWS[at:]])}]".encode()
        for size in range(1, len(body) + 1):
            assert verdict(body, size).startswith(f"element {at} of the array is "), size


@pytest.mark.parametrize(
    "end",
    [
        ",]", ",,{}]", "{}]", ",{]", ",}]", "},{]", ",{},]", " 1]", '"]', ', "]', ",{}]]", "],[{}]", ']{"a":1}]', ",\x00{}]",
        "", "]]", "] ]", "}", "],", "]\n{}", "]\x00", "]]]", "][",
    ],
)  # fmt: skip
def test_an_array_ends_once_wherever_it_is_cut(end: str) -> None:
    body = f"[{','.join(ROWS)}{end}".encode()
    for size in range(1, len(body) + 1):
        assert verdict(body, size).startswith("the body is not valid JSON: "), size


def test_rows_are_taken_wherever_they_are_cut() -> None:
    body = f" \r\n[{' , '.join(ROWS)} ]\t".encode()
    for size in range(1, len(body) + 1):
        assert verdict(body, size) == verdict(body, size, 10) == "", size
    assert verdict(body, 1, 10, 10) == ""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How much is given to what reads it."""
    sizes: dict[str, list[int]] = {}

    def count(where: Any, name: str) -> None:
        read = getattr(where, name)

        def counted(text: bytes) -> Any:
            sizes.setdefault(name, []).append(len(text))
            return read(text)

        monkeypatch.setattr(where, name, counted)

    count(orjson, "loads")
    for name in ("_check_json", "outside_strings", "json_value"):
        count(rows, name)
    return sizes


@pytest.mark.parametrize(
    "row",
    [
        b'{"n":1,"text":"%b"}' % (b"x" * 100), b'{"n":1,"of":[{"m":1},{"m":2}],"text":"}, {"}', b"{}",
        b'{ "n" :[{"m":1},{"m":2},{"n" :1}]} ', b'{"%b":[{"m":1}]}' % (b"n" * 99),
    ],
)  # fmt: skip
def test_a_large_frame_goes_by_pieces_of_some_rows(row: bytes, parsed: dict[str, list[int]]) -> None:
    """While one is parsed no other thread gets on. None is parsed twice: it ends where the first row's name follows."""
    body = b"[%b]" % b",".join([row] * (2_000_000 // len(row)))
    check(body)
    pieces = parsed["loads"]
    assert max(pieces) <= rows.PIECE_BYTES + 1000
    assert sum(pieces) <= len(body) + 2 * len(pieces)


def test_rows_need_not_begin_alike(parsed: dict[str, list[int]]) -> None:
    check(b'[{"first":1},%b]' % b",".join([b'{"a":1,"b":2}'] * 200_000))
    assert "_check_json" not in parsed  # of all the rest, which takes a while


def test_only_what_has_objects_within_is_made_objects_of_in_a_large_row(parsed: dict[str, list[int]]) -> None:
    check(b'[{"wide":[%b0],"o":[{"a":1}]},{"wide":[],"o":{}}]' % (b"1," * 1_000_000))
    assert max(parsed["loads"]) < 100


@pytest.mark.parametrize(
    "body",
    [
        b'[{"a":"%b"}]' % (b"}," * 2_000_000),
        b'[{"a":[%b{}]}]' % (b"{}," * 150_000),
        b"[%b]" % b",".join([b'{"a":"%b"}' % (b"}," * 80_000)] * 25),
        b"[%b]" % b",".join([b'{"a":[%b{}]}' % (b"{}," * 50_000)] * 25),
        b"[%b{}]" % (b"{}," * 500_000),
        b'[{"a":x},%b{}]' % (b"{}," * 1_000_000),
        b'[{"first":1},%b]' % b",".join([b'{"a":[%b{}]}' % (b"{}," * 50_000)] * 25),
    ],
    ids=["string", "array", "strings", "arrays", "small", "invalid", "unlike"],
)
def test_no_body_is_read_over_and_over(body: bytes, parsed: dict[str, list[int]]) -> None:
    with contextlib.suppress(NotRowsError):
        check(body)
    assert sum(map(sum, parsed.values())) < 6 * len(body)


# --- large rows ---

WIDE = f'"wide":"{"x" * 100}"'
BUT_FOR = "the names '{}' and '{}' are equal but for case, "
BEHIND = "the body is not valid JSON, behind byte 50"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (f"[[{{{WIDE}}}]]", "element 0 of the array is an array; each has to be an object"),
        (f"[{WIDE[7:]}]", "element 0 of the array is a string; each has to be an object"),
        (f'[ true,{{{WIDE}}},{{"a":1,"a":2}}]', "element 0 of the array is true"),
        (f'[{{{WIDE}}},7,{{{WIDE},"a":[{",".join(["{}"] * 9)}]}}]', "element 1 of the array is a number"),
        (f'[{{{WIDE},"a":1,"a":1}}]', "an object has the name 'a' twice"),
        (f'[{{{WIDE}}},{{{WIDE},"o":[[{{"ä":1,"\\u00e4":1}}]]}}]', "an object has the name 'ä' twice"),
        (f'[{{"b":{{"a":{{"a":1}}}}}},{{"o":{{{WIDE},"b":[{{"a":1,"a":1}}]}}}}]', "an object has the name 'a' twice"),
        (f'[{{{WIDE},"WIDE":1}}]', BUT_FOR.format("wide", "WIDE")),
        (f'[{{"o":[{{}},{{"a":{{{WIDE},"Wide":1}}}}]}}]', BUT_FOR.format("wide", "Wide")),
        (f'[{{"a":1}},{{{WIDE}}},{{"b":{{"a":1}}}},{{"A":1,{WIDE}}}]', BUT_FOR.format("[aA]", "[aA]")),
        (f'[{{{WIDE},"a":NaN}}]', BEHIND),
        (f'[{{"a":NaN,{WIDE}}}]', "the body is not valid JSON: unexpected character, expected a JSON value at byte 6"),
        (f'[{{{WIDE},"a":"\\ud800"}}]', BEHIND),
        (f'[{{{WIDE},"a":[{{}},"\\ud800"]}}]', BEHIND),
        (f"[{{{WIDE}}},{{{WIDE}}},]", BEHIND),
        (f'[{{"a":"{"é" * 100}","b":NaN}}]', BEHIND),
        (f'[{{"n":{"1" * 5000},"a":1,"a":2}}]', "an object has the name 'a' twice"),
        (f'[{{{WIDE},"a":{"[" * 99}{"]" * 99}}}]', "row 0 .*nests deeper than 100 levels"),
        (f'[{{{WIDE},"a":{"[" * 98}{"]" * 98},"b":[{{"wide":[{{"wide":1}}]}}]}}]', "$"),
        (f'[{{{WIDE}}},{{{WIDE}}},{{"a":"{{"}},{{{WIDE},"o":{{"A":1}}}},{{}}]', "$"),
    ],
)
def test_large_rows(body: str, said: str) -> None:
    for most_names in (8, rows.MOST_NAMES):  # one by one, and all at once
        assert re.match(said, verdict(body.encode(), 1, 50, most_names)), most_names


def test_what_is_not_utf_8_in_a_large_row() -> None:
    for bad in (b"\xff", b"\xed\xa0\x80", b"\xc0\xaf"):
        assert verdict(b'[{"a":"%b","b":"%b"}]' % (bad, b"x" * 100), 1, 50) == "the body is not UTF-8, at byte 7"
        assert verdict(b'[{"b":"%b","a":"%b"}]' % (b"x" * 100, bad), 1, 50) == BEHIND


@pytest.mark.parametrize("bad", ["7", '{"a":' + "[" * 99 + "]" * 99 + "}", '{"a":[{}' + ",{}" * 9 + "]}"])
def test_the_large_row_that_is_refused_is_named(bad: str) -> None:
    for size in (1, 30, 200):
        assert re.match("(element|row) 2 ", verdict(f"[{{}},{{{WIDE}}},{bad},{{{WIDE}}}]".encode(), size, 50, 10)), size


@pytest.mark.parametrize(
    "row",
    ['{"o":[{},{},{},{},{},{},{},{}]}', '{"a":{"a":{"a":{"a":{"a":[1]}}}}}', '{"a":{},"c":{},"d":{},":{":":{","e":{}}'],
)
def test_names_and_objects_of_a_large_row_are_counted(row: str) -> None:
    assert verdict(f"[{row}]".encode(), 1, 10, 10) == ""
    assert verdict(f"[{row},{row},{row}]".encode(), 1, 10, 10) == ""
    more = f'[{{}},{row},{row[:-1]},"b":1}},{row}]'.encode()
    assert re.fullmatch("row 2 has more than [0-9]+ names and objects", verdict(more, 1, 10, 10))
    assert verdict(more, 1, 10, 100) == ""


def test_how_many_may_be_in_a_large_row() -> None:
    def row(objects: int) -> bytes:
        return b'{"a":[%b{}],"b":"%b"}' % (b"{}," * (objects - 1), b"x" * rows.LARGE_BYTES)

    most = rows.MOST_NAMES - 3
    begin = b'[%b,{"a":[%b0]}' % (row(most), b"0," * rows.LARGE_BYTES)
    assert verdict(b"%b,%b]" % (begin, row(most))) == ""
    for more in (most + 1, most * 2):
        assert verdict(b"%b,%b]" % (begin, row(more))) == f"row 2 has more than {rows.MOST_NAMES} names and objects"


@pytest.mark.parametrize(
    "body",
    [
        f'[{{"a":1}},{{"a":1}},{{"a":1,"b":1,"c":1,"d":1,"e":1,{WIDE}}},{{"a":1}}]',
        f'[{{"a":[{",".join(["[]"] * 10)}],{WIDE}}},{{"b":1}},{{"b":1}},{{"b":1}},{{"b":1}}]',
    ],
)
def test_what_counts_for_another_row_or_not_at_all(body: str) -> None:
    assert verdict(body.encode(), 30, 50, 10) == ""


def test_how_many_columns_there_may_be() -> None:
    some = ",".join(f'{{"a":1,"{n}":1}}' for n in range(9))
    for size in (1, 30, rows.PIECE_BYTES):
        assert verdict(f"[{some},{some}]".encode(), size, 50, 10) == ""
        assert verdict(f'[{some},{some},{{"b":1}}]'.encode(), size, 50, 10) == "the rows have more than 10 columns"


# --- names ---


@pytest.mark.parametrize(
    ("object_", "name"),
    [
        ('{"a":1,"a":2}', "a"), ('{"a":1,"\\u0061":2}', "a"), ('{"b":1,"\\n":1,"a":2,"\\u000A":3}', "\n"),
        ('{"o":{"a":1,"a":2}}', "a"), ('{"o":[[{"größe":1,"größe":1}]]}', "größe"), ('{"":1,"":2}', ""),
        ('{"a:b":"::","a:b":":"}', "a:b"), ('{"\\\\":1,"\\\\":2}', "\\"), ('{"\\"":1,"\\u0022":2}', '"'),
        ('{"a":1,"b":"\\\\","a":2}', "a"), ('{"n":%s,"a":1,"a":2}' % ("1" * 300), "a"),
    ],
)  # fmt: skip
def test_a_name_that_comes_twice(object_: str, name: str) -> None:
    for body in (f"[{object_}]", f'[{{"a":1}},{{"a":":"}},{object_},{{"b":1}}]'):
        for size in (1, 8, rows.PIECE_BYTES):
            assert verdict(body.encode(), size) == f"an object has the name {name!r} twice"


@pytest.mark.parametrize(
    "object_",
    [
        '{"a":1,"A":2}', '{"Größe":1,"grÖsse":1,"GRÖßE":2}', '{"k":1,"\u212a":2}', '{"\\u0041":1,"a":2}',
        '{"x":[{"y":{"İ":1,"i\u0307":2}}]}', '{"a":1},{},{"b":1,"A":1}',
    ],
)  # fmt: skip
def test_names_that_are_equal_but_for_case(object_: str) -> None:
    assert "are equal but for case" in verdict(f"[{object_}]".encode())
    assert "are equal but for case" in verdict(f'[{{"b":1}},{{"b":2}},{object_}]'.encode(), 1)


@pytest.mark.parametrize(
    "body",
    [
        '[{"a":{"A":{"a":1}},"b":{"a":1}}]', '[{"a":{"b":1},"c":{"B":1}}]', '[{"ı":1,"i":2}]', '[{"ß":1,"ss":2}]',
        '[{"a":"A","b":"a:a","c":"{\\"a\\":1,\\"a\\":2}"}]', '[{"":1," ":2}]',
    ],
)  # fmt: skip
def test_names_that_readers_tell_apart(body: str) -> None:
    assert verdict(body.encode()) == ""


def test_columns_of_different_rows_that_are_equal_but_for_case_wherever_they_are_cut() -> None:
    """Readers make one structure of all rows."""
    body = f'[{{"Größe":1}},{",".join(ROWS)},{{"x":"GRÖSSE"}},{{"größe":1}},{{}}]'.encode()
    either = tuple(BUT_FOR.format(*names) for names in (("Größe", "größe"), ("größe", "Größe")))
    for size in range(1, len(body) + 1):
        assert verdict(body, size).startswith(either), size


@pytest.mark.parametrize(
    "body",
    [
        '[{"o":{"a":1}},{"o":{"A":2}}]', '[{"o":[{"a":1},{"A":2}]}]', '[{"o":[[{"a":1}],[{"A":2}]]}]',
        '[{"o":{"p":{"a":1}}},{"o":{"p":{"A":1}}}]',
    ],
)  # fmt: skip
def test_names_of_nested_objects_are_compared_within_each_object_only(body: str) -> None:
    """A known limit (docs/custom-logging.md): readers make one structure of these, too."""
    assert verdict(body.encode()) == ""


def test_long_names_are_shortened() -> None:
    for length, shown in ((40, "k" * 40), (41, "k" * 40 + "…"), (100_000, "k" * 40 + "…")):
        name = "k" * length
        assert verdict(f'[{{"{name}":1,"{name}":2}}]'.encode()) == f"an object has the name '{shown}' twice"
        assert f"'K{shown[1:]}' and '{shown}'" in verdict(f'[{{"K{name[1:]}":1,"{name}":2}}]'.encode())


# --- depth ---


@pytest.mark.parametrize("levels", [1, 50, 97, 98, 99, 100, 300, 1100, 100_000])
@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}"), ('[{"b":', "}]"), ('[[],{"b":', "},{}]")])
def test_depth(levels: int, open_: str, close: str) -> None:
    """The array and its row are two levels."""
    depth = 2 + levels * len(close.replace(",{}", ""))
    body = f'[{{"x":{open_ * levels}null{close * levels}}}]'.encode()
    said = verdict(body)
    assert bool(said) == (depth > 100)
    if 100 < depth < 1000:
        assert said == "it nests deeper than 100 levels, which readers fail on"
    assert bool(verdict(b'[{"y":[[]]},' + body[1:], 1)) == (depth > 100)
    assert bool(verdict(body, 1, 10)) == (depth > 100)


def test_what_is_deep_and_has_no_end() -> None:
    for body in (b"[" * 100_000, b'[{"a":' * 50_000):
        assert verdict(body) == verdict(body, 1, 10) == "it nests deeper than 100 levels, which readers fail on"


def test_an_element_that_is_no_object_and_deep() -> None:
    for levels in (1, 300, 900):
        said = verdict(b"[{},%b%b]" % (b"[" * levels, b"]" * levels))
        assert said.startswith("element 1 of the array is an array; "), levels


def test_what_is_wide_is_not_deep() -> None:
    inner = ",".join(["[[]]", '{"a":{}}'] * 500)
    assert verdict(f'[{{"a":[{inner}]}},{{"b":"{"[" * 200}"}}]'.encode()) == ""


# --- other bodies ---


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{}", "an object"), ('{"columns":["a"],"data":[[1]]}', "an object"), ("[]", "an array"), ('"[{}]"', "a string"),
        ('"{}"', "a string"), ("1.5", "a number"), ("-1e5", "a number"), ("true", "true"), ("false", "false"), ("null", "null"),
    ],
)  # fmt: skip
def test_what_is_no_array_of_objects(text: str, kind: str) -> None:
    if kind != "an array":
        assert verdict(f" {text}\n".encode()) == f"the body is {kind}, not an array of objects"
    if kind != "an object":
        said = f"element 1 of the array is {kind}; each has to be an object, a row of the frame"
        assert verdict(f"[{{}}, {text}]".encode()) == said


def test_bodies_of_next_to_nothing() -> None:
    for body in (b"[]", b"[{}]", b" [ ] ", b"\r\n[\t{ }\n,{}]\r\n", b"[{},{}]"):
        assert verdict(body) == verdict(body, 1) == verdict(body, 2, 1) == verdict(body, 3, 1, 2) == "", body
    assert verdict(b"") == verdict(b" \r\n\t") == "the body is empty"
    assert verdict(b"{]") == verdict(b'{"a":NaN}{}') == "the body is an object, not an array of objects"


@pytest.mark.parametrize(
    "body",
    [
        b"[", b"]", b"[}", b"[{]", b"[{}", b"[,]", b"[{},]", b"[,{}]", b"[{} {}]", b"[{}][{}]", b"[{}]x", b"x", b"[{'a':1}]",
        b"[{a:1}]", b'[{"a":NaN}]', b'[{"a":Infinity}]', b'[{"a":-Infinity}]', b'[{"a":01}]', b'[{"a":1.}]', b'[{"a":+1}]',
        b'[{"a":"\t"}]', b'[{"a":"\n"}]', b'[{"a":"\\x"}]', b'[{"a":"\\ud800"}]', b'[{"\\udc00":1}]',
        b'[{"a":"\\ude00\\ud83d"}]', b"\xef\xbb\xbf[{}]", b"\x00[{}]", b"[{}]\x00", b"\x0b[{}]", b"\x0c[{}]",
        b"[{/* */}]", b"   a\n0  1\n1  2", b"   name  x\n0  n  1", b"trues", b"false_", b"null0",
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_json(body: bytes) -> None:
    assert verdict(body).startswith("the body is not valid JSON: ")
    assert verdict(body, 1).startswith("the body is not valid JSON: ")


@pytest.mark.parametrize(
    ("body", "at"),
    [
        (b'[{"a":"\xff"}]', 7), (b'[{"a":"\xed\xa0\x80"}]', 7), ('[{"größe":1}]'.encode("latin-1"), 5), (b"\xa0[{}]", 0),
        ('[{"a":"東京'.encode() + b'\xc0\xaf"}]', 13), (b" \n \xff[{}]", 3), ('[{"a":1}]'.encode("utf-16"), 0), (b"[{}]\xff", 4),
    ],
)  # fmt: skip
def test_what_is_not_utf_8(body: bytes, at: int) -> None:
    for size in range(1, len(body) + 1):
        assert verdict(body, size) == f"the body is not UTF-8, at byte {at}"


@pytest.mark.parametrize("text", ["x", "größe", "東京" * 100])
def test_where_it_is_no_json_is_shown_to_its_sender_only(text: str) -> None:
    before = ",".join(f'{{"{text}":"{text}{n}"}}' for n in range(1000))
    body = f'[{before},{{"n":NaN,"secret":1}}]'.encode()
    at = body.index(b"NaN")
    for size in (1, 100, 10_000, rows.PIECE_BYTES):
        refused = refusal(body, size)
        assert str(refused) == f"the body is not valid JSON: unexpected character, expected a JSON value at byte {at}"
        assert '{"n":NaN,"secret' in refused.near


def test_what_is_shown_of_a_body() -> None:
    for pad in range(5):
        assert refusal(b"[" + b" " * pad + b"x]").near == f"near '[{' ' * pad}x]'"
        assert refusal(b'[{"a":"' + b"x" * pad).near == f"""near '[{{"a":"{"x" * pad}'"""
        assert refusal(b"[{}," + b" " * pad + b"]", 1).near == ""
    near = refusal(b'[{"a":\x00\r\n"\x1b[31m"}]').near
    assert near == r"""near '[{"a":\x00\r\n"\x1b[31m"}]'"""
